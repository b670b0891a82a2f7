"""Bytes of weights that one decoded token reads, off an ONNX graph. Needs ``onnx``; the external data is not read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx

# Read a row of, not all of.
LOOKUPS = frozenset({"Gather", "GatherBlockQuantized"})
BITS = {
    onnx.TensorProto.UINT4: 4, onnx.TensorProto.INT4: 4,
    onnx.TensorProto.UINT2: 2, onnx.TensorProto.INT2: 2,
}  # fmt: skip


def bytes_per_token(path: Path) -> int:
    """The initializers of at least 1 KiB that anything but a lookup reads."""
    model = onnx.load(path, load_external_data=False)
    readers: dict[str, set[str]] = {}
    sizes: dict[str, int] = {}
    for graph in _graphs(model.graph):
        for tensor in graph.initializer:
            sizes[tensor.name] = _nbytes(tensor)
        for node in graph.node:
            for name in node.input:
                readers.setdefault(name, set()).add(node.op_type)
    return sum(size for name, size in sizes.items() if size >= 1024 and readers.get(name, set()) - LOOKUPS)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _nbytes(tensor: onnx.TensorProto) -> int:
    bits = BITS.get(tensor.data_type)
    if bits is None:
        bits = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    return math.prod(tensor.dims) * bits // 8
