"""Small graphs drawn: where nodes go is checked by geometry, what they say by reading the drawing."""

from __future__ import annotations

import re
from itertools import combinations, pairwise, product
from xml.etree import ElementTree as ET

import pytest

from ryzen_compile.graphs.change import SmallGraph, SmallNode
from ryzen_compile.workflow.html.drawing import LONGEST, NODE_HEIGHT, columns, draw_graph, shortened
from ryzen_compile.workflow.html.layout import Arrangement, arrange
from tests.workflow.example_reports import HOSTILE, small_graph
from tests.workflow.page_checks import check_svg

HEIGHT, GAP, LAYER_GAP, MARGIN = 38.0, 14.0, 30.0, 6.0
EPSILON = 1e-6  # of a pixel: sums of floats


def placed(widths: list[float], edges: list[tuple[int, int]]) -> Arrangement:
    return arrange(widths, edges, node_height=HEIGHT, gap=GAP, layer_gap=LAYER_GAP, margin=MARGIN)


def layers(found: Arrangement) -> list[int]:
    return [round((y - MARGIN - HEIGHT / 2) / (HEIGHT + LAYER_GAP)) for _, y in found.centres]


def node(name: str, op: str = "aten.add", state: str = "context", module: str = "") -> SmallNode:
    return SmallNode.model_validate({"id": name, "op": op, "label": name, "state": state, "module": module})


# --- where nodes go ---------------------------------------------------------------------------------------------------
def test_layers_are_the_longest_ways() -> None:
    # 0 -> 1 -> 2 -> 4, and 0 -> 4 directly; 3 reads nothing and is read by 4 only: it stands right above it.
    found = placed([80.0] * 5, [(0, 1), (1, 2), (2, 4), (0, 4), (3, 4)])
    assert layers(found) == [0, 1, 2, 2, 3]


def test_nodes_of_a_layer_keep_their_distance_and_all_lie_within_the_drawing() -> None:
    widths = [61.0, 187.0, 73.0, 139.0, 91.0, 127.0, 67.0, 83.0, 113.0, 157.0, 101.0]
    edges = [(0, i) for i in range(1, 8)] + [(i, 8 + i % 2) for i in range(1, 8)] + [(8, 10), (9, 10), (0, 10)]
    found = placed(widths, edges)
    at = layers(found)
    for a, b in combinations(range(len(widths)), 2):
        if at[a] == at[b]:
            apart = abs(found.centres[a][0] - found.centres[b][0]) - (widths[a] + widths[b]) / 2
            assert apart >= GAP - EPSILON, f"nodes {a} and {b} are {apart} apart"
    for (x, y), width in zip(found.centres, widths, strict=True):
        assert x - width / 2 >= MARGIN - EPSILON and x + width / 2 <= found.width - MARGIN + EPSILON
        assert y - HEIGHT / 2 >= MARGIN - EPSILON and y + HEIGHT / 2 <= found.height - MARGIN + EPSILON


def test_an_edge_that_passes_layers_runs_through_no_node() -> None:
    """Between the rims of a layer, routes go straight down: there each is beside every node of the layer."""
    widths = [120.0] * 9
    edges = [(0, 2), (2, 3), (3, 8), (0, 4), (4, 5), (5, 8), (0, 8), (1, 3), (6, 7), (0, 7), (7, 8)]
    found = placed(widths, edges)
    crossed = 0
    for (a, b), route in zip(edges, found.routes, strict=True):
        assert route[0] == pytest.approx((found.centres[a][0], found.centres[a][1] + HEIGHT / 2), abs=EPSILON)
        assert route[-1] == pytest.approx((found.centres[b][0], found.centres[b][1] - HEIGHT / 2), abs=EPSILON)
        for (x, top), (to_x, _) in zip(route[1::2], route[2::2], strict=False):
            assert x == to_x
            for (cx, cy), width in zip(found.centres, widths, strict=True):
                if abs(cy - HEIGHT / 2 - top) < EPSILON:
                    assert abs(cx - x) > width / 2, "the edge runs through a node"
                    crossed += 1
    assert crossed > 0, "no edge passed a layer with nodes: the test shows nothing"


def test_crossings_that_can_be_avoided_are() -> None:
    # Two pairs given crosswise: 0 -> 3, 1 -> 2 cross unless a layer is turned around.
    found = placed([80.0] * 4, [(0, 3), (1, 2)])
    (x0, x1, x2, x3) = (x for x, _ in found.centres)
    assert (x0 < x1) == (x3 < x2)


def test_a_chain_is_straight_and_a_reader_stands_below_the_middle_of_what_it_reads() -> None:
    chain = placed([80.0, 150.0, 60.0], [(0, 1), (1, 2)])
    assert len({round(x, 6) for x, _ in chain.centres}) == 1
    fan = placed([80.0] * 4, [(0, 3), (1, 3), (2, 3)])
    assert fan.centres[3][0] == pytest.approx(sum(x for x, _ in fan.centres[:3]) / 3, abs=EPSILON)


def test_an_edge_against_the_order_runs_upwards_and_ends_all_the_same() -> None:
    found = placed([80.0] * 3, [(0, 1), (1, 2), (2, 0)])
    assert layers(found) == [0, 1, 2]
    start, end = found.routes[2][0], found.routes[2][-1]
    assert start[1] > end[1]
    assert end[1] == pytest.approx(found.centres[0][1] + HEIGHT / 2, abs=EPSILON)


def test_nothing_to_arrange_and_a_single_node() -> None:
    assert placed([], []).centres == []
    assert placed([50.0], []).centres == [(MARGIN + 25.0, MARGIN + HEIGHT / 2)]


def test_a_large_place_is_arranged_in_no_more_than_it_needs() -> None:
    """Forty nodes, the most that a record of changes holds, all of whose edges that lead downwards exist."""
    nodes = 40
    edges = [(a, b) for a, b in product(range(nodes), repeat=2) if a < b and (7 * a + 3 * b) % 11 == 0]
    found = placed([100.0] * nodes, edges)
    assert len(found.routes) == len(edges) > 60
    assert all(len(route) % 2 == 0 for route in found.routes)


# --- what is drawn ----------------------------------------------------------------------------------------------------
def texts(root: ET.Element) -> list[str]:
    return [element.text or "" for element in root.iter("text")]


def test_every_node_and_edge_is_drawn_and_states_are_told_without_colour() -> None:
    graph = small_graph()
    root = check_svg(draw_graph(graph, "What a pass changed"))
    groups = root.findall("g")
    assert [group.get("class") for group in groups] == [one.state for one in graph.nodes]
    assert len(root.findall("path")) == 2 * len(graph.edges), "a curve and an arrowhead for each edge"
    said = texts(root)[::2]
    assert [text[:2] for text in said] == [
        {"removed": "\u2212 ", "added": "+ "}.get(one.state, one.op[:2]) for one in graph.nodes
    ]
    dashed = [group.get("class") for group in groups if group[1].get("stroke-dasharray")]
    assert set(dashed) == {"removed"} and len(dashed) == 4


def test_text_stays_inside_its_box_and_the_whole_is_in_the_tooltip() -> None:
    long = "custom_namespace::a_fused_operator_with_a_very_long_name_indeed"
    wide = "層" * 40
    graph = SmallGraph(nodes=(node("%a", long, "removed", "model.layers.11"), node("%b", wide)), edges=(("%a", "%b"),))
    root = check_svg(draw_graph(graph, "long names"))
    for group in root.findall("g"):
        width = float(str(group[1].get("width")))
        for text in group.findall("text"):
            # 0.62 em is the widest advance of common monospaced fonts; characters they lack take a whole em.
            size = float(text.get("font-size") or root.attrib["font-size"])
            needed = sum(0.62 * size if c.isascii() else size for c in text.text or "")
            assert needed <= width, f"{text.text!r} takes {needed:.0f} of {width:.0f}"
    tips = [group.findtext("title") or "" for group in root.findall("g")]
    assert long in tips[0] and "removed" in tips[0] and "model.layers.11" in tips[0] and wide in tips[1]


def test_shortening_keeps_beginning_and_end() -> None:
    assert shortened("aten.linear", LONGEST) == "aten.linear"
    found = shortened("%0.self_attention.q_proj.linear_with_bias", LONGEST)
    assert columns(found) <= LONGEST and found.startswith("%0.self") and found.endswith("linear_with_bias"[-10:])
    assert "\u2026" in found


def test_names_that_would_break_out_are_text() -> None:
    nodes = tuple(node(name, name, "added", name) for name in HOSTILE)
    graph = SmallGraph(nodes=nodes, edges=tuple(pairwise(HOSTILE)))
    drawn = draw_graph(graph, HOSTILE[3])
    root = check_svg(drawn)
    assert {element.tag for element in root.iter()} == {"svg", "g", "title", "rect", "text", "path"}
    assert "<img" not in drawn and "\x00" not in drawn and "\u202e" not in drawn
    assert {name for element in root.iter() for name in element.attrib if name.startswith("on")} == set()
    assert len(root.findall("g")) == len(HOSTILE)


def test_edges_to_nowhere_loops_and_second_nodes_of_an_id_are_left_out() -> None:
    nodes = (node("a"), node("b"), node("a", "other"))
    graph = SmallGraph(nodes=nodes, edges=(("a", "b"), ("a", "a"), ("b", "missing"), ("a", "b")))
    root = check_svg(draw_graph(graph, "a graph"))
    assert [text for text in texts(root) if "." in text or text == "other"] == ["aten.add", "aten.add"]
    assert len(root.findall("path")) == 2


def test_an_empty_graph_is_no_drawing() -> None:
    assert draw_graph(SmallGraph(nodes=(), edges=()), "nothing") == ""


def test_a_drawing_has_no_ids_and_is_the_same_every_time() -> None:
    drawn = draw_graph(small_graph(), "one")
    assert " id=" not in drawn and drawn == draw_graph(small_graph(), "one")


def test_a_drawing_scales_but_not_below_what_can_be_read() -> None:
    nodes = (node("%x"), *(node(f"%reader_{i}_of_many") for i in range(13)))
    wide = draw_graph(SmallGraph(nodes=nodes, edges=tuple(("%x", one.id) for one in nodes[1:])), "wide")
    sizes = {name: float(value) for name, value in re.findall(r"(max-width|min-width):(\d+)px", wide)}
    assert sizes["max-width"] > 1280 and sizes["min-width"] == pytest.approx(0.75 * sizes["max-width"], abs=1)
    small = draw_graph(SmallGraph(nodes=nodes[:1], edges=()), "small")
    sizes = {name: float(value) for name, value in re.findall(r"(max-width|min-width):(\d+)px", small)}
    assert sizes["max-width"] == sizes["min-width"] < 200
    assert NODE_HEIGHT < float(re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)"', small)[0]) < 2 * NODE_HEIGHT
