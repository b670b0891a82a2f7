"""The functions that drop small channels, in ONNX Runtime, against the dialect's references: equal to the bit."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from ryzen_compile import ops
from ryzen_compile.backends.onnxruntime.emit import CONTRIB, LOCAL, Emitter
from ryzen_compile.backends.onnxruntime.node_facts import OPSET
from ryzen_compile.backends.onnxruntime.sparsity import sparsify, sparsify_topk


def run(x: np.ndarray, **facts: float) -> np.ndarray:
    """``sparsify`` with a ``threshold``, ``sparsify_topk`` with ``keep``, as the lowering writes them."""
    e = Emitter()
    value = ir.Value(name="x")
    (result,) = sparsify(e, value, **facts) if "threshold" in facts else sparsify_topk(e, value, **facts)
    for number, node in enumerate(e.nodes):
        for output in node.outputs:
            output.name = f"v{number}"
    graph = helper.make_graph(
        [ir.to_proto(node) for node in e.nodes],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info(result.name, TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in {"": OPSET, CONTRIB: 1, LOCAL: 1}.items()]
    functions = [ir.to_proto(function) for function in e.functions.values()]
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 31), (5, 64)])
def test_a_threshold(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x.flat[0] = 0.7  # stays: it reaches the threshold in float32
    for threshold in (0.0, float(np.float32(0.7)), 9.0):
        assert run(x, threshold=threshold).tobytes() == ops.sparsify(torch.from_numpy(x), threshold).numpy().tobytes()


def test_a_nan_stays() -> None:
    assert np.isnan(run(np.array([np.nan, 0.1], np.float32), threshold=0.5)).tolist() == [True, False]


@pytest.mark.parametrize("keep", [1, 2, 30, 31])
def test_the_largest_of_each_token(keep: int) -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, 31)).astype(np.float32)
    x[0, 0, :4] = [5, -5, 5, -5]  # alike: all of them stay
    assert run(x, keep=keep).tobytes() == ops.sparsify_topk(torch.from_numpy(x), keep).numpy().tobytes()
