"""Drawings: valid ONNX files that show every node, its arguments and where it came from, and hold no weights."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
from onnx import TensorProto

from ryzen_compile.backends.onnxruntime.drawing import drawing
from ryzen_compile.config import Recipe
from ryzen_compile.graphs.program_view import view_program
from ryzen_compile.graphs.view import GraphView, ValueType, ValueView
from ryzen_compile.pipeline import default_passes, run_passes
from ryzen_compile.program import Program
from tests.graphs.views import graph, node
from tests.passes.graphs import captured


@pytest.fixture(scope="module")
def program() -> Program:
    return run_passes(captured("llama"), default_passes(Recipe()))[0]


def test_every_node_of_a_program_is_drawn(program: Program) -> None:
    model = drawing(view_program(program), "last")
    onnx.checker.check_model(model)
    again = onnx.load_from_string(model.SerializeToString(deterministic=True))
    assert again == drawing(view_program(program), "last")
    assert Counter(f"{n.domain}.{n.op_type}" for n in again.graph.node) == Counter(program.ops())
    attention = next(n for n in again.graph.node if n.op_type == "cached_attention")
    assert attention.name == "%0.self_attn.cached_attention" and attention.domain == "ryzen"
    facts = {p.key: p.value for p in attention.metadata_props}
    assert facts.keys() == {"module", "input_names"} and facts["module"] == "model.layers.0.self_attn"
    parameters = facts["input_names"].strip("[]").split(", ")
    assert len(parameters) == len(attention.input) and parameters[0] == "'q'"
    settings = {a.name: a.s.decode() for a in attention.attribute}
    assert settings["heads"] == "4" and all(a.type == onnx.AttributeProto.STRING for a in attention.attribute)
    assert [v.name for v in again.graph.input][:2] == ["%input_ids", "%attention_mask"]
    assert again.opset_import[0].domain == "" and {o.domain for o in again.opset_import} == {"", "aten", "ryzen"}
    assert "cannot be run" in again.doc_string


def test_shapes_and_types_are_those_of_the_program(program: Program) -> None:
    model = drawing(view_program(program), "last")
    ids, logits = model.graph.input[0], model.graph.output[0]
    assert ids.type.tensor_type.elem_type == TensorProto.INT64
    assert [d.dim_param for d in ids.type.tensor_type.shape.dim] == ["B", "T"]
    assert [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim] == ["B", 1, 99]
    assert {v.name for v in model.graph.value_info} >= {"%0.self_attn.cached_attention.0"}


def test_weights_have_shapes_and_no_values(program: Program) -> None:
    view = view_program(program)
    model = drawing(view, "last")
    drawn = {s.values.name: tuple(s.dims) for s in model.graph.sparse_initializer}
    assert len(drawn) == len(view.weights) and not model.graph.initializer
    assert drawn["@embed_tokens.weight"] == (99, 64)
    assert not any(s.values.raw_data or s.values.float_data for s in model.graph.sparse_initializer)
    assert len(model.SerializeToString()) < 64 << 10  # of a model with 300 KB of weights


def test_what_a_sparse_tensor_cannot_be_is_an_input() -> None:
    odd = [ValueType("f32", ()), ValueType("f32", ("0", "3")), ValueType("complex64", ("3",)), ValueType("int")]
    names = [f"w{i}" for i in range(len(odd))]
    view = graph(node("a", "aten.cat", *names))
    weights = tuple(ValueView(n, kind, n) for n, kind in zip(names, odd, strict=True))
    model = drawing(GraphView(view.inputs, weights, view.nodes, view.outputs), "odd")
    assert [v.name for v in model.graph.input] == ["%x", "@w0", "@w1", "@w2", "@w3"]
    assert onnx.load_from_string(model.SerializeToString()) == model


def test_arguments_of_any_name() -> None:
    view = graph(node("a", "aten.add", "x", "", "x", domain="d", inputs="[1]", op_type="t", doc_string="s"))
    model = drawing(view, "names")
    onnx.checker.check_model(model)
    assert {a.name: a.s.decode() for a in model.graph.node[0].attribute} == dict(view.nodes[0].attributes)
    assert list(model.graph.node[0].input) == ["%x", "", "%x"]
