"""``ryzen-compile explain TARGET``: what every pass did to a model, what it left alone, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ryzen_compile.cli import output
from ryzen_compile.cli.defaults import RECIPE_USED
from ryzen_compile.cli.failure import printable
from ryzen_compile.errors import UsageError


def explain(
    target: Annotated[str, typer.Argument(help="An artifact directory, a model directory or a hub id.")],
    recipe: Annotated[str | None, typer.Option(help=f"Recipe, when TARGET is a model; default: {RECIPE_USED}.")] = None,
    task: Annotated[str | None, typer.Option(help="'embed' or 'generate', where the model leaves it open.")] = None,
    pooling: output.PoolingOption = None,
    no_normalize: output.NoNormalizeFlag = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip the parity gate.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Show hits, near-misses with their reasons, operators before and after, time and error of every pass."""
    from ryzen_compile.manifest import MANIFEST_NAME

    directory, pooled = Path(target), output.pooling_choice(pooling, no_normalize)
    if (directory / MANIFEST_NAME).exists():
        if recipe is not None or task is not None or pooled is not None:
            raise UsageError("--recipe, --task and --pooling are for models that are read, not for an artifact")
        from ryzen_compile.backends.onnxruntime.artifact import REPORT_NAME, read
        from ryzen_compile.backends.onnxruntime.native import claimed

        found = read(directory, digests=False)
        claims = claimed(found.model)
        if as_json:
            output.print_json({**(found.report or {}), "native": claims.to_json()})
        else:
            stored = directory / "report.md"
            typer.echo(stored.read_text(encoding="utf-8") if stored.exists() else json.dumps(found.report, indent=2))
            typer.echo(f"\n## Native operators on this machine\n\n{_listed(claims.to_text())}")
            output.stderr().print(f"from {directory / REPORT_NAME}", markup=False)
        return
    from ryzen_compile.api import read_source, recipe_for, rewrite, task_of
    from ryzen_compile.calibration import read_calibration
    from ryzen_compile.cli.narrate import hush_bars, narrated
    from ryzen_compile.config import find_recipe
    from ryzen_compile.pipeline import default_passes, encoder_passes

    if quiet or as_json:
        hush_bars()
    done = task_of(target, task)  # type: ignore[arg-type]
    if done == "generate" and pooled is not None:
        raise UsageError("--pooling is for encoders, this model generates", hint="or give --task embed")
    chosen = find_recipe(recipe_for(target, task=done) if recipe is None else recipe)
    passes = default_passes(chosen) if done == "generate" else encoder_passes(chosen)
    with narrated(len(passes), quiet=quiet or as_json) as progress:
        source = read_source(target, task=done, pooling=pooled, progress=progress)
        _, report = rewrite(
            source.model,
            chosen,
            pooling=source.pooling,
            calibration=read_calibration(source.tokenizer, chosen, progress=progress),
            given=source.quantized,
            verify=not no_verify,
            progress=progress,
        )
    if as_json:
        output.print_json(report.to_json())
    else:
        typer.echo(report.to_text(), nl=False)


def _listed(text: str) -> str:
    return "\n".join(f"- {printable(line)}" for line in text.splitlines())
