"""The text of a graph: readable, the same for the same graph, and changed only where the graph is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import fx

from ryzen_compile.capture import capture
from ryzen_compile.graphs.program_view import view_program
from ryzen_compile.graphs.text import canonical_text, names_of
from ryzen_compile.graphs.view import GraphView, ValueType, ValueView
from ryzen_compile.passes.base import NoMatch
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.fuse_norm import FuseNorm
from ryzen_compile.program import Program, module_path
from tests.graphs.test_program_view import MARKUP, Hostile
from tests.graphs.views import F32, graph, node
from tests.passes.graphs import captured, program_of
from tests.zoo import NanoDecoder

ATTENTION = "model.layers.3.attn"


def changed(before: Iterable[str], after: Iterable[str]) -> tuple[list[str], list[str]]:
    """Lines that went, and lines that came, wherever they stand."""
    old, new = Counter(before), Counter(after)
    return list((old - new).elements()), list((new - old).elements())


def test_a_line_says_what_a_node_is() -> None:
    view = graph(
        node("a", "aten.linear", "x", "w", module=f"{ATTENTION}.q_proj"),
        node("b", "aten.split", "a", module=ATTENTION, outputs=2, split_size=3),
        node("c", "aten.add", "b.1", "b.0", module=ATTENTION, alpha=2),
        node("d", "aten.add", "c", "x", module=ATTENTION),
        node("e", "ryzen.rms_norm", "d", "", "v", module="model.norm", eps=1e-06),
        node("f", "aten.neg", "e"),
        weights=("w", "v", "u"),
        labels="model.norm.",
    )
    assert canonical_text(view) == [
        "input %x : f32[B,T,7]",
        "weight @norm.w : f32[7,7]  # model.norm.w",
        "%3.q_proj.linear = aten.linear(%x, @norm.w)  : f32[B,T,7]  # model.layers.3.attn.q_proj",
        "%3.attn.split = aten.split(%3.q_proj.linear, split_size=3)  : f32[B,T,7], f32[B,T,7]  # model.layers.3.attn",
        "%3.attn.add = aten.add(%3.attn.split.1, %3.attn.split.0, alpha=2)  : f32[B,T,7]  # model.layers.3.attn",
        "%3.attn.add_1 = aten.add(%3.attn.add, %x)  : f32[B,T,7]  # model.layers.3.attn",
        "weight @norm.v : f32[7,7]  # model.norm.v",
        "%norm.rms_norm = ryzen.rms_norm(%3.attn.add_1, -, @norm.v, eps=1e-06)  : f32[B,T,7]  # model.norm",
        "%neg = aten.neg(%norm.rms_norm)  : f32[B,T,7]",
        "weight @norm.u : f32[7,7]  # model.norm.u  (unread)",
        "output %neg",
    ]


def test_names_are_unique_whatever_they_are_made_of() -> None:
    view = graph(
        node("x_1", "aten.x", "x"),  # as the input is called
        node("a", "aten.add", "x_1", module="0.mlp"),
        node("b", "aten.add_1", "a", module="0.mlp"),  # as the second add of the module would be
        node("c", "aten.add", "b", module="0.mlp"),
        node("d", "aten.add", "c", module="decoder.0.mlp"),  # another module of the same short name
        weights=("layers.0.a.weight", "layers.0.b.weight", "other.0.a.weight", "norm"),
    )
    names = names_of(view)
    assert list(names.nodes.values()) == ["%x_1", "%0.mlp.add", "%0.mlp.add_1", "%0.mlp.add_2", "%0.mlp.add_3"]
    assert [names.values[w.name] for w in view.weights] == [
        "@layers.0.a.weight", "@0.b.weight", "@other.0.a.weight", "@norm",
    ]  # fmt: skip
    twice = GraphView((), (ValueView("p", F32, "w"), ValueView("q", F32, "w")), (), ())
    assert [names_of(twice).values[name] for name in "pq"] == ["@w", "@w_1"]


def test_a_value_that_nothing_makes_is_shown_as_such() -> None:
    assert "aten.neg(?nowhere)" in canonical_text(graph(node("a", "aten.neg", "nowhere")))[1]


def test_bodies_of_functions_follow() -> None:
    body = graph(node("m", "Mul", "x", "x"))
    view = graph(node("a", "ryzen::square", "x"))
    lines = canonical_text(GraphView(view.inputs, (), view.nodes, view.outputs, (("ryzen::square", body),)))
    assert lines[1] == "%square = ryzen::square(%x)  : f32[B,T,7]"
    assert lines[-4:] == ["function ryzen::square:", "  input %x : f32[B,T,7]",
                          "  %Mul = Mul(%x, %x)  : f32[B,T,7]", "  output %Mul"]  # fmt: skip


def test_what_both_states_have_keeps_its_name() -> None:
    adds = [node(name, "aten.add", "x", module="layers.0") for name in ("a", "b", "c")]
    last = node("d", "aten.cat", "b", "c")
    before, after = graph(*adds, last), graph(*adds[1:], node("e", "aten.add", "x", module="layers.0"), last)
    names = names_of(before)
    kept = names_of(after, (before, names))
    assert {name: kept.nodes[name] for name in "bcd"} == {"b": "%0.add_1", "c": "%0.add_2", "d": "%cat"}
    assert kept.nodes["e"] == "%0.add"  # free again
    assert names_of(after).nodes["b"] == "%0.add"  # without the earlier state the count begins anew
    other = graph(node("a", "aten.mul", "x", module="layers.0"))  # another node under a name that was used
    assert names_of(other, (before, names)).nodes["a"] == "%0.mul"


def test_shared_names_of_weights_are_kept_too() -> None:
    before = graph(node("a", "aten.neg", "x"), weights=("layers.0.a.w", "other.0.a.w"))
    after = graph(node("a", "aten.neg", "x"), weights=("layers.0.a.w",))
    assert names_of(after).values["layers.0.a.w"] == "@a.w".replace("@", "@0.")
    assert names_of(after, (before, names_of(before))).values["layers.0.a.w"] == "@layers.0.a.w"


def test_two_captures_of_one_model_are_the_same_text() -> None:
    def text() -> list[str]:
        torch.manual_seed(0)
        return canonical_text(view_program(capture(NanoDecoder(width=32, heads=2).eval())))

    first = text()
    assert first == text() and len(set(first)) == len(first)
    assert "input %input_ids : i64[B,T]" in first
    assert sum(" = aten.linear(" in line for line in first) == 9


class OneNorm(FuseNorm):
    """Fuses the norm of one module."""

    def match(self, node: fx.Node, program: Program):
        found = super().match(node, program)
        here = module_path(node) == "model.layers.0.input_layernorm"
        return found if here and not isinstance(found, NoMatch) else None


def test_one_fused_node_changes_only_lines_about_it() -> None:
    program = Canonicalize().run(captured("llama")).program
    result = OneNorm().run(program)
    assert len(result.hits) == 1
    before, after = view_program(program), view_program(result.program)
    names = names_of(before)
    gone, came = changed(canonical_text(before, names), canonical_text(after, names_of(after, (before, names))))
    norm = [n for n in before.nodes if n.module == "model.layers.0.input_layernorm"]
    readers = [n for n in before.nodes if norm[-1].name in n.inputs]
    assert len(readers) == 3 and len(norm) >= 5  # Q, K, V; square, mean, add, rsqrt and two products
    assert len(gone) == len(norm) + len(readers) and len(came) == 1 + len(readers)
    assert all("input_layernorm" in line for line in (*gone, *came))
    assert not [line for line in (*gone, *came) if "layers.1" in line]
    # Without the names of before, what is numbered anew stays inside the module.
    gone, came = changed(canonical_text(before), canonical_text(after))
    assert all("0.input_layernorm" in line for line in (*gone, *came))


def test_a_hostile_module_stays_on_its_line() -> None:
    lines = canonical_text(view_program(program_of(Hostile(), torch.randn(2, 3, 5))))
    assert len(lines) == 6 and all(line.isprintable() for line in lines)
    assert sum(MARKUP in line for line in lines) == 5  # two weights, the product, its reader, and the output
    assert sum("evil\\n" in line for line in lines) == 2


def test_a_thousand_equal_nodes_cost_a_thousand_steps() -> None:
    many = [node(f"n{i}", "aten.neg", "x") for i in range(20_011)]
    names = names_of(graph(*many))
    assert names.nodes["n20010"] == "%neg_20010" and len(set(names.nodes.values())) == 20_011


def test_types_that_are_no_tensors() -> None:
    view = GraphView((ValueView("n", ValueType("int")),), (), (), ("n",))
    assert canonical_text(view) == ["input %n : int", "output %n"]
