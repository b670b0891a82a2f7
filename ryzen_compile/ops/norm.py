"""Normalisation over the last dimension, alone and with the residual addition before it, and their gradients.

RMSNorm (Zhang and Sennrich, 2019), LayerNorm (Ba et al., 2016). The ``add_`` forms also return the sum, because the
residual stream reads it again. ``unit_offset`` is Gemma's ``1 + w``. All compute in float32 at least and round once.

The ``_backward`` forms take what a row's statistics are computed from, not the statistics: reading ``x`` is needed
anyway. ``extra`` is a gradient of ``x`` that came another way, added before the rounding: the sum's in the ``add_``
forms. Gradients of ``weight`` and ``bias`` are sums over all rows.
"""

from __future__ import annotations

from typing import Any

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


def _layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    weight, bias = (None if parameter is None else wide(parameter) for parameter in (weight, bias))
    return functional.layer_norm(wide(x), x.shape[-1:], weight, bias, eps).to(x.dtype).contiguous()


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
    return _layer(x, weight, bias, eps)


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ryzen::add_layer_norm", mutates_args=())
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``x`` and ``residual`` (..., C) of one shape; returns ``(layer_norm(x + residual), x + residual)``."""
    total = (x + residual).contiguous()
    return _layer(total, weight, bias, eps), total


@add_layer_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _dx(scaled: Tensor, normed: Tensor, rstd: Tensor, extra: Tensor | None, dtype: torch.dtype) -> Tensor:
    """From ``scaled``, the gradient of the normed row (for LayerNorm less its mean), all (..., C) but ``rstd``."""
    dx = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return (dx if extra is None else dx + wide(extra)).to(dtype).contiguous()


def _of_parameter(terms: Tensor, like: Tensor | None, dtype: torch.dtype, there: bool) -> Tensor:
    """(C,) in the parameter's type: ``terms`` (..., C) over all rows; (0,) where the parameter is not there."""
    total = terms.reshape(-1, terms.shape[-1]).sum(0) if there else terms.new_empty(0)
    return total.to(dtype if like is None else like.dtype)


@torch.library.custom_op("ryzen::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, extra: Tensor | None, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    """``grad``, ``x`` and ``extra`` (..., C); returns ``dx`` (..., C), and ``dweight`` (C,) in the weight's type, which
    is (0,) without a weight."""
    z, g = wide(x), wide(grad)
    rstd = torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    normed, scaled = z * rstd, g
    if weight is not None:
        scaled = g * (1.0 + wide(weight) if unit_offset else wide(weight))
    dx = _dx(scaled, normed, rstd, extra, x.dtype)
    return dx, _of_parameter(g * normed, weight, x.dtype, weight is not None)


@rms_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor | None, extra: Tensor | None, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


@torch.library.custom_op("ryzen::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias_is_there: bool, extra: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``grad``, ``x`` and ``extra`` (..., C); returns ``dx`` (..., C), ``dweight`` and ``dbias`` (C,), (0,) where there
    is no such parameter. ``dbias`` is in the weight's type, in that of ``x`` without a weight."""
    z, g = wide(x), wide(grad)
    centred = z - z.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed, scaled = centred * rstd, g if weight is None else g * wide(weight)
    dx = _dx(scaled - scaled.mean(-1, keepdim=True), normed, rstd, extra, x.dtype)
    dweight = _of_parameter(g * normed, weight, x.dtype, weight is not None)
    return dx, dweight, _of_parameter(g, weight, x.dtype, bias_is_there)


@layer_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias_is_there: bool, extra: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    width, like = x.shape[-1], x if weight is None else weight
    return (
        x.new_empty(x.shape),
        like.new_empty(0 if weight is None else width),
        like.new_empty(width if bias_is_there else 0),
    )


def _keep_rms(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, ctx.unit_offset = inputs
    ctx.save_for_backward(x, weight)


def _keep_add_rms(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps, ctx.unit_offset = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)  # an output that nothing reads has no gradient to be read and added


def _rms_backward(ctx: Any, grad: Tensor, extra: Tensor | None = None) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight = rms_norm_backward(grad, x, weight, extra, ctx.eps, ctx.unit_offset)
    return dx, None if weight is None else dweight, None, None


def _add_rms_backward(ctx: Any, grad: Tensor | None, extra: Tensor | None) -> tuple[Tensor | None, ...]:
    """Both addends have the sum's gradient."""
    if grad is None:
        return extra, extra, None, None, None
    dx, *others = _rms_backward(ctx, grad, extra)
    return dx, dx, *others


def _keep_layer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _keep_add_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, bias, eps = inputs
    _keep_layer(ctx, (output[1], weight, bias, eps), output[0])
    ctx.set_materialize_grads(False)


def _layer_backward(ctx: Any, grad: Tensor, extra: Tensor | None = None) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    biased = ctx.bias_dtype is not None
    dx, dweight, dbias = layer_norm_backward(grad, x, weight, biased, extra, ctx.eps)
    return dx, None if weight is None else dweight, dbias.to(ctx.bias_dtype) if biased else None, None


def _add_layer_backward(ctx: Any, grad: Tensor | None, extra: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return extra, extra, None, None, None
    dx, *others = _layer_backward(ctx, grad, extra)
    return dx, dx, *others


rms_norm.register_autograd(_rms_backward, setup_context=_keep_rms)
add_rms_norm.register_autograd(_add_rms_backward, setup_context=_keep_add_rms)
layer_norm.register_autograd(_layer_backward, setup_context=_keep_layer)
add_layer_norm.register_autograd(_add_layer_backward, setup_context=_keep_add_layer)
