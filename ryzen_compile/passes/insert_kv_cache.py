"""Give every attention a cache, so that one graph serves a prompt, one token, and anything between.

After fuse_linear, before prune_logits: attention is one node, its rotation and projections are where they will stay.

    attention(rotary(q), rotary(k), v)  ->  out, k', v' = cached_attention(q, k, v, k_cache, v_cache, lengths, cos, sin)

Queries, keys and values go in as the projections left them, (B, T, H D), so the transposes around attention disappear;
when the three are the parts of one projection, in order, that projection goes in whole. The new inputs are
``attention_mask`` (B, total), whose row sums count each row's tokens, and a key and a value cache per attention; the
new outputs are the caches with the new rows in place. A rotation that keys and queries do not share stays outside.

A layer that looks back over a window only gets a cache of little more than the window, from which the engine drops what
is older, unless the window is more than half of the context anyway.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ryzen_compile import ops
from ryzen_compile.edit import Edit
from ryzen_compile.ops.attention import FLOAT
from ryzen_compile.passes.base import NoMatch, Pass, PassResult, Site
from ryzen_compile.probe import Probe
from ryzen_compile.program import Program, is_call, module_path, shape
from ryzen_compile.spec import CacheSlot, cache_rows

aten = torch.ops.aten
attention = torch.ops.ryzen.attention
rotary = torch.ops.ryzen.rotary
SCANS = (aten.convolution, aten.cumsum, aten.cumprod, aten.roll, aten.flip)


@dataclass(frozen=True)
class Match:
    """``q``, ``k``, ``v`` are heads-first and not rotated where ``cos`` is given; ``packed`` holds all three."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    cos: fx.Node | None
    sin: fx.Node | None
    interleaved: bool


class InsertKVCache(Pass):
    """Rewrites all attentions, or none: half a cache is no cache."""

    name: ClassVar[str] = "insert_kv_cache"
    produces: ClassVar[frozenset[str]] = frozenset({"ryzen::cached_attention"})
    required: ClassVar[bool] = True
    works_on: ClassVar[str] = "attention"
    builds_on: ClassVar[str] = "fuse_attention"

    def __init__(self, *, bounded: bool = True) -> None:
        self._bounded = bounded

    def run(self, program: Program) -> PassResult:
        edit = Edit(program, self.name)
        nodes = [n for n in edit.graph.nodes if is_call(n, attention)]
        found = [_match(node) for node in nodes]
        matches = [m for m in found if isinstance(m, Match)]
        stray = [NoMatch("mixes tokens outside an attention that was recognised", n) for n in _mixers(edit)]
        refused = [*(m for m in found if isinstance(m, NoMatch)), *stray]
        misses = [Site(m.node.name, module_path(m.node), m.reason) for m in refused]
        if misses or not matches:
            return PassResult(program, misses=tuple(misses))
        batch = shape(edit.program.inputs[0])[0]
        total, capacity = edit.new_dim(11), edit.new_dim(13)
        mask = edit.add_input("attention_mask", edit.fake_empty((batch, total), torch.long))
        lengths = edit.call(aten.sum.dim_IntList, mask, [1], before=_first_call(edit.graph))
        slots, hits = [], []
        for i, m in enumerate(matches):
            slots.append(_slot(i, m, self._window(m.node, program)))
            hits.append(Site(m.node.name, module_path(m.node)))
            rows = edit.new_dim(slots[-1].rows) if slots[-1].window else capacity
            _rewrite(edit, m, slots[-1], lengths, batch, rows)
        edit.set_cache(tuple(slots), int(shape(matches[0].q)[1]))
        return PassResult(edit.finish(), tuple(hits))

    def _window(self, node: fx.Node, program: Program) -> int:
        """Of a layer whose cache is to be bounded; 0 where that would save little."""
        window, context = int(node.args[5]), program.spec.context
        return window if self._bounded and 2 * window <= context and cache_rows(window) < context else 0


def _mixers(edit: Edit) -> list[fx.Node]:
    """What is left of an attention in pieces, a convolution or a scan: a cached graph would see only the new tokens."""
    tokens = shape(edit.program.inputs[0])[1]
    of_tokens = Probe(edit.program).of_tokens

    def square(node: fx.Node) -> bool:
        return sum(not isinstance(d, int) and d == tokens for d in shape(node)) > 1

    return [
        n for n in edit.graph.nodes if n in of_tokens and n.op == "call_function" and (square(n) or is_call(n, *SCANS))
    ]


def _match(node: fx.Node) -> Match | NoMatch:
    q, k, v, _sinks, _scale, _window, _softcap, causal = node.args
    if not causal:
        return NoMatch("attends to later tokens: a cache cannot hold what is not there yet", node)
    for name, value in (("keys", k), ("values", v)):
        if shape(value)[1] != shape(k)[1] or not isinstance(shape(value)[3], int):
            return NoMatch(f"{name} are {shape(value)}, expected (B, {shape(k)[1]}, T, D)", value)
    plain = Match(node, q, k, v, None, None, False)
    if not (is_call(q, rotary) and is_call(k, rotary)):
        return plain
    if q.args[1:] != k.args[1:]:
        return plain  # queries and keys are turned differently: both rotations stay outside
    _, _, cos, sin, interleaved = q.args
    return Match(node, q.args[0], k.args[0], v, cos, sin, interleaved)


def _slot(i: int, m: Match, window: int) -> CacheSlot:
    _, kv_heads, _, head_dim = shape(m.k)
    return CacheSlot(i, int(kv_heads), int(head_dim), int(shape(m.v)[3]), window=window)


def _first_call(graph: fx.Graph) -> fx.Node:
    return next(n for n in graph.nodes if n.op == "call_function")


def _rewrite(edit: Edit, m: Match, slot: CacheSlot, lengths: fx.Node, batch: int, capacity: int) -> None:
    caches = []
    for kind, dim in (("key", slot.head_dim), ("value", slot.value_dim)):
        size = (batch, slot.kv_heads, capacity, dim)
        caches.append(edit.add_input(f"past_key_values_{slot.layer}_{kind}", edit.fake_empty(size, torch.float32)))
    _, _, _, sinks, scale, window, softcap, _ = m.node.args
    heads = int(shape(m.q)[1])
    packed = _packed(m, heads, slot)
    q, k, v = (packed, None, None) if packed is not None else (_flat(edit, x, m.node) for x in (m.q, m.k, m.v))
    results = edit.call(
        ops.cached_attention, q, k, v, *caches, lengths, m.cos, m.sin, sinks, heads, scale, window, softcap,
        m.interleaved, None, None, FLOAT, FLOAT, False, slot.window > 0, None, before=m.node,
    )  # fmt: skip
    out, keys, values = (edit.item(results, i, before=m.node) for i in range(3))
    edit.add_output(keys)
    edit.add_output(values)
    dims = shape(m.node)
    for reader in list(m.node.users):
        if is_call(reader, aten.reshape, aten.view) and shape(reader)[-1] == shape(out)[-1] and len(shape(reader)) == 3:
            edit.replace(reader, out)  # the output projection reads (B, T, H D) as it is
    if m.node.users:
        sizes = [edit.call(aten.sym_size.int, out, d, before=m.node) for d in (0, 1)]
        edit.replace(m.node, edit.call(aten.reshape.default, out, [*sizes, int(dims[2]), int(dims[3])], before=m.node))


def _flat(edit: Edit, x: fx.Node, before: fx.Node) -> fx.Node:
    """(B, H, T, D) as (B, T, H D), without the permute and reshape that had made it when there were such."""
    if is_call(x, aten.permute) and list(x.args[1]) == [0, 2, 1, 3]:
        rows = x.args[0]
    else:
        rows = edit.call(aten.permute.default, x, [0, 2, 1, 3], before=before)
    heads, width = int(shape(rows)[2]), int(shape(rows)[3])
    if is_call(rows, aten.reshape, aten.view):
        source = rows.args[0]
        if len(shape(source)) == 3 and shape(source)[-1] == heads * width:
            return source
    sizes = [edit.call(aten.sym_size.int, rows, d, before=before) for d in (0, 1)]
    return edit.call(aten.reshape.default, rows, [*sizes, heads * width], before=before)


def _packed(m: Match, heads: int, slot: CacheSlot) -> fx.Node | None:
    """The projection whose three parts, in order, are q, k and v; none when they come from elsewhere."""
    if slot.head_dim != slot.value_dim:
        return None
    parts = []
    for x in (m.q, m.k, m.v):
        if not (
            is_call(x, aten.permute) and list(x.args[1]) == [0, 2, 1, 3] and is_call(x.args[0], aten.reshape, aten.view)
        ):
            return None
        parts.append(x.args[0].args[0])
    if any(p.target is not operator.getitem for p in parts):
        return None
    split = parts[0].args[0]
    if not is_call(split, aten.split_with_sizes) or any(p.args != (split, i) for i, p in enumerate(parts)):
        return None
    widths = [heads * slot.head_dim, slot.kv_heads * slot.head_dim, slot.kv_heads * slot.value_dim]
    along_last = len(split.args) > 2 and split.args[2] in (-1, len(shape(split.args[0])) - 1)
    return split.args[0] if along_last and list(split.args[1]) == widths else None
