"""From the records of a run to its report and its table, ``metrics_schema.Report`` and ``COLUMNS``.

The records are read in a stream, twice: once to count them, once to take what the report holds. Figures for the exact
medians go through files that are mapped, not read: memory does not grow with the run.
"""

from __future__ import annotations

import math
import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from pydantic import ValidationError

from ryzen_compile.errors import ArtifactError, ResourceError
from ryzen_compile.manifest import shown, shown_path
from ryzen_compile.train.metrics_schema import (
    COLUMNS,
    CSV_NAME,
    FIGURES,
    LISTED,
    RECORDS_NAME,
    REPORT_NAME,
    SAMPLED_BATCHES,
    SCHEMA_VERSION,
    AnyRecord,
    BatchRecord,
    EventRecord,
    Figure,
    Metadata,
    Report,
    Statistics,
    Totals,
    ValidationRecord,
    parse_record,
)

MAX_REPORT_BYTES = 256 << 20
SECTIONS = {
    "batch": "batches",
    "validation": "validations",
    "epoch": "epochs",
    "event": "events",
    "anomaly": "anomalies",
    "sample": "samples",
}


def write_report(directory: Path, summary: Mapping[str, Any]) -> Path:
    """Makes report and table of ``directory``/metrics.jsonl, each whole or not at all; returns the report's path.

    ``summary`` is JSON. Raises ``ResourceError`` when a file cannot be read or written.
    """
    try:
        with replacing(directory / CSV_NAME) as table:
            report = _build(directory, table, summary)
        with replacing(directory / REPORT_NAME) as stream:
            stream.write(report.model_dump_json(indent=1).encode() + b"\n")
    except OSError as error:
        raise ResourceError(
            f"cannot write the report of {shown_path(directory)}: {error.strerror}", hint="free space, then resume"
        ) from error
    return directory / REPORT_NAME


def read_report(path: str | Path) -> Report:
    """A report, checked. Raises ``ResourceError`` where it cannot be read, ``ArtifactError`` for what is no report or
    one of another schema."""
    path = Path(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_REPORT_BYTES + 1)
    except OSError as error:
        raise ResourceError(f"cannot read {shown_path(path)}: {error.strerror}") from error
    if len(data) > MAX_REPORT_BYTES:
        raise ArtifactError(f"{shown_path(path)} is over the limit of {MAX_REPORT_BYTES} bytes")
    try:
        return Report.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        got = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
        raise ArtifactError(
            f"{shown_path(path)} is no training report of schema {SCHEMA_VERSION}: {where}: {first['msg']}{got}"
        ) from error


def records(path: Path) -> Iterator[tuple[bytes, AnyRecord | None]]:
    """Each line with what it says, none where it is no record."""
    with path.open("rb") as stream:
        for line in stream:
            yield line, parse_record(line)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream that becomes ``path``, durably, at the end of the block, or vanishes with an exception."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)  # noqa: PTH105 - the name of the guarantee
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    with suppress(OSError):  # some systems cannot open a directory; the rename is whole there, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class _Column:
    """One figure of all batch records: finite values go to a file without a name, in which they are sorted."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._count = self._not_finite = 0

    def add(self, value: float | None) -> None:
        if value is None:
            return
        if not math.isfinite(value):
            self._not_finite += 1
            return
        self._count += 1
        self._stream.write(np.float64(value).tobytes())

    def figure(self) -> Figure:
        n = self._count
        if not n:  # an empty file cannot be mapped
            return Figure(count=0, not_finite=self._not_finite, min=None, median=None, mean=None, max=None)
        self._stream.flush()
        values = np.memmap(self._stream, dtype=np.float64, mode="r+", shape=(n,))
        values.sort()  # in place
        middle = (float(values[(n - 1) // 2]) + float(values[n // 2])) / 2
        mean = math.fsum(float(part.mean()) * (len(part) / n) for part in _parts(values))
        return Figure(
            count=n, not_finite=self._not_finite, min=values[0], median=middle, mean=mean, max=values[-1]
        )  # fmt: skip


def _parts(values: np.ndarray) -> Iterator[np.ndarray]:
    return (values[first : first + (1 << 16)] for first in range(0, len(values), 1 << 16))


class _Thinned:
    """At most ``most`` of ``total`` items, evenly, the first and the last among them."""

    def __init__(self, total: int, most: int) -> None:
        kept = min(total, most)
        self._places = {round(i * (total - 1) / max(1, kept - 1)) for i in range(kept)}
        self._seen = 0
        self.items: list[AnyRecord] = []

    def add(self, item: AnyRecord) -> None:
        if self._seen in self._places:
            self.items.append(item)
        self._seen += 1


def _build(directory: Path, table: BinaryIO, summary: Mapping[str, Any]) -> Report:
    path = directory / RECORDS_NAME
    counts = Counter("" if record is None else record.kind for _, record in records(path))
    lists = {kind: _Thinned(counts[kind], SAMPLED_BATCHES if kind == "batch" else LISTED) for kind in SECTIONS}
    anomalies: Counter[str] = Counter()
    run = _Run()
    with ExitStack() as stack:
        columns = {n: _Column(stack.enter_context(tempfile.TemporaryFile(dir=directory))) for n in FIGURES}
        rows = _Table(table)
        for _, record in records(path):
            if record is None:
                continue
            run.add(record)
            lists[record.kind].add(record)
            if record.kind == "anomaly":
                anomalies[record.anomaly] += 1
            elif record.kind == "batch":
                rows.add(record)
                for name, column in columns.items():
                    column.add(getattr(record, name))
        figures = {name: column.figure() for name, column in columns.items()}
    statistics = Statistics(
        records={kind: counts[kind] for kind in lists},
        anomalies=dict(anomalies),
        figures=figures,
        totals=run.totals(),
    )
    listed = {section: lists[kind].items for kind, section in SECTIONS.items()}
    facts = {"metadata": run.metadata(unreadable=counts[""]), "statistics": statistics, "summary": dict(summary)}
    return Report.model_validate({**facts, **listed})


class _Table:
    """``training_metrics.csv``, row by row."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._write(COLUMNS)

    def add(self, record: BatchRecord) -> None:
        self._write(_cell(getattr(record, name)) for name in COLUMNS)

    def _write(self, cells: Iterable[str]) -> None:
        """No cell needs quotes: all are names of fields and numbers."""
        self._stream.write((",".join(cells) + "\n").encode())


class _Run:
    """What holds for the run as a whole."""

    def __init__(self) -> None:
        self._steps = self._tokens = self._resumes = 0
        self._seconds = 0.0
        self._lowest: ValidationRecord | None = None
        self._first = self._last = math.nan

    def add(self, record: AnyRecord) -> None:
        self._steps = max(self._steps, record.step)
        self._first = record.time if math.isnan(self._first) else self._first
        self._last = record.time
        if isinstance(record, BatchRecord):
            self._tokens = record.tokens
            self._seconds += record.batch_seconds if math.isfinite(record.batch_seconds) else 0.0
        elif isinstance(record, EventRecord):
            self._resumes += record.event == "resume"
        elif isinstance(record, ValidationRecord) and record.loss < self._lowest_loss():  # NaN is not
            self._lowest = record

    def _lowest_loss(self) -> float:
        return math.inf if self._lowest is None else self._lowest.loss

    def totals(self) -> Totals:
        lowest = self._lowest
        return Totals(
            steps=self._steps,
            tokens=self._tokens,
            recorded_seconds=self._seconds,
            lowest_validation_loss=None if lowest is None else lowest.loss,
            lowest_validation_step=None if lowest is None else lowest.step,
        )

    def metadata(self, *, unreadable: int) -> Metadata:
        return Metadata(
            made_by=f"ryzen_compile {_version('ryzen-compile')}",
            libraries={name: _version(name) for name in ("torch", "transformers")},
            written=datetime.now(UTC).isoformat(timespec="seconds"),
            first_record=_iso(self._first),
            last_record=_iso(self._last),
            resumes=self._resumes,
            unreadable_lines=unreadable,
            columns=COLUMNS,
        )


def _cell(value: float | None) -> str:
    """The shortest text that is read back as ``value``; what is not finite as in the records."""
    if value is None:
        return ""
    if math.isfinite(value):
        return str(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _iso(seconds: float) -> str | None:
    return None if math.isnan(seconds) else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
