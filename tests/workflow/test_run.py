"""The workflow's mechanics: what runs, what is not repeated, and that no interruption loses what was finished."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ryzen_compile import publish
from ryzen_compile.api import load
from ryzen_compile.backends.onnxruntime import native
from ryzen_compile.errors import ArtifactError, BusyError, ConfigError, ModelError, ResourceError, UsageError
from ryzen_compile.settings import parse_settings
from ryzen_compile.timeline import Timeline
from ryzen_compile.workflow import report_schema, run
from ryzen_compile.workflow.config import WorkflowConfig
from ryzen_compile.workflow.journal import JOURNAL_NAME, Journal
from ryzen_compile.workflow.phase import ARTIFACT_NAME, CHANGES_NAME, SETUP_NAME, Place, Step
from ryzen_compile.workflow.phases import setup
from ryzen_compile.workflow.phases.report import HTML_NAME, MARKDOWN_NAME
from ryzen_compile.workflow.report_schema import (
    FINAL_NAME,
    PHASES,
    TESTS_NAME,
    VALIDATION_NAME,
    FinalReport,
    PhaseRecord,
    ValidationReport,
)
from ryzen_compile.workflow.run import Finished, run_workflow
from tests.train.tiny_run import tiny_config, write_text
from tests.workflow.tiny_workflow import COMMAND, MODEL, config, copied, finished_workflow, statuses, times

SECONDS = 300  # that a child may take on a busy machine; none is meant to
WORKING = ("setup", "optimize", "validate", "report")  # of a workflow without training and tests
IDLE = {"train": "skipped", "test": "skipped"}
WRITES = {
    "setup": (SETUP_NAME,),
    "optimize": (ARTIFACT_NAME, CHANGES_NAME),
    "validate": (VALIDATION_NAME,),
    "test": (TESTS_NAME,),
    "report": (FINAL_NAME, HTML_NAME, MARKDOWN_NAME),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_workflow(tmp_path_factory)


def expected(ran: Sequence[str]) -> dict[str, str]:
    return {phase: IDLE.get(phase) or ("done" if phase in ran else "reused") for phase in PHASES}


def work_replaced(monkeypatch: pytest.MonkeyPatch, work: Callable[[Step], Callable[[Place], tuple[str, ...]]]) -> None:
    """Every phase does what ``work`` makes of it; inputs and idleness stay what they are."""
    monkeypatch.setattr(run, "STEPS", tuple(replace(step, work=work(step)) for step in run.STEPS))


def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(step: Step) -> Callable[[Place], tuple[str, ...]]:
        def fail(_: Place) -> tuple[str, ...]:
            raise AssertionError(f"{step.phase} ran")

        return fail

    work_replaced(monkeypatch, refuse)


def replayed(monkeypatch: pytest.MonkeyPatch, finished: Path) -> list[str]:
    """Phases leave what they left in ``finished``, each time a little different; returned is which of them ran."""
    ran: list[str] = []
    runs = itertools.count(1)

    def replay(step: Step) -> Callable[[Place], tuple[str, ...]]:
        def work(place: Place) -> tuple[str, ...]:
            ran.append(step.phase)
            number = next(runs)
            for name in WRITES[step.phase]:
                target = place.directory / name
                if (finished / name).is_dir():
                    shutil.rmtree(target, ignore_errors=True)
                    shutil.copytree(finished / name, target)
                    (target / "run").write_text(f"{number}")
                else:
                    target.write_bytes((finished / name).read_bytes() + b"\n" * number)
            return WRITES[step.phase]

        return work

    work_replaced(monkeypatch, replay)
    return ran


def interrupting(at: str) -> Callable[[str], None]:
    """Listens to what is said, and stops at the first line that begins with ``at``."""

    def say(text: str) -> None:
        if text.startswith(at):
            raise KeyboardInterrupt

    return say


def journal_phases(output: Path) -> list[str]:
    return list(json.loads((output / JOURNAL_NAME).read_text())["phases"])


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


# --- what a change repeats --------------------------------------------------------------------------------------------
MEASURED = ("validate", "report")
MADE = ("optimize", "validate", "report")
CHANGES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nothing": ({}, ()),
    "threshold": ({"thresholds": {"kernel_speedup": 1.5}}, MEASURED),
    "tolerance": ({"thresholds": {"tolerance": 0.5}}, MEASURED),
    "rounds": ({"validation": {"rounds": 2}}, MEASURED),
    "compare": ({"validation": {"compare": ["int8"]}}, MEASURED),
    "recipe": ({"optimize": {"recipe": "int8"}}, MADE),
    "cache": ({"optimize": {"kv": "int8"}}, MADE),
    "verify": ({"optimize": {"verify": True}}, MADE),
    "tuning": ({"optimize": {"tune_seconds": 1}}, MADE),
    "seed": ({"seed": 7}, ()),  # of random weights, which a model has none of
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_repeats_what_depends_on_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    output = copied(finished, tmp_path / "out")
    before = times(output)
    ran = replayed(monkeypatch, finished)
    changes, repeated = CHANGES[change]
    assert statuses(run_workflow(config(output, **changes), command=COMMAND)) == expected(repeated)
    assert ran == list(repeated)
    kept = [name for phase in WORKING if phase not in repeated for name in WRITES[phase] if name != ARTIFACT_NAME]
    assert {name: times(output)[name] for name in kept} == {name: before[name] for name in kept}
    run_workflow(config(output, **changes), command=COMMAND)
    assert ran == list(repeated)  # once


def test_setting_it_back_repeats_it(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last run is remembered."""
    output = copied(finished, tmp_path / "out")
    ran = replayed(monkeypatch, finished)
    run_workflow(config(output, thresholds={"kernel_speedup": 1.5}), command=COMMAND)
    run_workflow(config(output), command=COMMAND)
    assert ran == [*MEASURED, *MEASURED]


def test_another_command_is_another_report(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which says how it is written again."""
    output = copied(finished, tmp_path / "out")
    ran = replayed(monkeypatch, finished)
    run_workflow(config(output), command=f"{COMMAND} --set seed=1")
    assert ran == ["report"]


@pytest.mark.parametrize(
    ("owner", "name", "value", "repeated", "repeated_tuned"),
    [
        (run, "digest_package", "another", WORKING, WORKING),
        (setup, "read_versions", {"onnxruntime": "1.2.3"}, WORKING, WORKING),
        (setup, "cpu_key", "zen9-3c", ("setup", *MEASURED), WORKING),
        (native, "library", Path(__file__), ("setup", *MEASURED), WORKING),
    ],
    ids=["package", "libraries", "machine", "operators"],
)
def test_other_surroundings_repeat_what_depends_on_them(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    value: object,
    repeated: Sequence[str],
    repeated_tuned: Sequence[str],
) -> None:
    """The machine counts for an artifact only where it was measured for it."""
    ran = replayed(monkeypatch, finished)
    for seconds, wanted in ((0, repeated), (1, repeated_tuned)):
        output = copied(finished, tmp_path / f"out{seconds}")
        tuned = config(output, optimize={"tune_seconds": seconds})
        run_workflow(tuned, command=COMMAND)
        ran.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, lambda *_: value)
            run_workflow(tuned, command=COMMAND)
        assert ran == list(wanted)


def test_files_that_settings_name_count_by_their_bytes(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, text, calibration: a path that stays the same with something else behind it is another input."""
    output = copied(finished, tmp_path / "out")
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    texts = [tmp_path / name for name in ("validation.txt", "calibration.txt")]
    for text in texts:
        text.write_text("def words():\n    return 'of some text'\n" * 99)
    asked = config(
        output,
        model=str(model),
        validation={"text": str(texts[0])},
        optimize={"calibration": str(texts[1])},
    )
    ran = replayed(monkeypatch, finished)
    run_workflow(asked, command=COMMAND)

    def repeated() -> list[str]:
        ran.clear()
        run_workflow(asked, command=COMMAND)
        return list(ran)

    assert repeated() == []
    for file in (*texts, model / "config.json"):
        file.touch()
    (model / ".cache").mkdir()
    (model / ".cache" / "lock").touch()
    assert repeated() == []
    texts[0].write_text("another text\n" * 99)
    assert repeated() == list(MEASURED)
    texts[1].write_text("another text\n" * 99)
    assert repeated() == list(MADE)
    card = model / "README.md"
    card.write_text(card.read_text() + "\n")
    assert repeated() == list(MADE)


def test_the_same_model_elsewhere_is_the_same(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Setup looks where it is; what is made of it stays."""
    output = copied(finished, tmp_path / "out")
    shutil.copytree(MODEL, tmp_path / "model")
    ran = replayed(monkeypatch, finished)
    run_workflow(config(output, model=str(tmp_path / "model")), command=COMMAND)
    assert ran == ["setup"]


def test_the_seed_of_a_shape(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = copied(finished, tmp_path / "out")
    ran = replayed(monkeypatch, finished)
    for changes, repeated in (
        ({}, list(WORKING)),
        ({}, []),
        ({"seed": 7}, list(MADE)),
        ({"seed": 7, "shape": "smollm2-135m"}, list(WORKING)),
    ):
        ran.clear()
        run_workflow(config(output, **{"model": None, "shape": "qwen2.5-0.5b", **changes}), command=COMMAND)
        assert ran == repeated


@pytest.mark.parametrize(
    ("name", "repeated"),
    [
        (SETUP_NAME, ("setup",)),
        (CHANGES_NAME, ("optimize", *MEASURED)),
        (f"{ARTIFACT_NAME}/report.json", ("optimize", *MEASURED)),
        (VALIDATION_NAME, MEASURED),
        (HTML_NAME, ("report",)),
    ],
)
@pytest.mark.parametrize("removed", [False, True])
def test_what_was_damaged_is_made_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, repeated: Sequence[str], removed: bool
) -> None:
    output = copied(finished, tmp_path / "out")
    if removed:
        (output / name).unlink()
    else:
        (output / name).write_text("{}")
    ran = replayed(monkeypatch, finished)
    run_workflow(config(output), command=COMMAND)
    assert ran == list(repeated)


def test_a_damaged_artifact_is_exported_again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For real, one bit of its weights: the new one has the digests that the old one had."""
    output = copied(finished, tmp_path / "out")
    weights = output / ARTIFACT_NAME / "model.onnx.data"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:12345] + bytes([sound[12345] ^ 4]) + sound[12346:])
    real = {step.phase: step.work for step in run.STEPS}
    replayed(monkeypatch, finished)
    monkeypatch.setattr(
        run, "STEPS", tuple(replace(s, work=real[s.phase]) if s.phase == "optimize" else s for s in run.STEPS)
    )
    assert statuses(run_workflow(config(output), command=COMMAND))["optimize"] == "done"
    assert weights.read_bytes() == sound
    with load(output / ARTIFACT_NAME):
        pass


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
    """What is before it was finished, if of other settings; a run without ``only`` then repeats that."""
    output = copied(finished, tmp_path / "out")
    changed = config(output, optimize={"recipe": "int8"})
    ran = replayed(monkeypatch, finished)
    run_workflow(changed, command=COMMAND, only="validate")
    assert ran == ["validate"]
    run_workflow(changed, command=COMMAND)
    assert ran == ["validate", *MADE]


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
    with pytest.raises(UsageError, match="phase optimize was not finished, or what it left has changed"):
        run_workflow(config(output), command=COMMAND, only="validate")
    assert ran == []


def test_only_and_from_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        run_workflow(config(tmp_path / "out"), command=COMMAND, only="report", start="report")
    assert list(tmp_path.iterdir()) == []


# --- outputs that are not ours ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("names", [("thesis.txt",), (SETUP_NAME, "thesis.txt"), (ARTIFACT_NAME,), (HTML_NAME,)])
def test_foreign_files_are_refused_and_stay(tmp_path: Path, names: Sequence[str]) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for name in names:
        (output / name).write_text("mine")
    with pytest.raises(ArtifactError, match=f"holds '{min(names)}' and no workflow; choose another output"):
        run_workflow(config(output), command=COMMAND)
    assert {path.name: path.read_text() for path in output.iterdir()} == dict.fromkeys(names, "mine")


def test_a_foreign_journal_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_text('{"jobs": []}')
    with pytest.raises(ArtifactError, match="is no journal of a workflow"):
        run_workflow(config(tmp_path), command=COMMAND)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {JOURNAL_NAME: '{"jobs": []}'}


def test_a_foreign_artifact_is_refused_and_stays(finished: Path, tmp_path: Path) -> None:
    """Somebody put files of theirs where the artifact goes."""
    output = copied(finished, tmp_path / "out")
    shutil.rmtree(output / ARTIFACT_NAME)
    (output / ARTIFACT_NAME).mkdir()
    (output / ARTIFACT_NAME / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is not empty"):
        run_workflow(config(output), command=COMMAND)
    assert (output / ARTIFACT_NAME / "thesis.txt").read_text() == "mine"


def test_hidden_files_and_empty_directories_are_nobodys(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / f".{JOURNAL_NAME}.new").write_text("left by a run that was killed in its first moment")
    ran = replayed(monkeypatch, finished)
    run_workflow(config(output), command=COMMAND)
    assert ran == list(WORKING)


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match=r"out' is a file, expected a directory"):
        run_workflow(config(tmp_path / "out"), command=COMMAND)
    with pytest.raises(ResourceError, match=r"out' cannot be made"):
        run_workflow(config(tmp_path / "out" / "below"), command=COMMAND)
    assert (tmp_path / "out").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["out"]


HOLDER = f"""
import sys, types
package = types.ModuleType("ryzen_compile")
package.__path__ = [{str(Path(publish.__file__).parent)!r}]
sys.modules["ryzen_compile"] = package
from ryzen_compile.publish import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_another_process_works_there(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Refused before anything is read or written; when it is gone, whichever way, the output is free."""
    output = copied(finished, tmp_path / "out")
    before = times(output)
    nothing_runs(monkeypatch)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(BusyError, match=rf"process '{holder.pid}' .* is writing .*out'"):
            run_workflow(config(output), command=COMMAND)
        assert times(output) == before
        run_workflow(config(copied(finished, tmp_path / "other")), command=COMMAND)  # which nobody holds
        if killed:
            holder.kill()
    finally:
        holder.communicate(timeout=SECONDS)
    run_workflow(config(output), command=COMMAND)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_the_lock_goes_with_a_run_that_fails(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_runs(monkeypatch)
    for _ in range(2):
        with pytest.raises(AssertionError, match="setup ran"):
            run_workflow(config(tmp_path / "out"), command=COMMAND)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- what is known to fail is refused before minutes of work ----------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "/none/such"}, ModelError, "does not exist"),
        ({"model": None, "shape": "llama"}, ConfigError, "there is no shape 'llama'; shapes are"),
        ({"validation": {"text": "/none/such.txt"}}, UsageError, "there is no text at '/none/such.txt'"),
        ({"optimize": {"calibration": "/none/such.txt"}}, UsageError, "there is no text at '/none/such.txt'"),
        ({"validation": {"draft": "/none/such"}}, ArtifactError, "/none/such"),
    ],
    ids=["model", "shape", "text", "calibration", "draft"],
)
def test_setup_looks_for_what_later_phases_need(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_workflow(config(tmp_path / "out", **changes), command=COMMAND)
    assert journal_phases(tmp_path / "out") == []


def test_a_machine_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = replace(setup.check_isa(setup.read_machine()), status="fail", detail="no AVX2", fix="use another machine")
    monkeypatch.setattr(setup, "check_isa", lambda _: failing)
    with pytest.raises(ResourceError, match="no AVX2; use another machine"):
        run_workflow(config(tmp_path / "out"), command=COMMAND)
    assert journal_phases(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimize": {"recipe": "int9"}}, "optimize: there is no recipe 'int9'; did you mean 'int8'"),
        ({"optimize": {"target_bits": 3.5}}, "optimize: recipe 'fp32' keeps float32 weights"),
        (
            {"optimize": {"kv": {"dtpe": "int8"}}},
            r"optimize\.kv\.dtpe: there is no such setting, the nearest is 'dtype'",
        ),
        ({"validation": {"compare": ["int8", "int5"]}}, "there is no recipe 'int5'; did you mean 'int8'"),
        ({"shape": "tinyllama-1.1b"}, "exactly one of model, shape and train"),
        ({"model": None}, "exactly one of model, shape and train"),
        ({"model": ""}, "model: String should have at least 1 character"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **changes)


def test_an_output_that_is_nowhere() -> None:
    """Which would be taken for the directory that one stands in."""
    with pytest.raises(ConfigError, match="output: String should have at least 1 character"):
        parse_settings(WorkflowConfig, {"output": "", "model": "there"})


# --- a timeline -------------------------------------------------------------------------------------------------------
def test_phases_that_ran_are_spans(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline()
    replayed(monkeypatch, finished)
    output = copied(finished, tmp_path / "out")
    run_workflow(config(output, thresholds={"kernel_speedup": 1}), command=COMMAND, timeline=timeline)
    timeline.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["name"] for event in events if event["ph"] == "X"] == list(MEASURED)


# --- a workflow with training -----------------------------------------------------------------------------------------
class Watched:
    """Counts the steps of a run, and stops it from the keyboard behind step ``last``."""

    def __init__(self, last: int | None = None) -> None:
        self.steps: list[int] = []
        self._last = last

    def batch(self, metrics: Any, _: int) -> None:
        self.steps.append(metrics.step)
        if metrics.step == self._last:
            raise KeyboardInterrupt

    def event(self, text: str) -> None:
        pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Any], Finished, list[list[int]]]:
    """The settings of a workflow with a training run, what came of it, and the steps of its two attempts."""
    pytest.importorskip("accelerate")
    directory = tmp_path_factory.mktemp("trained")
    file = directory / "train.yaml"
    write_text(directory)
    file.write_text(yaml.safe_dump(tiny_config(directory).model_dump(mode="json")))
    changes = {
        "model": None,
        "train": {"config": str(file), "mode": "baseline", "changes": ["optimization.steps=5"]},
        "validation": {"prompt_tokens": 5, "context": 9, "tokens": 33, "length": 11},
    }
    asked = config(directory / "out", **changes)
    watched = [Watched(3), Watched()]
    with pytest.raises(KeyboardInterrupt):
        run_workflow(asked, command=COMMAND, watcher=watched[0])
    assert journal_phases(directory / "out") == ["setup"]
    return changes, run_workflow(asked, command=COMMAND, watcher=watched[1]), [one.steps for one in watched]


def test_training_goes_on_from_its_last_checkpoint(
    trained: tuple[Mapping[str, Any], Finished, list[list[int]]],
) -> None:
    """Checkpoints are saved every second step: of the three steps that were done, the third is repeated."""
    _, found, steps = trained
    assert steps == [[1, 2, 3], [3, 4, 5]]
    assert statuses(found) == {"setup": "reused", "test": "skipped"} | dict.fromkeys(
        ("train", "optimize", "validate", "report"), "done"
    )


def test_a_trained_model_is_exported_and_reported(
    trained: tuple[Mapping[str, Any], Finished, list[list[int]]],
) -> None:
    _, found, _ = trained
    report = found.report
    assert report is not None and report.training is not None
    assert (report.training["steps"], report.training["mode"]) == (5, "baseline")
    assert report.metadata.model == "the trained model"
    model = found.directory / "training" / "baseline" / "model"
    sizes = json.loads((model / "config.json").read_text())
    with load(found.directory / ARTIFACT_NAME) as exported:
        assert (exported.spec.vocab, exported.spec.context) == (sizes["vocab_size"], sizes["max_position_embeddings"])
    whole = json.loads((found.directory / "training_metrics_report.json").read_text())
    assert whole["summary"]["validation_loss"] == report.training["validation_loss"]
    assert report.summary.verdict == "PASS"


def test_a_trained_workflow_that_is_through_repeats_nothing(
    trained: tuple[Mapping[str, Any], Finished, list[list[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it lies: where a run goes is no part of what it is."""
    changes, found, _ = trained
    output = copied(found.directory, tmp_path / "out")
    nothing_runs(monkeypatch)
    again = run_workflow(config(output, **changes), command=COMMAND)
    assert statuses(again) == {"test": "skipped"} | dict.fromkeys([one for one in PHASES if one != "test"], "reused")
    assert again.report is not None and found.report is not None
    assert again.report.model_dump_json() == found.report.model_dump_json()  # which may hold NaN


def test_another_training_run_is_refused_as_training_refuses_it(
    trained: tuple[Mapping[str, Any], Finished, list[list[int]]], tmp_path: Path
) -> None:
    """What was trained for hours is not thrown away for a changed setting."""
    changes, found, _ = trained
    output = copied(found.directory, tmp_path / "out")
    changed = {**changes, "train": {**changes["train"], "changes": ["optimization.steps=5", "optimization.lr=0.5"]}}
    with pytest.raises(ConfigError, match=r"optimization\.lr was 0\.01, now 0\.5.*another output"):
        run_workflow(config(output, **changed), command=COMMAND)
    assert (output / "training" / "baseline" / "model" / "model.safetensors").exists()
    assert "train" not in journal_phases(output)


def test_a_damaged_model_is_saved_again_from_its_checkpoint(
    trained: tuple[Mapping[str, Any], Finished, list[list[int]]], tmp_path: Path
) -> None:
    """Not one step is repeated, and what was exported of the same weights is reused."""
    changes, found, _ = trained
    output = copied(found.directory, tmp_path / "out")
    weights = output / "training" / "baseline" / "model" / "model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1])
    watched = Watched()
    again = run_workflow(config(output, **changes), command=COMMAND, only="train", watcher=watched)
    assert statuses(again) == {"setup": "reused", "train": "done"}
    assert weights.read_bytes() == sound and watched.steps == []


# --- a workflow with tests --------------------------------------------------------------------------------------------
SUITE = """
def test_adds_up():
    assert 1 + 1 == 2

def test_does_not_add_up():
    assert 1 + 1 == {sum}
"""


def test_a_failing_test_fails_the_workflow_by_name(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it is mended: only the tests run again. What was compiled of them meanwhile is no change of theirs."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    output = copied(finished, tmp_path / "out")
    suite = tmp_path / "suite"
    suite.mkdir()
    file = suite / "test_sums.py"
    file.write_text(SUITE.format(sum=3))
    asked = config(output, tests={"paths": [str(suite)]}, thresholds={"test_pass_rate": 0.95})
    said: list[str] = []
    found = run_workflow(asked, command=COMMAND, say=said.append)
    with_tests = {"train": "skipped", "setup": "reused", "optimize": "reused"}
    assert statuses(found) == with_tests | {"validate": "done", "test": "done", "report": "done"}
    assert found.report is not None and found.report.summary.verdict == "FAIL"
    check = found.report.components[-1].checks[0]
    assert (check.component, check.check, check.status) == ("tests", "test_pass_rate", "FAIL")
    assert (check.culprit, check.measured.value if check.measured else None) == ("test_does_not_add_up", 0.5)
    assert check.details == {"passed": 1, "failed": 1, "error": 0, "skipped": 0} and check.measured.samples == 2
    assert any("test_does_not_add_up" in line and "failed" in line for line in said)
    assert "test_does_not_add_up" in (output / MARKDOWN_NAME).read_text()
    tests = report_schema.TestReport.model_validate_json((output / TESTS_NAME).read_bytes())
    assert {case.name: case.status for case in tests.tests} == {
        "test_adds_up": "passed",
        "test_does_not_add_up": "failed",
    }

    reused = with_tests | {"validate": "reused"}
    assert statuses(run_workflow(asked, command=COMMAND)) == reused | {"test": "reused", "report": "reused"}
    file.write_text(SUITE.format(sum=2))
    found = run_workflow(asked, command=COMMAND)
    assert statuses(found) == reused | {"test": "done", "report": "done"}
    assert found.report is not None and found.report.summary.verdict == "PASS"

    without = config(output, thresholds={"test_pass_rate": 0.95})
    found = run_workflow(without, command=COMMAND)  # the old report of the tests is still there, and not told of
    assert statuses(found) == reused | {"test": "skipped", "report": "done"}
    assert found.report is not None and found.report.components[-1].status == "SKIPPED"


def test_tests_that_are_not_there_fail_the_workflow(finished: Path, tmp_path: Path) -> None:
    """Asked for and not run is not passed."""
    output = copied(finished, tmp_path / "out")
    asked = config(output, tests={"paths": [str(tmp_path / "absent")]}, thresholds={"test_pass_rate": 0.95})
    run_workflow(asked, command=COMMAND, only="test")
    found = run_workflow(asked, command=COMMAND, only="report")
    assert found.report is not None and found.report.summary.verdict == "FAIL"
    check = found.report.components[-1].checks[0]
    assert check.status == "FAIL" and "absent" in check.reason
