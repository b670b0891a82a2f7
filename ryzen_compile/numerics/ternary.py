"""Weights of -1, 0 and +1 in two bits each, and activations rounded to eight, whose products are exact integers.

BitNet b1.58 (Ma et al., 2024). A row of activations has one step, a 127th of its largest magnitude, and is rounded to
nearest with ties to even; so does the CPU operator MatMulTernary (``kernels/cpu/round_activations.h``), to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics import blockwise

LARGEST_CODE = 127
# A row with nothing above this counts as zeros: 127 over a smaller maximum would leave float32's range.
SMALLEST_MAXIMUM = 2.0**-119
MOST_CHANNELS = 1 << 20  # sums of 2 x 127 of them fit into 32 bits


def pack(weights: Tensor) -> Tensor:
    """``weights`` (N, C) of -1, 0 and +1, of any number type -> (N, ceil(C / 4)) uint8: codes 0, 1 and 2, low bits
    first. What fills up the last byte is not read. Raises ``UsageError`` for other weights."""
    if weights.ndim != 2:
        raise UsageError(f"ternary weights must be a matrix, got {tuple(weights.shape)}")
    odd = (weights != -1) & (weights != 0) & (weights != 1)
    if odd.any():
        raise UsageError(f"ternary weights must be -1, 0 or 1, got {int(odd.sum())} others of {odd.numel()}")
    return blockwise.pack(weights.to(torch.int8) + 1, 2)


def unpack(packed: Tensor, width: int) -> Tensor:
    """The inverse of ``pack``, (N, ``width``) int8. Raises ``UsageError`` for a code that stands for nothing."""
    codes = blockwise.unpack(packed, 2, width)
    unknown = int((codes == 3).sum())
    if unknown:
        raise UsageError(f"ternary codes must be 0, 1 or 2, got 3 at {unknown} of {codes.numel()} places")
    return codes.to(torch.int8) - 1


def recover(weights: Tensor) -> tuple[Tensor, Tensor] | None:
    """The packed codes of ``weights`` (N, C) and their scale, () or (N,) float32, if each row is one number times -1, 0
    and +1: scale times code is ``weights`` to the bit. None for all others, for NaN, and where there are zeros only."""
    codes, scales = [], []
    for start, stop in blockwise.row_chunks(*weights.shape):
        rows = weights[start:stop].float()
        scale, signs = rows.abs().amax(1), rows.sign()
        if not torch.equal(signs * scale[:, None], rows):
            return None
        codes.append(pack(signs))
        scales.append(scale)
    scale = torch.cat(scales) if scales else torch.zeros(0)
    found = scale[scale > 0].unique()
    if not len(found):
        return None
    return torch.cat(codes), found[0] if len(found) == 1 else scale


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` (..., C) float32 or float64 -> codes (..., C) int8 and steps (..., 1), ``x`` being about their product.

    A row with a NaN or an infinity has codes of 0 and a step of NaN, one of numbers too small for a step is zero.
    """
    largest = x.abs().amax(-1, keepdim=True)
    usable = largest.isfinite() & (largest >= SMALLEST_MAXIMUM)
    most = torch.full_like(largest, LARGEST_CODE)  # of plain numbers torch takes reciprocals, which round twice
    inverse = torch.where(usable, most / largest, 0.0)
    codes = (torch.where(usable, x, 0.0) * inverse).round().to(torch.int8)
    step = torch.where(usable, largest / most, torch.where(largest < SMALLEST_MAXIMUM, 0.0, torch.nan))
    return codes, step


def expect_fit(x: Tensor, packed: Tensor, scale: Tensor) -> None:
    """Raises ``UsageError`` unless these are the arguments of ``ryzen::linear_ternary``."""
    if x.ndim == 0 or not x.is_floating_point() or not 0 < x.shape[-1] <= MOST_CHANNELS:
        raise UsageError(
            f"linear_ternary: x must be floats (..., 1 to {MOST_CHANNELS}), got {x.dtype} {tuple(x.shape)}"
        )
    row_bytes = -(-x.shape[-1] // 4)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != row_bytes:
        raise UsageError(
            f"linear_ternary: packed must be uint8 (N, {row_bytes}) for x of {x.shape[-1]} channels, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    if not scale.is_floating_point() or tuple(scale.shape) not in ((), (packed.shape[0],)):
        raise UsageError(
            f"linear_ternary: scale must be floats () or ({packed.shape[0]},), got {scale.dtype} {tuple(scale.shape)}"
        )
