"""The reports of a workflow, field by field: what ``validate`` and ``run`` write as JSON.

Each file says its ``schema_version``; the JSON Schema of each is ``json_schema(kind)``, and ``docs/reports.md``
explains them to people.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, JsonValue

from ryzen_compile.fields import Fields, Number
from ryzen_compile.graphs.change import PassChange
from ryzen_compile.validate.inference import InferenceReport
from ryzen_compile.validate.measured import Measured
from ryzen_compile.validate.outcome import Component, Outcome, Status

SCHEMA_VERSION: Literal[1] = 1
VALIDATION_NAME = "validation_report.json"
TESTS_NAME = "integration_test_report.json"
FINAL_NAME = "final_report.json"
PHASES = ("setup", "train", "optimize", "validate", "test", "report")
Phase = Literal["setup", "train", "optimize", "validate", "test", "report"]


class Metadata(Fields):
    """Who wrote a report, of what, and where."""

    made_by: str
    written: str = Field(description="ISO 8601, UTC")
    command: str = Field(description="what writes it again")
    model: str = Field(description="what was optimized, as the user called it")
    artifact: str
    machine: str = Field(description="the processor")
    microarchitecture: str
    isa: tuple[str, ...]
    threads: int = Field(ge=1, description="that engines computed with")
    memory_bytes: int = Field(ge=0, description="of the machine")
    system: str
    python: str
    libraries: dict[str, str] = Field(description="versions")


class Summary(Fields):
    """``verdict`` is FAIL when a check failed, WARN when one nearly did, PASS otherwise; SKIPPED when all were."""

    verdict: Status
    counts: dict[Status, int]
    seconds: float = Field(ge=0)


class Text(Fields):
    """What quality was measured on."""

    name: str
    sha256: str
    tokens: int = Field(ge=0, description="that were predicted")


class Point(Fields):
    """One recipe, for the trade of size, speed and quality."""

    recipe: str
    bytes: int = Field(ge=0, description="of weights, as stored")
    kl: Measured = Field(description="nats per token, model || artifact")
    accuracy_loss: Measured
    tokens_per_second: Measured = Field(description="decode")
    chosen: bool = Field(description="the workflow's own")


class EndToEnd(Fields):
    """The whole against its parts, in whole requests. ``parts`` are what each gives alone: the float32 artifact on ONNX
    Runtime's own operators over the model, then each change to that artifact by itself. ``interaction`` is the whole
    over the product of the parts, of requests, first tokens and decoding: 1 where they are independent, below 1 where
    they overlap."""

    speed_up: Measured
    prefill: Measured
    decode: Measured
    parts: dict[str, Measured]
    interaction: dict[str, float]


class ValidationReport(Fields):
    """``validation_report.json``."""

    schema_version: Literal[1] = SCHEMA_VERSION
    metadata: Metadata
    summary: Summary
    outcomes: tuple[Outcome, ...]
    inference: InferenceReport | None
    text: Text | None
    pareto: tuple[Point, ...] = ()
    step_cost: dict[int, dict[int, float]] = Field(
        default_factory=dict, description="tokens in the cache -> tokens of a step -> milliseconds, as tune measured"
    )
    acceptance: dict[int, int] = Field(
        default_factory=dict, description="tokens of a draft that were accepted -> number of drafts"
    )
    end_to_end: EndToEnd | None = None


class TestCase(Fields):
    """One test; ``message`` is the error's, or why it was skipped."""

    name: str
    file: str
    status: Literal["passed", "failed", "error", "skipped"]
    seconds: float = Field(ge=0)
    message: str = ""
    properties: dict[str, JsonValue] = Field(default_factory=dict, description="figures that the test recorded")


class TestReport(Fields):
    """``integration_test_report.json``; ``pass_rate`` counts no skipped tests, and is none where all were."""

    schema_version: Literal[1] = SCHEMA_VERSION
    command: str
    written: str
    seconds: float = Field(ge=0)
    counts: dict[str, int]
    pass_rate: Number | None
    reason: str = Field(default="", description="why no test ran")
    tests: tuple[TestCase, ...]


class PhaseRecord(Fields):
    """``reused`` where an earlier run had finished it, and its inputs have not changed."""

    phase: Phase
    status: Literal["done", "reused", "skipped"]
    seconds: float = Field(ge=0, description="of the run that finished it")
    reason: str = ""


class ComponentVerdict(Fields):
    """All checks of one component: the worst of their verdicts, and the headline of each."""

    component: Component
    status: Status
    checks: tuple[Outcome, ...]


class FinalReport(Fields):
    """``final_report.json``."""

    schema_version: Literal[1] = SCHEMA_VERSION
    metadata: Metadata
    summary: Summary
    phases: tuple[PhaseRecord, ...]
    components: tuple[ComponentVerdict, ...]
    end_to_end: EndToEnd | None
    training: dict[str, Any] | None = Field(description="summary of the training run, if there was one")
    passes: dict[str, Any] = Field(description="report.json of the artifact")
    changes: tuple[PassChange, ...] = Field(description="what each pass changed in the graph")


def json_schema(kind: type[Fields]) -> dict[str, Any]:
    """JSON Schema (2020-12) of a report as it is written."""
    schema = kind.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
