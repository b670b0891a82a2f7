"""What a training run records, and the report made of it: every field, its unit and its meaning. A contrastive run has
pairs where tokens are said.

Records are the lines of ``metrics.jsonl``: strict JSON, one object a line, told apart by ``kind``. Numbers that JSON
lacks are the strings "NaN", "Infinity" and "-Infinity". ``Report`` is ``training_metrics_report.json``
(``report_schema()`` as a JSON Schema), ``COLUMNS`` are those of ``training_metrics.csv``: a row a batch record, an
empty cell where a figure was not measured.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, TypeAdapter, ValidationError

from ryzen_compile.fields import Fields, Number

SCHEMA_VERSION: Literal[1] = 1
RECORDS_NAME = "metrics.jsonl"
REPORT_NAME = "training_metrics_report.json"
CSV_NAME = "training_metrics.csv"
SAMPLED_BATCHES = 200
LISTED = 1000  # of each other kind; ``statistics.records`` tells how many there were
Step = Annotated[int, Field(ge=0, description="steps done; the first step is 1")]


class Record(Fields):
    """A line of ``metrics.jsonl``."""

    step: Step
    time: float = Field(description="when it was written, seconds since 1970 UTC")


class BatchRecord(Record):
    """A step of training."""

    kind: Literal["batch"] = "batch"
    epoch: Number = Field(description="passes over the training text")
    tokens: int = Field(ge=0, description="seen since the run began")
    loss: Number = Field(description="nats per token")
    accuracy: Number | None = Field(description="share of tokens that were the most likely ones")
    learning_rate: Number = Field(description="of this step")
    gradient_norm: Number = Field(description="of all gradients together, before clipping")
    tokens_per_second: Number = Field(description="of this step")
    batch_seconds: Number = Field(description="of this step")
    memory_bytes: int = Field(ge=0, description="in use by the process, or by the device")


class ValidationRecord(Record):
    """The held-out text, or pairs."""

    kind: Literal["validation"] = "validation"
    loss: Number = Field(description="nats per token")
    accuracy: Number | None = Field(description="share of tokens that were the most likely ones")
    depths: dict[str, dict[str, Number]] = Field(
        default={}, description="by the number of first channels: figures of vectors cut to them"
    )


class EpochRecord(Record):
    """An epoch of the controller."""

    kind: Literal["epoch"] = "epoch"
    epoch: int = Field(ge=0, description="of the controller")
    train_loss: Number = Field(description="mean over the epoch, nats per token")
    validation_loss: Number | None = Field(description="nats per token")
    validation_accuracy: Number | None = Field(description="share of tokens that were the most likely ones")
    tokens_per_second: Number = Field(description="over the epoch")
    seconds: Number = Field(description="the epoch took")
    compression_ratio: Number | None = Field(description="float32 bytes over stored bytes, the whole model")
    reconstruction_error: Number | None = Field(description="squared error of the weights over their squares")
    ttft_seconds: Number | None = Field(description="to the first token, exported model")
    decode_tokens_per_second: Number | None = Field(description="exported model")
    speedups: dict[str, Number] = Field(
        description="component or lever: a step's seconds without it over those with it"
    )
    quality: dict[str, Number] = Field(description="component: validation loss with it minus without, nats per token")
    active: tuple[str, ...] = Field(description="components and levers that were on")
    settings: dict[str, JsonValue] = Field(description="their parameters")


class EventRecord(Record):
    """Something that was done: components and levers turned on or off, refusals, resumes."""

    kind: Literal["event"] = "event"
    event: str = Field(min_length=1, description="what")
    facts: dict[str, JsonValue] = Field(description="about it")


class AnomalyRecord(Record):
    """What ``anomalies.AnomalyDetector`` flagged."""

    kind: Literal["anomaly"] = "anomaly"
    anomaly: str = Field(min_length=1, description="loss_spike, not_finite, plateau and so on")
    value: Number = Field(description="what came")
    expected: Number | None = Field(description="what it was held to; null: any finite number")
    message: str = Field(description="both, in a sentence")


class SampleRecord(Record):
    """A text that the model wrote."""

    kind: Literal["sample"] = "sample"
    prompt: str
    text: str = Field(description="what the model went on with")


AnyRecord = BatchRecord | ValidationRecord | EpochRecord | EventRecord | AnomalyRecord | SampleRecord
_RECORD: TypeAdapter[AnyRecord] = TypeAdapter(Annotated[AnyRecord, Field(discriminator="kind")])
FIGURES = (
    "loss",
    "accuracy",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "batch_seconds",
    "memory_bytes",
)
COLUMNS = {  # of the CSV, with their meanings
    name: str(BatchRecord.model_fields[name].description) for name in ("step", "epoch", "tokens", *FIGURES, "time")
}


class Figure(Fields):
    """One of FIGURES over all batch records: of its finite values, none where there are none."""

    count: int = Field(ge=0, description="finite values")
    not_finite: int = Field(ge=0, description="values that were NaN or infinite")
    min: float | None
    median: float | None = Field(description="exact; the mean of the middle two")
    mean: float | None
    max: float | None


class Totals(Fields):
    """Of the whole run, interruptions included."""

    steps: int = Field(ge=0, description="the highest step of any record")
    tokens: int = Field(ge=0, description="seen in training, as of the last batch record")
    recorded_seconds: float = Field(ge=0, description="sum of batch_seconds: of all steps, if all are recorded")
    lowest_validation_loss: float | None
    lowest_validation_step: int | None


class Statistics(Fields):
    """Numbers over all records, whether or not they are listed."""

    records: dict[str, int] = Field(description="how many of each kind")
    anomalies: dict[str, int] = Field(description="how many of each kind")
    figures: dict[str, Figure]
    totals: Totals


class Metadata(Fields):
    """Who wrote the report, of what."""

    made_by: str
    libraries: dict[str, str] = Field(description="versions")
    written: str = Field(description="ISO 8601, UTC")
    first_record: str | None = Field(description="ISO 8601, UTC")
    last_record: str | None = Field(description="ISO 8601, UTC")
    resumes: int = Field(ge=0)
    unreadable_lines: int = Field(ge=0, description="lines of metrics.jsonl that are no records, left out")
    columns: dict[str, str] = Field(description="columns of training_metrics.csv and what they mean")


class Report(Fields):
    """``training_metrics_report.json``. Lists are in the records' order; longer ones (SAMPLED_BATCHES, LISTED) are
    thinned evenly, first and last stay."""

    schema_version: Literal[1] = SCHEMA_VERSION
    metadata: Metadata
    statistics: Statistics
    epochs: tuple[EpochRecord, ...]
    batches: tuple[BatchRecord, ...]
    validations: tuple[ValidationRecord, ...]
    anomalies: tuple[AnomalyRecord, ...]
    events: tuple[EventRecord, ...]
    samples: tuple[SampleRecord, ...]
    summary: dict[str, JsonValue] = Field(description="what the run said of itself at its end")


def report_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a report as it is written."""
    schema = Report.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def parse_record(line: bytes) -> AnyRecord | None:
    """A line of ``metrics.jsonl``; none for one that is torn (without its end) or no record."""
    if not line.endswith(b"\n"):
        return None
    try:
        return _RECORD.validate_json(line)
    except ValidationError:
        return None
