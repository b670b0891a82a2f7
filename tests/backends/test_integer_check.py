"""Lies about integer weights: attributes and tensors that do not belong together are refused by node."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ryzen_compile.backends.onnxruntime.integer_check import check_integer_weights
from ryzen_compile.errors import TamperedError

K, N, BLOCK = 40, 6, 16  # three blocks, the last one padded


def honest(zeros: bool = True) -> ModelProto:
    shapes = {"codes": (N, 3, 8), "scales": (N, 3), "zeros": (N, 2), "table": (N, 24)}
    types = {"scales": np.float32}
    weights = [numpy_helper.from_array(np.ones(s, types.get(n, np.uint8)), n) for n, s in shapes.items()]
    names = ["codes", "scales"] + ["zeros"] * zeros
    product = helper.make_node(
        "MatMulNBits", ["x", *names], ["y"], "product", domain="com.microsoft", K=K, N=N, bits=4, block_size=BLOCK
    )
    lookup = helper.make_node(
        "GatherBlockQuantized", ["table", "ids", *names[1:]], ["z"], "lookup", domain="com.microsoft", bits=4,
        block_size=BLOCK, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, K]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, [None]),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "yz"]
    return helper.make_model(helper.make_graph([product, lookup], "g", inputs, outputs, weights))


@pytest.mark.parametrize("zeros", [True, False])
def test_an_honest_model_passes(zeros: bool) -> None:
    check_integer_weights(honest(zeros))


def change(node: int, name: str, value: int) -> Callable[[ModelProto], None]:
    def apply(model: ModelProto) -> None:
        next(a for a in model.graph.node[node].attribute if a.name == name).i = value

    return apply


def reshape(name: str, *dims: int) -> Callable[[ModelProto], None]:
    def apply(model: ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.ones(dims, numpy_helper.to_array(tensor).dtype), name))

    return apply


def drop_attribute(model: ModelProto) -> None:
    del model.graph.node[0].attribute[:]


def computed_codes(model: ModelProto) -> None:
    model.graph.node[0].input[1] = "x"


def hide_in_a_function(model: ModelProto) -> None:
    body = [helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft")]
    imports = [helper.make_opsetid("com.microsoft", 1)]
    model.functions.append(onnx.helper.make_function("ryzen", "Hidden", ["x", "codes", "scales"], ["y"], body, imports))


def hide_in_a_branch(model: ModelProto) -> None:
    body = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["b"], domain="com.microsoft")
    branch = helper.make_graph([body], "branch", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)])
    model.graph.node.append(helper.make_node("If", ["c"], ["w"], "choice", then_branch=branch, else_branch=branch))


def permute_groups(model: ModelProto) -> None:
    model.graph.node[0].input.extend([""] * (4 - len(model.graph.node[0].input)) + ["codes"])


def short_bias(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones(N - 1, np.float32), "bias"))
    model.graph.node[0].input.extend(["", "bias"])


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (change(0, "K", 10 * K), r"'product': 'codes' has 144 elements, its attributes need"),
        (change(0, "N", N + 1), r"'product': 'codes' has 144 elements, its attributes need 168"),
        (change(0, "bits", 3), r"'product': bits is '3', which we never write"),
        (change(0, "block_size", 17), r"'product': block_size is '17'"),
        (change(0, "block_size", 0), r"'product': block_size is '0'"),
        (change(0, "K", -1), r"'product': K is '-1'"),
        (change(1, "bits", 8), r"'lookup': 'scales' has 18 elements, its attributes need 12"),
        (reshape("codes", N, 3, 7), r"'product': 'codes' has 126 elements, its attributes need 144"),
        (reshape("scales", N, 2), r"'product': 'scales' has 12 elements, its attributes need 18"),
        (reshape("zeros", N, 1), r"'product': 'zeros' has 6 elements, its attributes need 12"),
        (reshape("table", N * 24), r"'lookup': its table has the shape \(144,\)"),
        (reshape("table", 2 * N, 24), r"'lookup': 'scales' has 18 elements, its attributes need 36"),
        (drop_attribute, r"'product': K is 'None'"),
        (computed_codes, r"'product': input 1, 'x', is no stored weight"),
        (hide_in_a_function, r"function 'Hidden' holds MatMulNBits"),
        (hide_in_a_branch, r"node 'choice' holds MatMulNBits"),
        (permute_groups, r"'product' permutes its groups"),
        (short_bias, r"'product': its bias 'bias' is no stored vector of 6"),
    ],
)
def test_lies_are_refused(lie: Callable[[ModelProto], None], message: str) -> None:
    model = honest()
    lie(model)
    with pytest.raises(TamperedError, match=message):
        check_integer_weights(model)
