"""Fixed scales for a cache's channels, from the keys and values that text leaves there.

Keys have a few channels that are large for every token, values have not (KIVI, Liu et al., 2024), so a scale for every
channel serves both. At 8 bits the largest magnitude decides. At 4 bits clipping pays: of a grid of shares of it, the
one with the least squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARES = torch.linspace(0.3, 1.0, 36)
SMALLEST = 1e-6  # of a channel that is always zero


def channel_scales(x: Tensor, bits: int) -> Tensor:
    """``x`` (N, K, T, D) float -> float32 (1, K, 1, D): what a code of one stands for, for ``bits`` 8 or 4."""
    limit = 2 ** (bits - 1) - 1
    largest = x.abs().amax((0, 2), keepdim=True).clamp_min(SMALLEST) / limit
    if bits == 8:
        return largest
    best, least = largest, _squared_error(x, largest, limit)
    for share in SHARES[:-1]:
        scale = largest * share
        error = _squared_error(x, scale, limit)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _squared_error(x: Tensor, scale: Tensor, limit: int) -> Tensor:
    rounded = (x / scale).round_().clamp_(-limit - 1, limit).mul_(scale)
    return rounded.sub_(x).square_().sum((0, 2), keepdim=True)
