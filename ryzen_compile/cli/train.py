"""``ryzen-compile train``: a training run as a configuration file describes it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ryzen_compile.cli import output
from ryzen_compile.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import Progress

    from ryzen_compile.train.loop import Watcher
    from ryzen_compile.train.metrics import BatchMetrics

EVERY_SECONDS = 10.0  # between lines where stderr is no terminal


def train(
    config: Annotated[Path | None, typer.Option("--config", help="The run, as YAML; see examples/configs.")] = None,
    mode: Annotated[
        str, typer.Option("--mode", help="optimized, baseline (plain eager float32) or test (a few steps).")
    ] = "optimized",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    changes: output.ChangesFlag = None,
    schema: output.SchemaFlag = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Train a model, with quantization, distillation or compressed tables in the loop."""
    from ryzen_compile.train.config import MODES, json_schema, read_config

    if schema:
        output.print_json(json_schema())
        return
    if config is None:
        raise UsageError("train needs a configuration", hint="--config FILE.yaml, for example one of examples/configs")
    if mode not in MODES:
        raise UsageError(f"mode {mode!r}: expected {', '.join(MODES)}")
    settings = read_config(config, changes or ())
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own bars follow it

    from ryzen_compile.workflow.training import train as run

    with watching() as watcher:
        finished = run(settings, mode, resume=resume, watcher=watcher)
    if not finished.main:
        return
    facts = finished.summary()
    if as_json:
        output.print_json(facts)
        return
    console = output.stdout()
    depths = facts.pop("depths", {})
    for name, value in facts.items():
        console.print(f"{name.replace('_', ' '):<22}{value}")
    for name, found in depths.items():
        for dim, figures in found.items():
            told = ", ".join(f"{figure.replace('_', ' ')} {value:.4f}" for figure, value in figures.items())
            console.print(f"{dim:>5} {name.replace('_', ' '):<26}{told}")


@contextmanager
def watching() -> Iterator[Watcher]:
    """Who shows a run on stderr: one live line on a terminal, else a line now and then."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = output.stderr()
    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(bar_width=24),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # under torchrun, one of them tells
    with Progress(*columns, console=console, transient=True, disable=not (first and console.is_terminal)) as bar:
        yield _Display(bar)


class _Display:
    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("starting", total=None)
        self._told = 0.0

    def batch(self, metrics: BatchMetrics, steps: int) -> None:
        """Tokens per second and loss of the step, how much is left."""
        text = f"loss {metrics.loss:.4f}  {metrics.tokens_per_second:,.0f} tok/s  rate {metrics.learning_rate:.2e}"
        self._bar.update(self._task, completed=metrics.step, total=steps, description=text)
        console = self._bar.console
        now = time.monotonic()
        if not console.is_terminal and (now - self._told >= EVERY_SECONDS or metrics.step == steps):
            self._told = now
            left = (steps - metrics.step) * metrics.batch_seconds
            console.print(f"step {metrics.step}/{steps}  {text}  {left / 60:.1f} min left", highlight=False)

    def event(self, text: str) -> None:
        """One line, above the live one."""
        self._bar.console.print(text, highlight=False, markup=False)
