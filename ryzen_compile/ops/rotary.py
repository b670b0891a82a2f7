"""Rotary position embedding (Su et al., 2021) from a table: half-split and interleaved, full and partial."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ryzen_compile.ops.precision import wide


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the first ``2 R`` channels of ``x`` (..., D); ``cos`` and ``sin`` (..., R) broadcast against it.

    Half precision is computed in float32 and rounded once, whatever the tables are in.
    """
    if (z := wide(x)) is not x:
        return rotate(z, wide(cos), wide(sin), interleaved).to(x.dtype)
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
    ``2 i + 1``. Differentiable in ``x`` alone.
    """
    return rotate(x, cos[positions].unsqueeze(1), sin[positions].unsqueeze(1), interleaved).contiguous()


@rotary.register_fake
def _(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, cos, sin, ctx.interleaved = inputs
    ctx.save_for_backward(positions, cos, sin)


def _turn_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """A rotation's transpose is the rotation by the opposite angle."""
    positions, cos, sin = ctx.saved_tensors
    return rotary(grad, positions, cos, -sin, ctx.interleaved), None, None, None, None


rotary.register_autograd(_turn_back, setup_context=_remember)
