"""What a training run measures, written down as it goes.

``DIRECTORY/metrics.jsonl`` gets a line a record, at once and whole: a run that is killed loses one line at most. Each
has "kind", "step" (steps done, 1 after the first) and "time" (seconds since 1970 UTC), and by its kind:

    batch       epoch, tokens, loss, accuracy, learning_rate, gradient_norm, tokens_per_second, batch_seconds,
                memory_bytes: the fields of ``BatchMetrics``
    validation  loss, accuracy, depths
    epoch       the fields of ``EpochMetrics``
    event       event (what), facts (about it); "resume" has from_step, dropped and unreadable (lines)
    anomaly     anomaly (its kind), value, expected, message
    sample      prompt, text

At the end, ``DIRECTORY/training_metrics_report.json`` is made of it (schema_version, metadata, statistics, epochs,
batches, validations, anomalies, events, samples, summary) and ``DIRECTORY/training_metrics.csv`` (a row a batch
record). Units and meanings of all fields are in ``metrics_schema``.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from ryzen_compile.errors import ResourceError, UsageError
from ryzen_compile.manifest import shown, shown_path
from ryzen_compile.train.anomalies import Anomaly, AnomalyDetector
from ryzen_compile.train.config import MetricsSettings
from ryzen_compile.train.metrics_report import records, replacing, write_report
from ryzen_compile.train.metrics_schema import (
    RECORDS_NAME,
    AnomalyRecord,
    BatchRecord,
    EpochRecord,
    EventRecord,
    Record,
    SampleRecord,
    ValidationRecord,
)
from ryzen_compile.train.trackers import open_trackers


@dataclass(frozen=True)
class BatchMetrics:
    """A step of the optimizer, ``step`` counted from 1.

    ``epoch``: passes over the text; ``tokens``: seen in total; ``loss``: nats per token, of this step; ``accuracy``:
    share of tokens that were the most likely ones; ``gradient_norm``: before clipping; ``memory_bytes``: in use.
    """

    step: int
    epoch: float
    tokens: int
    loss: float
    accuracy: float | None
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    batch_seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class EpochMetrics:
    """An epoch of the controller, which ended after ``step``.

    ``speedups``: for a component or lever, a step's seconds without it over those with it; ``quality``: for a
    component, validation loss with it minus without (nats per token); ``active``: what was on; ``settings``: its
    parameters, JSON. Compression and error are of the weights as an export would store them; time to the first token
    and decode speed are the exported model's. None is not measured.
    """

    epoch: int
    step: int
    train_loss: float
    validation_loss: float | None
    validation_accuracy: float | None
    tokens_per_second: float
    seconds: float
    compression_ratio: float | None = None
    reconstruction_error: float | None = None
    ttft_seconds: float | None = None
    decode_tokens_per_second: float | None = None
    speedups: Mapping[str, float] = field(default_factory=dict)
    quality: Mapping[str, float] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


class MetricsCollector:
    """Writes a run's records into ``directory``, which is made if it is not there; for one process of a run.

    ``resume_step`` is the step that a resumed run goes on from, 0 to begin again: records of later steps are dropped,
    and lines that are none. Without it the directory may not hold records.

    Raises ``UsageError`` where it does, ``ConfigError`` for a tracker whose library is missing, ``ResourceError`` when
    something cannot be written. The methods raise ``UsageError`` for what cannot be recorded.
    """

    def __init__(self, directory: str | Path, settings: MetricsSettings, *, resume_step: int | None = None) -> None:
        self._directory = Path(directory)
        self._settings = settings
        self._path = self._directory / RECORDS_NAME
        self._detector = AnomalyDetector(settings.window)
        self._stream: io.FileIO | None = None
        with self._written():
            self._directory.mkdir(parents=True, exist_ok=True)
            dropped = self._prepare(resume_step)
            # Unbuffered: each record is one write of the system.
            self._stream = self._path.open("ab", buffering=0)
        try:
            name = self._directory.resolve().name
            self._trackers = open_trackers(settings.trackers, self._directory, name, resume_step)
            if resume_step is not None:
                self.event(resume_step, "resume", from_step=resume_step, **dropped)
        except BaseException:
            self._stream.close()
            raise

    def batch(self, metrics: BatchMetrics) -> list[Anomaly]:
        """Records a step if it is due (``settings.every``; the first step, and one that is not finite, always are), and
        returns what looks wrong with it."""
        finite = math.isfinite(metrics.loss) and math.isfinite(metrics.gradient_norm)
        if finite and metrics.step > 1 and metrics.step % self._settings.every:
            return []
        self._write(_record(BatchRecord, **asdict(metrics)))
        self._track("train", metrics.step, asdict(metrics))
        return self._flagged(self._detector.observe(metrics))

    def validation(
        self,
        step: int,
        loss: float,
        accuracy: float | None,
        depths: Mapping[int, Mapping[str, float]] = MappingProxyType({}),
    ) -> list[Anomaly]:
        """Records the loss (nats per token) and accuracy on the validation text after ``step``, and what
        ``retention`` measured at each of ``depths``."""
        figures = {str(dim): dict(values) for dim, values in depths.items()}
        self._write(_record(ValidationRecord, step=step, loss=loss, accuracy=accuracy, depths=figures))
        self._track("validation", step, {"loss": loss, "accuracy": accuracy})
        for dim, values in figures.items():
            self._track(f"validation/{dim}", step, values)
        return self._flagged(self._detector.validation(step, loss, accuracy))

    def epoch(self, metrics: EpochMetrics) -> None:
        """Records an epoch of the controller."""
        values = {name: getattr(metrics, name) for name in EpochMetrics.__dataclass_fields__}
        self._write(_record(EpochRecord, **{**values, "settings": _plain("settings", metrics.settings)}))
        self._track("epoch", metrics.step, values)
        for group in ("speedups", "quality"):
            self._track(f"epoch/{group}", metrics.step, values[group])

    def event(self, step: int, kind: str, /, **facts: Any) -> None:
        """Records what was done after ``step``; ``facts`` are JSON."""
        self._write(_record(EventRecord, step=step, event=kind, facts=_plain("facts", facts)))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Records ``text``, what the model went on with after ``prompt``."""
        # JSON has no lone surrogates, which a prompt from the command line may hold.
        prompt, text = (part.encode(errors="replace").decode() for part in (prompt, text))
        self._write(_record(SampleRecord, step=step, prompt=prompt, text=text))

    def state(self) -> dict[str, Any]:
        """JSON: what ``restore`` needs in a resumed run to flag what an uninterrupted one would have flagged."""
        return self._detector.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over a ``state``. Raises ``ArtifactError`` if it is damaged."""
        self._detector.restore(state)

    def finish(self, summary: Mapping[str, Any]) -> Path:
        """Closes the records, writes report and table, and returns the report's path; ``summary`` is JSON."""
        plain = _plain("summary", summary)
        self.close()
        return write_report(self._directory, plain)

    def close(self) -> None:
        """Closes records and trackers, for a run that ends without a report. Again, it does nothing."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            self._trackers.close()

    def _flagged(self, found: list[Anomaly]) -> list[Anomaly]:
        for anomaly in found:
            values = {**asdict(anomaly), "anomaly": anomaly.kind}
            del values["kind"]
            self._write(_record(AnomalyRecord, **values))
        return found

    def _track(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        figures = {f"{group}/{n}": float(v) for n, v in values.items() if isinstance(v, (int, float)) and n != "step"}
        if figures:
            self._trackers.log(step, figures)

    def _write(self, record: Record) -> None:
        if self._stream is None:
            raise UsageError(f"{shown_path(self._path)} is closed, nothing can be recorded any more")
        line = record.model_dump_json().encode() + b"\n"
        with self._written():
            written = self._stream.write(line)
        if written != len(line):
            part = f"{written} of {len(line)} bytes"
            raise ResourceError(
                f"cannot write {shown_path(self._path)}: only {part} fit", hint="free space, then resume"
            )

    def _prepare(self, resume_step: int | None) -> dict[str, int]:
        """Leaves records that a run can go on from; how many lines were dropped, and how many were no records."""
        if not self._path.exists():
            return {"dropped": 0, "unreadable": 0}
        if resume_step is None:
            if self._path.stat().st_size:
                raise UsageError(
                    f"{shown_path(self._path)} holds the records of another run",
                    hint="resume it, or choose another output",
                )
            return {"dropped": 0, "unreadable": 0}
        dropped = unreadable = 0
        with replacing(self._path) as kept:
            for line, record in records(self._path):
                if record is None:
                    unreadable += 1
                elif record.step > resume_step:
                    dropped += 1
                else:
                    kept.write(line)
        return {"dropped": dropped, "unreadable": unreadable}

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceError(f"cannot write {shown_path(self._path)}: {error.strerror}") from error


def _record(kind: type[Record], **values: Any) -> Record:
    try:
        return kind(time=time.time(), **values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{where} cannot be recorded: {first['msg']}, got {shown(first['input'])}") from error


def _plain(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` with lists for tuples, text for paths and so on."""
    try:
        return to_jsonable_python(dict(value))
    except PydanticSerializationError as error:
        raise UsageError(f"{name} cannot be recorded: {error}", hint="expected JSON") from error
