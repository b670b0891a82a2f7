"""``cache.safetensors``: what a runtime must know to move an artifact's cached keys to other positions.

The graph holds the same facts, as rotary tables and scales; here they are where they can be read without the model. Per
slot i: ``frequencies.i`` (R,) float64, radians per position, R = 0 for keys without positions, and ``scale.i``
(1, K, 1, D) float32 where the format has fixed scales; the rest is JSON in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ryzen_compile.errors import ArtifactError, RyzenCompileError
from ryzen_compile.numerics.row_shift import RowShift
from ryzen_compile.numerics.rows import RowFormat
from ryzen_compile.spec import CacheSlot

CACHE_NAME = "cache.safetensors"
FORMAT = "ryzen_compile.cache/1"


def write_shifts(directory: Path, shifts: Sequence[RowShift], slots: Sequence[CacheSlot]) -> None:
    """Writes the file into ``directory``; ``shifts`` fit the ``slots``."""
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    facts = []
    for i, (shift, slot) in enumerate(zip(shifts, slots, strict=True)):
        tensors[f"frequencies.{i}"] = np.ascontiguousarray(shift.frequencies)
        if shift.scale is not None:
            tensors[f"scale.{i}"] = np.ascontiguousarray(shift.scale)
        facts.append({"interleaved": shift.interleaved})
        _check(shift, slot, CACHE_NAME)
    # Under one key: the library writes several in an order that changes from file to file.
    save_file(tensors, str(directory / CACHE_NAME), metadata={FORMAT: json.dumps(facts)})


def read_shifts(directory: Path, slots: Sequence[CacheSlot]) -> tuple[RowShift, ...]:
    """What ``write_shifts`` wrote; raises ``ArtifactError`` for a file that does not fit the ``slots``."""
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    from ryzen_compile.safetensors_header import check_safetensors

    path = directory / CACHE_NAME
    try:
        check_safetensors(path)
        tensors = load_file(str(path))
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
        facts = json.loads(metadata.get(FORMAT, "[]"))
        if FORMAT not in metadata or len(facts) != len(slots):
            raise ArtifactError(f"{CACHE_NAME} is not {FORMAT} of {len(slots)} layers", hint="export the model again")
        shifts = tuple(_shift(i, slot, facts[i], tensors) for i, slot in enumerate(slots))
    except (SafetensorError, RyzenCompileError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{CACHE_NAME} cannot be read: {error}", hint="export the model again") from error
    return shifts


def _shift(i: int, slot: CacheSlot, facts: dict[str, Any], tensors: dict[str, np.ndarray]) -> RowShift:
    form = RowFormat.parse(slot.key_format)
    shift = RowShift(
        form,
        slot.head_dim,
        tensors[f"frequencies.{i}"],
        bool(facts["interleaved"]),
        tensors.get(f"scale.{i}"),
    )
    _check(shift, slot, CACHE_NAME)
    return shift


def _check(shift: RowShift, slot: CacheSlot, name: str) -> None:
    frequencies, scale = shift.frequencies, shift.scale
    if frequencies.ndim != 1 or 2 * len(frequencies) > slot.head_dim or not np.isfinite(frequencies).all():
        raise ArtifactError(f"{name}: layer {slot.layer} turns {frequencies.shape} pairs of {slot.head_dim} channels")
    if shift.turned or shift.mean is not None:
        raise ArtifactError(f"{name}: keys of layer {slot.layer} are turned or centred, which no artifact holds")
    fixed = not shift.form.floats and not shift.form.group
    shape = (1, slot.kv_heads, 1, slot.head_dim)
    if (scale is not None) != fixed or (
        scale is not None and (scale.shape != shape or not (np.isfinite(scale) & (scale > 0)).all())
    ):
        raise ArtifactError(f"{name}: layer {slot.layer} needs {'scales ' + str(shape) if fixed else 'no scales'}")
