"""The header of a prompt cache file: what it says, and that it says nothing else.

A header is accepted if it is, byte for byte, the one that would be written for the artifact, the slots and the number
of tokens at hand. So there is no shape, offset, hole or duplicate name left to check one by one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ryzen_compile.errors import ArtifactError, TamperedError
from ryzen_compile.manifest import shown, shown_path
from ryzen_compile.numerics.rows import RowFormat
from ryzen_compile.runtime.layout import row_layout
from ryzen_compile.spec import CacheSlot

FORMAT = "ryzen_compile prompt cache"
VERSION = "1"
MAX_HEADER_BYTES = 1 << 24
AGAIN = "read the prompt again and save its cache with this model"
_DTYPES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.int8): "I8", np.dtype(np.uint8): "U8"}


@dataclass(frozen=True)
class StoredRows:
    """Keys or values of one slot in the file: ``shape`` is (K, L, W) in stored elements, ``dim`` a head's channels."""

    name: str
    form: RowFormat
    dim: int
    shape: tuple[int, int, int]


def stored_rows(slots: Sequence[CacheSlot], tokens: int) -> Iterator[StoredRows]:
    """What the file of a row of ``tokens`` tokens holds behind them, in its order."""
    for index, slot in enumerate(slots):
        for kind, dim, layout in zip(
            ("keys", "values"), (slot.head_dim, slot.value_dim), row_layout(slot), strict=True
        ):
            form, width = layout
            yield StoredRows(f"{kind}.{index}", form, dim, (slot.kv_heads, slot.resident(tokens), width))


def as_header(slots: Sequence[CacheSlot], identity: str, tokens: int, digest: str) -> bytes:
    """The file up to its data: 8 bytes of length, JSON, spaces up to a multiple of 8. ``digest`` is the data's."""
    metadata = {"format": FORMAT, "version": VERSION, "identity": identity, "slots": _as_json(_slot_facts(slots))}
    header: dict[str, Any] = {"__metadata__": {**metadata, "sha256": digest}}
    header["tokens"] = {"dtype": "I64", "shape": [tokens], "data_offsets": [0, 8 * tokens]}
    end = 8 * tokens
    for rows in stored_rows(slots, tokens):
        begin, end = end, end + prod(rows.shape) * rows.form.dtype.itemsize
        entry = {"dtype": _DTYPES[rows.form.dtype], "shape": list(rows.shape), "data_offsets": [begin, end]}
        header[rows.name] = entry
    text = _as_json(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(stream: BinaryIO, path: Path, slots: tuple[CacheSlot, ...], identity: str) -> tuple[int, str]:
    """Number of tokens and digest that the file at ``path`` states, once its header and size are what they must be.

    Raises ArtifactError (no prompt cache, or of another version, artifact or slots) and TamperedError (cut off, or
    longer than it says). ``stream`` stands before the data afterwards.
    """
    size = os.fstat(stream.fileno()).st_size
    prefix = stream.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ArtifactError(f"{shown_path(path)} is no prompt cache, or one cut off in its header", hint=AGAIN)
    text = stream.read(length)
    header = _parsed(text)
    _check_metadata(header.get("__metadata__"), path, slots, identity)
    entry = header.get("tokens")
    shape = entry.get("shape") if isinstance(entry, dict) else None
    # Bounded by the file before anything is computed from it.
    if not isinstance(shape, list) or [type(n) for n in shape] != [int] or not 1 <= shape[0] <= size // 8:
        raise ArtifactError(f"{shown_path(path)}: tokens has the shape {shown(shape)}", hint=AGAIN)
    digest = str(header["__metadata__"].get("sha256"))
    expected = as_header(slots, identity, shape[0], digest)
    entries = json.loads(expected[8:])
    if prefix + text != expected:
        raise ArtifactError(f"{shown_path(path)}: {_difference(header, entries)}", hint=AGAIN)
    needed = len(expected) + list(entries.values())[-1]["data_offsets"][1]
    if size != needed:
        raise TamperedError(f"{shown_path(path)} has {size} bytes, its header describes {needed}", hint=AGAIN)
    return shape[0], digest


def _check_metadata(metadata: object, path: Path, slots: tuple[CacheSlot, ...], identity: str) -> None:
    """Refuses what was written by others, or for another artifact."""
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ArtifactError(f"{shown_path(path)} is no prompt cache", hint=AGAIN)
    version = metadata.get("version")
    if version != VERSION:
        raise ArtifactError(f"{shown_path(path)} has version {shown(version)}, this is {VERSION}", hint=AGAIN)
    other = metadata.get("identity")
    if other != identity:
        raise ArtifactError(
            f"{shown_path(path)} was saved by the artifact {shown(other)}, this is {shown(identity)}", hint=AGAIN
        )
    text = metadata.get("slots")
    if not isinstance(text, str) or text != _as_json(_slot_facts(slots)):
        what = _difference(_parsed(text), _slot_facts(slots))
        raise ArtifactError(f"{shown_path(path)} holds other slots: {what}", hint=AGAIN)


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """In which entry an object read from a file is not the ``expected`` one."""
    for name, entry in expected.items():
        one, other = _as_json(found.get(name)), _as_json(entry)  # as text: to Python 1, 1.0 and True are equal
        if one != other:
            return f"{name} is {shown(one, 300)}, expected {shown(other, 300)}"
    surplus = sorted(found.keys() - expected.keys())
    return f"{shown(surplus[0])} does not belong there" if surplus else "its header is not spelled as it is written"


def _parsed(text: object) -> dict[str, Any]:
    """A JSON object, empty where it is none. Names that occur twice are found when the bytes are compared."""
    try:
        value = json.loads(text) if isinstance(text, (bytes, str)) else None
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _slot_facts(slots: Sequence[CacheSlot]) -> dict[str, Any]:
    return {f"slot {index}": asdict(slot) for index, slot in enumerate(slots)}


def _as_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
