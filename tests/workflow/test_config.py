"""A workflow's settings: what is refused before anything runs, and how it is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ryzen_compile.errors import ConfigError
from ryzen_compile.settings import parse_settings
from ryzen_compile.workflow.config import WorkflowConfig, read_workflow
from tests.workflow.tiny_workflow import (
    MODEL,
    config,
)

EXAMPLES = sorted((MODEL.parent / "configs").glob("workflow*.yaml"))


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


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_can_be_read(path: Path) -> None:
    """And say how they are started, from the root of the repository, where their own paths begin."""
    found = read_workflow(path)
    assert f"ryzen-compile run examples/configs/{path.name}" in path.read_text(encoding="utf-8")
    assert found.output.startswith("runs/")
    assert parse_settings(WorkflowConfig, found.model_dump(mode="json")) == found


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2


def test_an_output_that_is_nowhere() -> None:
    """Which would be taken for the directory that one stands in."""
    with pytest.raises(ConfigError, match="output: String should have at least 1 character"):
        parse_settings(WorkflowConfig, {"output": "", "model": "there"})
