"""PrefixStore: what is found again, what is evicted first, what is refused."""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections.abc import Sequence

import numpy as np
import pytest

from ryzen_compile.errors import UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.prefix import PrefixStats, PrefixStore
from ryzen_compile.spec import CacheSlot

# Every kind of row: floats, fixed scales, scales that the row carries; odd heads and widths that differ.
SLOTS = (CacheSlot(0, 3, 5, 3), CacheSlot(1, 1, 8, 6, "int8", "int4"), CacheSlot(4, 2, 16, 8, "int4-g8", "int8-g4"))
TOKEN_BYTES = 3 * (5 + 3) * 4 + (8 + 3) + 2 * (8 + 2 * 2 + 8 + 2 * 2)
BLOCK = 3
BLOCK_BYTES = BLOCK * TOKEN_BYTES
ROLLING = (CacheSlot(0, 1, 2, 2), CacheSlot(7, 1, 2, 2, window=4))
BIG = 1 << 30


def computed(tokens: Sequence[int], slots: tuple[CacheSlot, ...] = SLOTS) -> KVCache:
    """A row as a model leaves it: what stands at a position depends on all tokens up to it."""
    row = KVCache(slots, 1, len(tokens) + 2)
    for position in range(len(tokens)):
        digest = hashlib.sha256(np.asarray(tokens[: position + 1], np.int64)).digest()
        random = np.random.default_rng(list(digest))
        for buffer in (*row.keys, *row.values):
            heads = buffer[0].view(np.uint8)
            heads[:, position] = random.integers(0, 256, (heads.shape[0], heads.shape[2]))
    row.lengths[0] = len(tokens)
    return row


def assert_rows_equal(row: KVCache, other: KVCache, tokens: int) -> None:
    """Bit for bit: random bytes contain NaNs."""
    for one, two in zip((*row.keys, *row.values), (*other.keys, *other.values), strict=True):
        np.testing.assert_array_equal(one[:, :, :tokens].view(np.uint8), two[:, :, :tokens].view(np.uint8))


def filled(store: PrefixStore, tokens: Sequence[int]) -> int:
    """Fills an empty row, checks every byte against the computed one, and returns how many tokens came back."""
    row = KVCache(store.slots, 1, 0)
    before = store.match(tokens)
    count = store.fill(row, tokens)
    assert count == before == int(row.lengths[0]) and row.capacity >= count
    if count:
        assert_rows_equal(row, computed(tokens[:count], store.slots), count)
    return count


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (7, 2), (9, 3)])
def test_whole_blocks_are_kept_and_come_back_bit_for_bit(tokens: int, blocks: int) -> None:
    store = PrefixStore(SLOTS, block=BLOCK, budget_bytes=BIG)
    prompt = list(range(10, 10 + tokens))
    assert store.insert(computed(prompt), prompt) == blocks
    assert store.bytes == blocks * BLOCK_BYTES == store.stats.bytes and store.stats.blocks == blocks
    assert filled(store, [*prompt, 1]) == blocks * BLOCK
    assert filled(store, [*prompt, 1, 2, 3, 4, 5]) == blocks * BLOCK


@pytest.mark.parametrize(("asked", "supplied"), [(0, 0), (1, 0), (3, 0), (4, 3), (6, 3), (7, 6), (8, 6), (9, 6)])
def test_one_token_is_always_left_to_step(asked: int, supplied: int) -> None:
    prompt = list(range(9))
    store = PrefixStore(SLOTS, block=BLOCK, budget_bytes=BIG)
    store.insert(computed(prompt), prompt)
    assert filled(store, prompt[:asked]) == supplied


def test_prompts_share_their_beginning_and_part_where_they_differ() -> None:
    store = PrefixStore(SLOTS, block=BLOCK, budget_bytes=BIG)
    one, two = [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 0, 7, 8, 9]
    assert store.insert(computed(one), one) == 3
    assert store.insert(computed(two), two) == 2
    assert store.insert(computed(two), two) == 0
    assert store.stats.blocks == 5
    assert filled(store, [*one, 0]) == filled(store, [*two, 0]) == 9
    # The same block of tokens behind another beginning is another block.
    assert filled(store, [9, 9, 9, 7, 8, 9, 0]) == 0
    assert filled(store, [1, 2, 3, 7, 8, 9, 0]) == 3


def test_a_row_view_of_a_batch_is_filled_in_place_and_others_are_left_alone() -> None:
    store = PrefixStore(SLOTS, block=BLOCK, budget_bytes=BIG)
    prompt = [5, 6, 7, 8, 9, 10, 11]
    store.insert(computed(prompt), np.array(prompt, np.int32))
    batch = KVCache(SLOTS, 3, 8)
    assert store.fill(batch.row(1), np.array(prompt, np.uint16)) == 6
    assert batch.lengths.tolist() == [0, 6, 0]
    assert_rows_equal(batch.row(1), computed(prompt), 6)
    assert not any(buffer[[0, 2]].any() or buffer[:, :, 6:].any() for buffer in (*batch.keys, *batch.values))


def test_what_is_kept_is_a_copy_of_the_first_tokens_of_the_row() -> None:
    store = PrefixStore(SLOTS, block=BLOCK, budget_bytes=BIG)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    row = computed(prompt)
    assert store.insert(row, prompt[:5]) == 1
    for buffer in (*row.keys, *row.values):
        buffer.view(np.uint8)[:] = 0
    assert filled(store, prompt) == 3


def test_the_least_recently_used_leaf_goes_first_and_a_trunk_never_before_its_leaves() -> None:
    store = PrefixStore(SLOTS, block=BLOCK, budget_bytes=4 * BLOCK_BYTES + BLOCK_BYTES - 1)
    trunk = [1, 2, 3]
    old, new, other = [*trunk, 4, 4, 4], [*trunk, 5, 5, 5], [6] * 6
    for prompt in (old, new):
        store.insert(computed(prompt), prompt)
    assert filled(store, [*old, 0]) == 6  # old is now the more recent one
    assert store.insert(computed(other), other) == 2
    assert store.stats.evicted_blocks == 1 and store.bytes == 4 * BLOCK_BYTES
    assert [store.match([*prompt, 0]) for prompt in (old, new, other)] == [6, 3, 6]
    # Looking is not using: old and its trunk go, leaf first.
    assert store.insert(computed([7, 7, 7]), [7, 7, 7]) == 1
    assert [store.match([*prompt, 0]) for prompt in (old, other)] == [3, 6]


def test_a_prefix_longer_than_the_budget_keeps_its_beginning_and_evicts_the_rest() -> None:
    store = PrefixStore(SLOTS, block=BLOCK, budget_bytes=2 * BLOCK_BYTES)
    store.insert(computed([9, 9, 9]), [9, 9, 9])
    prompt = list(range(11))
    assert store.insert(computed(prompt), prompt) == 2
    assert store.insert(computed(prompt), prompt) == 0
    assert filled(store, prompt) == 6 and store.match([9, 9, 9, 9]) == 0
    assert store.stats.skipped == {"longer than the budget": 2} and store.stats.evicted_blocks == 1
    nothing = PrefixStore(SLOTS, block=BLOCK, budget_bytes=BLOCK_BYTES - 1)
    assert nothing.insert(computed(prompt), prompt) == 0 and nothing.bytes == 0 and filled(nothing, prompt) == 0


@pytest.mark.parametrize(("room", "kept"), [(4, 4), (3, 3), (1, 1), (0, 0), (-2, 0)])
def test_a_budget_that_shrank_holds_from_the_next_insert(room: int, kept: int) -> None:
    store = PrefixStore(SLOTS, block=BLOCK, budget_bytes=BIG)
    one, two = list(range(9)), [9] * 6
    for prompt in (one, two):
        store.insert(computed(prompt), prompt)
    store.budget_bytes = room * BLOCK_BYTES
    assert store.insert(computed(two), two) == 0
    assert store.stats.blocks == kept and store.stats.evicted_blocks == 5 - kept
    assert filled(store, [*two, 0]) == BLOCK * min(kept, 2)


def test_reclaim_frees_whole_blocks_until_enough_and_clear_frees_all() -> None:
    store = PrefixStore(SLOTS, block=BLOCK, budget_bytes=BIG)
    prompt = list(range(15))
    store.insert(computed(prompt), prompt)
    assert store.reclaim(0) == store.reclaim(-5) == 0
    assert store.reclaim(BLOCK_BYTES + 1) == 2 * BLOCK_BYTES
    assert filled(store, [*prompt, 0]) == 9
    assert store.reclaim(BIG) == 3 * BLOCK_BYTES and store.bytes == 0 and store.reclaim(1) == 0
    assert store.stats.evicted_blocks == 5
    store.insert(computed(prompt), prompt)
    store.clear()
    assert store.bytes == 0 and filled(store, prompt) == 0 and store.stats.evicted_blocks == 5


def test_dropped_blocks_are_freed_at_once() -> None:
    store = PrefixStore(SLOTS, block=BLOCK, budget_bytes=BIG)
    prompt = list(range(9))
    store.insert(computed(prompt), prompt)
    kept = [weakref.ref(block.rows) for block in store._blocks.values()]
    gc.disable()
    try:
        store.reclaim(1)
        assert sum(reference() is None for reference in kept) == 1
        store.clear()
        assert all(reference() is None for reference in kept)
    finally:
        gc.enable()


def test_a_row_that_makes_the_store_give_bytes_back_while_growing_gets_what_is_left() -> None:
    store = PrefixStore(SLOTS, block=BLOCK, budget_bytes=BIG)
    prompt = list(range(10))
    store.insert(computed(prompt), prompt)

    class Greedy(KVCache):
        def reserve(self, tokens: int) -> None:
            store.reclaim(2 * BLOCK_BYTES)
            super().reserve(tokens)

    row = Greedy(SLOTS, 1, 0)
    assert store.fill(row, prompt) == 3 and row.lengths.tolist() == [3]
    assert_rows_equal(row, computed(prompt), 3)
    assert store.stats.tokens_reused == 3


def test_rolling_slots_are_kept_until_they_drop_a_row() -> None:
    store = PrefixStore(ROLLING, block=4, budget_bytes=BIG)
    full = ROLLING[1].rows
    assert full == 20
    prompt = list(range(full))
    assert store.insert(computed(prompt, ROLLING), prompt) == 5
    assert filled(store, [*prompt, 1, 2, 3, 4, 5]) == full
    row = KVCache(ROLLING, 1, full + 1)
    row.lengths[0] = full + 1
    assert store.insert(row, [9] * (full + 1)) == store.insert(row, [8] * 4) == 0
    assert store.stats.blocks == 5
    assert store.stats.skipped == {"layer 7 dropped rows beyond its window of 4 tokens": 2}


def test_statistics_count_fills_and_are_snapshots() -> None:
    store = PrefixStore(SLOTS, block=BLOCK, budget_bytes=BIG)
    assert store.stats == PrefixStats() and store.stats.hit_rate == 0.0
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    assert filled(store, prompt) == 0
    store.insert(computed(prompt), prompt)
    before = store.stats
    assert filled(store, prompt) == 6
    store.match(prompt)
    assert before == PrefixStats(lookups=1, tokens_asked=8, blocks=2, bytes=2 * BLOCK_BYTES)
    assert store.stats == PrefixStats(2, 1, 16, 6, 0, 2, 2 * BLOCK_BYTES)
    assert store.stats.hit_rate == 6 / 16


def test_bad_arguments_are_refused_and_change_nothing() -> None:
    for slots, block, budget in (((), 1, 1), (SLOTS, 0, 1), (SLOTS, 1, -1)):
        with pytest.raises(UsageError, match="needs slots, block >= 1 and budget_bytes >= 0"):
            PrefixStore(slots, block=block, budget_bytes=budget)
    store = PrefixStore(SLOTS, block=BLOCK, budget_bytes=BIG)
    row = computed([1, 2, 3, 4])
    with pytest.raises(UsageError, match="5 tokens cannot be kept of a row that holds 4"):
        store.insert(row, [1, 2, 3, 4, 5])
    with pytest.raises(UsageError, match="fills an empty row, this one holds 4 tokens"):
        store.fill(row, [1, 2, 3, 4])
    with pytest.raises(UsageError, match="belongs to one row, this cache has 2"):
        store.fill(KVCache(SLOTS, 2, 4), [1])
    with pytest.raises(UsageError, match="the cache's slots are not those of the prefix"):
        store.insert(KVCache(SLOTS[:2], 1, 4), [])
    for bad in ([1.5, 2.0], [[1, 2]], [True, False], ["a"]):
        with pytest.raises(UsageError, match="tokens must be one row of integers"):
            store.match(bad)
    store.insert(row, [1, 2, 3, 4])
    with pytest.raises(UsageError, match="row view cannot grow"):
        store.fill(KVCache(SLOTS, 2, 2).row(0), [1, 2, 3, 4])
    assert store.stats == PrefixStats(blocks=1, bytes=BLOCK_BYTES)


class _Naive:
    """The same store by its definition: every known prefix with the time of its last use."""

    def __init__(self, room: int) -> None:
        self.room, self.now, self.used = room, 0, dict[tuple[int, ...], int]()

    def known(self, tokens: list[int], most: int) -> list[tuple[int, ...]]:
        prefixes = [tuple(tokens[: BLOCK * n]) for n in range(1, most + 1)]
        return [prefix for prefix in prefixes if prefix in self.used]

    def use(self, prefixes: list[tuple[int, ...]]) -> None:
        self.now += 1
        self.used.update(dict.fromkeys(prefixes, self.now))

    def insert(self, tokens: list[int]) -> None:
        wanted = [tuple(tokens[: BLOCK * n]) for n in range(1, min(len(tokens) // BLOCK, self.room) + 1)]
        self.use(wanted)
        while len(self.used) > self.room:
            leaves = [p for p in self.used if not any(q[: len(p)] == p and q != p for q in self.used)]
            del self.used[min(leaves, key=self.used.__getitem__)]


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_calls_agrees_with_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    room = int(random.integers(1, 9))
    store, naive = PrefixStore(SLOTS, block=BLOCK, budget_bytes=room * BLOCK_BYTES), _Naive(room)
    for _ in range(120):
        tokens = random.integers(0, 2, random.integers(0, 14)).tolist()
        if random.random() < 0.5:
            store.insert(computed(tokens), tokens)
            naive.insert(tokens)
        else:
            known = naive.known(tokens, max(len(tokens) - 1, 0) // BLOCK)
            naive.use(known)
            assert filled(store, tokens) == len(known) * BLOCK
        assert store.stats.blocks == len(naive.used) and store.bytes <= store.budget_bytes
