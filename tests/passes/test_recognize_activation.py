"""Spelled-out activations are recognised by what they compute; what computes something else is left alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ryzen_compile import ops
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.recognize_activation import RecognizeActivation, activation_name
from tests.passes.graphs import logits_moved, models, passed, program_of, rewrite

CANONICAL = Canonicalize()
X = torch.randn(2, 7, 8)
OTHER = 3 * torch.randn(3, 5, 8)


class Elementwise(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.project(x))


ROOT = math.sqrt(2.0 / math.pi)
SPELLINGS = {
    "gelu_tanh with pow": ("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**3)))),
    "gelu_tanh with products": (
        "gelu_tanh",
        lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
    ),
    "gelu with erf": ("gelu", lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "quick gelu": ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    "silu": ("silu", lambda x: torch.sigmoid(x) * x),
    "silu with tanh": ("silu", lambda x: 0.5 * x * (1 + torch.tanh(x / 2))),
    "squared relu by pow": ("relu2", lambda x: torch.relu(x) ** 2),
    "squared relu by square": ("relu2", lambda x: torch.relu(x).square()),
    "squared relu by product": ("relu2", lambda x: torch.relu(x) * torch.relu(x)),
    "sigmoid with tanh": ("sigmoid", lambda x: 0.5 + 0.5 * torch.tanh(x / 2)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_recognizes_by_value(spelling: str) -> None:
    act, function = SPELLINGS[spelling]
    after_passes = (CANONICAL,) if "product" in spelling else ()  # equal relu calls are one after canonicalize
    before, after = rewrite(RecognizeActivation(), Elementwise(function), X, after=after_passes)
    assert after.ops == ["aten.linear", "ryzen.activation"]
    assert [activation_name(n)[0] for n in after.program.graph.nodes if activation_name(n)] == [act]
    assert_close(after(OTHER), before(OTHER), rtol=1e-5, atol=1e-6)


def test_constant_factors_stay_outside() -> None:
    before, after = rewrite(RecognizeActivation(), Elementwise(lambda x: 3.0 * ((2 * x) * torch.sigmoid(2 * x))), X,
                            after=(CANONICAL,))  # fmt: skip
    assert after.ops == ["aten.linear", "aten.mul", "ryzen.activation", "aten.mul"]
    assert_close(after(OTHER), before(OTHER), rtol=1e-5, atol=1e-6)


def sigmoid_read_elsewhere(x: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * x)
    return gate * x + torch.cumsum(gate, -1)


def half_read_elsewhere(x: Tensor) -> Tensor:
    half = 0.5 * x
    return half * (1 + torch.erf(x / math.sqrt(2.0))) + torch.cumsum(half, -1)


NEAR_MISSES = {
    "one call": (torch.tanh, "already one call"),
    "softcap": (lambda x: 30.0 * torch.tanh(x / 30.0), r"no known activation: the nearest is \w+, off by"),
    "another constant": (lambda x: x * torch.sigmoid(1.7 * x), "nearest is quick_gelu, off by 0.0"),
    "wrong cube": (lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.0447 * x**3))), "nearest is gelu_tanh, off by"),
    "clipped": (lambda x: torch.relu(x).clamp(max=6.0) ** 2, "no known activation"),
    "two tensors": (lambda x: torch.sigmoid(x[..., :4]) * x[..., 4:], "already one call"),
    "sigmoid read elsewhere": (sigmoid_read_elsewhere, "no known activation: the nearest is sigmoid"),
    "half read elsewhere": (half_read_elsewhere, r"computes gelu, but mul\w* is read elsewhere"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_leaves_near_misses_alone(case: str) -> None:
    function, reason = NEAR_MISSES[case]
    before, after = rewrite(RecognizeActivation(), Elementwise(function), X)
    assert after.ops == before.ops
    assert re.search(reason, after.reasons), after.reasons


def test_leaves_an_intermediate_that_is_returned_alone() -> None:
    class Returned(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scaled = 0.5 * x
            return scaled * (1 + torch.erf(x / math.sqrt(2.0))), scaled

    before, after = rewrite(RecognizeActivation(), Returned(), X)
    assert after.ops == before.ops
    assert "is read elsewhere" in after.reasons


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.functional.silu, "silu"),
        (nn.functional.gelu, "gelu"),
        (lambda x: nn.functional.gelu(x, approximate="tanh"), "gelu_tanh"),
        (torch.relu, "relu"),
        (torch.tanh, "tanh"),
        (torch.sigmoid, "sigmoid"),
        (torch.exp, None),
        (lambda x: ops.activation(x, "relu2"), "relu2"),
    ],
)
def test_names_single_calls(function: Callable[[Tensor], Tensor], name: str | None) -> None:
    call = program_of(Elementwise(function), X).outputs[0]
    named = activation_name(call)
    assert named == (None if name is None else (name, call.args[0]))


@pytest.mark.parametrize("act", sorted(ops.ACTIVATIONS))
def test_operator(act: str) -> None:
    torch.library.opcheck(ops.activation, (torch.randn(3, 1, 5), act))


def test_operator_lists_the_names_on_a_miss() -> None:
    with pytest.raises(ValueError, match=r"must be one of none, relu.*got 'swish'"):
        ops.activation(torch.zeros(1), "swish")


HITS = {"cohere2": 0, "gemma": 0, "gemma2": 0, "gpt2": 2, "gpt_neox": 0, "llama": 0, "olmo2": 0, "opt": 0, "phi": 2,
        "phi3": 0, "qwen3": 0}  # fmt: skip


@pytest.mark.parametrize("model", models(HITS))
def test_models(model: str) -> None:
    result = passed(model)["recognize_activation"]
    assert len(result.hits) == HITS[model]
    assert logits_moved(model, "recognize_activation") < 1e-6  # logits are below 1: a few float32 roundings
    softcaps = [m.note for m in result.misses if "no known activation" in m.note]
    assert len(softcaps) == (model == "gemma2")
