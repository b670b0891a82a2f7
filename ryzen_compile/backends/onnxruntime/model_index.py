"""What is known of the values of a model's main graph: constants, types, shapes, and who reads them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto


class ModelIndex:
    """``nodes`` are those of the main graph; a place is an index into them."""

    def __init__(self, model: ModelProto) -> None:
        self.nodes: Sequence[NodeProto] = model.graph.node
        given = {value.name for value in model.graph.input}  # with one of these, an initializer is only a default
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name not in given}
        self.types = {
            value.name: value.type.tensor_type
            for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
            if value.type.HasField("tensor_type")
        }
        self.outside = {value.name for value in model.graph.output}  # read where we do not see it
        self.readers: dict[str, list[int]] = {}  # a node that reads a value twice is there twice
        for index, node in enumerate(self.nodes):
            for name in filter(None, node.input):
                self.readers.setdefault(name, []).append(index)
            for attribute in node.attribute:
                for graph in _graphs(attribute):
                    self.outside |= _mentioned(graph)
        self.taken = {name for node in self.nodes for name in (*node.input, *node.output)} | self.outside | given
        self.taken |= {tensor.name for tensor in model.graph.initializer}

    def shape(self, name: str) -> tuple[int | str, ...] | None:
        """The dimensions of a value, numbers or symbols; None when any of them is not told."""
        if name in self.constants:
            return tuple(self.constants[name].dims)
        if name not in self.types or not self.types[name].HasField("shape"):
            return None
        dims = tuple(dim.dim_param or dim.dim_value for dim in self.types[name].shape.dim)
        return None if 0 in dims else dims

    def element(self, name: str) -> int:
        """The number of a value's type, 0 when it is not told."""
        if name in self.constants:
            return int(self.constants[name].data_type)
        return int(self.types[name].elem_type) if name in self.types else 0

    def is_constant(self, name: str, element: int, count: int) -> bool:
        tensor = self.constants.get(name)
        return tensor is not None and tensor.data_type == element and prod(tensor.dims) == count

    def unread(self, name: str) -> bool:
        return not name or (name not in self.readers and name not in self.outside)

    def only_reader(self, name: str) -> int | None:
        """The place of the one node that reads ``name``; None when there are more, or readers that we do not see."""
        readers = set(self.readers.get(name, ()))
        return readers.pop() if len(readers) == 1 and name not in self.outside else None

    def fresh(self, name: str) -> str:
        """``name``, or one like it that no value of the model has."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


def names_read(node: NodeProto) -> set[str]:
    """Every name that a node reads, those that the graphs inside it mention among them."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in _graphs(attribute):
            names |= _mentioned(graph)
    return names


def _mentioned(graph: GraphProto) -> set[str]:
    """Every name that a node inside ``graph`` reads, or that it hands out."""
    found = {value.name for value in graph.output}
    for node in graph.node:
        found |= set(node.input)
        for attribute in node.attribute:
            for inner in _graphs(attribute):
                found |= _mentioned(inner)
    return found


def _graphs(attribute: AttributeProto) -> list[GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
