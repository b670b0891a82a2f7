"""Test support: a workflow that takes seconds, on the shipped model, and one that is through, to be copied.

Nothing here is held to a target: what is tested is which phases run, and speed on a busy machine decides nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile.settings import parse_settings
from ryzen_compile.validate.thresholds import Thresholds
from ryzen_compile.workflow.config import WorkflowConfig
from ryzen_compile.workflow.report_schema import FinalReport, PhaseRecord
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
_SHARED: dict[str, Path] = {}


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
