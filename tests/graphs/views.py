"""Test support: views made by hand, in as few words as they need."""

from __future__ import annotations

from collections.abc import Sequence

from ryzen_compile.graphs.view import GraphView, NodeView, ValueType, ValueView

F32 = ValueType("f32", ("B", "T", "7"))


def node(name: str, op: str, *inputs: str, module: str = "", outputs: int = 1, **attributes: object) -> NodeView:
    """A call of ``op``; with several outputs they are ``name.0``, ``name.1`` and so on."""
    made = (name,) if outputs == 1 else tuple(f"{name}.{i}" for i in range(outputs))
    written = tuple((key, str(value)) for key, value in attributes.items())
    return NodeView(name, op, inputs, made, written, (F32,) * outputs, module)


def graph(*nodes: NodeView, weights: Sequence[str] = (), outputs: Sequence[str] = (), labels: str = "") -> GraphView:
    """A graph of one input ``x``; weights are labelled by their names behind ``labels``."""
    return GraphView(
        inputs=(ValueView("x", F32),),
        weights=tuple(ValueView(name, ValueType("f32", ("7", "7")), f"{labels}{name}") for name in weights),
        nodes=nodes,
        outputs=tuple(outputs) or nodes[-1].outputs[-1:],
    )
