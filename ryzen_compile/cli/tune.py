"""``ryzen-compile tune``: how an artifact runs best on this machine, measured and kept in its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ryzen_compile.cli import output
from ryzen_compile.cli.failure import printable

if TYPE_CHECKING:
    from ryzen_compile.backends.onnxruntime.candidates import Timed
    from ryzen_compile.backends.onnxruntime.kernel_choices import KernelChoices
    from ryzen_compile.backends.onnxruntime.tuning import Tuning

KERNEL_SHARE = 1 / 3  # of the time, for blocks and activations


def tune(
    artifact: Annotated[Path, typer.Argument(help="Artifact directory.")],
    threads: Annotated[
        str | None, typer.Option(help="Numbers of threads to try, as 1,2,4; default: up to all usable.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure, about.")] = 60.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and print; write nothing.")] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Measure threads, operators, the cost of a step and block choices on this machine; load then uses the result."""
    from ryzen_compile.backends.onnxruntime.kernel_choices import kernel_choices
    from ryzen_compile.backends.onnxruntime.tune import tune as measure
    from ryzen_compile.manifest import require_writable, update_tuning
    from ryzen_compile.validate.machine import read_machine

    counts = None if threads is None else _counts(threads)
    if not dry_run and artifact.is_dir():
        require_writable(artifact)
    console = output.stderr()

    def progress(text: str) -> None:
        if not as_json:
            console.print(printable(text), markup=False)

    tuning = measure(artifact, threads=counts, budget_seconds=seconds * (1 - KERNEL_SHARE), progress=progress)
    machine = read_machine()
    kernels = kernel_choices(
        artifact,
        threads=tuning.threads,
        spinning=tuning.spinning,
        budget_seconds=seconds * KERNEL_SHARE,
        memory_bytes=machine.usable_memory,
        l3_bytes=machine.usable_l3_bytes,
        progress=progress,
    )
    if not dry_run:
        update_tuning(artifact, tuning.key, tuning.to_json())
    if as_json:
        output.print_json(_as_json(tuning, kernels, written=not dry_run))
        return
    for line in (
        *_candidates(tuning),
        *_operators(tuning),
        "",
        *_curves(tuning),
        *_exit(tuning),
        "",
        *_kernels(kernels),
        "",
    ):
        typer.echo(line)
    typer.echo(f"nothing written: the entry would be {tuning.key}" if dry_run else f"wrote {tuning.key} to {artifact}")


def _counts(text: str) -> list[int]:
    from ryzen_compile.errors import UsageError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"--threads must be numbers with commas between them, got {text!r}", hint="as 1,2,4"
        ) from error


def _candidates(tuning: Tuning) -> list[str]:
    from ryzen_compile.backends.onnxruntime.candidates import NEW, PROMPT

    lines = [
        f"a request of {PROMPT} + {NEW} tokens, ms:",
        f"{'threads':>8}{'spinning':>10}{'median':>10}{'± spread':>10}",
    ]
    for c in tuning.candidates:
        chosen = "  chosen" if (c.threads, c.spinning) == (tuning.threads, tuning.spinning) else ""
        figures = f"{1e3 * c.median:>10.1f}{1e3 * c.spread:>10.1f}"
        lines.append(f"{c.threads:>8}{'on' if c.spinning else 'off':>10}{figures}{chosen}")
    return [*lines, tuning.reason]


def _operators(tuning: Tuning) -> list[str]:
    native = tuning.native
    if native is None:
        return ["native operators were not measured: ryzen-compile doctor says whether they are there"]
    lines = ["", f"{'operators':<32}{'median':>10}{'± spread':>10}"]
    for c in native.candidates:
        chosen = "  chosen" if c.kinds == native.kinds else ""
        lines.append(f"{c!s:<32}{1e3 * c.median:>10.1f}{1e3 * c.spread:>10.1f}{chosen}")
    return [*lines, native.reason]


def _curves(tuning: Tuning) -> list[str]:
    curves = tuning.curves
    behind = "".join(f"{f'behind {context}':>14}" for context in curves)
    lines = [
        "one step of M new tokens behind others, ms:",
        f"{'M':>8}{behind}{'T(M)/T(1)':>12}",
        *(
            f"{m:>8}{''.join(f'{1e3 * curve[m]:>14.3f}' for curve in curves.values())}{t / longest[1]:>12.2f}"
            for longest in (curves[tuning.context],)
            for m, t in longest.items()
        ),
    ]
    if not tuning.steady:
        lines.append("a longer step was faster than a shorter one: the machine was busy, tune again when it is quiet")
    return lines + [f"a prompt of {tokens}: {1e3 * t:.1f} ms" for tokens, t in tuning.prefill.items()]


def _exit(tuning: Tuning) -> list[str]:
    found = tuning.exit
    if found is None:
        return ["no early exit was tried: the model cannot be left early, or came without a tokenizer"]
    use = "used to draft with" if found.pays else "not used"
    agrees = f"{100 * found.agreement:.0f} % of tokens as the whole model"
    speed = f"{1e3 * found.seconds:.3f} ms a token, {found.gain:.2f} of the speed without to be expected"
    return [f"an early exit after {found.layers} of the layers: {agrees}, {speed}: {use}"]


def _kernels(kernels: KernelChoices) -> list[str]:
    from ryzen_compile.backends.onnxruntime.kernel_choices import PROMPT

    if kernels.skipped:
        return [f"blocks and activations were not timed: {kernels.skipped}"]
    lines = ["products with quantized weights alone, ms:", f"{'block':>8}{'level':>8}{'M=1':>10}{f'M={PROMPT}':>10}"]
    for t in kernels.timings:
        now = "  as now" if (t.block, t.accuracy_level) == kernels.now else ""
        figures = f"{1e3 * t.token_seconds:>10.2f}{1e3 * t.prompt_seconds:>10.0f}"
        lines.append(f"{t.block:>8}{t.accuracy_level:>8}{figures}{now}")
    return [*lines, *kernels.advice]


def _as_json(tuning: Tuning, kernels: KernelChoices, *, written: bool) -> dict[str, object]:
    from dataclasses import asdict

    record = tuning.to_json()
    entries = [*record["candidates"]]
    ways: list[Timed] = [*tuning.candidates]
    if tuning.native is not None:
        entries += record["native"]["candidates"]
        ways += tuning.native.candidates
    for entry, way in zip(entries, ways, strict=True):
        entry.update(median=way.median, spread=way.spread)
    return {"key": tuning.key, **record, "kernels": asdict(kernels), "written": written}
