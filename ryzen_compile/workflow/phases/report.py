"""Report: what the other phases found, as one document for machines, one for browsers and one for a pull request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ryzen_compile.errors import ArtifactError
from ryzen_compile.fields import Fields
from ryzen_compile.graphs.change import PassChange
from ryzen_compile.manifest import shown_path
from ryzen_compile.train.metrics_report import read_report
from ryzen_compile.train.metrics_schema import REPORT_NAME as TRAINING_REPORT_NAME
from ryzen_compile.train.metrics_schema import Report as TrainingReport
from ryzen_compile.validate.measured import Measured
from ryzen_compile.validate.outcome import Component, Outcome, Status, judge
from ryzen_compile.workflow.config import TrainPhase, WorkflowConfig
from ryzen_compile.workflow.digests import digest_path
from ryzen_compile.workflow.html.page import render_html
from ryzen_compile.workflow.journal import write_file
from ryzen_compile.workflow.markdown import render_markdown
from ryzen_compile.workflow.metadata import summary, worst
from ryzen_compile.workflow.phase import ARTIFACT_NAME, CHANGES_NAME, TRAINING_NAME, Place
from ryzen_compile.workflow.report_schema import (
    FINAL_NAME,
    TESTS_NAME,
    VALIDATION_NAME,
    ComponentVerdict,
    FinalReport,
    TestReport,
    ValidationReport,
)

HTML_NAME, MARKDOWN_NAME = "report.html", "report.md"
PASSES_NAME = "report.json"  # in the artifact
COMPONENTS: tuple[Component, ...] = (
    *("kernels", "passes", "embedding", "kv_cache", "speculation", "correctness", "end_to_end"),
    "tests",
)
Read = TypeVar("Read", bound=Fields)


def inputs(place: Place) -> Mapping[str, Any]:
    """The other phases' results."""
    names = [VALIDATION_NAME, CHANGES_NAME, f"{ARTIFACT_NAME}/{PASSES_NAME}"]
    names += [] if place.config.tests is None else [TESTS_NAME]
    names += [] if place.config.train is None else [_training_report(place.config.train)]
    return {
        "files": {name: digest_path(place.directory / name) for name in names},
        "thresholds": place.config.validation.thresholds.model_dump(mode="json"),
        "command": place.command,
    }


def work(place: Place) -> tuple[str, ...]:
    """Raises ``ArtifactError`` for a result of another version."""
    place.say("writing reports")
    validation = _read(ValidationReport, place.directory / VALIDATION_NAME)
    tests = _read(TestReport, place.directory / TESTS_NAME) if place.config.tests is not None else None
    training = _training(place)
    if validation is None:
        raise ArtifactError(f"{shown_path(place.directory / VALIDATION_NAME)} is not there", hint="run validate first")
    final = final_report(place, validation, tests, training)
    # The one that machines read first: a page that cannot be made takes nothing else with it.
    write_file(place.directory / FINAL_NAME, final.model_dump_json(indent=1) + "\n")
    write_file(place.directory / MARKDOWN_NAME, render_markdown(final, validation, tests))
    write_file(place.directory / HTML_NAME, render_html(final, validation, tests, training))
    written = (FINAL_NAME, HTML_NAME, MARKDOWN_NAME)
    return written if training is None else (*written, TRAINING_REPORT_NAME)


def final_report(
    place: Place, validation: ValidationReport, tests: TestReport | None, training: TrainingReport | None
) -> FinalReport:
    """The verdict on everything: the checks of validation, and the tests' pass rate."""
    outcomes = [*validation.outcomes, tests_outcome(place.config, tests)]
    seconds = sum(record.seconds for record in place.records)
    return FinalReport(
        metadata=validation.metadata.model_copy(update={"command": place.command}),
        summary=summary(outcomes, seconds),
        phases=tuple(place.records),
        components=_components(outcomes),
        end_to_end=validation.end_to_end,
        training=None if training is None else dict(training.summary),
        passes=_passes(place.artifact),
        changes=_changes(place.directory / CHANGES_NAME),
    )


def _components(outcomes: Sequence[Outcome]) -> tuple[ComponentVerdict, ...]:
    found = []
    for component in COMPONENTS:
        checks = tuple(outcome for outcome in outcomes if outcome.component == component)
        if checks:
            status = worst([check.status for check in checks])
            found.append(ComponentVerdict(component=component, status=status, checks=checks))
    return tuple(found)


def tests_outcome(config: WorkflowConfig, tests: TestReport | None) -> Outcome:
    """The suite as a check."""
    target = config.validation.thresholds.target("test_pass_rate")
    name = "test_pass_rate"
    if tests is None:
        return Outcome(component="tests", check=name, status="SKIPPED", reason="the workflow has no tests")
    if tests.pass_rate is None or target is None:
        reason = tests.reason or "no threshold"
        status: Status = "FAIL" if target is not None else "SKIPPED"  # tests that were asked for and did not run
        return Outcome(component="tests", check=name, status=status, target=target, reason=reason)
    ran = max(1, sum(count for status, count in tests.counts.items() if status != "skipped"))
    measured = Measured(value=tests.pass_rate, unit="share", samples=ran)
    verdict, reason = judge(measured, target)
    failing = [test.name for test in tests.tests if test.status in ("failed", "error")]
    return Outcome(
        component="tests",
        check=name,
        status=verdict,
        measured=measured,
        target=target,
        reason=reason,
        culprit=", ".join(failing) if verdict == "FAIL" else "",
        command=tests.command,
        seconds=tests.seconds,
        details=dict(tests.counts),
    )


def _training(place: Place) -> TrainingReport | None:
    """The run's report, copied to where all reports are."""
    if place.config.train is None:
        return None
    source = place.directory / _training_report(place.config.train)
    report = read_report(source)
    write_file(place.directory / TRAINING_REPORT_NAME, source.read_text(encoding="utf-8"))
    return report


def _training_report(settings: TrainPhase) -> str:
    return f"{TRAINING_NAME}/{settings.mode}/{TRAINING_REPORT_NAME}"


def _passes(artifact: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((artifact / PASSES_NAME).read_text(encoding="utf-8"))
    return found


def _changes(path: Path) -> tuple[PassChange, ...]:
    if not path.exists():
        return ()
    try:
        return tuple(PassChange(**one) for one in json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise _other_version(path, error) from error


def _read(kind: type[Read], path: Path) -> Read | None:
    if not path.exists():
        return None
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise _other_version(path, error) from error


def _other_version(path: Path, error: ValidationError) -> ArtifactError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return ArtifactError(
        f"{shown_path(path)} is no report of this version: {where}: {first['msg']}", hint="run its phase again"
    )
