"""The files that an encoder's artifact has in the place of a cache's: the layout of sentence-transformers, what int8
codes stand for, and the dimensions that vectors were trained to be cut to."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ryzen_compile.errors import ArtifactError, ConfigError, ModelError, NumericalError, UnsupportedError, UsageError
from ryzen_compile.manifest import shown_path
from ryzen_compile.numerics.embedding_codes import Int8Range
from ryzen_compile.recipe_file import DIMS_NAME, dims_text, read_dims
from ryzen_compile.sentence_layout import LAYOUT_NAMES, read_layout, write_layout
from ryzen_compile.source import read_json
from ryzen_compile.spec import EncoderSettings, ModelSpec

RANGES_NAME = "int8_ranges.json"


@dataclass(frozen=True)
class Encoding:
    """``int8`` is None where no text was encoded to find the ranges."""

    settings: EncoderSettings
    int8: Int8Range | None = None


def write_encoding(directory: Path, encoding: Encoding, *, hidden: int) -> None:
    """Writes the files of an encoder of ``hidden`` channels into ``directory``."""
    write_layout(directory, encoding.settings, hidden=hidden)
    if encoding.settings.depths:
        (directory / DIMS_NAME).write_text(dims_text(encoding.settings.depths), encoding="utf-8")
    if encoding.int8 is not None:
        ranges = {"middle": encoding.int8.middle.tolist(), "step": encoding.int8.step.tolist()}
        (directory / RANGES_NAME).write_text(json.dumps(ranges) + "\n", encoding="utf-8")


def read_encoding(directory: Path, spec: ModelSpec, listed: Collection[str]) -> Encoding:
    """What ``write_encoding`` wrote, of the files that are ``listed`` in the manifest.

    Raises ``ArtifactError`` for files that are missing, damaged, or not of the model that ``spec`` describes, and
    ``UnsafeError`` as ``read_layout`` does.
    """
    where = shown_path(directory)
    if missing := [name for name in LAYOUT_NAMES if name not in listed]:
        raise ArtifactError(f"{where}: the manifest lists no {missing[0]}", hint="export it again")
    try:
        layout = read_layout(directory)
        ranges = _read_ranges(directory / RANGES_NAME, spec.hidden) if RANGES_NAME in listed else None
        depths = (read_dims(directory) or ()) if DIMS_NAME in listed else ()
    except (ConfigError, ModelError, UnsupportedError) as error:
        raise ArtifactError(f"{where}: {error}", hint="export it again") from error
    if layout is None or layout.transformer != directory or layout.settings.pooling != spec.pooling:
        raise ArtifactError(f"{where}: its modules are not of the manifest's {spec.pooling}", hint="export it again")
    settings = replace(layout.settings, depths=depths)
    too_wide = max(settings.dims or 0, *settings.depths, 0) > spec.hidden
    if settings.lower_case or too_wide or (settings.context or 0) > spec.context:
        raise ArtifactError(f"{where}: its settings do not fit the model: {settings}", hint="export it again")
    return Encoding(settings, ranges)


def _read_ranges(path: Path, hidden: int) -> Int8Range:
    found = read_json(path)
    try:
        with np.errstate(over="ignore"):  # what overflows is refused as any other infinity
            middle, step = (np.array(found.get(name), dtype=np.float32) for name in ("middle", "step"))
        ranges = Int8Range(middle, step)
    except (TypeError, ValueError, OverflowError, UsageError, NumericalError) as error:
        raise ArtifactError(f"{path.name} holds no ranges: {error}", hint="export it again") from error
    if len(ranges.step) != hidden:
        raise ArtifactError(f"{path.name} holds {len(ranges.step)} ranges, the model has {hidden} dimensions")
    return ranges
