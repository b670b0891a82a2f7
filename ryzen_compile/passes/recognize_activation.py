"""Recognise an activation function by what it computes, and make it one ``ryzen::activation``.

After canonicalize, before fuse_linear, which carries the activation in its epilogue. Models spell one function in many
ways (``0.5 x (1 + tanh(...))`` with ``pow`` or products, ``x sigmoid(1.702 x)``, ``relu(x) ** 2``), so nothing is
parsed: around each tanh, sigmoid, erf or relu the pass finds pieces of graph with one source and one exit,

    y = f(x)        elementwise, no other tensor, nothing between read from outside

runs each on a grid of points, and compares with every entry of ``ops.ACTIVATIONS``. The largest piece that is one of
them wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor, fx

from ryzen_compile import ops
from ryzen_compile.edit import Edit
from ryzen_compile.passes.base import NoMatch, RewritePass
from ryzen_compile.program import Program, is_call

aten = torch.ops.aten
ANCHORS = (aten.tanh, aten.sigmoid, aten.erf, aten.relu)
ELEMENTWISE = frozenset((*ANCHORS, aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.neg, aten.pow, aten.square,
                         aten.exp, aten.reciprocal, aten.clamp, aten.clamp_min, aten.hardtanh))  # fmt: skip
SINGLE_CALLS: dict[object, str] = {aten.relu: "relu", aten.silu: "silu", aten.sigmoid: "sigmoid", aten.tanh: "tanh"}
GELU_FORMS = {"none": "gelu", "tanh": "gelu_tanh"}
MAX_NODES = 24  # the longest spelling seen has nine
# Four units in float32's last place, relative to max(1, |y|): constants such as sqrt(2 / pi) come rounded to float32.
TOLERANCE = 4 * torch.finfo(torch.float32).eps


def activation_name(node: object) -> tuple[str, fx.Node] | None:
    """The name in ``ops.ACTIVATIONS`` and the argument of a node that is one activation; none for any other node."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if is_call(node, torch.ops.ryzen.activation):
        return node.args[1], node.args[0]
    if is_call(node, aten.gelu):
        approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return GELU_FORMS[approximate], node.args[0]
    name = SINGLE_CALLS.get(getattr(node.target, "overloadpacket", None))
    return (name, node.args[0]) if name else None


@dataclass(frozen=True)
class Match:
    """``exit_ = act(source)``."""

    source: fx.Node
    exit_: fx.Node
    act: str


class RecognizeActivation(RewritePass):
    """A spelled-out elementwise function  ->  ``activation(x, act)``."""

    name: ClassVar[str] = "recognize_activation"
    produces: ClassVar[frozenset[str]] = frozenset({"ryzen::activation"})
    anchors = ANCHORS

    def match(self, node: fx.Node, program: Program) -> Match | NoMatch:  # noqa: ARG002 - the base signature
        pieces = sorted(_pieces(node), key=lambda piece: -len(piece[2]))
        if not pieces:
            return NoMatch("already one call" if activation_name(node) else "no piece around it has one source", node)
        worst = NoMatch(_difference(*pieces[0]), node)
        for source, exit_, inside in pieces:
            act = _computed(source, exit_, inside)
            if act is None:
                continue
            leak = next((n for n in inside if n is not exit_ and any(u not in inside for u in n.users)), None)
            if leak is None:
                return Match(source, exit_, act)
            worst = NoMatch(f"computes {act}, but {leak.name} is read elsewhere", leak)
        return worst

    def rewrite(self, edit: Edit, m: Match) -> None:
        edit.replace(m.exit_, edit.call(ops.activation, m.source, m.act, before=m.exit_))


def _elementwise(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in ELEMENTWISE


def _pieces(anchor: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, list[fx.Node]]]:
    """Every (source, exit, nodes between in graph order) of at least two nodes with ``anchor`` inside."""
    for source, exit_ in product(_sources(anchor), _exits(anchor)):
        inside = _between(source, exit_)
        if inside is not None and len(inside) > 1:
            yield source, exit_, inside


def _sources(anchor: fx.Node) -> Iterator[fx.Node]:
    """The nodes that every path into ``anchor`` goes through, nearest first."""
    frontier = set(anchor.all_input_nodes)
    for _ in range(MAX_NODES):
        latest = max(frontier)
        if len(frontier) == 1:
            yield latest
        if not _elementwise(latest):
            return
        frontier.remove(latest)
        frontier |= set(latest.all_input_nodes)


def _exits(anchor: fx.Node) -> Iterator[fx.Node]:
    """``anchor`` and the elementwise nodes that its value flows through, as long as one node reads it."""
    node = anchor
    for _ in range(MAX_NODES):
        yield node
        readers = list(node.users)
        if len(readers) != 1 or not _elementwise(readers[0]):
            return
        node = readers[0]


def _between(source: fx.Node, exit_: fx.Node) -> list[fx.Node] | None:
    """The nodes that compute ``exit_`` from ``source`` alone, in graph order; none when another tensor enters."""
    inside: set[fx.Node] = set()
    pending = [exit_]
    while pending:
        node = pending.pop()
        if node is source or node in inside:
            continue
        if not _elementwise(node) or len(inside) == MAX_NODES:
            return None
        inside.add(node)
        pending.extend(node.all_input_nodes)
    floating = source.meta["val"].dtype.is_floating_point
    return sorted(inside) if floating and all(n.meta["val"].dtype == source.meta["val"].dtype for n in inside) else None


@cache
def _grid() -> Tensor:
    """Both tails, the middle closely, zeros of both signs and values where squares vanish."""
    tiny = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-310, -1e-310, 1e-4, -1e-4], dtype=torch.float64)
    return torch.cat((torch.linspace(-30, 30, 241, dtype=torch.float64), torch.linspace(-4, 4, 129).double(), tiny))


@cache
def _known() -> dict[str, Tensor]:
    return {name: f(_grid()) for name, f in ops.ACTIVATIONS.items() if name != "none"}


def _evaluate(source: fx.Node, exit_: fx.Node, inside: list[fx.Node]) -> Tensor:
    values = {source: _grid()}
    for node in inside:
        args = [values[a] if isinstance(a, fx.Node) else a for a in node.args]
        values[node] = node.target(*args, **node.kwargs)
    return values[exit_]


def _errors(source: fx.Node, exit_: fx.Node, inside: list[fx.Node]) -> dict[str, float]:
    """Per activation, the largest error relative to max(1, |y|); NaN counts as infinite."""
    got = _evaluate(source, exit_, inside)
    distances = {name: ((got - y).abs() / y.abs().clamp_min(1.0)).max() for name, y in _known().items()}
    return {name: float(d.nan_to_num(torch.inf)) for name, d in distances.items()}


def _computed(source: fx.Node, exit_: fx.Node, inside: list[fx.Node]) -> str | None:
    errors = _errors(source, exit_, inside)
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] <= TOLERANCE else None


def _difference(source: fx.Node, exit_: fx.Node, inside: list[fx.Node]) -> str:
    errors = _errors(source, exit_, inside)
    best = min(errors, key=errors.__getitem__)
    return f"computes no known activation: the nearest is {best}, off by {errors[best]:.3g}"
