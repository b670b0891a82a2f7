"""The place where two states of a graph differ first, small enough to be drawn.

Nodes that only the earlier state has were removed, those that only the later one has were added. Two of them belong to
the same place when one reads the other, or when one took the other's place in a node that stayed. The first such place
is shown, with what it reads and what reads it.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from ryzen_compile.fields import Fields
from ryzen_compile.graphs.text import Names
from ryzen_compile.graphs.view import GraphView

State = Literal["removed", "added", "context"]
MAX_NODES = 40
MAX_CHANGED = 30  # of these, so that there is room for what is around them
_Key = tuple[State, str]  # a state and a name: a pass may reuse the name of a node that it removed
_SIGNS: dict[State, str] = {"removed": "-", "added": "+", "context": ""}


class SmallNode(Fields):
    """``label`` is the node's name in the canonical text; ``op`` is "input", "weight" or "output" for what is no
    node."""

    id: str
    op: str
    label: str
    state: State
    module: str


class SmallGraph(Fields):
    """``nodes`` are in the order in which they are computed; ``edges`` lead from a value's maker to its reader, by
    ``id``."""

    nodes: tuple[SmallNode, ...]
    edges: tuple[tuple[str, str], ...]
    cut: int = Field(default=0, ge=0, description="nodes of this place that are not shown")


def first_site(before: GraphView, after: GraphView, names_before: Names, names_after: Names) -> SmallGraph | None:
    """The first place where ``after`` has other nodes than ``before`` (else: other inputs, weights or outputs); none
    when it has the same. Nodes are the same if name, operator and attributes are."""
    states = _States(_items(before, names_before), _items(after, names_after))
    first = states.first()
    if first is None:
        return None
    place = states.connected(first)
    shown = _shown(place)
    drawn = {*shown, *states.around(shown)[: MAX_NODES - len(shown)]}
    return SmallGraph(
        nodes=tuple(states.node(key) for key in sorted(drawn, key=states.order)),
        edges=tuple((states.id(a), states.id(b)) for a, b in states.edges if a in drawn and b in drawn),
        cut=len(place) + len(states.around(place)) - len(drawn),
    )


def _shown(place: list[_Key]) -> list[_Key]:
    """The first of ``place``. If none of them was added (or removed), the last third gives way to some that were."""
    kinds = {state for state, _ in place[:MAX_CHANGED]}
    others = [key for key in place[MAX_CHANGED:] if key[0] not in kinds][: MAX_CHANGED // 3]
    return place[: MAX_CHANGED - len(others)] + others


@dataclass(frozen=True)
class _Item:
    """A node, input, weight or output of one state. Two of one name are the same if their ``content`` is; ``reads`` are
    names of items, one for each input."""

    op: str
    content: object
    label: str
    module: str = ""
    reads: tuple[str, ...] = ()
    is_node: bool = False


def _items(view: GraphView, names: Names) -> dict[str, _Item]:
    items, makers = {}, {}
    for op, values in (("input", view.inputs), ("weight", view.weights)):
        for value in values:
            items[value.name] = _Item(op, (op, value.type), names.values[value.name])
            makers[value.name] = value.name
    for node in view.nodes:
        makers |= dict.fromkeys(node.outputs, node.name)
    for node in view.nodes:
        reads = tuple(makers.get(name, "") for name in node.inputs)
        content = (node.op, node.attributes)
        items[node.name] = _Item(node.op, content, names.nodes[node.name], node.module, reads, is_node=True)
    for i, name in enumerate(view.outputs):
        items[f"output {i}"] = _Item("output", "output", f"output {i}", reads=(makers.get(name, ""),))
    return items


class _States:
    """Both states as one graph. ``edges`` are those of the later one, and of the earlier one those at removed items."""

    def __init__(self, old: dict[str, _Item], new: dict[str, _Item]) -> None:
        self._same = {name for name in old.keys() & new.keys() if old[name].content == new[name].content}
        self._items: dict[_Key, _Item] = {}
        self._order: dict[_Key, tuple[int, int, int]] = {}
        self.edges: dict[tuple[_Key, _Key], None] = {}
        self._add(old, "removed")
        self._add(new, "added")
        self._near: dict[_Key, list[_Key]] = defaultdict(list)
        links = [
            (self._key(a, "removed"), self._key(b, "added"))
            for name in sorted(self._same, key=lambda name: self._order["context", name])
            for a, b in zip(old[name].reads, new[name].reads, strict=False)
        ]
        replaced = [(a, b) for a, b in links if a[0] == "removed" and b[0] == "added"]
        for a, b in (*self.edges, *replaced):
            self._near[a].append(b)
            self._near[b].append(a)

    def _key(self, name: str, state: State) -> _Key:
        return ("context" if name in self._same else state, name)

    def _add(self, items: dict[str, _Item], state: State) -> None:
        """Ranks by how many of the nodes that both states have come before, which compares places in the two."""
        rank = 0
        for position, (name, item) in enumerate(items.items()):
            key = self._key(name, state)
            at = rank if item.is_node or item.op == "output" else -1
            self._items[key] = item
            self._order[key] = (at, tuple(_SIGNS).index(key[0]), position)
            rank += item.is_node and key[0] == "context"
            for source in item.reads:
                maker = self._key(source, state)
                if source in items and (state == "added" or "removed" in (maker[0], key[0])):
                    self.edges[maker, key] = None

    def order(self, key: _Key) -> tuple[int, int, int]:
        """Sorts items by where they are computed, removed and added ones before what follows them."""
        return self._order[key]

    def first(self) -> _Key | None:
        """The changed node that comes first; where no node was changed, the first of the other items."""
        changed = [key for key in self._items if key[0] != "context"]
        nodes = [key for key in changed if self._items[key].is_node]
        return min(nodes or changed, key=self.order, default=None)

    def connected(self, first: _Key) -> list[_Key]:
        """``first`` and the changed items that belong to its place. Of all that can be reached the earliest comes next:
        where layers share something that was changed, the first layer is complete before the second begins."""
        found: list[_Key] = []
        met, waiting = {first}, [(self.order(first), first)]
        while waiting:
            _, key = heapq.heappop(waiting)
            found.append(key)
            for near in self._near[key]:
                if near[0] != "context" and near not in met:
                    met.add(near)
                    heapq.heappush(waiting, (self.order(near), near))
        return found

    def around(self, place: Iterable[_Key]) -> list[_Key]:
        """What stayed and is next to the items of ``place``."""
        return list(dict.fromkeys(near for key in place for near in self._near[key] if near[0] == "context"))

    def id(self, key: _Key) -> str:
        return _SIGNS[key[0]] + self._items[key].label

    def node(self, key: _Key) -> SmallNode:
        item = self._items[key]
        return SmallNode(id=self.id(key), op=item.op, label=item.label, state=key[0], module=item.module)
