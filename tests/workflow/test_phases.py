"""The phases by themselves: what setup looks for, training that is interrupted, and tests that fail."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ryzen_compile.api import load
from ryzen_compile.errors import ArtifactError, ConfigError, ModelError, ResourceError, UnsupportedError, UsageError
from ryzen_compile.workflow import report_schema
from ryzen_compile.workflow.phase import ARTIFACT_NAME
from ryzen_compile.workflow.phases import setup, validation
from ryzen_compile.workflow.phases.report import MARKDOWN_NAME
from ryzen_compile.workflow.report_schema import (
    PHASES,
    TESTS_NAME,
)
from ryzen_compile.workflow.run import Finished, run_workflow
from tests.tiny_encoder import write_directory
from tests.train.tiny_run import tiny_config, write_text
from tests.workflow.tiny_workflow import (
    COMMAND,
    config,
    copied,
    finished_workflow,
    journal_phases,
    nothing_runs,
    statuses,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_workflow(tmp_path_factory)


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


def test_setup_refuses_an_encoder(tmp_path: Path) -> None:
    changes = {"model": str(write_directory(tmp_path / "encoder"))}
    with pytest.raises(UnsupportedError, match="is an encoder, and a workflow measures models that generate"):
        run_workflow(config(tmp_path / "out", **changes), command=COMMAND)
    assert journal_phases(tmp_path / "out") == []


def test_a_machine_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = replace(setup.check_isa(setup.read_machine()), status="fail", detail="no AVX2", fix="use another machine")
    monkeypatch.setattr(setup, "check_isa", lambda _: failing)
    with pytest.raises(ResourceError, match="no AVX2; use another machine"):
        run_workflow(config(tmp_path / "out"), command=COMMAND)
    assert journal_phases(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("library", "changes", "extra"),
    [
        ("jinja2", {}, "report"),
        ("matplotlib", {}, "report"),
        ("pytest", {"tests": {"paths": ["tests"]}}, "test"),
        ("accelerate", {"model": None, "train": {"config": "TRAIN"}}, "train"),
    ],
)
def test_a_library_that_a_later_phase_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, changes: dict[str, Any], extra: str
) -> None:
    """Missed at once, not after hours; what no phase of the workflow needs is not missed."""
    write_text(tmp_path)
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(tiny_config(tmp_path).model_dump(mode="json")))
    if "train" in changes:
        changes = {**changes, "train": {"config": str(file)}}
    real = setup.find_spec
    monkeypatch.setattr(setup, "find_spec", lambda name: None if name == library else real(name))
    with pytest.raises(UnsupportedError, match=rf"needs the library {library}; pip install 'ryzen-compile\[{extra}\]'"):
        run_workflow(config(tmp_path / "out", **changes), command=COMMAND)
    assert journal_phases(tmp_path / "out") == []
    if changes:
        run_workflow(config(tmp_path / "out"), command=COMMAND, only="setup")


# --- validation -------------------------------------------------------------------------------------------------------
def test_what_is_made_to_be_measured_goes_with_its_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted, or killed: then the next run removes it."""
    output = copied(finished, tmp_path / "out")
    left = output / validation.SCRATCH_NAME / "recipes"
    left.mkdir(parents=True)
    (left / "model.onnx.data").write_bytes(bytes(1000))
    seen: list[Path] = []

    def stop(*_: object, scratch: Path, **__: object) -> None:
        seen.append(scratch)
        assert scratch.is_dir() and list(scratch.iterdir()) == []
        (scratch / "half of an artifact").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(validation, "validate_artifact", stop)
    with pytest.raises(KeyboardInterrupt):
        run_workflow(config(output), command=COMMAND, start="validate")
    assert len(seen) == 1 and seen[0].is_relative_to(output)
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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


def test_from_training_on_it_is_trained_anew(
    trained: tuple[Mapping[str, Any], Finished, list[list[int]]], tmp_path: Path
) -> None:
    """A run that was finished; one that was interrupted goes on, whatever was asked for."""
    changes, found, _ = trained
    output = copied(found.directory, tmp_path / "out")
    weights = output / "training" / "baseline" / "model" / "model.safetensors"
    sound = weights.read_bytes()
    asked = config(output, **changes)
    watched = [Watched(3), Watched(), Watched()]
    with pytest.raises(KeyboardInterrupt):
        run_workflow(asked, command=COMMAND, start="train", watcher=watched[0])
    for watcher in watched[1:]:
        run_workflow(asked, command=COMMAND, only="train", watcher=watcher)
    assert [watcher.steps for watcher in watched] == [[1, 2, 3], [3, 4, 5], [1, 2, 3, 4, 5]]
    assert weights.read_bytes() == sound


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
    for name in ("PYTEST_ADDOPTS", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"):
        monkeypatch.delenv(name, raising=False)
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

    assert list(suite.glob("__pycache__/*.pyc"))
    reused = with_tests | {"validate": "reused"}
    assert statuses(run_workflow(asked, command=COMMAND)) == reused | {"test": "reused", "report": "reused"}
    file.write_text(SUITE.format(sum=2))
    found = run_workflow(asked, command=COMMAND)
    assert statuses(found) == reused | {"test": "done", "report": "done"}
    assert found.report is not None and found.report.summary.verdict == "PASS"

    data = tmp_path / "data.json"
    reading = config(output, tests={"paths": [str(suite)], "inputs": [str(data)]}, thresholds={"test_pass_rate": 0.95})
    for text, status in (("[]", "done"), ("[]", "reused"), ("[1]", "done")):
        data.write_text(text)
        assert statuses(run_workflow(reading, command=COMMAND))["test"] == status

    without = config(output, thresholds={"test_pass_rate": 0.95})
    found = run_workflow(without, command=COMMAND)  # the old report of the tests is still there, and not told of
    assert statuses(found) == reused | {"test": "skipped", "report": "done"}
    assert found.report is not None and found.report.components[-1].status == "SKIPPED"


def test_tests_that_are_not_there_fail_the_workflow(finished: Path, tmp_path: Path) -> None:
    """Asked for and not run is not passed."""
    output = copied(finished, tmp_path / "out")
    asked = config(output, tests={"paths": [str(tmp_path / "absent")]}, thresholds={"test_pass_rate": 0.95})
    alone = run_workflow(asked, command=COMMAND)
    assert alone.report is not None and alone.report.summary.verdict == "FAIL"
    found = run_workflow(asked, command=COMMAND, only="test")
    assert [(one.check, one.status) for one in found.outcomes] == [("test_pass_rate", "FAIL")]
    found = run_workflow(asked, command=COMMAND, only="report")
    assert found.report is not None and found.report.summary.verdict == "FAIL"
    check = found.report.components[-1].checks[0]
    assert check.status == "FAIL" and "absent" in check.reason
