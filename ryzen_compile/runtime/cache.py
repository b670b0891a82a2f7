"""Keys and values of the tokens seen so far: who is at which position, in which buffers, at which cost.

Every slot (one attention layer) has a key buffer ``(B, K, S, D)`` and a value buffer ``(B, K, S, Dv)``, C-contiguous,
so that a backend can bind them in place. The cache owns position and capacity; engines write the buffers, the decode
loop advances the lengths. It knows neither engines nor tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from ryzen_compile.errors import MemoryLimitError, PromptError, UnsupportedError, UsageError
from ryzen_compile.spec import CacheSlot

DTYPES = {"fp32": np.dtype(np.float32)}


class KVCache:
    """The cache of ``batch`` rows with room for ``capacity`` tokens each.

    ``lengths`` ``(B,)`` int64 is how many tokens each row holds; ``keys[i]`` and ``values[i]`` belong to ``slots[i]``.
    ``limit`` is the model's context, which ``capacity`` never exceeds (None: unlimited). ``budget_bytes`` bounds keys
    and values together (None: the machine's physical memory, where it can be asked for); a request beyond it raises
    ``MemoryLimitError`` before anything is allocated. Buffers start as zeros, not garbage: an attention that multiplies
    unwritten positions by a probability of zero must not meet a NaN there.
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
    ) -> None:
        if batch < 1 or capacity < 0 or chunk < 1:
            raise UsageError(
                f"a cache needs batch >= 1, capacity >= 0 and chunk >= 1, got {batch}, {capacity} and {chunk}"
            )
        self.slots = tuple(slots)
        self.limit = limit
        self.chunk = chunk
        self.budget_bytes = budget_bytes if budget_bytes is not None else physical_memory_bytes()
        self.lengths = np.zeros(batch, dtype=np.int64)
        self.keys: list[np.ndarray] = []
        self.values: list[np.ndarray] = []
        self.capacity = capacity
        self._is_view = False
        self.require(capacity)
        for slot in self.slots:
            dtype = _dtype(slot)
            self.keys.append(np.zeros((batch, slot.kv_heads, capacity, slot.head_dim), dtype))
            self.values.append(np.zeros((batch, slot.kv_heads, capacity, slot.value_dim), dtype))

    @property
    def batch(self) -> int:
        """Number of rows, B."""
        return len(self.lengths)

    def bytes_by_layer(self) -> list[int]:
        """Bytes of keys and values allocated for each slot, in slot order."""
        return [key.nbytes + value.nbytes for key, value in zip(self.keys, self.values, strict=True)]

    @property
    def bytes(self) -> int:
        """Bytes allocated in all slots."""
        return sum(self.bytes_by_layer())

    def require(self, tokens: int, *, batch: int | None = None) -> None:
        """Refuse ``tokens`` in each of ``batch`` rows (None: as many as now) if they cannot be held; allocates nothing.

        Raises ``PromptError`` beyond the context, ``MemoryLimitError`` beyond the byte budget.
        """
        if self.limit is not None and tokens > self.limit:
            raise PromptError(f"{tokens} tokens per row do not fit the model's context of {self.limit} tokens")
        self._check_budget(self.batch if batch is None else batch, tokens)

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` tokens in every row (in all, not in addition).

        Capacity grows to the next multiple of ``chunk``, capped at the context and the byte budget; what the rows hold
        is copied, and row views taken before are cut off from the new buffers. Raises as ``require`` does, and
        ``UsageError`` on a row view, whose parent owns the storage.
        """
        if tokens <= self.capacity:
            return
        if self._is_view:
            raise UsageError(
                f"a row view cannot grow from {self.capacity} to {tokens} tokens",
                hint="reserve on the cache that it was taken from",
            )
        self.require(tokens)
        capacity = -(-tokens // self.chunk) * self.chunk
        if self.limit is not None:
            capacity = min(capacity, self.limit)
        per_token = self.batch * token_bytes(self.slots)
        if self.budget_bytes is not None and per_token:
            capacity = min(capacity, self.budget_bytes // per_token)
        held = int(self.lengths.max())
        # One slot at a time, so that no more than one slot exists twice while growing.
        for index in range(len(self.slots)):
            self.keys[index] = _grown(self.keys[index], held, capacity)
            self.values[index] = _grown(self.values[index], held, capacity)
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
        """Forget everything after the first ``tokens`` tokens: one number for all rows, or one per row ``(B,)``."""
        kept = np.asarray(tokens)
        if kept.dtype.kind not in "iu" or kept.shape not in ((), self.lengths.shape) or (kept < 0).any():
            raise UsageError(
                f"truncate needs a count >= 0, or {self.batch} of them, got {tokens!r} of shape {kept.shape}"
            )
        np.minimum(self.lengths, kept, out=self.lengths)

    def row(self, index: int) -> KVCache:
        """Row ``index`` as a cache of batch 1 over the same storage: what is written or counted in it, the parent sees.

        It is good until the parent grows.
        """
        if not 0 <= index < self.batch:
            raise UsageError(f"there is no row {index} in a cache of {self.batch} rows")
        picked = slice(index, index + 1)
        return self._derive(
            self.lengths[picked], [key[picked] for key in self.keys], [value[picked] for value in self.values], True
        )

    def fork(self, copies: int) -> KVCache:
        """This cache, of batch 1, copied to ``copies`` independent rows."""
        if self.batch != 1:
            raise UsageError(f"fork copies a cache of one row, this one has {self.batch}", hint="use select")
        return self.select([0] * copies)

    def select(self, rows: Sequence[int] | np.ndarray) -> KVCache:
        """A new cache whose row i is a copy of this one's row ``rows[i]``: reorders, drops or repeats rows."""
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.ndim != 1 or not wanted.size or wanted.min() < 0 or wanted.max() >= self.batch:
            raise UsageError(f"rows must be one or more numbers from 0 to {self.batch - 1}, got {list(rows)!r}")
        self._check_budget(len(wanted), self.capacity)
        return self._derive(
            self.lengths[wanted], [key[wanted] for key in self.keys], [value[wanted] for value in self.values], False
        )

    def _derive(self, lengths: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray], is_view: bool) -> KVCache:
        """A cache of this layout over given buffers, allocating nothing."""
        derived = KVCache.__new__(KVCache)
        derived.slots, derived.limit, derived.chunk = self.slots, self.limit, self.chunk
        derived.budget_bytes, derived.capacity = self.budget_bytes, self.capacity
        derived.lengths, derived.keys, derived.values = lengths, keys, values
        derived._is_view = is_view
        return derived

    def _check_budget(self, batch: int, tokens: int) -> None:
        needed = batch * tokens * token_bytes(self.slots)
        if self.budget_bytes is not None and needed > self.budget_bytes:
            raise MemoryLimitError(
                f"a cache of {batch} rows x {tokens} tokens needs {needed} bytes, the budget is {self.budget_bytes}",
                hint="use fewer rows, a shorter prompt or fewer new tokens",
            )


def token_bytes(slots: Sequence[CacheSlot]) -> int:
    """Bytes that one token of one row takes in all slots."""
    return sum(slot.kv_heads * (slot.head_dim + slot.value_dim) * _dtype(slot).itemsize for slot in slots)


def physical_memory_bytes() -> int | None:
    """The machine's memory, or None where the system does not say (no ``sysconf`` on Windows)."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _dtype(slot: CacheSlot) -> np.dtype:
    if slot.dtype not in DTYPES:
        raise UnsupportedError(
            f"cache slot of layer {slot.layer} has dtype {slot.dtype!r}, expected one of {sorted(DTYPES)}"
        )
    return DTYPES[slot.dtype]


def _grown(buffer: np.ndarray, held: int, capacity: int) -> np.ndarray:
    """``buffer`` ``(B, K, S, D)`` with S = ``capacity``, its first ``held`` positions kept, zeros after them."""
    batch, heads, _, width = buffer.shape
    bigger = np.zeros((batch, heads, capacity, width), buffer.dtype)
    bigger[:, :, :held] = buffer[:, :, :held]
    return bigger
