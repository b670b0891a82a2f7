"""Normalisation over the last dimension, alone and with the residual addition before it.

RMSNorm (Zhang and Sennrich, 2019), LayerNorm (Ba et al., 2016). The ``add_`` forms also return the sum, because the
residual stream reads it again. ``unit_offset`` is Gemma's ``1 + w``. All compute in float32 at least and round once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ryzen_compile.ops.precision import wide


def _rms(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> Tensor:
    z = wide(x)
    y = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (1.0 + wide(weight) if unit_offset else wide(weight))
    return y.to(x.dtype).contiguous()


@torch.library.custom_op("ryzen::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> Tensor:
    """``x`` (..., C), ``weight`` (C,) or none; returns (..., C)."""
    return _rms(x, weight, eps, unit_offset)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ryzen::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    """``x`` and ``residual`` (..., C) of one shape; returns ``(rms_norm(x + residual), x + residual)``."""
    total = (x + residual).contiguous()
    return _rms(total, weight, eps, unit_offset), total


@add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("ryzen::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``x`` (..., C), ``weight`` and ``bias`` (C,) or none; returns (..., C)."""
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ryzen::add_layer_norm", mutates_args=())
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``x`` and ``residual`` (..., C) of one shape; returns ``(layer_norm(x + residual), x + residual)``."""
    total = (x + residual).contiguous()
    return functional.layer_norm(total, total.shape[-1:], weight, bias, eps), total


@add_layer_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)
