"""Claiming: which standard nodes become native ones, what is fused into them, and why the others stay."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ryzen_compile.backends.onnxruntime import native
from ryzen_compile.backends.onnxruntime.claim import claim
from ryzen_compile.backends.onnxruntime.claim_report import KINDS, OPERATORS
from ryzen_compile.backends.onnxruntime.node_facts import gated_activation
from ryzen_compile.ops.activation import ACTIVATIONS

CONTRIB = "com.microsoft"
WIDTH, INNER, BLOCK = 64, 96, 32
ROWS = ("batch", "sequence")
HERE = KINDS - {"embedding", "sparse"}  # which have tests of their own


class Builder:
    """A graph under construction; every method adds one node and returns its first output."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.inputs: dict[str, tuple[int, Sequence[int | str]]] = {"x": (TensorProto.FLOAT, (*ROWS, WIDTH))}
        self.infos: dict[str, Sequence[int | str]] = {}
        self.functions: list[onnx.FunctionProto] = []

    def node(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **facts: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, outputs, f"/{outputs[0]}", domain=domain, **facts))
        return outputs[0]

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = value
        return name

    def product(
        self, x: str, y: str, k: int, n: int, bits: int = 4, block: int = BLOCK, level: int = 4, zeros: bool = False
    ) -> str:
        blocks = -(-k // block)
        codes = self.random.integers(0, 256, (n, blocks, block * bits // 8), dtype=np.uint8)
        inputs = [x, self.constant(f"{y}.codes", codes)]
        inputs += [self.constant(f"{y}.scales", self.random.normal(0, 0.02, (n, blocks)).astype(np.float32))]
        if zeros:
            points = self.random.integers(0, 256, (n, -(-blocks * bits // 8)), dtype=np.uint8)
            inputs += [self.constant(f"{y}.zeros", points)]
        facts = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": level}
        self.infos[y] = (*ROWS, n)
        return self.node("MatMulNBits", inputs, [y], CONTRIB, **facts)

    def vector(self, name: str, size: int = WIDTH) -> str:
        return self.constant(name, self.random.normal(1, 0.1, size).astype(np.float32))

    def norm(self, x: str, y: str) -> str:
        self.infos[y] = (*ROWS, WIDTH)
        return self.node("SimplifiedLayerNormalization", [x, self.vector(f"{y}.weight")], [y], axis=-1, epsilon=1e-5)

    def skip_norm(self, x: str, skip: str, y: str, total: str = "") -> str:
        self.infos[y] = self.infos[total] = (*ROWS, WIDTH)
        outputs = [y, "", "", total] if total else [y]
        inputs = [x, skip, self.vector(f"{y}.weight")]
        return self.node("SkipSimplifiedLayerNormalization", inputs, outputs, CONTRIB, epsilon=1e-5)

    def gated(self, x: str, y: str, name: str = "GatedAct", act: Sequence[NodeProto] | None = None) -> str:
        """A call of a local function that computes silu(first half) * second half, or what ``act`` makes of it."""
        split = helper.make_node("Split", ["whole"], ["first", "second"], axis=-1, num_outputs=2)
        silu = helper.make_node("QuickGelu", ["first"], ["a"], domain=CONTRIB, alpha=1.0)
        body = [split, *([silu] if act is None else act)]
        if body[-1].output[0] != "out":
            body.append(helper.make_node("Mul", [body[-1].output[0], "second"], ["out"]))
        versions = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
        self.functions = [helper.make_function("ryzen", name, ["whole"], ["out"], body, versions)]
        return self.node(name, [x], [y], "ryzen")

    def attention(self, qkv: str, y: str, **facts: Any) -> str:
        for name in ("past.key", "past.value"):
            self.inputs[name] = (TensorProto.FLOAT, ("batch", 2, "capacity", 16))
        self.inputs["last"], self.inputs["total"] = (TensorProto.INT32, ("batch",)), (TensorProto.INT32, ())
        inputs = [qkv, "", "", "past.key", "past.value", "last", "total"]
        facts = {"num_heads": 2, "kv_num_heads": 2, **facts}
        return self.node("GroupQueryAttention", inputs, [y, "present.key", "present.value"], CONTRIB, **facts)

    def model(self, *outputs: str) -> ModelProto:
        infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in self.infos.items() if n]
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in self.inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
            value_info=[info for info in infos if info.name not in outputs],
        )
        versions = {"": 21, CONTRIB: 1} | ({"ryzen": 1} if self.functions else {})
        opsets = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
        return helper.make_model(graph, functions=self.functions, opset_imports=opsets, ir_version=10)


def layer() -> Builder:
    """A decoder layer behind its embedding: norm, attention, residual norm, gated product, product, residual norm."""
    b = Builder()
    b.attention(b.product(b.norm("x", "n1"), "qkv", WIDTH, 96), "heads")
    b.product("heads", "o", 32, WIDTH)
    b.product(b.skip_norm("x", "o", "n2", "h"), "gate_up", WIDTH, 2 * INNER)
    b.product(b.gated("gate_up", "act"), "down", INNER, WIDTH)
    b.skip_norm("h", "down", "y")
    return b


def nodes(model: ModelProto) -> list[str]:
    return [f"{node.domain}::{node.op_type}" for node in model.graph.node]


def facts(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def made(model: ModelProto, **options: Any) -> NodeProto:
    """The one native node of the claimed ``model``."""
    (node,) = [n for n in claim(model, **options)[0].graph.node if n.domain == "ryzen"]
    return node


# --- what is claimed


def test_a_layer_is_claimed_whole_and_what_can_be_is_fused() -> None:
    given = layer().model("y", "present.key", "present.value")
    before = given.SerializeToString()
    model, report = claim(given)
    assert given.SerializeToString() == before
    assert nodes(model) == [
        "ryzen::SkipRMSNorm",
        "ryzen::MatMulNBits",
        "ryzen::GroupQueryAttention",
        "ryzen::MatMulNBits",
        "ryzen::SkipRMSNorm",
        "ryzen::MatMulNBits",
        "ryzen::MatMulNBits",
        "ryzen::SkipRMSNorm",
    ]
    assert report.claimed == {"MatMulNBits": 4, "GroupQueryAttention": 1, "SkipRMSNorm": 3}
    assert report.fused == {"gated activation": 1, "rounding": 2} and report.left == ()
    assert report.kinds == report.whole == HERE and report.rows_alike
    assert model.graph.initializer == given.graph.initializer and model.graph.input == given.graph.input
    assert [value.name for value in model.graph.output] == ["y", "present.key", "present.value"]
    first, qkv, _, o, second, gate_up, down, last = model.graph.node
    assert list(first.output) == ["", "", "n1/codes", "n1/steps"] and facts(first)["block_size"] == BLOCK
    assert (qkv.input[0], qkv.input[7]) == ("n1/codes", "n1/steps")
    assert list(second.output) == ["", "h", "n2/codes", "n2/steps"]
    assert facts(gate_up)["gated"] == 1 and facts(gate_up)["activation"] == b"silu" and gate_up.output[0] == "act"
    assert len(o.input) == len(down.input) == 3 and list(last.output) == ["y"] and "block_size" not in facts(last)
    assert "gate_up" not in {value.name for value in model.graph.value_info}
    assert next(opset.version for opset in model.opset_import if opset.domain == "ryzen") == 1
    assert "isa" not in facts(o) and facts(claim(given, isa="scalar")[0].graph.node[3])["isa"] == b"scalar"


def test_the_report_is_told_in_lines_and_as_json() -> None:
    b = layer()
    b.product("y", "logits", WIDTH, 40, level=0)
    _, report = claim(b.model("logits"), kinds=KINDS - {"norm"})
    why = "accuracy_level 0 keeps its activations in float32"
    assert report.to_text().splitlines() == [
        "4 MatMulNBits, 1 GroupQueryAttention, 1 gated activation fused",
        "3 left (/n1 ...): switched off",
        f"1 left (/logits): {why}",
    ]
    assert report.to_json()["left"][-1] == {"node": "/logits", "reason": why}
    assert report.whole == {"attention"} and report.kinds == {"matmul", "attention"} and not report.rows_alike
    nothing = claim(Builder().model("x"))[1]
    assert nothing.to_text() == "none" and nothing.whole == frozenset() and nothing.rows_alike


def test_products_inside_functions_count_as_stock_ones() -> None:
    b = Builder()
    b.gated(
        b.product("x", "gate_up", WIDTH, 2 * INNER), "y", act=[helper.make_node("MatMul", ["first", "first"], ["a"])]
    )
    model, report = claim(b.model("y"))
    assert nodes(model) == ["ryzen::MatMulNBits", "ryzen::GatedAct"] and not report.rows_alike


@pytest.mark.parametrize("kind", sorted(HERE))
def test_each_kind_can_be_left_alone(kind: str) -> None:
    model, report = claim(layer().model("y"), kinds=KINDS - {kind})
    stock = [name for name in nodes(model) if not name.startswith("ryzen")]
    expected = {"matmul": 4 + 1, "attention": 1, "norm": 3}  # a gated activation is a call of the model's own
    assert len(stock) + nodes(model).count("ryzen::GatedAct") == expected[kind]
    assert {why for _, why in report.left} == {"switched off"} and kind not in report.kinds | report.whole
    assert ("rounding" in report.fused) == (kind == "attention")


def test_kinds_are_checked() -> None:
    with pytest.raises(
        ValueError, match=r"kinds of native operators are attention, embedding, matmul, norm, sparse, got \['gemm'\]"
    ):
        claim(layer().model("y"), kinds=frozenset({"gemm"}))


def test_norms_keep_their_biases_and_sums_in_their_places() -> None:
    b = Builder()
    b.node("LayerNormalization", ["x", b.vector("w"), b.vector("beta")], ["y1"], axis=-1)
    inputs = ["y1", "x", b.vector("w2"), b.vector("beta2"), b.vector("bias2")]
    b.infos["y1"] = (*ROWS, WIDTH)
    b.node("SkipLayerNormalization", inputs, ["y2", "", "", "sum"], CONTRIB)
    b.infos["sum"] = (*ROWS, WIDTH)
    b.node(
        "SkipSimplifiedLayerNormalization", ["y2", "sum", b.vector("w3"), b.vector("b3")], ["y3"], CONTRIB, epsilon=0.5
    )
    b.infos["y2"] = (*ROWS, WIDTH)
    model, report = claim(b.model("y3"))
    first, second, third = model.graph.node
    assert report.left == () and report.claimed == {"SkipLayerNorm": 2, "SkipRMSNorm": 1}
    assert list(first.input) == ["x", "", "w", "beta"] and facts(first)["epsilon"] == pytest.approx(1e-5)
    assert list(second.input) == inputs and list(second.output) == ["y2", "sum"]
    assert facts(second)["epsilon"] == pytest.approx(1e-12)  # the contrib operators' own default
    assert list(third.input) == ["y2", "sum", "w3", "b3"] and facts(third)["epsilon"] == 0.5


# --- near-misses


def changed(**attributes: Any) -> Callable[[NodeProto, Builder], None]:
    def change(node: NodeProto, b: Builder) -> None:
        kept = [attribute for attribute in node.attribute if attribute.name not in attributes]
        del node.attribute[:]
        node.attribute.extend([*kept, *(helper.make_attribute(n, v) for n, v in attributes.items() if v is not None)])

    return change


def reading(place: int, array: np.ndarray | str) -> Callable[[NodeProto, Builder], None]:
    """Input ``place`` becomes another constant, or another value."""

    def change(node: NodeProto, b: Builder) -> None:
        node.input.extend([""] * (place + 1 - len(node.input)))
        node.input[place] = array if isinstance(array, str) else b.constant("other", array)

    return change


def writing(place: int, name: str) -> Callable[[NodeProto, Builder], None]:
    def change(node: NodeProto, b: Builder) -> None:
        node.output.extend([""] * (place + 1 - len(node.output)))
        node.output[place] = name
        b.node("Identity", [name], [f"{name} read"])

    return change


def cache_of(kind: int) -> Callable[[NodeProto, Builder], None]:
    def change(node: NodeProto, b: Builder) -> None:
        b.inputs["past.key"] = (kind, b.inputs["past.key"][1])

    return change


def renamed(name: str) -> Callable[[NodeProto, Builder], None]:
    """An initializer that is an input of the graph as well: only a default."""

    def change(node: NodeProto, b: Builder) -> None:
        array = b.constants[name]
        b.inputs[name] = (helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

    return change


def of_rank(rank: int) -> Callable[[NodeProto, Builder], None]:
    def change(node: NodeProto, b: Builder) -> None:
        b.inputs["x"] = (TensorProto.FLOAT, (*["batch"] * (rank - 1), WIDTH))

    return change


def without_shapes(node: NodeProto, b: Builder) -> None:
    b.infos.clear()


HALF = np.ones((WIDTH, 1), np.float16)
UNDEFINED = onnx.AttributeProto(name="epsilon")


@pytest.mark.parametrize(
    ("index", "change", "reason"),
    [
        (1, changed(accuracy_level=0), "accuracy_level 0 keeps its activations in float32"),
        (1, changed(accuracy_level=None), "accuracy_level 0 keeps its activations in float32"),
        (1, changed(accuracy_level="4"), "accuracy_level b'4' keeps"),
        (1, changed(bits=3), "3 bits in blocks of 32"),
        (1, changed(block_size=16), "4 bits in blocks of 16"),
        (1, changed(weight_prepacked=1), "the attribute weight_prepacked is not known"),
        (1, changed(N=128), "its codes are not 4096 constants of type 2"),
        (1, reading(2, np.ones((96, 2), np.float16)), "its scales are not 192 constants of type 1"),
        (1, reading(2, "x"), "its scales are not 192 constants"),
        (1, reading(3, np.ones((96, 2), np.float32)), "its zero points are not 96 constants of type 2"),
        (1, reading(4, np.zeros(WIDTH, np.int32)), "an input that is not known"),
        (1, reading(5, np.zeros(95, np.float32)), "its bias are not 96 constants"),
        (1, reading(6, "x"), "an input that is not known"),
        (1, renamed("qkv.codes"), "its codes are not 3072 constants"),
        (2, changed(qk_output=1), "qk_output is 1"),
        (2, changed(smooth_softmax=1), "smooth_softmax is 1"),
        (2, changed(causal=0), "causal is 0"),
        (2, changed(sparsity=1), "the attribute sparsity is not known"),
        (2, reading(9, "positions"), "it reads position_ids"),
        (2, reading(10, "bias"), "it reads attention_bias"),
        (2, reading(16, "x"), "an input or output that is not known"),
        (2, reading(3, ""), "it has no cache"),
        (2, writing(3, "scores"), "an input or output that is not known"),
        (2, cache_of(TensorProto.FLOAT16), "its cache is of type 1, 10"),
        (0, changed(axis=1), "it is not over the last axis in float32"),
        (0, changed(stash_type=10), "it is not over the last axis in float32"),
        (0, changed(epsilon=2.0), "its epsilon is 2.0"),
        (0, changed(epsilon="small"), "its epsilon is b'small'"),
        (0, changed(scale=1.0), "the attribute scale is not known"),
        (0, reading(1, np.ones((1, WIDTH), np.float32)), "its weight and biases are not vectors of float32"),
        (0, reading(1, np.ones(WIDTH, np.float16)), "its weight and biases are not vectors of float32"),
        (0, reading(1, "x"), "its weight and biases are not vectors of float32"),
        (0, reading(1, np.ones(1, np.float32)), "it is over 1 channels of type 1"),  # may stand for all of them
        (0, of_rank(5), "it is over 5 dimensions"),
        (0, reading(2, "x"), "an input that is not known"),
        (0, writing(1, "deviation"), "its mean or deviation is an output"),
        (4, writing(1, "mean"), "its mean or deviation is an output"),
        (4, without_shapes, "what is added may be of another shape"),
        (4, reading(1, np.ones(WIDTH, np.float32)), "what is added may be of another shape"),
        (4, reading(3, np.ones(WIDTH + 1, np.float32)), "its weight and biases are not vectors of float32"),
    ],
)
def test_near_misses_stay_and_say_why(index: int, change: Callable[[NodeProto, Builder], None], reason: str) -> None:
    b = layer()
    node = b.nodes[index]
    change(node, b)
    given = b.model("y")
    model, report = claim(given)
    assert [why for name, why in report.left if name == node.name and reason in why], report.left
    assert node in list(model.graph.node)


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("SimplifiedLayerNormalization", [], []),
        helper.make_node("LayerNormalization", [], ["z"], axis=[1, 2]),
        helper.make_node("SkipLayerNormalization", ["x"], [], domain=CONTRIB, epsilon=[0.5]),
        helper.make_node("GroupQueryAttention", [], [], domain=CONTRIB, num_heads="many"),
        helper.make_node("MatMulNBits", ["x"], ["z"], domain=CONTRIB),
    ],
    ids=lambda node: str(node.op_type),
)
def test_nodes_that_no_exporter_writes_are_left_without_a_stumble(node: NodeProto) -> None:
    node.attribute.append(UNDEFINED)
    model = Builder().model("x")
    model.graph.node.append(node)
    assert len(claim(model)[1].left) == 1


# --- activations


BODIES = {
    "none": [],
    "silu": [helper.make_node("QuickGelu", ["first"], ["a"], domain=CONTRIB, alpha=1.0)],
    "quick_gelu": [helper.make_node("QuickGelu", ["first"], ["a"], domain=CONTRIB)],
    "gelu": [helper.make_node("Gelu", ["first"], ["a"], domain=CONTRIB)],
    "gelu_tanh": [helper.make_node("FastGelu", ["first"], ["a"], domain=CONTRIB)],
    "relu": [helper.make_node("Relu", ["first"], ["a"])],
    "relu2": [helper.make_node("Relu", ["first"], ["r"]), helper.make_node("Mul", ["r", "r"], ["a"])],
    "sigmoid": [helper.make_node("Sigmoid", ["first"], ["a"])],
    "tanh": [helper.make_node("Tanh", ["first"], ["a"])],
}


@pytest.mark.parametrize("act", BODIES)
def test_a_gated_activation_is_read_off_its_body(act: str) -> None:
    assert set(BODIES) == set(ACTIVATIONS)
    b = Builder()
    product = helper.make_node("Mul", ["second", "a" if BODIES[act] else "first"], ["out"])
    b.gated(b.product("x", "gate_up", WIDTH, 2 * INNER), "y", "Anything", [*BODIES[act], product])
    node = made(b.model("y"))
    assert facts(node)["gated"] == 1 and facts(node)["activation"] == act.encode() and list(node.output) == ["y"]


@pytest.mark.parametrize(
    "body",
    [
        [
            helper.make_node("QuickGelu", ["second"], ["a"], domain=CONTRIB),
            helper.make_node("Mul", ["a", "first"], ["out"]),
        ],
        [helper.make_node("QuickGelu", ["first"], ["a"], domain=CONTRIB, alpha=1.5)],
        [helper.make_node("QuickGelu", ["first"], ["a"], domain=CONTRIB, alpha=[1.0])],
        [helper.make_node("Relu", ["first"], ["a"]), helper.make_node("Add", ["a", "second"], ["out"])],
        [helper.make_node("Relu", ["first"], ["a"]), helper.make_node("Mul", ["a", "a"], ["out"])],
        [helper.make_node("Relu", ["first"], ["r"]), helper.make_node("Tanh", ["r"], ["a"])],
        [helper.make_node("BiasGelu", ["first", "second"], ["a"], domain=CONTRIB)],
        [helper.make_node("Gelu", ["first"], ["a"], approximate="erf")],
        [helper.make_node("Mul", ["first", "second"], ["out", "more"])],
    ],
    ids=["the other half", "alpha", "alphas", "sum", "one half", "two", "bias", "form", "outputs"],
)
def test_a_function_that_computes_something_else_is_called_as_before(body: list[NodeProto]) -> None:
    b = Builder()
    b.gated(b.product("x", "gate_up", WIDTH, 2 * INNER), "y", "GatedAct", body)
    model, report = claim(b.model("y"))
    assert nodes(model) == ["ryzen::MatMulNBits", "ryzen::GatedAct"] and report.fused == {}


@pytest.mark.parametrize("axis", [None, 1, 2])
def test_halves_of_another_axis_are_not_gates(axis: int | None) -> None:
    b = Builder()
    b.gated("x", "y")
    (function,) = b.functions
    assert gated_activation(function) == "silu"
    changed(axis=axis)(function.node[0], b)
    assert gated_activation(function) is None


def test_parts_of_told_sizes_are_not_gates() -> None:
    b = Builder()
    b.gated("x", "y")
    changed(num_outputs=None, split=[1, 2 * INNER - 1])(b.functions[0].node[0], b)
    assert gated_activation(b.functions[0]) is None


def test_a_function_in_the_domain_of_standard_operators_is_not_believed() -> None:
    """ONNX Runtime calls its own operator of that name, whatever the model defines."""
    b = Builder()
    b.gated(b.product("x", "gate_up", WIDTH, 2 * INNER), "y", "QuickGelu")
    b.functions[0].domain = b.nodes[-1].domain = CONTRIB
    assert claim(b.model("y"))[1].fused == {"activation": 1}


def test_an_odd_product_is_not_split_into_halves() -> None:
    b = Builder()
    b.gated(b.product("x", "gate_up", WIDTH, 97), "y")
    assert claim(b.model("y"))[1].fused == {}


@pytest.mark.parametrize(
    ("domain", "kind", "attributes", "act"),
    [
        (CONTRIB, "Gelu", {}, "gelu"),
        ("", "Gelu", {"approximate": "tanh"}, "gelu_tanh"),
        (CONTRIB, "QuickGelu", {"alpha": 1.0}, "silu"),
        (CONTRIB, "QuickGelu", {"alpha": 1.702}, "quick_gelu"),
        (CONTRIB, "FastGelu", {}, "gelu_tanh"),
        ("", "Relu", {}, "relu"),
        ("ai.onnx", "Tanh", {}, "tanh"),
        (CONTRIB, "QuickGelu", {"alpha": 2.0}, None),
        ("", "Softplus", {}, None),
    ],
)
def test_a_lone_activation_joins_its_product(
    domain: str, kind: str, attributes: dict[str, Any], act: str | None
) -> None:
    b = Builder()
    b.node(kind, [b.product("x", "inner", WIDTH, INNER)], ["y"], domain, **attributes)
    model, report = claim(b.model("y"))
    assert report.fused == ({} if act is None else {"activation": 1})
    assert facts(model.graph.node[0]).get("activation", b"").decode() == (act or "")
    assert [node.output[0] for node in model.graph.node] == (["y"] if act else ["inner", "y"])


def test_a_product_that_others_read_keeps_its_result() -> None:
    for outputs in (("y", "z"), ("y", "inner")):
        b = Builder()
        b.node("Relu", [b.product("x", "inner", WIDTH, INNER)], ["y"])
        if "z" in outputs:
            b.node("Identity", ["inner"], ["z"])
        assert claim(b.model(*outputs))[1].fused == {}


def test_readers_inside_other_nodes_are_seen() -> None:
    b = Builder()
    b.node("Relu", [b.product("x", "inner", WIDTH, INNER)], ["y"])
    branches = [
        helper.make_graph(
            [helper.make_node("Identity", ["inner"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        )
        for name in ("yes", "no")
    ]
    b.inputs["flag"] = (TensorProto.BOOL, ())
    b.node("If", ["flag"], ["z"], then_branch=branches[0], else_branch=branches[1])
    model, report = claim(b.model("y", "z"))
    assert report.fused == {} and nodes(model) == ["ryzen::MatMulNBits", "::Relu", "::If"]


# --- residuals


def test_a_residual_of_the_same_shape_joins_its_product() -> None:
    b = Builder()
    b.node("Add", ["x", b.product("x", "o", WIDTH, WIDTH)], ["y"])
    node = made(b.model("y"))
    assert node.input[6] == "x" and len(node.input) == 7 and list(node.output) == ["y"]


def test_of_two_products_that_are_added_one_takes_the_other() -> None:
    b = Builder()
    b.node("Add", [b.product("x", "a", WIDTH, WIDTH), b.product("x", "b", WIDTH, WIDTH)], ["y"])
    model, report = claim(b.model("y"))
    assert report.fused == {"residual": 1} and report.claimed == {"MatMulNBits": 2}
    second, first = model.graph.node  # what is added has to be there before
    assert list(second.output) == ["b"] and first.input[6] == "b" and list(first.output) == ["y"]


@pytest.mark.parametrize("shape", [(WIDTH,), (1, 1, WIDTH), ("batch", "other", WIDTH), ("batch", "sequence", 1), None])
def test_what_is_added_in_another_shape_stays_a_sum(shape: tuple[int | str, ...] | None) -> None:
    b = Builder()
    b.inputs["r"] = (TensorProto.FLOAT, shape)  # type: ignore[assignment]
    b.node("Add", [b.product("x", "o", WIDTH, WIDTH), "r"], ["y"])
    assert claim(b.model("y"))[1].fused == {}


def test_twice_a_product_is_no_residual() -> None:
    b = Builder()
    b.node("Add", [b.product("x", "o", WIDTH, WIDTH), "o"], ["y"])
    assert claim(b.model("y"))[1].fused == {}


# --- rounding in the norm


def test_all_products_behind_a_norm_read_its_integers() -> None:
    b = Builder()
    b.norm("x", "n")
    b.product("n", "a", WIDTH, 48)
    b.product("n", "b", WIDTH, 40, bits=8)
    model, report = claim(b.model("a", "b"))
    assert report.fused == {"rounding": 1}
    assert [node.input[0] for node in model.graph.node] == ["x", "n/codes", "n/codes"]


def test_a_name_that_is_taken_is_not_taken_twice() -> None:
    b = Builder()
    b.norm("x", "n")
    b.product("n", "n/codes", WIDTH, 48)
    b.constant("n/steps", np.ones(3, np.float32))  # read by nobody
    b.inputs["n/steps_"] = (TensorProto.FLOAT, (3,))
    assert list(claim(b.model("n/codes"))[0].graph.node[0].output) == ["", "", "n/codes_", "n/steps__"]


def other_block(b: Builder) -> str:
    return b.product("n", "z", WIDTH, 40, block=64)


def stock(b: Builder) -> str:
    return b.product("n", "z", WIDTH, 40, level=0)


def float_reader(b: Builder) -> str:
    return b.node("Identity", ["n"], ["z"])


def as_residual(b: Builder) -> str:
    return b.node("Add", [b.product("x", "c", WIDTH, WIDTH), "n"], ["z"])


def of_the_graph(b: Builder) -> str:
    return "n"


@pytest.mark.parametrize("other", [other_block, stock, float_reader, as_residual, of_the_graph])
def test_one_reader_of_another_kind_keeps_a_norm_in_floats(other: Callable[[Builder], str]) -> None:
    b = Builder()
    b.norm("x", "n")
    b.product("n", "a", WIDTH, 48)
    model, report = claim(b.model("a", other(b)))
    norm = next(node for node in model.graph.node if node.op_type == "SkipRMSNorm")
    assert "rounding" not in report.fused and list(norm.output) == ["n"] and "block_size" not in facts(norm)


def test_a_product_of_another_width_is_not_rounded_for() -> None:
    """The width of what is read is the norm's; a product that says otherwise is left to fail by itself."""
    b = Builder()
    b.norm("x", "n")
    b.product("n", "a", WIDTH + 32, 48)
    assert claim(b.model("a"))[1].fused == {}


# --- over the real library


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_claimed_layer_computes_what_the_stock_one_does(library: Any, rows: int) -> None:
    given = layer().model("y", "present.key", "present.value")
    x = np.random.default_rng(3).normal(size=(1, rows, WIDTH)).astype(np.float32)
    empty = np.zeros((1, 2, 0, 16), np.float32)
    feeds = {"x": x, "past.key": empty, "past.value": empty}
    feeds |= {"last": np.array([rows - 1], np.int32), "total": np.array(rows, np.int32)}
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    want, got = (
        onnxruntime.InferenceSession(m.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
            None, feeds
        )
        for m in (given, claim(given)[0])
    )
    for ours, theirs in zip(got, want, strict=True):
        # A last bit of a float now and then moves a rounding to 8 bits.
        np.testing.assert_allclose(ours, theirs, atol=0.02 * np.abs(theirs).max())
        assert np.mean((ours - theirs) ** 2) < 1e-5 * np.mean(theirs**2)


def test_every_operator_that_is_known_is_in_the_library(library: Any) -> None:
    content = library.read_bytes()
    assert all(name.encode() + b"\0" in content for name in OPERATORS)
    assert native.library() == library


def test_every_operator_that_is_registered_is_known_by_name(repository: Path) -> None:
    """A model that defines one of them itself is refused, so the list has to be whole."""
    source = (repository / "kernels" / "cpu" / "library.cpp").read_text(encoding="utf-8")
    assert {name.removesuffix("Of") for name in re.findall(r"custom_op<ryzen::(\w+)", source)} == OPERATORS
