"""CachePool: what is used again, what is dropped, and who gives way under one budget."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from ryzen_compile.errors import MemoryLimitError, NumericalError, PromptError, UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.layout import fixed_bytes, token_bytes
from ryzen_compile.runtime.pool import CachePool, PoolMemory
from ryzen_compile.runtime.storage import HOST
from ryzen_compile.spec import CacheSlot

SLOTS = (CacheSlot(0, 2, 4, 4), CacheSlot(1, 1, 8, 3))
TOKEN = token_bytes(SLOTS)


class Shelf:
    """A holder that gives back what is asked, in units, as long as it has any."""

    def __init__(self, held: int, *, unit: int = 1, stubborn: bool = False) -> None:
        self.bytes, self.unit, self.stubborn = held, unit, stubborn
        self.asked: list[int] = []

    def reclaim(self, needed: int) -> int:
        self.asked.append(needed)
        freed = 0 if self.stubborn else min(self.bytes, -(-needed // self.unit) * self.unit)
        self.bytes -= freed
        return freed


def pool_of(tokens: int, **options: float) -> CachePool:
    """A budget of ``tokens`` tokens, all of which may be idle."""
    return CachePool(SLOTS, budget_bytes=tokens * TOKEN, chunk=8, **{"idle_share": 1.0, **options})


def test_a_released_cache_is_used_again_and_starts_empty() -> None:
    pool = pool_of(100)
    cache = pool.acquire(2, 5)
    assert (cache.batch, cache.capacity) == (2, 8)
    cache.advance(5)
    pool.release(cache)
    assert pool.memory() == PoolMemory(live=0, idle=16 * TOKEN, held=0, budget=100 * TOKEN)
    again = pool.acquire(2, 8)
    assert again is cache and again.lengths.tolist() == [0, 0]
    assert pool.memory() == PoolMemory(live=16 * TOKEN, idle=0, held=0, budget=100 * TOKEN)


def test_the_smallest_idle_cache_that_suffices_is_taken() -> None:
    pool = pool_of(1000)
    large, small, other = pool.acquire(1, 64), pool.acquire(1, 16), pool.acquire(2, 16)
    for cache in (large, small, other):
        pool.release(cache)
    assert pool.acquire(1, 12) is small
    assert pool.acquire(1, 12) is large
    fresh = pool.acquire(1, 12)
    assert fresh not in (large, small, other)
    assert pool.acquire(2, 17) is not other, "its capacity does not suffice"


def test_idle_caches_beyond_their_share_are_dropped_longest_unused_first() -> None:
    pool = pool_of(100, idle_share=0.25)
    first, second, third = (pool.acquire(1, 8) for _ in range(3))
    large = pool.acquire(1, 32)
    for cache in (second, first, third, large):
        pool.release(cache)
    assert pool.memory().idle == 24 * TOKEN, "the large one alone exceeds the share, and pushes nobody out"
    late = pool.acquire(2, 8)
    pool.release(late)
    assert pool.memory().idle == 24 * TOKEN
    assert pool.acquire(2, 8) is late and pool.acquire(1, 8) is third
    assert pool.memory().idle == 0
    assert CachePool(SLOTS, budget_bytes=400).idle_share == 0.25, "the documented default"


def test_without_a_known_budget_one_cache_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HOST, "memory_bytes", lambda: None)
    pool = CachePool(SLOTS)
    first, second = pool.acquire(1, 8), pool.acquire(1, 8)
    pool.release(first)
    pool.release(second)
    assert pool.available is None and pool.memory() == PoolMemory(0, second.bytes, 0, None)
    assert pool.acquire(1, 8) is second


def test_the_machine_is_the_budget_unless_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HOST, "memory_bytes", lambda: 10 * TOKEN)
    pool = CachePool(SLOTS)
    with pytest.raises(MemoryLimitError):
        pool.acquire(1, 11)
    assert pool.acquire(1, 10).capacity == 10


def test_idle_caches_give_way_then_holders_then_the_request_is_refused() -> None:
    pool, shelf = pool_of(40), Shelf(10 * TOKEN, unit=TOKEN)
    pool.register(shelf)
    idle = pool.acquire(2, 8)
    pool.release(idle)
    live = pool.acquire(1, 16)
    assert pool.memory() == PoolMemory(16 * TOKEN, 0, 10 * TOKEN, 40 * TOKEN), "26 + 16 would not fit: idle went"
    assert not shelf.asked
    second = pool.acquire(1, 16)
    assert shelf.asked == [2 * TOKEN] and pool.memory().held == 8 * TOKEN
    with pytest.raises(MemoryLimitError, match=f"9 tokens needs {9 * TOKEN} bytes, the budget is {8 * TOKEN}"):
        pool.acquire(1, 9)
    assert len(shelf.asked) == 1, "what cannot succeed takes nothing from anybody"
    assert pool.memory().live == live.bytes + second.bytes


def test_holders_are_asked_in_turn_for_what_is_still_missing() -> None:
    pool = pool_of(24)
    poor, rich, spared = Shelf(4 * TOKEN), Shelf(10 * TOKEN), Shelf(2 * TOKEN)
    for holder in (poor, rich, spared):
        pool.register(holder)
    first = pool.acquire(1, 8)
    assert not poor.asked and pool.memory().live == first.bytes
    second = pool.acquire(1, 8)
    assert (poor.asked, rich.asked, spared.asked) == ([8 * TOKEN], [4 * TOKEN], [])
    assert pool.memory() == PoolMemory(first.bytes + second.bytes, 0, 8 * TOKEN, 24 * TOKEN)


def test_a_holder_that_gives_nothing_back_is_named_in_the_refusal() -> None:
    pool = pool_of(20)
    pool.register(Shelf(16 * TOKEN, stubborn=True))
    with pytest.raises(MemoryLimitError, match=rf"{8 * TOKEN} bytes more .* and {16 * TOKEN} are held that were not"):
        pool.acquire(1, 8)
    assert pool.memory().live == 0


def test_a_holder_that_grew_gives_way_to_a_cache_that_is_used_again() -> None:
    pool, shelf = pool_of(20), Shelf(0)
    pool.register(shelf)
    pool.release(pool.acquire(1, 16))
    shelf.bytes = 10 * TOKEN
    assert pool.acquire(1, 16).capacity == 16
    assert shelf.bytes == 4 * TOKEN


def test_growth_and_copies_draw_on_the_shared_budget() -> None:
    pool = pool_of(40)
    cache, other = pool.acquire(1, 8), pool.acquire(1, 8)
    cache.advance(8)
    cache.reserve(16)
    assert pool.memory().live == 24 * TOKEN and pool.available == 16 * TOKEN
    copy = cache.fork(1)
    assert pool.memory().live == 40 * TOKEN
    for refused in (lambda: cache.reserve(17), lambda: other.fork(1), lambda: pool.acquire(1, 1)):
        with pytest.raises(MemoryLimitError):
            refused()
    pool.release(copy)
    other.reserve(9)
    assert other.capacity == 16 and pool.memory().idle == 0, "the idle copy gave way"
    other.reserve(17)
    assert other.capacity == 24, "trimmed to what the first cache leaves"


def test_what_cannot_be_held_is_refused_without_taking_anything() -> None:
    pool, shelf = pool_of(40), Shelf(5 * TOKEN)
    pool.register(shelf)
    pool.release(pool.acquire(1, 16))
    live = pool.acquire(2, 5)
    before = pool.memory()
    pool.require(3, 8)  # beside the live one, once idle and held bytes have gone
    for refused in (pool.require, pool.acquire):
        with pytest.raises(MemoryLimitError, match=f"5 rows x 5 tokens needs {25 * TOKEN} bytes, .* {24 * TOKEN} "):
            refused(5, 5)
    assert pool.memory() == before and live.bytes == 16 * TOKEN and not shelf.asked
    with pytest.raises(PromptError, match="10 tokens per row do not fit"):
        CachePool(SLOTS, limit=9).require(1, 10)


def test_a_forgotten_cache_stops_counting() -> None:
    pool = pool_of(20)
    forgotten = pool.acquire(1, 16)
    view = forgotten.row(0)
    assert pool.memory().live == 16 * TOKEN and view.batch == 1
    del forgotten, view
    gc.collect()
    assert pool.memory().live == pool.memory().idle == 0
    assert pool.acquire(2, 8).capacity == 8


def test_a_borrowed_cache_comes_back_and_after_an_error_is_not_used_again() -> None:
    pool = pool_of(100)
    with pool.borrowed(1, 8) as cache:
        assert pool.memory().live == 8 * TOKEN
    assert pool.memory().live == 0 and pool.memory().idle == 8 * TOKEN

    def diverge() -> None:
        with pool.borrowed(1, 8) as again:
            assert again is cache
            again.keys[0][:] = np.nan
            raise NumericalError("logits are not finite")

    with pytest.raises(NumericalError):
        diverge()
    assert pool.memory() == PoolMemory(0, 0, 0, 100 * TOKEN)
    assert not np.isnan(pool.acquire(1, 8).keys[0]).any()


def test_only_what_is_lent_can_be_released() -> None:
    pool = pool_of(100)
    cache = pool.acquire(2, 8)
    for stranger in (cache.row(0), pool_of(100).acquire(2, 8), KVCache(SLOTS, 2, 8)):
        with pytest.raises(UsageError, match="not lent by this pool, or was released before"):
            pool.release(stranger)
    pool.release(cache)
    with pytest.raises(UsageError, match="released before"):
        pool.release(cache)
    assert pool.memory().idle == cache.bytes


def test_limits_and_layout_are_passed_on() -> None:
    rolling = CacheSlot(2, 1, 2, 2, window=5)
    pool = CachePool((*SLOTS, rolling), limit=13, chunk=8)
    cache = pool.acquire(3, 9)
    assert cache.capacity == 13 and cache.limit == 13 and cache.keys[2].shape == (3, 1, 21, 2)
    assert pool.memory().live == 3 * (13 * TOKEN + fixed_bytes([rolling]))
    pool.release(cache)
    with pytest.raises(PromptError, match="14 tokens per row do not fit the model's context of 13"):
        pool.acquire(3, 14)
    for share in (-0.1, 1.1):
        with pytest.raises(UsageError, match="share of the budget from 0 to 1"):
            CachePool(SLOTS, idle_share=share)
