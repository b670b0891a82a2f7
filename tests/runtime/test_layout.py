"""What a slot's rows take, and which of a window's tokens can be taken back."""

from __future__ import annotations

import pytest

from ryzen_compile.runtime.layout import cache_bytes, droppable, fixed_bytes, position_bytes, token_bytes
from ryzen_compile.spec import CacheSlot


def test_bytes_of_every_kind_of_slot() -> None:
    kept = CacheSlot(0, 3, 64, 32, "int8-g32", "int4")
    rolling = CacheSlot(1, 2, 8, 7, window=200)  # 200 + 25 rows
    assert position_bytes(kept) == (3 * (64 + 2 * 2), 3 * 16)
    assert position_bytes(rolling) == (2 * 8 * 4, 2 * 7 * 4)
    assert token_bytes([kept, rolling]) == 3 * (68 + 16) and token_bytes([rolling]) == token_bytes([]) == 0
    assert fixed_bytes([kept, rolling]) == 225 * 2 * 15 * 4 and fixed_bytes([kept]) == 0
    assert cache_bytes([kept, rolling], 3, 5) == 3 * (5 * 252 + 27000)


def rows_after(tokens: int, slot: CacheSlot) -> list[int]:
    """The positions in a rolling buffer, oldest first, stepping one by one and evicting when it is full."""
    held: list[int] = []
    for position in range(tokens):
        if len(held) == slot.rows:
            held = held[slot.rows - slot.window + 1 :]
        held.append(position)
    return held


@pytest.mark.parametrize("window", [1, 2, 7, 17, 31])
def test_droppable_is_exactly_what_leaves_the_rows_of_the_shorter_sequence(window: int) -> None:
    slot = CacheSlot(0, 1, 1, 1, window=window)
    for tokens in range(4 * slot.rows):
        held = rows_after(tokens, slot)
        assert len(held) == slot.resident(tokens)
        possible = [k for k in range(len(held)) if held[: len(held) - k] == rows_after(tokens - k, slot)]
        # An empty row is no question of what its slot dropped, so it is left out here, and added where all fit.
        everything = tokens <= slot.rows
        assert droppable(slot, tokens) == (tokens if everything else max(possible)), tokens
        assert possible == list(range(len(possible))), "fewer are always possible too"


def test_a_slot_that_keeps_every_token_can_drop_them_all() -> None:
    assert [droppable(CacheSlot(0, 1, 1, 1), tokens) for tokens in (0, 1, 10**6)] == [0, 1, 10**6]
