"""The first place that was changed: what belongs to it, what is around it, and where it is cut."""

from __future__ import annotations

from ryzen_compile.graphs.site import MAX_CHANGED, MAX_NODES, SmallGraph, first_site
from ryzen_compile.graphs.text import names_of
from ryzen_compile.graphs.view import GraphView, NodeView
from tests.graphs.views import graph, node


def site(before: GraphView, after: GraphView) -> SmallGraph | None:
    names = names_of(before)
    found = first_site(before, after, names, names_of(after, (before, names)))
    if found is not None:
        ids = [n.id for n in found.nodes]
        assert len(set(ids)) == len(ids) <= MAX_NODES
        assert {end for edge in found.edges for end in edge} <= set(ids)
    return found


def ops(found: SmallGraph, state: str) -> list[str]:
    return [n.op for n in found.nodes if n.state == state]


def chain(prefix: str, *names: str, source: str = "x") -> list[NodeView]:
    """Nodes that read one another, each called by its operator."""
    nodes = []
    for name in names:
        nodes.append(node(f"{prefix}{name}", name, source, module=f"layers.{prefix}"))
        source = nodes[-1].name
    return nodes


def test_the_same_graph_has_no_such_place() -> None:
    view = graph(*chain("a", "square", "mean", "mul"))
    assert site(view, view) is None


def test_a_fused_chain_with_what_it_reads_and_what_reads_it() -> None:
    left = chain("0", "square", "mean", "root")
    total = node("s", "add", "q", "k")

    def readers(source: str) -> list[NodeView]:
        return [node("q", "linear", source, "w"), node("k", "linear", source, "w")]

    before = graph(*left, *readers("0root"), total, weights=("w",))
    after = graph(node("n", "norm", "x"), *readers("n"), total, weights=("w",))
    found = site(before, after)
    assert ops(found, "removed") == ["square", "mean", "root"] and ops(found, "added") == ["norm"]
    assert sorted(ops(found, "context")) == ["input", "linear", "linear"]  # not what they read and what reads them
    assert ("%x", "-%0.square") in found.edges and ("%x", "+%norm") in found.edges
    assert ("-%0.root", "%linear") in found.edges and ("+%norm", "%linear_1") in found.edges
    assert len(found.edges) == 2 + 2 + 2 + 2 and found.cut == 0
    assert [n.module for n in found.nodes if n.op == "mean"] == ["layers.0"]


def test_only_the_first_of_two_places() -> None:
    def whole(*middles: list[NodeView]) -> GraphView:
        first, second = middles
        joint = node("joint", "linear", first[-1].name)
        return graph(*first, joint, *second, node("end", "linear", second[-1].name))

    before = whole(chain("0", "square", "root"), chain("1", "square", "root", source="joint"))
    after = whole([node("n0", "norm", "x")], [node("n1", "norm", "joint")])
    found = site(before, after)
    assert [n.label for n in found.nodes if n.state != "context"] == ["%0.square", "%0.root", "%norm"]
    assert ops(found, "context") == ["input", "linear"]
    # The same the other way round, as an expansion.
    back = site(after, before)
    assert ops(back, "added") == ["square", "root"] and ops(back, "removed") == ["norm"]


def test_what_took_the_place_of_a_part_of_a_tuple() -> None:
    before = graph(node("q", "linear", "x"), node("k", "linear", "x"), node("s", "add", "q", "k"))
    merged = node("m", "linear", "x", merged=True)
    after = graph(merged, node("p", "split", "m", outputs=2), node("s", "add", "p.0", "p.1"))
    found = site(before, after)
    assert ops(found, "removed") == ["linear", "linear"] and sorted(ops(found, "added")) == ["linear", "split"]
    assert ("+%split", "%add") in found.edges


def test_an_insertion_and_a_removal() -> None:
    a, b = node("a", "neg", "x"), node("b", "exp", "a")
    longer = graph(a, node("i", "mul", "a"), node("b", "exp", "i"))
    found = site(graph(a, b), longer)
    assert [n.state for n in found.nodes] == ["context", "added", "context"]
    assert found.edges == (("%neg", "+%mul"), ("+%mul", "%exp"))
    found = site(longer, graph(a, b))
    assert [n.state for n in found.nodes] == ["context", "removed", "context"]
    assert set(found.edges) == {("%neg", "-%mul"), ("-%mul", "%exp"), ("%neg", "%exp")}


def test_a_name_that_is_used_again_is_another_node() -> None:
    before, after = graph(node("a", "neg", "x", dim=1)), graph(node("a", "neg", "x", dim=2))
    found = site(before, after)
    assert [(n.id, n.state) for n in found.nodes] == [
        ("%x", "context"), ("-%neg", "removed"), ("+%neg", "added"), ("output 0", "context"),
    ]  # fmt: skip
    assert ("-%neg", "output 0") in found.edges and ("+%neg", "output 0") in found.edges


def test_inputs_and_weights_alone() -> None:
    a = node("a", "neg", "x", "w")
    found = site(graph(a, weights=("w", "v")), graph(a, weights=("w",)))
    assert [(n.op, n.label, n.state) for n in found.nodes] == [("weight", "@v", "removed")] and not found.edges


def test_a_large_place_is_cut_and_says_so() -> None:
    length = 53
    long = chain("0", *[f"op{i}" for i in range(length)])
    readers = [node(f"r{i}", "linear", n.name) for i, n in enumerate(long)]
    before = graph(*long, *readers)
    after = graph(node("n", "all", "x"), *[node(r.name, "linear", "n") for r in readers])
    found = site(before, after)
    assert len(found.nodes) == MAX_NODES
    assert len(ops(found, "removed")) + len(ops(found, "added")) == MAX_CHANGED
    assert found.cut == (length + 1) + (length + 1) - MAX_NODES  # the chain, all; the readers, the input
    assert "op0" in ops(found, "removed") and ops(found, "added") == ["all"]
    assert found == SmallGraph.model_validate_json(found.model_dump_json())


def test_of_what_layers_share_the_first_layer_is_shown() -> None:
    """A table that was removed is read by all layers, so all of them are one place."""
    layers = 11
    table = chain("t", "arange", "cos")
    old, new = [*table], []
    for i in range(layers):
        turn = chain(f"{i}", "unsqueeze", "mul", "add", source="tcos")
        kept = node(f"{i}attention", "attention", turn[-1].name)
        old += [*turn, kept]
        new += [node(f"{i}rotary", "rotary", "x"), node(f"{i}attention", "attention", f"{i}rotary")]
    found = site(graph(*old), graph(*new))
    shown = [n.label for n in found.nodes if n.state != "context"]
    first = ["%0.unsqueeze", "%0.mul", "%0.add", "%rotary"]
    assert shown[: 2 + len(first)] == ["%t.arange", "%t.cos", *first]
    assert "%1.add" in shown and len(shown) == MAX_CHANGED
    assert found.cut == 2 + layers * 4 + layers + 1 - len(found.nodes)
