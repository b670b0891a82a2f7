"""KVCache: growth, views, copies, formats, windows, budget."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from ryzen_compile.errors import MemoryLimitError, PromptError, UnsupportedError, UsageError
from ryzen_compile.runtime import pages
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.layout import fixed_bytes, token_bytes
from ryzen_compile.runtime.storage import HOST
from ryzen_compile.spec import CacheSlot

SLOTS = (CacheSlot(0, 2, 4, 4), CacheSlot(1, 1, 8, 3))
BYTES_PER_TOKEN = 4 * (2 * (4 + 4) + 1 * (8 + 3))


def filled(batch: int, capacity: int, lengths: list[int]) -> KVCache:
    """A cache whose held positions carry distinct numbers."""
    cache = KVCache(SLOTS, batch, capacity, limit=64, chunk=8)
    for buffer in (*cache.keys, *cache.values):
        buffer[:] = np.arange(1, buffer.size + 1, dtype=np.float32).reshape(buffer.shape)
    cache.lengths[:] = lengths
    return cache


def test_buffers_have_the_shapes_dtype_and_layout_that_backends_bind() -> None:
    cache = KVCache(SLOTS, 3, 5)
    assert [key.shape for key in cache.keys] == [(3, 2, 5, 4), (3, 1, 5, 8)]
    assert [value.shape for value in cache.values] == [(3, 2, 5, 4), (3, 1, 5, 3)]
    assert all(buffer.dtype == np.float32 and buffer.flags.c_contiguous for buffer in (*cache.keys, *cache.values))
    assert not any(buffer.any() for buffer in (*cache.keys, *cache.values))
    assert cache.lengths.dtype == np.int64 and cache.lengths.tolist() == [0, 0, 0]


def test_bytes_are_counted_per_layer() -> None:
    cache = KVCache(SLOTS, 3, 5)
    assert token_bytes(SLOTS) == BYTES_PER_TOKEN
    assert cache.bytes_by_layer() == [3 * 5 * 4 * 16, 3 * 5 * 4 * 11]
    assert cache.bytes == 3 * 5 * BYTES_PER_TOKEN


@pytest.mark.parametrize(
    ("tokens", "capacity"), [(0, 4), (4, 4), (5, 8), (8, 8), (9, 16), (17, 24), (61, 64), (64, 64)]
)
def test_reserve_grows_in_chunks_and_never_shrinks(tokens: int, capacity: int) -> None:
    cache = KVCache(SLOTS, 1, 4, limit=64, chunk=8)
    cache.reserve(tokens)
    assert cache.capacity == capacity and cache.keys[0].shape[2] == capacity


def test_growth_keeps_what_rows_hold_and_zeroes_the_rest() -> None:
    cache = filled(2, 5, [3, 1])
    before = [buffer.copy() for buffer in (*cache.keys, *cache.values)]
    cache.reserve(6)
    for old, new in zip(before, (*cache.keys, *cache.values), strict=True):
        np.testing.assert_array_equal(new[:, :, :3], old[:, :, :3])
        assert not new[:, :, 3:].any() and new.flags.c_contiguous
    assert cache.lengths.tolist() == [3, 1]


def test_growth_is_capped_at_a_limit_that_is_no_multiple_of_the_chunk() -> None:
    cache = KVCache(SLOTS, 1, 0, limit=13, chunk=8)
    cache.reserve(9)
    assert cache.capacity == 13
    with pytest.raises(PromptError, match="14 tokens per row do not fit the model's context of 13"):
        cache.reserve(14)


def test_budget_refuses_before_allocating_and_trims_the_last_chunk() -> None:
    cache = KVCache(SLOTS, 2, 0, chunk=8, budget_bytes=2 * 11 * BYTES_PER_TOKEN)
    cache.reserve(9)
    assert cache.capacity == 11
    kept = cache.keys[0]
    needed = 2 * 12 * BYTES_PER_TOKEN
    with pytest.raises(MemoryLimitError, match=f"2 rows x 12 tokens needs {needed} bytes, the budget is"):
        cache.reserve(12)
    assert cache.keys[0] is kept and cache.capacity == 11
    with pytest.raises(MemoryLimitError, match="3 rows x 11 tokens"):
        cache.select([0, 1, 1])
    with pytest.raises(MemoryLimitError, match="100000 rows"):
        KVCache(SLOTS, 100_000, 100_000_000)


def test_without_a_budget_the_machine_is_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HOST, "memory_bytes", lambda: 10 * BYTES_PER_TOKEN)
    with pytest.raises(MemoryLimitError):
        KVCache(SLOTS, 1, 11)
    monkeypatch.setattr(HOST, "memory_bytes", lambda: None)
    assert KVCache(SLOTS, 1, 11).capacity == 11


def test_a_row_view_writes_and_counts_into_its_parent() -> None:
    cache = KVCache(SLOTS, 3, 4)
    view = cache.row(1)
    view.keys[1][0, 0, 2] = 7
    view.advance(3)
    assert view.batch == 1 and view.capacity == 4 and view.keys[0].flags.c_contiguous
    assert cache.lengths.tolist() == [0, 3, 0]
    assert cache.keys[1][1, 0, 2].tolist() == [7.0] * 8 and not cache.keys[1][[0, 2]].any()
    view.truncate(1)
    assert cache.lengths.tolist() == [0, 1, 0]
    view.reserve(4)
    with pytest.raises(UsageError, match="row view cannot grow from 4 to 5"):
        view.reserve(5)
    with pytest.raises(UsageError, match="no row 3 in a cache of 3 rows"):
        cache.row(3)


def test_advance_beyond_capacity_is_refused() -> None:
    cache = KVCache(SLOTS, 2, 4)
    cache.advance(4)
    for tokens in (1, -1):
        with pytest.raises(UsageError, match="capacity 4 that holds 4 tokens"):
            cache.advance(tokens)
    assert cache.lengths.tolist() == [4, 4]


def test_truncate_takes_one_count_or_one_per_row() -> None:
    cache = filled(3, 8, [2, 5, 8])
    cache.truncate(6)
    assert cache.lengths.tolist() == [2, 5, 6]
    cache.truncate(np.array([9, 0, 3]))
    assert cache.lengths.tolist() == [2, 0, 3]
    for bad in (-1, 1.5, np.array([1, 2]), np.array([1, -1, 2])):
        with pytest.raises(UsageError, match="truncate needs a count >= 0"):
            cache.truncate(bad)


def test_select_reorders_drops_and_repeats_copies() -> None:
    cache = filled(3, 8, [2, 5, 8])
    picked = cache.select([2, 0, 0, 2])
    assert picked.lengths.tolist() == [8, 2, 2, 8] and picked.capacity == 8
    for old, new in zip((*cache.keys, *cache.values), (*picked.keys, *picked.values), strict=True):
        np.testing.assert_array_equal(new, old[[2, 0, 0, 2]])
        assert new.flags.c_contiguous
    picked.keys[0][:] = -1
    picked.advance(0)
    picked.truncate(0)
    assert cache.lengths.tolist() == [2, 5, 8] and not (cache.keys[0] == -1).any()
    for bad in ([], [3], [-1], [[0]]):
        with pytest.raises(UsageError, match="rows must be one or more numbers from 0 to 2"):
            cache.select(bad)


def test_fork_copies_one_row_and_the_copies_can_grow_apart() -> None:
    cache = filled(1, 8, [5])
    forked = cache.fork(3)
    assert forked.lengths.tolist() == [5, 5, 5]
    np.testing.assert_array_equal(forked.keys[1][2][:, :5], cache.keys[1][0][:, :5])
    assert not forked.keys[1][:, :, 5:].any(), "what lies behind the lengths is not copied"
    forked.reserve(9)
    assert (forked.capacity, cache.capacity) == (16, 8)
    with pytest.raises(UsageError, match="fork copies a cache of one row, this one has 3"):
        forked.fork(2)


def test_bad_layouts_are_refused() -> None:
    for batch, capacity, chunk in ((0, 1, 1), (1, -1, 1), (1, 1, 0)):
        with pytest.raises(UsageError, match="batch >= 1, capacity >= 0 and chunk >= 1"):
            KVCache(SLOTS, batch, capacity, chunk=chunk)
    with pytest.raises(UnsupportedError, match="layer 3: 'int3' is no cache format"):
        KVCache([CacheSlot(3, 1, 1, 1, "int3")], 1, 1)
    with pytest.raises(UnsupportedError, match="layer 4: cache format int4-g32 does not divide a head of 48 channels"):
        KVCache([CacheSlot(4, 1, 32, 48, "fp32", "int4-g32")], 1, 1)


# Integer rows


def test_buffers_are_as_wide_as_their_formats_say() -> None:
    slots = [CacheSlot(0, 3, 64, 32, "int8", "int4"), CacheSlot(1, 1, 64, 64, "int8-g32", "int4-g64")]
    cache = KVCache(slots, 2, 5)
    assert [(key.shape, key.dtype) for key in cache.keys] == [((2, 3, 5, 64), np.int8), ((2, 1, 5, 68), np.uint8)]
    assert [(value.shape, value.dtype) for value in cache.values] == [
        ((2, 3, 5, 16), np.uint8),
        ((2, 1, 5, 34), np.uint8),
    ]
    assert cache.bytes == 2 * 5 * token_bytes(slots) == 2 * 5 * (3 * (64 + 16) + 68 + 34)


def test_growing_and_copying_move_integer_rows_as_they_are() -> None:
    cache = KVCache([CacheSlot(0, 2, 32, 32, "int4-g32", "int8")], 2, 3, chunk=4)
    rng = np.random.default_rng(0)
    for buffer in (cache.keys[0], cache.values[0]):
        buffer[:] = rng.integers(-128, 128, buffer.shape).astype(buffer.dtype)
    cache.lengths[:] = 3
    key, value = cache.keys[0].copy(), cache.values[0].copy()
    cache.reserve(4)
    picked = cache.select([1, 1])
    for old, new in ((key, picked.keys[0]), (value, picked.values[0])):
        np.testing.assert_array_equal(new[:, :, :3], old[[1, 1]])
        assert new.dtype == old.dtype and new.shape[2] == 4


# Slots with a window

ROLLING = CacheSlot(1, 1, 2, 2, window=5)  # 5 + 16 rows


def test_a_rolling_slot_keeps_its_rows_whatever_the_capacity() -> None:
    cache = KVCache([SLOTS[0], ROLLING], 3, 0, chunk=8)
    assert cache.keys[1].shape == (3, 1, 21, 2) and cache.bytes == 3 * fixed_bytes([ROLLING])
    cache.keys[1][:] = 7
    rolling = cache.keys[1]
    cache.reserve(40)
    assert cache.keys[1] is rolling and cache.keys[0].shape[2] == 40
    assert token_bytes(cache.slots) == 4 * 2 * 8 and fixed_bytes(cache.slots) == 21 * 4 * 4
    assert cache.bytes == 3 * (40 * token_bytes(cache.slots) + fixed_bytes(cache.slots))


def test_rolling_rows_are_copied_whole_once_they_are_full() -> None:
    cache = KVCache([SLOTS[0], ROLLING], 3, 64)
    cache.keys[1][:] = np.arange(1, cache.keys[1].size + 1).reshape(cache.keys[1].shape)
    # 22 tokens leave fewer rows than 21 do, so the longest row does not say how much is held.
    cache.advance(1)
    cache.lengths[:] = [22, 21, 3]
    np.testing.assert_array_equal(cache.select([0, 1]).keys[1], cache.keys[1][:2])
    short = cache.select([2, 2]).keys[1]
    np.testing.assert_array_equal(short[:, :, :3], cache.keys[1][[2, 2], :, :3])
    assert not short[:, :, 3:].any()


def test_truncate_refuses_to_bring_back_evicted_tokens_and_changes_nothing() -> None:
    cache = KVCache([SLOTS[0], ROLLING], 2, 64)
    cache.lengths[:] = [21, 24]
    with pytest.raises(
        UnsupportedError, match=r"layer 1 looks back 5 tokens .* of the 24 in row 1 the last 2 can be taken back, not 4"
    ):
        cache.truncate(20)
    assert cache.lengths.tolist() == [21, 24], "row 0 could have been cut, but nothing was"
    cache.truncate(np.array([2, 22]))
    assert cache.lengths.tolist() == [2, 22]
    cache.truncate(30)
    cache.truncate(0)
    assert cache.lengths.tolist() == [0, 0]


def test_the_budget_counts_rolling_rows_per_row_of_the_batch() -> None:
    slots, token = [SLOTS[0], ROLLING], 4 * 2 * 8
    budget = 2 * (fixed_bytes(slots) + 10 * token)
    cache = KVCache(slots, 2, 0, chunk=8, budget_bytes=budget)
    cache.reserve(9)
    assert cache.capacity == 10 and cache.bytes == budget
    with pytest.raises(MemoryLimitError, match=f"the budget is {budget}; a token of a row takes {token} bytes"):
        cache.reserve(11)
    with pytest.raises(MemoryLimitError, match="3 rows x 0 tokens"):
        KVCache([ROLLING], 3, 0, budget_bytes=3 * fixed_bytes([ROLLING]) - 1)


# Copies that share pages

PAGED = (CacheSlot(0, 4, 16, 16), CacheSlot(1, 2, 32, 32, "int8-g32", "int8-g32"))


def paged(batch: int, capacity: int, length: int, **options: Any) -> KVCache:
    cache = KVCache(PAGED, batch, capacity, **options)
    rng = np.random.default_rng(0)
    for buffer in (*cache.keys, *cache.values):
        buffer[:, :, :length] = rng.integers(0, 100, (*buffer.shape[:2], length, buffer.shape[3]))
    cache.lengths[:] = length
    return cache


def test_forks_with_room_are_independent_whether_or_not_pages_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = paged(1, 1024, 1000)
    mapped = cache.fork(4, room=25)
    monkeypatch.setattr(pages, "_mapped", lambda *arguments: None)
    plain = cache.fork(4, room=25)
    assert mapped.capacity == plain.capacity == 1280 and mapped.lengths.tolist() == [1000] * 4
    before = [buffer.copy() for buffer in (*cache.keys, *cache.values)]
    for forked in (mapped, plain):
        forked.keys[0][1, :, 990:1010] = -1
        forked.advance(25)
    for left, right in zip((*mapped.keys, *mapped.values), (*plain.keys, *plain.values), strict=True):
        np.testing.assert_array_equal(left, right)
    for old, now in zip(before, (*cache.keys, *cache.values), strict=True):
        np.testing.assert_array_equal(old, now)
    assert not (mapped.keys[0][[0, 2, 3]] == -1).any() and cache.lengths.tolist() == [1000]


@pytest.mark.skipif(sys.platform != "linux", reason="pages are shared on Linux only")
def test_shared_rows_are_counted_until_growth_copies_them() -> None:
    cache = paged(3, 1024, 1000)
    picked = cache.select([2, 0, 2, 2])
    assert picked.memory_breakdown().shared_rows == 3
    assert [picked.row(row).memory_breakdown().shared_rows for row in range(4)] == [1, 0, 1, 1]
    assert cache.memory_breakdown().shared_rows == cache.select([0, 1]).memory_breakdown().shared_rows == 0
    picked.reserve(1025)
    assert picked.memory_breakdown().shared_rows == 0
    np.testing.assert_array_equal(picked.keys[1][:, :, :1000], cache.keys[1][[2, 0, 2, 2], :, :1000])


def test_capacity_is_rounded_to_whole_pages_only_where_it_is_cheap_and_allowed() -> None:
    # 16 positions of the fp32 slot fill a page, 32 of the other: 36 bytes in 2 heads are 72, of which 512 do.
    assert paged(1, 1000, 900).fork(2).capacity == 1024
    assert paged(1, 1000, 900).select([0]).capacity == 1000, "nothing is repeated"
    assert paged(1, 700, 600).fork(2).capacity == 700, "324 more would be half as much again"
    assert paged(1, 1000, 900, limit=1010).fork(2).capacity <= 1010
    two = 2 * 1001 * token_bytes(PAGED)
    assert paged(1, 1000, 900, budget_bytes=two).fork(2).capacity <= 1001


def test_room_is_checked_like_any_capacity() -> None:
    cache = paged(1, 100, 90, limit=128, budget_bytes=300 * token_bytes(PAGED))
    assert cache.fork(2, room=10).capacity == 100
    assert cache.fork(2, room=11).capacity == 128
    with pytest.raises(PromptError, match="129 tokens per row do not fit"):
        cache.fork(2, room=39)
    with pytest.raises(MemoryLimitError, match="3 rows x 101 tokens"):
        cache.fork(3, room=11)
    with pytest.raises(UsageError, match="room is a number of tokens >= 0, got -1"):
        cache.fork(2, room=-1)


# Shared budgets


class Ledger:
    """An account that writes down what is asked."""

    def __init__(self, available: int | None) -> None:
        self.available = available
        self.asked: list[int] = []

    def ask(self, cache: KVCache, needed: int) -> None:
        self.asked.append(needed)
        if self.available is not None:
            self.available -= needed


def test_every_allocation_is_asked_for_first_and_in_full() -> None:
    ledger = Ledger(None)
    cache = KVCache(SLOTS, 2, 4, chunk=8, account=ledger)
    cache.reserve(4)
    cache.row(0).truncate(0)
    cache.reserve(5)
    copies = cache.select([0, 1, 1])
    copies.reserve(9)
    token = BYTES_PER_TOKEN
    assert ledger.asked == [2 * 4 * token, 2 * 4 * token, 3 * 8 * token, 3 * 8 * token]


def test_a_shared_budget_trims_and_refuses_what_others_leave_too_little_for() -> None:
    ledger = Ledger(2 * 11 * BYTES_PER_TOKEN)
    cache = KVCache(SLOTS, 2, 1, chunk=8, account=ledger)
    cache.reserve(9)
    assert cache.capacity == 11 and ledger.available == 0
    ledger.available = BYTES_PER_TOKEN
    for refused in (lambda: cache.reserve(12), lambda: cache.require(12), lambda: cache.select([0])):
        asked = len(ledger.asked)
        with pytest.raises(MemoryLimitError, match="what other caches leave of it"):
            refused()
        assert len(ledger.asked) == asked and cache.capacity == 11
    cache.require(11)
    cache.require(1, batch=1)


def test_the_head_is_the_first_rows_over_the_same_storage() -> None:
    cache = filled(3, 8, [2, 5, 3])
    head = cache.head(2)
    assert head.batch == 2 and head.lengths.tolist() == [2, 5]
    assert all(np.shares_memory(mine, whole) for mine, whole in zip(head.keys, cache.keys, strict=True))
    assert all(key.flags.c_contiguous for key in head.keys)
    head.advance(1)
    assert cache.lengths.tolist() == [3, 6, 3]
    with pytest.raises(UsageError, match="cannot grow"):
        head.reserve(9)
    for rows in (0, 4):
        with pytest.raises(UsageError, match=f"a cache of 3 rows has no first {rows}"):
            cache.head(rows)
