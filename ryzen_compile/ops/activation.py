"""The activation functions by name: alone, gating the other half of a tensor, and for the linears that carry one.

``gelu`` is the exact form, ``gelu_tanh`` the tanh approximation (Hendrycks and Gimpel, 2016), ``quick_gelu`` is
``x * sigmoid(1.702 x)``, ``silu`` is ``x * sigmoid(x)``, ``relu2`` the squared ReLU (Primer, 2021).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x.clone(),  # a custom operator may not return its input
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def activate(x: Tensor, act: str) -> Tensor:
    """Applies the activation named ``act`` elementwise; raises ``ValueError`` that lists the names on a miss."""
    if act not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    return ACTIVATIONS[act](x)


@torch.library.custom_op("ryzen::activation", mutates_args=())
def activation(x: Tensor, act: str) -> Tensor:
    """``x`` (...), floating point; returns ``act(x)`` of the same shape."""
    return activate(x, act)


@activation.register_fake
def _(x: Tensor, act: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("ryzen::gated_activation", mutates_args=())
def gated_activation(x: Tensor, act: str) -> Tensor:
    """``x`` (..., 2F), the gate's F channels and then the other half; returns ``act(gate) * other`` (..., F).

    SwiGLU and GeGLU (Shazeer, 2020) behind a product that does not carry them.
    """
    gate, other = x.chunk(2, dim=-1)
    return activate(gate, act) * other


@gated_activation.register_fake
def _(x: Tensor, act: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
