"""Prompts that begin alike: the rows of their common beginning are computed once and copied from then on.

Rows are kept in blocks of ``block`` tokens. A block's name is the block before it and its own tokens, so the names form
a radix tree whose edges are blocks: a prompt is looked up by walking down from the root, one dictionary access a block.

One ordered dictionary is both the tree and the order of use. Whoever uses a path moves its blocks to the recent end,
the deepest first, so that a parent is always more recent than its children and the least recent block is always a leaf:
eviction takes from the old end and never cuts a path in two. Blocks hold no references to each other, so memory is
given back when a block is dropped and waits for no garbage collector.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from ryzen_compile.errors import UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.layout import row_layout
from ryzen_compile.runtime.storage import Buffer
from ryzen_compile.spec import CacheSlot

_ROOT = 0
_Name = tuple[int, bytes]  # the number of the block before, and this block's tokens as int64


@dataclass(frozen=True)
class PrefixStats:
    """What a store did so far and what it holds now.

    ``tokens_asked`` are the tokens of all ``fill`` calls, ``tokens_reused`` those that were not to be computed again.
    ``skipped`` counts, by reason, the ``insert`` calls that could not keep everything.
    """

    lookups: int = 0
    hits: int = 0
    tokens_asked: int = 0
    tokens_reused: int = 0
    evicted_blocks: int = 0
    blocks: int = 0
    bytes: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        """The share of all tokens asked for that was reused, 0 before the first."""
        return self.tokens_reused / self.tokens_asked if self.tokens_asked else 0.0


@dataclass(frozen=True, slots=True)
class _Block:
    """``rows``: keys and values of all slots, one after the other, each ``(K, block, bytes of a row)``, uint8."""

    number: int  # never used again, so that what a dropped block led to cannot be found under another one
    rows: np.ndarray


class PrefixStore:
    """Rows of keys and values by the tokens they were computed from, at most ``budget_bytes`` of them.

    It belongs to one model: rows come back bit for bit as they were inserted, whoever computed them. ``slots`` is the
    layout of every cache it reads and writes. The least recently used ends of prefixes are evicted first. The budget
    counts rows; each block costs less than 1 KiB of Python beside them. ``budget_bytes`` may be changed at any time and
    holds from the next ``insert`` on.
    """

    def __init__(self, slots: Sequence[CacheSlot], *, block: int = 32, budget_bytes: int) -> None:
        if not slots or block < 1 or budget_bytes < 0:
            raise UsageError(
                f"a prefix store needs slots, block >= 1 and budget_bytes >= 0, got {len(slots)} slots, "
                f"{block} and {budget_bytes}"
            )
        self.slots = tuple(slots)
        self.block = block
        self.budget_bytes = budget_bytes
        self._parts: list[tuple[slice, tuple[int, int, int]]] = []
        self._dtypes: list[np.dtype] = []
        self.block_bytes = 0
        for slot in self.slots:
            for form, width in row_layout(slot):
                begin, shape = self.block_bytes, (slot.kv_heads, block, width * form.dtype.itemsize)
                self.block_bytes += prod(shape)
                self._parts.append((slice(begin, self.block_bytes), shape))
                self._dtypes.append(form.dtype)
        self._blocks: OrderedDict[_Name, _Block] = OrderedDict()
        self._numbers = itertools.count(_ROOT + 1)
        self._lookups = self._hits = self._asked = self._reused = self._evicted = 0
        self._skipped: Counter[str] = Counter()

    @property
    def bytes(self) -> int:
        """Bytes of all rows kept."""
        return len(self._blocks) * self.block_bytes

    @property
    def stats(self) -> PrefixStats:
        """A snapshot."""
        return PrefixStats(
            lookups=self._lookups,
            hits=self._hits,
            tokens_asked=self._asked,
            tokens_reused=self._reused,
            evicted_blocks=self._evicted,
            blocks=len(self._blocks),
            bytes=self.bytes,
            skipped=dict(self._skipped),
        )

    def match(self, tokens: Sequence[int] | np.ndarray) -> int:
        """How many of ``tokens`` ``(T,)`` ``fill`` would supply. It only looks: nothing is counted or made recent."""
        ids = as_ids(tokens)
        return len(self._path(ids, self._usable(ids))) * self.block

    def fill(self, row: KVCache, tokens: Sequence[int] | np.ndarray) -> int:
        """Copies the longest known prefix of ``tokens`` ``(T,)`` into ``row``, an empty cache of batch 1.

        Returns its length n, which ``row`` then holds: whole blocks, and at most T - 1 tokens, so that one is left to
        step. ``row`` grows where it has no room for n, raising what ``KVCache.reserve`` raises; ``UsageError`` for a
        cache that is not empty, not of one row, or of other slots.
        """
        check_row(row, self.slots, empty=True)
        ids = as_ids(tokens)
        path = self._path(ids, self._usable(ids))
        self._touch(path)
        row.reserve(len(path) * self.block)
        # Walked again: to grow, the row may have made this store give bytes back.
        path = self._path(ids, len(path))
        for index, name in enumerate(path):
            parts = zip(self._block_of(row, index), self._split(self._blocks[name].rows), self._dtypes, strict=True)
            for buffer, rows, dtype in parts:
                row.storage.write(buffer, rows.view(dtype))
        filled = len(path) * self.block
        row.lengths[0] = filled
        self._lookups += 1
        self._hits += bool(path)
        self._asked += len(ids)
        self._reused += filled
        return filled

    def insert(self, row: KVCache, tokens: Sequence[int] | np.ndarray) -> int:
        """Keeps what ``row``, a cache of batch 1, holds for ``tokens`` ``(T,)``, its first T tokens.

        Whole blocks that are not known yet are copied; returns how many. Older prefixes make room. Of a prefix longer
        than the budget the beginning is kept, and nothing of a row in which a rolling slot has dropped its oldest
        rows; ``stats.skipped`` counts both. ``UsageError`` when the row holds fewer than T tokens, is not one row, or
        has other slots.
        """
        check_row(row, self.slots)
        ids, held = as_ids(tokens), int(row.lengths[0])
        if len(ids) > held:
            raise UsageError(f"{len(ids)} tokens cannot be kept of a row that holds {held}")
        for slot in self.slots:
            if slot.resident(held) < held:
                self._skipped[f"layer {slot.layer} dropped rows beyond its window of {slot.window} tokens"] += 1
                return 0
        room, blocks = self.budget_bytes // self.block_bytes, len(ids) // self.block
        if blocks > room:
            self._skipped["longer than the budget"] += 1
            blocks = room
        path = self._path(ids, blocks)
        known = len(path)
        # The path is made recent before anything is evicted, so that it is not what is evicted.
        self._touch(path)
        self._evict(len(self._blocks) + blocks - known - room)
        for index in range(known, blocks):
            name = (self._blocks[path[-1]].number if path else _ROOT, _token_bytes(ids, index, self.block))
            self._blocks[name] = _Block(next(self._numbers), self._copied(row, index))
            path.append(name)
        self._touch(path)
        return len(path) - known

    def reclaim(self, needed: int) -> int:
        """Evicts until ``needed`` bytes are freed or nothing is left; returns the bytes freed."""
        blocks = min(len(self._blocks), -(-max(needed, 0) // self.block_bytes))
        self._evict(blocks)
        return blocks * self.block_bytes

    def clear(self) -> None:
        """Forgets all rows; what was counted stays, and this counts as no eviction."""
        self._blocks.clear()

    def _usable(self, ids: np.ndarray) -> int:
        """Blocks that a prompt may take from here: one token, at least, is left to step."""
        return max(len(ids) - 1, 0) // self.block

    def _path(self, ids: np.ndarray, blocks: int) -> list[_Name]:
        """The names of the known blocks that ``ids`` begins with, from the root, at most ``blocks``."""
        path: list[_Name] = []
        parent = _ROOT
        for index in range(blocks):
            name = (parent, _token_bytes(ids, index, self.block))
            found = self._blocks.get(name)
            if found is None:
                break
            path.append(name)
            parent = found.number
        return path

    def _touch(self, path: list[_Name]) -> None:
        """Makes a whole path, from the root, the most recent, its root last."""
        for name in reversed(path):
            self._blocks.move_to_end(name)

    def _evict(self, blocks: int) -> None:
        for _ in range(blocks):
            self._blocks.popitem(last=False)
            self._evicted += 1

    def _copied(self, row: KVCache, index: int) -> np.ndarray:
        """Block ``index`` of ``row`` as one array."""
        rows = np.empty(self.block_bytes, np.uint8)
        for buffer, part in zip(self._block_of(row, index), self._split(rows), strict=True):
            part[:] = row.storage.read(buffer).view(np.uint8)
        return rows

    def _block_of(self, row: KVCache, index: int) -> list[Buffer]:
        """Block ``index`` of the buffers of a cache of one row: ``(K, block, W)``, keys and values of each slot in
        turn."""
        where = slice(index * self.block, (index + 1) * self.block)
        return [buffer[0][:, where] for pair in zip(row.keys, row.values, strict=True) for buffer in pair]

    def _split(self, rows: np.ndarray) -> list[np.ndarray]:
        """Views of a block's keys and values, ``(K, block, bytes of a row)`` each, in the order of the slots."""
        return [rows[where].reshape(shape) for where, shape in self._parts]


def as_ids(tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Token ids ``(T,)`` as int64, or UsageError."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise UsageError(f"tokens must be one row of integers, got {ids.dtype} of shape {ids.shape}")
    return ids.astype(np.int64)


def check_row(row: KVCache, slots: tuple[CacheSlot, ...], *, empty: bool = False) -> None:
    """UsageError unless ``row`` is a cache of batch 1 laid out by ``slots``, and ``empty`` where that is asked."""
    if row.batch != 1:
        raise UsageError(f"a prefix belongs to one row, this cache has {row.batch}", hint="use row(i)")
    if row.slots != slots:
        raise UsageError("the cache's slots are not those of the prefix", hint="keep prefixes for each model apart")
    if empty and row.lengths[0]:
        held = int(row.lengths[0])
        raise UsageError(f"a prefix fills an empty row, this one holds {held} tokens", hint="truncate it to 0")


def _token_bytes(ids: np.ndarray, index: int, block: int) -> bytes:
    """The part of a block's name that its own tokens are."""
    return ids[index * block : (index + 1) * block].tobytes()
