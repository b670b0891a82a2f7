"""The activation functions by name: alone, gating the other half of a tensor, for the linears that carry one, and their
gradients.

``gelu`` is the exact form, ``gelu_tanh`` the tanh approximation (Hendrycks and Gimpel, 2016), ``quick_gelu`` is
``x * sigmoid(1.702 x)``, ``silu`` is ``x * sigmoid(x)``, ``relu2`` the squared ReLU (Primer, 2021). The operators
compute in float32 at least and round once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ryzen_compile.ops.precision import wide

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


def _of_gelu(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


def _of_gate(x: Tensor, argument: Tensor, slope: Tensor | float) -> Tensor:
    """Of ``x * sigmoid(argument)``, ``slope`` being the argument's derivative."""
    s = torch.sigmoid(argument)
    return s + x * s * (1 - s) * slope


DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "relu": lambda x: torch.where(x <= 0, 0.0, torch.ones_like(x)),
    "relu2": lambda x: 2 * functional.relu(x),
    "silu": lambda x: _of_gate(x, x, 1.0),
    "gelu": _of_gelu,
    # 0.5 (1 + tanh u) is sigmoid(2 u).
    "gelu_tanh": lambda x: _of_gate(
        x,
        math.sqrt(8 / math.pi) * (x + 0.044715 * x**3),
        math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x.square()),
    ),
    "quick_gelu": lambda x: _of_gate(x, 1.702 * x, 1.702),
    "sigmoid": lambda x: torch.sigmoid(x) * torch.sigmoid(-x),
    "tanh": lambda x: 1 - torch.tanh(x).square(),
}


def expect_activation(act: str) -> None:
    """Raises ``ValueError`` that lists the names when ``act`` is none of them."""
    if act not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {act!r}")


def activate(x: Tensor, act: str) -> Tensor:
    """Applies the activation named ``act`` elementwise; raises ``ValueError`` that lists the names on a miss."""
    expect_activation(act)
    return ACTIVATIONS[act](x)


@torch.library.custom_op("ryzen::activation", mutates_args=())
def activation(x: Tensor, act: str) -> Tensor:
    """``x`` (...), floating point; returns ``act(x)`` of the same shape, contiguous."""
    return activate(wide(x), act).to(x.dtype).contiguous()


@activation.register_fake
def _(x: Tensor, act: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ryzen::gated_activation", mutates_args=())
def gated_activation(x: Tensor, act: str) -> Tensor:
    """``x`` (..., 2F), the gate's F channels and then the other half; returns ``act(gate) * other`` (..., F).

    SwiGLU and GeGLU (Shazeer, 2020) behind a product that does not carry them.
    """
    gate, other = wide(x).chunk(2, dim=-1)
    return (activate(gate, act) * other).to(x.dtype).contiguous()


@gated_activation.register_fake
def _(x: Tensor, act: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op("ryzen::activation_backward", mutates_args=())
def activation_backward(grad: Tensor, x: Tensor, act: str) -> Tensor:
    """``grad`` and ``x`` (...); returns ``grad * act'(x)`` of the same shape. At 0 the derivative of ``relu`` is 0."""
    expect_activation(act)
    return (wide(grad) * DERIVATIVES[act](wide(x))).to(x.dtype).contiguous()


@activation_backward.register_fake
def _(grad: Tensor, x: Tensor, act: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ryzen::gated_activation_backward", mutates_args=())
def gated_activation_backward(grad: Tensor, x: Tensor, act: str) -> Tensor:
    """``grad`` (..., F), ``x`` (..., 2F) as of ``gated_activation``; returns the gradient of ``x`` (..., 2F)."""
    expect_activation(act)
    g, (gate, other) = wide(grad), wide(x).chunk(2, dim=-1)
    both = torch.cat((g * other * DERIVATIVES[act](gate), g * ACTIVATIONS[act](gate)), dim=-1)
    return both.to(x.dtype).contiguous()


@gated_activation_backward.register_fake
def _(grad: Tensor, x: Tensor, act: str) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    x, ctx.act = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return activation_backward(grad, x, ctx.act), None


def _gated_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return gated_activation_backward(grad, x, ctx.act), None


activation.register_autograd(_backward, setup_context=_keep)
gated_activation.register_autograd(_gated_backward, setup_context=_keep)
