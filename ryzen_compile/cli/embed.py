"""``ryzen-compile embed MODEL [TEXT ...]``: the vectors of texts, on stdout or in a file."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from ryzen_compile.cli import output
from ryzen_compile.cli.defaults import RECIPE_USED
from ryzen_compile.cli.encoder import open_encoder
from ryzen_compile.errors import ResourceError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from ryzen_compile.runtime.encoder import EncodingStats

SUFFIXES = (".npy", ".jsonl")


def embed(
    model: Annotated[str, typer.Argument(help="Artifact directory, model directory or hub id.")],
    text: Annotated[list[str] | None, typer.Argument(help="Texts; read from stdin, one a line, when absent.")] = None,
    file: Annotated[Path | None, typer.Option(help="Texts, one a line: .jsonl (strings, or 'text'), or any.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the vectors to this .npy or .jsonl file.")] = None,
    dims: Annotated[int | None, typer.Option(help="Keep so many dimensions, scaled to length 1.")] = None,
    precision: Annotated[str, typer.Option(help="float32, int8 or binary (a bit for each sign).")] = "float32",
    prompt_name: Annotated[str | None, typer.Option(help="One of the model's prompts, put before each text.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A prompt, put before each text.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 32,
    recipe: Annotated[str | None, typer.Option(help=f"When MODEL is no artifact; default: {RECIPE_USED}.")] = None,
    pooling: output.PoolingOption = None,
    no_normalize: output.NoNormalizeFlag = False,
    threads: Annotated[int | None, typer.Option("-t", "--threads", min=1, help="Threads of ONNX Runtime.")] = None,
    native: output.NativeFlag = None,
    no_digests: Annotated[bool, typer.Option("--no-digests", help="Do not hash the weights before use.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Turn texts into vectors: JSON Lines on stdout, or a file."""
    from ryzen_compile.numerics.embedding_codes import PRECISIONS
    from ryzen_compile.runtime.encoder import EncodingStats

    _check_out(out)
    kept = next((name for name in PRECISIONS if name == precision), None)
    if kept is None:
        raise UsageError(f"--precision: there is no {precision!r}", hint=f"use one of {', '.join(PRECISIONS)}")
    pooled = output.pooling_choice(pooling, no_normalize)
    texts = _texts(text, file)
    hushed = quiet or as_json
    with ExitStack() as stack:
        encoder = stack.enter_context(
            open_encoder(model, recipe, pooled, threads, native, digests=not no_digests, quiet=hushed)
        )
        stats = EncodingStats()
        vectors = encoder.encode(
            texts,
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            dims=dims,
            precision=kept,
            show_progress=not hushed and output.stderr().is_terminal,
            stats=stats,
        )
        width, context = encoder.dims if dims is None else dims, encoder.context
    if out is not None:
        _write(out, texts, vectors)
    if as_json:
        facts = {"model": model, "dims": width, "precision": kept, **vars(stats), "context": context}
        output.print_json(facts | ({"vectors": [_plain(row) for row in vectors]} if out is None else {"out": str(out)}))
        return
    if out is None:
        for row in vectors:
            typer.echo(json.dumps(_plain(row)))
    else:
        typer.echo(f"wrote {len(texts)} vector(s) of {width} dimensions, {kept}, to {out}")
    if not quiet:
        output.stderr().print(_summary(stats, context), markup=False)


def _check_out(out: Path | None) -> None:
    """Before the model is opened: a file that cannot be written."""
    if out is None:
        return
    if out.suffix not in SUFFIXES:
        raise UsageError(f"--out {out}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out} is not a file in a directory that exists")


def _texts(given: Sequence[str] | None, file: Path | None) -> list[str]:
    from ryzen_compile.text import read_texts, split_lines

    if given and file is not None:
        raise UsageError("texts were given twice, as arguments and as --file", hint="give one of them")
    if file is not None:
        return read_texts(file)
    return list(given) if given else split_lines(sys.stdin.read())


def _write(out: Path, texts: Sequence[str], vectors: np.ndarray) -> None:
    """The whole file or none: it is written beside its place first."""
    import numpy as np

    def arrays(stream: BinaryIO) -> None:
        np.save(stream, vectors, allow_pickle=False)

    def lines(stream: BinaryIO) -> None:
        for text, row in zip(texts, vectors, strict=True):
            record = {"text": text, "embedding": _plain(row)}
            stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    write: Callable[[BinaryIO], None] = arrays if out.suffix == ".npy" else lines
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as stream:
            write(stream)
        temporary.replace(out)
    except OSError as error:
        raise ResourceError(f"cannot write {out}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _plain(row: np.ndarray) -> list[float | int]:
    """A row for JSON: float32 in the fewest digits that give it back."""
    return [float(str(value)) for value in row] if row.dtype.kind == "f" else row.tolist()


def _summary(stats: EncodingStats, context: int) -> str:
    cut = f", {stats.truncated} cut to {context} tokens" if stats.truncated else ""
    rate = f", {stats.texts / stats.seconds:.1f} texts/s" if stats.texts and stats.seconds else ""
    return f"[{stats.texts} texts, {stats.tokens} tokens{cut}{rate}]"
