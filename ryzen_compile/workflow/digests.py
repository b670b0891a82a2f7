"""What a phase's inputs and outputs are, as digests: two that are equal need no second run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ryzen_compile.errors import ResourceError
from ryzen_compile.manifest import shown_path

CHUNK = 1 << 20
SOURCES = (".py", ".j2", ".cpp", ".h", ".inl")
PACKAGE = Path(__file__).resolve().parents[1]


def digest_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of JSON facts, in hexadecimal; the order of keys does not count."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def digest_path(path: Path) -> str | None:
    """Of a file's bytes, or of a directory's files with their names; None where there is neither.

    Hidden files do not count, nor does what Python keeps of sources that it ran. Raises ``ResourceError`` for what
    cannot be read.
    """
    try:
        if path.is_dir():
            return _digest_files(path, sorted(_files(path)))
        return _digest_files(path, [path]) if path.is_file() else None
    except OSError as error:
        raise ResourceError(f"{shown_path(path)} cannot be read: {error.strerror}") from error


@cache
def digest_package() -> str:
    """Of this package's own sources: what another version measured is measured again."""
    summed = hashlib.sha256()
    kernels = find_spec("ryzen_compile.kernels")  # in a checkout it lies beside the package
    for root in (PACKAGE, *map(Path, () if kernels is None else kernels.submodule_search_locations or ())):
        for file in sorted(file for file in root.rglob("*") if file.suffix in SOURCES):
            summed.update(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return summed.hexdigest()


def _digest_files(root: Path, files: Iterable[Path]) -> str:
    summed = hashlib.sha256()
    for file in files:
        # As JSON, in which no name can pass for the name and the bytes of others.
        summed.update(json.dumps([file.relative_to(root).as_posix(), file.stat().st_size]).encode())
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                summed.update(chunk)
    return summed.hexdigest()


def _files(directory: Path) -> Iterator[Path]:
    for file in directory.rglob("*"):
        parts = file.relative_to(directory).parts
        if file.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in parts):
            yield file
