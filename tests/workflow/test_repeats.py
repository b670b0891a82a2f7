"""What is not repeated, and what a change of settings, files or surroundings repeats."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile.api import load
from ryzen_compile.backends.onnxruntime import native
from ryzen_compile.workflow import run
from ryzen_compile.workflow.phase import ARTIFACT_NAME, CHANGES_NAME, SETUP_NAME
from ryzen_compile.workflow.phases import setup
from ryzen_compile.workflow.phases.report import HTML_NAME
from ryzen_compile.workflow.report_schema import (
    VALIDATION_NAME,
)
from ryzen_compile.workflow.run import run_workflow
from tests.workflow.tiny_workflow import (
    COMMAND,
    MADE,
    MEASURED,
    MODEL,
    WORKING,
    WRITES,
    config,
    copied,
    expected,
    finished_workflow,
    replayed,
    statuses,
    times,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_workflow(tmp_path_factory)


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
    assert repeated() == []
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
