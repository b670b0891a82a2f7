"""Leaving a model early: the first layers, then the final norm and the head.

What such a model predicts is a draft of what the whole one will say, and its keys and values are the whole one's own
for these layers. The cut is made in the checked graph, in memory, and knows no architecture: a residual addition that
every path from the tokens to the logits runs through (with the norm behind it, where the two are one node) is a place
where the model could be cut. The last one before the head is given what the one at the end of layer n is given, or the
head reads what that layer ends in where it has a norm of its own; what is then not read any more goes.

Leaving a model after some of its layers: Schuster et al., Confident Adaptive Language Modeling, 2022; drafting with
them: Zhang et al., Draft & Verify, 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from onnx import ModelProto, NodeProto

from ryzen_compile.backends.onnxruntime.model_index import ModelIndex, names_read
from ryzen_compile.backends.onnxruntime.node_facts import CONTRIB, operator_of
from ryzen_compile.errors import UnsupportedError
from ryzen_compile.spec import CacheSlot

ADD = ("", "Add")
# Residual norms, and which of their inputs is a bias of what is added.
BIAS_OF = {(CONTRIB, "SkipSimplifiedLayerNormalization"): 3, (CONTRIB, "SkipLayerNormalization"): 4}
TOTAL = 3  # a residual norm's output that is the sum
SIZES = frozenset((("", "Shape"), ("", "Size")))  # these read no values


@dataclass(frozen=True)
class Exits:
    """Where a model can be left: ``layers`` after which it can, none with the reason in ``why``."""

    layers: tuple[int, ...] = ()
    why: str = ""


def find_exits(model: ModelProto, slots: Sequence[CacheSlot]) -> Exits:
    """The numbers of layers, each at least 1 and fewer than all, after which the checked ``model`` can be left."""
    if any(slot.window for slot in slots):
        return Exits(why="a layer keeps a window of its past only, which cannot be taken back")
    if len(slots) < 2:
        return Exits(why="it has one layer")
    joins = _joins(ModelIndex(model), len(slots))
    if isinstance(joins, str):
        return Exits(why=joins)
    layers = tuple(n for n in range(1, len(slots)) if _fits(joins, n))
    return Exits(layers, "" if layers else "its layers do not end in residual additions as the last one does")


def cut(model: ModelProto, slots: Sequence[CacheSlot], layers: int) -> ModelProto:
    """The first ``layers`` of the checked ``model`` with its final norm and head, a copy; inputs and outputs of the
    other layers' caches go. Raises ``UnsupportedError`` where it cannot be cut there."""
    exits = find_exits(model, slots)
    if layers not in exits.layers:
        raise UnsupportedError(
            f"the model cannot be left after {layers} of its {len(slots)} layers",
            hint=exits.why or f"it can after {', '.join(map(str, exits.layers))}",
        )
    short = ModelProto()
    short.CopyFrom(model)
    joins = _joins(ModelIndex(short), len(slots))
    if isinstance(joins, str):  # excluded above; said for the type checker
        raise UnsupportedError(joins)
    _end_at(short, joins[layers - 1][-1], joins[-1][-1])
    _drop_unread(short, len(slots), layers)
    return short


@dataclass(frozen=True)
class _Join:
    """A residual addition on every path. ``goes_on`` says what is read of it, the sum or its norm alone; ``behind`` are
    the nodes that every path runs through next, before the next addition or layer."""

    node: NodeProto
    rank: int
    goes_on: str
    behind: list[NodeProto] = field(default_factory=list)

    @property
    def total(self) -> str:
        """The sum by name; empty for one that is not handed out."""
        place = 0 if operator_of(self.node) == ADD else TOTAL
        return self.node.output[place] if len(self.node.output) > place else ""


def _joins(index: ModelIndex, slots: int) -> list[list[_Join]] | str:
    """The residual additions that every path runs through, by the layer that they end or lie in; or what is missing."""
    attentions = []
    for slot in range(slots):
        halves = (f"past_key_values.{slot}.{half}" for half in ("key", "value"))
        readers = {place for name in halves for place in index.readers.get(name, ())}
        if not readers:
            return f"nothing reads the cache of slot {slot}"
        attentions.append(min(readers))
    if attentions != sorted(set(attentions)):
        return "its attentions do not follow each other in the order of their slots"
    joins: list[list[_Join]] = [[] for _ in range(slots)]
    for place in _on_every_path(index):
        layer = sum(attention < place for attention in attentions) - 1
        node = index.nodes[place]
        operator, inputs = operator_of(node), node.input[:2]
        if layer < 0:
            continue
        adds = (operator == ADD or operator in BIAS_OF) and not any(name in index.constants for name in inputs)
        if not adds or not all(map(index.unread, node.output[1:TOTAL])):
            for join in joins[layer][-1:]:
                join.behind.append(node)
            continue
        sums = len(node.output) > TOTAL and not index.unread(node.output[TOTAL])
        rank = len(index.shape(inputs[0]) or index.shape(inputs[1]) or ())
        joins[layer].append(_Join(node, rank, "sum" if operator == ADD or sums else "norm"))
    return joins if joins[-1] else "no residual addition lies on every path from its last layer to the head"


def _fits(joins: list[list[_Join]], layers: int) -> bool:
    """Whether the last join of layer ``layers`` stands where the model's last one does, and can take its place."""
    here, there = joins[layers - 1], joins[-1]
    if len(here) != len(there) or here[-1].rank != there[-1].rank:
        return False
    # What ends a layer behind its last addition, as a norm of its own, the last layer has to end in as well.
    ends, last = ([operator_of(node) for node in join.behind] for join in (here[-1], there[-1]))
    if ends:
        return last[: len(ends)] == ends
    # Behind a plain addition the head's own norm is to follow, which a layer that ends in a norm does not hand on to.
    return here[-1].goes_on == "sum" or operator_of(there[-1].node) != ADD


def _end_at(model: ModelProto, here: _Join, last: _Join) -> None:
    """Lets the head follow ``here`` instead of ``last``, in place."""
    if here.behind:
        _read_instead(model, last.behind[len(here.behind) - 1].output[0], here.behind[-1].output[0])
    elif here.goes_on == "norm":  # a layer's own norm ends it; no other follows
        _read_instead(model, last.node.output[0], here.node.output[0])
    elif operator_of(last.node) == ADD:
        _read_instead(model, last.node.output[0], here.total)
    else:
        place = BIAS_OF[operator_of(last.node)]
        norm = [*last.node.input[2:place], *[""] * (place - len(last.node.input))]
        bias = here.node.input[BIAS_OF[operator_of(here.node)] :] if operator_of(here.node) != ADD else []
        inputs = [*here.node.input[:2], *norm, *bias]
        del last.node.input[:]
        last.node.input.extend(inputs)


def _read_instead(model: ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new


def _drop_unread(model: ModelProto, slots: int, layers: int) -> None:
    """Removes the later layers' cache inputs and outputs, and whatever nothing reads then."""
    graph = model.graph
    gone = {
        f"{name}.{slot}.{half}"
        for name in ("past_key_values", "present")
        for slot in range(layers, slots)
        for half in ("key", "value")
    }
    outputs = [value for value in graph.output if value.name not in gone]
    needed = {value.name for value in outputs}
    nodes = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed |= names_read(node)
            nodes.append(node)
    alive = needed | {name for node in nodes for name in node.output}
    kept = {
        "node": nodes[::-1],
        "output": outputs,
        "input": [value for value in graph.input if value.name not in gone],
        "initializer": [tensor for tensor in graph.initializer if tensor.name in needed],
        "value_info": [value for value in graph.value_info if value.name in alive],
    }
    for name, values in kept.items():
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        graph.ClearField(name)
        getattr(graph, name).extend(copies)


def _on_every_path(index: ModelIndex) -> list[int]:
    """The places of the nodes that every path from ``input_ids`` to ``logits`` runs through, in order.

    Paths are of values: what only reads a value's size is not on one. Nodes are stored in an order in which each
    follows what it reads, so every path runs through a node exactly if none leads from before it to behind it.
    """
    made = {name: place for place, node in enumerate(index.nodes) for name in node.output if name}
    derived = {"input_ids"}
    for node in index.nodes:
        if operator_of(node) not in SIZES and derived & names_read(node):
            derived |= set(filter(None, node.output))
    live, pending = set(), {"logits"}
    while pending:
        name = pending.pop()
        place = made.get(name)
        if place is not None and place not in live and name in derived:
            live.add(place)
            pending |= names_read(index.nodes[place]) & derived
    furthest, found = -1, []
    for place in sorted(live):
        if furthest <= place:
            found.append(place)
        readers = (reader for name in index.nodes[place].output for reader in index.readers.get(name, ()))
        furthest = max([furthest, *(reader for reader in readers if reader in live)])
    return found
