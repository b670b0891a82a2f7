"""Fuse the residual addition into the norm that reads its sum.

After fuse_norm, before merge_linear. The residual stream reads the sum again, so the fused operator returns both:

    t = x + r;  y = norm(t)        ->        y, t = add_norm(x, r)

Where several norms read one sum (parallel attention and feed-forward blocks), the first takes the addition.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ryzen_compile import ops
from ryzen_compile.edit import Edit
from ryzen_compile.passes.base import NoMatch, RewritePass
from ryzen_compile.program import Program, is_call, shape

aten = torch.ops.aten
dialect = torch.ops.ryzen


@dataclass(frozen=True)
class Match:
    """``rest`` are the norm's arguments after its input; ``before`` is the first reader of the sum."""

    norm: fx.Node
    add: fx.Node
    x: fx.Node
    residual: fx.Node
    rest: tuple
    before: fx.Node


class FuseAddNorm(RewritePass):
    """``norm(x + r)``  ->  ``add_rms_norm(x, r, ...)`` or ``add_layer_norm(x, r, ...)``."""

    name: ClassVar[str] = "fuse_add_norm"
    produces: ClassVar[frozenset[str]] = frozenset({"ryzen::add_rms_norm", "ryzen::add_layer_norm"})
    anchors = (dialect.rms_norm, dialect.layer_norm)

    def match(self, norm: fx.Node, program: Program) -> Match | NoMatch:  # noqa: ARG002 - the base signature
        add = norm.args[0]
        if is_call(add, operator.getitem) and is_call(add.args[0], dialect.add_rms_norm, dialect.add_layer_norm):
            return NoMatch(f"another norm already takes the addition ({add.args[0].name})", add)
        if not is_call(add, aten.add):
            return NoMatch("its input is not a sum", add)
        x, residual = add.args
        if not isinstance(x, fx.Node) or not isinstance(residual, fx.Node):
            return NoMatch("adds a number", add)
        if add.kwargs.get("alpha", 1) != 1:
            return NoMatch(f"alpha is {add.kwargs['alpha']}, expected 1", add)
        if not _same_shape(x, residual):
            return NoMatch(f"add broadcasts {_text(residual)} onto {_text(x)}", add)
        if x.meta["val"].dtype != residual.meta["val"].dtype:
            return NoMatch(f"adds {residual.meta['val'].dtype} to {x.meta['val'].dtype}", add)
        before = min(add.users)
        late = next((a for a in norm.args[1:] if isinstance(a, fx.Node) and not a < before), None)
        if late is not None:
            return NoMatch(f"{late.name} is computed after the sum is first read", late)
        return Match(norm, add, x, residual, norm.args[1:], before)

    def rewrite(self, edit: Edit, m: Match) -> None:
        # Before the sum's first reader, not before the norm: others may read the sum in between.
        fused = ops.add_rms_norm if is_call(m.norm, dialect.rms_norm) else ops.add_layer_norm
        pair = edit.call(fused, m.x, m.residual, *m.rest, before=m.before, like=m.norm)
        normed, total = edit.item(pair, 0, before=m.before), edit.item(pair, 1, before=m.before)
        edit.replace(m.norm, normed)
        edit.replace(m.add, total)


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    left, right = shape(a), shape(b)
    return len(left) == len(right) and all(statically_known_true(i == j) for i, j in zip(left, right, strict=True))


def _text(node: fx.Node) -> str:
    return f"({', '.join(str(d) for d in shape(node))})"
