"""KVCache: growth, views, copies, budget."""

from __future__ import annotations

import numpy as np
import pytest

from ryzen_compile.errors import MemoryLimitError, PromptError, UnsupportedError, UsageError
from ryzen_compile.runtime import cache as cache_module
from ryzen_compile.runtime.cache import KVCache, token_bytes
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
    monkeypatch.setattr(cache_module, "physical_memory_bytes", lambda: 10 * BYTES_PER_TOKEN)
    with pytest.raises(MemoryLimitError):
        KVCache(SLOTS, 1, 11)
    monkeypatch.setattr(cache_module, "physical_memory_bytes", lambda: None)
    assert KVCache(SLOTS, 1, 11).capacity == 11


def test_physical_memory_is_unknown_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (cache_module.physical_memory_bytes() or 0) > 0
    monkeypatch.delattr(cache_module.os, "sysconf")
    assert cache_module.physical_memory_bytes() is None


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
    np.testing.assert_array_equal(forked.keys[1][2], cache.keys[1][0])
    forked.reserve(9)
    assert (forked.capacity, cache.capacity) == (16, 8)
    with pytest.raises(UsageError, match="fork copies a cache of one row, this one has 3"):
        forked.fork(2)


def test_bad_layouts_are_refused() -> None:
    for batch, capacity, chunk in ((0, 1, 1), (1, -1, 1), (1, 1, 0)):
        with pytest.raises(UsageError, match="batch >= 1, capacity >= 0 and chunk >= 1"):
            KVCache(SLOTS, batch, capacity, chunk=chunk)
    with pytest.raises(UnsupportedError, match="layer 3 has dtype 'int3'"):
        KVCache([CacheSlot(3, 1, 1, 1, "int3")], 1, 1)
