"""The record of a run of passes: what each did, what it left alone and why, and how far the logits moved."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from ryzen_compile.passes.base import Site
from ryzen_compile.spec import ModelSpec

Status = Literal["applied", "unchanged", "rolled back", "unsupported"]


@dataclass(frozen=True)
class Loss:
    """What a lossy pass lost, in the figures of its record; ``text`` says them, with what is allowed."""

    within: bool
    text: str
    kl: float | None = None
    late_kl: float | None = None
    top1: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class PassRecord:
    """One pass. ``rmse`` is the distance of the logits from the float64 model, ``max_error`` the largest one from the
    captured model in float32; both are none where the gate did not run. A lossy pass has ``kl`` (mean, nats per token),
    ``late_kl`` (over the last quarter of a sequence: more than ``kl`` is drift) and ``top1`` (share of tokens whose
    most likely successor stays) instead; that of an encoder has ``cosine``, the mean of 1 - cosine to the vectors
    before it."""

    name: str
    promise: str
    status: Status
    hits: tuple[Site, ...]
    misses: tuple[Site, ...]
    nodes_before: int
    nodes_after: int
    ops: Mapping[str, int]
    seconds: float
    max_error: float | None = None
    rmse: float | None = None
    detail: str = ""
    kl: float | None = None
    late_kl: float | None = None
    top1: float | None = None
    cosine: float | None = None

    @property
    def moved(self) -> str:
        """How far the logits moved, as the tables show it."""
        if self.kl is not None:
            return f"KL {self.kl:.1e}"
        if self.cosine is not None:
            return f"cos {self.cosine:.1e}"
        return "" if self.max_error is None else f"{self.max_error:.1e}"

    @property
    def only_note(self) -> str:
        """What is to be said of the one place that was rewritten; empty where there are more, or none."""
        return self.hits[0].note if len(self.hits) == 1 else ""

    def reasons(self) -> list[tuple[str, int, Site]]:
        """Distinct reasons for leaving an anchor alone, with counts and the first place, most frequent first."""
        counts = Counter(site.note for site in self.misses)
        first = {site.note: site for site in reversed(self.misses)}
        return [(reason, n, first[reason]) for reason, n in counts.most_common()]


@dataclass(frozen=True)
class Report:
    """``captured_ops`` is the histogram before the first pass; ``reference_rmse`` the captured model's own distance in
    float32 from float64, which is what the passes are measured against."""

    spec: ModelSpec
    provenance: Mapping[str, str]
    captured_ops: Mapping[str, int]
    records: tuple[PassRecord, ...]
    reference_rmse: float | None = None
    capture_seconds: float = 0.0
    facts: Mapping[str, object] = field(default_factory=dict)

    def hits(self) -> dict[str, int]:
        return {record.name: len(record.hits) for record in self.records}

    def to_json(self) -> dict:
        return asdict(self)

    def lines(self, *, misses: bool = True) -> list[str]:
        """The table as text, one line a pass; near-misses indented below it."""
        out = [f"{'pass':<22}{'status':<13}{'hits':>5}{'left':>6}{'nodes':>12}{'ms':>8}{'max error':>11}"]
        for r in self.records:
            nodes = f"{r.nodes_before}>{r.nodes_after}"
            counts = f"{len(r.hits):>5}{len(r.misses):>6}{nodes:>12}{r.seconds * 1e3:>8.0f}"
            out.append(f"{r.name:<22}{r.status:<13}{counts}{r.moved:>11}")
            out.extend(f"    {line}" for line in (r.detail, r.only_note) if line)
            if misses:
                out.extend(f"    {n} x {reason}  [{site.module or site.node}]" for reason, n, site in r.reasons())
        before, after = self.captured_ops, self.records[-1].ops if self.records else self.captured_ops
        out.append("")
        out.append("operators before: " + _histogram(before))
        out.append("operators after:  " + _histogram(after))
        return out

    def to_text(self, *, misses: bool = True) -> str:
        return "\n".join(self.lines(misses=misses)) + "\n"

    def to_markdown(self) -> str:
        rows = ["| pass | status | hits | left alone | nodes | ms | max error |", "|---|---|---:|---:|---:|---:|---:|"]
        rows += [
            f"| {r.name} | {r.status} | {len(r.hits)} | {len(r.misses)} | {r.nodes_before} → {r.nodes_after} "
            f"| {r.seconds * 1e3:.0f} | {r.moved} |"
            for r in self.records
        ]
        reasons = [
            f"- **{r.name}**: {n} × {reason} (`{site.module or site.node}`)"
            for r in self.records
            for reason, n, site in r.reasons()
        ]
        title = f"# {self.spec.architecture}: {self.spec.parameters:,} parameters\n\n"
        details = [f"- **{r.name}** {r.status}: {r.detail}" for r in self.records if r.detail]
        notes = [f"- **{r.name}**: {r.only_note}" for r in self.records if r.only_note]
        done = "\n\n## Done\n\n" + "\n".join(notes) if notes else ""
        undone = "\n\n## Undone, and why\n\n" + "\n".join(details) if details else ""
        left = "\n\n## Left alone, and why\n\n" + "\n".join(reasons) if reasons else ""
        return title + "\n".join(rows) + done + undone + left + "\n"

    def to_html(self) -> str:
        """A page without scripts or links, so that it opens anywhere and can be attached to anything."""
        rows = []
        for r in self.records:
            cells = (r.name, r.status, len(r.hits), len(r.misses), f"{r.nodes_before} → {r.nodes_after}",
                     f"{r.seconds * 1e3:.0f}", r.moved)  # fmt: skip
            rows.append("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>")
            notes = [f"{n} × {reason}  ({site.module or site.node})" for reason, n, site in r.reasons()]
            why = [line for line in (r.only_note, r.detail) if line] + notes
            rows.extend(f'<tr class="why"><td></td><td colspan="6">{html.escape(note)}</td></tr>' for note in why)
        facts = {**self.provenance, **self.facts}
        listed = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
        return _PAGE.format(
            title=html.escape(self.spec.architecture),
            parameters=f"{self.spec.parameters:,}",
            rows="\n".join(rows),
            before=html.escape(_histogram(self.captured_ops)),
            after=html.escape(_histogram(self.records[-1].ops if self.records else self.captured_ops)),
            facts=listed,
        )


def _histogram(ops: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(ops.items(), key=lambda item: (-item[1], item[0])))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>ryzen_compile: {title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ padding: .25rem .6rem; border-bottom: 1px solid #8884; text-align: right; vertical-align: top; }}
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) {{ text-align: left; }}
.why td {{ text-align: left; color: #777; border: 0; font-size: 13px; }}
code, .ops {{ font-family: ui-monospace, monospace; font-size: 13px; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: 13px; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
</style></head><body>
<h1>{title}</h1><p>{parameters} parameters</p>
<table><thead><tr><th>pass</th><th>status</th><th>hits</th><th>left alone</th><th>nodes</th><th>ms</th>
<th>max error</th></tr></thead>
<tbody>
{rows}
</tbody></table>
<h2>Operators</h2><p class="ops">before: {before}</p><p class="ops">after: {after}</p>
<h2>Provenance</h2><dl>{facts}</dl>
</body></html>
"""
