"""Linear layers: with an epilogue, ``act(x Wᵀ + b)`` and the gated ``act(x Wgᵀ) * (x Wuᵀ)``, and over integer blocks.

The gated form is SwiGLU/GeGLU (Shazeer, 2020) on one merged weight: a single read of ``x``. ``linear_nbits`` multiplies
by a weight of 2, 4 or 8 bits with a scale for every ``block`` of input channels; activations stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ryzen_compile.numerics.blockwise import BlockTensor, row_chunks
from ryzen_compile.ops.activation import activate


@torch.library.custom_op("ryzen::linear_act", mutates_args=())
def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """``x`` (..., C), ``weight`` (N, C), ``bias`` (N,) or none; returns (..., N)."""
    return activate(functional.linear(x, weight, bias), act)


@linear_act.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("ryzen::gated_linear", mutates_args=())
def gated_linear(x: Tensor, weight: Tensor, act: str) -> Tensor:
    """``x`` (..., C), ``weight`` (2F, C) holding the gate's F rows and then the up projection's; returns (..., F)."""
    gate, up = functional.linear(x, weight).chunk(2, dim=-1)
    return activate(gate, act) * up


@gated_linear.register_fake
def _(x: Tensor, weight: Tensor, act: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


@torch.library.custom_op("ryzen::linear_nbits", mutates_args=())
def linear_nbits(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, block: int
) -> Tensor:
    """``x`` (..., C), a weight (N, C) as a ``BlockTensor`` stores it, ``bias`` (N,) or none; returns (..., N).

    ``packed`` (N, ceil(C / block), block * bits / 8) uint8, ``scales`` (N, ceil(C / block)) float32, ``zeros`` packed
    zero points (N, ceil(ceil(C / block) * bits / 8)) uint8, or none for symmetric codes. ``bits`` are those stored.
    """
    weight = BlockTensor.stored(packed, scales, zeros, bits, block, x.shape[-1])
    # Some rows at a time: decoded whole, and in float64 for the gate, a head would outweigh all that it is stored in.
    chunks = (weight.rows(start, stop).dequantize().to(x.dtype) for start, stop in row_chunks(*weight.shape))
    product = torch.cat([functional.linear(x, chunk) for chunk in chunks], dim=-1)
    return product if bias is None else product + bias


@linear_nbits.register_fake
def _(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, block: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))
