"""``ryzen-compile bench``: llama-bench's table for an artifact, a model or a bare shape."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ryzen_compile.cli import output
from ryzen_compile.cli.defaults import DEFAULT_RECIPE
from ryzen_compile.cli.failure import printable

if TYPE_CHECKING:
    from ryzen_compile.runtime.engine import Engine
    from ryzen_compile.validate.latency import Timing


def bench(
    target: Annotated[str | None, typer.Argument(help="Artifact directory, model directory or hub id.")] = None,
    shape: Annotated[str | None, typer.Option(help="A known shape with random weights, instead of TARGET.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="onnxruntime, hf or eager; may be repeated.")] = None,
    prompt: Annotated[list[int] | None, typer.Option("-p", min=0, help="pp tests: tokens at once.")] = None,
    new: Annotated[list[int] | None, typer.Option("-n", min=0, help="tg tests: tokens one by one.")] = None,
    depth: Annotated[list[int] | None, typer.Option("-d", min=0, help="Tokens already in the cache.")] = None,
    repeats: Annotated[int, typer.Option("-r", min=1, help="Samples of each test.")] = 5,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", min=1, help="Threads; default: usable cores.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Recipe, when TARGET is no artifact.")] = DEFAULT_RECIPE,
    native: output.NativeFlag = None,
    form: Annotated[str, typer.Option("-o", "--output", help="md, csv, json or jsonl.")] = "md",
    seed: Annotated[int, typer.Option(help="Of the random ids and weights.")] = 0,
) -> None:
    """Measure prompt processing and generation; engines given together are sampled in turns within one run."""
    from ryzen_compile.errors import UsageError
    from ryzen_compile.validate.latency import Workload, measure
    from ryzen_compile.validate.machine import read_machine, stream_read_gbps
    from ryzen_compile.validate.memory import peak_rss_bytes
    from ryzen_compile.validate.table import Row, render

    if (target is None) == (shape is None):
        raise UsageError(
            "give either TARGET or --shape", hint="for example: ryzen-compile bench --shape tinyllama-1.1b"
        )
    used = threads or read_machine().usable_cores
    tests = [Workload("pp", n, d) for d in depth or [0] for n in (prompt if prompt is not None else [512]) if n]
    tests += [Workload("tg", n, d) for d in depth or [0] for n in (new if new is not None else [128]) if n]
    with ExitStack() as stack:
        engines, weights = _open(stack, target, shape, engine or ["onnxruntime"], recipe, threads, used, seed, native)
        timings = measure(engines, tests, repeats, seed=seed)
    name = shape or Path(target or "").name
    parameters = engines[0].spec.parameters
    rows = [Row(name, weights[t.engine], parameters, used, t) for t in timings]
    stream = stream_read_gbps(threads=used)
    peak = peak_rss_bytes()
    facts = {
        "peak_rss_bytes": peak,
        "stream_read_gbps": stream,
        "machine": read_machine().cpu.name,
        "versions": dict(read_machine().versions),
    }
    typer.echo(render(rows, form, extra=facts))  # type: ignore[arg-type]
    if form == "md":
        for line in _summary(timings, weights, stream, peak):
            typer.echo(line)


def _open(
    stack: ExitStack,
    target: str | None,
    shape: str | None,
    names: list[str],
    recipe: str,
    asked: int | None,
    threads: int,
    seed: int,
    native: bool | None,
) -> tuple[list[Engine], dict[str, int]]:
    """The engines called for, and the bytes of weights that each reads for one token.

    Without a number of threads ``asked`` for, an artifact runs as ``tune`` found best, and others on ``threads``.
    """
    from ryzen_compile.api import export, load
    from ryzen_compile.backends.onnxruntime.session import OrtEngine
    from ryzen_compile.config import find_recipe
    from ryzen_compile.errors import UsageError
    from ryzen_compile.manifest import MANIFEST_NAME
    from ryzen_compile.validate.memory import resident_set

    unknown = set(names) - {"onnxruntime", "hf", "eager"}
    if unknown:
        raise UsageError(f"unknown engine {min(unknown)!r}", hint="engines are onnxruntime, hf and eager")
    artifact = Path(target) if target and (Path(target) / MANIFEST_NAME).exists() else None
    model: Any = None
    if artifact is None and (shape or set(names) != {"onnxruntime"}):
        model = _model(target, shape, seed)
    elif artifact is not None and set(names) != {"onnxruntime"}:
        raise UsageError("an artifact runs on onnxruntime only", hint="give the model directory to compare engines")
    engines: list[Engine] = []
    sizes: dict[str, int] = {}
    for name in dict.fromkeys(names):
        if name == "onnxruntime":
            if artifact is None:
                artifact = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "artifact"
                # A shape's weights are random: a search would gain nothing, and its format is what decides the speed.
                chosen = find_recipe(recipe)
                chosen = find_recipe(chosen, method="rtn") if shape and chosen.weights else chosen
                export(model if shape else target or "", artifact, chosen, verify=False)
            started, before = time.perf_counter(), resident_set().total
            choice = output.native_choice(native)
            compiled = stack.enter_context(load(artifact, threads=asked, native=choice, digests=False))
            seconds, grown = time.perf_counter() - started, resident_set().total - before
            engines.append(compiled.engine)
            sizes[compiled.engine.name] = (artifact / "model.onnx.data").stat().st_size
            size = sum(path.stat().st_size for path in artifact.glob("*.onnx*"))
            typer.echo(
                f"loaded in {seconds:.2f} s, resident set +{grown / 2**20:.0f} MiB: {grown / size:.2f} x the artifact",
                err=True,
            )
            if isinstance(compiled.engine, OrtEngine):
                lines = map(printable, compiled.engine.claims.to_text().splitlines())
                typer.echo("native operators: " + "\n".join(lines), err=True)
        else:
            engines.append(_torch_engine(name, model, threads))
            sizes[engines[-1].name] = sum(p.numel() * p.element_size() for p in model.parameters())
    return engines, sizes


def _model(target: str | None, shape: str | None, seed: int) -> Any:
    if shape is not None:
        from ryzen_compile.shapes import random_model

        return random_model(shape, seed=seed)
    from ryzen_compile.api import read_source

    return read_source(target or "").model


def _torch_engine(name: str, model: Any, threads: int) -> Engine:
    import torch

    torch.set_num_threads(threads)
    if name == "hf":
        from ryzen_compile.validate.huggingface import HuggingFaceEager

        return HuggingFaceEager(model)
    from ryzen_compile.api import rewrite
    from ryzen_compile.backends import get_backend
    from ryzen_compile.config import find_recipe

    program, _ = rewrite(model, find_recipe("fp32"), backend="eager", verify=False)
    return get_backend("eager").compile(program)


def _summary(timings: list[Timing], weights: dict[str, int], stream: float, peak: int) -> list[str]:
    """What the table does not say: time to first token, bandwidth against the machine's, memory, ratios."""
    lines = [""]
    for t in timings:
        best = sorted(t.seconds)[len(t.seconds) // 2]
        if t.workload.kind == "pp":
            lines.append(f"{t.engine}: {t.workload.name}: first token after {best * 1e3:.0f} ms (median)")
        else:
            rate = weights[t.engine] * t.workload.tokens / best / 1e9
            lines.append(
                f"{t.engine}: {t.workload.name}: {best / t.workload.tokens * 1e3:.2f} ms per token, weights read at "
                f"{rate:.1f} GB/s, {100 * rate / stream:.0f} % of a plain read ({stream:.1f} GB/s)"
            )
    first = timings[0].engine
    for t in timings:
        if t.engine != first:
            own = next(o for o in timings if o.engine == first and o.workload == t.workload)
            lines.append(f"{t.workload.name}: {first} is {own.mean / t.mean:.2f} x {t.engine}")
    lines.append(f"peak memory of this process: {peak / 2**30:.2f} GiB")
    return lines
