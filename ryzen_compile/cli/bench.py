"""``ryzen-compile bench``: llama-bench's table for an artifact, a model or a bare shape."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ryzen_compile.cli import output
from ryzen_compile.cli.defaults import RECIPE_USED
from ryzen_compile.cli.failure import printable
from ryzen_compile.cli.trace import TraceFlag, check_trace, measure_in_spans, trace_nodes, write_trace

if TYPE_CHECKING:
    from ryzen_compile.runtime.compiled import CompiledModel
    from ryzen_compile.runtime.engine import Engine
    from ryzen_compile.validate.latency import Timing
    from ryzen_compile.validate.speculation import Continued

CHARACTERS = 1 << 20  # of a text to continue: prompts are spread over as many


def bench(
    target: Annotated[str | None, typer.Argument(help="Artifact directory, model directory or hub id.")] = None,
    shape: Annotated[str | None, typer.Option(help="A known shape with random weights, instead of TARGET.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="onnxruntime, hf or eager; may be repeated.")] = None,
    prompt: Annotated[list[int] | None, typer.Option("-p", min=0, help="pp tests: tokens at once.")] = None,
    new: Annotated[list[int] | None, typer.Option("-n", min=0, help="tg and sg tests: tokens one by one.")] = None,
    depth: Annotated[
        list[int] | None, typer.Option("-d", min=0, help="pp and tg tests: tokens already in the cache.")
    ] = None,
    repeats: Annotated[int, typer.Option("-r", min=1, help="Samples of each test.")] = 5,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", min=1, help="Threads; default: usable cores.")
    ] = None,
    speculate: Annotated[
        str | None,
        typer.Option(help="sg tests: text continued plainly and with auto,lookup,suffix,early_exit,draft_model."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="sg tests: file or directory to continue; default: built in.")
    ] = None,
    draft: Annotated[Path | None, typer.Option(help="sg tests: the artifact that drafts as draft_model.")] = None,
    early_exit: Annotated[int | None, typer.Option(min=1, help="sg tests: layers of early_exit.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help=f"Recipe, when TARGET is no artifact; default: {RECIPE_USED}.")
    ] = None,
    native: output.NativeFlag = None,
    form: Annotated[str, typer.Option("-o", "--output", help="md, csv, json or jsonl.")] = "md",
    seed: Annotated[int, typer.Option(help="Of the random ids and weights.")] = 0,
    trace: TraceFlag = None,
) -> None:
    """Measure prompt processing and generation; engines given together are sampled in turns within one run.

    Of an encoder, texts of 16, 64 and 256 tokens a second.
    """
    from ryzen_compile.cli.encoder import bench_encoder, is_encoder
    from ryzen_compile.cli.generate import speculation_names
    from ryzen_compile.errors import UsageError
    from ryzen_compile.timeline import Timeline
    from ryzen_compile.validate.latency import Workload
    from ryzen_compile.validate.machine import read_machine, stream_read_gbps
    from ryzen_compile.validate.memory import peak_rss_bytes
    from ryzen_compile.validate.table import Row, render

    if (target is None) == (shape is None):
        raise UsageError(
            "give either TARGET or --shape", hint="for example: ryzen-compile bench --shape tinyllama-1.1b"
        )
    if target is not None and is_encoder(target):
        given: dict[str, object] = {"--engine": engine, "-p": prompt, "-n": new, "-d": depth, "--trace": trace}
        given |= {"--speculate": speculate, "--text": text, "--draft": draft, "--early-exit": early_exit}
        bench_encoder(target, given, recipe=recipe, repeats=repeats, threads=threads, native=native, form=form)
        return
    asked = _Asked([] if speculate is None else speculation_names(speculate), text, draft, early_exit)
    asked.check(shape, engine or [])
    check_trace(trace, [name for name in engine or [] if name != "onnxruntime"])
    timeline = Timeline(f"ryzen-compile bench {shape or target}")
    used = threads or read_machine().usable_cores
    tests = [Workload("pp", n, d) for d in depth or [0] for n in (prompt if prompt is not None else [512]) if n]
    tests += [Workload("tg", n, d) for d in depth or [0] for n in (new if new is not None else [128]) if n]
    with ExitStack() as stack:
        with timeline.span("load"):
            opened = _open(stack, target, shape, engine or ["onnxruntime"], recipe, threads, used, seed, native)
            assistant = None if draft is None else _load(stack, draft, threads, native)
        # First: what it refuses is then refused before a minute of measuring.
        with timeline.span("sg tests", drafters=asked.names) if asked.names else nullcontext():
            spoken = _continued(opened, asked, assistant, [n for n in new or [] if n] or [128], repeats)
        timings = measure_in_spans(timeline, opened.engines, tests, repeats, seed=seed)
        peak = peak_rss_bytes()
        if trace is not None and opened.artifact is not None:
            trace_nodes(timeline, opened.artifact, threads, native)
    if trace is not None:
        write_trace(timeline, trace)
    name, parameters = shape or Path(target or "").name, opened.engines[0].spec.parameters
    rows = [Row(name, opened.weights[t.engine], parameters, used, t) for t in timings]
    rows += [Row(name, opened.weights[c.timing.engine], parameters, used, c.timing, c.record()) for c in spoken]
    stream = stream_read_gbps(threads=used)
    facts = {
        "peak_rss_bytes": peak,
        "stream_read_gbps": stream,
        "machine": read_machine().cpu.name,
        "versions": dict(read_machine().versions),
    }
    typer.echo(render(rows, form, extra=facts))  # type: ignore[arg-type]
    if form == "md":
        speculation = [one.to_text() for one in spoken if one.drafts]
        for line in ("", *_summary(timings, opened.weights, stream), *speculation):
            typer.echo(printable(line))
        typer.echo(f"peak memory of this process: {peak / 2**30:.2f} GiB")


@dataclass(frozen=True)
class _Asked:
    """The sg tests: ``names`` of what drafts (none: no such tests), the ``text`` to continue, what some drafts need."""

    names: list[str]
    text: str | None
    draft: Path | None
    early_exit: int | None

    def check(self, shape: str | None, engines: Sequence[str]) -> None:
        """``UsageError`` for what cannot be measured, and for options that nothing would read."""
        from ryzen_compile.errors import UsageError

        readers = (
            ("--text", self.text, {*self.names}),
            ("--draft", self.draft, {"auto", "draft_model"}),
            ("--early-exit", self.early_exit, {"auto", "early_exit"}),
        )
        for option, value, read_by in readers:
            if value is not None and not read_by & {*self.names}:
                which = " or ".join(sorted(read_by)) or "auto"
                raise UsageError(f"{option} is read by sg tests alone", hint=f"give --speculate {which} as well")
        others = sorted({*engines} - {"onnxruntime"})
        if self.names and others:
            raise UsageError(f"--speculate measures artifacts, not engine {others[0]!r}", hint="leave --engine out")
        if self.names and shape is not None:
            raise UsageError("--speculate continues text, and a shape has no tokenizer", hint="give an artifact")
        if "draft_model" in self.names and self.draft is None:
            raise UsageError("--speculate draft_model needs a model that drafts", hint="give --draft ARTIFACT as well")

    def arguments(self, name: str, assistant: CompiledModel | None) -> dict[str, Any]:
        """``generate``'s for one of ``names``."""
        from ryzen_compile.runtime.speculative.settings import NAMES, Speculation

        drafters = None if name == "auto" else tuple(one for one in NAMES if one == name)
        settings = Speculation(drafters=drafters, exit_layers=self.early_exit, required=name != "auto")
        return {"speculation": settings, "assistant_model": assistant if name in ("auto", "draft_model") else None}


def _continued(
    opened: _Opened, asked: _Asked, assistant: CompiledModel | None, new: Sequence[int], repeats: int
) -> list[Continued]:
    """The sg tests of each number of ``new`` tokens: plain generation, then what is ``asked``."""
    from ryzen_compile.cli.generate import tokenizer_of
    from ryzen_compile.text import BUILTIN, BUILTIN_CHARACTERS, read_text
    from ryzen_compile.validate.speculation import measure_speculation, spread_prompts

    if not asked.names or opened.compiled is None or opened.artifact is None:
        return []
    tokenizer = tokenizer_of(opened.compiled, opened.artifact)
    if asked.text is None:  # its second half, as for eval: what models are calibrated on is the first
        content = read_text(BUILTIN)[BUILTIN_CHARACTERS // 2 :]
    else:
        content = read_text(asked.text, characters=CHARACTERS)
    prompts = spread_prompts(content, tokenizer.encode)
    kinds = {name: asked.arguments(name, assistant) for name in asked.names}
    return [
        one
        for tokens in dict.fromkeys(new)
        for one in measure_speculation(opened.compiled, prompts, kinds, new=tokens, repeats=repeats)
    ]


@dataclass
class _Opened:
    """``engines`` to compare, and the bytes of ``weights`` that each reads for one token; the model of the artifact."""

    engines: list[Engine] = field(default_factory=list)
    weights: dict[str, int] = field(default_factory=dict)
    compiled: CompiledModel | None = None
    artifact: Path | None = None


def _open(
    stack: ExitStack,
    target: str | None,
    shape: str | None,
    names: list[str],
    recipe: str | None,
    asked: int | None,
    threads: int,
    seed: int,
    native: bool | None,
) -> _Opened:
    """The engines called for.

    Without a number of threads ``asked`` for, an artifact runs as ``tune`` found best, and others on ``threads``.
    """
    from ryzen_compile.api import export, recipe_for
    from ryzen_compile.config import find_recipe
    from ryzen_compile.errors import UsageError
    from ryzen_compile.manifest import MANIFEST_NAME

    unknown = set(names) - {"onnxruntime", "hf", "eager"}
    if unknown:
        raise UsageError(f"unknown engine {min(unknown)!r}", hint="engines are onnxruntime, hf and eager")
    artifact = Path(target) if target and (Path(target) / MANIFEST_NAME).exists() else None
    model: Any = None
    if artifact is None and (shape or set(names) != {"onnxruntime"}):
        model = _model(target, shape, seed)
    elif artifact is not None and set(names) != {"onnxruntime"}:
        raise UsageError("an artifact runs on onnxruntime only", hint="give the model directory to compare engines")
    opened = _Opened()
    for name in dict.fromkeys(names):
        if name == "onnxruntime":
            if artifact is None:
                artifact = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "artifact"
                # A shape's weights are random: a search would gain nothing, and its format is what decides the speed.
                chosen = find_recipe(recipe_for(target or model) if recipe is None else recipe)
                chosen = find_recipe(chosen, method="rtn") if shape and chosen.weights else chosen
                export(model if shape else target or "", artifact, chosen, verify=False)
            opened.artifact, opened.compiled = artifact, _load(stack, artifact, asked, native)
            opened.engines.append(opened.compiled.engine)
            opened.weights[opened.compiled.engine.name] = (artifact / "model.onnx.data").stat().st_size
        else:
            opened.engines.append(_torch_engine(name, model, threads))
            opened.weights[opened.engines[-1].name] = sum(p.numel() * p.element_size() for p in model.parameters())
    return opened


def _load(stack: ExitStack, artifact: Path, threads: int | None, native: bool | None) -> CompiledModel:
    """Opens it, and says on stderr what that takes and which operators are native."""
    from ryzen_compile.api import load
    from ryzen_compile.backends.onnxruntime.session import OrtEngine
    from ryzen_compile.validate.memory import resident_set

    started, before = time.perf_counter(), resident_set().total
    choice = output.native_choice(native)
    compiled = stack.enter_context(load(artifact, threads=threads, native=choice, digests=False))
    seconds, grown = time.perf_counter() - started, resident_set().total - before
    size = sum(path.stat().st_size for path in artifact.glob("*.onnx*"))
    typer.echo(
        f"loaded in {seconds:.2f} s, resident set +{grown / 2**20:.0f} MiB: {grown / size:.2f} x the artifact",
        err=True,
    )
    if isinstance(compiled.engine, OrtEngine):
        lines = map(printable, compiled.engine.claims.to_text().splitlines())
        typer.echo("native operators: " + "\n".join(lines), err=True)
    return compiled


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
    engine: Any = get_backend("eager").compile(program)
    return engine


def _summary(timings: list[Timing], weights: dict[str, int], stream: float) -> list[str]:
    """What the table does not say: time to first token, bandwidth against the machine's, ratios."""
    lines = []
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
    for t in timings:
        if t.engine != (first := timings[0].engine):
            own = next(o for o in timings if o.engine == first and o.workload == t.workload)
            lines.append(f"{t.workload.name}: {first} is {own.mean / t.mean:.2f} x {t.engine}")
    return lines
