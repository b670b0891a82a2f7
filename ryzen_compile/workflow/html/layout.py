"""Where the nodes of a small graph go: in layers from top to bottom, edges pointing down.

A node's layer is the longest way to it; one that reads nothing stands right above its first reader. An edge that
passes a layer gets a place in it, so that no edge runs through a node. Layers are ordered by barycentres, keeping the
order with the fewest crossings, and nodes then move towards their neighbours as far as those beside them allow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

Point = tuple[float, float]
LANE = 10.0  # width of an edge that passes a layer
ROUNDS = 8  # of ordering and of moving, downwards and upwards in turn


@dataclass(frozen=True)
class Arrangement:
    """Pixels. ``centres`` of the nodes as given; ``routes`` lead from the lower rim of one node to the upper rim of
    another, one for each edge as given, through every layer between: two points for each, on top of it and below."""

    centres: list[Point]
    routes: list[list[Point]]
    width: float
    height: float


def arrange(
    widths: Sequence[float],
    edges: Sequence[tuple[int, int]],
    *,
    node_height: float,
    gap: float,
    layer_gap: float,
    margin: float,
) -> Arrangement:
    """Places nodes of ``widths``, listed in an order in which they can be computed, and ``edges`` of their numbers.

    An edge against that order is laid out as if it were turned around, and its route runs upwards.
    """
    layers = _Layers(list(widths), [(min(edge), max(edge)) for edge in edges], gap)
    layers.order()
    layers.move()
    left = min((layers.x[i] - layers.widths[i] / 2 for i in layers.layer), default=0.0)
    right = max((layers.x[i] + layers.widths[i] / 2 for i in layers.layer), default=0.0)
    pitch = node_height + layer_gap

    def centre(item: int) -> Point:
        return layers.x[item] - left + margin, margin + node_height / 2 + layers.layer[item] * pitch

    routes = []
    for (a, b), chain in zip(edges, layers.chains, strict=True):
        route = []
        for item in chain:
            x, y = centre(item)
            route += [(x, y - node_height / 2), (x, y + node_height / 2)]
        route = route[1:-1]
        routes.append(route if a <= b else route[::-1])
    return Arrangement(
        centres=[centre(i) for i in range(len(widths))],
        routes=routes,
        width=right - left + 2 * margin,
        height=2 * margin + node_height + pitch * max(layers.layer.values(), default=0),
    )


@dataclass
class _Layers:
    """Items are nodes, by their numbers, and the lanes of edges that pass a layer, numbered after them. ``chains`` are
    the items that each edge leads through, its two nodes included."""

    widths: list[float]
    edges: list[tuple[int, int]]
    gap: float
    layer: dict[int, int] = field(init=False)
    chains: list[list[int]] = field(init=False, default_factory=list)
    above: dict[int, list[int]] = field(init=False, default_factory=lambda: defaultdict(list))
    below: dict[int, list[int]] = field(init=False, default_factory=lambda: defaultdict(list))
    rows: list[list[int]] = field(init=False)
    x: dict[int, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.layer = _longest_ways(len(self.widths), self.edges)
        for a, b in self.edges:
            chain = [a, *(self._lane(at) for at in range(self.layer[a] + 1, self.layer[b])), b]
            self.chains.append(chain)
            for upper, lower in pairwise(chain):
                self.below[upper].append(lower)
                self.above[lower].append(upper)
        self.rows = [[] for _ in range(1 + max(self.layer.values(), default=-1))]
        for item, at in self.layer.items():
            self.rows[at].append(item)

    def _lane(self, at: int) -> int:
        self.widths.append(LANE)
        self.layer[len(self.widths) - 1] = at
        return len(self.widths) - 1

    def order(self) -> None:
        best, fewest = [list(row) for row in self.rows], self._crossings()
        for turn in range(ROUNDS):
            downwards = turn % 2 == 0
            near = self.above if downwards else self.below
            for row in self.rows if downwards else self.rows[::-1]:
                self._sort(row, near)
            crossings = self._crossings()
            if crossings < fewest:
                best, fewest = [list(row) for row in self.rows], crossings
        self.rows = best

    def _sort(self, row: list[int], near: dict[int, list[int]]) -> None:
        """By the mean place of what is near, as a share of its layer; what has nothing near keeps its place."""
        share = self._shares()
        row.sort(key=lambda i: _mean([share[other] for other in near[i]], share[i]))

    def _shares(self) -> dict[int, float]:
        return {item: (at + 0.5) / len(row) for row in self.rows for at, item in enumerate(row)}

    def _crossings(self) -> int:
        place = {item: at for row in self.rows for at, item in enumerate(row)}
        total = 0
        for row in self.rows[:-1]:
            ends = [place[lower] for item in row for lower in sorted(self.below[item], key=place.__getitem__)]
            total += sum(ends[j] < ends[i] for i in range(len(ends)) for j in range(i + 1, len(ends)))
        return total

    def move(self) -> None:
        for row in self.rows:
            self._place(row, dict.fromkeys(row, 0.0))
        for turn in range(ROUNDS):
            downwards = turn % 2 == 0
            near = self.above if downwards else self.below
            for row in self.rows if downwards else self.rows[::-1]:
                self._place(row, {i: _mean([self.x[other] for other in near[i]], self.x.get(i, 0.0)) for i in row})

    def _place(self, row: list[int], wished: dict[int, float]) -> None:
        """As near to ``wished`` as order and widths allow, in the sum of squares: neighbours that want to pass each
        other are joined to a block, which stands at the mean of its wishes (pool adjacent violators)."""
        offsets, at = {}, 0.0
        for left, item in zip([None, *row], row, strict=False):
            at += 0.0 if left is None else (self.widths[left] + self.widths[item]) / 2 + self.gap
            offsets[item] = at
        blocks: list[list[int]] = []
        for item in row:
            blocks.append([item])
            while len(blocks) > 1 and self._wish(blocks[-2], wished, offsets) > self._wish(blocks[-1], wished, offsets):
                blocks[-2:] = [blocks[-2] + blocks[-1]]
        for block in blocks:
            start = self._wish(block, wished, offsets)
            self.x |= {item: start + offsets[item] for item in block}

    @staticmethod
    def _wish(block: list[int], wished: dict[int, float], offsets: dict[int, float]) -> float:
        return sum(wished[item] - offsets[item] for item in block) / len(block)


def _longest_ways(nodes: int, edges: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Layers of nodes; every edge leads from a lower number to a higher one."""
    layer = dict.fromkeys(range(nodes), 0)
    for a, b in sorted(edges, key=lambda edge: edge[1]):
        layer[b] = max(layer[b], layer[a] + 1)
    reading = {b for _, b in edges}
    for node in range(nodes):
        readers = [layer[b] for a, b in edges if a == node]
        if readers and node not in reading:
            layer[node] = min(readers) - 1
    return layer


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
