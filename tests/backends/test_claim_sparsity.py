"""Products behind dropped channels: which become such as skip weights, and why the others stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import FunctionProto, NodeProto, helper, numpy_helper

from ryzen_compile.backends.onnxruntime import native
from ryzen_compile.backends.onnxruntime.claim import claim
from ryzen_compile.backends.onnxruntime.claim_report import KINDS
from tests.backends.test_claim import BLOCK, INNER, WIDTH, Builder

THRESHOLD = 0.7


def drop_function(name: str = "Sparsify", body: list[NodeProto] | None = None, opset: int = 21) -> FunctionProto:
    zero = helper.make_node("Constant", [], ["zero"], value=numpy_helper.from_array(np.float32(0)))
    nodes = body or [
        helper.make_node("Abs", ["v"], ["size"]),
        helper.make_node("Less", ["size", "limit"], ["small"]),
        helper.make_node("Where", ["small", "zero", "v"], ["out"]),
    ]
    return helper.make_function(
        "ryzen", name, ["v", "limit"], ["out"], [zero, *nodes], [helper.make_opsetid("", opset)]
    )


def thinned(products: int = 1, function: FunctionProto | None = None, **facts: Any) -> Builder:
    """x without its small channels, read by ``products`` products."""
    b = Builder()
    b.functions.append(function or drop_function())
    b.node("Sparsify", ["x", b.constant("limit", np.array(THRESHOLD, np.float32))], ["kept"], "ryzen")
    for number in range(products):
        b.product("kept", f"y{number}", WIDTH, INNER, **facts)
    return b


def test_every_product_that_reads_what_is_left_skips_weights() -> None:
    model, report = claim(thinned(2).model("y0", "y1"))
    assert [node.op_type for node in model.graph.node] == ["SparseMatMulNBits"] * 2
    for node in model.graph.node:
        assert node.input[0] == "x"
        (threshold,) = (a.f for a in node.attribute if a.name == "threshold")
        assert threshold == np.float32(THRESHOLD)
    assert report.claimed == {"SparseMatMulNBits": 2}
    assert report.kinds == {"sparse"}
    assert report.whole == {"sparse", "matmul"}
    assert report.rows_alike


def test_what_follows_a_product_is_fused_into_it() -> None:
    b = thinned()
    (drop,) = b.functions
    b.gated("y0", "z")
    b.functions.append(drop)
    model, report = claim(b.model("z"))
    assert [node.op_type for node in model.graph.node] == ["SparseMatMulNBits"]
    assert report.fused == {"gated activation": 1}


@pytest.mark.parametrize("kinds", [KINDS - {"sparse"}, KINDS - {"sparse", "matmul"}, KINDS - {"matmul"}])
def test_each_kind_can_be_switched_off(kinds: frozenset[str]) -> None:
    model, report = claim(thinned().model("y0"), kinds=kinds)
    found = [(node.domain, node.op_type) for node in model.graph.node]
    if "sparse" in kinds:
        assert found == [("ryzen", "SparseMatMulNBits")]
        assert not report.left
    else:
        assert found == [("ryzen", "Sparsify"), ("ryzen" if "matmul" in kinds else "com.microsoft", "MatMulNBits")]
        assert ("/kept", "switched off") in report.left


def test_a_norm_keeps_floats_for_them() -> None:
    b = Builder()
    b.functions.append(drop_function())
    b.norm("x", "normed")
    b.node("Sparsify", ["normed", b.constant("limit", np.array(THRESHOLD, np.float32))], ["kept"], "ryzen")
    b.product("kept", "y", WIDTH, INNER)
    model, report = claim(b.model("y"))
    assert [node.op_type for node in model.graph.node] == ["SkipRMSNorm", "SparseMatMulNBits"]
    assert "rounding" not in report.fused


def _reader(b: Builder) -> None:
    b.node("Relu", ["kept"], ["y1"])


def _float_product(b: Builder) -> None:
    b.product("kept", "y1", WIDTH, INNER, level=0)


def _computed(b: Builder) -> None:
    del b.constants["limit"]
    b.node("Relu", ["x"], ["limit"])


def _vector(b: Builder) -> None:
    b.constants["limit"] = np.full(WIDTH, THRESHOLD, np.float32)


def _negative(b: Builder) -> None:
    b.constants["limit"] = np.array(-1, np.float32)


def _nan(b: Builder) -> None:
    b.constants["limit"] = np.array(np.nan, np.float32)


@pytest.mark.parametrize(
    ("change", "outputs", "reason"),
    [
        (_reader, ["y0", "y1"], "no product with integer weights"),
        (_float_product, ["y0", "y1"], "accuracy_level 0"),
        (lambda b: None, ["y0", "kept"], "where we do not see it"),
        (_computed, ["y0"], "no constant number"),
        (_vector, ["y0"], "no constant number"),
        (_negative, ["y0"], "threshold is -1"),
        (_nan, ["y0"], "threshold is nan"),
    ],
)
def test_near_misses_stay_and_say_why(change: Callable[[Builder], None], outputs: list[str], reason: str) -> None:
    b = thinned()
    change(b)
    b.infos["kept"] = ("batch", "sequence", WIDTH)
    b.infos["y1"] = ("batch", "sequence", INNER)
    model, report = claim(b.model(*outputs))
    assert any(reason in why for _, why in report.left), report.left
    assert "SparseMatMulNBits" not in [node.op_type for node in model.graph.node]
    assert "MatMulNBits" in report.claimed  # the product itself is ours all the same


SIZE = ("Abs", ["v"], "size")
OTHER_BODIES = {
    "keeps the small": [SIZE, ("Less", ["size", "limit"], "small"), ("Where", ["small", "v", "zero"], "out")],
    "drops equals": [SIZE, ("LessOrEqual", ["size", "limit"], "small"), ("Where", ["small", "zero", "v"], "out")],
    "by sign": [("Less", ["v", "limit"], "small"), ("Where", ["small", "zero", "v"], "out")],
    "the other way": [SIZE, ("Less", ["limit", "size"], "small"), ("Where", ["small", "zero", "v"], "out")],
}


@pytest.mark.parametrize("name", OTHER_BODIES)
def test_a_function_of_that_name_that_computes_something_else_is_left(name: str) -> None:
    body = [helper.make_node(kind, inputs, [output]) for kind, inputs, output in OTHER_BODIES[name]]
    _, report = claim(thinned(function=drop_function(body=body)).model("y0"))
    assert "SparseMatMulNBits" not in report.claimed


def test_a_body_over_other_versions_of_the_operators_is_left() -> None:
    _, report = claim(thinned(function=drop_function(opset=20)).model("y0"))
    assert "SparseMatMulNBits" not in report.claimed


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_claimed_products_are_those_of_our_dense_ones_to_the_bit(library: Any, rows: int) -> None:
    """And those of ONNX Runtime's to 2 % of their deviation, which is what two roundings of activations are apart."""
    b = thinned(bits=4, block=BLOCK)
    model = b.model("y0")
    x = np.random.default_rng(1).standard_normal((1, rows, WIDTH)).astype(np.float32)
    found = []
    for kinds in (frozenset(), KINDS - {"sparse"}, KINDS):
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(native.required()))
        rewritten, _ = claim(model, kinds=kinds)
        session = onnxruntime.InferenceSession(
            rewritten.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        found.append(session.run(None, {"x": x})[0])
    stock, dense, sparse = found
    assert dense.tobytes() == sparse.tobytes()
    assert np.abs(sparse - stock).max() <= 0.02 * stock.std()


def test_the_lowerings_own_function_is_known() -> None:
    """The body that an artifact has is the one that is looked for; topk's is not."""
    import onnx_ir as ir

    from ryzen_compile.backends.onnxruntime.claim_sparsity import drops_channels
    from ryzen_compile.backends.onnxruntime.emit import Emitter
    from ryzen_compile.backends.onnxruntime.sparsity import sparsify, sparsify_topk

    e = Emitter()
    x = ir.Value(name="x")
    sparsify(e, x, threshold=0.5)
    sparsify(e, x, threshold=0.25)
    sparsify_topk(e, x, keep=3)
    functions = [ir.to_proto(function) for function in e.functions.values()]
    assert [drops_channels(function) for function in functions] == [True, False]
