"""Run a Program's graph, or part of it, node by node with the references: slow, anywhere, and obviously right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ryzen_compile.numerics.rows import RowFormat
from ryzen_compile.program import Program


def interpret(
    program: Program,
    feeds: Mapping[fx.Node, object],
    targets: Sequence[fx.Node],
    *,
    weights: Mapping[str, Tensor] | None = None,
    double: bool = False,
    watch: Callable[[fx.Node, object], None] | None = None,
    intercept: Callable[[fx.Node, tuple[Any, ...]], tuple[Any, ...]] | None = None,
) -> list[Any]:
    """The values of ``targets`` when the nodes in ``feeds`` have the given values.

    Only what the targets need is computed, and a value is dropped after its last reader, so memory holds about one
    layer. ``weights`` (placeholder name -> tensor) replaces the Program's own. ``double`` computes everything in
    float64, each weight being widened where it is read: the reference that blames a pass, not rounding. ``watch`` sees
    every computed value. ``intercept`` sees every call's arguments before it is made and returns those to make it with.
    """
    weights = program.weights if weights is None else weights
    values: dict[fx.Node, object] = {node: _widen(value) if double else value for node, value in feeds.items()}
    needed = _needed(program.graph, targets, values)
    last_reader = {source: node for node in needed for source in node.all_input_nodes}
    kept = set(targets)
    with torch.no_grad():
        for node in needed:
            if node.op == "placeholder":
                values[node] = _widen(weights[node.name]) if double else weights[node.name]
                continue
            args = map_arg(node.args, values.__getitem__)
            kwargs = map_arg(node.kwargs, values.__getitem__)
            if double:
                args = tuple(map(_widen, args))
                kwargs = {name: _widen(value) for name, value in kwargs.items()}
            if intercept is not None:
                args = intercept(node, args)
            value = node.target(*args, **kwargs)
            values[node] = _widen(value) if double else value  # constructors make float32 unasked
            if watch is not None:
                watch(node, values[node])
            for source in node.all_input_nodes:
                if last_reader[source] is node and source not in kept:
                    values.pop(source, None)
    return [values[target] for target in targets]


def text_feeds(
    program: Program,
    ids: Tensor,
    *,
    start: int = 0,
    caches: Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
) -> dict[fx.Node, Tensor]:
    """What a Program is fed to read ``ids`` (B, T) at positions from ``start``; ``caches`` in the inputs' order.
    ``mask`` (B, T) is 0 where an encoder's ids are padding, which none are without it."""
    batch, tokens = ids.shape
    given = {
        "input_ids": ids,
        "position_ids": torch.arange(start, start + tokens).repeat(batch, 1),
        "attention_mask": torch.ones((batch, start + tokens), dtype=torch.long) if mask is None else mask,
    }
    names = [n.name for n in program.inputs if n.name.startswith("past_key_values_")]
    given |= dict(zip(names, caches or (), strict=True))
    return {node: given[node.name] for node in program.inputs}


def cached_feeds(program: Program, ids: Tensor) -> dict[fx.Node, Tensor]:
    """What a Program with a cache is fed to read all of ``ids`` (B, T) at once, behind an empty cache.

    A layer's window never is what limits the cache.
    """
    return text_feeds(program, ids, caches=empty_caches(program, len(ids), ids.shape[1]))


def empty_caches(program: Program, batch: int, capacity: int, *, rolling: bool = False) -> list[Tensor]:
    """Zeros for the Program's cache inputs, in their order: at least ``capacity`` rows each, or, for ``rolling`` and a
    layer with a window, the rows that such a layer has."""
    caches = []
    for slot in program.slots:
        rows = slot.rows if rolling and slot.window else max(capacity, slot.window)
        for name, dim in ((slot.key_format, slot.head_dim), (slot.value_format, slot.value_dim)):
            form = RowFormat.parse(name)
            caches.append(torch.from_numpy(np.zeros((batch, slot.kv_heads, rows, form.width(dim)), form.dtype)))
    return caches


def first_tokens(text: Tensor, count: int) -> Tensor:
    """About the first ``count`` tokens of ``text`` (B, T): whole rows, or a part of the first one."""
    return text[: max(1, count // text.shape[1]), :count]


def _widen(value: object) -> object:
    """Floating-point tensors and types as float64; everything else as it is."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _needed(graph: fx.Graph, targets: Iterable[fx.Node], known: Mapping[fx.Node, object]) -> list[fx.Node]:
    """The nodes to compute, each weight right before its first reader so that few are alive at a time."""
    needed: set[fx.Node] = set()
    pending = list(targets)
    while pending:
        node = pending.pop()
        if node not in known and node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    ordered: list[fx.Node] = []
    placed: set[fx.Node] = set()
    for node in graph.nodes:
        if node in needed and node.op != "placeholder":
            ordered.extend(w for w in node.all_input_nodes if w.op == "placeholder" and w in needed and w not in placed)
            placed.update(node.all_input_nodes)
            ordered.append(node)
    ordered.extend(t for t in needed if t.op == "placeholder" and t not in placed)
    return ordered
