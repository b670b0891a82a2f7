"""Endless sequences in a cache of constant size: the first tokens stay, and of the rest the most recent.

StreamingLLM (Xiao et al., 2023): attention puts the weight it has no use for on the first tokens, so a model that loses
those falls apart, while one that keeps a few goes on for ever. Positions are those within the cache: what is kept after
a drop closes the gap, and its keys are turned back by as much, so that a model never sees a position beyond its
context. Any layer can do that whose keys can be moved; a model that adds positions to its embeddings cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.numerics.row_shift import RowShift
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.spec import CacheSlot

LEAST_SLACK = 16


@dataclass(frozen=True)
class Stream:
    """Keeps a sequence's first ``sinks`` tokens and at least its ``window`` most recent ones.

    ``shifts`` says how each slot's keys are moved. At most ``slack`` rows are dropped at a time: a quarter of the
    window, so that where tokens come singly a key is moved, and an integer one rounded anew, four times before it goes.
    """

    window: int
    sinks: int
    shifts: tuple[RowShift, ...]

    @property
    def slack(self) -> int:
        """Rows beyond sinks and window: the most new tokens that one step may bring."""
        return max(LEAST_SLACK, self.window // 4)

    @property
    def capacity(self) -> int:
        """Rows that are used, for ever, however many more the cache has: what is kept may not depend on that."""
        return self.sinks + self.window + self.slack

    def check(self, slots: Sequence[CacheSlot], context: int) -> None:
        """Refuses what cannot be streamed: ``UsageError`` beyond the context, ``UnsupportedError`` for slots that drop
        rows by themselves."""
        if self.window < 1 or self.sinks < 0:
            raise UsageError(f"a stream needs window >= 1 and sinks >= 0, got {self.window} and {self.sinks}")
        if self.capacity > context:
            room = context - self.sinks
            raise UsageError(
                f"window {self.window} with {self.sinks} sinks takes a cache of {self.capacity} tokens, the model's "
                f"context is {context}",
                hint=f"ask for a window of at most {max(0, min(room - LEAST_SLACK, (4 * room + 3) // 5))}",
            )
        if any(slot.window for slot in slots):
            raise UnsupportedError(
                "layers of this model keep a window of their own and drop older rows by themselves",
                hint="export it with a window of that kind (--window)",
            )

    def make_room(self, cache: KVCache, tokens: int) -> None:
        """Cuts rows of ``cache`` down to sinks and window where ``tokens`` more, at most ``slack``, do not fit."""
        if tokens > self.slack:
            raise UsageError(f"{tokens} tokens in one step of a stream, it takes {self.slack}")
        for row in np.flatnonzero(cache.lengths + tokens > self.capacity):
            self._drop(cache, int(row), int(cache.lengths[row]) - self.sinks - self.window)

    def _drop(self, cache: KVCache, row: int, count: int) -> None:
        """Forgets ``count`` tokens behind the sinks of one row; what follows them moves forward."""
        held = int(cache.lengths[row])
        first, one = self.sinks, slice(row, row + 1)
        for keys, values, shift in zip(cache.keys, cache.values, self.shifts, strict=True):
            left, right = (one, slice(None), slice(first, held - count)), (one, slice(None), slice(first + count, held))
            cache.storage.write(keys[left], shift.shift(cache.storage.read(keys[right]), -count))
            cache.storage.write(values[left], cache.storage.read(values[right]).copy())  # the two overlap
        cache.lengths[row] = held - count
