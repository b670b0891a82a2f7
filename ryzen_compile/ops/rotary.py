"""Rotary position embedding (Su et al., 2021) from a table: half-split and interleaved, full and partial."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the first ``2 R`` channels of ``x`` (..., D); ``cos`` and ``sin`` (..., R) broadcast against it."""
    r = cos.shape[-1]
    turned, rest = x[..., : 2 * r], x[..., 2 * r :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        y = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :r], turned[..., r:]
        y = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((y, rest), dim=-1)


@torch.library.custom_op("ryzen::rotary", mutates_args=())
def rotary(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the first ``2 R`` channels of every head by the angle of its position.

    ``x`` (B, H, T, D), ``positions`` (B, T) int64, ``cos`` and ``sin`` (N, R) with ``2 R <= D`` and every position
    below ``N``; returns (B, H, T, D). Half-split pairs channel ``i`` with ``i + R``, interleaved ``2 i`` with
    ``2 i + 1``.
    """
    return rotate(x, cos[positions].unsqueeze(1), sin[positions].unsqueeze(1), interleaved).contiguous()


@rotary.register_fake
def _(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)
