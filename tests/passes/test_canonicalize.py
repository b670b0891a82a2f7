"""Canonicalize: each rule leaves one spelling and the same values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ryzen_compile.passes.canonicalize import Canonicalize
from tests.passes.graphs import captured, logits_moved, models, passed, rewrite

X, OTHER = torch.randn(2, 7, 8), torch.randn(3, 5, 8)


class Computed(nn.Module):
    """``function(x, w)`` with a weight (8, 6) and a bias (6,)."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.w, self.b = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def flat_addmm(m: Computed, x: Tensor) -> Tensor:
    return torch.addmm(m.b, x.view(-1, 8), m.w).view(x.shape[0], x.shape[1], 6)


def copied_heads(m: Computed, x: Tensor) -> Tensor:
    heads = torch.cos(x).view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
    return heads.transpose(1, 2).contiguous().view(x.shape[0], x.shape[1], 8)


def turned_heads(m: Computed, x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 4)).transpose(1, 2).contiguous().view(x.shape[0], 2, -1)


def mixed_readers(m: Computed, x: Tensor) -> Tensor:
    rows = torch.addmm(m.b, x.view(-1, 8), m.w)
    return rows.view(x.shape[0], x.shape[1], 6) + rows.sum()


RULES: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "copy": (lambda m, x: torch.cos(x).clone().contiguous().detach(), ["aten.cos"]),
    "cast to its own type": (lambda m, x: torch.cos(x).to(torch.float32), ["aten.cos"]),
    "cast to another type": (lambda m, x: torch.cos(x).to(torch.float64), ["aten.cos", "aten._to_copy"]),
    "whole slice": (lambda m, x: torch.cos(x[:, :, 0:8]), ["aten.cos"]),
    "part": (lambda m, x: torch.cos(x[:, 1:]), ["aten.slice", "aten.cos"]),
    "expand to itself": (lambda m, x: torch.cos(x.expand(x.shape)), ["aten.cos"]),
    "times one": (lambda m, x: torch.cos(x * 1.0) / 1 + 0.0 - 0, ["aten.cos"]),
    "floor division": (lambda m, x: torch.div(x, 1, rounding_mode="floor"), ["aten.div"]),
    "plus one": (lambda m, x: torch.cos(x) + 1, ["aten.cos", "aten.add"]),
    "square": (lambda m, x: x * x, ["aten.pow"]),
    "reciprocal root": (lambda m, x: 1 / torch.sqrt(x.exp()), ["aten.exp", "aten.rsqrt"]),
    "power of minus a half": (lambda m, x: x.exp() ** -0.5, ["aten.exp", "aten.rsqrt"]),
    "quotient by a root": (lambda m, x: x / x.exp().sqrt(), ["aten.exp", "aten.rsqrt", "aten.mul"]),
    "transposes that cancel": (copied_heads, ["aten.cos"]),
    "copy before a view": (turned_heads, ["aten.reshape", "aten.permute", "aten.reshape"]),
    "transpose": (lambda m, x: torch.cos(x.transpose(-1, -2)), ["aten.permute", "aten.cos"]),
    "matmul": (lambda m, x: x @ m.w, ["aten.permute", "aten.linear"]),
    "matmul with a transposed weight": (lambda m, x: x[..., :6] @ m.w.t(), ["aten.slice", "aten.linear"]),
    "matmul without a weight": (lambda m, x: x @ x.transpose(1, 2), ["aten.permute", "aten.matmul"]),
    "addmm of rows": (flat_addmm, ["aten.permute", "aten.linear"]),
    "addmm read twice": (
        mixed_readers,
        ["aten.reshape", "aten.permute", "aten.linear", "aten.reshape", "aten.sum", "aten.add"],
    ),
    "equal computations": (lambda m, x: torch.cos(x).exp() + torch.cos(x), ["aten.cos", "aten.exp", "aten.add"]),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str) -> None:
    function, expected = RULES[rule]
    before, after = rewrite(Canonicalize(), Computed(function), X)
    assert after.ops == expected
    assert_close(after(OTHER), before(OTHER), rtol=1e-6, atol=1e-6)  # linear and the roots round differently


MODELS = ["cohere2", "gemma", "gemma2", "gpt2", "gpt_neox", "llama", "olmo2", "opt", "phi", "phi3", "qwen3"]
GONE = {"aten.view", "aten.clone", "aten.transpose", "aten.t", "aten.addmm", "aten.mm", "aten.alias", "aten.detach"}


@pytest.mark.parametrize("model", models(MODELS))
def test_models(model: str) -> None:
    result = passed(model)["canonicalize"]
    assert result.hits
    assert not GONE & set(result.program.ops())
    assert len(result.program.ops()) < len(captured(model).ops())
    assert logits_moved(model, "canonicalize") < 1e-6  # logits are below 1: a few float32 roundings
