"""The record of an artifact's passes (its ``report.json``), read into rows for tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PassRow:
    """One pass. ``moved`` says how far the logits moved; ``notes`` what it did or why it was undone; ``reasons`` are
    (how often, why a place was left alone, the first such place), the most frequent first."""

    name: str
    promise: str
    status: str
    hits: int
    left: int
    nodes_before: int
    nodes_after: int
    milliseconds: float
    moved: str
    notes: tuple[str, ...]
    reasons: tuple[tuple[int, str, str], ...]


def pass_rows(passes: Mapping[str, Any]) -> list[PassRow]:
    """``passes`` is ``Report.to_json()`` as JSON; one without records has no rows."""
    return [_row(record) for record in passes.get("records", ())]


def _row(record: Mapping[str, Any]) -> PassRow:
    hits, misses = record.get("hits", ()), record.get("misses", ())
    only = str(hits[0].get("note", "")) if len(hits) == 1 else ""
    return PassRow(
        name=str(record.get("name", "")),
        promise=str(record.get("promise", "")),
        status=str(record.get("status", "")),
        hits=len(hits),
        left=len(misses),
        nodes_before=int(record.get("nodes_before", 0)),
        nodes_after=int(record.get("nodes_after", 0)),
        milliseconds=1e3 * float(record.get("seconds", 0)),
        moved=_moved(record),
        notes=tuple(note for note in (str(record.get("detail", "")), only) if note),
        reasons=_reasons(misses),
    )


def _moved(record: Mapping[str, Any]) -> str:
    """A lossy pass is judged by divergence and agreement, an exact one by the largest error of a logit."""
    divergence, error, agreement = record.get("kl"), record.get("max_error"), record.get("top1")
    if divergence is not None:
        return f"KL {_brief(divergence)}" + (f", top-1 {float(agreement):.1%}" if agreement is not None else "")
    return "" if error is None else _brief(error)


def _brief(value: Any) -> str:
    return f"{float(value):.1e}" if float(value) else "0"


def _reasons(misses: Any) -> tuple[tuple[int, str, str], ...]:
    counts = Counter(str(site.get("note", "")) for site in misses)
    first = {str(site.get("note", "")): str(site.get("module") or site.get("node", "")) for site in reversed(misses)}
    return tuple((times, reason, first[reason]) for reason, times in counts.most_common())
