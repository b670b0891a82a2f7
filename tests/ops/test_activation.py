"""Every activation against its definition in float64, and as a custom operator."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.testing import assert_close

from ryzen_compile import ops
from ryzen_compile.ops.activation import DERIVATIVES, activation_backward, gated_activation_backward


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


FORMULAS = {
    "none": lambda x: x,
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "relu2": lambda x: torch.where(x > 0, x * x, 0.0),
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "sigmoid": sigmoid,
    "tanh": lambda x: 2 * sigmoid(2 * x) - 1,
}
X = torch.cat((torch.linspace(-9, 9, 1021), torch.zeros(1), torch.tensor([-1e-6]))).view(1, 341, 3)


def matches(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got.double(), want, rtol=1e-5, atol=1e-6)


def test_every_activation_has_a_formula_here() -> None:
    assert set(FORMULAS) == set(ops.ACTIVATIONS)


@pytest.mark.parametrize("act", FORMULAS)
def test_is_its_formula(act: str) -> None:
    assert_close(ops.activation(X, act).double(), FORMULAS[act](X.double()), rtol=1e-5, atol=1e-6)
    assert_close(ops.activation(X.double(), act), FORMULAS[act](X.double()), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("act", FORMULAS)
def test_the_comparison_tells_every_two_apart(act: str) -> None:
    got = ops.activation(X, act)
    assert [name for name, formula in FORMULAS.items() if matches(got, formula(X.double()))] == [act]
    assert not matches(1.01 * got, FORMULAS[act](X.double()))


def test_none_returns_another_tensor() -> None:
    out = ops.activation(X, "none")
    assert torch.equal(out, X)
    assert out.data_ptr() != X.data_ptr()


@pytest.mark.parametrize("act", ["", "Silu", "swish"])
def test_an_unknown_name_lists_the_known_ones(act: str) -> None:
    with pytest.raises(ValueError, match=rf"must be one of none, relu, .*tanh, got '{act}'"):
        ops.activate(X, act)


@pytest.mark.parametrize("act", FORMULAS)
def test_opcheck(act: str) -> None:
    opcheck(ops.activation, (torch.randn(2, 7, 5).transpose(1, 2), act))


@pytest.mark.parametrize("x", [torch.randn(3), torch.randn(2, 5, 14)[..., ::2], torch.randn(2, 1, 7).expand(2, 5, 7)])
def test_opcheck_in_other_memory(x: Tensor) -> None:
    opcheck(ops.activation, (x, "none"))
    opcheck(ops.activation, (x, "relu2"))


@pytest.mark.parametrize("act", FORMULAS)
def test_gating_is_its_formula(act: str) -> None:
    x = X[..., :340, :].reshape(5, 204)
    want = FORMULAS[act](x[:, :102].double()) * x[:, 102:].double()
    assert_close(ops.gated_activation(x, act).double(), want, rtol=1e-5, atol=1e-5)


def test_half_precision_is_rounded_once() -> None:
    x = torch.randn(3, 254).bfloat16()
    for got, want in (
        (ops.activation(x, "quick_gelu"), FORMULAS["quick_gelu"](x.double())),
        (ops.gated_activation(x, "silu"), FORMULAS["silu"](x[:, :127].double()) * x[:, 127:].double()),
    ):
        assert_close(got.double(), want, rtol=2**-8, atol=1e-6)
    rounded_twice = torch.nn.functional.silu(x[:, :127]) * x[:, 127:]
    assert not torch.allclose(rounded_twice.double(), want, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("act", FORMULAS)
def test_gradients_are_those_of_small_steps(act: str) -> None:
    x = (torch.randn(3, 7, 4, dtype=torch.float64) * 2).requires_grad_()
    assert gradcheck(lambda x: ops.activation(x, act), (x,))
    assert gradcheck(lambda x: ops.gated_activation(x, act), (x,))


def test_every_activation_has_a_derivative() -> None:
    assert list(DERIVATIVES) == list(ops.ACTIVATIONS)


@pytest.mark.parametrize("act", FORMULAS)
def test_derivatives_tell_every_two_apart(act: str) -> None:
    x = X.double().requires_grad_()
    got = activation_backward(torch.ones_like(x), x.detach(), act)
    same = []
    for name, f in ops.ACTIVATIONS.items():
        (want,) = torch.autograd.grad(f(x).sum(), x)
        if torch.allclose(got, want, rtol=1e-9, atol=1e-12):
            same.append(name)
    assert same == [act]


@pytest.mark.parametrize("act", ["", "Silu", "swish"])
def test_operators_know_no_other_names(act: str) -> None:
    for call in (
        lambda: ops.gated_activation(X[..., :2], act),
        lambda: activation_backward(X, X, act),
        lambda: gated_activation_backward(X[..., :1], X[..., :2], act),
    ):
        with pytest.raises(ValueError, match=rf"must be one of none, relu, .*tanh, got '{act}'"):
            call()


@pytest.mark.parametrize(
    "x", [torch.randn(6), torch.randn(2, 6, 5).transpose(1, 2), torch.randn(2, 1, 4).expand(2, 3, 4)]
)
def test_opcheck_of_gradients(x: Tensor) -> None:
    half = torch.randn_like(x)[..., ::2]
    for act in ("none", "relu", "gelu_tanh"):
        opcheck(ops.activation, (x.clone().requires_grad_(), act))
        opcheck(ops.gated_activation, (x.clone().requires_grad_(), act))
        opcheck(activation_backward, (torch.randn(x.shape), x, act))
        opcheck(gated_activation_backward, (half, x, act))
