"""Every activation against its definition in float64, and as a custom operator."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.testing import assert_close

from ryzen_compile import ops


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
