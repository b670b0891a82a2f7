"""What the page shows of each pass: its row, and what it changed in the graph."""

from __future__ import annotations

import html
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ryzen_compile.graphs.change import PassChange
from ryzen_compile.workflow.html.drawing import draw_graph
from ryzen_compile.workflow.pass_rows import PassRow

LINE_LENGTH = 300  # characters of a diff's line; what is longer is a list of constants
DIFFS_LENGTH = 1_200_000  # characters of all diffs, as the page holds them: it has to open in a mail program, too
DIFF_LENGTH = 50_000  # of one
_KINDS = {"+": "in", "-": "out", "@": "place"}


@dataclass(frozen=True)
class PassView:
    """``operators`` are (name, how many more or fewer), those with the largest change first; ``diff`` is
    (kind of line, line); ``drawing`` an ``<svg>`` or empty, ``cut`` how many nodes of the place it leaves out."""

    row: PassRow
    operators: tuple[tuple[str, int], ...] = ()
    diff: tuple[tuple[str, str], ...] = ()
    omitted: int = 0
    drawing: str = ""
    cut: int = 0

    @property
    def has_details(self) -> bool:
        return bool(self.operators or self.diff or self.drawing or self.row.notes or self.row.reasons)


def pass_views(rows: Sequence[PassRow], changes: Sequence[PassChange]) -> list[PassView]:
    """One for each row, in order, with the change of the same name (the n-th of a name belongs to the n-th row of it),
    then one for each change without a row."""
    waiting: dict[str, deque[PassChange]] = defaultdict(deque)
    for change in changes:
        waiting[change.name].append(change)
    room = min(DIFF_LENGTH, DIFFS_LENGTH // max(len(changes), 1))
    views = [_view(row, waiting[row.name].popleft() if waiting[row.name] else None, room) for row in rows]
    left = {id(change) for queue in waiting.values() for change in queue}
    return views + [_view(_only_change(change), change, room) for change in changes if id(change) in left]


def _view(row: PassRow, change: PassChange | None, room: int) -> PassView:
    if change is None:
        return PassView(row)
    lines = _fitting([_cut(line) for line in change.diff], room)
    return PassView(
        row=row,
        operators=tuple(sorted(change.operators.items(), key=lambda item: (-abs(item[1]), item[0]))),
        diff=tuple((_KINDS.get(line[:1], ""), line) for line in lines),
        omitted=change.diff_omitted + len(change.diff) - len(lines),
        drawing=draw_graph(change.graph, f"What {row.name} changed first") if change.graph is not None else "",
        cut=change.graph.cut if change.graph is not None else 0,
    )


def _only_change(change: PassChange) -> PassRow:
    return PassRow(change.name, "", change.status, 0, 0, 0, 0, 0.0, "", (), ())


def _fitting(lines: Sequence[str], room: int) -> list[str]:
    """The first lines that take no more than ``room`` characters of a page."""
    totals = accumulate(len(html.escape(line)) for line in lines)
    return [line for line, total in zip(lines, totals, strict=True) if total <= room]


def _cut(line: str) -> str:
    return line if len(line) <= LINE_LENGTH else line[: LINE_LENGTH - 1] + "\u2026"
