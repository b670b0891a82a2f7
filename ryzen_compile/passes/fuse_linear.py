"""Carry the activation in the linear that produces its argument.

After recognize_activation (one spelling of activations) and merge_linear (gate and up in one weight), near the end.

    act(x Wᵀ + b)                                      ->    linear_act(x, W, b, act)
    act(g) * u   with g, u the halves of x [Wg; Wu]ᵀ   ->    gated_linear(x, [Wg; Wu], act)
    the same of linear_ternary(x, [Cg; Cu], s)         ->    gated_activation(linear_ternary(x, [Cg; Cu], s), act)

A weight that holds up before gate is turned around by an expression (``cat`` of its slices), not evaluated here.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ryzen_compile import ops
from ryzen_compile.edit import Edit
from ryzen_compile.passes.base import NoMatch, RewritePass
from ryzen_compile.passes.recognize_activation import SINGLE_CALLS, activation_name
from ryzen_compile.program import Program, is_call, shape

aten = torch.ops.aten
TERNARY = torch.ops.ryzen.linear_ternary


@dataclass(frozen=True)
class Plain:
    """``out = act(linear(x, w, b))``."""

    out: fx.Node
    linear: fx.Node
    act: str


@dataclass(frozen=True)
class Gated:
    """``out = act(gate) * up``, both halves of ``linear``; ``up_first`` tells that up's rows come first."""

    out: fx.Node
    linear: fx.Node
    act: str
    up_first: bool


@dataclass(frozen=True)
class Half:
    """Channels ``start .. stop`` of a linear's result."""

    linear: fx.Node
    start: int
    stop: int


class FuseLinear(RewritePass):
    """A linear and the activation after it  ->  ``linear_act`` or ``gated_linear``."""

    name: ClassVar[str] = "fuse_linear"
    produces: ClassVar[frozenset[str]] = frozenset(
        {"ryzen::linear_act", "ryzen::gated_linear", "ryzen::gated_activation"}
    )
    anchors = (*SINGLE_CALLS, aten.gelu, torch.ops.ryzen.activation)

    def match(self, node: fx.Node, program: Program) -> Plain | Gated | NoMatch:  # noqa: ARG002 - the base signature
        named = activation_name(node)
        if named is None:
            return NoMatch("not an activation of the table", node)
        act, source = named
        if is_call(source, aten.linear):
            if len(source.users) != 1:
                return NoMatch(f"{source.name} is read elsewhere", source)
            return Plain(node, source, act)
        gate = _half(source)
        if gate is None:
            return NoMatch("its argument is neither a linear nor a part of one", source)
        return _match_gated(node, act, source, gate)

    def rewrite(self, edit: Edit, m: Plain | Gated) -> None:
        x, weight, *bias = m.linear.args
        if is_call(m.linear, TERNARY):
            fused = edit.call(ops.gated_activation, m.linear, m.act, before=m.out, like=m.linear)
        elif isinstance(m, Plain):
            fused = edit.call(ops.linear_act, x, weight, bias[0] if bias else None, m.act, before=m.out, like=m.linear)
        else:
            if m.up_first:
                rows = int(shape(weight)[0])
                halves = [(rows // 2, rows), (0, rows // 2)]
                parts = [edit.call(aten.slice.Tensor, weight, 0, a, b, before=m.out, like=m.linear) for a, b in halves]
                weight = edit.call(aten.cat.default, parts, 0, before=m.out, like=m.linear)
            fused = edit.call(ops.gated_linear, x, weight, m.act, before=m.out, like=m.linear)
        edit.replace(m.out, fused)


def _match_gated(node: fx.Node, act: str, source: fx.Node, gate: Half) -> Gated | NoMatch:
    readers = list(node.users)
    if len(readers) != 1 or not is_call(readers[0], aten.mul) or len(readers[0].all_input_nodes) != 2:
        return NoMatch(f"{node.name} is not only multiplied with the other half", node)
    out = readers[0]
    other = next(n for n in out.all_input_nodes if n is not node)
    up, width = _half(other), int(shape(gate.linear)[-1])
    if up is None or up.linear is not gate.linear:
        return NoMatch(f"{other.name} is not the other half of {gate.linear.name}", other)
    if {(gate.start, gate.stop), (up.start, up.stop)} != {(0, width // 2), (width // 2, width)}:
        spans = f"{gate.start}:{gate.stop} and {up.start}:{up.stop}"
        return NoMatch(f"the parts {spans} are not the halves of {width} channels", gate.linear)
    if is_call(gate.linear, TERNARY):
        if gate.start > 0:
            return NoMatch("what is gated comes before its gate", gate.linear)
    elif len(gate.linear.args) > 2 and gate.linear.args[2] is not None:
        return NoMatch("the linear has a bias", gate.linear)
    leak = next((n for n in (source, other) if len(n.users) != 1), None)
    if leak is None and not _only_split(gate.linear, source, other):
        leak = gate.linear
    if leak is not None:
        return NoMatch(f"{leak.name} is read elsewhere", leak)
    return Gated(out, gate.linear, act, up_first=gate.start > 0)


def _half(node: fx.Node) -> Half | None:
    """Reads ``split(linear)[i]`` and ``linear[..., a:b]``."""
    if is_call(node, operator.getitem) and is_call(node.args[0], aten.split_with_sizes):
        split, index = node.args
        linear, sizes = split.args[:2]
        dim = split.args[2] if len(split.args) > 2 else 0
        start = sum(sizes[:index])
        stop = start + sizes[index]
    elif is_call(node, aten.slice) and len(node.args) <= 4:
        linear, *rest = node.args
        dim = rest[0] if rest else 0
        width = shape(linear)[dim]
        if not isinstance(width, int):
            return None
        start, stop, _ = slice(*[*rest[1:], None, None][:2]).indices(width)
    else:
        return None
    if not is_call(linear, aten.linear, TERNARY) or dim % len(shape(linear)) != len(shape(linear)) - 1:
        return None
    return Half(linear, start, stop)


def _only_split(linear: fx.Node, gate: fx.Node, up: fx.Node) -> bool:
    """True when nothing but the two halves reads the linear's result."""
    parts = [u for n in linear.users for u in (n.users if is_call(n, aten.split_with_sizes) else [n])]
    return set(parts) == {gate, up}
