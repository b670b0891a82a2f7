"""From an encoder that was read and rewritten to one that people hold: its tokenizer, its settings, its int8 ranges."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.encoder_source import LoadedEncoder
from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.embedding_codes import Int8Range
from ryzen_compile.runtime.encoder import CompiledEncoder, EncodingStats
from ryzen_compile.runtime.engine import EncoderEngine
from ryzen_compile.runtime.tokenizer import Tokenizer
from ryzen_compile.spec import EncoderSettings
from ryzen_compile.text import read_text

if TYPE_CHECKING:
    from ryzen_compile.backends.onnxruntime.artifact import Artifact
    from ryzen_compile.backends.onnxruntime.emit import LoweringOptions
    from ryzen_compile.backends.onnxruntime.session import SessionOptions
    from ryzen_compile.program import Program
    from ryzen_compile.report import Report

RANGE_TEXTS, RANGE_CHARACTERS = 256, 256  # paragraphs, or pieces of so many characters, that ranges are measured on
RANGE_FEWEST = 16  # different ones: fewer tell too little of what other texts will be
RANGE_SPREAD = 1_000_000  # characters of a text that they are taken from
# Text of another kind leaves the ranges of this one, and a value that is clamped costs far more than coarser steps do:
# the worst of 12 strange texts keeps a cosine of 0.977 without, 0.9995 with it (docs/log.md).
WIDENED = 2.5
Progress = Callable[[str], None]


def compiled_encoder(
    engine: EncoderEngine,
    source: LoadedEncoder,
    *,
    report: Report,
    config: dict[str, Any],
    text: str | os.PathLike[str],
    write: Callable[[Path, bool, Int8Range | None], None] | None,
    progress: Progress | None = None,
) -> CompiledEncoder:
    """The engine as a model, its int8 ranges measured on ``text``; closed again if it cannot be one.

    ``write(directory, force, ranges)`` writes its artifact.
    """
    try:
        settings, tokenizer = used_settings(source, engine.spec.context), used_tokenizer(source)
        ranges = _ranges(CompiledEncoder(engine, tokenizer, settings), text, progress)
        return CompiledEncoder(
            engine,
            tokenizer,
            settings,
            int8=ranges,
            report=report,
            config=config,
            saver=None if write is None else lambda directory, force: write(directory, force, ranges),
        )
    except BaseException:
        engine.close()
        raise


def loaded_encoder(found: Artifact, options: SessionOptions, *, tokenizer: Tokenizer | None) -> CompiledEncoder:
    """The encoder of an artifact that was read."""
    from ryzen_compile.backends.onnxruntime import artifact, encoding_files
    from ryzen_compile.backends.onnxruntime.encoder_session import OrtEncoder

    encoding = found.encoding or encoding_files.Encoding(EncoderSettings())
    return CompiledEncoder(
        OrtEncoder(found.model, found.spec, options, found.prefill),
        tokenizer,
        encoding.settings,
        int8=encoding.int8,
        report=found.report,
        config=dict(found.config or {}),
        saver=lambda target, force: artifact.copy(found, target, force),
    )


def measured_ranges(
    program: Program,
    source: LoadedEncoder,
    lowering: LoweringOptions,
    *,
    text: str | os.PathLike[str],
    progress: Progress | None = None,
) -> Int8Range | None:
    """The ranges of an encoder that is opened for nothing else; None where it has no tokenizer, or too little text."""
    from ryzen_compile.backends.onnxruntime import OnnxRuntimeBackend

    tokenizer = used_tokenizer(source)
    if tokenizer is None:
        return None
    engine: Any = OnnxRuntimeBackend().compile(program, lowering=lowering)
    with CompiledEncoder(engine, tokenizer, used_settings(source, program.spec.context)) as encoder:
        return _ranges(encoder, text, progress)


def used_settings(source: LoadedEncoder, context: int) -> EncoderSettings:
    """The source's, as far as the compiled model of ``context`` tokens goes; its tokenizer lowers case by itself."""
    return replace(source.settings, context=min(source.settings.context or context, context), lower_case=False)


def used_tokenizer(source: LoadedEncoder) -> Tokenizer | None:
    """The tokenizer that the compiled model reads texts with."""
    if source.tokenizer is None:
        return None
    return Tokenizer.from_transformers(source.tokenizer, lower_case=source.settings.lower_case)


def _ranges(encoder: CompiledEncoder, text: str | os.PathLike[str], progress: Progress | None) -> Int8Range | None:
    """What the dimensions of its vectors range over on pieces of ``text``; None where these are too few or alike."""
    if encoder.tokenizer is None:
        return None
    if progress is not None:
        progress("calibration")
    texts = range_texts(read_text(text, characters=RANGE_SPREAD))
    if len(texts) < RANGE_FEWEST:
        return None
    texts.append("")  # an empty text lies far from all others
    vectors = encoder.encode(texts, prompt="", dims=encoder.spec.hidden, stats=EncodingStats())
    try:
        found = Int8Range.fit(vectors)
    except UsageError:  # all texts have one vector
        return None
    return Int8Range(found.middle, WIDENED * found.step)


def range_texts(text: str) -> list[str]:
    """At most ``RANGE_TEXTS`` different pieces of paragraphs, evenly spread over ``text``."""
    pieces = dict.fromkeys(
        paragraph[start : start + RANGE_CHARACTERS].strip()
        for paragraph in text.replace("\r\n", "\n").split("\n\n")
        for start in range(0, len(paragraph), RANGE_CHARACTERS)
    )
    found = [piece for piece in pieces if piece]
    count = min(RANGE_TEXTS, len(found))
    return [found[number * len(found) // count] for number in range(count)]
