"""Every way to write attention becomes one node, mask and scaling read by probing; what is more than that stays."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from ryzen_compile import ops
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.fuse_attention import FuseAttention
from ryzen_compile.program import is_call, module_path
from tests.passes.graphs import Graph, rewrite

HEADS, KV, D = 4, 2, 4
X = torch.randn(2, 7, HEADS * D, generator=torch.Generator().manual_seed(0))
SCALE = 1 / math.sqrt(D)
Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
sdpa = functional.scaled_dot_product_attention


def places(x: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.arange(x.shape[1])
    return at[:, None], at[None, :]


def tril(x: Tensor) -> Tensor:
    query, key = places(x)
    return key <= query


def windowed(x: Tensor, size: int = 3) -> Tensor:
    query, key = places(x)
    return (key <= query) & (key > query - size)


def minus_inf(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))


def expanded(k: Tensor) -> Tensor:
    b, h, t, d = k.shape
    return k[:, :, None].expand(b, h, HEADS // KV, t, d).reshape(b, HEADS, t, d)


def repeated(k: Tensor) -> Tensor:
    return k.repeat_interleave(HEADS // KV, dim=1)


def softmax(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1) @ v


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1)


def capped(x: Tensor) -> Tensor:
    return 3.0 * torch.tanh(x / 3.0)


def hide(s: Tensor, visible: Tensor, value: float = float("-inf")) -> Tensor:
    return s.masked_fill(~visible, value)


# how it is written, then kv heads, and scale, window, soft cap, causal of the node
FORMS: dict[str, tuple[Function, int, tuple[float, int, float, bool]]] = {
    "sdpa_causal": (lambda x, q, k, v: sdpa(q, k, v, is_causal=True), HEADS, (SCALE, 0, 0.0, True)),
    "sdpa_full": (lambda x, q, k, v: sdpa(q, k, v), HEADS, (SCALE, 0, 0.0, False)),
    "sdpa_bool_mask": (lambda x, q, k, v: sdpa(q, k, v, attn_mask=tril(x)), HEADS, (SCALE, 0, 0.0, True)),
    "sdpa_float_mask": (lambda x, q, k, v: sdpa(q, k, v, minus_inf(tril(x))), HEADS, (SCALE, 0, 0.0, True)),
    "sdpa_window": (lambda x, q, k, v: sdpa(q, k, v, windowed(x), scale=0.3), HEADS, (0.3, 3, 0.0, True)),
    "sdpa_all_true": (lambda x, q, k, v: sdpa(q, k, v, tril(x) | True), HEADS, (SCALE, 0, 0.0, False)),
    "expand": (lambda x, q, k, v: sdpa(q, expanded(k), expanded(v), is_causal=True), KV, (SCALE, 0, 0.0, True)),
    "interleave": (lambda x, q, k, v: sdpa(q, repeated(k), repeated(v), is_causal=True), KV, (SCALE, 0, 0.0, True)),
    "sdpa_mask_of_rank_3": (
        lambda x, q, k, v: sdpa(q, k, v, windowed(x)[None]), HEADS, (SCALE, 3, 0.0, True)),
    "enable_gqa": (
        lambda x, q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), KV, (SCALE, 0, 0.0, True)),
    "masked_fill": (
        lambda x, q, k, v: softmax(hide(scores(q, k) * SCALE, tril(x)), v), HEADS, (SCALE, 0, 0.0, True)),
    "additive": (
        lambda x, q, k, v: softmax(scores(q, k) / 3 + minus_inf(tril(x)), v), HEADS, (1 / 3, 0, 0.0, True)),
    "large_negative": (
        lambda x, q, k, v: softmax(scores(q, k) + (~tril(x)) * torch.finfo(torch.float32).min, v),
        HEADS, (1.0, 0, 0.0, True)),
    "where": (
        lambda x, q, k, v: softmax(torch.where(tril(x), scores(q, k) * 2, torch.tensor(-1e9)), v),
        HEADS, (2.0, 0, 0.0, True)),
    "soft_cap": (
        lambda x, q, k, v: softmax(hide(capped(scores(q, k) * 0.3), tril(x)), v), HEADS, (0.3, 0, 3.0, True)),
    "soft_cap_window": (
        lambda x, q, k, v: softmax(hide(capped(scores(q, k) * 0.3), windowed(x)), v), HEADS, (0.3, 3, 3.0, True)),
    "window": (
        lambda x, q, k, v: softmax(hide(scores(q, k) * SCALE, windowed(x)), v), HEADS, (SCALE, 3, 0.0, True)),
    "window_of_one": (
        lambda x, q, k, v: softmax(hide(scores(q, k), windowed(x, 1)), v), HEADS, (1.0, 1, 0.0, True)),
    "scaled_queries": (
        lambda x, q, k, v: softmax(hide(scores(q * 0.3, k), tril(x)), v), HEADS, (1.0, 0, 0.0, True)),
    "no_mask": (lambda x, q, k, v: softmax(scores(q, k), v), HEADS, (1.0, 0, 0.0, False)),
    "softmax_groups": (
        lambda x, q, k, v: softmax(hide(scores(q, expanded(k)) * SCALE, tril(x)), expanded(v)),
        KV, (SCALE, 0, 0.0, True)),
    "captured": (
        lambda x, q, k, v: ops.attention(q, repeated(k), expanded(v), None, 0.4, 3, 2.0, True).transpose(1, 2),
        KV, (0.4, 3, 2.0, True)),
}  # fmt: skip


class Part(nn.Module):
    def __init__(self, function: Function, kv_heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HEADS * D, n * D) for n in (HEADS, kv_heads, kv_heads))
        self.function = function
        nn.init.normal_(self.q.weight)
        nn.init.normal_(self.k.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.function(x, q, k, v).transpose(1, 2).flatten(2)


class Parts(nn.Module):
    """Side by side, so that one export serves every case; a part's name is its module path."""

    def __init__(self, cases: Mapping[str, tuple[Function, int]]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: Part(*case) for name, case in cases.items()})

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts.values()], dim=-1)


def fused(cases: Mapping[str, tuple[Function, int]]) -> tuple[Graph, Graph]:
    torch.manual_seed(0)
    return rewrite(FuseAttention(), Parts(cases), X, after=(Canonicalize(),))


@pytest.fixture(scope="module")
def forms() -> tuple[Graph, Graph]:
    return fused({name: case[:2] for name, case in FORMS.items()})


@pytest.fixture(scope="module")
def outputs(forms: tuple[Graph, Graph]) -> list[tuple[Tensor, Tensor]]:
    before, after = forms
    inputs = [torch.randn(3, 11, HEADS * D), X, torch.randn(2, 31, HEADS * D)]
    return [(after(x), before(x)) for x in inputs]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_one_node(
    forms: tuple[Graph, Graph], outputs: list[tuple[Tensor, Tensor]], name: str
) -> None:
    _, after = forms
    _, kv_heads, expected = FORMS[name]
    mine = [n for n in after.program.graph.nodes if module_path(n) == f"parts.{name}"]
    (node,) = [n for n in mine if is_call(n, torch.ops.ryzen.attention)]
    q, k, v, sinks, scale, window, softcap, causal = node.args
    assert sinks is None
    assert (scale, window, softcap, causal) == pytest.approx(expected, rel=1e-5)
    assert [x.meta["val"].shape[1] for x in (q, k, v)] == [HEADS, kv_heads, kv_heads]
    assert [site.module for site in after.hits].count(f"parts.{name}") == 1
    i = list(FORMS).index(name)
    for got, want in outputs:
        assert_close(got[..., i], want[..., i], rtol=1e-4, atol=1e-5)


def test_nothing_of_the_forms_is_left(forms: tuple[Graph, Graph]) -> None:
    _, after = forms
    assert not after.misses
    kept = {"aten.linear", "aten.reshape", "aten.permute", "aten.mul", "aten.unsqueeze", "aten.cat", "aten.stack"}
    assert set(after.ops) - kept == {"ryzen.attention"}
    assert after.ops.count("aten.mul") == 1  # the queries that were scaled before the product
    assert after.ops.count("ryzen.attention") == len(FORMS)


def test_the_numbers_tell_the_forms_apart(outputs: list[tuple[Tensor, Tensor]]) -> None:
    """The comparison above is not vacuous: attention with another mask is another value."""
    x = X
    q, k, v = (torch.randn(2, HEADS, 7, D) for _ in range(3))
    right = FORMS["window"][0](x, q, k, v)
    for name in ("masked_fill", "no_mask", "window_of_one", "soft_cap_window"):
        assert not torch.allclose(FORMS[name][0](x, q, k, v), right, rtol=1e-4, atol=1e-5)


def test_heads_are_not_put_back_twice(forms: tuple[Graph, Graph]) -> None:
    _, after = forms
    for node in after.program.graph.nodes:
        if is_call(node, torch.ops.ryzen.attention):
            assert [is_call(reader, torch.ops.aten.reshape) for reader in node.users] == [True]


def alibi(x: Tensor) -> Tensor:
    query, key = places(x)
    return -(query - key).abs() * torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]


def weights_too(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(hide(scores(q, k), tril(x)), dim=-1)
    return weights @ v + weights.sum(-1, keepdim=True)


def of_tokens(x: Tensor) -> Tensor:
    return (x[..., 0] > 0)[:, None, None, :]


def by_head(x: Tensor) -> Tensor:
    query, key = places(x)
    return (key <= query) & (key > query - torch.tensor([1, 2, 3, 4])[:, None, None])


def in_chunks(x: Tensor) -> Tensor:
    query, key = places(x)
    return (key <= query) & (key // 5 == query // 5)


NEAR_MISSES: dict[str, tuple[Function, int, str]] = {
    "alibi": (
        lambda x, q, k, v: softmax(hide(scores(q, k) + alibi(x), tril(x)), v), HEADS,
        r"something is added to visible scores \(a bias, or ALiBi\)"),
    "alibi_sdpa": (
        lambda x, q, k, v: sdpa(q, k, v, alibi(x) + minus_inf(tril(x))), HEADS, "mask adds a bias to visible scores"),
    "dropout": (lambda x, q, k, v: sdpa(q, k, v, dropout_p=0.1), HEADS, "drops out weights"),
    "weights_too": (weights_too, HEADS, "the weights are not only multiplied with values"),
    "mask_of_tokens": (lambda x, q, k, v: sdpa(q, k, v, of_tokens(x)), HEADS, "the mask depends on the tokens"),
    "masked_by_tokens": (
        lambda x, q, k, v: softmax(scores(q, k).masked_fill(of_tokens(x), -1e9), v), HEADS,
        "the scores do not come from one matrix product"),
    "heads_differ": (
        lambda x, q, k, v: softmax(hide(scores(q, k), by_head(x)), v), HEADS, "heads have different masks"),
    "heads_differ_sdpa": (lambda x, q, k, v: sdpa(q, k, v, by_head(x)), HEADS, "heads have different masks"),
    "in_chunks": (
        lambda x, q, k, v: sdpa(q, k, v, in_chunks(x)), HEADS, "the attention mask is neither causal, windowed nor full"
    ),
    "squared": (
        lambda x, q, k, v: softmax(scores(q, k) * scores(q, k), v), HEADS, "do not come from one matrix product"),
    "clamped": (
        lambda x, q, k, v: softmax(hide(scores(q, k).clamp(max=1.0), tril(x)), v), HEADS,
        r"a score of 8.0 becomes 1: neither scaled nor soft-capped|a score of .* becomes .*: neither"),
    "two_products": (
        lambda x, q, k, v: softmax(scores(q, k) + scores(k, q), v), HEADS, "do not come from one matrix product"),
    "scaled_behind_the_transpose": (
        lambda x, q, k, v: softmax(q @ (k.transpose(-1, -2) * 1.5), v), HEADS,
        r"the keys of a \(\w+, 4, \w+, 4\) query are not transposed by a permute"),
    "nothing_repeated": (
        lambda x, q, k, v: ops.attention(q, k, v, None, 0.4, 3, 2.0, True).transpose(1, 2), KV,
        "already one node, keys and values are not repeated"),
}  # fmt: skip


@pytest.fixture(scope="module")
def misses() -> tuple[Graph, Graph]:
    return fused({name: case[:2] for name, case in NEAR_MISSES.items()})


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_leaves_near_misses_alone(misses: tuple[Graph, Graph], name: str) -> None:
    notes = [site.note for site in misses[1].misses if site.module == f"parts.{name}"]
    assert len(notes) == 1 and re.search(NEAR_MISSES[name][2], notes[0]), notes


def test_near_misses_change_nothing(misses: tuple[Graph, Graph]) -> None:
    before, after = misses
    assert after.ops == before.ops and not after.hits
    assert len(after.misses) == len(NEAR_MISSES)


def tiled(k: Tensor) -> Tensor:
    return k.repeat(1, HEADS // KV, 1, 1)


def spelled_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax(scores(q, k), v)


OTHER_REPETITIONS: dict[str, tuple[Function, int]] = {
    "alternating": (lambda x, q, k, v: sdpa(q, tiled(k), tiled(v), is_causal=True), KV),
    "keys_only": (lambda x, q, k, v: sdpa(q, repeated(k), tiled(v), is_causal=True), KV),
    "values_only": (lambda x, q, k, v: spelled_out(q, tiled(k), expanded(v)), KV),
}


def test_other_repetitions_stay_outside() -> None:
    """Heads that alternate are no groups; keys and values are taken before their repetition together or not at all."""
    before, after = fused(OTHER_REPETITIONS)
    nodes = [n for n in after.program.graph.nodes if is_call(n, torch.ops.ryzen.attention)]
    assert len(nodes) == len(OTHER_REPETITIONS)
    assert all(x.meta["val"].shape[1] == HEADS for node in nodes for x in node.args[:3])
    x = torch.randn(3, 5, HEADS * D)
    assert_close(after(x), before(x), rtol=1e-4, atol=1e-5)


def test_a_softmax_of_something_else_is_none_of_its_business() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(self.experts(x), dim=-1) @ torch.ones(3, 5)

    before, after = rewrite(FuseAttention(), Router(), X, after=(Canonicalize(),))
    assert after.ops == before.ops and not after.misses
