"""Activations without their small channels: magnitude sparsity of what a linear layer reads.

``sparsify`` keeps what reaches a threshold that was calibrated once (TEAL, Liu et al., 2024; CATS, Lee et al., 2024),
``sparsify_topk`` the same number of channels of every token. A product with what is left reads the weights of the kept
channels only, where it has an operator that skips.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ryzen_compile.errors import UsageError


@torch.library.custom_op("ryzen::sparsify", mutates_args=())
def sparsify(x: Tensor, threshold: float) -> Tensor:
    """``x`` (..., C), floating point; returns 0 where ``|x| < threshold`` and ``x`` elsewhere, contiguous. NaN stays.

    Raises ``UsageError`` for a threshold that is negative or not finite.
    """
    return torch.where(_dropped(x, threshold), 0.0, x).contiguous()


@sparsify.register_fake
def _(x: Tensor, threshold: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ryzen::sparsify_topk", mutates_args=())
def sparsify_topk(x: Tensor, keep: int) -> Tensor:
    """``x`` (..., C), floating point; returns 0 where a token's ``|x|`` is below its ``keep``-th largest, contiguous.

    Of equal magnitudes all are kept. Raises ``UsageError`` for a ``keep`` that is not from 1 to C.
    """
    return torch.where(_below_topk(x, keep), 0.0, x).contiguous()


@sparsify_topk.register_fake
def _(x: Tensor, keep: int) -> Tensor:
    return x.new_empty(x.shape)


def _dropped(x: Tensor, threshold: float) -> Tensor:
    if not 0 <= threshold < float("inf"):
        raise UsageError(f"sparsify: threshold must be 0 or more, got {threshold}")
    return x.abs() < threshold


def _below_topk(x: Tensor, keep: int) -> Tensor:
    if not 1 <= keep <= x.shape[-1]:
        raise UsageError(f"sparsify_topk: keep must be from 1 to {x.shape[-1]}, got {keep}")
    magnitudes = x.abs()
    return magnitudes < magnitudes.topk(keep, dim=-1).values[..., -1:]


def _keep(ctx: Any, inputs: tuple[Tensor, float | int], output: Tensor) -> None:
    x, ctx.limit = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """Straight through what was kept; the threshold is a constant."""
    return torch.where(_dropped(ctx.saved_tensors[0], ctx.limit), 0.0, grad), None


def _topk_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.where(_below_topk(ctx.saved_tensors[0], ctx.limit), 0.0, grad), None


sparsify.register_autograd(_backward, setup_context=_keep)
sparsify_topk.register_autograd(_topk_backward, setup_context=_keep)
