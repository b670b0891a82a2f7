"""Keys and values of the tokens seen so far: who is at which position, in which buffers, at which cost.

Every slot (one attention layer) has a key buffer ``(B, K, S, W)`` and a value buffer ``(B, K, S, Wv)``, C-contiguous,
so that a backend can bind them in place. W is the width of a stored row, which its format says; S is the cache's
capacity, or what the slot's window needs where the engine evicts by itself. The cache owns position and capacity;
engines write the buffers, the decode loop advances the lengths. It knows neither engines nor tokens, and moves rows
without reading them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.runtime import pages
from ryzen_compile.runtime.breakdown import BufferMemory, MemoryBreakdown
from ryzen_compile.runtime.layout import (
    cache_bytes,
    check_fits,
    droppable,
    position_bytes,
    row_layout,
    token_bytes,
)
from ryzen_compile.runtime.storage import HOST, Buffer, Storage
from ryzen_compile.spec import CacheSlot


class Account(Protocol):
    """A budget that several caches share: each asks before it allocates."""

    @property
    def available(self) -> int | None:
        """Bytes that may still be asked for; None where nothing bounds them."""
        ...

    def ask(self, cache: KVCache, needed: int) -> None:
        """Told before ``cache`` allocates ``needed`` bytes more; raises ``MemoryLimitError`` to prevent it."""
        ...


class KVCache:
    """The cache of ``batch`` rows with room for ``capacity`` tokens each.

    ``lengths`` ``(B,)`` int64 is how many tokens each row has seen; ``keys[i]`` and ``values[i]`` belong to
    ``slots[i]``, which holds ``slots[i].resident(length)`` of them. ``limit`` is the model's context, which
    ``capacity`` never exceeds (None: unlimited). ``revision`` changes with the buffers. ``budget_bytes`` bounds keys
    and values together (None: all the memory of ``storage``, where it can be asked for), ``account`` what several
    caches may take; a request beyond either raises ``MemoryLimitError`` before anything is allocated. Buffers are
    ``storage``'s, NumPy arrays unless an engine keeps them elsewhere; they start as zeros, not garbage: an attention
    that multiplies unwritten positions by a probability of zero must not meet a NaN there.
    """

    def __init__(
        self,
        slots: Sequence[CacheSlot],
        batch: int,
        capacity: int,
        *,
        limit: int | None = None,
        chunk: int = 256,
        budget_bytes: int | None = None,
        account: Account | None = None,
        storage: Storage = HOST,
    ) -> None:
        if batch < 1 or capacity < 0 or chunk < 1:
            raise UsageError(
                f"a cache needs batch >= 1, capacity >= 0 and chunk >= 1, got {batch}, {capacity} and {chunk}"
            )
        self.slots = tuple(slots)
        self.limit = limit
        self.chunk = chunk
        self.budget_bytes = budget_bytes if budget_bytes is not None else storage.memory_bytes()
        self.lengths = np.zeros(batch, dtype=np.int64)
        self.storage = storage
        self.keys: list[Buffer] = []
        self.values: list[Buffer] = []
        self.capacity = capacity
        self.revision = 0
        self._account = account
        self._is_view = False
        self._shares_pages = np.zeros(batch, dtype=np.bool_)
        self.require(capacity)
        self._ask(cache_bytes(self.slots, batch, capacity))
        for slot in self.slots:
            for buffers, (form, width) in zip((self.keys, self.values), row_layout(slot), strict=True):
                buffers.append(storage.zeros((batch, slot.kv_heads, slot.rows or capacity, width), form.dtype))

    @property
    def batch(self) -> int:
        """Number of rows, B."""
        return len(self.lengths)

    def bytes_by_layer(self) -> list[int]:
        """Bytes of keys and values allocated for each slot, in slot order."""
        return [key.nbytes + value.nbytes for key, value in zip(self.keys, self.values, strict=True)]

    @property
    def bytes(self) -> int:
        """Bytes allocated in all slots; pages that rows share count for each of them, as each may come to own them."""
        return sum(self.bytes_by_layer())

    def memory_breakdown(self) -> MemoryBreakdown:
        """What is allocated and used, per layer and kind, and what a token costs."""
        longest = int(self.lengths.max())
        buffers = [
            BufferMemory(
                slot.layer, kind, form, slot.window, buffer.nbytes, buffer[0, :, : slot.resident(longest)].nbytes
            )
            for slot, key, value in zip(self.slots, self.keys, self.values, strict=True)
            for kind, form, buffer in (("keys", slot.key_format, key), ("values", slot.value_format, value))
        ]
        mapped = any(pages.is_mapped(buffer) for buffer in (*self.keys, *self.values))
        return MemoryBreakdown(
            buffers=tuple(buffers),
            rows=self.batch,
            capacity=self.capacity,
            longest=longest,
            bytes_per_token=token_bytes(self.slots),
            shared_rows=int(self._shares_pages.sum()) if mapped else 0,
        )

    def require(self, tokens: int, *, batch: int | None = None) -> None:
        """Refuse ``tokens`` in each of ``batch`` rows (None: as many as now) if they cannot be held; allocates nothing.

        Raises ``PromptError`` beyond the context, ``MemoryLimitError`` beyond the byte budget.
        """
        rows = self.batch if batch is None else batch
        budget, shared = self._budget(beside=rows != self.batch), self._account is not None
        check_fits(self.slots, rows, tokens, limit=self.limit, budget=budget, shared=shared)

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` tokens in every row (in all, not in addition).

        Capacity grows to the next multiple of ``chunk``, capped at the context and the byte budget; what the rows hold
        is copied, and row views taken before are cut off from the new buffers. Rows that shared pages no longer do:
        ``fork`` takes the room that they will need. Raises as ``require`` does, and ``UsageError`` on a row view,
        whose parent owns the storage.
        """
        if tokens <= self.capacity:
            return
        if self._is_view:
            raise UsageError(
                f"a row view cannot grow from {self.capacity} to {tokens} tokens",
                hint="reserve on the cache that it was taken from",
            )
        self.require(tokens)
        capacity = self._rounded(self.batch, tokens, self.chunk, self._budget())
        self._ask(cache_bytes(self.slots, self.batch, capacity) - self.bytes)
        held = int(self.lengths.max())
        self.revision += 1  # first, or whoever bound a buffer that is replaced would not learn of it if growing fails
        # One slot at a time, so that no more than one slot exists twice while growing.
        rows, grown = np.arange(self.batch), self.storage.copy_rows
        for index, slot in enumerate(self.slots):
            if not slot.rows:
                self.keys[index] = grown(self.keys[index], rows, held, capacity)
                self.values[index] = grown(self.values[index], rows, held, capacity)
        self.capacity = capacity

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` more tokens, just written by the engine, in every row."""
        if tokens < 0 or int(self.lengths.max()) + tokens > self.capacity:
            raise UsageError(
                f"cannot advance a cache of capacity {self.capacity} that holds {int(self.lengths.max())} tokens "
                f"by {tokens}",
                hint="call reserve before the step",
            )
        # In place: a row view's lengths are a slice of its parent's.
        self.lengths += tokens

    def truncate(self, tokens: int | np.ndarray) -> None:
        """Forget everything after the first ``tokens`` tokens: one number for all rows, or one per row ``(B,)``.

        Raises ``UnsupportedError``, changing nothing, where a slot with a window has dropped tokens that would have to
        come back; a row can always be emptied. See ``droppable``.
        """
        kept = np.asarray(tokens)
        if kept.dtype.kind not in "iu" or kept.shape not in ((), self.lengths.shape) or (kept < 0).any():
            raise UsageError(
                f"truncate needs a count >= 0, or {self.batch} of them, got {tokens!r} of shape {kept.shape}"
            )
        shorter = np.minimum(self.lengths, kept)
        self._check_droppable(shorter)
        self.lengths[:] = shorter

    def row(self, index: int) -> KVCache:
        """Row ``index`` as a cache of batch 1 over the same storage: what is written or counted in it, the parent sees.

        It is good until the parent grows.
        """
        if not 0 <= index < self.batch:
            raise UsageError(f"there is no row {index} in a cache of {self.batch} rows")
        return self._view(slice(index, index + 1))

    def head(self, rows: int) -> KVCache:
        """The first ``rows`` rows as a cache over the same storage, as ``row`` is of one."""
        if not 1 <= rows <= self.batch:
            raise UsageError(f"a cache of {self.batch} rows has no first {rows}")
        return self._view(slice(0, rows))

    def fork(self, copies: int, *, room: int | None = None) -> KVCache:
        """This cache, of batch 1, copied to ``copies`` independent rows; as ``select`` with that row repeated."""
        if self.batch != 1:
            raise UsageError(f"fork copies a cache of one row, this one has {self.batch}", hint="use select")
        return self.select([0] * copies, room=room)

    def select(self, rows: Sequence[int] | np.ndarray, *, room: int | None = None) -> KVCache:
        """A new cache whose row i is a copy of this one's row ``rows[i]``: reorders, drops or repeats rows.

        It has room for ``room`` tokens more than the longest row picked holds (None: this one's capacity). Rows
        that are repeated share their pages until they are written, where the system can do so (``pages.copy_rows``);
        the capacity is rounded up to whole pages for it if that adds no more than an eighth.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.ndim != 1 or not wanted.size or wanted.min() < 0 or wanted.max() >= self.batch:
            raise UsageError(f"rows must be one or more numbers from 0 to {self.batch - 1}, got {list(rows)!r}")
        if room is not None and room < 0:
            raise UsageError(f"room is a number of tokens >= 0, got {room}")
        repeated = (np.bincount(wanted)[wanted] > 1) & self.storage.shares_pages
        picked = self._derive(self.lengths[wanted], repeated, is_view=False)
        longest = int(picked.lengths.max())
        picked.capacity = self._capacity_of_copies(picked, self.capacity if room is None else longest + room)
        picked._ask(cache_bytes(self.slots, picked.batch, picked.capacity))
        for slot, *buffers in zip(self.slots, self.keys, self.values, strict=True):
            # A rolling slot holds all of a shorter row wherever it holds less of a longer one.
            held, capacity = min(longest, slot.rows or longest), slot.rows or picked.capacity
            keys, values = (self.storage.copy_rows(buffer, wanted, held, capacity) for buffer in buffers)
            picked.keys.append(keys)
            picked.values.append(values)
        return picked

    def _view(self, rows: slice) -> KVCache:
        view = self._derive(self.lengths[rows], self._shares_pages[rows], is_view=True)
        view.keys = [key[rows] for key in self.keys]
        view.values = [value[rows] for value in self.values]
        return view

    def _check_droppable(self, kept: np.ndarray) -> None:
        for slot in self.slots:
            if not slot.rows:
                continue
            for row, (seen, left) in enumerate(zip(self.lengths.tolist(), kept.tolist(), strict=True)):
                if left and seen - left > droppable(slot, seen):
                    raise UnsupportedError(
                        f"layer {slot.layer} looks back {slot.window} tokens and has dropped older ones: of the {seen} "
                        f"in row {row} the last {droppable(slot, seen)} can be taken back, not {seen - left}",
                        hint="truncate to 0 and step the tokens again",
                    )

    def _capacity_of_copies(self, copies: KVCache, tokens: int) -> int:
        """What ``select`` gives its result, which is not allocated yet and must hold ``tokens`` tokens."""
        copies.require(tokens)
        budget = copies._budget()
        capacity = tokens
        if tokens != self.capacity:
            capacity = self._rounded(copies.batch, tokens, self.chunk, budget)
        if copies._shares_pages.any():
            step = pages.whole_pages(size for slot in self.slots if not slot.rows for size in position_bytes(slot))
            paged = self._rounded(copies.batch, capacity, step, budget)
            capacity = paged if paged - capacity <= capacity // 8 else capacity
        return capacity

    def _derive(self, lengths: np.ndarray, shares_pages: np.ndarray, *, is_view: bool) -> KVCache:
        """A cache of this layout whose buffers are still to be given."""
        derived = copy.copy(self)
        derived.lengths, derived._shares_pages, derived._is_view = lengths, shares_pages, is_view
        derived.keys, derived.values = [], []
        return derived

    def _rounded(self, batch: int, tokens: int, multiple: int, budget: int | None) -> int:
        """``tokens``, which fit, rounded up to a multiple of ``multiple`` as far as context and budget allow."""
        capacity = -(-tokens // multiple) * multiple
        if self.limit is not None:
            capacity = min(capacity, self.limit)
        per_token = batch * token_bytes(self.slots)
        if budget is not None and per_token:
            capacity = min(capacity, (budget - cache_bytes(self.slots, batch, 0)) // per_token)
        return capacity

    def _budget(self, *, beside: bool = False) -> int | None:
        """The bytes that this cache may take in all, or that another one ``beside`` it may."""
        available = self._account.available if self._account is not None else None
        if available is not None and not beside:
            available += self.bytes
        bounds = [bound for bound in (self.budget_bytes, available) if bound is not None]
        return min(bounds, default=None)

    def _ask(self, needed: int) -> None:
        if self._account is not None:
            self._account.ask(self, needed)
