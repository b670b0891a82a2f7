"""Recognise rotary position embedding by what it computes, and make it one ``ryzen::rotary`` over a table.

After canonicalize, before fuse_attention: queries and keys reach the attention rotated. Models spell the rotation in
many ways (``rotate_half``, interleaved, ``stack``, partial, chunked, scaled angles). All of them are the same linear
map of a head's channels at each position:

    y[a_i] = x[a_i] cos_i(t) - x[b_i] sin_i(t)          half-split:   a_i = i,   b_i = i + R
    y[b_i] = x[b_i] cos_i(t) + x[a_i] sin_i(t)          interleaved:  a_i = 2i,  b_i = 2i + 1

so the pass feeds unit vectors to the piece of graph between ``x`` and ``y``, reads the map off, and fills the table of
``cos`` and ``sin`` for every position of the context. A map that is not of this form, or whose values depend on how
long the sequence is, is left alone.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ryzen_compile import ops
from ryzen_compile.edit import Edit
from ryzen_compile.passes.base import NoMatch, Pass, PassResult, Site
from ryzen_compile.probe import Probe
from ryzen_compile.program import Program, is_call, module_path, shape

aten = torch.ops.aten
LAYOUT = (aten.reshape, aten.view, aten.permute, aten.unsqueeze, aten.squeeze, aten.expand, aten.clone)
PIECES = (aten.slice, aten.select, aten.cat, aten.stack, aten.split_with_sizes, aten.split, aten.unbind, aten.chunk)
ARITHMETIC = (aten.mul, aten.add, aten.sub, aten.neg)
EXPANDABLE = frozenset((*LAYOUT, *PIECES, *ARITHMETIC, operator.getitem))
SAMPLES = 5  # positions at which the whole map is read
CHUNK = 2048  # positions of the table filled at a time


@dataclass(frozen=True)
class Match:
    """``y = rotary(x)``; ``heads_first`` tells (B, H, T, D) from (B, T, H, D)."""

    x: fx.Node
    y: fx.Node
    heads_first: bool
    cos: Tensor
    sin: Tensor
    interleaved: bool


class FuseRotary(Pass):
    """``x cos + rotate(x) sin``, however it is spelled  ->  ``rotary(x, positions, cos, sin)``."""

    name: ClassVar[str] = "fuse_rotary"
    produces: ClassVar[frozenset[str]] = frozenset({"ryzen::rotary"})

    def run(self, program: Program) -> PassResult:
        edit = Edit(program, self.name)
        probe = Probe(edit.program)
        hits, misses = [], []
        tables: dict[object, tuple[Tensor, Tensor]] = {}
        consumed: set[fx.Node] = set()
        for node in list(edit.graph.nodes):
            if node in consumed or not _mixes(node, probe):
                continue
            found = match(node, probe, edit.program, tables, consumed)
            if isinstance(found, NoMatch):
                misses.append(Site(found.node.name, module_path(node), found.reason))
                continue
            rewrite(edit, found)
            hits.append(Site(found.y.name, module_path(node)))
        return PassResult(edit.finish() if hits else program, tuple(hits), tuple(misses))


def _mixes(node: fx.Node, probe: Probe) -> bool:
    """True for a product of a token-dependent value with a position-dependent one: where a rotation starts."""
    if node not in probe.of_tokens or not is_call(node, aten.mul):
        return False
    return any(source in probe.of_positions for source in node.all_input_nodes)


def match(start: fx.Node, probe: Probe, program: Program, tables: dict, consumed: set[fx.Node]) -> Match | NoMatch:
    region = _rotation_region(start, probe)
    if region is None:
        return NoMatch("no single tensor is both the source and the shape of the rotated value", start)
    x, y, inside = region
    axes = _axes(x, probe)
    if axes is None:
        return NoMatch(f"the rotated tensor is {shape(x)}, expected four dims with batch first and one token dim", x)
    heads_first = axes == 2
    cos_sin = _read_rotation(x, y, heads_first, probe)
    if isinstance(cos_sin, NoMatch):
        return cos_sin
    rotary_dim, interleaved, sample_cos, sample_sin = cos_sin
    angles = frozenset(n for node in inside for n in node.all_input_nodes if n in probe.of_positions)
    signs = (sample_cos.numpy().tobytes(), sample_sin.numpy().tobytes())  # one angle can be turned by both ways
    key = (angles, rotary_dim, interleaved, signs)
    if key not in tables:
        tables[key] = _table(x, y, heads_first, rotary_dim, interleaved, probe, program.spec.context)
    cos, sin = tables[key]
    n = min(SAMPLES, len(cos))
    if not (torch.equal(cos[:n], sample_cos[:n]) and torch.equal(sin[:n], sample_sin[:n])):
        return NoMatch("the angles depend on the length of the sequence, not on the position alone", y)
    if not _position_wise(x, y, heads_first, rotary_dim, interleaved, probe, cos, sin):
        return NoMatch("a token's angle depends on the other tokens' positions", y)
    consumed |= inside
    return Match(x, y, heads_first, cos, sin, interleaved)


def rewrite(edit: Edit, m: Match) -> None:
    positions = edit.program.input("position_ids")
    cos, sin = edit.add_constant("rotary_cos", m.cos), edit.add_constant("rotary_sin", m.sin)
    x = m.x if m.heads_first else edit.call(aten.permute.default, m.x, [0, 2, 1, 3], before=m.y)
    y = edit.call(ops.rotary, x, positions, cos, sin, m.interleaved, before=m.y)
    if not m.heads_first:
        y = edit.call(aten.permute.default, y, [0, 2, 1, 3], before=m.y)
    edit.replace(m.y, y)


def _rotation_region(start: fx.Node, probe: Probe) -> tuple[fx.Node, fx.Node, set[fx.Node]] | None:
    """Grows forward from ``start`` while one source explains everything; the largest exit shaped like its source."""
    best = None
    exit_ = start
    while True:
        found = probe.common_source(exit_, EXPANDABLE, until=lambda n: probe.order[n] < probe.order[start])
        if found is not None:
            x, inside = found
            if start in inside and _sums(inside) and shape(x) == shape(exit_):
                best = (x, exit_, inside)
        users = [u for u in exit_.users if u in probe.of_tokens]
        if len(users) != 1:
            return best
        packet = getattr(users[0].target, "overloadpacket", users[0].target)
        if packet not in EXPANDABLE or (best is not None and packet in ARITHMETIC):
            return best
        exit_ = users[0]


def _sums(inside: set[fx.Node]) -> bool:
    return any(is_call(n, aten.add, aten.sub) for n in inside)


def _axes(x: fx.Node, probe: Probe) -> int | None:
    """The index of the token dim of a four-dim tensor; none when it is not 1 or 2."""
    dims, (batch, tokens) = shape(x), shape(probe.ids)
    if len(dims) != 4 or dims[0] != batch:
        return None
    at = [i for i in (1, 2) if not isinstance(dims[i], int) and dims[i] == tokens]
    return at[0] if len(at) == 1 else None


def _feed(x: fx.Node, heads_first: bool, batch: int, tokens: int, channels: Tensor) -> Tensor:
    """A value for ``x``: ``channels`` (batch or 1, D) repeated over heads and tokens."""
    dims = shape(x)
    size = (batch, int(dims[1]), tokens, int(dims[3])) if heads_first else (batch, tokens, int(dims[2]), int(dims[3]))
    return channels[:, None, None, :].expand(size).contiguous()


def _one_head(y: Tensor, heads_first: bool) -> Tensor | None:
    """(B, T, D) when every head was treated alike, else none."""
    y = y if heads_first else y.transpose(1, 2)
    return y[:, 0] if torch.equal(y, y[:, :1].expand_as(y)) else None


def _read_rotation(
    x: fx.Node, y: fx.Node, heads_first: bool, probe: Probe
) -> tuple[int, bool, Tensor, Tensor] | NoMatch:
    """Feeds every unit vector; returns the rotary dim, the pairing and (SAMPLES, R) cos and sin."""
    width = int(shape(x)[3])
    zero = probe.evaluate(y, {x: _feed(x, heads_first, 1, SAMPLES, torch.zeros(1, width))}, SAMPLES)
    if zero.any():
        return NoMatch("the piece adds something to its input: it is not a rotation", y)
    basis = probe.evaluate(y, {x: _feed(x, heads_first, width, SAMPLES, torch.eye(width))}, SAMPLES, batch=width)
    columns = _one_head(basis, heads_first)
    if columns is None:
        return NoMatch("heads are turned differently", y)
    maps = columns.permute(1, 2, 0)  # (T, row, column): y = maps[t] @ x
    for rotary_dim in range(2, width + 1, 2):
        for interleaved in (False, True):
            a, b = _pairs(rotary_dim, interleaved)
            cos, sin = maps[:, a, a], maps[:, b, a]
            if torch.equal(maps, _maps(width, a, b, cos, sin)):
                return rotary_dim, interleaved, cos.contiguous(), sin.contiguous()
    return NoMatch("the piece does not turn pairs of channels", y)


def _pairs(rotary_dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    half = torch.arange(rotary_dim // 2)
    return (2 * half, 2 * half + 1) if interleaved else (half, half + rotary_dim // 2)


def _maps(width: int, a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    maps = torch.eye(width).repeat(len(cos), 1, 1)
    maps[:, a, a], maps[:, b, b] = cos, cos
    maps[:, b, a], maps[:, a, b] = sin, -sin
    return maps


def _table(
    x: fx.Node, y: fx.Node, heads_first: bool, rotary_dim: int, interleaved: bool, probe: Probe, context: int
) -> tuple[Tensor, Tensor]:
    """cos and sin (context, R), read in chunks: a whole context of every head would be gigabytes."""
    if probe.positions is None:
        return _angles(x, y, heads_first, rotary_dim, interleaved, probe, None, context)
    parts = [
        _angles(x, y, heads_first, rotary_dim, interleaved, probe, torch.arange(i, min(i + CHUNK, context)), 0)
        for i in range(0, context, CHUNK)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _angles(
    x: fx.Node,
    y: fx.Node,
    heads_first: bool,
    rotary_dim: int,
    interleaved: bool,
    probe: Probe,
    positions: Tensor | None,
    tokens: int,
) -> tuple[Tensor, Tensor]:
    """cos and sin at ``positions`` (or at the first ``tokens``): the image of a vector with ones in every ``a``."""
    a, b = _pairs(rotary_dim, interleaved)
    tokens = tokens if positions is None else len(positions)
    ones = torch.zeros(1, int(shape(x)[3]))
    ones[:, a] = 1.0
    feeds = {x: _feed(x, heads_first, 1, tokens, ones)}
    if positions is not None and probe.positions is not None:
        feeds[probe.positions] = positions[None]
    y_value = probe.evaluate(y, feeds, tokens)
    image = (y_value if heads_first else y_value.transpose(1, 2))[0, 0]
    return image[:, a].contiguous(), image[:, b].contiguous()


def _position_wise(
    x: fx.Node,
    y: fx.Node,
    heads_first: bool,
    rotary_dim: int,
    interleaved: bool,
    probe: Probe,
    cos: Tensor,
    sin: Tensor,
) -> bool:
    """Scattered positions, the largest first, must give the table's rows: catches angles that follow the maximum."""
    if probe.positions is None:
        return True
    scattered = torch.tensor(sorted({0, 1, len(cos) // 3, len(cos) // 2, len(cos) - 1}, reverse=True))
    got = _angles(x, y, heads_first, rotary_dim, interleaved, probe, scattered, 0)
    return torch.equal(got[0], cos[scattered]) and torch.equal(got[1], sin[scattered])
