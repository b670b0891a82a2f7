"""What a pass changed in the graph: operators counted, lines compared, the first place drawn.

``ChangeRecorder`` is an observer for ``run_passes``: it looks at the graph before and after each pass and keeps text,
no Programs, so it can outlive the model.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from ryzen_compile.fields import Fields
from ryzen_compile.graphs.site import SmallGraph, SmallNode, first_site
from ryzen_compile.graphs.text import Names, canonical_text, names_of
from ryzen_compile.graphs.view import GraphView

if TYPE_CHECKING:  # records of changes are read where there is no torch
    from ryzen_compile.program import Program
    from ryzen_compile.report import PassRecord

__all__ = ["ChangeRecorder", "PassChange", "SmallGraph", "SmallNode", "changes_between", "operator_changes"]

CONTEXT = 2
MAX_LINES = 200
_State = tuple[GraphView, Names]


class PassChange(Fields):
    """``diff`` is a unified diff of the canonical texts without its two lines of file names; empty where the pass did
    nothing."""

    name: str
    status: str = Field(description="of the pass's record: applied, unchanged, rolled back, unsupported")
    operators: dict[str, int] = Field(description="operators that became more or fewer, by how many")
    diff: tuple[str, ...]
    diff_omitted: int = Field(default=0, ge=0, description="lines of the diff that were left out at its end")
    graph: SmallGraph | None = Field(default=None, description="the first place that was changed")


def changes_between(name: str, status: str, before: Program, after: Program) -> PassChange:
    """What the pass ``name``, whose record says ``status``, changed from ``before`` to ``after``."""
    recorder = ChangeRecorder()
    recorder.compare(name, status, before, after)
    return recorder.changes[0]


class ChangeRecorder:
    """Observes a run of passes; ``changes`` holds one entry for each pass so far."""

    def __init__(self) -> None:
        self.changes: list[PassChange] = []
        self._last: _State | None = None

    def __call__(self, record: PassRecord, before: Program, after: Program) -> None:
        self.compare(record.name, record.status, before, after)

    def compare(self, name: str, status: str, before: Program, after: Program) -> None:
        """Appends what changed from ``before`` to ``after``. Nodes keep their names through all of a run, so that
        each diff goes on where the one before it ended."""
        from ryzen_compile.graphs.program_view import view_program

        view = view_program(before)
        old = (view, names_of(view, self._last))
        view = view if after is before else view_program(after)
        new = (view, names_of(view, old))
        self.changes.append(_change(name, status, old, new))
        self._last = new


def operator_changes(before: GraphView, after: GraphView) -> dict[str, int]:
    """How many more (or, negative, fewer) nodes of each operator ``after`` has, by name; equal numbers are left out."""
    counts = Counter(node.op for node in after.nodes)
    counts.subtract(Counter(node.op for node in before.nodes))
    return {op: count for op, count in sorted(counts.items()) if count}


def _change(name: str, status: str, old: _State, new: _State) -> PassChange:
    lines = list(difflib.unified_diff(canonical_text(*old), canonical_text(*new), n=CONTEXT, lineterm=""))[2:]
    kept = _kept(lines)
    return PassChange(
        name=name,
        status=status,
        operators=operator_changes(old[0], new[0]),
        diff=tuple(lines[:kept]),
        diff_omitted=len(lines) - kept,
        graph=first_site(old[0], new[0], old[1], new[1]),
    )


def _kept(lines: Sequence[str]) -> int:
    """How many lines of a diff are kept: whole hunks up to the limit, unless these are less than half of it.

    Texts list layer by layer, so what is kept shows the first ones, and the others are like these.
    """
    if len(lines) <= MAX_LINES:
        return len(lines)
    starts = [i for i, line in enumerate(lines[: MAX_LINES + 1]) if line.startswith("@@")]
    return starts[-1] if starts[-1] >= MAX_LINES // 2 else MAX_LINES
