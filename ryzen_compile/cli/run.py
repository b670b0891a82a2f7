"""``ryzen-compile run``: the whole workflow of a configuration file, from a model to a report with a verdict."""

from __future__ import annotations

import json
import os
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ryzen_compile.cli import output
from ryzen_compile.cli.failure import printable
from ryzen_compile.cli.trace import TraceFlag
from ryzen_compile.errors import ParityError, UsageError

if TYPE_CHECKING:
    from ryzen_compile.workflow.report_schema import PhaseRecord
    from ryzen_compile.workflow.run import Finished


def run(
    config: Annotated[Path | None, typer.Argument(help="The workflow, as YAML; see examples/configs.")] = None,
    only: Annotated[str | None, typer.Option("--only", help="Run this phase alone, behind finished ones.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="Run this phase and those behind it again.")] = None,
    changes: output.ChangesFlag = None,
    trace: TraceFlag = None,
    schema: output.SchemaFlag = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Set up, train, optimize, validate, test and report; exits with 7 when a target was missed."""
    from ryzen_compile.cli.trace import check_trace, write_trace
    from ryzen_compile.cli.train import watching
    from ryzen_compile.timeline import Timeline
    from ryzen_compile.validate.outcome import failed
    from ryzen_compile.workflow.config import json_schema, read_workflow
    from ryzen_compile.workflow.report_schema import PHASES
    from ryzen_compile.workflow.run import run_workflow

    if schema:
        output.print_json(json_schema())
        return
    if config is None:
        raise UsageError("run needs a configuration", hint="for example examples/configs/workflow.yaml")
    check_trace(trace)
    for name in (only, start):
        if name is not None and name not in PHASES:
            raise UsageError(f"there is no phase {name!r}", hint=f"phases are {', '.join(PHASES)}")
    settings = read_workflow(config, changes or ())
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own bars follow it
    console, silent = output.stderr(), quiet or as_json

    def say(text: str) -> None:
        if not silent:
            console.print(f"  {printable(text)}", markup=False, highlight=False)

    def phase(record: PhaseRecord) -> None:
        if not silent:
            why = f": {record.reason}" if record.reason else ""
            console.print(f"[bold]{record.phase:<10}[/]{record.status} in {record.seconds:.1f} s{why}", highlight=False)

    timeline = None if trace is None else Timeline()
    shown = not silent and settings.train is not None
    try:
        with watching() if shown else nullcontext() as watcher:
            finished = run_workflow(
                settings,
                command=_command(config, changes or ()),
                only=only,  # type: ignore[arg-type]
                start=start,  # type: ignore[arg-type]
                say=say,
                phase=phase,
                watcher=watcher,
                timeline=timeline,
            )
    finally:  # of a run that was interrupted, too
        if timeline is not None and trace is not None:
            write_trace(timeline, trace)
    _show(finished, as_json)
    if failed(finished.outcomes):
        raise typer.Exit(ParityError.exit_code)


def _show(finished: Finished, as_json: bool) -> None:
    """The final report, or what a phase alone found."""
    from ryzen_compile.cli.validate import check_lines
    from ryzen_compile.workflow.metadata import worst
    from ryzen_compile.workflow.phases.report import HTML_NAME

    report = finished.report
    if as_json and report is not None:
        typer.echo(report.model_dump_json(indent=2))  # which writes no NaN
    elif as_json:
        # As text first, which writes no NaN.
        phases = [json.loads(record.model_dump_json()) for record in finished.records]
        checks = [json.loads(outcome.model_dump_json()) for outcome in finished.outcomes]
        output.print_json({"phases": phases, "outcomes": checks})
    elif finished.outcomes:
        for line in check_lines(finished.outcomes):
            typer.echo(printable(line))
        typer.echo(f"verdict: {worst([outcome.status for outcome in finished.outcomes])}")
    if report is not None and not as_json:
        typer.echo(f"report: {printable(str(finished.directory / HTML_NAME))}")


def _command(config: Path, changes: list[str] | tuple[()]) -> str:
    return shlex.join(["ryzen-compile", "run", str(config), *(part for one in changes for part in ("--set", one))])
