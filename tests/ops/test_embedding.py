"""Lookups in tables of codes against decoding the whole table first."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.library import opcheck

from ryzen_compile import ops
from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.blockwise import BlockFormat, BlockTensor, absmax_grid, quantize
from ryzen_compile.numerics.codebook import CodebookFormat, CodebookTensor


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


def codebook_table(form: CodebookFormat, rows: int, width: int, *, whole: bool = True) -> CodebookTensor:
    """With every optional tensor, or with none but what the form needs."""
    random = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=random)
    codes = torch.randint(0, form.entries, (rows, form.stages, width // form.dim), generator=random)
    kept = torch.arange(0, rows, 3)
    optional = {"gain": normal(width), "offset": normal(width), "kept_ids": kept, "kept": normal(len(kept), width)}
    scales = None if form.group is None else normal(rows, form.groups(width))
    codebook = normal(form.stages, form.entries, form.dim)
    return CodebookTensor.from_codes(codes, codebook, form, width, scales=scales, **optional if whole else {})


def arguments(t: CodebookTensor, ids: torch.Tensor) -> tuple[object, ...]:
    tensors = (t.codes, t.codebook, t.scales, t.gain, t.offset, t.slots, t.kept)
    return ids, *tensors, t.shape[1], t.format.bits, t.format.group_argument


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("bits", "dim", "stages"), [*product((1, 3, 8), (1, 2, 8), (1, 2))])
def test_rows_of_codebooks_are_those_of_the_decoded_table(bits: int, dim: int, stages: int, whole: bool) -> None:
    t = codebook_table(CodebookFormat(bits, dim, stages, 8 if whole else None), 7, 24, whole=whole)
    for ids in (torch.tensor([[0, 6, 3]]), torch.tensor(5), torch.empty(0, dtype=torch.int64)):
        got = ops.codebook_embedding(*arguments(t, ids))
        assert torch.equal(got, t.decode()[ids]) and got.shape == (*ids.shape, 24)


def test_widened_tensors_give_the_same_rows() -> None:
    """The gate widens every tensor to float64; what is stored does not change by it."""
    t = codebook_table(CodebookFormat(4, 2, 2, 0), 7, 24)
    wide = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments(t, torch.arange(7))
    ]
    assert torch.equal(ops.codebook_embedding(*wide), t.decode())


@pytest.mark.parametrize("whole", [True, False])
def test_opcheck_of_codebooks(whole: bool) -> None:
    t = codebook_table(CodebookFormat(3, 4, 2, 8 if whole else None), 5, 16, whole=whole)
    for ids in (torch.tensor([[1, 4], [0, 0]]), torch.tensor([2])):
        opcheck(ops.codebook_embedding, arguments(t, ids))


def test_what_a_codebook_table_does_not_have_is_an_error() -> None:
    t = codebook_table(CodebookFormat(3, 4, 1, 0), 5, 16)
    ids, *rest = arguments(t, torch.tensor([0, 1]))
    for row in (-1, 5):
        with pytest.raises(IndexError):
            ops.codebook_embedding(torch.tensor([row]), *rest)
    assert t.slots is not None
    with pytest.raises(IndexError):
        ops.codebook_embedding(ids, *rest[:5], t.slots + 9, *rest[6:])
    with pytest.raises(UsageError, match="codes must be"):
        ops.codebook_embedding(ids, *rest[:7], 24, *rest[8:])


def test_what_an_operator_is_given_wrongly_is_a_usage_error() -> None:
    t = codebook_table(CodebookFormat(3, 4, 1, 0), 5, 16)
    ids, *rest = arguments(t, torch.tensor([0, 1]))
    for wrong in (ids.float(), ids.bool()):
        with pytest.raises(UsageError, match="ids must be integers"):
            ops.codebook_embedding(wrong, *rest)
    for codes, codebook in ((t.codes[:, 0], t.codebook), (t.codes, t.codebook[0])):
        with pytest.raises(UsageError, match=r"codebook must be \(stages, entries, dim\) and codes \(V, row bytes\)"):
            ops.codebook_embedding(ids, codes, codebook, *rest[2:])
    with pytest.raises(UsageError, match="group must be"):
        ops.codebook_embedding(ids, *rest[:-1], -2)


def test_any_negative_slot_is_a_coded_row() -> None:
    t = codebook_table(CodebookFormat(3, 4, 1, 0), 5, 16)
    assert t.slots is not None
    _, *rest = arguments(t, torch.tensor([0]))
    every = torch.arange(5)
    coded = ops.codebook_embedding(every, *rest[:5], torch.full_like(t.slots, -1), *rest[6:])
    for slot in (-2, -32768):
        assert torch.equal(ops.codebook_embedding(every, *rest[:5], torch.full_like(t.slots, slot), *rest[6:]), coded)
