"""Who drafts, how much, and whether at all: the cheapest drafter whose draft promises a faster step.

Nothing that a drafter does can change the text, so nothing that it does is an error: one that raises, or returns what
is no draft, is dropped with a warning, and the generation goes on without it.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import index
from typing import Any, Self, TypeVar

import numpy as np

from ryzen_compile.errors import PromptError, UnsupportedError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import Engine
from ryzen_compile.runtime.sampling import SamplingParams
from ryzen_compile.runtime.speculative.drafter import MOST_CONFIDENT, Draft, Drafter
from ryzen_compile.runtime.speculative.length import MARGIN, Acceptance, StepCost, best_length
from ryzen_compile.runtime.speculative.stats import SpeculationStats
from ryzen_compile.runtime.speculative.verifier import probability

PATIENCE = 4  # fruitless calls of a drafter before it is left alone for a step; twice as many, for two; and so on
LONGEST_REST = 16  # steps
SUM_TOLERANCE = 1e-6  # of the probabilities of a proposal
# How often a drafted token is accepted, by confidence, until it is known better: copies of code, replayed.
EXPECTED = (0.1, 0.15, 0.2, 0.3, 0.4, 0.75, 0.9, 0.95)
EXPECTED_OVERALL = 0.5
Result = TypeVar("Result")
NEWEST = 0.15  # what the newest time counts in the mean of a drafter
OVERALL = -1  # in the place of a confidence: all drafts of a drafter


class Experience:
    """What the generations of one model have taught: the cost of its steps, and how good its drafters are.

    ``curves`` are those that ``tune`` measured: context -> new tokens -> seconds.
    """

    def __init__(self, curves: Mapping[int, Mapping[int, float]] | None = None) -> None:
        self.cost = StepCost(curves)
        self._acceptance: dict[tuple[str, int], Acceptance] = {}
        self._token_seconds: dict[str, float] = {}

    def acceptance(self, drafter: str, confidence: int = OVERALL) -> Acceptance:
        """Of the drafts of one confidence, or of all."""
        found = self._acceptance.get((drafter, confidence))
        if found is None:
            expected = EXPECTED_OVERALL if confidence == OVERALL else EXPECTED[confidence]
            found = self._acceptance[drafter, confidence] = Acceptance(expected)
        return found

    def token_seconds(self, drafter: str) -> float:
        """What it takes to draft one token; 0 until that is known."""
        return self._token_seconds.get(drafter, 0.0)

    def observe_draft(self, drafter: str, tokens: int, seconds: float) -> None:
        known, now = self._token_seconds.get(drafter), seconds / tokens
        self._token_seconds[drafter] = now if known is None else known + NEWEST * (now - known)


class Speculator:
    """Drafts for one generation of one sequence by ``drafters``, the cheapest first, and learns into ``experience``.

    A draft has at most ``most`` tokens. ``fixed`` asks for as many whatever they cost: for measuring. ``required`` says
    that a generation it cannot serve is refused. ``stats`` counts.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        experience: Experience,
        *,
        vocab: int,
        most: int,
        fixed: bool = False,
        required: bool = True,
    ) -> None:
        self._drafters = list(drafters)
        self._experience = experience
        self._required = required
        self.stats = SpeculationStats()
        self._vocab = vocab
        self._most = most
        self._fixed = fixed
        self._fruitless = dict.fromkeys((drafter.name for drafter in drafters), 0)
        self._rest = dict(self._fruitless)
        self._seen = dict(self._fruitless)  # tokens of the context when it was asked last
        self._author: Drafter

    def serves(self, engine: Engine, rows: int) -> bool:
        """Whether a generation of ``rows`` sequences on ``engine`` can be drafted for; if not, ``stats.idle`` says why.

        Raises ``PromptError`` or ``UnsupportedError`` instead where speculation is required.
        """
        error: PromptError | UnsupportedError | None = None
        if rows != 1:
            error = PromptError(
                f"speculation takes one sequence at a time, got {rows}", hint="generate one by one, or without it"
            )
        elif not engine.verifies:
            error = UnsupportedError(
                "this model returns the logits of its last token alone, so drafts cannot be verified",
                hint="export it with --logits all",
            )
        elif not self._drafters:
            error = UnsupportedError("nothing is there that could draft")
        if error is not None and self._required:
            raise error
        self.stats.idle = "" if error is None else error.message
        return error is None

    @contextmanager
    def drafting(self, sampling: SamplingParams, generator: np.random.Generator | None, row: KVCache) -> Iterator[Self]:
        """While the sequence in ``row`` is generated: how the target picks its tokens, what drafts are drawn with."""
        begun = tuple(self._drafters)
        try:
            for drafter in begun:
                self._try(drafter, drafter.begin, sampling, generator, row)
            yield self
        finally:
            for drafter in begun:  # those that were dropped since, too
                self._try(drafter, drafter.end)

    @property
    def pause(self) -> int:
        """How many plain steps to make before asking for another draft, where there was none."""
        return 1 + min((self._rest[drafter.name] for drafter in self._drafters), default=LONGEST_REST)

    def draft(self, context: np.ndarray, most: int) -> Draft | None:
        """At most ``most`` tokens to verify behind ``context`` ``(L,)`` int64; None where plain steps are better.

        Each call is to be followed by ``observe``.
        """
        most = min(most, self._most)
        if most < 1:
            return None
        for drafter in tuple(self._drafters):
            if self._rest[drafter.name]:
                continue
            draft = self._asked(drafter, context, most)
            if draft is not None:
                self._author = drafter
                return draft
            self._tire(drafter)
        return None

    def observe(self, draft: Draft | None, context: int, seconds: float, accepted: int, gained: int) -> None:
        """A step behind ``context`` tokens with ``draft``, or plain steps, took ``seconds`` and gave ``gained`` tokens
        of the text, ``accepted`` of them drafted."""
        stats, cost = self.stats, self._experience.cost
        steps, tokens = (gained, 1) if draft is None else (1, 1 + len(draft.tokens))
        cost.observe(tokens, context, seconds / steps)
        for name, rest in self._rest.items():
            self._rest[name] = max(0, rest - steps)
        stats.steps += steps
        stats.tokens += gained
        stats.step_seconds += seconds
        stats.plain_seconds += gained * cost.seconds(1, context) if draft is not None and cost.measured else seconds
        if draft is not None:
            self._learn(draft, seconds, accepted)

    def _learn(self, draft: Draft, seconds: float, accepted: int) -> None:
        """What became of ``draft``, of the drafter that was asked last."""
        drafter, drafted = self._author, len(draft.tokens)
        of_all, of_drafter = self.stats, self.stats.of(drafter.name)
        of_all.verify_seconds += seconds
        of_all.lengths[accepted] += 1
        for counts in (of_all, of_drafter):
            counts.drafts += 1
            counts.drafted += drafted
            counts.accepted += accepted
        for confidence in (draft.confidence, OVERALL):
            self._experience.acceptance(drafter.name, confidence).observe(drafted, accepted)
        if accepted:
            self._fruitless[drafter.name] = 0
        else:
            self._tire(drafter)
        self._try(drafter, drafter.observe, accepted)

    def _asked(self, drafter: Drafter, context: np.ndarray, most: int) -> Draft | None:
        """A draft of ``drafter`` that is worth its verification, if it has one and is worth asking."""
        experience, fixed = self._experience, self._fixed
        if drafter.cost == "steps" and not fixed:
            overall = experience.acceptance(drafter.name)
            seconds = experience.token_seconds(drafter.name)
            length, gain = best_length(overall.rate, most, experience.cost, len(context) - 1, seconds)
            if gain < MARGIN:
                if not overall.is_due():
                    return None
                length = 1
            most = length
        draft = self._drafted(drafter, context, most)
        if draft is None or fixed:
            return draft
        # How many tokens were drawn may depend on which: a choice by it would favour some over others.
        possible = len(draft.tokens) if draft.proposals is None else most
        acceptance = experience.acceptance(drafter.name, draft.confidence)
        length, gain = best_length(acceptance.rate, possible, experience.cost, len(context) - 1)
        if gain < MARGIN:
            if not acceptance.is_due():
                return None
            length = 1
        return _cut(draft, length)

    def _drafted(self, drafter: Drafter, context: np.ndarray, most: int) -> Draft | None:
        """What ``drafter`` says, timed and checked."""
        stats = self.stats.of(drafter.name)
        stats.asked += 1
        began = time.perf_counter()
        draft = self._try(drafter, self._checked, drafter, context, most)
        seconds = time.perf_counter() - began
        stats.seconds += seconds
        self.stats.draft_seconds += seconds
        # Catching up with a prompt, or with what came while it was not asked, says nothing of a token's price.
        if draft is not None and len(context) - self._seen[drafter.name] <= self._most + 1:
            self._experience.observe_draft(drafter.name, len(draft.tokens), seconds)
        self._seen[drafter.name] = len(context)
        return draft

    def _tire(self, drafter: Drafter) -> None:
        """A call was in vain."""
        if self._fixed:
            return
        self._fruitless[drafter.name] += 1
        self._rest[drafter.name] = min(self._fruitless[drafter.name] // PATIENCE, LONGEST_REST)

    def _checked(self, drafter: Drafter, context: np.ndarray, most: int) -> Draft | None:
        draft = drafter.draft(context, most)
        if draft is None:
            return None
        _check(draft, self._vocab)
        return _cut(draft, most)

    def _try(self, drafter: Drafter, call: Callable[..., Result], *arguments: Any) -> Result | None:
        """What ``call`` returns; if it raises, ``drafter`` is dropped."""
        try:
            return call(*arguments)
        except Exception as error:  # noqa: BLE001 - anybody's drafter, which may cost speed and nothing else
            reason = f"{type(error).__name__}: {error}"
        if drafter in self._drafters:
            self._drafters.remove(drafter)
            self.stats.dropped[drafter.name] = reason
            warnings.warn(f"drafter {drafter.name!r} failed and is not used any more: {reason}", stacklevel=2)
        return None


def _cut(draft: Draft, length: int) -> Draft:
    """Its first ``length`` tokens."""
    if len(draft.tokens) <= length:
        return draft
    proposals = None if draft.proposals is None else draft.proposals[:length]
    return Draft(draft.tokens[:length], draft.confidence, proposals)


def _check(draft: Draft, vocab: int) -> None:
    """``ValueError``, or what else a wrong type leads to, for a draft that no verifier can use."""
    tokens = [index(token) for token in draft.tokens]
    if not tokens or min(tokens) < 0 or max(tokens) >= vocab:
        raise ValueError(f"a draft needs token ids from 0 to {vocab - 1}, got {tokens}")
    if not 0 <= draft.confidence <= MOST_CONFIDENT:
        raise ValueError(f"a draft's confidence is from 0 to {MOST_CONFIDENT}, got {draft.confidence}")
    if draft.proposals is not None:
        if len(draft.proposals) != len(tokens):
            raise ValueError(f"{len(tokens)} drafted tokens come with {len(draft.proposals)} proposals")
        for token, proposal in zip(tokens, draft.proposals, strict=True):
            _check_proposal(token, *proposal)


def _check_proposal(token: int, ids: np.ndarray, probabilities: np.ndarray) -> None:
    """``ValueError`` unless ``token`` can have been drawn from this."""
    if not (ids.shape == probabilities.shape and ids.ndim == 1 and (np.diff(ids) > 0).all()):
        raise ValueError(f"the proposal of token {token} is no distribution over ascending ids")
    total = float(probabilities.sum())
    if not (math.isclose(total, 1.0, abs_tol=SUM_TOLERANCE) and (probabilities >= 0).all()):
        raise ValueError(f"the proposal of token {token} has probabilities that sum to {total}")
    if probability(ids, probabilities, token) <= 0:
        raise ValueError(f"token {token} was drafted with probability 0 by its own proposal")
