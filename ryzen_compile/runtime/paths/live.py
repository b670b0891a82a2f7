"""A path on its way: its tokens, and everything that its next token depends on and that no other path shares."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.paths.result import Ended
from ryzen_compile.runtime.paths.verdict import Verdict
from ryzen_compile.runtime.sampling import LogitsProcessor, SamplingParams, TokenChooser
from ryzen_compile.runtime.stopping import StoppingCriterion, StopStrings, StopTracker

NO_START, NOT_DONE = np.zeros(1, np.int64), np.zeros(1, np.bool_)


@dataclass(frozen=True)
class Rules:
    """What all paths of a prompt share: how tokens are chosen, and what ends a path or a step of it."""

    params: SamplingParams
    eos: tuple[int, ...]
    minimum: int
    stops: StopStrings
    boundaries: StopStrings
    step_tokens: int | None
    processors: tuple[LogitsProcessor, ...]
    criteria: tuple[StoppingCriterion, ...]


class LivePath:
    """``ids`` is the prompt and, from ``start`` on, what came; the first ``inherited`` of those are a parent's.

    ``source`` is a cache of one row to begin from: the prompt's, or the path's own while it waits at a boundary; it
    lacks the newest token, except where there is none yet (``logits`` then are the prompt's). ``limit`` is the number
    of new tokens at most, those of the parent included.
    """

    def __init__(
        self,
        index: int,
        seed: int,
        ids: np.ndarray,
        start: int,
        rules: Rules,
        *,
        limit: int,
        source: KVCache,
        parent: LivePath | None = None,
    ) -> None:
        self.index, self.seed, self.start, self.rules, self.limit = index, seed, start, rules, limit
        self.columns = len(ids)
        self.ids = np.zeros((1, start + limit), np.int64)
        self.ids[0, : self.columns] = ids
        self.inherited = self.columns - start
        self.source: KVCache | None = source
        self.parent = None if parent is None else parent.index
        self.depth: int = 0 if parent is None else parent.depth
        self.log_probability: float = 0.0 if parent is None else parent.log_probability  # the sum
        # A chooser for one row, so that a path draws what it would draw alone.
        self._chooser = TokenChooser(
            rules.params,
            1,
            seed=seed,
            held_back=rules.eos,
            min_new_tokens=max(0, rules.minimum - self.inherited),
            processors=rules.processors,
        )
        held = ids.tolist()
        windows = [rules.stops.start(held)] if rules.stops else []
        self._tracker = StopTracker(1, eos=rules.eos, windows=windows, criteria=rules.criteria)
        self._boundary = rules.boundaries.start(held) if rules.boundaries else None
        self._since = 0  # tokens since the last boundary
        self.seconds = 0.0
        self.ended: Ended | None = None
        self.text: str | None = None  # kept once it has ended
        self.verdict: Verdict | None = None
        self.answer: Hashable | None = None
        self.counted = False

    @property
    def new(self) -> int:
        """How many tokens follow the prompt."""
        return self.columns - self.start

    @property
    def tokens(self) -> list[int]:
        """Those."""
        return list(map(int, self.ids[0, self.start : self.columns]))

    @property
    def newest(self) -> int:
        """The last token, which is not in the cache yet."""
        return int(self.ids[0, self.columns - 1])

    @property
    def mean_log_probability(self) -> float:
        """Of a token, 0 before the first."""
        return self.log_probability / self.new if self.new else 0.0

    def take(self, logits: np.ndarray) -> bool:
        """Choose the next token from ``logits`` ``(V,)``; whether a step of the text ends with it (a boundary).

        ``ended`` says afterwards whether the path does. Raises as ``TokenChooser.choose``.
        """
        history = self.ids[:, : self.columns]
        step = self.new - self.inherited
        token = int(self._chooser.choose(logits[None], step, history, NO_START, NOT_DONE)[0])
        self.log_probability += log_probability(logits, token)
        self.ids[0, self.columns] = token
        self.columns += 1
        self._since += 1
        is_behind = self._boundary is not None and self._boundary.push(token)
        if self._tracker.update(np.array([token]), self.ids[:, : self.columns]):
            self.ended = "eos" if token in self.rules.eos else "stop"
        elif self.new == self.limit:
            self.ended = "length"
        return is_behind or self._since == self.rules.step_tokens

    def pass_boundary(self) -> None:
        """It goes on: the next step of its text begins here."""
        self.depth += 1
        self._since = 0


def log_probability(logits: np.ndarray, token: int) -> float:
    """Of ``token`` under the softmax of ``logits`` ``(V,)``."""
    highest = logits.max()
    likelihood = logits - highest
    np.exp(likelihood, out=likelihood)
    return float(logits[token] - highest - np.log(likelihood.sum()))


def best_first(paths: Sequence[LivePath], score: Callable[[LivePath], float]) -> list[LivePath]:
    """By ``score``, then by mean log probability; the first started among equals."""
    return sorted(paths, key=lambda path: (-score(path), -path.mean_log_probability, path.index))
