"""Every attention gets a cache or none does; the cached graph is the same model, whole or chunk by chunk."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ryzen_compile import ops
from ryzen_compile.interpret import interpret
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.insert_kv_cache import InsertKVCache
from ryzen_compile.program import Program, is_call, shape
from ryzen_compile.spec import CacheSlot
from tests.passes.graphs import Graph, rewrite

C, HEADS, KV, D = 16, 4, 2, 4
X = torch.randn(2, 7, C, generator=torch.Generator().manual_seed(0))
cached = torch.ops.ryzen.cached_attention


@dataclass(frozen=True)
class Form:
    """How one attention is written."""

    packed: bool = False
    value_dim: int = D
    turn_q: str = ""  # the table that turns queries, and the one that turns keys
    turn_k: str = ""
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    causal: bool = True
    order: tuple[int, int, int] = (0, 1, 2)  # of q, k, v in the packed projection


class Attention(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.widths = [HEADS * D, KV * D, KV * form.value_dim]
        if form.packed:
            self.qkv = nn.Linear(C, sum(self.widths))
        else:
            self.q, self.k, self.v = (nn.Linear(C, n) for n in self.widths)
        self.o = nn.Linear(HEADS * form.value_dim, C)
        self.sinks = nn.Parameter(torch.randn(HEADS)) if form.sinks else None
        for name, speed in (("one", 1.0), ("two", 0.7)):
            angle = speed * torch.arange(64)[:, None] / 10.0 ** torch.arange(2)
            self.register_buffer(f"cos_{name}", angle.cos())
            self.register_buffer(f"sin_{name}", angle.sin())

    def forward(self, x: Tensor) -> Tensor:
        f = self.form
        if f.packed:
            parts = self.qkv(x).split([self.widths[i] for i in f.order], dim=-1)
            q, k, v = (parts[f.order.index(i)] for i in range(3))
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in ((q, HEADS), (k, KV), (v, KV)))
        at = torch.arange(x.shape[1])[None].expand(x.shape[0], -1)
        turn = lambda t, name: ops.rotary(t, at, getattr(self, f"cos_{name}"), getattr(self, f"sin_{name}"), True)
        q, k = (turn(t, name) if name else t for t, name in ((q, f.turn_q), (k, f.turn_k)))
        return self.o(ops.attention(q, k, v, self.sinks, 0.4, f.window, f.softcap, f.causal).flatten(2))


class Model(nn.Module):
    def __init__(self, *forms: Form) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attention(form) for form in forms)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(x + layer(x))
        return x


def inserted(*forms: Form) -> tuple[Graph, Graph]:
    return rewrite(InsertKVCache(), Model(*forms), X, after=(Canonicalize(),))


def run(program: Program, x: Tensor, chunks: tuple[int, ...]) -> Tensor:
    """The first output over ``chunks`` of ``x``, in caches full of what must not matter."""
    caches = [
        torch.full((x.shape[0], slot.kv_heads, slot.rows or x.shape[1] + 3, dim), 1e3)
        for slot in program.slots
        for dim in (slot.head_dim, slot.value_dim)
    ]
    outs, done = [], 0
    for new in chunks:
        piece = x[:, done : done + new]
        done += new
        mask = torch.ones((x.shape[0], done), dtype=torch.long)
        feeds = dict(zip(program.inputs, (piece, mask, *caches), strict=True))
        out, *caches = interpret(program, feeds, list(program.outputs))
        outs.append(out)
    return torch.cat(outs, dim=1)


FORMS = {
    "apart": Form(),
    "packed": Form(packed=True),
    "apart, turned": Form(turn_q="one", turn_k="one"),
    "packed, turned": Form(packed=True, turn_q="one", turn_k="one", window=3),
    "soft cap, sinks": Form(softcap=2.0, sinks=True, window=1),
    "narrow values": Form(value_dim=3, turn_q="one", turn_k="one"),
    "packed, narrow values": Form(packed=True, value_dim=3),
    "packed in another order": Form(packed=True, order=(2, 0, 1)),
}


@pytest.fixture(scope="module")
def all_forms() -> tuple[Graph, Graph]:
    """One model with a layer of each form: one export."""
    return inserted(*FORMS.values())


def test_the_cached_graph_is_the_same_model_in_any_chunks(all_forms: tuple[Graph, Graph]) -> None:
    before, after = all_forms
    x = torch.randn(3, 41, C)
    assert 0 < 2 * max(slot.rows for slot in after.program.slots) < 41  # windows drop their rows more than once
    want = before(x)
    for chunks in ((41,), (1,) * 41, (4, 1, 20, 1, 15)):
        assert_close(run(after.program, x, chunks), want, rtol=1e-4, atol=1e-5)
    wrong = run(after.program, x.flip(1), (41,))
    assert not torch.allclose(wrong.flip(1), want, rtol=1e-2, atol=1e-2)


def test_inputs_outputs_and_slots(all_forms: tuple[Graph, Graph]) -> None:
    _, after = all_forms
    program, layers = after.program, len(FORMS)
    pairs = [f"past_key_values_{i}_{kind}" for i in range(layers) for kind in ("key", "value")]
    assert [n.name for n in program.inputs] == ["x", "attention_mask", *pairs]
    assert program.slots == tuple(
        CacheSlot(i, KV, D, f.value_dim, "fp32", "fp32", f.window) for i, f in enumerate(FORMS.values())
    )
    nodes = [n for n in program.graph.nodes if is_call(n, cached)]
    assert len(nodes) == len(after.hits) == layers
    _, *presents = program.outputs
    assert [(n.args[0], n.args[1]) for n in presents] == [(node, part) for node in nodes for part in (1, 2)]
    assert program.output_names == [n.name for n in program.outputs]
    for present, name in zip(presents, pairs, strict=True):
        assert shape(present) == shape(program.input(name))
    batch, total = shape(program.input("attention_mask"))
    assert batch == shape(program.inputs[0])[0] and total != shape(program.inputs[0])[1]
    capacities = [shape(program.input(name))[2] for name in pairs]
    assert not any(isinstance(capacity, int) for capacity in capacities)
    assert capacities[::2] == capacities[1::2]  # a layer's keys and values
    windows = [slot.window for slot in program.slots]
    shared = {str(capacity) for capacity, window in zip(capacities[::2], windows, strict=True) if not window}
    own = [str(capacity) for capacity, window in zip(capacities[::2], windows, strict=True) if window]
    assert len(shared) == 1 and len(own) == len(set(own)) == 2 and not shared & set(own)


@pytest.mark.parametrize("name", FORMS)
def test_what_goes_into_the_node(all_forms: tuple[Graph, Graph], name: str) -> None:
    _, after = all_forms
    form, i = FORMS[name], list(FORMS).index(name)
    node = [n for n in after.program.graph.nodes if is_call(n, cached)][i]
    q, k, v, _, _, lengths, cos, sin, sinks, heads, scale, window, softcap, interleaved, *storage = node.args
    whole = form.packed and form.value_dim == D and form.order == (0, 1, 2)
    if whole:
        assert is_call(q, torch.ops.aten.linear) and k is None and v is None
        assert shape(q)[2] == (HEADS + 2 * KV) * D
    else:
        assert [shape(x)[2] for x in (q, k, v)] == [HEADS * D, KV * D, KV * form.value_dim]
        assert form.packed or all(is_call(x, torch.ops.aten.linear) for x in (q, k, v))
    assert (heads, scale, window, softcap) == (HEADS, 0.4, form.window, form.softcap)
    assert storage == [None, None, "fp32", "fp32", False, form.window > 0, None]
    assert (sinks is None) is (not form.sinks)
    assert is_call(lengths, torch.ops.aten.sum) and lengths.args[0].name == "attention_mask"
    turned = form.turn_q != ""
    assert (cos is not None, sin is not None, interleaved) == (turned, turned, turned)
    if turned:
        assert (cos.op, sin.op) == ("placeholder", "placeholder") and cos is not sin


WINDOWS = (0, 1, 31, 32, 33, 64, 200)  # of a context of 64


@pytest.mark.parametrize("bounded", [True, False])
def test_a_window_of_up_to_half_of_the_context_bounds_its_layer(bounded: bool) -> None:
    forms = [Form(window=window) for window in WINDOWS]
    before, after = rewrite(InsertKVCache(bounded=bounded), Model(*forms), X, after=(Canonicalize(),))
    assert after.program.spec.context == 64
    kept = [w if bounded and w <= 32 else 0 for w in WINDOWS]
    assert [slot.window for slot in after.program.slots] == kept
    nodes = [n for n in after.program.graph.nodes if is_call(n, cached)]
    assert [(n.args[11], n.args[19]) for n in nodes] == [(w, k > 0) for w, k in zip(WINDOWS, kept, strict=True)]
    x = torch.randn(2, 60, C)
    assert_close(run(after.program, x, (50, 1, 1, 8)), before(x), rtol=1e-4, atol=1e-5)


def test_nothing_is_left_around_the_node(all_forms: tuple[Graph, Graph]) -> None:
    _, after = all_forms
    gone = {"ryzen.attention", "ryzen.rotary", "aten.permute", "aten.reshape", "aten.arange", "aten.expand"}
    assert not gone & set(after.ops)
    assert after.ops.count("aten.split_with_sizes") == 2  # where the projection could not go in whole


def test_a_rotation_that_queries_and_keys_do_not_share_stays_outside() -> None:
    forms = (Form(turn_q="one", turn_k="two"), Form(turn_q="one"), Form(packed=True, turn_k="two"))
    before, after = inserted(*forms)
    for node in (n for n in after.program.graph.nodes if is_call(n, cached)):
        assert node.args[6] is None and node.args[7] is None and node.args[13] is False
        assert all(len(shape(x)) == 3 for x in node.args[:3])
    assert after.ops.count("ryzen.cached_attention") == len(forms)
    assert after.ops.count("ryzen.rotary") == 4
    x = torch.randn(3, 5, C)
    assert_close(run(after.program, x, (5,)), before(x), rtol=1e-4, atol=1e-5)


class Also(Model):
    """One attention that could have a cache, and something else."""

    def __init__(self, kind: str) -> None:
        super().__init__(Form())
        self.kind, self.conv = kind, nn.Conv1d(C, C, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        match self.kind:
            case "softmax":
                return torch.softmax(x @ x.transpose(1, 2), dim=-1) @ x
            case "conv":
                return self.conv(nn.functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
            case "cumsum":
                return x.cumsum(1)
            case _:
                return x + x.flip(1)


@pytest.mark.parametrize("kind", ["softmax", "conv", "cumsum", "flip"])
def test_what_else_mixes_tokens_refuses_the_cache_of_all(kind: str) -> None:
    before, after = rewrite(InsertKVCache(), Also(kind), X, after=(Canonicalize(),))
    assert after.ops == before.ops and not after.hits and after.program.slots == ()
    assert "mixes tokens outside an attention that was recognised" in after.reasons
    found = {"softmax": "matmul|softmax", "conv": "convolution"}.get(kind, kind)
    assert any(re.match(found, site.node) for site in after.misses), after.misses


def test_attention_to_later_tokens_is_refused_with_all_the_others() -> None:
    before, after = inserted(Form(), Form(causal=False))
    assert after.ops == before.ops and not after.hits
    assert [(site.module, site.note) for site in after.misses] == [
        ("layers.1", "attends to later tokens: a cache cannot hold what is not there yet")
    ]


def test_values_with_other_heads_are_refused() -> None:
    class Odd(Model):
        def forward(self, x: Tensor) -> Tensor:
            q, k = (f(x).unflatten(-1, (-1, D)).transpose(1, 2) for f in (self.layers[0].q, self.layers[0].k))
            return ops.attention(q, k, q, None, 0.4, 0, 0.0, True).flatten(2)

    before, after = rewrite(InsertKVCache(), Odd(Form()), X, after=(Canonicalize(),))
    assert after.ops == before.ops
    assert re.search(r"values are \(\w+, 4, \w+, 4\), expected \(B, 2, T, D\)", after.reasons)


def test_a_graph_without_attention_has_nothing_to_say() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cos(x)

    _, after = rewrite(InsertKVCache(), Plain(), X)
    assert not after.hits and not after.misses and not InsertKVCache().run(after.program).changed
    assert InsertKVCache.required and InsertKVCache.builds_on == "fuse_attention"
