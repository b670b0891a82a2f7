"""A strict reading of a safetensors header: what every tensor claims, held against the file, before anything is loaded.

Stricter than the format's own readers where they disagree, because an auditor and a loader that disagree is an attack.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ryzen_compile.errors import ModelError, ResourceError
from ryzen_compile.manifest import shown, shown_path

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 100_000
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: ``start``..``end`` are bytes of the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def check_safetensors(path: str | Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, after a strict pass over its header; the data itself is not read.

    Stricter than the format's readers where they disagree: duplicate names, holes, overlaps, trailing bytes, unknown
    dtypes and more than 100,000 tensors are each a ModelError that names the tensor.
    """
    path = Path(path)
    header, data_bytes = _read_header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"{shown(path.name)}: __metadata__ is not a table of strings")
    if len(header) > MAX_TENSORS:
        raise ModelError(f"{shown(path.name)} has {len(header)} tensors, the limit is {MAX_TENSORS}")
    tensors = {name: _tensor_entry(path, name, entry, data_bytes) for name, entry in header.items()}
    position, before = 0, ""
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < position:
            raise ModelError(
                f"{shown(path.name)}: tensors {shown(before)} and {shown(name)} overlap at byte {entry.start}"
            )
        if entry.start > position:
            raise ModelError(f"{shown(path.name)}: hole of {entry.start - position} bytes before tensor {shown(name)}")
        position, before = entry.end, name
    if position != data_bytes:
        extra = data_bytes - position
        raise ModelError(f"{shown(path.name)}: {extra} trailing bytes after the last tensor {shown(before)}")
    return tensors


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header's JSON object and the length of the data section behind it."""
    what = f"{shown(path.name)}: not a safetensors header"
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise ModelError(f"{what}: the file has {size} bytes, a length of 8 bytes comes first")
            (length,) = struct.unpack("<Q", prefix)
            if length > size - 8:
                raise ModelError(f"{what}: it claims {length} bytes, the file has {size - 8} after its length")
            if length > MAX_HEADER_BYTES:
                raise ModelError(f"{what}: {length} bytes, the limit is {MAX_HEADER_BYTES}")
            raw = stream.read(length)
    except FileNotFoundError as error:
        raise ModelError(f"weight file {shown_path(path)} is missing") from error
    except OSError as error:
        raise ResourceError(f"cannot read {shown_path(path)}: {error.strerror}") from error
    if not raw.startswith(b"{"):
        raise ModelError(f"{what}: it starts with {shown(raw[:4])}, expected '{{'")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{what}: not UTF-8 at byte {error.start}") from error

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ModelError(f"{shown(path.name)}: the name {shown(key)} is there twice")
            result[key] = value
        return result

    try:
        header = json.loads(text, object_pairs_hook=unique, parse_constant=_no_constant)
    except ModelError:  # a ValueError too, already worded
        raise
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{what}: not JSON: {str(error)[:300]}") from error
    return header, size - 8 - length


def _tensor_entry(path: Path, name: str, entry: object, data_bytes: int) -> TensorEntry:
    where = f"{shown(path.name)}: tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ModelError(f"{where} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ModelError(f"{where} has the unknown dtype {shown(dtype)}")
    if not _are_counts(shape):
        raise ModelError(f"{where} has the shape {shown(shape)}, expected a list of whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ModelError(f"{where} has the data_offsets {shown(offsets)}, expected two whole numbers")
    start, end = offsets
    if not start <= end <= data_bytes:
        raise ModelError(f"{where} lies at bytes {start}..{end}, outside the file's {data_bytes} bytes of data")
    bits = _BITS[dtype]
    for size in shape:
        # Like readers in C, which multiply in 64 bits; a later 0 does not undo the overflow.
        bits *= size
        if bits >= 1 << 64:
            raise ModelError(f"{where}: shape {shown(shape)} overflows 64 bits")
    if bits % 8 or bits // 8 != end - start:
        raise ModelError(f"{where}: {dtype} {shown(shape)} needs {bits / 8:g} bytes, its offsets hold {end - start}")
    return TensorEntry(dtype, tuple(shape), start, end)


def _are_counts(value: object) -> bool:
    """Whether ``value`` is a list of non-negative 64-bit integers (``True`` is none)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
