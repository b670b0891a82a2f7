"""``ryzen-compile export MODEL OUT``: a model directory or hub id becomes an artifact directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ryzen_compile.cli import output
from ryzen_compile.cli.defaults import RECIPE_USED
from ryzen_compile.errors import UsageError

if TYPE_CHECKING:
    from ryzen_compile.backends.onnxruntime.pass_dump import PassDumper


def export(
    model: Annotated[str, typer.Argument(help="Model directory or hub id (safetensors).")],
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    recipe: Annotated[
        str | None,
        typer.Option(help=f"How to optimize, see `ryzen-compile recipes`; default: {RECIPE_USED}."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="'embed' or 'generate', where the model leaves it open.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Positions to make it for; default: the model's.")] = None,
    pooling: output.PoolingOption = None,
    no_normalize: output.NoNormalizeFlag = False,
    logits: Annotated[str | None, typer.Option(help="'last' (generation) or 'all' (scoring text).")] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Mix the recipe's format with the next wider one up to these bits per weight.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="REGEX=SETTING[,SETTING] for weights by name: '4', '8', 'block=32', 'method=mse', 'float'."),
    ] = None,
    embedding: Annotated[
        str | None, typer.Option(help="The table of tokens as codes: 'kmeans', or 'dkm' (trained on the text).")
    ] = None,
    embedding_bits: Annotated[int | None, typer.Option(help="Of a code, 1 to 8; default: 8.")] = None,
    cluster_dim: Annotated[int | None, typer.Option(help="Weights that a code stands for: 1, 2, 4, 8.")] = None,
    embedding_ratio: Annotated[
        float | None, typer.Option(help="How much smaller than float32 the table is to be; chooses the others.")
    ] = None,
    embedding_steps: Annotated[int | None, typer.Option(help="Of training, with 'dkm'; default: 300.")] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the channels that linear layers leave out, the smallest: 0 to 0.95.")
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="Text for methods that look at activations: a file, a directory, or 'builtin'.")
    ] = "builtin",
    prefill: Annotated[
        str | None, typer.Option(help="'shared' or 'int8': a second form of the weights, for prompts.")
    ] = None,
    kv: Annotated[
        str | None, typer.Option(help="Keys and values as 'fp32', 'int8', 'int4' or 'auto': calibrated by itself.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="For endless streams: keep this many recent tokens, and the sinks.")
    ] = None,
    sinks: Annotated[int | None, typer.Option(help="First tokens that a stream keeps; default: 4.")] = None,
    native: Annotated[
        bool, typer.Option("--native", help="Also write the model over our operators and their library, for genai.")
    ] = False,
    dump_passes: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the graph after each pass there, as drawings for Netron.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is there.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip the parity gate after each pass.")] = False,
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use the hub cache only.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the model.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Capture MODEL, rewrite it pass by pass under the parity gate, and write an ONNX artifact to OUT."""
    from ryzen_compile.api import export as write
    from ryzen_compile.api import recipe_for, task_of
    from ryzen_compile.cli.narrate import hush_bars, narrated
    from ryzen_compile.config import embedding_settings, find_recipe, parse_overrides
    from ryzen_compile.pipeline import default_passes, encoder_passes
    from ryzen_compile.validate.table import human_size

    dumper = None if dump_passes is None else _dumper(dump_passes, out)
    where: Any = {
        "revision": revision,
        "local_files_only": True if offline else None,
        "trust_remote_code": trust_remote_code,
    }
    if quiet or as_json:
        hush_bars()
    done = task_of(model, task, **where)  # type: ignore[arg-type]
    chosen = find_recipe(
        recipe_for(model, task=done, **where) if recipe is None else recipe,
        context=context,
        logits=logits,
        prefill=prefill,
        kv=kv,
        window=window,
        sinks=sinks,
        target_bits=target_bits,
        overrides=parse_overrides(override) if override else None,
        embedding=embedding_settings(
            embedding, bits=embedding_bits, cluster_dim=cluster_dim, ratio=embedding_ratio, steps=embedding_steps
        ),
        sparsity=sparsity,
    )
    passes = default_passes(chosen) if done == "generate" else encoder_passes(chosen)
    with narrated(len(passes), quiet=quiet or as_json) as progress:
        report = write(
            model,
            out,
            chosen,
            task=done,
            pooling=output.pooling_choice(pooling, no_normalize),
            calibration=calibration,
            native=native,
            force=force,
            verify=not no_verify,
            progress=progress,
            observe=dumper,
            **where,
        )
    if as_json:
        output.print_json({"artifact": str(out), "report": report.to_json()})
        return
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    console = output.stdout()
    console.print(report.to_text(misses=False), markup=False)
    console.print(f"wrote {out} ({human_size(size)})", markup=False)
    if done == "generate":
        console.print(f"cache: {_cache_line(out)}", markup=False)
    else:
        console.print(f"vectors: {_vectors_line(out)}", markup=False)


def _vectors_line(out: Path) -> str:
    """What an encoder's artifact makes of a text."""
    from ryzen_compile.backends.onnxruntime.artifact import read

    found = read(out, digests=False)
    pooling, settings = found.spec.pooling, None if found.encoding is None else found.encoding.settings
    if pooling is None or settings is None:
        return "none"
    unit = ", scaled to length 1" if pooling.normalize else ""
    return f"{settings.dims or found.spec.hidden} dimensions, {pooling.mode} of up to {settings.context} tokens{unit}"


def _dumper(directory: Path, out: Path) -> PassDumper:
    """Before the model is read: a directory that cannot be written to, or that the artifact would replace."""
    from ryzen_compile.backends.onnxruntime.pass_dump import PassDumper

    target = out.resolve()
    if target == directory.resolve() or target in directory.resolve().parents:
        raise UsageError(f"--dump-passes {directory} is inside the output {out}", hint="name another directory")
    return PassDumper(directory)


def _cache_line(out: Path) -> str:
    """What a token of a sequence costs in the artifact's cache, and what a sequence costs at the least."""
    from ryzen_compile.backends.onnxruntime.artifact import slots_of
    from ryzen_compile.manifest import read_manifest
    from ryzen_compile.runtime.layout import fixed_bytes, token_bytes

    slots = slots_of(read_manifest(out))
    line = f"{token_bytes(slots)} bytes per token"
    return f"{line}, and {fixed_bytes(slots)} per sequence for windows" if fixed_bytes(slots) else line
