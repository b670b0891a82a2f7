"""Caches that are lent and used again, under one budget that whatever else keeps keys and values shares.

Allocating a cache costs page faults at every first write, so that one kept from the last request is faster than a new
one. The pool counts what lives: caches lent, the copies that were made of them, and what grows, all ask it first. A
cache that is forgotten instead of given back stops counting when it is collected. It is not thread-safe; who calls it
from several threads serialises the calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from ryzen_compile.errors import MemoryLimitError, UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.layout import check_fits
from ryzen_compile.runtime.storage import HOST, Storage
from ryzen_compile.spec import CacheSlot

IDLE_BYTES = 1 << 30  # kept at most for the next borrower, however large the budget


class Holder(Protocol):
    """Something that keeps keys and values of its own and can let go of them."""

    @property
    def bytes(self) -> int:
        """What it holds now."""
        ...

    def reclaim(self, needed: int) -> int:
        """Give back ``needed`` bytes, or as many as it can; returns how many."""
        ...


@dataclass(frozen=True)
class PoolMemory:
    """Bytes in use (``live``), of caches kept for the next borrower (``idle``), of registered holders (``held``)."""

    live: int
    idle: int
    held: int
    budget: int | None


class CachePool:
    """Caches of one layout: ``slots``, ``limit``, ``chunk`` and ``storage`` are those of ``KVCache``.

    ``budget_bytes`` bounds live caches, idle ones and registered holders together (None: all the memory of ``storage``,
    where it can be asked for). Idle caches take at most ``idle_share`` of it, a quarter unless said otherwise,
    and 1 GiB; where the budget is not known, one cache is kept.
    """

    def __init__(
        self,
        slots: Sequence[CacheSlot],
        *,
        limit: int | None = None,
        budget_bytes: int | None = None,
        chunk: int = 256,
        idle_share: float = 0.25,
        storage: Storage = HOST,
    ) -> None:
        if not 0 <= idle_share <= 1:
            raise UsageError(f"idle_share is a share of the budget from 0 to 1, got {idle_share}")
        self.slots = tuple(slots)
        self.limit = limit
        self.chunk = chunk
        self.budget_bytes = budget_bytes if budget_bytes is not None else storage.memory_bytes()
        self.idle_share = idle_share
        self.storage = storage
        self._live: weakref.WeakSet[KVCache] = weakref.WeakSet()
        self._idle: list[KVCache] = []  # the longest unused first
        self._holders: list[Holder] = []

    def require(self, batch: int, tokens: int) -> None:
        """Refuse ``tokens`` tokens in each of ``batch`` rows if no cache could hold them now; allocates nothing.

        Raises as ``acquire`` does, short of asking the holders.
        """
        shared = self.available != self.budget_bytes
        check_fits(self.slots, batch, tokens, limit=self.limit, budget=self.available, shared=shared)

    def acquire(self, batch: int, tokens: int) -> KVCache:
        """An empty cache of ``batch`` rows with room for ``tokens`` tokens each, to be given to ``release``.

        The smallest idle one that suffices, or a new one. What lies behind its lengths may be an earlier borrower's.
        Raises ``PromptError`` beyond the context, and ``MemoryLimitError`` where the budget is exceeded even after idle
        caches were dropped and the holders gave back what they can.
        """
        fitting = [cache for cache in self._idle if cache.batch == batch and cache.capacity >= tokens]
        if fitting:
            cache = min(fitting, key=lambda idle: idle.capacity)
            self._idle.remove(cache)
            cache.lengths[:] = 0
            self.ask(cache, 0)
            return cache
        self.require(batch, tokens)
        cache = KVCache(
            self.slots,
            batch,
            0,
            limit=self.limit,
            chunk=self.chunk,
            budget_bytes=self.budget_bytes,
            account=self,
            storage=self.storage,
        )
        cache.reserve(tokens)
        return cache

    def release(self, cache: KVCache) -> None:
        """Take back a cache that ``acquire`` lent, or a copy of one; neither it nor its row views are used afterwards.

        Raises ``UsageError`` for one that is not lent.
        """
        if cache not in self._live:
            raise UsageError("this cache was not lent by this pool, or was released before")
        self._live.discard(cache)
        most = cache.bytes if self.budget_bytes is None else int(self.budget_bytes * self.idle_share)
        most = min(most, IDLE_BYTES)
        if cache.bytes > most:
            return
        self._idle.append(cache)
        while self._idle_bytes() > most:
            self._idle.pop(0)

    @contextmanager
    def borrowed(self, batch: int, tokens: int) -> Iterator[KVCache]:
        """``acquire`` for a ``with`` block. After an error the cache is dropped: it may hold what is not a number."""
        cache = self.acquire(batch, tokens)
        try:
            yield cache
        except BaseException:
            self._live.discard(cache)
            raise
        self.release(cache)

    def clear(self) -> None:
        """Let go of all idle caches."""
        self._idle.clear()

    def register(self, holder: Holder) -> None:
        """Let ``holder`` share the budget; those registered first are asked first to give back."""
        self._holders.append(holder)

    def memory(self) -> PoolMemory:
        """What the pool and its holders take now."""
        live = sum(cache.bytes for cache in self._live)
        return PoolMemory(live, self._idle_bytes(), sum(holder.bytes for holder in self._holders), self.budget_bytes)

    @property
    def available(self) -> int | None:
        """Bytes that could be asked for if everything idle or held went; None without a budget."""
        return None if self.budget_bytes is None else self.budget_bytes - self.memory().live

    def ask(self, cache: KVCache, needed: int) -> None:
        """See ``Account``: counts ``cache`` as live and makes room for ``needed`` bytes more of it."""
        self._live.add(cache)
        while self._idle and self._excess(needed) > 0:
            self._idle.pop(0)
        for holder in self._holders:
            if (excess := self._excess(needed)) > 0:
                holder.reclaim(excess)
        if self._excess(needed) > 0:
            now = self.memory()
            raise MemoryLimitError(
                f"{needed} bytes more of cache exceed the budget of {now.budget}: caches in use take {now.live}, "
                f"and {now.held} are held that were not given back",
                hint="release caches, or use fewer rows or tokens",
            )

    def _excess(self, needed: int) -> int:
        """Bytes beyond the budget if ``needed`` were added."""
        now = self.memory()
        return 0 if now.budget is None else now.live + now.idle + now.held + needed - now.budget

    def _idle_bytes(self) -> int:
        return sum(cache.bytes for cache in self._idle)
