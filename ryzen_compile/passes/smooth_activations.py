"""Spread what a norm hands to linears over its channels, so that rounding it to 8 bits loses less.

    y = norm(x; g, b)                             y' = norm(x; g / s, b / s)
    z = y Wᵀ                            ->        z  = y' (W s)ᵀ

A few channels of a norm's result are often so large that a row rounded by its largest loses the others. As in
SmoothQuant (Xiao et al., 2023) every channel is divided by the root of its own size over its weights' size, and the
weights are multiplied by it; sizes are the largest magnitudes, of the channel on text. Exact, but for float32 rounding.

For encoders: after fuse_linear, before quantize_weights. Where others read ``y`` as well, the residual behind a norm
say, the norm is computed twice, over the same sum.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ryzen_compile import ops
from ryzen_compile.edit import Edit
from ryzen_compile.interpret import first_tokens, interpret, text_feeds
from ryzen_compile.passes.base import NoMatch, Pass, PassResult, Site
from ryzen_compile.passes.weight_targets import LINEARS
from ryzen_compile.program import Program, is_call, module_path

aten = torch.ops.aten
dialect = torch.ops.ryzen
SINGLE = (dialect.layer_norm, dialect.rms_norm)
ADDING = (dialect.add_layer_norm, dialect.add_rms_norm)
TOKENS = 2048  # of text that sizes are read off
EVEN = 0.01  # a norm that every channel would be divided by less than this off 1 is left alone
LEAST = 1e-5  # of a channel's size: one that is always zero stays one


@dataclass(frozen=True)
class Match:
    """``y`` is the normalized value, ``linears`` those of its readers that multiply it with weights."""

    norm: fx.Node
    y: fx.Node
    linears: tuple[fx.Node, ...]

    @property
    def affine_at(self) -> int:
        """Where the norm's scale stands among its arguments."""
        return 1 if is_call(self.norm, *SINGLE) else 2


class SmoothActivations(Pass):
    """``calibration`` (B, T) int64 is text in the model's tokens; without it, sizes are read off random tokens."""

    name: ClassVar[str] = "smooth_activations"
    produces: ClassVar[frozenset[str]] = frozenset({"ryzen::layer_norm", "ryzen::rms_norm"})

    def __init__(self, calibration: Tensor | None = None) -> None:
        self._calibration = calibration

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        found = [_match(node, program) for node in program.graph.nodes if is_call(node, *SINGLE, *ADDING)]
        matches = [m for m in found if isinstance(m, Match)]
        spreads = dict(zip(matches, self._spreads(program, matches), strict=True))
        even = [m for m, spread in spreads.items() if float((spread - 1).abs().max()) < EVEN]
        found += [NoMatch("its channels are as large as their weights call for", m.norm) for m in even]
        misses = tuple(Site(m.node.name, module_path(m.node), m.reason) for m in found if isinstance(m, NoMatch))
        matches = [m for m in matches if m not in even]
        if not matches:
            return PassResult(program, misses=misses)
        edit = Edit(program, self.name)
        nodes = {node.name: node for node in edit.graph.nodes}  # Edit works on a copy of the graph
        for m in matches:
            spread = spreads[m]
            _rewrite(edit, Match(nodes[m.norm.name], nodes[m.y.name], tuple(nodes[n.name] for n in m.linears)), spread)
        hits = tuple(Site(m.norm.name, module_path(m.norm)) for m in matches)
        return PassResult(edit.finish(), hits, misses)

    def _spreads(self, program: Program, matches: list[Match]) -> list[Tensor]:
        """(C,) for each match: what its channels are divided by."""
        text = self._calibration
        if text is None:
            tokens = (8, min(64, program.spec.context))
            text = torch.randint(program.spec.vocab, tokens, generator=torch.Generator().manual_seed(0))
        sizes: dict[fx.Node, Tensor] = {}
        wanted = {m.y for m in matches}

        def watch(node: fx.Node, value: object) -> None:
            if node in wanted and isinstance(value, Tensor):
                sizes[node] = value.abs().flatten(0, -2).amax(0)

        feeds = text_feeds(program, first_tokens(text, TOKENS))
        interpret(program, feeds, [m.y for m in matches], watch=watch)
        spreads = []
        for m in matches:
            weights = interpret(program, {}, [n.args[1] for n in m.linears])
            across = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
            ratio = (sizes[m.y].clamp(min=LEAST) / across.clamp(min=LEAST)).sqrt()
            spreads.append(ratio / ratio.mean())
        return spreads


def _match(norm: fx.Node, program: Program) -> Match | NoMatch:
    adds = is_call(norm, *ADDING)
    y = next((n for n in norm.users if is_call(n, operator.getitem) and n.args[1] == 0), None) if adds else norm
    if y is None:
        return NoMatch("nothing reads its result", norm)
    linears = tuple(n for n in y.users if is_call(n, *LINEARS) and n.args[0] is y)
    if not linears:
        return NoMatch("no linear reads its result", norm)
    if norm.args[2 if adds else 1] is None:
        return NoMatch("it has no scale to divide", norm)
    if is_call(norm, dialect.rms_norm, dialect.add_rms_norm) and norm.args[-1]:
        return NoMatch("its scale is an offset from 1", norm)
    foreign = next((n for n in linears if not _of_weights(n.args[1], program)), None)
    return Match(norm, y, linears) if foreign is None else NoMatch(f"{foreign.name} has no constant weight", foreign)


def _of_weights(node: fx.Node, program: Program) -> bool:
    if node.op == "placeholder":
        return node.name in program.weights
    return bool(node.all_input_nodes) and all(_of_weights(n, program) for n in node.all_input_nodes)


def _rewrite(edit: Edit, m: Match, spread: Tensor) -> None:
    shrink = edit.add_constant(f"{m.norm.name}_shrink", 1 / spread)
    grow = edit.add_constant(f"{m.norm.name}_grow", spread)
    at, first = m.affine_at, min(m.y.users)
    args = list(m.norm.args[at:])
    for index in range(2 if is_call(m.norm, dialect.layer_norm, dialect.add_layer_norm) else 1):
        if args[index] is not None:
            args[index] = edit.call(aten.mul.Tensor, args[index], shrink, before=m.norm)
    only = all(reader in m.linears for reader in m.y.users)
    if only or at == 1:
        spread_norm = edit.call(m.norm.target, *m.norm.args[:at], *args, before=m.norm)
        smooth = spread_norm if at == 1 else edit.item(spread_norm, 0, before=m.norm)
        if at == 2:
            for total in [n for n in m.norm.users if n.args[1] == 1]:
                edit.replace(total, edit.item(spread_norm, 1, before=m.norm))
    else:
        total = next((n for n in m.norm.users if n.args[1] == 1), None) or edit.item(m.norm, 1, before=first)
        op = ops.layer_norm if is_call(m.norm, dialect.add_layer_norm) else ops.rms_norm
        smooth = edit.call(op, total, *args, before=_later(first, total))
    for linear in m.linears:
        weight = edit.call(aten.mul.Tensor, linear.args[1], grow, before=linear)
        twin = edit.call(linear.target, smooth, weight, *linear.args[2:], before=linear)
        edit.replace(linear, twin)


def _later(first: fx.Node, total: fx.Node) -> fx.Node:
    """``first``, or what follows ``total`` if that comes after it."""
    return first if total < first else total.next
