"""The head reads the last token only, through whatever treats tokens one by one behind it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ryzen_compile import ops
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.prune_logits import PruneLogits
from ryzen_compile.program import shape
from tests.passes.graphs import rewrite

X, OTHER = torch.randn(2, 7, 8), torch.randn(3, 31, 8)


class Headed(nn.Module):
    """``function(module, rows)`` behind a mixing of tokens, which pruning must leave in front."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.plain = nn.Linear(8, 11), nn.Linear(8, 11, bias=False)
        self.scales, self.function = nn.Parameter(torch.randn(11)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, torch.cos(x) + x.mean(1, keepdim=True))


HEADS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], list[str]]] = {
    "plain": (lambda m, h: m.plain(h), []),
    "bias": (lambda m, h: m.head(h), []),
    "soft-capped": (lambda m, h: 30.0 * torch.tanh(m.head(h) / 30.0), ["aten.div", "aten.tanh", "aten.mul"]),
    "scaled": (lambda m, h: m.head(h) * 0.25, ["aten.mul"]),
    "shifted and negated": (lambda m, h: -(m.head(h) - 1.5) + 2.0, ["aten.sub", "aten.neg", "aten.add"]),
}


@pytest.mark.parametrize("name", HEADS)
def test_head_of_the_last_token(name: str) -> None:
    function, behind = HEADS[name]
    before, after = rewrite(PruneLogits(), Headed(function), X, after=(Canonicalize(),))
    assert after.ops == ["aten.cos", "aten.mean", "aten.add", "aten.slice", "aten.linear", *behind]
    assert shape(after.program.outputs[0])[1:] == (1, 11)
    assert len(after.hits) == 1
    for x in (X, OTHER, OTHER[:1, :1]):
        assert_close(after(x), before(x)[:, -1:], rtol=1e-6, atol=1e-6)
        assert x.shape[1] == 1 or not torch.allclose(after(x), before(x)[:, -2:-1], rtol=1e-2, atol=1e-2)


def test_a_fused_head() -> None:
    model = Headed(lambda m, h: ops.linear_act(h, m.head.weight, m.head.bias, "tanh") * 3)
    before, after = rewrite(PruneLogits(), model, X, after=(Canonicalize(),))
    assert after.ops[-3:] == ["aten.slice", "ryzen.linear_act", "aten.mul"]
    assert_close(after(OTHER), before(OTHER)[:, -1:], rtol=1e-6, atol=1e-6)


def test_a_head_that_others_read_stays_for_them() -> None:
    class Two(Headed):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            rows = self.head(torch.cos(x))
            return rows * 2, rows.sum(1)

    before, after = rewrite(PruneLogits(), Two(lambda m, h: h), X, after=(Canonicalize(),))
    assert after.ops.count("aten.linear") == 2
    assert_close(after(OTHER), before(OTHER)[:, -1:], rtol=1e-6, atol=1e-6)


NEAR_MISSES = {
    "softmax": (lambda m, h: m.head(h).softmax(-1), "the output is not a linear head"),
    "over tokens": (lambda m, h: m.head(h).cumsum(1), "the output is not a linear head"),
    "another tensor's scales": (lambda m, h: m.head(h) * m.scales, "the output is not a linear head"),
    "two heads": (lambda m, h: m.head(h) + m.plain(h), "the output is not a linear head"),
    "rows": (lambda m, h: m.head(h.flatten(0, 1)), r"the head reads \(.+, 8\)"),
    "already one": (lambda m, h: m.head(h[:, -1:]), r"the head reads \(\w+, 1, 8\)"),
    "without the first": (lambda m, h: m.head(h[:, 1:]), r"the head reads \(\w+, \w+ - 1, 8\)"),
    "vocabulary first": (lambda m, h: m.head(h).transpose(1, 2), "the output is not a linear head"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_leaves_near_misses_alone(name: str) -> None:
    function, reason = NEAR_MISSES[name]
    before, after = rewrite(PruneLogits(), Headed(function), X, after=(Canonicalize(),))
    assert after.ops == before.ops and not after.hits
    assert re.search(reason, after.reasons), after.reasons
