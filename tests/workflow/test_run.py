"""The workflow's mechanics: what runs, in which order, and that no interruption loses what was finished."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile.api import load
from ryzen_compile.errors import ModelError, UsageError
from ryzen_compile.timeline import Timeline
from ryzen_compile.workflow import run
from ryzen_compile.workflow.journal import JOURNAL_NAME, Journal
from ryzen_compile.workflow.phase import ARTIFACT_NAME, SETUP_NAME, Place
from ryzen_compile.workflow.report_schema import (
    FINAL_NAME,
    PHASES,
    TESTS_NAME,
    VALIDATION_NAME,
    FinalReport,
    PhaseRecord,
    ValidationReport,
)
from ryzen_compile.workflow.run import run_workflow
from tests.workflow.tiny_workflow import (
    COMMAND,
    IDLE,
    MADE,
    MEASURED,
    MODEL,
    WORKING,
    WRITES,
    config,
    copied,
    expected,
    finished_workflow,
    journal_phases,
    nothing_runs,
    replayed,
    statuses,
    times,
)

SECONDS = 300  # that a child may take on a busy machine; none is meant to


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_workflow(tmp_path_factory)


# --- a whole run, and the one behind it -------------------------------------------------------------------------------
def test_a_whole_run_leaves_everything(finished: Path) -> None:
    names = {JOURNAL_NAME, *(name for written in WRITES.values() for name in written)} - {TESTS_NAME}
    assert {path.name for path in finished.iterdir()} == names
    report = FinalReport.model_validate_json((finished / FINAL_NAME).read_bytes())
    validation = ValidationReport.model_validate_json((finished / VALIDATION_NAME).read_bytes())
    assert statuses(report) == {phase: IDLE.get(phase, "done") for phase in PHASES[:-1]}  # it does not tell of itself
    assert all(record.seconds > 0 for record in report.phases if record.status == "done")
    assert report.summary.verdict == "PASS"
    assert [check for part in report.components[:-1] for check in part.checks] == list(validation.outcomes)
    assert report.components[-1].component == "tests" and report.components[-1].status == "SKIPPED"
    assert (report.metadata.command, report.metadata.model) == (COMMAND, str(MODEL))
    assert report.training is None and report.end_to_end is None
    assert [change.name for change in report.changes] == [record["name"] for record in report.passes["records"]]
    with load(finished / ARTIFACT_NAME) as model:
        assert model.generate([1, 2, 3], max_new_tokens=2).shape[-1] >= 2


def test_setup_says_what_the_machine_is(finished: Path) -> None:
    """Read by people who were sent a report: machine, checks, and the model as it was called."""
    facts = json.loads((finished / SETUP_NAME).read_text())
    assert {check["name"] for check in facts["checks"]} == {"processor", "memory", "libraries", "onnxruntime"}
    assert facts["machine"]["cpu"]["name"] and facts["model"] == str(MODEL)


def test_a_second_run_repeats_nothing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = copied(finished, tmp_path / "out")
    before = times(output)
    assert before == times(finished)
    nothing_runs(monkeypatch)
    said: list[str] = []
    records: list[PhaseRecord] = []
    timeline = Timeline()
    again = run_workflow(config(output), command=COMMAND, say=said.append, phase=records.append, timeline=timeline)
    assert statuses(again) == expected([]) and said == []
    assert again.records == tuple(records) and again.directory == output
    assert times(output) == before
    assert again.report == FinalReport.model_validate_json((finished / FINAL_NAME).read_bytes())
    assert {record.phase: record.seconds for record in records if record.status == "reused"} == {
        phase: entry["seconds"]
        for phase, entry in json.loads((output / JOURNAL_NAME).read_text())["phases"].items()
        if phase in WORKING
    }


def test_a_run_elsewhere_is_another_one(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of all that is reused: without a journal everything runs, in the order of the phases."""
    ran = replayed(monkeypatch, finished)
    assert statuses(run_workflow(config(tmp_path / "deep" / "out"), command=COMMAND)) == expected(WORKING)
    assert ran == list(WORKING)


def interrupting(at: str) -> Callable[[str], None]:
    """Listens to what is said, and stops at the first line that begins with ``at``."""

    def say(text: str) -> None:
        if text.startswith(at):
            raise KeyboardInterrupt

    return say


# --- interruptions ----------------------------------------------------------------------------------------------------
MOMENTS = {
    "setup": "model ",  # the machine was read, nothing is written
    "optimize": "pass merge_linear",  # in the middle of the passes
    "validate": "requests on both models",  # operators were measured
    "report": "writing reports",
}


@pytest.mark.parametrize("phase", MOMENTS)
def test_an_interruption_loses_nothing_that_was_finished(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Stopped from the keyboard in the middle of a phase's own work, with what stands before it from a finished run."""
    output = copied(finished, tmp_path / "out")
    journal = Journal(output)
    behind = PHASES[PHASES.index(phase) :]
    for name in behind:
        journal.forget(name)
        for written in WRITES.get(name, ()):
            if (output / written).is_dir():
                shutil.rmtree(output / written)
            else:
                (output / written).unlink(missing_ok=True)
    before = times(output)
    with pytest.raises(KeyboardInterrupt):
        run_workflow(config(output), command=COMMAND, say=interrupting(MOMENTS[phase]))
    idle_by_then = [name for name in IDLE if name not in behind or PHASES.index(name) < PHASES.index(phase)]
    assert set(journal_phases(output)) == {*PHASES[: PHASES.index(phase)], *idle_by_then}
    del before[JOURNAL_NAME]
    assert {name: time for name, time in times(output).items() if name != JOURNAL_NAME} == before
    if phase == "setup":  # that the rest runs is what the others show
        replayed(monkeypatch, finished)
    heard: list[str] = []
    again = run_workflow(config(output), command=COMMAND, phase=lambda record: heard.append(record.phase))
    assert statuses(again) == expected([name for name in behind if name in WORKING])
    assert heard == list(PHASES)
    assert again.report is not None and again.report.summary.verdict == "PASS"
    assert {name: times(output)[name] for name in before} == before


@pytest.mark.parametrize("phase", PHASES)
def test_what_a_phase_raises_leaves_it_out_of_the_journal(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Also when it had been finished before, and for every phase: those that would be idle are made to work."""
    output = copied(finished, tmp_path / "out")

    def broken(_: Place) -> tuple[str, ...]:
        raise ModelError("the weights contain NaN")

    steps = tuple(replace(step, work=broken, idle=lambda _: "") if step.phase == phase else step for step in run.STEPS)
    monkeypatch.setattr(run, "STEPS", steps)
    told: list[str] = []
    with pytest.raises(ModelError, match="the weights contain NaN"):
        run_workflow(
            config(output),
            command=COMMAND,
            start=phase,
            phase=lambda record: told.append(record.phase),  # type: ignore[arg-type]
        )
    assert told == list(PHASES[: PHASES.index(phase)])
    assert phase not in journal_phases(output) and set(journal_phases(output)) == set(PHASES) - {phase}
    monkeypatch.undo()
    ran = replayed(monkeypatch, finished)
    run_workflow(config(output), command=COMMAND)
    assert (ran[:1] == [phase]) == (phase in WORKING)


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from ryzen_compile.workflow.run import run_workflow
from tests.workflow.tiny_workflow import COMMAND, config
say = lambda text: print(text, flush=True)
run_workflow(config(Path(sys.argv[1])), command=COMMAND, say=say, phase=lambda record: say(f"{record.phase} is over"))
"""


def test_a_run_that_is_killed_goes_on(
    finished: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``kill -9`` while the artifact is written: nothing unwinds, and the lock is nobody's any more."""
    output = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(output), str(repository)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        lines = iter(child.stdout.readline, "")
        said = [line.strip() for line in iter(lambda: next(lines, "write\n"), "write\n")]
        assert child.poll() is None, said
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=SECONDS)
    assert child.returncode == -signal.SIGKILL and "setup is over" in said and "optimize is over" not in said
    assert journal_phases(output) == ["setup", "train"] and not (output / ARTIFACT_NAME).exists()
    before = times(output)[SETUP_NAME]
    again = run_workflow(config(output), command=COMMAND)
    assert statuses(again) == expected(["optimize", "validate", "report"])
    assert times(output)[SETUP_NAME] == before
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == []  # what it left was swept
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    nothing_runs(monkeypatch)
    assert statuses(run_workflow(config(output), command=COMMAND)) == expected([])


# --- one phase, or from one on ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("phase", PHASES)
def test_only_one_phase(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: Any) -> None:
    """It runs, finished or not; those before it are reused, those behind it are none of this run's business."""
    output = copied(finished, tmp_path / "out")
    ran = replayed(monkeypatch, finished)
    found = run_workflow(config(output), command=COMMAND, only=phase)
    wanted = expected([phase])
    assert statuses(found) == {name: wanted[name] for name in PHASES[: PHASES.index(phase) + 1]}
    assert ran == [phase] * (phase in WORKING)
    assert (found.report is None) == (phase != "report")
    assert set(journal_phases(output)) == set(PHASES)


def test_only_one_phase_under_changed_settings(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is before it was finished of other settings: results of both would stand in one report."""
    output = copied(finished, tmp_path / "out")
    changed = config(output, optimize={"recipe": "int8"})
    ran = replayed(monkeypatch, finished)
    with pytest.raises(UsageError, match=r"phase optimize was not finished, or its settings.*without --only"):
        run_workflow(changed, command=COMMAND, only="validate")
    run_workflow(changed, command=COMMAND)
    assert ran == list(MADE)


@pytest.mark.parametrize("phase", PHASES)
def test_from_one_phase_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: Any) -> None:
    output = copied(finished, tmp_path / "out")
    ran = replayed(monkeypatch, finished)
    again = [name for name in PHASES[PHASES.index(phase) :] if name in WORKING]
    assert statuses(run_workflow(config(output), command=COMMAND, start=phase)) == expected(again)
    assert ran == again


def test_from_one_phase_on_makes_what_is_missing_before_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = replayed(monkeypatch, finished)
    run_workflow(config(tmp_path / "out"), command=COMMAND, start="validate")
    assert ran == list(WORKING)


def test_only_one_phase_needs_those_before_it(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = replayed(monkeypatch, finished)
    for phase, missing in (("optimize", "setup"), ("validate", "setup"), ("report", "setup"), ("test", "setup")):
        with pytest.raises(UsageError, match=f"phase {missing} was not finished.*without --only"):
            run_workflow(config(tmp_path / "new"), command=COMMAND, only=phase)  # type: ignore[arg-type]
    output = copied(finished, tmp_path / "out")
    (output / ARTIFACT_NAME / "model.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match=r"phase optimize was not finished, or .* what it left have changed"):
        run_workflow(config(output), command=COMMAND, only="validate")
    assert ran == []


def test_only_and_from_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        run_workflow(config(tmp_path / "out"), command=COMMAND, only="report", start="report")
    assert list(tmp_path.iterdir()) == []


# --- a timeline -------------------------------------------------------------------------------------------------------
def test_phases_that_ran_are_spans(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline()
    replayed(monkeypatch, finished)
    output = copied(finished, tmp_path / "out")
    run_workflow(config(output, thresholds={"kernel_speedup": 1}), command=COMMAND, timeline=timeline)
    timeline.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["name"] for event in events if event["ph"] == "X"] == list(MEASURED)
