"""Activations without their small channels, for claiming: what the function is, and what its threshold."""

from __future__ import annotations

import math

from onnx import FunctionProto, NodeProto, TensorProto, numpy_helper

from ryzen_compile.backends.onnxruntime.model_index import ModelIndex
from ryzen_compile.backends.onnxruntime.node_facts import OPSET
from ryzen_compile.backends.onnxruntime.sparsity import sparsify_body
from ryzen_compile.backends.onnxruntime.structure import Structure


def drops_channels(function: FunctionProto) -> bool:
    """Whether a function computes, node by node, what the lowering writes for ``ryzen::sparsify``."""
    versions = [opset.version for opset in function.opset_import if opset.domain in ("", "ai.onnx")]
    if versions != [OPSET] or len(function.input) != 2:
        return False
    return Structure(function).is_body(sparsify_body)


def threshold_of(node: NodeProto, index: ModelIndex) -> float | str:
    """The threshold of a call of such a function; or why it cannot be told."""
    if len(node.input) != 2 or not all(node.input) or len(node.output) != 1:
        return "an input or output that is not known"
    x, name = node.input
    if index.element(x) not in (0, TensorProto.FLOAT):
        return f"it reads a value of type {index.element(x)}"
    tensor = index.constants.get(name)
    if tensor is None or tensor.data_type != TensorProto.FLOAT or list(tensor.dims):
        return "its threshold is no constant number"
    if tensor.data_location == TensorProto.EXTERNAL:  # weights stay where they are, even this small
        return "its threshold lies in another file"
    threshold = float(numpy_helper.to_array(tensor))
    if not 0 <= threshold < math.inf:
        return f"its threshold is {threshold}"
    return threshold
