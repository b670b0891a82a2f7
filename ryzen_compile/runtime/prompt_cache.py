"""A prompt's keys and values to begin with, and as a file: read a long prompt once, go on behind it in any process.

The file is safetensors: ``tokens`` (T,) int64, then ``keys.i`` and ``values.i`` ``(K, L, W)`` of every slot, the L rows
in use and nothing else. Its metadata names the artifact and the slots, for rows mean nothing to another model, and the
SHA-256 of the data. Like a manifest it finds damage and mix-ups and does not authenticate.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ryzen_compile.errors import ArtifactError, NumericalError, ResourceError, TamperedError, UsageError
from ryzen_compile.manifest import open_plain, shown_path
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.layout import droppable
from ryzen_compile.runtime.prefix import as_ids, check_row
from ryzen_compile.runtime.prompt_cache_header import AGAIN, StoredRows, as_header, read_header, stored_rows
from ryzen_compile.runtime.storage import Buffer
from ryzen_compile.spec import CacheSlot


@dataclass(frozen=True, eq=False)
class PromptCache:
    """``row``, a cache of batch 1, the ``tokens`` ``(T,)`` that it holds, one or more, and whose rows they are.

    ``identity`` is that of the artifact, or of a model in memory. Raises UsageError when row and tokens do not belong
    together.
    """

    row: KVCache
    tokens: np.ndarray
    identity: str

    def __post_init__(self) -> None:
        ids, held = self.tokens, self.row.lengths.tolist()
        if [*ids.shape] != held or held == [0] or ids.dtype.kind not in "iu":
            raise UsageError(
                f"a prompt cache is one row and its tokens, got rows of {held} tokens and {ids.dtype} tokens of shape "
                f"{ids.shape}"
            )

    def match(self, tokens: Sequence[int] | np.ndarray) -> int:
        """How many of ``tokens`` ``(T,)`` ``fill`` would supply."""
        ids, held = as_ids(tokens), len(self.tokens)
        most = max(min(len(ids) - 1, held), 0)
        differs = np.flatnonzero(ids[:most] != self.tokens[:most])
        common = int(differs[0]) if differs.size else most
        return 0 if any(droppable(slot, held) < held - common for slot in self.row.slots) else common

    def fill(self, row: KVCache, tokens: Sequence[int] | np.ndarray) -> int:
        """Copies what is held of the beginning of ``tokens`` ``(T,)`` into ``row``, an empty cache of batch 1.

        Returns how many tokens ``row`` then holds: those in common, at most T - 1, so that one is left to step; 0 where
        a rolling slot has dropped rows that so short a sequence would still need. Raises as ``PrefixStore.fill``.
        """
        check_row(row, self.row.slots, empty=True)
        common = self.match(tokens)
        row.reserve(common)
        for (_, theirs), (_, ours) in zip(_heads(row, common), _heads(self.row, common), strict=True):
            row.storage.write(theirs, self.row.storage.read(ours))
        row.lengths[0] = common
        return common


def save_prompt_cache(
    path: str | os.PathLike[str], row: KVCache, tokens: Sequence[int] | np.ndarray, identity: str
) -> None:
    """Writes what ``row``, a cache of batch 1, holds for exactly ``tokens`` ``(T,)``, as the artifact ``identity``'s.

    The row may lie in any storage. A file of that name is replaced; whoever opens it meanwhile sees the old one or the
    new one, whole.

    Raises UsageError (as ``PromptCache``; no identity; ``path`` is a link or no plain file), NumericalError (a row is
    not finite), ResourceError (the file cannot be written).
    """
    path = Path(path).expanduser()
    ids = PromptCache(row, np.asarray(tokens), identity).tokens.astype(np.int64)
    if not identity:
        raise UsageError("a prompt cache needs the identity of the artifact that computed it")
    digest = hashlib.sha256(ids.data)
    for facts, rows in _read_heads(row, len(ids)):
        if not _is_finite(facts, rows):
            raise NumericalError(f"{facts.name} of the prompt holds numbers that are not finite")
        digest.update(rows.data)
    header = as_header(row.slots, identity, len(ids), digest.hexdigest())
    _replace(path, itertools.chain((header, ids.data), (rows.data for _, rows in _read_heads(row, len(ids)))))


def load_prompt_cache(
    path: str | os.PathLike[str],
    slots: Sequence[CacheSlot],
    identity: str,
    *,
    vocab: int,
    limit: int | None = None,
    budget_bytes: int | None = None,
) -> PromptCache:
    """What was saved at ``path``; its tokens are int64, its row has room for them and no more.

    ``slots``, ``identity`` and ``vocab`` are those of the artifact that will continue it; ``limit`` and
    ``budget_bytes`` become the cache's. The header, the file's size and the tokens are checked before the cache is
    allocated, which is then no larger than the file (a rolling slot: than its buffers always are).

    Raises ArtifactError (no prompt cache, of another version, artifact or slots, tokens outside the vocabulary, rows
    that are not finite), TamperedError (cut off, longer, or not the bytes that were written), UnsafeError (a link or
    no plain file), ResourceError on I/O errors, and PromptError and MemoryLimitError as ``KVCache`` does.
    """
    path = Path(path).expanduser()
    slots = tuple(slots)
    with _opened(path) as stream:
        try:
            tokens, digest = read_header(stream, path, slots, identity)
            ids = np.empty(tokens, np.int64)
            found = hashlib.sha256(_read_into(stream, path, ids))
            if ids.min() < 0 or ids.max() >= vocab:
                outside = ids[(ids < 0) | (ids >= vocab)][0]
                raise ArtifactError(f"{shown_path(path)} holds the token {outside}, the vocabulary has {vocab}")
            row = KVCache(slots, 1, tokens, limit=limit, budget_bytes=budget_bytes)
            for _, rows in _heads(row, tokens):
                found.update(_read_into(stream, path, rows))
        except OSError as error:
            if isinstance(error, ResourceError):  # over the budget, already worded
                raise
            raise ResourceError(f"cannot read {shown_path(path)}: {error.strerror}") from error
    if found.hexdigest() != digest:
        raise TamperedError(f"{shown_path(path)} does not hold what was written: its SHA-256 differs", hint=AGAIN)
    for facts, rows in _heads(row, tokens):
        if not _is_finite(facts, rows):
            raise ArtifactError(f"{shown_path(path)}: {facts.name} holds numbers that are not finite", hint=AGAIN)
    row.lengths[0] = tokens
    return PromptCache(row, ids, identity)


def _read_heads(row: KVCache, tokens: int) -> Iterator[tuple[StoredRows, np.ndarray]]:
    """``_heads`` in the machine's memory."""
    for facts, rows in _heads(row, tokens):
        yield facts, row.storage.read(rows)


def _heads(row: KVCache, tokens: int) -> Iterator[tuple[StoredRows, Buffer]]:
    """The rows in use of every head, contiguous views ``(L, W)`` in the order of the file, each with its facts."""
    buffers = (buffer for pair in zip(row.keys, row.values, strict=True) for buffer in pair)
    for facts, buffer in zip(stored_rows(row.slots, tokens), buffers, strict=True):
        heads, held, _ = facts.shape
        for head in range(heads):
            yield facts, buffer[0, head, :held]


def _is_finite(facts: StoredRows, rows: np.ndarray) -> bool:
    """Whether the floats among stored ``rows`` (L, W) are: the rows themselves, or the scales they carry."""
    if facts.form.floats:
        return bool(np.isfinite(rows).all())
    codes = facts.dim * facts.form.bits // 8
    return bool(np.isfinite(np.ascontiguousarray(rows[:, codes:]).view(np.float16)).all())


def _replace(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Makes ``path`` the file of ``chunks``, durable before it has its name."""
    temporary = path.parent / f".prompt-cache.{secrets.token_hex(8)}.tmp"
    try:
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise UsageError(f"{shown_path(path)} is a link or no plain file", hint="choose another name")
        with temporary.open("xb") as stream:
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        if os.name == "posix":  # elsewhere a directory cannot be opened
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise ResourceError(f"cannot write {shown_path(path)}: {error.strerror}") from error
    finally:
        with suppress(OSError):  # after a failure; published, it has no such name any more
            temporary.unlink()


def _opened(path: Path) -> BinaryIO:
    try:
        return open_plain(path.parent, path.name)
    except TamperedError as error:
        raise ArtifactError(f"there is no prompt cache {shown_path(path)}", hint=AGAIN) from error


def _read_into(stream: BinaryIO, path: Path, array: np.ndarray) -> memoryview:
    """Fills a contiguous ``array``, returns its bytes. The file's size was right: a short read means that it shrank."""
    if stream.readinto(array.data) != array.nbytes:  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
        raise TamperedError(f"{shown_path(path)} became shorter while it was read")
    return array.data
