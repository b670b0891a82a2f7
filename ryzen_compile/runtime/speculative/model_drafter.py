"""Drafts that a smaller model makes, token by token: one of its own, or the first layers of the target itself.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023); for the first layers, Elhoushi et
al., "LayerSkip" (2024). A draft model keeps a row of its own in step with the text. An early exit steps on the target's
row, whose first layers the target has filled, so that there is nothing to catch up with; what it writes behind the text
is taken back.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import Literal, Self, TypeVar

import numpy as np

from ryzen_compile.errors import MemoryLimitError, NumericalError, UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import Engine
from ryzen_compile.runtime.layout import droppable
from ryzen_compile.runtime.pool import CachePool
from ryzen_compile.runtime.sampling import SamplingParams, distribution, draw, penalise_repeats, softmax
from ryzen_compile.runtime.speculative.drafter import Draft

Made = TypeVar("Made")
THRESHOLD = 0.4  # transformers' default of assistant_confidence_threshold
CHUNK = 512  # tokens of a prompt in one step
_PROBABILITIES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.97)  # the lowest of each confidence from 1 on


class ModelDrafter:
    """A ``Drafter`` that steps ``engine``: on a row that ``pool`` lends it, or, without one, on the target's.

    Tokens are picked as the target's are, greedily or drawn. A draft ends behind a token whose probability, by the
    plain logits, is below ``threshold``; its confidence grows with the highest probability that its first token could
    have. There is no draft where text and draft do not fit the engine's context, or the target's row.

    ``begin`` raises ``UsageError`` when tokens are to be drawn and it is given nothing to draw them with, ``draft``
    ``NumericalError`` when logits are not finite, and ``MemoryLimitError`` when the row would exceed the pool's budget.
    Raises ``UsageError`` for a ``threshold`` outside of 0 to 1.
    """

    cost: Literal["free", "steps"] = "steps"

    def __init__(
        self, name: str, engine: Engine, pool: CachePool | None, *, threshold: float = THRESHOLD, chunk: int = CHUNK
    ) -> None:
        if not 0 <= threshold <= 1 or chunk < 1:
            raise UsageError(
                f"a drafting model needs a threshold from 0 to 1 and a chunk >= 1, got {threshold} and {chunk}"
            )
        self.name = name
        self._engine = engine
        self._pool = pool
        self._threshold = threshold
        self._chunk = chunk
        self._sampling = SamplingParams()
        self._generator: np.random.Generator | None = None
        self._target: KVCache | None = None
        self._own: KVCache | None = None
        self._stepped = 0  # tokens of the text in our own row
        self._drafted: list[int] = []  # and the drafted ones behind them

    @classmethod
    def draft_model(cls, engine: Engine, pool: CachePool, *, threshold: float = THRESHOLD) -> Self:
        """Another model with the target's tokens, in caches of its own."""
        return cls("draft_model", engine, pool, threshold=threshold)

    @classmethod
    def early_exit(cls, engine: Engine, *, threshold: float = THRESHOLD) -> Self:
        """The target's first layers, as ``ExitsEarly.early_exit`` gives them."""
        return cls("early_exit", engine, None, threshold=threshold)

    def begin(self, sampling: SamplingParams, generator: np.random.Generator | None, row: KVCache) -> None:
        """See ``Drafter``."""
        self.end()
        if generator is None and not sampling.greedy:
            raise UsageError(f"drafter {self.name!r} has to draw tokens and got no generator")
        self._sampling, self._generator = sampling, generator
        self._target = row if self._pool is None else None

    def draft(self, context: np.ndarray, most: int) -> Draft | None:
        """See ``Drafter``."""
        if self._pool is None:
            return self._draft_on_target(context, most)
        return self._draft_on_own(context, most, self._pool)

    def observe(self, accepted: int) -> None:
        """See ``Drafter``; what was accepted shows in the next context."""

    def end(self) -> None:
        """See ``Drafter``."""
        if self._own is not None and self._pool is not None:
            self._pool.release(self._own)
        self._forget()
        self._target = None

    def _draft_on_target(self, context: np.ndarray, most: int) -> Draft | None:
        row = self._target
        if row is None:
            raise UsageError(f"drafter {self.name!r} was asked for a draft outside of a sequence")
        # All but the last token are there, or, in a stream, what is kept of them. The last one drafted is not stepped.
        held = int(row.lengths[0])
        most = _undoable(row, held + 1, min(most, min(row.capacity, self._engine.spec.context) - held))
        if most < 1:
            return None
        try:
            return self._drawn(row, context, context[-1:], most)
        finally:
            row.truncate(held)

    def _draft_on_own(self, context: np.ndarray, most: int, pool: CachePool) -> Draft | None:
        most = min(most, self._engine.spec.context + 1 - len(context))
        if most < 1:
            return None
        needed = len(context) + most - 1
        row = self._own
        if row is None:
            row = self._with_room(lambda room: pool.acquire(1, room), needed)
        # Until it is in step with the text, nobody owns it: after an error the pool shall not have it back.
        self._own = None
        if needed > row.capacity:
            self._with_room(row.reserve, needed)
        row.truncate(self._known(context))
        most = _undoable(row, len(context), most)
        draft = self._drawn(row, context, context[int(row.lengths[0]) :], most) if most else None
        self._own = row
        self._stepped = len(context) if draft is not None else int(row.lengths[0])
        self._drafted = draft.tokens[:-1] if draft is not None else []
        return draft

    def _with_room(self, make: Callable[[int], Made], needed: int) -> Made:
        """``make`` of half as much again as is needed, so that growing stays a constant share; of that, if the budget
        has no more."""
        try:
            return make(min(needed + needed // 2, self._engine.spec.context))
        except MemoryLimitError:
            return make(needed)

    def _known(self, context: np.ndarray) -> int:
        """How many tokens of ``context`` our own row begins with; one is left to step."""
        known = self._stepped
        for drafted, token in zip(self._drafted, context[self._stepped :].tolist(), strict=False):
            if drafted != token:
                break
            known += 1
        return min(known, len(context) - 1)

    def _forget(self) -> None:
        self._own, self._stepped, self._drafted = None, 0, []

    def _drawn(self, row: KVCache, context: np.ndarray, unread: np.ndarray, most: int) -> Draft:
        """Steps what ``row`` does not hold yet of ``context``, its last tokens ``unread``, then draws."""
        tokens: list[int] = []
        proposals: list[tuple[np.ndarray, np.ndarray]] = []
        confidence = 0
        logits = self._read(row, unread)
        while True:
            if not math.isfinite(logits.max()):
                raise NumericalError(f"logits of drafter {self.name!r} are not finite behind {len(context)} tokens")
            likelihood = softmax(logits)
            if not tokens:
                confidence = bisect_right(_PROBABILITIES, likelihood.max())
            token, proposal = self._pick(logits, context, tokens)
            tokens.append(token)
            if proposal is not None:
                proposals.append(proposal)
            # The token itself stays: dropping what was drawn would change what it was drawn from.
            if len(tokens) == most or likelihood[token] < self._threshold:
                return Draft(tokens, confidence, proposals or None)
            logits = self._read(row, np.array([token]))

    def _read(self, row: KVCache, tokens: np.ndarray) -> np.ndarray:
        """The logits ``(V,)`` behind ``tokens`` ``(T,)`` int64, which ``row`` then holds; good until the next step."""
        logits = np.empty(0, np.float32)
        for start in range(0, len(tokens), self._chunk):
            part = np.ascontiguousarray(tokens[None, start : start + self._chunk])
            logits = self._engine.step(part, row)[0, -1]
            row.advance(part.shape[1])
        return logits

    def _pick(
        self, logits: np.ndarray, context: np.ndarray, drafted: list[int]
    ) -> tuple[int, tuple[np.ndarray, np.ndarray] | None]:
        """A token as the target would pick it, and, where it is drawn, what from."""
        params = self._sampling
        if params.repetition_penalty != 1:
            logits = logits.copy()
            penalise_repeats(logits, np.append(context, np.array(drafted, np.int64)), params.repetition_penalty)
        if self._generator is None or params.greedy:
            return int(logits.argmax()), None
        proposal = distribution(logits, params)
        return draw(*proposal, self._generator), proposal


def _undoable(row: KVCache, text: int, most: int) -> int:
    """How many of ``most`` tokens can be drafted behind ``text`` tokens so that ``row`` can go back to the text without
    its last one: a layer with a window drops older tokens for the newest, and these cannot be taken back then."""
    for slot in row.slots:
        while slot.window and most > 0 and droppable(slot, text + most - 1) < most:
            most -= 1
    return max(most, 0)
