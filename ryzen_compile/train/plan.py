"""How long a run is and which rows each step reads: facts that follow from the configuration and the text alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ryzen_compile.errors import ConfigError
from ryzen_compile.train.config import Mode, OptimizationSettings, TrainConfig
from ryzen_compile.train.packing import RowOrder

TEST_STEPS, TEST_ROWS, TEST_VALIDATION_ROWS = 8, 64, 4  # what mode "test" makes do with


@dataclass(frozen=True)
class Rows:
    """Packed text: ``train`` (n, T + 1) and ``validation`` (m, T + 1), integers; ``digest`` tells one text in one
    tokenizer's tokens from others."""

    train: Tensor
    validation: Tensor
    digest: str = ""

    @property
    def length(self) -> int:
        """Tokens predicted in a row."""
        return self.train.shape[1] - 1


@dataclass(frozen=True)
class Plan:
    """``steps`` of ``rows_per_step`` rows over all processes; an ``epoch`` of so many steps is the controller's."""

    steps: int
    batch: int
    accumulate: int
    processes: int
    length: int
    epoch: int
    order: RowOrder

    @property
    def rows_per_step(self) -> int:
        return self.batch * self.accumulate * self.processes

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.length

    def rows_of(self, step: int, process: int) -> Tensor:
        """(accumulate, batch) int64: what ``process`` reads in ``step`` (from 0).

        Batches are dealt in turns, so that two processes and one with twice the accumulation see the same step.
        """
        rows = self.order.at(step * self.rows_per_step, self.rows_per_step)
        return rows.reshape(self.accumulate, self.processes, self.batch)[:, process]


def make_plan(config: TrainConfig, mode: Mode, rows: Rows, processes: int) -> Plan:
    """Raises ``ConfigError`` for a run of less than a step."""
    settings = config.optimization
    per_step = settings.batch * settings.accumulate * processes
    steps = _steps(settings, len(rows.train), per_step, rows.length)
    if mode == "test":
        steps = max(1, min(steps, TEST_STEPS))  # of its few rows an epoch may be none
    if steps < 1:
        raise ConfigError(
            f"the run is shorter than a step, which reads {per_step * rows.length} tokens",
            hint="give it more tokens, or smaller batches",
        )
    epoch = config.controller.every or max(1, len(rows.train) // per_step)
    return Plan(
        steps,
        settings.batch,
        settings.accumulate,
        processes,
        rows.length,
        epoch,
        RowOrder(len(rows.train), config.seed),
    )


def _steps(settings: OptimizationSettings, rows: int, per_step: int, length: int) -> int:
    if settings.steps is not None:
        return settings.steps
    if settings.tokens is not None:
        return settings.tokens // (per_step * length)
    return round((settings.epochs or 0) * rows / per_step)
