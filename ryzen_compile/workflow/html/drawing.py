"""A small graph as SVG: what a pass removed, what it added, and what is around it."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

from ryzen_compile.graphs.site import SmallGraph, SmallNode
from ryzen_compile.workflow import wording
from ryzen_compile.workflow.html.layout import Point, arrange

NODE_HEIGHT = 38.0
CHARACTER = 6.7  # the widest advance of usual monospaced fonts at 11 px; the smaller second line keeps it, too
PADDING = 9.0
SHORTEST, LONGEST = 7, 26  # characters of a line
_SIGNS = {"removed": "\u2212 ", "added": "+ ", "context": ""}
# Fill, outline and dashes. The page that the drawing stands in sets the variables, for light and dark.
_LOOKS = {
    "removed": ("var(--removed-tint, #fdecea)", "var(--removed, #b3261e)", ' stroke-dasharray="5 3"'),
    "added": ("var(--added-tint, #e6f4ea)", "var(--added, #1b6e36)", ""),
    "context": ("var(--context-tint, #f1f2f4)", "var(--muted, #5c6470)", ""),
}
_MUTED, _INK = "var(--muted, #5c6470)", "var(--ink, #1b1f24)"


def draw_graph(graph: SmallGraph, title: str) -> str:
    """``<svg>`` of ``graph``, to be put into a page; ``title`` says what it shows to those who do not see it.

    It has no ids, so that any number of drawings may share a page. Edges that lead to nodes that are not there, and
    second nodes of an id, are left out. Empty for a graph without nodes.
    """
    first: dict[str, SmallNode] = {}
    for node in graph.nodes:
        first.setdefault(node.id, node)
    nodes = list(first.values())
    if not nodes:
        return ""
    numbers = {node.id: i for i, node in enumerate(nodes)}
    edges = list(
        dict.fromkeys((numbers[a], numbers[b]) for a, b in graph.edges if a in numbers and b in numbers and a != b)
    )
    lines = [_lines(node) for node in nodes]
    widths = [2 * PADDING + CHARACTER * max(SHORTEST, *map(columns, pair)) for pair in lines]
    placed = arrange(widths, edges, node_height=NODE_HEIGHT, gap=14.0, layer_gap=30.0, margin=6.0)
    body = [_edge(route, nodes[a], nodes[b]) for (a, b), route in zip(edges, placed.routes, strict=True)]
    body += [_node(*parts) for parts in zip(nodes, lines, widths, placed.centres, strict=True)]
    width, height = placed.width, placed.height
    # Wide graphs shrink with the page as far as they stay readable, then their box scrolls.
    style = f"width:100%;max-width:{width:.0f}px;min-width:{min(width, max(280.0, 0.75 * width)):.0f}px"
    font = 'text-anchor="middle" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="11"'
    head = f'<svg class="graph" role="img" aria-label="{_escaped(title)}" viewBox="0 0 {width:.1f} {height:.1f}"'
    return f'{head} {font} stroke-width="1.2" style="{style}">\n' + "\n".join(body) + "\n</svg>"


def columns(text: str) -> int:
    """How many columns of a monospaced font ``text`` takes at most: wide characters take two, and so do those that
    such fonts lack and borrow from others."""
    return sum(1 if character.isascii() else 2 for character in text)


def shortened(text: str, limit: int) -> str:
    """``text`` in at most ``limit`` columns; a longer one keeps its beginning and its end, the more telling part."""
    if columns(text) <= limit:
        return text
    end = _fitting(text[::-1], (limit - 2) * 2 // 3)[::-1]
    return f"{_fitting(text, limit - 2 - columns(end))}\u2026{end}"


def _fitting(text: str, limit: int) -> str:
    kept = 0
    while kept < len(text) and columns(text[: kept + 1]) <= limit:
        kept += 1
    return text[:kept]


def _lines(node: SmallNode) -> tuple[str, str]:
    sign = _SIGNS[node.state]
    return sign + shortened(_plain(node.op), LONGEST - columns(sign)), shortened(_plain(node.label), LONGEST)


def _plain(text: str) -> str:
    """Without line breaks, and without marks that would stand above or below the line."""
    return "".join(c for c in " ".join(wording.printable(text).split()) if not unicodedata.combining(c))


def _node(node: SmallNode, lines: tuple[str, str], width: float, centre: Point) -> str:
    fill, outline, dashes = _LOOKS[node.state]
    x, y = centre
    said = [node.op, node.label, node.module, {"context": "stays"}.get(node.state, node.state)]
    tip = _escaped("\n".join(part for part in said if part))
    return (
        f'<g class="{node.state}"><title>{tip}</title>'
        f'<rect x="{x - width / 2:.1f}" y="{y - NODE_HEIGHT / 2:.1f}" width="{width:.1f}" height="{NODE_HEIGHT:g}" '
        f'rx="5" style="fill:{fill};stroke:{outline}"{dashes}/>'
        f'<text x="{x:.1f}" y="{y - 3:.1f}" style="fill:{_INK}">{_escaped(lines[0])}</text>'
        f'<text x="{x:.1f}" y="{y + 11:.1f}" font-size="10" style="fill:{_MUTED}">{_escaped(lines[1])}</text></g>'
    )


def _edge(route: Sequence[Point], source: SmallNode, reader: SmallNode) -> str:
    """A curve that leaves and arrives upright, and an arrowhead."""
    states = {source.state, reader.state}
    state = "removed" if "removed" in states else "added" if "added" in states else "context"
    color, dashes = _LOOKS[state][1], _LOOKS[state][2]
    (x, y), (end_x, end_y) = route[0], route[-1]
    way = 1 if end_y > y else -1
    stops = [*route[:-1], (end_x, end_y - 6 * way)]
    path = f"M{x:.1f} {y:.1f}"
    for i, ((x, y), (to_x, to_y)) in enumerate(pairwise(stops)):
        middle = (y + to_y) / 2
        curve = f"C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}"
        path += f"L{to_x:.1f} {to_y:.1f}" if i % 2 else curve  # through a layer straight, between two curved
    head = f"M{end_x:.1f} {end_y:.1f}l-3.5 {-7 * way}h7z"
    return f'<path d="{path}" style="fill:none;stroke:{color}"{dashes}/><path d="{head}" style="fill:{color}"/>'


def _escaped(text: str) -> str:
    return html.escape(wording.printable(text))
