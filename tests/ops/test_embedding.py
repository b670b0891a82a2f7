"""Lookups in integer tables against decoding the whole table first."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from ryzen_compile import ops
from ryzen_compile.numerics.blockwise import BlockFormat, BlockTensor, absmax_grid, quantize


def table(rows: int, width: int, bits: int, block: int, symmetric: bool) -> BlockTensor:
    w = torch.randn((rows, width), generator=torch.Generator().manual_seed(0))
    form = BlockFormat(bits, block, symmetric)
    return quantize(w, form, *absmax_grid(w, form))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 33), (31, 200)])
def test_rows_are_those_of_the_decoded_table(bits, symmetric, rows, width):
    t = table(rows, width, bits, 32, symmetric)
    ids = torch.tensor([[0, rows - 1, rows // 2]])
    got = ops.embedding_nbits(ids, t.packed, t.scales, t.zeros, width, t.format.stored_bits, 32)
    assert torch.equal(got, t.dequantize()[ids])


def test_opcheck():
    t = table(5, 20, 4, 16, False)
    opcheck(ops.embedding_nbits, (torch.tensor([[1, 4], [0, 0]]), t.packed, t.scales, t.zeros, 20, 4, 16))


def test_an_id_outside_the_table_is_an_error():
    t = table(5, 20, 4, 16, True)
    with pytest.raises(IndexError):
        ops.embedding_nbits(torch.tensor([5]), t.packed, t.scales, t.zeros, 20, 4, 16)
