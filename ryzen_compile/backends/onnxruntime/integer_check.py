"""What a model says of its integer weights against the tensors it has: the operators trust those numbers.

``MatMulNBits`` and ``GatherBlockQuantized`` take width, bits and block from attributes and find codes, scales and zero
points by arithmetic; a model whose tensors are smaller than its attributes promise would be read past their ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import onnx
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

from ryzen_compile.errors import TamperedError
from ryzen_compile.manifest import shown

BITS = (2, 4, 8)
BLOCKS = (16, 32, 64, 128, 256)
Dims = tuple[int, ...]


def check_integer_weights(model: ModelProto) -> None:
    """Raises ``TamperedError``, by node, when codes, scales or zero points do not have the sizes that attributes say.

    Only the main graph may hold such nodes, and their weights have to be initializers.
    """
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.domain == "com.microsoft" and node.op_type == "MatMulNBits":
            _check_product(node, sizes)
        elif node.domain == "com.microsoft" and node.op_type == "GatherBlockQuantized":
            _check_lookup(node, sizes)
    for name, node in _hidden_nodes(model):
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            raise TamperedError(f"{name} holds {node.op_type}, which we never write")


def _hidden_nodes(model: ModelProto) -> Iterator[tuple[str, NodeProto]]:
    """Nodes of functions and of graphs inside other nodes, with a name for where they are."""
    pending: list[tuple[str, GraphProto | FunctionProto]] = [
        (f"function {shown(function.name)}", function) for function in model.functions
    ]
    pending += [(f"node {shown(node.name)}", graph) for node in model.graph.node for graph in _graphs(node)]
    while pending:
        where, graph = pending.pop()
        for node in graph.node:
            yield where, node
            pending += [(where, inner) for inner in _graphs(node)]


def _graphs(node: NodeProto) -> list[GraphProto]:
    return [graph for a in node.attribute for graph in (*([a.g] if a.HasField("g") else []), *a.graphs)]


def _check_product(node: NodeProto, sizes: Mapping[str, Dims]) -> None:
    attributes = _attributes(node, "K", "N", "bits", "block_size")
    width, rows, bits, block = (attributes[key] for key in ("K", "N", "bits", "block_size"))
    blocks = -(-width // block)
    zeros = rows * -(-blocks * bits // 8)
    wanted = {1: rows * blocks * (block * bits // 8), 2: rows * blocks, 3: zeros}
    _check_inputs(node, wanted, sizes)
    if len(node.input) > 4 and node.input[4]:
        raise TamperedError(f"node {shown(node.name)} permutes its groups, which we never write")
    bias = node.input[5] if len(node.input) > 5 else ""
    if bias and prod(sizes.get(bias, (0,))) != rows:
        raise TamperedError(f"node {shown(node.name)}: its bias {shown(bias)} is no stored vector of {rows}")


def _check_lookup(node: NodeProto, sizes: Mapping[str, Dims]) -> None:
    attributes = _attributes(node, "bits", "block_size")
    bits, block = attributes["bits"], attributes["block_size"]
    table = sizes.get(node.input[0], ())
    if len(table) != 2:
        raise TamperedError(f"node {shown(node.name)}: its table has the shape {table}, expected rows and bytes")
    rows, row_bytes = table
    blocks = -(-row_bytes * 8 // (block * bits))
    _check_inputs(node, {2: rows * blocks, 3: rows * -(-blocks * bits // 8)}, sizes)


def _check_inputs(node: NodeProto, wanted: Mapping[int, int], sizes: Mapping[str, Dims]) -> None:
    """``wanted`` elements by input; only the last one, the zero points, may be left out."""
    for index, count in wanted.items():
        name = node.input[index] if index < len(node.input) else ""
        if not name and index == max(wanted):
            continue
        if name not in sizes:
            raise TamperedError(f"node {shown(node.name)}: input {index}, {shown(name)}, is no stored weight")
        if prod(sizes[name]) != count:
            raise TamperedError(
                f"node {shown(node.name)}: {shown(name)} has {prod(sizes[name])} elements, its attributes need {count}"
            )


def _attributes(node: NodeProto, *names: str) -> dict[str, int]:
    given: dict[str, Any] = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    limits = {"bits": BITS, "block_size": BLOCKS}
    for name in names:
        value = given.get(name)
        if not isinstance(value, int) or not 0 < value < 1 << 31 or value not in limits.get(name, (value,)):
            raise TamperedError(f"node {shown(node.name)}: {name} is {shown(value)}, which we never write")
    return {name: given[name] for name in names}
