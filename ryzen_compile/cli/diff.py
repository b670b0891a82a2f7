"""``ryzen-compile diff A B``: what differs between two artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ryzen_compile.cli import output
from ryzen_compile.errors import ParityError

DIFFERENT = ParityError.exit_code  # "not the same" has one status everywhere
CONTEXT = 2


def diff(
    a: Annotated[Path, typer.Argument(help="Artifact directory.")],
    b: Annotated[Path, typer.Argument(help="Artifact directory to compare it with.")],
    context: Annotated[
        int, typer.Option(min=0, help="Equal lines to show around changed ones of the graph.")
    ] = CONTEXT,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help=f"Exit with {DIFFERENT} when they differ, with 0 when not.")
    ] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Compare two artifacts: source, recipe, versions, passes, cache, files, operators, and the graphs line by line."""
    from ryzen_compile.backends.onnxruntime.graph_view import artifact_facts
    from ryzen_compile.graphs.artifact_diff import diff_artifacts

    found = diff_artifacts(artifact_facts(a), artifact_facts(b), context)
    if as_json:
        output.print_json(found.model_dump(mode="json"))
    else:
        typer.echo(found.to_text(), nl=False)
    if exit_code and found.differs:
        raise typer.Exit(DIFFERENT)
