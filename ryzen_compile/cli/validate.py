"""``ryzen-compile validate ARTIFACT``: is it what it is said to be, and may it be shipped?"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ryzen_compile.cli import output
from ryzen_compile.cli.failure import printable

if TYPE_CHECKING:
    from ryzen_compile.validate.outcome import Outcome


def validate(
    artifact: Annotated[Path, typer.Argument(help="Artifact directory.")],
    baseline: Annotated[str, typer.Option(help="What it was made from: model directory or hub id.")],
    config: Annotated[
        Path | None, typer.Option("--config", help="Settings and thresholds as YAML, as `validation` of a workflow.")
    ] = None,
    changes: output.ChangesFlag = None,
    report: Annotated[Path | None, typer.Option(help="Write validation_report.json here.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Hold an artifact to the model it was made from: speed, size, cache, drafts, accuracy; exits with 7 on a miss."""
    from ryzen_compile.errors import ParityError
    from ryzen_compile.settings import changed_settings, read_settings
    from ryzen_compile.source import resolve
    from ryzen_compile.validate.optimization.settings import ValidationSettings
    from ryzen_compile.workflow.journal import write_file
    from ryzen_compile.workflow.validation import Baseline, validate_artifact

    _check_report(report)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own bars follow it
    asked = changes or []
    if config is None:
        settings = changed_settings(ValidationSettings, {}, asked)
    else:
        settings = read_settings(ValidationSettings, config, asked)
    console = output.stderr()

    def say(text: str) -> None:
        if not (quiet or as_json):
            console.print(f"  {printable(text)}", markup=False, highlight=False)

    found = validate_artifact(
        artifact,
        Baseline(baseline, resolve(baseline)),
        settings,
        command=_command(artifact, baseline, config, asked),
        say=say,
    )
    if report is not None:
        write_file(report, found.model_dump_json(indent=1) + "\n")
    if as_json:
        typer.echo(found.model_dump_json(indent=2))  # which writes no NaN
    else:
        for line in check_lines(found.outcomes):
            typer.echo(printable(line))
        typer.echo(f"verdict: {found.summary.verdict}")
    if found.summary.verdict == "FAIL":
        raise typer.Exit(ParityError.exit_code)


def check_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """One line a check, and what is to blame below those that failed."""
    lines = []
    for one in outcomes:
        measured = one.measured.to_text() if one.measured is not None else "-"
        target = one.target.to_text() if one.target is not None else "-"
        lines.append(f"{one.status:<8}{one.component:<13}{one.check:<21}{measured:<40}{target}")
        if one.status in ("WARN", "SKIPPED") and one.reason:
            lines.append(f"        {one.reason}")
        if one.status == "FAIL":
            lines.append(f"        {one.reason}" + (f"; culprit: {one.culprit}" if one.culprit else ""))
    return lines


def _check_report(path: Path | None) -> None:
    """``UsageError`` before minutes of measuring, for a report that could not be written."""
    from ryzen_compile.errors import UsageError

    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UsageError(
            f"--report {path} is a directory, or is to lie in one that there is not",
            hint="name a file, as validation_report.json",
        )


def _command(artifact: Path, baseline: str, config: Path | None, changes: Sequence[str]) -> str:
    parts = ["ryzen-compile", "validate", str(artifact), "--baseline", baseline]
    parts += [] if config is None else ["--config", str(config)]
    return shlex.join([*parts, *(part for one in changes for part in ("--set", one))])
