"""What is known of a prompt's beginning before it is read: asked for in order, and told what was read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.prefix import PrefixStore


class Source(Protocol):
    """Something that holds rows of prompts."""

    def fill(self, row: KVCache, tokens: np.ndarray) -> int:
        """Copies what it holds of the beginning of ``tokens`` ``(T,)`` into an empty ``row``; returns how many, < T."""
        ...


class Reuse:
    """``sources`` in the order they are asked, until one has something; ``store`` learns."""

    def __init__(self, sources: Sequence[Source] = (), store: PrefixStore | None = None) -> None:
        self._sources = sources
        self._store = store

    def fill(self, row: KVCache, tokens: np.ndarray) -> int:
        """How many of ``tokens`` ``(T,)`` are in ``row`` afterwards, at most T - 1."""
        for source in self._sources:
            if filled := source.fill(row, tokens):
                return filled
        return 0

    def learn(self, row: KVCache, tokens: np.ndarray) -> None:
        """``row`` now holds all of ``tokens``."""
        if self._store is not None:
            self._store.insert(row, tokens)
