"""Looking up rows of a table that is stored in integer blocks: only the rows asked for are decoded."""

from __future__ import annotations

import torch
from torch import Tensor

from ryzen_compile.numerics.blockwise import BlockTensor


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
