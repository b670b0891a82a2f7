"""The view of a Program: every call with its tensors, its other arguments and its sizes, and nothing of torch.fx."""

from __future__ import annotations

import operator
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from ryzen_compile.capture import capture
from ryzen_compile.config import Recipe
from ryzen_compile.graphs.program_view import view_program
from ryzen_compile.graphs.view import GraphView, NodeView
from ryzen_compile.pipeline import default_passes, run_passes
from ryzen_compile.program import Program
from tests.model_directory import case_named
from tests.passes.graphs import captured, program_of
from tests.zoo import CONTEXT, VOCAB, WINDOW, NanoDecoder, build


@pytest.fixture(scope="module")
def nano() -> Program:
    torch.manual_seed(0)
    return capture(NanoDecoder(width=32, heads=2).eval())


@pytest.fixture(scope="module")
def cached(nano: Program) -> Program:
    return run_passes(nano, default_passes(Recipe()))[0]


class Pieces(nn.Module):
    """A tuple, a list of tensors, sizes in a call, an operand that is a number and a slice without an end."""

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = x.split([3, 5, 3], dim=-1)
        joined = torch.cat([third, first], -1)
        flat = joined.reshape(x.shape[0] * x.shape[1], 6)
        return ((flat + 2.5) * second.sum())[:, 2:]


def node(view: GraphView, op: str) -> NodeView:
    (found,) = [node for node in view.nodes if node.op == op]
    return found


def test_tuples_sizes_and_numbers() -> None:
    view = view_program(program_of(Pieces(), torch.randn(2, 7, 11)))
    assert [value.name for value in view.inputs] == ["x"]
    assert str(view.inputs[0].type) == "f32[n1,n2,11]"  # no size that decoders share: named in order
    split = node(view, "aten.split_with_sizes")
    assert split.outputs == tuple(f"{split.name}.{i}" for i in range(3))
    assert split.attributes == (("split_sizes", "[3,5,3]"), ("dim", "-1"))
    assert split.shape == "f32[n1,n2,3], f32[n1,n2,5], f32[n1,n2,3]"
    cat = node(view, "aten.cat")
    assert cat.inputs == (split.outputs[2], split.outputs[0]) and cat.parameters == ("tensors.0", "tensors.1")
    view_or_reshape = next(n for n in view.nodes if n.op in ("aten.view", "aten.reshape"))
    assert view_or_reshape.attributes[0][1] == "[n1*n2,6]" and view_or_reshape.shape == "f32[n1*n2,6]"
    add = node(view, "aten.add")
    assert add.inputs == view_or_reshape.outputs and add.attributes == (("other", "2.5"),)  # alpha=1 is the default
    assert node(view, "aten.sum").inputs == (split.outputs[1],)
    assert dict(view.nodes[-1].attributes) == {"dim": "1", "start": "2", "end": "max"}
    assert [n.op for n in view.nodes[6:]] == ["aten.slice"] * 2 and view.outputs == view.nodes[-1].outputs


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(nn.functional.layer_norm(x, (5,)), (5,), None, self.bias, 1e-6)


def test_tensors_that_are_left_out_keep_the_place_of_those_behind_them() -> None:
    view = view_program(program_of(Norms(), torch.randn(2, 3, 5)))
    bare, biased = view.nodes
    rest = ("cudnn_enable", "false")  # torch's choice, and not the default
    assert bare.inputs == ("x",) and bare.attributes == (("normalized_shape", "[5]"), rest)
    assert biased.inputs == (*bare.outputs, "", view.weights[0].name)
    assert biased.parameters == ("input", "weight", "bias")
    assert biased.attributes == (("normalized_shape", "[5]"), ("eps", "1e-06"), rest)
    assert view.weights[0].label == "bias" and str(view.weights[0].type) == "f32[5]"


@pytest.mark.parametrize("name", ["nano", "cached"])
def test_a_view_is_complete(name: str, request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(name)
    view = view_program(program)
    assert Counter(n.op for n in view.nodes) == Counter(program.ops())
    known = {value.name for value in (*view.inputs, *view.weights)}
    for n in view.nodes:
        assert {value for value in n.inputs if value} <= known, n
        known |= set(n.outputs)
        assert len(n.outputs) == len(n.types) and len(n.inputs) == len(n.parameters)
    assert set(view.outputs) <= known and len(view.outputs) == len(program.outputs)
    assert [value.name for value in view.inputs] == [n.name for n in program.inputs]
    assert {w.name: w.label for w in view.weights} == program.weight_names
    # What is read is read in the view: each edge of the graph between operators, through tuples.
    edges = {(n.name, name.split(".")[0]) for n in view.nodes for name in n.inputs if name}
    for n in program.graph.nodes:
        for source in n.all_input_nodes if n.name in {v.name for v in view.nodes} else ():
            maker = source.args[0] if source.target is operator.getitem else source
            if isinstance(maker.meta["val"], (Tensor, tuple, list)):
                assert (n.name, maker.name) in edges


def test_sizes_that_decoders_share_have_their_letters(nano: Program, cached: Program) -> None:
    view = view_program(nano)
    assert [str(value.type) for value in view.inputs] == ["i64[B,T]", "i64[B,T]"]
    assert view.nodes[-1].shape == f"f32[B,T,{VOCAB}]"
    types = {value.name: str(value.type) for value in view_program(cached).inputs}
    assert types["input_ids"] == "i64[B,T]" and types["attention_mask"] == "i64[B,total]"
    assert types["past_key_values_1_value"] == "f32[B,2,S,16]"
    attention = next(n for n in view_program(cached).nodes if n.op == "ryzen.cached_attention")
    assert attention.shape == "f32[B,T,32], f32[B,2,S,16], f32[B,2,S,16]"
    text = repr(view_program(cached))
    assert not [symbol for symbol in ("'s77'", "getitem", "sym_size") if symbol in text]


def test_windows_of_layers_are_sizes_of_their_own() -> None:
    model = build(case_named("mistral", sliding_window=WINDOW))
    assert 2 * WINDOW <= CONTEXT  # or the caches would not be bounded
    program, _ = run_passes(capture(model), default_passes(Recipe()))
    rows = [str(value.type) for value in view_program(program).inputs if value.name.startswith("past_key_values")]
    assert rows == ["f32[B,2,S,16]"] * 2 + ["f32[B,2,S1,16]"] * 2


def test_modules_are_those_of_the_user_s_model() -> None:
    view = view_program(captured("llama"))
    modules = {n.module for n in view.nodes}
    assert {"model.layers.1.self_attn.q_proj", "model.layers.0.mlp.act_fn", "lm_head"} <= modules
    assert {w.label for w in view.weights} >= {"model.layers.1.self_attn.q_proj.weight", "model.norm.weight"}


def test_values_do_not_appear() -> None:
    model = Norms()
    model.bias.data.fill_(1234567.0)
    assert "1234567" not in repr(view_program(program_of(model, torch.randn(2, 3, 5))))


MARKUP = "<b onload=alert(1)>"
HOSTILE = f"evil\n{MARKUP}\u202e"


class Hostile(nn.Module):
    """A module without weights has the worst name: torch.export cannot write code for weights of such names."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(MARKUP, nn.Linear(5, 5))
        self.add_module(HOSTILE, nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(HOSTILE)(self.get_submodule(MARKUP)(x))


def test_a_hostile_name_is_escaped() -> None:
    view = view_program(program_of(Hostile(), torch.randn(2, 3, 5)))
    assert {w.label for w in view.weights} == {f"{MARKUP}.weight", f"{MARKUP}.bias"}
    assert node(view, "aten.linear").module == MARKUP
    assert node(view, "aten.tanh").module == f"evil\\n{MARKUP}\\u202e"
    assert repr(view).isprintable()
