"""Test support: a workflow that takes seconds, on the shipped model, and one that is through, to be copied.

Nothing here is held to a target: what is tested is which phases run, and speed on a busy machine decides nothing.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile.api import read_source
from ryzen_compile.settings import parse_settings
from ryzen_compile.validate.thresholds import Thresholds
from ryzen_compile.workflow import run
from ryzen_compile.workflow.config import WorkflowConfig
from ryzen_compile.workflow.journal import JOURNAL_NAME
from ryzen_compile.workflow.phase import ARTIFACT_NAME, CHANGES_NAME, SETUP_NAME, Place, Step
from ryzen_compile.workflow.phases.report import HTML_NAME, MARKDOWN_NAME
from ryzen_compile.workflow.report_schema import (
    FINAL_NAME,
    PHASES,
    TESTS_NAME,
    VALIDATION_NAME,
    FinalReport,
    PhaseRecord,
)
from ryzen_compile.workflow.run import Finished, run_workflow

MODEL = Path(__file__).parents[2] / "examples" / "tiny-python-lm"
COMMAND = "ryzen-compile run tiny.yaml"
NO_TARGETS: dict[str, None] = {name: None for name in Thresholds.model_fields if name != "tolerance"}
# Odd numbers: nothing here is a multiple of a block or of a batch.
VALIDATION: dict[str, Any] = {
    "rounds": 1,
    "prompts": 1,
    "prompt_tokens": 7,
    "new_tokens": 3,
    "context": 13,
    "tokens": 58,
    "length": 29,
    "memory": False,
    "parts": False,
}
OPTIMIZE: dict[str, Any] = {"recipe": "fp32", "verify": False, "tune_seconds": 0}
WORKING = ("setup", "optimize", "validate", "report")  # phases of a workflow without training and tests
IDLE = {"train": "skipped", "test": "skipped"}
WRITES = {
    "setup": (SETUP_NAME,),
    "optimize": (ARTIFACT_NAME, CHANGES_NAME),
    "validate": (VALIDATION_NAME,),
    "test": (TESTS_NAME,),
    "report": (FINAL_NAME, HTML_NAME, MARKDOWN_NAME),
}
MEASURED = ("validate", "report")
MADE = ("optimize", "validate", "report")
_SHARED: dict[str, Path] = {}


def two_layers() -> Any:
    """The shipped model's first two layers as a float32 transformers model, which is captured in a moment."""
    model: Any = read_source(MODEL).model.float().eval()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model


def settings(output: Path, **changes: Any) -> dict[str, Any]:
    """The workflow's settings as a file has them; ``changes`` replace some, whole sections being merged."""
    tree: dict[str, Any] = {
        "output": str(output),
        "model": str(MODEL),
        "optimize": OPTIMIZE,
        "validation": {**VALIDATION, "thresholds": dict(NO_TARGETS)},
    }
    for name, value in changes.items():
        if name == "thresholds":
            tree["validation"]["thresholds"] |= value
        else:
            tree[name] = {**(tree.get(name) or {}), **value} if isinstance(value, Mapping) else value
    return tree


def config(output: Path, **changes: Any) -> WorkflowConfig:
    return parse_settings(WorkflowConfig, settings(output, **changes))


def finished_workflow(factory: pytest.TempPathFactory) -> Path:
    """The output of ``config``'s workflow, made once in a run of the tests; not to be changed."""
    if "finished" not in _SHARED:
        output = factory.mktemp("workflow") / "out"
        run_workflow(config(output), command=COMMAND)
        _SHARED["finished"] = output
    return _SHARED["finished"]


def copied(finished: Path, output: Path) -> Path:
    """``finished`` as ``output``, down to the times of its files."""
    shutil.copytree(finished, output)
    return output


def statuses(finished: Finished | FinalReport) -> dict[str, str]:
    """By phase."""
    records: tuple[PhaseRecord, ...] = finished.records if isinstance(finished, Finished) else finished.phases
    found: dict[str, str] = {record.phase: record.status for record in records}
    assert len(found) == len(records)
    return found


def times(directory: Path) -> dict[str, int]:
    """Of every file below ``directory`` that is not hidden, when it was written, in nanoseconds."""
    return {
        path.relative_to(directory).as_posix(): path.stat().st_mtime_ns
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


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


def journal_phases(output: Path) -> list[str]:
    return list(json.loads((output / JOURNAL_NAME).read_text())["phases"])
