"""Drafts from the longest suffix of the text that occurred before, in the text itself or in a corpus of reference.

Oliaro et al., "SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications" (2024): what is repeated is
found at any length, and of several continuations the most frequent is drafted. Here suffix automata find it, where the
paper keeps trees. The text's own repeats are continued as they did most recently, which follows edits in progress.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Literal

import numpy as np

from ryzen_compile.errors import UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.sampling import SamplingParams
from ryzen_compile.runtime.speculative.drafter import MOST_CONFIDENT, Draft
from ryzen_compile.runtime.speculative.lookup import confidence_of, continuation
from ryzen_compile.runtime.speculative.suffix_automaton import ROOT, SuffixAutomaton

MANY_ALIKE, FEW_ALIKE = 0.75, 0.6  # shares; 2/3, what two occurrences that agree have, lies between them
_LARGEST = int(np.iinfo(np.intc).max)


class Corpus:
    """Every substring of some documents, how often it occurs and what follows it most often; no match spans two.

    ``documents`` are token ids ``(T,)`` each, in lists or arrays. Building takes some 500 bytes a token, what is kept
    (``bytes``) a tenth of that. It never changes, so any number of drafters and threads share it. Raises ``UsageError``
    for documents that are no rows of integers from 0 to 2³¹ - 1.
    """

    def __init__(self, documents: Iterable[Sequence[int] | np.ndarray]) -> None:
        automaton = SuffixAutomaton()
        for number, document in enumerate(documents):
            automaton.restart()
            for token in _checked(document, number):
                automaton.extend(token)
        self.tokens = automaton.tokens
        counts = automaton.counts()
        # Transitions lie state after state, each state's ordered by token, so that bisection finds one.
        fanout = np.fromiter(map(len, automaton.next), np.int64)
        owner = np.repeat(np.arange(len(fanout)), fanout)
        tokens = np.fromiter(chain.from_iterable(automaton.next), np.int64)
        targets = np.fromiter(chain.from_iterable(found.values() for found in automaton.next), np.int64)
        order = np.lexsort((tokens, owner))
        tokens, targets = tokens[order], targets[order]
        first = np.concatenate(([0], np.cumsum(fanout)))
        # The most frequent one of each state that has any; of equals, that of the lowest token.
        best = np.full(len(fanout), -1)
        best[fanout > 0] = np.lexsort((tokens, -counts[targets], owner))[first[:-1][fanout > 0]]
        self._length, self._link = _ints(automaton.length), _ints(automaton.link)
        self._count, self._first, self._best = _ints(counts), _ints(first), _ints(best)
        self._token, self._target = _ints(tokens), _ints(targets)

    @property
    def bytes(self) -> int:
        """What it takes."""
        kept = (self._length, self._link, self._count, self._first, self._best, self._token, self._target)
        return sum(len(one) * one.itemsize for one in kept)

    def occurrences(self, tokens: Sequence[int]) -> int:
        """How often ``tokens`` ``(T,)`` occur in the documents, overlapping ones included."""
        state, length = self.follow(ROOT, 0, tokens)
        return self._count[state] if length == len(tokens) else 0

    def follow(self, state: int, length: int, tokens: Iterable[int]) -> tuple[int, int]:
        """State and length of the longest match of the end of a text that ``tokens`` continue; ``(ROOT, 0)`` at first.

        Constant time for a token, on average."""
        for token in tokens:
            found = self._step(state, token)
            while found < 0 and state != ROOT:
                state = self._link[state]
                length = self._length[state]
                found = self._step(state, token)
            if found >= 0:
                state = found
                length += 1
        return state, length

    def continuation(self, state: int, most: int, least_share: float) -> tuple[list[int], float]:
        """The most frequent tokens behind ``state``, one by one, at most ``most``, and the first one's share of the
        occurrences. They end before a share below ``least_share``; then there may be none.

        A share is counted as if there were one occurrence more that goes on otherwise, as few of them tell little: what
        occurs once has a share of 1/2."""
        tokens: list[int] = []
        first = 0.0
        while len(tokens) < most:
            best = self._best[state]
            if best < 0:
                break
            following = self._target[best]
            share = self._count[following] / (self._count[state] + 1)
            if share < least_share:
                break
            if not tokens:
                first = share
            tokens.append(self._token[best])
            state = following
        return tokens, first

    def _step(self, state: int, token: int) -> int:
        """Where ``token`` leads to from ``state``, -1 for nowhere."""
        end = self._first[state + 1]
        place = bisect_left(self._token, token, self._first[state], end)
        return self._target[place] if place < end and self._token[place] == token else -1


class SuffixDrafter:
    """A ``Drafter`` from the longest suffix of the text that occurred earlier in it or occurs in ``corpus``.

    The longer of the two matches is continued, the text's own if they are alike. A match of fewer than ``least_match``
    tokens gives no draft. Drafts from the corpus end before a token with less than ``least_share`` of the occurrences.
    The confidence is the match's length, ``confidence_of``; from the corpus, it is one step higher where many
    occurrences go on alike, and one lower where few do.

    Raises ``UsageError`` unless ``least_match`` >= 1 and 0 <= ``least_share`` <= 1.
    """

    name = "suffix"
    cost: Literal["free", "steps"] = "free"
    _match: tuple[int, int]  # state and length in the corpus

    def __init__(self, corpus: Corpus | None = None, *, least_match: int = 2, least_share: float = 0.5) -> None:
        if least_match < 1 or not 0 <= least_share <= 1:
            raise UsageError(
                f"a suffix drafter needs least_match >= 1 and least_share from 0 to 1, got {least_match} and "
                f"{least_share}"
            )
        self._corpus = corpus
        self._least_match = least_match
        self._least_share = least_share
        self._forget()

    def begin(self, sampling: SamplingParams, generator: np.random.Generator | None, row: KVCache) -> None:  # noqa: ARG002 - Drafter's
        """See ``Drafter``."""
        self._forget()

    def draft(self, context: np.ndarray, most: int) -> Draft | None:
        """See ``Drafter``; a draft from the text always has ``most`` tokens."""
        new = context[len(self._tokens) :].tolist()
        self._tokens += new
        for token in new:
            self._text.extend(token)
        length, end = self._text.longest_repeat()
        if self._corpus is not None:
            self._match = self._corpus.follow(*self._match, new)
            if self._match[1] > length and (found := self._from_corpus(self._corpus, most)):
                return found
        if length < self._least_match:
            return None
        return Draft(continuation(self._tokens, end, most), confidence_of(length))

    def observe(self, accepted: int) -> None:
        """See ``Drafter``; nothing is learned from it."""

    def end(self) -> None:
        """See ``Drafter``."""
        self._forget()

    def _forget(self) -> None:
        self._tokens: list[int] = []
        self._text = SuffixAutomaton()
        self._match = (ROOT, 0)

    def _from_corpus(self, corpus: Corpus, most: int) -> Draft | None:
        state, length = self._match
        if length < self._least_match:
            return None
        tokens, share = corpus.continuation(state, most, self._least_share)
        if not tokens:
            return None
        confidence = confidence_of(length) + (share >= MANY_ALIKE) - (share < FEW_ALIKE)
        return Draft(tokens, min(max(confidence, 0), MOST_CONFIDENT))


def _checked(document: Sequence[int] | np.ndarray, number: int) -> list[int]:
    ids = np.asarray(document)
    is_integers = ids.ndim == 1 and (ids.dtype.kind in "iu" or not ids.size)
    if not is_integers or (ids.size and not 0 <= int(ids.min()) <= int(ids.max()) <= _LARGEST):
        raise UsageError(
            f"document {number} of a corpus must be one row of token ids from 0 to {_LARGEST}, got {ids.dtype} of "
            f"shape {ids.shape}",
            hint="give the documents' tokens, not their text",
        )
    return list(ids.tolist())


def _ints(numbers: Sequence[int] | np.ndarray) -> array[int]:
    """As C integers: a list would take some thirty bytes for each, and an element of an ndarray is slow to read."""
    return array("i", np.asarray(numbers, dtype=np.intc).tobytes())
