"""What a drafter is: something cheaper than the model that says which tokens may come next.

A draft is a guess, never a decision: the verifier makes the text the model's own whatever is drafted, so a drafter can
cost time and nothing else. It knows no engine but its own, and no verifier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import Engine
from ryzen_compile.runtime.sampling import SamplingParams

MOST_CONFIDENT = 7  # the upper end of the scale of ``Draft.confidence``, whose lower end is 0


@dataclass(slots=True)  # not frozen, which would take twice as long as finding most drafts
class Draft:
    """Tokens that may follow, at least one.

    ``confidence``, 0 to ``MOST_CONFIDENT``, is the drafter's own scale: how often its drafts are accepted is learned
    for each drafter and confidence, so that a step of the scale needs no meaning outside of the drafter. It follows
    from the context alone, never from a token that was drawn: whoever drops drafts of low confidence would otherwise
    change what is drawn, and with it the distribution of the text.
    ``proposals`` holds, for every token, the ids ``(N,)`` int64 ascending that it was drawn from and their
    probabilities ``(N,)`` float64, which rejection sampling has to know; None where tokens were not drawn, which is as
    if each had been drawn with probability 1.
    """

    tokens: list[int]
    confidence: int
    proposals: list[tuple[np.ndarray, np.ndarray]] | None = None


class Drafter(Protocol):
    """Drafts for one sequence at a time: ``begin``, then ``draft`` and ``observe`` in turn, then ``end``.

    ``cost`` says whether a draft takes microseconds or steps of a model.
    """

    name: str
    cost: Literal["free", "steps"]

    def begin(self, sampling: SamplingParams, generator: np.random.Generator | None, row: KVCache) -> None:
        """A new sequence, of which the target's tokens are picked by ``sampling``; the last one is forgotten.

        ``generator`` is what drafts are drawn with; None where the target is greedy. ``row`` is the target's own cache
        of the sequence, which holds all tokens of a context but the last: a drafter that shares its layers may step on
        it, and leaves its lengths as they were.
        """
        ...

    def draft(self, context: np.ndarray, most: int) -> Draft | None:
        """At most ``most`` (>= 1) tokens that may follow ``context`` ``(L,)`` int64, all tokens so far; None: no guess.

        Within a sequence every context begins with the one before it. It may be many tokens longer, as ``draft`` is not
        called where drafting does not pay.
        """
        ...

    def observe(self, accepted: int) -> None:
        """How many tokens of the last draft were accepted; called once for every draft that was verified."""
        ...

    def end(self) -> None:
        """The sequence is over: give back what was borrowed. It may be called again."""
        ...


@runtime_checkable
class ExitsEarly(Protocol):
    """An engine that can leave its model early.

    ``exits`` are the numbers of layers after which it can; ``early_exit`` gives the engine that ends there, with the
    final norm and the head. It steps on the whole cache of the model, of which it reads and writes the first slots.
    """

    exits: tuple[int, ...]

    def early_exit(self, layers: int) -> Engine: ...
