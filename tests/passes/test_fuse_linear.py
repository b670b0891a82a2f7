"""Linears take the activation behind them; a gated pair of halves becomes one operator."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from ryzen_compile import ops
from ryzen_compile.passes.fuse_linear import FuseLinear
from ryzen_compile.passes.merge_linear import MergeLinear
from tests.passes.graphs import logits_moved, models, passed, rewrite

X, OTHER = torch.randn(2, 7, 8), torch.randn(3, 5, 8)
ACTIVATIONS = {
    "relu": torch.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu2": lambda x: ops.activation(x, "relu2"),
}


class Projected(nn.Module):
    """``function(linear(x))``."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 12, bias: bool = False) -> None:
        super().__init__()
        self.function = function
        self.project = nn.Linear(8, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.project(x))


@pytest.mark.parametrize(("act", "bias"), [*((act, False) for act in ACTIVATIONS), ("relu", True)])
def test_fuses_an_activation(act: str, bias: bool) -> None:
    before, after = rewrite(FuseLinear(), Projected(ACTIVATIONS[act], bias=bias), X)
    assert after.ops == ["ryzen.linear_act"]
    assert after.program.outputs[0].args[3] == act
    assert_close(after(OTHER), before(OTHER), rtol=1e-6, atol=1e-6)


def chunked(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, dim=-1)
    return functional.silu(gate) * up


def split(y: Tensor) -> Tensor:
    gate, up = y.split(6, dim=2)
    return up * functional.silu(gate)


def sliced(y: Tensor) -> Tensor:
    return functional.silu(y[..., :6]) * y[..., 6:]


def up_first(y: Tensor) -> Tensor:
    up, gate = y.chunk(2, dim=-1)
    return functional.silu(gate) * up


def sliced_up_first(y: Tensor) -> Tensor:
    return y[..., :6] * functional.silu(y[..., -6:])


@pytest.mark.parametrize("halves", [chunked, split, sliced])
def test_fuses_gated_halves(halves: Callable[[Tensor], Tensor]) -> None:
    before, after = rewrite(FuseLinear(), Projected(halves), X)
    assert after.ops == ["ryzen.gated_linear"]
    assert_close(after(OTHER), before(OTHER), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("halves", [up_first, sliced_up_first])
def test_turns_a_weight_that_holds_up_first(halves: Callable[[Tensor], Tensor]) -> None:
    before, after = rewrite(FuseLinear(), Projected(halves), X)
    assert after.ops == ["aten.slice", "aten.slice", "aten.cat", "ryzen.gated_linear"]
    assert_close(after(OTHER), before(OTHER), rtol=1e-6, atol=1e-6)


def test_fuses_what_merge_linear_made() -> None:
    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) * functional.gelu(self.gate(x))

    before, after = rewrite(FuseLinear(), Separate(), X, after=(MergeLinear(),))
    assert after.ops == ["aten.cat", "ryzen.gated_linear"]
    assert_close(after(OTHER), before(OTHER), rtol=1e-6, atol=1e-6)


def third_reader(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, dim=-1)
    return functional.silu(gate) * up + up


def whole_read(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, dim=-1)
    return functional.silu(gate) * up + y.sum(-1, keepdim=True)


def not_a_product(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, dim=-1)
    return functional.silu(gate) + up


def foreign_partner(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, dim=-1)
    return functional.silu(gate) * torch.cos(up)


def unequal(y: Tensor) -> Tensor:
    gate, rest = y.split((4, 8), dim=-1)
    return functional.silu(gate) * rest[..., :1]


def thirds(y: Tensor) -> Tensor:
    gate, up, _ = y.chunk(3, dim=-1)
    return functional.silu(gate) * up


NEAR_MISSES = {
    "linear read elsewhere": (Projected(lambda y: torch.relu(y) + y), r"linear is read elsewhere"),
    "no linear": (Projected(lambda y: torch.relu(torch.cos(y))), "neither a linear nor a part of one"),
    "bias": (Projected(chunked, bias=True), "the linear has a bias"),
    "up read elsewhere": (Projected(third_reader), r"getitem\w* is read elsewhere"),
    "whole read elsewhere": (Projected(whole_read), r"linear is read elsewhere"),
    "not a product": (Projected(not_a_product), "not only multiplied with the other half"),
    "partner is not the other half": (Projected(foreign_partner), r"cos is not the other half of linear"),
    "unequal": (Projected(unequal), r"slice\w* is not the other half|are not the halves"),
    "thirds": (Projected(thirds), "the parts 0:4 and 4:8 are not the halves of 12 channels"),
    "interleaved": (Projected(lambda y: functional.silu(y[..., ::2]) * y[..., 1::2]), "nor a part of one"),
    "split over tokens": (
        Projected(lambda y: functional.silu(y[:, :1]) * y[:, 1:2]),
        "neither a linear nor a part of one",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_leaves_near_misses_alone(case: str) -> None:
    model, reason = NEAR_MISSES[case]
    before, after = rewrite(FuseLinear(), model, X)
    assert after.ops == before.ops
    assert re.search(reason, after.reasons), after.reasons


GATED = {"cohere2", "gemma", "gemma2", "llama", "olmo2", "phi3", "qwen3"}
PLAIN = {"gpt2", "gpt_neox", "opt", "phi"}


@pytest.mark.parametrize("model", models(GATED | PLAIN))
def test_models(model: str) -> None:
    result = passed(model)["fuse_linear"]
    assert len(result.hits) == 2  # one feed-forward per layer
    assert result.program.ops().count("ryzen.gated_linear" if model in GATED else "ryzen.linear_act") == 2
    assert logits_moved(model, "fuse_linear") < 1e-6  # logits are below 1: a few float32 roundings
