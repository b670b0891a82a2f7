"""Merge linears that read one value into one linear: one read of ``x``, one larger matrix product.

    q, k, v  = x Wqᵀ, x Wkᵀ, x Wvᵀ    ->    q, k, v  = split(x [Wq; Wk; Wv]ᵀ)     of one attention
    gate, up = x Wgᵀ, x Wuᵀ           ->    gate, up = split(x [Wg; Wu]ᵀ)         joined by act(gate) * up

After fuse_attention and fuse_norm, before fuse_linear, which makes the second form one operator. The merged weight is
the expression ``cat([...])``: nothing is evaluated here, but for ternary weights (``linear_ternary``), which are small:
their codes and scales are stacked at once, with a scale for each row. A linear that reads the same value for another
purpose (a router, the feed-forward of a parallel block) is left out of the group.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ryzen_compile.edit import Edit
from ryzen_compile.interpret import interpret
from ryzen_compile.passes.base import NoMatch, RewritePass
from ryzen_compile.passes.recognize_activation import activation_name
from ryzen_compile.program import Program, is_call, shape

aten = torch.ops.aten
dialect = torch.ops.ryzen
PRODUCTS = (aten.linear, dialect.linear_ternary)
# What lies between a projection and its attention: head layout, rotary embedding and head norms, fused or spelled out.
LAYOUT = (aten.reshape, aten.view, aten.permute, aten.unsqueeze, aten.squeeze, aten.expand, aten.clone, aten.slice,
          aten.select, aten.cat, aten.stack, aten.split_with_sizes, aten._to_copy, operator.getitem)  # fmt: skip
ARITHMETIC = (aten.mul, aten.add, aten.sub, aten.neg, aten.clamp)
NORMS = (dialect.rms_norm, dialect.layer_norm, aten.rms_norm, aten.layer_norm, aten.pow, aten.mean, aten.rsqrt)
TRANSPARENT = (*LAYOUT, *ARITHMETIC, *NORMS, dialect.rotary)


@dataclass(frozen=True)
class Match:
    """``linears`` in the order of their rows in the merged weight."""

    linears: tuple[fx.Node, ...]


class MergeLinear(RewritePass):
    """``linear(x, w1), linear(x, w2), ...``  ->  ``split(linear(x, cat(w1, w2, ...)))``."""

    name: ClassVar[str] = "merge_linear"
    anchors = PRODUCTS

    def match(self, node: fx.Node, program: Program) -> Match | NoMatch:
        x = node.args[0]
        if not any(u is not node and is_call(u, *PRODUCTS) and u.args[0] is x for u in x.users):
            return NoMatch("no other linear reads its input", node)
        group = _projections(node) or _gate_and_up(node)
        if group is None:
            return NoMatch("feeds neither an attention nor a gate together with another linear", node)
        if len(set(group)) != len(group):
            return NoMatch("already one linear", node)
        stranger = next((n for n in group if n.args[0] is not x), None)
        if stranger is not None:
            return NoMatch(f"{stranger.name}, its partner, reads another value", stranger)
        return _mergeable(group, program)

    def rewrite(self, edit: Edit, m: Match) -> None:
        first, before = m.linears[0], min(u for n in m.linears for u in n.users)
        if is_call(first, dialect.linear_ternary):
            stacked = _stacked(edit, m.linears)
        else:
            stacked = tuple(
                edit.call(aten.cat.default, [_early(edit, t, before) for t in tensors], 0, before=before, like=first)
                for tensors in zip(*(_tensors(n) for n in m.linears), strict=True)
            )
        merged = edit.call(first.target, first.args[0], *stacked, before=before, like=first)
        sizes = [int(shape(n)[-1]) for n in m.linears]
        parts = edit.call(aten.split_with_sizes.default, merged, sizes, -1, before=before, like=first)
        for index, linear in enumerate(m.linears):
            edit.replace(linear, edit.item(parts, index, before=before))


def _tensors(linear: fx.Node) -> list[fx.Node]:
    """Its weight and, if it has one, its bias; of a ternary one codes and scale."""
    return [t for t in linear.args[1:] if t is not None]


def _stacked(edit: Edit, linears: tuple[fx.Node, ...]) -> tuple[fx.Node, fx.Node]:
    """Codes and scales of ternary linears below each other, as constants."""
    values: list[list[Tensor]] = [interpret(edit.program, {}, _tensors(n)) for n in linears]
    codes = torch.cat([packed for packed, _ in values])
    scales = torch.cat([scale.expand(len(packed)) for packed, scale in values])
    stem = linears[0].args[1].name.removesuffix("_codes")
    return edit.add_constant(f"{stem}_stacked_codes", codes), edit.add_constant(f"{stem}_stacked_scales", scales)


def _projections(linear: fx.Node) -> tuple[fx.Node, ...] | None:
    """The linears behind q, k and v of the attention that ``linear`` flows into; none when it is not one of them."""
    reached = next((n for n in _walk(linear.users, lambda n: n.users) if is_call(n, dialect.attention)), None)
    if reached is None:
        return None
    found = []
    for argument in reached.args[:3]:
        behind = [n for n in _walk([argument], lambda n: n.all_input_nodes) if is_call(n, *PRODUCTS)]
        if len(behind) != 1:
            return None
        found.append(behind[0])
    return tuple(found) if linear in found else None


def _walk(starts: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """``starts`` and all that ``step`` reaches through transparent nodes, with the first nodes that are not."""
    pending = list(starts)
    seen = set(pending)
    while pending:
        node = pending.pop()
        yield node
        if is_call(node, *TRANSPARENT):
            fresh = [n for n in step(node) if n not in seen]
            seen.update(fresh)
            pending.extend(fresh)


def _gate_and_up(linear: fx.Node) -> tuple[fx.Node, ...] | None:
    """``(gate, up)`` when ``linear`` is one of them in ``act(gate) * up``."""
    for reader in linear.users:
        products = list(reader.users) if activation_name(reader) else [reader]
        for joined in products:
            if not is_call(joined, aten.mul) or len(joined.all_input_nodes) != 2:
                continue
            for act, up in (joined.args, reversed(joined.args)):
                named = activation_name(act)
                if named and is_call(named[1], *PRODUCTS) and is_call(up, *PRODUCTS) and linear in (named[1], up):
                    return named[1], up
    return None


def _mergeable(group: tuple[fx.Node, ...], program: Program) -> Match | NoMatch:
    if len({len(_tensors(n)) for n in group}) != 1:
        return NoMatch("some of the group have a bias and some do not", group[0])
    for linear in group:
        for tensor in _tensors(linear):
            if not _is_weight(tensor, program):
                return NoMatch(f"{tensor.name} is computed from the input, not from weights", linear)
            if len(tensor.users) != 1:
                return NoMatch(f"{tensor.name} is read elsewhere: merging would copy it", linear)
        if linear.args[1].meta["val"].dtype != group[0].args[1].meta["val"].dtype:
            return NoMatch("the weights have different types", linear)
    return Match(group)


def _is_weight(node: fx.Node, program: Program) -> bool:
    """True for weights and for expressions of weights and numbers alone."""
    pending, seen = [node], set()
    while pending:
        part = pending.pop()
        if part in seen:
            continue
        seen.add(part)
        if part.op == "placeholder":
            if part.name not in program.weights:
                return False
        elif not part.all_input_nodes:
            return False
        pending.extend(part.all_input_nodes)
    return True


def _early(edit: Edit, weight: fx.Node, before: fx.Node) -> fx.Node:
    """``weight`` itself if it is computed before ``before``, else the same expression built again there."""
    if weight < before:
        return weight
    args = fx.node.map_arg(weight.args, lambda n: _early(edit, n, before))
    return edit.call(weight.target, *args, before=before, like=weight)
