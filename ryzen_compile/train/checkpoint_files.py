"""The files of one checkpoint: what a training run needs to go on, as tensors and JSON, so that loading runs no code.

    model.safetensors, optimizer.safetensors, state.json, manifest.json

The manifest holds size and SHA-256 of the others. It does not authenticate: headers, JSON and file kinds are checked
whether or not the digests agree. How such a directory appears and which of many stays is ``checkpoint.py``'s to know.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ryzen_compile.errors import ModelError, ResourceError, TamperedError, UnsafeError, UsageError
from ryzen_compile.manifest import open_plain, shown, shown_path
from ryzen_compile.safetensors_header import check_safetensors

SCHEMA_VERSION = 1
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
FILES = (MODEL, OPTIMIZER, STATE)
STEPS = ("model", "optimizer", "state", "manifest")  # of writing, in their order
MAX_MANIFEST_BYTES = 1 << 16
_CHUNK = 1 << 20
# What the format has a name for.
DTYPES = frozenset(
    {
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    }
)
_RECORD = {"step", "metric", "aliases", "state"}


@dataclass(frozen=True)
class Snapshot:
    """All that is needed to go on after ``step`` optimizer steps.

    ``model`` and ``optimizer`` (with the states of random generators, uint8) are tensors by name, each of one of
    ``DTYPES``. ``state`` is JSON: tuples come back as lists. Names of one tensor, as of tied weights, come back as
    names of one tensor. What comes back is contiguous, on the CPU and independent of the files; the order of names is
    not kept.
    """

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """``state.json``: the snapshot without its tensors. ``aliases`` map, in each file, further names to stored ones."""

    step: int
    metric: float | None
    aliases: Mapping[str, Mapping[str, str]]
    state: Mapping[str, Any]


# --- writing ----------------------------------------------------------------------------------------------------------


class Packed:
    """A snapshot as it will be stored, everything that could be refused already checked. Copies nothing it need not.

    Raises UsageError that names the tensor or the value that cannot be stored.
    """

    def __init__(self, snapshot: Snapshot, metric: float | None) -> None:
        step = snapshot.step
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**15:
            raise UsageError(f"step of a checkpoint: expected a whole number from 0, got {shown(step)}")
        model, model_aliases = _storable(snapshot.model, "model")
        optimizer, optimizer_aliases = _storable(snapshot.optimizer, "optimizer")
        self.tensors = {MODEL: model, OPTIMIZER: optimizer}
        state = dict(snapshot.state)
        _refuse_unless_json(state)
        aliases = {MODEL: model_aliases, OPTIMIZER: optimizer_aliases}
        rated = float(metric) if metric is not None and math.isfinite(metric) else None
        self.state = _as_json({"step": step, "metric": rated, "aliases": aliases, "state": state})
        self.nbytes = len(self.state) + sum(t.nbytes for part in self.tensors.values() for t in part.values())

    def write(self, directory: Path, on_step: Callable[[str], None]) -> None:
        """Writes the four files, the manifest last. Raises ResourceError, or OSError of the machine."""
        for name, step in ((MODEL, "model"), (OPTIMIZER, "optimizer")):
            on_step(step)
            _write_tensors(directory / name, self.tensors[name])
        on_step("state")
        (directory / STATE).write_bytes(self.state)
        on_step("manifest")
        files = {}
        for name in FILES:
            with open_plain(directory, name) as stream:
                files[name] = {"size": os.fstat(stream.fileno()).st_size, "sha256": _sha256(stream)}
        (directory / MANIFEST).write_bytes(_as_json({"schema_version": SCHEMA_VERSION, "files": files}))


def _storable(tensors: Mapping[str, Tensor], part: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous tensors on the CPU, no two of which share memory, and ``{further name: name}`` of equal ones."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        _refuse_unless_storable(name, tensor, part)
        flags = (tensor.is_conj(), tensor.is_neg())
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), flags)
        if view in first:
            aliases[name] = first[view]
            continue
        first[view] = name
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone() if storage in storages else plain  # the library refuses views that overlap
        storages.add(storage)
    return stored, aliases


def _refuse_unless_storable(name: object, tensor: object, part: str) -> None:
    what = f"{part}: tensor {shown(name)}"
    if not isinstance(name, str) or name == "__metadata__" or not _is_unicode(name):
        raise UsageError(f"{what} has a name that cannot be stored")
    if not isinstance(tensor, Tensor):
        raise UsageError(f"{what} is a {type(tensor).__name__}, expected a tensor")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES:
        kind = "without data" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}"
        raise UsageError(f"{what} cannot be stored: {kind}", hint="store dense tensors of common dtypes")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # what could be wrong with the tensors is checked: the machine is to blame
        raise ResourceError(f"cannot write {shown_path(path)}: {error}") from error


def _as_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _refuse_unless_json(state: dict[str, Any]) -> None:
    """``json.dumps`` turns keys into text without a word, and does not say where a NaN is."""
    try:
        fault = next(_json_faults(state, "state"), None)
        if fault is None:
            _as_json(state)  # whole numbers have a limit, too
    except (RecursionError, ValueError) as error:
        fault = f"state cannot be written: {error}"
    if fault is not None:
        raise UsageError(f"{fault}; a checkpoint holds JSON", hint="store numbers that are finite, text, lists, tables")


def _json_faults(value: object, where: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{where} is {value}"
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                yield f"{where} has the key {shown(key)}, expected text"
            yield from _json_faults(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _json_faults(item, f"{where}[{i}]")
    elif not isinstance(value, str | int | float | bool | None):
        yield f"{where} is a {type(value).__name__}"


# --- reading ----------------------------------------------------------------------------------------------------------


def read_snapshot(directory: Path) -> Snapshot:
    """The checkpoint in ``directory``, every byte checked against the manifest.

    Raises ModelError (missing, no checkpoint, another schema, contents that contradict each other), TamperedError (a
    file is missing, or its size or digest differs), UnsafeError (a link or special file), ResourceError.
    """
    files = _read_manifest(directory)
    record = _read_record(directory, files[STATE])
    tensors = {}
    for name in (MODEL, OPTIMIZER):
        with _opened(directory, name, files[name]):
            tensors[name] = _read_tensors(directory / name, record.aliases[name])
    return Snapshot(record.step, tensors[MODEL], tensors[OPTIMIZER], record.state)


def verify(directory: Path) -> None:
    """Raises what ``read_snapshot`` would, but for the contents of tensor files; keeps nothing in memory."""
    files = _read_manifest(directory)
    _read_record(directory, files[STATE])
    for name in (MODEL, OPTIMIZER):
        _opened(directory, name, files[name]).close()


def read_record(directory: Path) -> Record:
    """``state.json``, checked against the manifest; the tensors are not looked at. Raises as ``read_snapshot``."""
    return _read_record(directory, _read_manifest(directory)[STATE])


def _read_manifest(directory: Path) -> dict[str, tuple[int, str]]:
    """``{name: (size, sha256)}`` of exactly ``FILES``."""
    _refuse_unless_directory(directory)
    if not os.path.lexists(directory / MANIFEST):
        raise ModelError(f"{shown_path(directory)} holds no {MANIFEST}, so it is no checkpoint")
    with open_plain(directory, MANIFEST) as stream:
        data = _read(stream, MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise ModelError(f"{MANIFEST} is over the limit of {MAX_MANIFEST_BYTES} bytes")
    manifest = _parse(data, MANIFEST)
    if (schema := manifest.get("schema_version")) != SCHEMA_VERSION or isinstance(schema, bool):
        raise ModelError(
            f"{MANIFEST} has the schema {shown(schema)}, expected {SCHEMA_VERSION}",
            hint="go on with the version of ryzen_compile that wrote it",
        )
    table = manifest.get("files")
    if not isinstance(table, dict) or set(table) != set(FILES):
        raise ModelError(f"{MANIFEST} does not list exactly {', '.join(FILES)}")
    return {name: _entry(name, table[name]) for name in FILES}


def _entry(name: str, entry: object) -> tuple[int, str]:
    size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if type(size) is not int or size < 0 or not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ModelError(f"{MANIFEST}: the entry of {name} does not hold a size and a SHA-256")
    return size, digest


def _read_record(directory: Path, entry: tuple[int, str]) -> Record:
    with _opened(directory, STATE, entry) as stream:
        values = _parse(_read(stream, entry[0]), STATE)
    if set(values) != _RECORD:
        raise ModelError(f"{STATE} holds {shown(sorted(values))}, expected {', '.join(sorted(_RECORD))}")
    step, metric, aliases, state = (values[key] for key in ("step", "metric", "aliases", "state"))
    fits = type(step) is int and step >= 0 and isinstance(state, dict)
    fits = fits and (metric is None or (isinstance(metric, float) and math.isfinite(metric)))
    fits = fits and isinstance(aliases, dict) and set(aliases) == {MODEL, OPTIMIZER}
    fits = fits and all(isinstance(table, dict) for table in aliases.values())
    fits = fits and all(isinstance(name, str) for table in aliases.values() for name in table.values())
    if not fits:
        raise ModelError(f"{STATE} does not hold a step, a metric, aliases and a state")
    return Record(step, metric, aliases, state)


def _opened(directory: Path, name: str, entry: tuple[int, str]) -> BinaryIO:
    """``directory/name``, a plain file of the size and digest that ``entry`` says, at its beginning."""
    size, digest = entry
    try:
        stream = open_plain(directory, name)
    except TamperedError as error:  # its hint is about exports
        raise TamperedError(error.message) from error
    try:
        if (found := os.fstat(stream.fileno()).st_size) != size:
            raise TamperedError(f"{name}: expected {size} bytes, got {found}")
        if (got := _sha256(stream)) != digest:
            raise TamperedError(f"{name}: expected SHA-256 {digest}, got {got}")
        stream.seek(0)
    except BaseException:
        stream.close()
        raise
    return stream


def _read_tensors(path: Path, aliases: Mapping[str, str]) -> dict[str, Tensor]:
    entries = check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned: the library's are the mapped file itself, which a later change would show through.
            tensors = {name: file.get_tensor(name).clone() for name in entries}
    except SafetensorError as error:
        raise ModelError(f"{path.name} cannot be read: {error}") from error
    for name, stored in aliases.items():
        if name in entries or stored not in entries:
            raise ModelError(
                f"{STATE}: {shown(name)} is another name of {shown(stored)}, which {path.name} contradicts"
            )
        tensors[name] = tensors[stored]
    return tensors


def _refuse_unless_directory(path: Path) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError as error:
        raise ModelError(f"checkpoint {shown_path(path)} does not exist") from error
    except OSError as error:
        raise ResourceError(f"cannot read {shown_path(path)}: {error.strerror}") from error
    if stat.S_ISLNK(mode):
        raise UnsafeError(f"checkpoint {shown_path(path)} is a symbolic link, expected a directory")
    if not stat.S_ISDIR(mode):
        raise ModelError(f"checkpoint {shown_path(path)} is a file, expected a directory")


def _sha256(stream: BinaryIO) -> str:
    sha = hashlib.sha256()
    while chunk := _read(stream, _CHUNK):
        sha.update(chunk)
    return sha.hexdigest()


def _read(stream: BinaryIO, size: int) -> bytes:
    try:
        return stream.read(size)
    except OSError as error:
        raise ResourceError(f"cannot read {shown_path(stream.name)}: {error.strerror}") from error


def _parse(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object, without the freedoms that Python's reader takes: no key twice, no NaN."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key is there twice")
        return result

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name} is not JSON: {str(error)[:300]}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{name} holds a {type(value).__name__}, expected an object")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
