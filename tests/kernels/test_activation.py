"""The Triton activations and their gradients against the operators' references in float64; in Triton's interpreter
where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.ops.activation import (
    ACTIVATIONS,
    activation,
    activation_backward,
    gated_activation,
    gated_activation_backward,
)
from tests.kernels.oracle import DEVICE, DTYPES, LIMITS, assert_close, guarded, nmse

ACTS = tuple(ACTIVATIONS)
TIGHT = LIMITS | {torch.float32: 1e-12}  # the general limit does not tell gelu from gelu_tanh
REFERENCES = {
    "activation": activation,
    "activation_backward": activation_backward,
    "gated_activation": gated_activation,
    "gated_activation_backward": gated_activation_backward,
}
OPS = tuple(REFERENCES)


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    from ryzen_compile.kernels import activation

    return activation


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def run(kernels: ModuleType, op: str, *arguments: Any) -> Tensor:
    return getattr(kernels, op)(*(value.to(DEVICE) if isinstance(value, Tensor) else value for value in arguments))


def wanted(op: str, *arguments: Any) -> Tensor:
    return REFERENCES[op](*(value.double() if isinstance(value, Tensor) else value for value in arguments))


def assert_alike(kernels: ModuleType, op: str, *arguments: Any) -> None:
    got = run(kernels, op, *arguments)
    assert got.device.type == DEVICE and got.is_contiguous() and got.dtype == arguments[0].dtype
    assert_close(got, wanted(op, *arguments), TIGHT[got.dtype])


def arguments(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """``shape`` is that of one half."""
    x = normal(*shape[:-1], shape[-1] * (2 if "gated" in op else 1), dtype=dtype, scale=2.5)
    return (normal(*shape, dtype=dtype, seed=1), x) if "backward" in op else (x,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("op", OPS)
def test_every_activation(kernels, monkeypatch, op, act, dtype):
    with guarded(monkeypatch):
        assert_alike(kernels, op, *arguments(op, (2, 3, 31), dtype), act)


@pytest.mark.parametrize("shape", [(1,), (7, 1), (3, 127), (2, 1023), (1, 1025), (2049,), (5, 2, 129)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_awkward_shapes(kernels, monkeypatch, op, shape):
    with guarded(monkeypatch):
        assert_alike(kernels, op, *arguments(op, shape, torch.float32), "silu")


def test_a_scalar(kernels):
    assert_alike(kernels, "activation", torch.tensor(0.7), "gelu")
    assert_alike(kernels, "activation_backward", torch.tensor(2.0), torch.tensor(0.7), "gelu")


@pytest.mark.parametrize("act", ACTS)
def test_small_numbers_keep_their_digits(kernels, act):
    x = torch.cat((torch.logspace(-15, 0, 200), -torch.logspace(-15, 0, 200), torch.tensor([0.2, 0.1999999])))
    got = run(kernels, "activation", x, act).cpu().double()
    torch.testing.assert_close(got, wanted("activation", x, act), rtol=3e-6, atol=0.0)


@pytest.mark.parametrize("act", ACTS)
def test_slopes_to_a_millionth(kernels, act):
    x = torch.linspace(-12, 12, 2001)
    got = run(kernels, "activation_backward", torch.ones_like(x), x, act).cpu().double()
    torch.testing.assert_close(got, wanted("activation_backward", torch.ones_like(x), x, act), rtol=1e-5, atol=5e-7)


def test_tails_do_not_cancel(kernels):
    """Where float32 takes 1 - 1: torch loses all digits before -6."""
    x = torch.linspace(-7, -4, 100)
    got = run(kernels, "activation", x, "gelu").cpu().double()
    torch.testing.assert_close(got, wanted("activation", x, "gelu"), rtol=1e-2, atol=0.0)
    assert (torch.nn.functional.gelu(x).double() / wanted("activation", x, "gelu") - 1).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("act", ACTS)
def test_extreme_numbers(kernels, act):
    huge = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e20, -1e20, 1e13, -1e13, 100.0, -100.0, 89.0]
    x = torch.tensor(huge)
    got = run(kernels, "activation", x, act).cpu()
    want = wanted("activation", x, act).float()  # squares of what float32 holds may be beyond it
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-30, equal_nan=True)
    slope = run(kernels, "activation_backward", torch.ones(len(huge) - 3), x[3:], act).cpu()
    assert slope.isfinite().all() or act == "relu2"
    torch.testing.assert_close(
        slope, wanted("activation_backward", torch.ones(9), x[3:], act).float(), rtol=1e-5, atol=1e-30
    )


@pytest.mark.parametrize("act", ["relu", "relu2"])
def test_slopes_at_zero_and_of_nan(kernels, act):
    x = torch.tensor([0.0, -0.0, float("nan")])
    got = run(kernels, "activation_backward", torch.ones(3), x, act).cpu()
    torch.testing.assert_close(
        got, wanted("activation_backward", torch.ones(3), x, act).float(), rtol=0, atol=0, equal_nan=True
    )


def test_other_memory(kernels):
    x, grad = normal(2, 8, 5).transpose(1, 2), normal(1, 5, 4).expand(2, 5, 4)
    assert_alike(kernels, "activation", x, "silu")
    assert_alike(kernels, "activation_backward", normal(2, 5, 16)[..., ::2], x, "silu")
    assert_alike(kernels, "gated_activation", x, "gelu")
    assert_alike(kernels, "gated_activation_backward", grad, x, "gelu")


def test_none_returns_another_tensor(kernels):
    x = normal(5).to(DEVICE)
    got = kernels.activation(x, "none")
    assert torch.equal(got, x) and got.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
@pytest.mark.parametrize("op", OPS)
def test_nothing_to_compute(kernels, op, shape):
    assert_alike(kernels, op, *arguments(op, shape, torch.float32), "tanh")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("op", OPS)
def test_the_comparison_tells_every_two_apart(kernels, op, act):
    given = arguments(op, (2, 31), torch.float32)
    got = run(kernels, op, *given, act)
    assert [name for name in ACTS if nmse(got, wanted(op, *given, name)) <= TIGHT[torch.float32]] == [act]


def test_the_comparison_sees_halves_and_rows_mixed_up(kernels):
    grad, x = arguments("gated_activation_backward", (3, 31), torch.bfloat16)
    want = wanted("gated_activation_backward", grad, x, "silu")
    for other in ((grad, x.roll(31, -1)), (grad, x.roll(1, -1)), (grad.roll(1, 0), x), (grad.roll(1, -1), x)):
        assert nmse(run(kernels, "gated_activation_backward", *other, "silu"), want) > 0.1


@pytest.mark.parametrize("op", OPS)
def test_an_unknown_name_lists_the_known_ones(kernels, op):
    with pytest.raises(UsageError, match=rf"{op}: activation must be one of none, relu, .*tanh, got 'swish'"):
        run(kernels, op, *arguments(op, (2, 3), torch.float32), "swish")


def test_tensors_that_do_not_fit_are_refused(kernels):
    x = normal(2, 6)
    with pytest.raises(UnsupportedError, match=r"activation: x must be float32, float16 or bfloat16, got torch\.f"):
        run(kernels, "activation", x.double(), "relu")
    with pytest.raises(UsageError, match=r"gated_activation: x must be \(\.\.\., 2F\), .* got \(2, 5\)"):
        run(kernels, "gated_activation", x[:, :5], "relu")
    with pytest.raises(UsageError, match=r"gated_activation: x must be \(\.\.\., 2F\), .* got \(\)"):
        run(kernels, "gated_activation", torch.tensor(1.0), "relu")
    with pytest.raises(UsageError, match=r"activation_backward: grad must be \(2, 6\) in torch.float32, got \(6,\) in"):
        run(kernels, "activation_backward", x[0], x, "relu")
    with pytest.raises(
        UsageError, match=r"gated_activation_backward: grad must be \(2, 3\) .* got \(2, 3\) in torch.flo"
    ):
        run(kernels, "gated_activation_backward", x[:, :3].half(), x, "relu")
    with pytest.raises(UsageError, match=r"all tensors must be on one device: x is on .*, grad on meta"):
        kernels.activation_backward(torch.ones(2, 6, device="meta"), x.to(DEVICE), "relu")


@pytest.mark.gpu
def test_places_beyond_int32(kernels):
    rows, width = (1 << 15) + 1, 1 << 16
    x = torch.zeros((rows, width), dtype=torch.float16, device=DEVICE)
    x[-1] = normal(width).to(DEVICE)
    last = x[-1:].clone()
    assert torch.equal(kernels.activation(x, "gelu")[-1:], kernels.activation(last, "gelu"))
    assert torch.equal(kernels.gated_activation(x, "silu")[-1:], kernels.gated_activation(last, "silu"))
    grad = torch.ones((rows, width // 2), dtype=torch.float16, device=DEVICE)
    got = kernels.gated_activation_backward(grad, x, "silu")[-1:]
    assert torch.equal(got, kernels.gated_activation_backward(grad[:1], last, "silu"))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ryzen_compile.kernels import activation

NUMBERS = {"n": "i32", "rows": "i32", "F": "i32"}


def accesses(kernel, **constants):  # how many of the global reads and writes there are, and how many take 16 bytes
    types = {name: "constexpr" if name in constants else NUMBERS.get(name, "*bf16") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    found = [word for word in code.split() if word.startswith(("ld.global", "st.global"))]
    return len(found), sum(".v4." in word for word in found)


flat = {"BLOCK": activation.ELEMENTS}
print(*accesses(activation._activation_kernel, grad=None, ACT="gelu", **flat))
print(*accesses(activation._activation_kernel, ACT="tanh", **flat))
print(*accesses(activation._gated_kernel, grad=None, ACT="silu", ROWS=1, BLOCK=1024))
print(*accesses(activation._gated_kernel, ACT="gelu_tanh", ROWS=4, BLOCK=256))
# Triton takes a number that is 1 for a constant.
accesses(activation._activation_kernel, ACT="relu2", **flat, n=1)
accesses(activation._gated_kernel, ACT="none", ROWS=1, BLOCK=1, rows=1, F=1)
"""


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """For compute capability 9.0, which needs no GPU: 2048 elements of 128 threads are two accesses of 16 bytes each,
    and gating 1024 one; nothing is read twice."""
    pytest.importorskip("triton")
    child = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert child.stdout.splitlines() == ["4 4", "6 6", "3 3", "5 5"], child.stderr
