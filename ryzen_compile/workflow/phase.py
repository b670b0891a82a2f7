"""What a phase of a workflow is, and what it is given to work with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.workflow.config import WorkflowConfig
from ryzen_compile.workflow.report_schema import Phase, PhaseRecord

if TYPE_CHECKING:
    from ryzen_compile.timeline import Timeline
    from ryzen_compile.train.loop import Watcher

MODEL = "model"  # setup.json's key for what is optimized
ARTIFACT_NAME = "artifact"
SETUP_NAME = "setup.json"
CHANGES_NAME = "graph_changes.json"
TRAINING_NAME = "training"


@dataclass(frozen=True)
class Place:
    """Where a workflow works. ``say`` hears what is being done, ``watcher`` a training run; ``command`` is what runs it
    again, ``records`` the phases so far."""

    config: WorkflowConfig
    directory: Path
    command: str
    say: Callable[[str], None]
    watcher: Watcher | None = None
    timeline: Timeline | None = None
    records: list[PhaseRecord] = field(default_factory=list)

    @property
    def artifact(self) -> Path:
        return self.directory / ARTIFACT_NAME

    @property
    def trained(self) -> Path | None:
        """The model of the training phase, where there is one."""
        settings = self.config.train
        return None if settings is None else self.directory / TRAINING_NAME / settings.mode / "model"

    @property
    def name(self) -> str:
        """What is optimized, as its user calls it."""
        return self.config.model or self.config.shape or "the trained model"


@dataclass(frozen=True)
class Step:
    """A phase: ``inputs`` is all that its result follows from, JSON; ``work`` does it and names what it wrote, relative
    to the output; ``idle`` says why there is nothing to do, empty where there is; ``clear`` removes what it would
    go on from, where it was finished and is asked for again."""

    phase: Phase
    inputs: Callable[[Place], Mapping[str, Any]]
    work: Callable[[Place], tuple[str, ...]]
    idle: Callable[[Place], str] = lambda _: ""
    clear: Callable[[Place], None] = lambda _: None
