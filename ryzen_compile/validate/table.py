"""llama-bench's table, so that rows can stand beside those of other engines: Markdown, CSV, JSON or JSON Lines.

JSON keeps every sample under llama-bench's field names; the other forms keep mean and standard deviation.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ryzen_compile.errors import UsageError
from ryzen_compile.validate.latency import Timing

Form = Literal["md", "csv", "json", "jsonl"]
COLUMNS = ("model", "size", "params", "backend", "threads", "test", "t/s")
_LEFT_ALIGNED = {"model", "backend"}


@dataclass(frozen=True)
class Row:
    """One line: a timing and what it was measured on. ``size_bytes`` is the weights as they are stored; ``facts`` are
    scalars that a record says besides."""

    model: str
    size_bytes: int
    parameters: int
    threads: int
    timing: Timing
    facts: Mapping[str, Any] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        """The text of each of :data:`COLUMNS`."""
        return (
            self.model,
            human_size(self.size_bytes),
            human_count(self.parameters),
            self.timing.engine,
            str(self.threads),
            self.timing.workload.name,
            f"{self.timing.mean:.2f} ± {self.timing.sd:.2f}",
        )

    def record(self) -> dict[str, Any]:
        """llama-bench's fields; times are in nanoseconds, rates in tokens per second."""
        timing, workload = self.timing, self.timing.workload
        nanoseconds = [round(seconds * 1e9) for seconds in timing.seconds]
        return {
            "model": self.model,
            "model_size": self.size_bytes,
            "model_n_params": self.parameters,
            "backend": timing.engine,
            "n_threads": self.threads,
            "test": workload.name,
            "n_prompt": workload.tokens if workload.kind == "pp" else 0,
            "n_gen": workload.tokens if workload.kind == "tg" else 0,
            "n_depth": workload.depth,
            "avg_ns": round(statistics.fmean(nanoseconds)),
            "stddev_ns": round(statistics.stdev(nanoseconds)) if len(nanoseconds) > 1 else 0,
            "avg_ts": timing.mean,
            "stddev_ts": timing.sd,
            "samples_ns": nanoseconds,
            "samples_ts": list(timing.rates),
            **self.facts,
        }


def render(rows: Sequence[Row], form: Form = "md", *, extra: Mapping[str, Any] | None = None) -> str:
    """The rows as text without a final newline.

    ``extra`` (machine, versions) joins each JSON and JSON Lines record; a name that a record already has raises
    ``UsageError``, as does an unknown ``form``.
    """
    if form not in get_args(Form):
        raise UsageError(f"unknown table form {form!r}", hint=f"one of {', '.join(get_args(Form))}")
    if form == "md":
        return _markdown([row.cells() for row in rows])
    records = [row.record() for row in rows]
    if form == "csv":
        return _csv(records)
    for record in records:
        clash = record.keys() & (extra or {}).keys()
        if clash:
            raise UsageError(f"extra fields {sorted(clash)} would hide measured ones")
        record.update(extra or {})
    if form == "jsonl":
        return "\n".join(json.dumps(record) for record in records)
    return json.dumps(records, indent=2)


def human_size(count: int) -> str:
    """``2.05 GiB``, and MiB below one GiB, as llama-bench prints sizes."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def human_count(count: int) -> str:
    """``1.10 B``, and M below one billion, as llama-bench prints parameter counts."""
    return f"{count / 1e9:.2f} B" if count >= 10**9 else f"{count / 1e6:.2f} M"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    # A bar in a model's name would open another column.
    table = [COLUMNS, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if name in _LEFT_ALIGNED else cell.rjust(width)
            for cell, width, name in zip(row, widths, COLUMNS, strict=True)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    rule = [
        "-" * width if name in _LEFT_ALIGNED else "-" * (width - 1) + ":"
        for width, name in zip(widths, COLUMNS, strict=True)
    ]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(lines)


def _csv(records: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    flat = [{name: value for name, value in record.items() if not isinstance(value, list)} for record in records]
    if flat:
        # A row without another one's facts has empty fields.
        names = dict.fromkeys(name for record in flat for name in record)
        writer = csv.DictWriter(out, fieldnames=list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    return out.getvalue().rstrip("\n")
