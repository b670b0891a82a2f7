"""What a workflow is asked for: one tree of settings, read from YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ryzen_compile.config import KVCacheConfig, Recipe, find_recipe
from ryzen_compile.settings import Section, read_settings, settings_schema
from ryzen_compile.text import BUILTIN
from ryzen_compile.train.config import Mode
from ryzen_compile.validate.optimization.settings import ValidationSettings


class TrainPhase(Section):
    """A training run of its own file, ``config``, with single settings replaced as ``ryzen-compile train --set`` does;
    what it writes goes below the workflow's output."""

    config: str
    mode: Mode = "optimized"
    changes: tuple[str, ...] = ()


class OptimizePhase(Section):
    """How the model is exported, in the words of ``ryzen-compile export``; None leaves what the recipe says.

    ``verify`` None is yes, but for a bare shape: random weights have nothing that a gate could save. ``tune_seconds``
    is how long threads and the cost of steps are measured for on this machine, 0 not at all.
    """

    recipe: str | None = None
    kv: str | KVCacheConfig | None = None
    context: int | None = Field(default=None, ge=1)
    prefill: str | None = None
    target_bits: float | None = None
    overrides: Mapping[str, Mapping[str, Any]] | None = None
    embedding: Mapping[str, Any] | None = None
    sparsity: float | Mapping[str, Any] | None = None
    calibration: str = BUILTIN
    verify: bool | None = None
    tune_seconds: float = Field(default=20.0, ge=0)

    @model_validator(mode="after")
    def _there_is_such_a_recipe(self) -> OptimizePhase:
        if self.recipe is not None:
            self.over(self.recipe)
        return self

    def over(self, recipe: str | Recipe) -> Recipe:
        """``recipe`` with these settings in place of its own. Raises ``ConfigError``."""
        return find_recipe(
            recipe,
            context=self.context,
            prefill=self.prefill,
            kv=self.kv,
            target_bits=self.target_bits,
            overrides=self.overrides,
            embedding=self.embedding,
            sparsity=self.sparsity,
        )


class SuitePhase(Section):
    """Tests to run: ``paths`` of files or directories, more ``arguments`` of pytest, ``timeout`` in seconds. They run
    again when what lies at their paths or at ``inputs``, which they read, has changed."""

    paths: tuple[str, ...] = ("tests/integration",)
    inputs: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    timeout: float = Field(default=1200.0, gt=0)


class WorkflowConfig(Section):
    """A workflow; everything it writes goes below ``output``. It begins with a ``model`` (a directory or hub id), a
    bare ``shape`` with random weights, or what ``train`` trains. ``tests`` None runs none."""

    output: str = Field(min_length=1)
    model: str | None = Field(default=None, min_length=1)
    shape: str | None = None
    seed: int = Field(default=0, ge=0, lt=1 << 32)
    train: TrainPhase | None = None
    optimize: OptimizePhase = OptimizePhase()
    validation: ValidationSettings = ValidationSettings()
    tests: SuitePhase | None = None

    @model_validator(mode="after")
    def _one_beginning(self) -> WorkflowConfig:
        if sum(given is not None for given in (self.model, self.shape, self.train)) != 1:
            raise ValueError("expected exactly one of model, shape and train")
        return self

    @model_validator(mode="after")
    def _there_are_recipes_to_compare(self) -> WorkflowConfig:
        for name in self.validation.compare:
            find_recipe(name)
        return self


def read_workflow(path: str | Path, changes: Sequence[str] = ()) -> WorkflowConfig:
    """The workflow in the YAML file ``path``, with ``changes`` ("optimize.recipe=int8") applied in their order.

    Raises ``ConfigError`` that names the file, the setting, what was expected and what came.
    """
    return read_settings(WorkflowConfig, path, changes)


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the whole tree."""
    return settings_schema(WorkflowConfig)
