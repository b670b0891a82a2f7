"""Progress on stderr: which step runs, and a line for every pass as it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ryzen_compile.cli import output

if TYPE_CHECKING:
    from ryzen_compile.report import PassRecord

STEPS = {
    "load": "loading weights",
    "calibration": "reading the calibration text",
    "capture": "capturing the graph",
    "reference": "computing the float64 reference",
    "compile": "opening the session",
    "write": "writing the artifact",
}


def hush_bars() -> None:
    """No bars of transformers' own, which asks for it once, when it is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def narrated(total: int, *, quiet: bool = False) -> Iterator[Callable[[str | PassRecord], None] | None]:
    """A callback for ``progress=``; ``total`` is the number of passes. Nothing is drawn when stderr is no terminal."""
    if quiet:
        hush_bars()
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = output.stderr()
    columns = (TextColumn("{task.description:<34}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=total + 2)
        started = time.perf_counter()

        def tell(event: str | PassRecord) -> None:
            if isinstance(event, str):
                bar.update(task, description=STEPS.get(event, event))
                if not console.is_terminal:
                    console.print(f"{time.perf_counter() - started:6.1f} s  {STEPS.get(event, event)}", highlight=False)
            else:
                bar.update(task, advance=1, description=f"{event.name}: {len(event.hits)} places")

        yield tell
