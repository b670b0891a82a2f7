"""How a slot's rows lie in its buffers, what they take, whether that fits, and which of them can be forgotten."""

from __future__ import annotations

from collections.abc import Sequence

from ryzen_compile.errors import ConfigError, MemoryLimitError, PromptError, UnsupportedError
from ryzen_compile.numerics.rows import RowFormat
from ryzen_compile.spec import CacheSlot


def row_layout(slot: CacheSlot) -> tuple[tuple[RowFormat, int], tuple[RowFormat, int]]:
    """Format and stored elements of the slot's key rows, then of its value rows; raises ``UnsupportedError``."""
    try:
        keys, values = RowFormat.parse(slot.key_format), RowFormat.parse(slot.value_format)
        return (keys, keys.width(slot.head_dim)), (values, values.width(slot.value_dim))
    except ConfigError as error:
        raise UnsupportedError(f"cache slot of layer {slot.layer}: {error.message}", hint=error.hint) from error


def position_bytes(slot: CacheSlot) -> tuple[int, int]:
    """Bytes of one token's keys and of its values, in all heads of the slot."""
    keys, values = (slot.kv_heads * width * form.dtype.itemsize for form, width in row_layout(slot))
    return keys, values


def token_bytes(slots: Sequence[CacheSlot]) -> int:
    """Bytes that one more token of one row takes, in the slots that keep every token."""
    return sum(sum(position_bytes(slot)) for slot in slots if not slot.rows)


def fixed_bytes(slots: Sequence[CacheSlot]) -> int:
    """Bytes that one row of the batch takes however short it is, in the slots whose engine evicts by itself."""
    return sum(sum(position_bytes(slot)) * slot.rows for slot in slots)


def cache_bytes(slots: Sequence[CacheSlot], batch: int, capacity: int) -> int:
    """Bytes of a cache of ``batch`` rows x ``capacity`` tokens."""
    return batch * (capacity * token_bytes(slots) + fixed_bytes(slots))


def check_fits(
    slots: Sequence[CacheSlot], batch: int, tokens: int, *, limit: int | None, budget: int | None, shared: bool
) -> None:
    """Refuse ``batch`` rows x ``tokens`` tokens beyond the context ``limit`` or ``budget`` bytes (None: no bound).

    Raises ``PromptError`` for the one and ``MemoryLimitError`` for the other; a ``shared`` budget is what others leave.
    """
    if limit is not None and tokens > limit:
        raise PromptError(f"{tokens} tokens per row do not fit the model's context of {limit} tokens")
    needed = cache_bytes(slots, batch, tokens)
    if budget is not None and needed > budget:
        whose = " (what other caches leave of it)" if shared else ""
        raise MemoryLimitError(
            f"a cache of {batch} rows x {tokens} tokens needs {needed} bytes, the budget is {budget}{whose}; "
            f"a token of a row takes {token_bytes(slots)} bytes",
            hint="use fewer rows, a shorter prompt or fewer new tokens",
        )


def droppable(slot: CacheSlot, tokens: int) -> int:
    """How many of the last of ``tokens`` tokens ``slot`` can forget so that its rows are those of the shorter sequence.

    All of them while nothing was evicted; later, those that came after the token that evicted last.
    """
    if not slot.rows or tokens <= slot.rows:
        return tokens
    return (tokens - slot.rows - 1) % (slot.rows - slot.window + 1)


def reversible(slots: Sequence[CacheSlot], seen: int, tokens: int) -> int:
    """How many of ``tokens`` new tokens can come behind ``seen`` others before a slot that evicts by itself drops a
    row, which no truncation would bring back."""
    for slot in slots:
        if slot.rows:
            tokens = min(tokens, slot.rows - slot.resident(seen))
    return tokens
