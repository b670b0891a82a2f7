"""``ryzen-compile eval ARTIFACT``: what is left of a model's quality, in numbers with their standard errors."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ryzen_compile.cli import output

if TYPE_CHECKING:
    import numpy as np

    from ryzen_compile.runtime.compiled import CompiledModel
    from ryzen_compile.validate.quality import Estimate, Perplexity, Quality, Scorer

CHARACTERS_PER_TOKEN = 64  # of the text at most so many are read for each token asked for


def eval(  # noqa: A001 - the command's name is the function's
    artifact: Annotated[Path, typer.Argument(help="Artifact directory.")],
    reference: Annotated[
        str | None, typer.Option(help="What it was made from: model directory, hub id or another artifact.")
    ] = None,
    text: Annotated[str, typer.Option(help="A .txt or .jsonl file, a directory of texts, or 'builtin'.")] = "builtin",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to read, rounded up to whole windows.")] = 20_000,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Windows at once; fewer where memory is short.")] = 8,
    native: output.NativeFlag = None,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", min=1, help="Threads; default: usable cores.")
    ] = None,
    fail_above_ratio: Annotated[
        float | None, typer.Option(help="Exit with 7 unless the perplexity ratio's 95 % bound is at most this.")
    ] = None,
    fail_below_top1: Annotated[
        float | None, typer.Option(help="Exit with 7 unless the top-1 agreement's 95 % bound is at least this share.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Measure perplexity on a text and, beside a REFERENCE, mean KL divergence, top-1 agreement and accuracy."""
    from ryzen_compile.api import load
    from ryzen_compile.validate.machine import read_machine
    from ryzen_compile.validate.quality import EngineScorer, Quality, fitting_batch, perplexity, score

    _check_limits(reference, fail_above_ratio, fail_below_top1, -(-tokens // length))
    machine = read_machine()
    used = threads or machine.usable_cores
    with ExitStack() as stack:
        model = stack.enter_context(
            load(artifact, task="generate", threads=threads, native=output.native_choice(native))
        )
        windows, facts = _windows(model, artifact, text, length, tokens)
        other = None if reference is None else _reference(stack, reference, used)
        fitting = fitting_batch(batch, length, model.spec.vocab, read_machine().usable_memory // 4)
        progress = stack.enter_context(_counted(quiet or as_json))
        scorer = EngineScorer(model.engine)
        found: Quality | Perplexity
        if other is None:
            found = perplexity(scorer, windows, batch=fitting, progress=progress)
        else:
            found = score(scorer, other, windows, batch=fitting, progress=progress)
    facts |= {"artifact": str(artifact), "reference": reference, "length": length, "threads": used}
    facts |= {"machine": machine.cpu.name, "versions": dict(machine.versions)}
    if as_json:
        bound = {"accuracy_loss_bound": found.accuracy_loss_bound} if isinstance(found, Quality) else {}
        output.print_json({**facts, **_plain({**dataclasses.asdict(found), **bound})})
    else:
        for line in _lines(found, facts):
            typer.echo(line)
    _hold_to(found, fail_above_ratio, fail_below_top1)


def _check_limits(reference: str | None, ratio: float | None, top1: float | None, windows: int) -> None:
    """Before a minute of work: limits that cannot be held to."""
    from ryzen_compile.errors import UsageError
    from ryzen_compile.validate.quality import BOUND_WINDOWS

    if ratio is None and top1 is None:
        return
    if reference is None:
        raise UsageError("--fail-above-ratio and --fail-below-top1 compare with a model", hint="give --reference MODEL")
    if ratio is not None and not ratio > 0:
        raise UsageError(f"--fail-above-ratio must be above 0, got {ratio}")
    if top1 is not None and not 0 <= top1 <= 1:
        raise UsageError(f"--fail-below-top1 must be a share from 0 to 1, got {top1}", hint="99 % is 0.99")
    if windows < BOUND_WINDOWS:
        raise UsageError(
            f"{windows} windows are too few for a confidence bound, expected at least {BOUND_WINDOWS}",
            hint="ask for more tokens or a shorter length",
        )


def _windows(
    model: CompiledModel, artifact: Path, source: str, length: int, tokens: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """The text in the model's tokens, ``(n, length)``, and what it is."""
    from ryzen_compile.errors import ArtifactError, UsageError
    from ryzen_compile.text import BUILTIN, BUILTIN_CHARACTERS, digest, read_text, token_windows

    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        raise ArtifactError(f"{artifact} holds no tokenizer.json", hint="score ids through validate.quality")
    if length > model.spec.context:
        raise UsageError(
            f"--length {length} exceeds the model's context of {model.spec.context} tokens",
            hint=f"use --length {model.spec.context} or less",
        )
    if source == BUILTIN:
        # Calibration reads the built-in text from its beginning, and what was calibrated on measures too well.
        name, content = f"{BUILTIN}, second half", read_text(BUILTIN)[BUILTIN_CHARACTERS // 2 :]
    else:
        name, content = Path(source).name, read_text(source, characters=CHARACTERS_PER_TOKEN * (tokens + length))
    return token_windows(content, tokenizer.encode, length, tokens), {"text": name, "sha256": digest(content)}


def _reference(stack: ExitStack, name: str, threads: int) -> Scorer:
    """An artifact as it generates, anything else as the float model."""
    from ryzen_compile.api import load, read_source
    from ryzen_compile.manifest import MANIFEST_NAME
    from ryzen_compile.validate.quality import EngineScorer, ModelScorer

    if (Path(name) / MANIFEST_NAME).exists():
        # On stock operators: an artifact beside itself then shows what native ones change.
        return EngineScorer(stack.enter_context(load(name, task="generate", threads=threads, native=False)).engine)
    import torch

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own bars follow it
    torch.set_num_threads(threads)
    return ModelScorer(read_source(name).model)


@contextmanager
def _counted(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of windows on stderr where that is a terminal."""
    console = output.stderr()
    if quiet or not console.is_terminal:
        yield None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("scoring windows", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(found: Quality | Perplexity, facts: dict[str, Any]) -> list[str]:
    from ryzen_compile.validate.quality import Quality

    lines = [f"text         {facts['text']} (sha256 {facts['sha256'][:16]})"]
    lines.append(f"predicted    {found.tokens} tokens in {found.windows} windows of {facts['length']}")
    if isinstance(found, Quality):
        lines.append(f"mean KL      {_shown(found.kl, '.3g')} nats per token (reference || artifact)")
        lines.append(f"top-1        {_shown(found.top1, '.3f', 100)} % the same token")
        lines.append(f"perplexity   {_shown(found.perplexity)}, reference {_shown(found.reference_perplexity)}")
        lines.append(f"ratio        {_shown(found.ratio, '.5f')}")
        right, reference = (_shown(share, ".3f", 100) for share in (found.accuracy, found.reference_accuracy))
        lines.append(f"accuracy     {right} % the text's own token, reference {reference} %")
        loss = _shown(found.accuracy_loss, ".3f", 100)
        lines.append(f"loss         {loss} % of the reference's accuracy{_up_to(found)}")
        lines.append(f"worst        window {found.worst_window}: mean KL {found.worst_kl:.3g}")
    else:
        lines.append(f"perplexity   {_shown(found.perplexity)}")
        lines.append(f"worst        window {found.worst_window}")
        lines.append("no reference: perplexity only; --reference MODEL adds KL, agreement, accuracy and the ratio")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    return [*lines, f"machine      {facts['machine']}, {facts['threads']} threads", f"versions     {versions}"]


def _up_to(found: Quality) -> str:
    """``, at 95 % confidence up to 0.31 %``; nothing where too few windows bound nothing."""
    bound = found.accuracy_loss_bound
    return f", at 95 % confidence up to {100 * bound:.3f} %" if math.isfinite(bound) else ""


def _shown(estimate: Estimate, form: str = ".4f", factor: int = 1) -> str:
    """``1.0004 ± 0.0002``: a value and its standard error, which one window does not have."""
    error = "unknown" if math.isnan(estimate.error) else f"{factor * estimate.error:{form}}"
    return f"{factor * estimate.value:{form}} ± {error}"


def _plain(value: Any) -> Any:
    """For JSON, which has no NaN and no infinity: null in their place."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _hold_to(found: Quality | Perplexity, ratio: float | None, top1: float | None) -> None:
    """Raises ``ParityError`` when a 95 % confidence bound misses its limit."""
    from ryzen_compile.errors import ParityError
    from ryzen_compile.validate.quality import Quality

    if not isinstance(found, Quality):
        return
    if ratio is not None and not found.ratio_bound <= ratio:
        raise ParityError(
            f"perplexity ratio {_shown(found.ratio, '.5f')}, at 95 % confidence up to {found.ratio_bound:.5f}: "
            f"expected at most {ratio}",
            hint="use a finer format or calibrate, or measure more tokens",
        )
    if top1 is not None and not found.top1_bound >= top1:
        raise ParityError(
            f"top-1 agreement {_shown(found.top1, '.5f')}, at 95 % confidence down to {found.top1_bound:.5f}: "
            f"expected at least {top1}",
            hint="use a finer format or calibrate, or measure more tokens",
        )
