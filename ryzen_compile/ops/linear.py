"""Linear layers: with an epilogue, ``act(x Wᵀ + b)`` and the gated ``act(x Wgᵀ) * (x Wuᵀ)``, over integer blocks, and
over ternary weights.

The gated form is SwiGLU/GeGLU (Shazeer, 2020) on one merged weight: a single read of ``x``. ``linear_nbits`` multiplies
by a weight of 2, 4 or 8 bits with a scale for every ``block`` of input channels; activations stay as they are.
``linear_ternary`` is BitNet b1.58 (Ma et al., 2024), with activations of 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ryzen_compile.numerics import ternary
from ryzen_compile.numerics.blockwise import BlockTensor, row_chunks
from ryzen_compile.ops.activation import activate, activation_backward, expect_activation, gated_activation_backward
from ryzen_compile.ops.precision import wide


@torch.library.custom_op("ryzen::linear_act", mutates_args=())
def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """``x`` (..., C), ``weight`` (N, C), ``bias`` (N,) or none; returns (..., N)."""
    expect_activation(act)
    product = functional.linear(x, weight, bias)
    return product if act == "none" else activate(wide(product), act).to(x.dtype)


@linear_act.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("ryzen::gated_linear", mutates_args=())
def gated_linear(x: Tensor, weight: Tensor, act: str) -> Tensor:
    """``x`` (..., C), ``weight`` (2F, C) holding the gate's F rows and then the up projection's; returns (..., F)."""
    gate, up = wide(functional.linear(x, weight)).chunk(2, dim=-1)
    return (activate(gate, act) * up).to(x.dtype)


@gated_linear.register_fake
def _(x: Tensor, weight: Tensor, act: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


def _keep_act(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, str], output: Tensor) -> None:
    x, weight, bias, ctx.act = inputs
    ctx.save_for_backward(x, weight, bias)


def _act_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x, weight, bias = ctx.saved_tensors
    if ctx.act != "none":  # computed again: what an activation needs of the forward pass is as large as its result
        grad = activation_backward(grad, functional.linear(x, weight, bias), ctx.act)
    needs = ctx.needs_input_grad
    of_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if bias is not None and needs[2] else None
    return *_of_product(grad, x, weight, needs), of_bias, None


def _keep_gated(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    x, weight, ctx.act = inputs
    ctx.save_for_backward(x, weight)


def _gated_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight = ctx.saved_tensors
    grad = gated_activation_backward(grad, functional.linear(x, weight), ctx.act)
    return *_of_product(grad, x, weight, ctx.needs_input_grad), None


def _of_product(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``x`` (..., C) and ``weight`` (N, C) that are needed, ``grad`` (..., N) being the product's."""
    of_weight = None
    if needs[1]:
        of_weight = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return grad @ weight if needs[0] else None, of_weight


linear_act.register_autograd(_act_backward, setup_context=_keep_act)
gated_linear.register_autograd(_gated_backward, setup_context=_keep_gated)


@torch.library.custom_op("ryzen::linear_nbits", mutates_args=())
def linear_nbits(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, block: int
) -> Tensor:
    """``x`` (..., C), a weight (N, C) as a ``BlockTensor`` stores it, ``bias`` (N,) or none; returns (..., N).

    ``packed`` (N, ceil(C / block), block * bits / 8) uint8, ``scales`` (N, ceil(C / block)) float32, ``zeros`` packed
    zero points (N, ceil(ceil(C / block) * bits / 8)) uint8, or none for symmetric codes. ``bits`` are those stored.
    """
    weight = BlockTensor.stored(packed, scales, zeros, bits, block, x.shape[-1])
    product = torch.cat([functional.linear(x, part) for _start, _stop, part in _decoded(weight, x.dtype)], dim=-1)
    return product if bias is None else product + bias


@linear_nbits.register_fake
def _(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, block: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.custom_op("ryzen::linear_nbits_backward", mutates_args=())
def linear_nbits_backward(
    grad: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, width: int, bits: int, block: int
) -> Tensor:
    """``grad`` (..., N), the tensors of ``linear_nbits``; returns the gradient of its ``x`` (..., width)."""
    weight = BlockTensor.stored(packed, scales, zeros, bits, block, width)
    total = wide(grad).new_zeros((*grad.shape[:-1], width))
    for start, stop, part in _decoded(weight, grad.dtype):
        total += wide(grad[..., start:stop]) @ wide(part)
    return total.to(grad.dtype)


@linear_nbits_backward.register_fake
def _(grad: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, width: int, bits: int, block: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], width))


def _decoded(weight: BlockTensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Some rows at a time: decoded whole, and in float64 for the gate, a head would outweigh all that it is stored
    in."""
    for start, stop in row_chunks(*weight.shape):
        yield start, stop, weight.rows(start, stop).dequantize().to(dtype)


def _keep_nbits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, zeros, bias, ctx.bits, ctx.block = inputs
    ctx.width, ctx.biased = x.shape[-1], bias is not None
    ctx.save_for_backward(packed, scales, zeros)


def _nbits_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None, None, None]:
    """Of ``x`` and ``bias``: what is stored in codes is a constant."""
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = linear_nbits_backward(grad, *ctx.saved_tensors, ctx.width, ctx.bits, ctx.block)
    if ctx.biased and ctx.needs_input_grad[4]:
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return of_x, None, None, None, of_bias, None, None


linear_nbits.register_autograd(_nbits_backward, setup_context=_keep_nbits)


@torch.library.custom_op("ryzen::linear_ternary", mutates_args=())
def linear_ternary(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """``x`` (..., C), ``packed`` (N, ceil(C / 4)) uint8 as of ``numerics.ternary.pack``, ``scale`` () or (N,) float32;
    returns (..., N).

    Each row of ``x`` is rounded to 8 bits (``numerics.ternary.round_rows``). The exact integer product is multiplied by
    the row's step, then by the scale, in float32 at least and in this order, as the CPU operator MatMulTernary does; a
    row with a NaN or an infinity is NaN throughout. Raises ``UsageError`` for tensors that do not fit together, and for
    a code 3, which the kernel takes for +2 instead: to look for it, a GPU would have to be waited for.
    """
    ternary.expect_fit(x, packed, scale)
    codes, step = ternary.round_rows(wide(x))
    parts = []
    for start, stop in row_chunks(packed.shape[0], x.shape[-1]):
        weights = ternary.unpack(packed[start:stop], x.shape[-1])
        parts.append(codes.double() @ weights.double().t())  # integers below 2^53: exact
    exact = torch.cat(parts, dim=-1) if parts else step.new_empty((*x.shape[:-1], 0))
    return (exact.to(step.dtype) * step * scale.to(step.dtype)).to(x.dtype)


@linear_ternary.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))
