"""A graph as text: one line a node, so that two graphs can be compared line by line.

    %0.q_proj.linear = aten.linear(%0.input_norm.rms_norm, @0.q_proj.weight)  : f32[B,T,64]  # layers.0.attn.q_proj

A node is called after its module and its operator, not by a running number: with such, a pass that removes one node
would change every line after it. The name is made of the numbers in the module's path (layers, experts), the last part
of the path, and the operator; the second node of one name is ``_1``, the next ``_2``. So a change is seen where it
happened, and at the latest the nodes of the same operator in the same module are numbered anew. Between two states of
one graph (before and after a pass) not even these: ``names_of`` lets what is in both keep its name, and an untouched
node keeps its line. Names depend on the graph alone, not on memory, hashing or the time.

Weights are called ``@`` and the numbers and last two parts of their qualified name, or all of it where that is not
unique, and are introduced just before their first reader: a layer and what it reads stand together. Values of tensors
do not appear.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ryzen_compile.graphs.view import GraphView, NodeView, ValueView

LEFT_OUT = "-"  # an optional tensor that is not given


@dataclass(frozen=True)
class Names:
    """What nodes and values are called in the text, by their names in the view."""

    nodes: Mapping[str, str]
    values: Mapping[str, str]


class _Fresh:
    """Calling it with a stem returns a name that is not taken: the stem, or it with a number."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)
        self._serial: Counter[str] = Counter()  # where to go on, so that a thousand equal stems cost a thousand steps

    def __call__(self, stem: str) -> str:
        name = stem
        while name in self._taken:
            self._serial[stem] += 1
            name = f"{stem}_{self._serial[stem]}"
        self._taken.add(name)
        return name


def canonical_text(view: GraphView, names: Names | None = None) -> list[str]:
    """The lines of ``view``: inputs, nodes with the weights that they are the first to read, weights that nothing
    reads, outputs, bodies of functions. ``names`` are those of ``names_of`` unless given."""
    names = names or names_of(view)
    waiting = {weight.name: weight for weight in view.weights}
    lines = [f"input {names.values[value.name]} : {value.type}" for value in view.inputs]
    for node in view.nodes:
        first_read = [waiting.pop(name) for name in dict.fromkeys(node.inputs) if name in waiting]
        lines += [_weight_line(weight, names) for weight in first_read]
        lines.append(_node_line(node, names))
    lines += [f"{_weight_line(weight, names)}  (unread)" for weight in waiting.values()]
    lines += [f"output {_called(name, names)}" for name in view.outputs]
    for name, body in view.functions:
        lines.append(f"function {name}:")
        lines += [f"  {line}" for line in canonical_text(body)]
    return lines


def names_of(view: GraphView, earlier: tuple[GraphView, Names] | None = None) -> Names:
    """The names of ``view``. Nodes and weights that an ``earlier`` state of the graph has keep the names they had."""
    kept_nodes, kept_weights = ({}, {}) if earlier is None else _kept(view, *earlier)
    values = {value.name: f"%{value.name}" for value in view.inputs}
    fresh = _Fresh([*values.values(), *kept_nodes.values()])
    nodes = {n.name: kept_nodes.get(n.name) or fresh(f"%{_stem(n)}") for n in view.nodes}
    values |= _weight_names(view.weights, kept_weights)
    for node in view.nodes:
        called = nodes[node.name]
        several = len(node.outputs) > 1
        values |= {name: f"{called}.{i}" if several else called for i, name in enumerate(node.outputs) if name}
    return Names(nodes, values)


def _kept(view: GraphView, before: GraphView, names: Names) -> tuple[dict[str, str], dict[str, str]]:
    """Text names of the nodes, and of the weights, of ``view`` that ``before`` has."""
    nodes = {node.name: (node.op, node.module) for node in before.nodes}
    weights = {weight.name: weight.label for weight in before.weights}
    return (
        {n.name: names.nodes[n.name] for n in view.nodes if nodes.get(n.name) == (n.op, n.module)},
        {w.name: names.values[w.name] for w in view.weights if weights.get(w.name) == w.label},
    )


def _weight_names(weights: Iterable[ValueView], kept: Mapping[str, str]) -> dict[str, str]:
    """Short names where they are unique; equal labels, as tied weights may have, are numbered."""
    weights = list(weights)
    short = Counter(_place(weight.label, 2) for weight in weights)
    fresh = _Fresh(kept.values())
    found = dict(kept)
    for weight in weights:
        if weight.name not in found:
            brief = _place(weight.label, 2)
            found[weight.name] = fresh(f"@{brief if short[brief] == 1 else weight.label}")
    return found


def _stem(node: NodeView) -> str:
    op = re.split(r"\.|::", node.op)[-1]
    place = _place(node.module, 1)
    return f"{place}.{op}" if place else op


def _place(path: str, last: int) -> str:
    """The numbers in a dotted path, and its last parts: ``model.layers.0.mlp.gate`` becomes ``0.gate``."""
    parts = [part for part in re.split(r"[./]", path) if part]
    return ".".join([*(part for part in parts[:-last] if part.isdecimal()), *parts[-last:]])


def _called(name: str, names: Names) -> str:
    """A value as a reader of it is shown; one that nothing makes, which only a damaged file has, by its own name."""
    return names.values.get(name, f"?{name}") if name else LEFT_OUT


def _node_line(node: NodeView, names: Names) -> str:
    arguments = [*(_called(name, names) for name in node.inputs), *(f"{key}={value}" for key, value in node.attributes)]
    module = f"  # {node.module}" if node.module else ""
    return f"{names.nodes[node.name]} = {node.op}({', '.join(arguments)})  : {node.shape}{module}"


def _weight_line(weight: ValueView, names: Names) -> str:
    called = names.values[weight.name]
    full = "" if called == f"@{weight.label}" else f"  # {weight.label}"
    return f"weight {called} : {weight.type}{full}"
