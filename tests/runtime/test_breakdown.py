"""The table of what a cache takes."""

from __future__ import annotations

from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.spec import CacheSlot

SLOTS = (CacheSlot(0, 2, 64, 32, "int8-g32", "fp32"), CacheSlot(11, 1, 4, 4, window=8))


def test_figures_are_those_of_the_buffers_and_of_the_longest_row() -> None:
    cache = KVCache(SLOTS, 3, 50)
    cache.lengths[:] = [1, 40, 7]
    breakdown = cache.memory_breakdown()
    assert [(b.layer, b.kind, b.format, b.window) for b in breakdown.buffers] == [
        (0, "keys", "int8-g32", 0),
        (0, "values", "fp32", 0),
        (11, "keys", "fp32", 8),
        (11, "values", "fp32", 8),
    ]
    # Of 40 tokens the rolling slot, 8 + 16 rows, has evicted 17.
    assert [b.used for b in breakdown.buffers] == [40 * 2 * 68, 40 * 2 * 128, 23 * 16, 23 * 16]
    assert [b.allocated for b in breakdown.buffers] == [3 * 50 * 136, 3 * 50 * 256, 3 * 24 * 16, 3 * 24 * 16]
    assert breakdown.allocated == cache.bytes and breakdown.bytes_per_token == 136 + 256
    assert (breakdown.rows, breakdown.capacity, breakdown.longest, breakdown.shared_rows) == (3, 50, 40, 0)


def test_the_text_is_an_aligned_table_that_names_the_cost_of_a_token() -> None:
    cache = KVCache(SLOTS, 1, 10)
    cache.advance(3)
    assert cache.memory_breakdown().to_text().splitlines() == [
        "layer  kind    format    window  allocated  used",
        "    0  keys    int8-g32       -       1360   408",
        "    0  values  fp32           -       2560   768",
        "   11  keys    fp32           8        384    48",
        "   11  values  fp32           8        384    48",
        "total                                 4688  1272",
        "1 rows x 10 tokens, the longest has seen 3",
        "392 bytes per token",
    ]


def test_an_empty_cache_and_one_without_slots_have_figures_too() -> None:
    assert KVCache(SLOTS[:1], 2, 0).memory_breakdown().used == 0
    assert KVCache((), 1, 4).memory_breakdown().to_text().endswith("\n0 bytes per token")
