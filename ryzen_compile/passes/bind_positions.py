"""A table read by counting tokens becomes a table read at ``position_ids``.

After canonicalize, before fuse_rotary. A plain decoder adds ``wpe(arange(T))`` or ``table[:T]`` to its embeddings:
right for a whole sequence, wrong for the one token that follows a cached prompt. Such a tensor ``g`` depends on nothing
but the number of tokens, and its row ``t`` is the same however many follow:

    g_T[t] = table[t]     ->     embedding(table, position_ids)

with the table filled for the whole context. Rotary angles and masks are left for the passes that read them whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ryzen_compile.edit import Edit
from ryzen_compile.passes.base import NoMatch, RewritePass
from ryzen_compile.probe import Probe
from ryzen_compile.program import Program, shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Match:
    """``add`` reads ``counted``, whose rows are ``table`` (N, C)."""

    add: fx.Node
    counted: fx.Node
    table: Tensor


class BindPositions(RewritePass[Match]):
    """``x + table[:T]``  ->  ``x + embedding(table, position_ids)``."""

    name: ClassVar[str] = "bind_positions"
    anchors = (aten.add.Tensor,)

    def match(self, add: fx.Node, program: Program) -> Match | NoMatch | None:
        left, right = add.args[0], add.args[1]
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return None
        probe = Probe(program)
        counted, x = (left, right) if left in probe.of_positions else (right, left)
        if counted not in probe.of_positions or x not in probe.of_tokens:
            return None
        if probe.positions is None or _reads(counted, probe.positions):
            return NoMatch("already reads position_ids", counted)
        if len(shape(x)) != 3 or len(shape(counted)) not in (2, 3):
            return NoMatch(f"adds {shape(counted)} to {shape(x)}, expected (T, C) or (1, T, C) to (B, T, C)", add)
        context = program.spec.context
        table = _rows(probe, counted, context)
        short = max(context // 2, 1)
        fewer = _rows(probe, counted, short)
        if table is None or fewer is None or not torch.equal(fewer, table[:short]):
            return NoMatch("a row depends on how many tokens there are", counted)
        return Match(add, counted, table)

    def rewrite(self, edit: Edit, m: Match) -> None:
        table = edit.add_constant("position_table", m.table)
        positions = edit.program.input("position_ids")
        rows = edit.call(aten.embedding.default, table, positions, before=m.add)
        edit.swap_argument(m.add, m.counted, rows)


def _rows(probe: Probe, counted: fx.Node, tokens: int) -> Tensor | None:
    value = probe.evaluate(counted, {}, tokens)
    value = value[0] if value.ndim == 3 and value.shape[0] == 1 else value
    return value.contiguous() if value.ndim == 2 and value.shape[0] == tokens else None


def _reads(node: fx.Node, source: fx.Node) -> bool:
    pending, seen = [node], set()
    while pending:
        at = pending.pop()
        if at is source:
            return True
        if at not in seen:
            seen.add(at)
            pending.extend(at.all_input_nodes)
    return False
