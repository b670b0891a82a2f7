"""Linear layers with their epilogue: ``act(x Wᵀ + b)``, and the gated form ``act(x Wgᵀ) * (x Wuᵀ)``.

The gated form is SwiGLU/GeGLU (Shazeer, 2020) on one merged weight: a single read of ``x``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

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
