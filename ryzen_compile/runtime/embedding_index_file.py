"""The directory of an embedding index: codes and codec as one safetensors file, beside a manifest with its digest.

Nothing in it can run code, and no graph of neighbours is read: a native reader would believe what such a file says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ryzen_compile.errors import ArtifactError, ModelError, NumericalError, UsageError
from ryzen_compile.manifest import MANIFEST_NAME, read_manifest, shown, shown_path, verify_files, write_manifest
from ryzen_compile.numerics.embedding_codec import EmbeddingCodec
from ryzen_compile.publish import Staging, require_space
from ryzen_compile.safetensors_header import check_safetensors

TENSORS = "embedding_index.safetensors"
KEY = "embedding_index"  # of the manifest
VERSION = 1
CODES = "codes"
STORED = ("F32", "I8", "U8")  # what codes and codecs are of, in the format's words
AGAIN = "build the index again and save it"
_WHOLE_NUMBERS = ("version", "source_dims", "dims", "vectors", "rescore")


def write_index(
    out: str | Path, codec: EmbeddingCodec, codes: np.ndarray, settings: Mapping[str, int], *, force: bool
) -> Path:
    """Publishes ``out``, whole or not at all."""
    facts = {
        "version": VERSION,
        "precision": codec.precision,
        "source_dims": codec.source_dims,
        "dims": codec.dims,
        "vectors": len(codes),
        **settings,
    }
    with Staging(out, force=force) as stage:
        require_space(stage.path, codes.nbytes)
        tensors = {CODES: codes, **codec.arrays()}
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, stage.path / TENSORS)
        return stage.commit(lambda path: write_manifest(path, {KEY: facts}))


def read_index(directory: str | Path) -> tuple[EmbeddingCodec, np.ndarray, dict[str, int]]:
    """Codec, codes (N, W) and settings of what ``write_index`` wrote; digests are checked before tensors are read."""
    directory = Path(directory).expanduser()
    manifest = read_manifest(directory)
    facts = _checked_facts(manifest.get(KEY), directory)
    if TENSORS not in manifest["files"]:
        raise ArtifactError(f"{MANIFEST_NAME} of {shown_path(directory)} does not list {TENSORS}", hint=AGAIN)
    verify_files(directory, manifest)
    _check_dtypes(directory)
    tensors = load_file(directory / TENSORS)
    codes = tensors.pop(CODES, None)
    try:
        codec = EmbeddingCodec.from_arrays(facts["precision"], facts["source_dims"], facts["dims"], tensors)
    except (UsageError, NumericalError) as error:
        raise ArtifactError(f"{shown_path(directory)} holds no codec: {error.message}", hint=AGAIN) from error
    if codes is None or codes.shape != (facts["vectors"], codec.width) or codes.dtype != codec.dtype:
        found = "none" if codes is None else f"{codes.dtype} {codes.shape}"
        expected = f"{codec.dtype} ({facts['vectors']}, {codec.width})"
        raise ArtifactError(f"{shown_path(directory)}: expected codes {expected}, got {found}", hint=AGAIN)
    if codec.precision == "float32" and not np.isfinite(codes).all():
        raise ArtifactError(f"{shown_path(directory)} holds vectors that are not finite", hint=AGAIN)
    return codec, codes, {"rescore": facts["rescore"]}


def _check_dtypes(directory: Path) -> None:
    """Before anything is loaded: of some dtypes NumPy has no array."""
    try:
        entries = check_safetensors(directory / TENSORS)
    except ModelError as error:
        raise ArtifactError(f"{shown_path(directory)}: {error.message}", hint=AGAIN) from error
    for name, entry in entries.items():
        if entry.dtype not in STORED:
            raise ArtifactError(
                f"{shown_path(directory)}: tensor {shown(name)} is of {entry.dtype}, expected {', '.join(STORED)}",
                hint=AGAIN,
            )


def _checked_facts(facts: object, directory: Path) -> dict[str, Any]:
    if not isinstance(facts, dict):
        raise ArtifactError(f"{shown_path(directory)} is no embedding index", hint="save one there, or name another")
    version = facts.get("version")
    if version != VERSION:
        raise ArtifactError(
            f"{shown_path(directory)} is an embedding index of version {shown(version)}, this is {VERSION}", hint=AGAIN
        )
    for name in _WHOLE_NUMBERS:
        if type(facts.get(name)) is not int or facts[name] < (name != "vectors"):
            raise ArtifactError(
                f"{shown_path(directory)}: {name} is {shown(facts.get(name))}, a whole number", hint=AGAIN
            )
    return facts
