"""Linears of one attention, and a gate with its up projection, become one linear; other readers stay apart."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from ryzen_compile import ops
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.merge_linear import MergeLinear
from tests.passes.graphs import Graph, logits_moved, models, passed, rewrite

X, OTHER = torch.randn(2, 7, 8), torch.randn(3, 5, 8)
MERGED = ["aten.cat", "aten.linear", "aten.split_with_sizes"]


def merged_rows(graph: Graph) -> list[list[str]]:
    """The weights in every ``cat``, by their names in the module, in order of their rows."""
    names = graph.program.weight_names
    cats = [n for n in graph.program.graph.nodes if n.op == "call_function" and str(n.target) == "aten.cat.default"]
    return [[names[w.name] for w in cat.args[0]] for cat in cats if all(w.name in names for w in cat.args[0])]


class Attention(nn.Module):
    """Two heads over one kv head; ``inside(module, x, q, k, v)`` computes what is returned."""

    def __init__(
        self, inside: Callable[..., Tensor] | None = None, bias: tuple[bool, bool, bool] = (False,) * 3
    ) -> None:
        super().__init__()
        sizes = (8, 4, 4)
        self.q, self.k, self.v = (nn.Linear(8, n, bias=b) for n, b in zip(sizes, bias, strict=True))
        self.other = nn.Linear(8, 8, bias=False)
        self.inside = inside or (lambda m, x, q, k, v: m.attend(q, k, v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v))
        return ops.attention(q, k, v, None, 0.5, 0, 0.0, True).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        value = self.v(x)  # the order of calls is not the order of rows
        return self.inside(self, x, self.q(x), self.k(x), value)


@pytest.mark.parametrize("bias", [False, True])
def test_merges_the_projections_of_an_attention(bias: bool) -> None:
    before, after = rewrite(MergeLinear(), Attention(bias=(bias,) * 3), X, after=(Canonicalize(),))
    assert after.ops[: 3 + bias] == ["aten.cat"] * bias + MERGED
    assert after.ops.count("aten.linear") == 1
    assert merged_rows(after) == [["q.weight", "k.weight", "v.weight"], ["q.bias", "k.bias", "v.bias"]][: 1 + bias]
    assert_close(after(OTHER), before(OTHER), rtol=1e-5, atol=1e-6)


def test_sees_through_rotation_and_head_norms() -> None:
    def inside(m: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = torch.cat((-q[..., 4:], q[..., :4]), -1) * torch.sin(x) + q * torch.cos(x)
        return m.attend(turned, ops.rms_norm(k, None, 1e-5, False), v)

    before, after = rewrite(MergeLinear(), Attention(inside), X, after=(Canonicalize(),))
    assert merged_rows(after) == [["q.weight", "k.weight", "v.weight"]]
    assert_close(after(OTHER), before(OTHER), rtol=1e-5, atol=1e-6)


def test_parallel_feed_forward_stays_out_of_the_projections() -> None:
    def inside(m: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return m.attend(q, k, v) + torch.relu(m.other(x))

    before, after = rewrite(MergeLinear(), Attention(inside), X, after=(Canonicalize(),))
    assert merged_rows(after) == [["q.weight", "k.weight", "v.weight"]]
    assert after.ops.count("aten.linear") == 2
    assert "feeds neither an attention nor a gate" in after.reasons
    assert_close(after(OTHER), before(OTHER), rtol=1e-5, atol=1e-6)


def test_transposed_weights_are_merged_as_expressions() -> None:
    class Right(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(8, n) for n in (8, 4, 4))
            self.attend = Attention().attend

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(*(x @ w for w in self.weights))

    before, after = rewrite(MergeLinear(), Right(), X, after=(Canonicalize(),))
    assert after.ops[:6] == ["aten.permute"] * 3 + MERGED
    assert_close(after(OTHER), before(OTHER), rtol=1e-5, atol=1e-5)  # weights of order one, not the eighth of a layer's


class FeedForward(nn.Module):
    """``join(module, x, gate(x), up(x))``."""

    def __init__(self, join: Callable[..., Tensor], up_bias: bool = False, gate_bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 6, bias=gate_bias), nn.Linear(8, 6, bias=up_bias)
        self.down, self.router = nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x, self.gate(x), self.up(x))


@pytest.mark.parametrize(
    ("act", "up_first"), [(functional.silu, False), (torch.relu, True), (lambda x: ops.activation(x, "relu2"), False)]
)
def test_merges_gate_and_up(act: Callable[[Tensor], Tensor], up_first: bool) -> None:
    model = FeedForward(lambda m, x, g, u: m.down(u * act(g) if up_first else act(g) * u))
    before, after = rewrite(MergeLinear(), model, X)
    assert after.ops[:3] == MERGED
    assert merged_rows(after) == [["gate.weight", "up.weight"]]
    assert_close(after(OTHER), before(OTHER), rtol=1e-5, atol=1e-6)


def test_router_is_left_alone() -> None:
    model = FeedForward(lambda m, x, g, u: m.down(functional.silu(g) * u) * m.router(x).softmax(-1)[..., :1])
    before, after = rewrite(MergeLinear(), model, X)
    assert merged_rows(after) == [["gate.weight", "up.weight"]]
    assert "feeds neither an attention nor a gate" in after.reasons
    assert_close(after(OTHER), before(OTHER), rtol=1e-5, atol=1e-6)


def shared(m: FeedForward, x: Tensor, g: Tensor, u: Tensor) -> Tensor:
    return functional.silu(g) * u + functional.linear(torch.cos(x), m.gate.weight)


def cross(m: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return m.attend(q, m.k(torch.relu(x)), v)


def computed(m: FeedForward, x: Tensor, g: Tensor, u: Tensor) -> Tensor:
    weight = m.gate.weight * x.mean()
    return functional.silu(functional.linear(x, weight)) * functional.linear(x, m.up.weight)


NEAR_MISSES = {
    "alone": (Attention(lambda m, x, q, k, v: m.other(x)), "no other linear reads its input"),
    "no activation": (FeedForward(lambda m, x, g, u: g * u), "feeds neither"),
    "a sum": (FeedForward(lambda m, x, g, u: functional.silu(g) + u), "feeds neither"),
    "gate alone": (FeedForward(lambda m, x, g, u: (functional.silu(g) * g) + u), "already one linear"),
    "up reads another": (
        FeedForward(lambda m, x, g, u: functional.silu(g) * m.up(torch.cos(x)) + u),
        r"linear\w*, its partner, reads another value",
    ),
    "one bias": (FeedForward(lambda m, x, g, u: functional.silu(g) * u, up_bias=True), "some of the group have a bias"),
    "shared weight": (FeedForward(shared), r"gate_weight is read elsewhere: merging would copy it"),
    "computed weight": (FeedForward(computed), r"mul\w* is computed from the input"),
    "one bias of three": (Attention(bias=(True, False, True)), "some of the group have a bias"),
    "keys read another": (Attention(cross), "reads another value"),
    "shared keys and values": (Attention(lambda m, x, q, k, v: m.attend(q, k, k) + v.sum()), "already one linear"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_leaves_near_misses_alone(case: str) -> None:
    model, reason = NEAR_MISSES[case]
    before, after = rewrite(MergeLinear(), model, X, after=(Canonicalize(),))
    assert after.ops == before.ops
    assert re.search(reason, after.reasons), after.reasons


# Per layer: one for q, k, v where they are separate, one for gate and up where there is a gate and it is separate.
HITS = {"cohere2": 4, "gemma": 4, "gemma2": 4, "gpt2": 0, "gpt_neox": 0, "llama": 4, "olmo2": 4, "opt": 2, "phi": 2,
        "phi3": 0, "qwen3": 4}  # fmt: skip


@pytest.mark.parametrize("model", models(HITS))
def test_models(model: str) -> None:
    result = passed(model)["merge_linear"]
    assert len(result.hits) == HITS[model]
    assert logits_moved(model, "merge_linear") < 1e-6  # logits are below 1: a few float32 roundings
    apart = [m for m in result.misses if "feeds neither" in m.note]
    assert len(apart) == (2 if model == "phi" else 0)  # its feed-forward reads the attention's norm
