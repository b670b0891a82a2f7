"""Activations on a GPU, alone and gating, forward and backward: the Triton kernels of ``ryzen::activation``,
``ryzen::gated_activation`` and their ``_backward`` operators.

All wait for memory: each element is read and written once, 16 bytes at a time, and computed in float32. The functions
are written so that nothing overflows on the way to a finite result and small results do not cancel; ``activate`` and
``activate_with_slope`` are for other kernels' epilogues as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.kernels import launch
from ryzen_compile.ops.activation import expect_activation

ELEMENTS = 2048  # results of one program
GATED_ELEMENTS = 1024  # which reads two tensors or three
WARPS = 4
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _sigmoid(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Of ``x`` and of ``-x``, each to full precision: 1 - sigmoid(x) has none left where sigmoid(x) is near 1."""
    small = tl.exp(-tl.abs(x))
    near = 1.0 / (1.0 + small)
    far = small * near
    return tl.where(x < 0, far, near), tl.where(x < 0, near, far)


@triton.jit
def _gate(x: tl.tensor, argument: tl.tensor, slope: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """``x * sigmoid(argument)`` and its derivative, ``slope`` being the argument's."""
    s, rest = _sigmoid(argument)
    bend = s * rest
    # Where the sigmoid is flat the slope of gelu_tanh's argument may have overflowed.
    return x * s, tl.where(bend == 0, s, s + x * bend * slope)


@triton.jit
def _gelu(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """With the normal distribution function by formula 7.1.26 of Abramowitz and Stegun, off by 7.5e-8 at most.

    Half of erf's usual work, the exponential is the derivative's too, and the tail is a product: it does not cancel.
    """
    bell = tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(x))
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    tail *= bell
    below = tl.where(x < 0, tail, 1.0 - tail)
    return x * below, below + 0.3989422804 * x * bell


@triton.jit
def _tanh(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    small = tl.exp(-2.0 * tl.abs(x))
    scale = 1.0 / (1.0 + small)
    size = (1.0 - small) * scale
    square = x * x
    series = x * (1.0 + square * (-0.33333333 + square * (0.13333333 - square * 0.053968254)))
    value = tl.where(square < 0.04, series, tl.where(x < 0, -size, size))  # 1 - small cancels near 0
    return value, 4.0 * small * scale * scale


@triton.jit
def activate_with_slope(x: tl.tensor, ACT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The activation named ``ACT`` of ``x`` (float32) and its derivative there."""
    if ACT == "none":
        return x, tl.full(x.shape, 1.0, tl.float32)
    elif ACT == "relu":
        return tl.where(x < 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)  # NaN is neither
    elif ACT == "relu2":
        positive = tl.where(x < 0, 0.0, x)
        return positive * positive, 2.0 * positive
    elif ACT == "silu":
        return _gate(x, x, 1.0)
    elif ACT == "gelu":
        return _gelu(x)
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh u) is sigmoid(2 u); 1.5957691216 is sqrt(8 / pi).
        square = x * x
        return _gate(x, 1.5957691216 * x * (1.0 + 0.044715 * square), 1.5957691216 * (1.0 + 0.134145 * square))
    elif ACT == "quick_gelu":
        return _gate(x, 1.702 * x, 1.702)
    elif ACT == "sigmoid":
        value, rest = _sigmoid(x)
        return value, value * rest
    else:
        tl.static_assert(ACT == "tanh", "an activation that this file does not know")
        return _tanh(x)


@triton.jit
def activate(x: tl.tensor, ACT: tl.constexpr) -> tl.tensor:
    """The activation named ``ACT`` of ``x`` (float32)."""
    value, _slope = activate_with_slope(x, ACT)
    return value


@triton.jit
def _activation_kernel(
    grad: tl.tensor | None,  # (n,): then the result is the gradient of x
    x: tl.tensor,  # (n,)
    out: tl.tensor,  # (n,)
    n: tl.tensor,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    value, slope = activate_with_slope(tl.load(x + place, mask=inside, other=0.0).to(tl.float32), ACT)
    if grad is not None:
        value = slope * tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_kernel(
    grad: tl.tensor | None,  # (rows, F): then the result is the gradient of x
    x: tl.tensor,  # (rows, 2 F), the gate's channels first
    out: tl.tensor,  # (rows, F), or (rows, 2 F) with grad
    rows: tl.tensor,
    F: tl.tensor,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # One dimension of programs, the second has 65535 at most. Neighbours share rows.
    pieces = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // pieces).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (col < F)
    single, double = row * F + col, row * F * 2 + col
    gate = tl.load(x + double, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x + double + F, mask=inside, other=0.0).to(tl.float32)
    value, slope = activate_with_slope(gate, ACT)
    if grad is None:
        tl.store(out + single, (value * other).to(out.dtype.element_ty), mask=inside)
    else:
        g = tl.load(grad + single, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + double, (g * other * slope).to(out.dtype.element_ty), mask=inside)
        tl.store(out + double + F, (g * value).to(out.dtype.element_ty), mask=inside)


def activation(x: Tensor, act: str) -> Tensor:
    """The operator ``ryzen::activation``: ``x`` (...) float32, float16 or bfloat16 -> the same shape and type.

    Raises ``UsageError`` for an unknown name, ``UnsupportedError`` for other types and tensors that are not on a GPU
    (unless Triton interprets its kernels); so do those below.
    """
    device = _expect("activation", x, act)
    out = launch.empty(x.shape, x.dtype, device)
    _launch(None, x, out, act)
    return out


def activation_backward(grad: Tensor, x: Tensor, act: str) -> Tensor:
    """The operator ``ryzen::activation_backward``: ``grad`` and ``x`` alike (...) -> the gradient of ``x`` (...)."""
    device = _expect("activation_backward", x, act, grad=grad)
    _expect_alike("activation_backward", grad, x, tuple(x.shape))
    out = launch.empty(x.shape, x.dtype, device)
    _launch(grad, x, out, act)
    return out


def gated_activation(x: Tensor, act: str) -> Tensor:
    """The operator ``ryzen::gated_activation``: ``x`` (..., 2F) -> ``act(gate) * other`` (..., F)."""
    device = _expect("gated_activation", x, act)
    out = launch.empty(_single("gated_activation", x), x.dtype, device)
    _launch_gated(None, x, out, act)
    return out


def gated_activation_backward(grad: Tensor, x: Tensor, act: str) -> Tensor:
    """The operator ``ryzen::gated_activation_backward``: ``grad`` (..., F), ``x`` (..., 2F) -> of ``x`` (..., 2F)."""
    device = _expect("gated_activation_backward", x, act, grad=grad)
    _expect_alike("gated_activation_backward", grad, x, _single("gated_activation_backward", x))
    out = launch.empty(x.shape, x.dtype, device)
    _launch_gated(grad, x, out, act)
    return out


def _expect(op: str, x: Tensor, act: str, **others: Tensor) -> torch.device:
    try:
        expect_activation(act)
    except ValueError as error:
        raise UsageError(f"{op}: {error}") from None
    if x.dtype not in FLOATS:
        raise UnsupportedError(f"{op}: x must be float32, float16 or bfloat16, got {x.dtype}")
    return launch.expect_device(op, x=x, **others)


def _expect_alike(op: str, grad: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(grad.shape) != shape or grad.dtype != x.dtype:
        raise UsageError(f"{op}: grad must be {shape} in {x.dtype}, got {tuple(grad.shape)} in {grad.dtype}")


def _single(op: str, x: Tensor) -> tuple[int, ...]:
    """The shape of one half of ``x``."""
    if x.ndim == 0 or x.shape[-1] % 2:
        raise UsageError(f"{op}: x must be (..., 2F), the gate and another half, got {tuple(x.shape)}")
    return (*x.shape[:-1], x.shape[-1] // 2)


def _launch(grad: Tensor | None, x: Tensor, out: Tensor, act: str) -> None:
    if not out.numel():
        return
    grad = None if grad is None else grad.contiguous()
    with launch.on(out):
        grid = (triton.cdiv(out.numel(), ELEMENTS),)
        _activation_kernel[grid](grad, x.contiguous(), out, out.numel(), ACT=act, BLOCK=ELEMENTS, num_warps=WARPS)


def _launch_gated(grad: Tensor | None, x: Tensor, out: Tensor, act: str) -> None:
    if not out.numel():
        return
    F = x.shape[-1] // 2
    rows = x.numel() // (2 * F)
    block = min(triton.next_power_of_2(F), GATED_ELEMENTS)
    share = min(GATED_ELEMENTS // block, triton.next_power_of_2(rows))
    grad = None if grad is None else grad.contiguous()
    with launch.on(out):
        grid = (triton.cdiv(rows, share) * triton.cdiv(F, block),)
        _gated_kernel[grid](grad, x.contiguous(), out, rows, F, ACT=act, ROWS=share, BLOCK=block, num_warps=WARPS)
