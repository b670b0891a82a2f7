"""What is known of a prompt's beginning before it is read: whoever knows most of it supplies it, a store learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.prefix import PrefixStore


class Source(Protocol):
    """Something that holds rows of prompts."""

    def match(self, tokens: np.ndarray) -> int:
        """How many of ``tokens`` ``(T,)`` ``fill`` would supply; changes nothing."""
        ...

    def fill(self, row: KVCache, tokens: np.ndarray) -> int:
        """Copies what it holds of the beginning of ``tokens`` ``(T,)`` into an empty ``row``; returns how many, < T."""
        ...


class Reuse:
    """``sources`` in the order of preference where they know as much; ``store`` learns."""

    def __init__(self, sources: Sequence[Source] = (), store: PrefixStore | None = None) -> None:
        self._sources = sources
        self._store = store

    def fill(self, row: KVCache, tokens: np.ndarray) -> int:
        """How many of ``tokens`` ``(T,)`` are in ``row`` afterwards, at most T - 1."""
        if not self._sources:
            return 0
        return max(self._sources, key=lambda source: source.match(tokens)).fill(row, tokens)

    def learn(self, row: KVCache, tokens: np.ndarray) -> None:
        """``row`` now holds all of ``tokens``."""
        if self._store is not None:
            self._store.insert(row, tokens)
