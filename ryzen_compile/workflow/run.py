"""The workflow: setup, train, optimize, validate, test, report; each phase once, until its inputs change."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ryzen_compile.errors import ArtifactError, UsageError
from ryzen_compile.manifest import shown, shown_path
from ryzen_compile.publish import locked
from ryzen_compile.validate.outcome import Outcome
from ryzen_compile.workflow.config import WorkflowConfig
from ryzen_compile.workflow.digests import digest_of, digest_package
from ryzen_compile.workflow.journal import JOURNAL_NAME, Entry, Journal, make_directory
from ryzen_compile.workflow.phase import Place, Step
from ryzen_compile.workflow.phases import optimize, report, setup, suite, training, validation
from ryzen_compile.workflow.report_schema import (
    FINAL_NAME,
    PHASES,
    TESTS_NAME,
    VALIDATION_NAME,
    FinalReport,
    Phase,
    PhaseRecord,
    TestReport,
    ValidationReport,
)

if TYPE_CHECKING:
    from ryzen_compile.timeline import Timeline
    from ryzen_compile.train.loop import Watcher

STEPS = (
    Step("setup", setup.inputs, setup.work),
    Step("train", training.inputs, training.work, training.idle, training.clear),
    Step("optimize", optimize.inputs, optimize.work),
    Step("validate", validation.inputs, validation.work),
    Step("test", suite.inputs, suite.work, suite.idle),
    Step("report", report.inputs, report.work),
)


@dataclass(frozen=True)
class Finished:
    """``records`` of the phases; ``report`` is the final one, none where that phase was not to run. ``outcomes`` are
    the checks of what ran: all of the report's, or those of the only phase."""

    directory: Path
    records: tuple[PhaseRecord, ...]
    report: FinalReport | None
    outcomes: tuple[Outcome, ...] = ()


def run_workflow(
    config: WorkflowConfig,
    *,
    command: str,
    only: Phase | None = None,
    start: Phase | None = None,
    say: Callable[[str], None] = lambda _: None,
    phase: Callable[[PhaseRecord], None] = lambda _: None,
    watcher: Watcher | None = None,
    timeline: Timeline | None = None,
) -> Finished:
    """Runs ``config`` below its output; what an earlier run finished of the same inputs is not repeated.

    ``only`` one phase, from finished ones before it; from ``start`` on everything runs, finished or not. ``say`` hears
    what is being done, ``phase`` of every phase as it ends, ``timeline`` gets a span for each. Interrupted at any
    moment, the next run goes on with the phase that was interrupted, and training within it from its last checkpoint.

    Raises ``BusyError`` while another process works there, ``UsageError`` for phases that exclude each other or whose
    predecessors were not finished, and what a phase raises.
    """
    if only is not None and start is not None:
        raise UsageError("only one phase and all from one on exclude each other", hint="give --only or --from")
    directory = Path(config.output).expanduser()
    _refuse_file(directory)
    make_directory(directory.parent)
    with locked(directory):
        make_directory(directory)
        _refuse_foreign(directory)
        place = Place(config, directory, command, say, watcher, timeline)
        journal = Journal(directory)
        journal.begin()
        for step in STEPS:
            if only is not None and step.phase != only:
                if PHASES.index(step.phase) < PHASES.index(only):
                    _record(place, phase, _finished(step, journal, place))
                continue
            again = start is not None and PHASES.index(step.phase) >= PHASES.index(start)
            _record(place, phase, _run(step, journal, place, again or only == step.phase))
        final = _final(directory) if only in (None, "report") else None
        return Finished(directory, tuple(place.records), final, _outcomes(place, only, final))


def _run(step: Step, journal: Journal, place: Place, again: bool) -> PhaseRecord:
    """Does the phase, unless that was done."""
    inputs = _inputs(step, place)
    entry = None if again else journal.finished(step.phase, inputs)
    if entry is not None:
        return _reused(step, entry)
    if again and journal.finished(step.phase, inputs) is not None:
        step.clear(place)
    journal.forget(step.phase)
    started = time.perf_counter()
    why = step.idle(place)
    outputs: tuple[str, ...] = ()
    if not why:
        span = nullcontext() if place.timeline is None else place.timeline.span(step.phase, track="workflow")
        with span:
            outputs = step.work(place)
    seconds = time.perf_counter() - started
    journal.finish(step.phase, inputs, outputs, seconds, why)
    return PhaseRecord(phase=step.phase, status="skipped" if why else "done", seconds=seconds, reason=why)


def _inputs(step: Step, place: Place) -> str:
    """A digest of all that the phase's result follows from."""
    return digest_of({"package": digest_package(), "phase": step.phase, **step.inputs(place)})


def _finished(step: Step, journal: Journal, place: Place) -> PhaseRecord:
    """A phase before the only one that is to run. Raises ``UsageError`` where it was not finished of these inputs."""
    if why := step.idle(place):
        return PhaseRecord(phase=step.phase, status="skipped", seconds=0, reason=why)
    entry = journal.finished(step.phase, _inputs(step, place))
    if entry is None:
        raise UsageError(
            f"phase {step.phase} was not finished, or its settings, inputs or what it left have changed",
            hint="run without --only first",
        )
    return _reused(step, entry)


def _reused(step: Step, entry: Entry) -> PhaseRecord:
    return PhaseRecord(
        phase=step.phase,
        status="skipped" if entry.skipped else "reused",
        seconds=entry.seconds,
        reason=entry.skipped or "finished before, of the same inputs",
    )


def _record(place: Place, told: Callable[[PhaseRecord], None], record: PhaseRecord) -> None:
    place.records.append(record)
    told(record)


def _refuse_file(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise UsageError(
            f"output {shown_path(directory)} is a file, expected a directory", hint="choose another output"
        )


def _refuse_foreign(directory: Path) -> None:
    """An output that holds somebody's files and no journal is no workflow's."""
    names = [path.name for path in directory.iterdir() if not path.name.startswith(".")]
    if names and JOURNAL_NAME not in names:
        raise ArtifactError(
            f"output {shown_path(directory)} holds {shown(min(names))} and no workflow", hint="choose another output"
        )


def _outcomes(place: Place, only: Phase | None, final: FinalReport | None) -> tuple[Outcome, ...]:
    if final is not None:
        return tuple(check for component in final.components for check in component.checks)
    if only == "validate":
        return ValidationReport.model_validate_json((place.directory / VALIDATION_NAME).read_bytes()).outcomes
    if only == "test" and place.config.tests is not None:
        suite_report = TestReport.model_validate_json((place.directory / TESTS_NAME).read_bytes())
        return (report.tests_outcome(place.config, suite_report),)
    return ()


def _final(directory: Path) -> FinalReport:
    return FinalReport.model_validate_json((directory / FINAL_NAME).read_bytes())
