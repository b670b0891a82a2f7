"""Prompt lookup: the last tokens occurred before, so what followed them then is the draft.

Saxena, "Prompt Lookup Decoding" (2023). Instead of searching the text, a dictionary holds where every n-gram last ended
and grows with the text, so that a draft costs the same at any length.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Literal

import numpy as np

from ryzen_compile.errors import UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.sampling import SamplingParams
from ryzen_compile.runtime.speculative.drafter import Draft

# The shortest match of each confidence from 1 on.
_LENGTHS = (2, 3, 4, 6, 9, 17)


class PromptLookup:
    """A ``Drafter`` that continues the most recent earlier occurrence of the text's last ``most_ngram`` tokens, or, if
    there is none, of as few as ``least_ngram``. Its confidence is the length of the whole match, ``confidence_of``.

    Raises ``UsageError`` unless 1 <= ``least_ngram`` <= ``most_ngram``.
    """

    name = "lookup"
    cost: Literal["free", "steps"] = "free"

    def __init__(self, most_ngram: int = 3, least_ngram: int = 2) -> None:
        if not 1 <= least_ngram <= most_ngram:
            raise UsageError(f"n-grams need 1 <= least <= most, got least {least_ngram} and most {most_ngram}")
        self._sizes = range(most_ngram, least_ngram - 1, -1)
        self._forget()

    def begin(self, sampling: SamplingParams, generator: np.random.Generator | None, row: KVCache) -> None:  # noqa: ARG002 - Drafter's
        """See ``Drafter``."""
        self._forget()

    def draft(self, context: np.ndarray, most: int) -> Draft | None:
        """See ``Drafter``; a draft always has ``most`` tokens."""
        tokens = self._tokens
        tokens += context[len(tokens) :].tolist()
        # The n-grams at the end are left out, or they would find themselves.
        if self._indexed < len(tokens) - 1:
            self._index(len(tokens) - 1)
        for size, ends in self._ends:
            end = ends.get(tuple(tokens[-size:]))
            if end is not None:
                return Draft(continuation(tokens, end, most), _confidence(tokens, end))
        return None

    def observe(self, accepted: int) -> None:
        """See ``Drafter``; nothing is learned from it."""

    def end(self) -> None:
        """See ``Drafter``."""
        self._forget()

    def _forget(self) -> None:
        self._tokens: list[int] = []
        self._indexed = 0
        self._ends: list[tuple[int, dict[tuple[int, ...], int]]] = [(size, {}) for size in self._sizes]

    def _index(self, until: int) -> None:
        """Note where the n-grams end that end behind ``self._indexed`` tokens and behind at most ``until``."""
        tokens = self._tokens
        for end in range(self._indexed + 1, until + 1):
            for size, ends in self._ends:
                if size <= end:
                    ends[tuple(tokens[end - size : end])] = end
        self._indexed = until


def continuation(tokens: list[int], start: int, count: int) -> list[int]:
    """``count`` tokens as they stand from ``start`` < ``len(tokens)`` on; behind the last one, from ``start`` again.

    What is repeated from there to the end of the text is so drafted as the loop that it seems to be.
    """
    found = tokens[start : start + count]
    while len(found) < count:
        found += found[: count - len(found)]
    return found


def confidence_of(length: int) -> int:
    """0 for a match of one token, then a step more for 2, 3, 4, 6, 9 and 17 tokens: 6 at most."""
    return bisect_right(_LENGTHS, length)


def _confidence(tokens: list[int], end: int) -> int:
    """``confidence_of`` the match between what stands before ``end`` and at the end of ``tokens``."""
    confidence = 0
    for length in _LENGTHS:
        if end < length or tokens[end - length : end] != tokens[-length:]:
            break
        confidence += 1
    return confidence
