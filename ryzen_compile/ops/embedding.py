"""Looking up rows of a table that is stored in codes: only the rows asked for are decoded."""

from __future__ import annotations

import torch
from torch import Tensor

from ryzen_compile.numerics.blockwise import BlockTensor
from ryzen_compile.numerics.codebook import CodebookTensor


@torch.library.custom_op("ryzen::embedding_nbits", mutates_args=())
def embedding_nbits(
    ids: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, width: int, bits: int, block: int
) -> Tensor:
    """``ids`` (...) integers, a table (V, width) as a ``BlockTensor`` stores it; returns (..., width) float32.

    The tensors are those of ``linear_nbits``, so a head tied to its embedding reads the same bytes.
    """
    rows = ids.reshape(-1)
    table = BlockTensor.stored(
        packed[rows], scales[rows], None if zeros is None else zeros[rows], bits, block, width
    ).dequantize()
    return table.reshape(*ids.shape, width)


@embedding_nbits.register_fake
def _(ids: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, width: int, bits: int, block: int) -> Tensor:
    return scales.new_empty((*ids.shape, width))


@torch.library.custom_op("ryzen::codebook_embedding", mutates_args=())
def codebook_embedding(
    ids: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    slots: Tensor | None,
    kept: Tensor | None,
    width: int,
    bits: int,
    group: int,
) -> Tensor:
    """``ids`` (...) integers, a table (V, width) as a ``CodebookTensor`` stores it; returns (..., width) float32.

    ``group`` -1 stands for no scales. Raises ``UsageError`` for tensors that do not fit together, ``IndexError`` for an
    id that is no row's and for a slot beyond the kept rows.

    Ids from -V to -1 are no row's here and in our native operator, which refuse them, and a row of NaN in the Triton
    kernel. ONNX Runtime's own Gather, into which this lowers, counts them from the end instead, without an error.
    """
    table = CodebookTensor.stored(codes, codebook, scales, gain, offset, slots, kept, width, bits, group)
    return table.rows(ids)


@codebook_embedding.register_fake
def _(
    ids: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    slots: Tensor | None,
    kept: Tensor | None,
    width: int,
    bits: int,
    group: int,
) -> Tensor:
    return codebook.new_empty((*ids.shape, width), dtype=torch.float32)
