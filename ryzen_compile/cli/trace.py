"""``--trace FILE``: a timeline of what a command did, which ui.perfetto.dev opens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ryzen_compile.cli import output
from ryzen_compile.cli.failure import printable

if TYPE_CHECKING:
    from ryzen_compile.runtime.engine import Engine
    from ryzen_compile.timeline import Timeline
    from ryzen_compile.validate.latency import Timing, Workload

TraceFlag = Annotated[
    Path | None,
    typer.Option("--trace", help="Write a timeline of what ran when to this file; ui.perfetto.dev opens it."),
]


def check_trace(path: Path | None, engines: Sequence[str] = ()) -> None:
    """``UsageError`` before a command's work is done, for a trace that could not be written, or with ``engines`` that
    have no record of their nodes."""
    from ryzen_compile.errors import UsageError

    if path is not None and engines:
        raise UsageError(f"--trace records ONNX Runtime's nodes, not engine {engines[0]!r}", hint="leave --engine out")
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UsageError(
            f"--trace {path} is a directory, or is to lie in one that there is not", hint="name a file, as trace.json"
        )


def write_trace(timeline: Timeline, path: Path) -> None:
    """Writes it, and says so on stderr. Raises ``ResourceError``."""
    timeline.write(path)
    typer.echo(f"wrote the timeline {printable(str(path))}; ui.perfetto.dev opens it", err=True)


def measure_in_spans(
    timeline: Timeline, engines: Sequence[Engine], tests: Sequence[Workload], repeats: int, *, seed: int
) -> list[Timing]:
    """What ``measure`` returns, each test a span of ``timeline``."""
    from ryzen_compile.validate.latency import measure

    if any(test.depth + test.tokens > engine.spec.context for test in tests for engine in engines):
        return measure(engines, tests, repeats, seed=seed)  # refuses, before the first of them runs
    timings = []
    for test in tests:
        with timeline.span(test.name, repeats=repeats):
            timings += measure(engines, [test], repeats, seed=seed)
    return timings


def trace_nodes(timeline: Timeline, artifact: Path, threads: int | None, native: bool | None) -> None:
    """Adds the times of the artifact's nodes, recorded in a session of their own: behind everything that is timed."""
    from ryzen_compile.backends.onnxruntime.node_trace import trace_nodes

    trace_nodes(timeline, artifact, threads=threads, native=output.native_choice(native))
