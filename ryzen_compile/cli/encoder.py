"""What commands do with a model when it is an encoder: tell, open and time it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ryzen_compile.cli import output
from ryzen_compile.errors import UsageError

if TYPE_CHECKING:
    from ryzen_compile.runtime.encoder import CompiledEncoder
    from ryzen_compile.spec import Pooling
    from ryzen_compile.validate.encoding import EncodingTiming


def is_encoder(target: str) -> bool:
    """Whether an artifact, a model directory or a hub id is one."""
    from ryzen_compile.api import task_of
    from ryzen_compile.manifest import MANIFEST_NAME, read_manifest

    if (Path(target) / MANIFEST_NAME).exists():
        spec = read_manifest(Path(target)).get("spec")
        return isinstance(spec, dict) and spec.get("pooling") is not None
    return task_of(target) == "embed"


def open_encoder(
    target: str,
    recipe: str | None,
    pooling: Pooling | None,
    threads: int | None,
    native: bool | None,
    *,
    digests: bool = True,
    quiet: bool = False,
) -> CompiledEncoder:
    """An artifact, or a model that is compiled for this one call."""
    from ryzen_compile.api import load, optimize, recipe_for
    from ryzen_compile.cli.narrate import narrated
    from ryzen_compile.config import find_recipe
    from ryzen_compile.manifest import MANIFEST_NAME
    from ryzen_compile.pipeline import encoder_passes

    choice = output.native_choice(native)
    if (Path(target) / MANIFEST_NAME).exists():
        if recipe is not None or pooling is not None:
            raise UsageError("--recipe and --pooling are for models that are compiled, not for an artifact")
        return load(target, task="embed", threads=threads, native=choice, digests=digests)
    chosen = find_recipe(recipe_for(target, task="embed") if recipe is None else recipe)
    with narrated(len(encoder_passes(chosen)), quiet=quiet) as progress:
        encoder: CompiledEncoder = optimize(
            target, chosen, task="embed", pooling=pooling, threads=threads, native=choice, progress=progress
        )
    return encoder


def bench_encoder(
    target: str,
    given: Mapping[str, object],
    *,
    recipe: str | None,
    repeats: int,
    threads: int | None,
    native: bool | None,
    form: str,
) -> None:
    """``bench`` of an encoder; ``given`` are options that are about generating, which it refuses."""
    from ryzen_compile.validate.encoding import BATCH, measure_encoding
    from ryzen_compile.validate.machine import read_machine

    if named := [name for name, value in given.items() if value is not None]:
        raise UsageError(f"{named[0]} is about generating, and {target} is an encoder", hint="leave it out")
    if form not in ("md", "json"):
        raise UsageError(f"-o {form} is for models that generate", hint="md or json")
    machine = read_machine()
    with open_encoder(target, recipe, None, threads, native, digests=False) as encoder:
        timings, spec = measure_encoding(encoder.engine, repeats=repeats), encoder.spec
    facts = {
        "model": Path(target).name,
        "parameters": spec.parameters,
        "threads": threads or machine.usable_cores,
        "batch": BATCH,
        "machine": machine.cpu.name,
        "versions": dict(machine.versions),
    }
    if form == "json":
        output.print_json({**facts, "tests": [_record(timing) for timing in timings]})
        return
    typer.echo(f"{facts['model']}, {facts['threads']} threads, batches of {BATCH}, on {facts['machine']}\n")
    typer.echo("| tokens of a text | texts/s | tokens/s |\n|---:|---:|---:|")
    for timing in timings:
        rate = f"{timing.mean:.1f} ± {timing.sd:.1f}"
        typer.echo(f"| {timing.tokens} | {rate} | {timing.mean * timing.tokens:.0f} |")


def _record(timing: EncodingTiming) -> dict[str, Any]:
    return {"tokens": timing.tokens, "texts_per_s": timing.mean, "sd": timing.sd, "seconds": list(timing.seconds)}
