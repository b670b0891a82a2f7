"""One prompt's paths: when to start more, what to prune and fork at a boundary, when it is enough, who wins.

It knows neither engines nor rows. Paths are judged in the order in which they ended, which follows from their tokens:
those of a wave are started together and stepped together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from ryzen_compile.errors import PromptError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.paths.judges import Judgement, Judges
from ryzen_compile.runtime.paths.live import LivePath, Rules, best_first
from ryzen_compile.runtime.paths.result import COMPLETE, Cost, Ended, Path, PathsResult, Totals, winner_by_rank
from ryzen_compile.runtime.paths.settings import Search, path_seed
from ryzen_compile.runtime.paths.verdict import Verdict
from ryzen_compile.runtime.paths.votes import Vote, decided, leader_probability, tally

TextOf = Callable[[list[int]], str]


class Request:
    """``prompt`` is in ``source``, a cache of one row, and ``logits`` ``(V,)`` follow it; ``text_of`` new tokens is the
    text that they add. At most ``limit`` of them a path."""

    def __init__(
        self,
        search: Search,
        prompt: list[int],
        source: KVCache,
        logits: np.ndarray,
        rules: Rules,
        *,
        limit: int,
        text_of: TextOf,
        judges: Judges,
    ) -> None:
        self.search, self.prompt, self.source, self.logits = search, prompt, source, logits
        self.steps, self.prefill_seconds, self.reused, self.verify_seconds = 0, 0.0, 0, 0.0
        self.started: list[LivePath] = []
        self._rules, self._limit, self._text_of, self._judges = rules, limit, text_of, judges
        self._most = min(search.n, search.budget.samples or search.n)
        self._roots = 0
        self._ended: list[LivePath] = []  # by themselves, in order; the first _settled of them are judged
        self._settled = 0
        self._asked: dict[int, Future[Judgement]] = {}
        self._enough = self._late = False

    # --- what the scheduler asks --------------------------------------------------------------------------------------
    @property
    def width(self) -> int:
        """How many rows it can use at a time."""
        together = self.search.branches or self.search.stop == "never"
        return min(self._most, self.search.n if together else self.search.wave, self.search.rows)

    @property
    def live(self) -> list[LivePath]:
        """The paths that have not ended."""
        return [path for path in self.started if path.ended is None]

    @property
    def done(self) -> bool:
        """Whether nothing more will happen."""
        return self._enough or not (self.live or self._settled < len(self._ended) or self._wanted())

    def fresh(self, free: int) -> list[LivePath]:
        """The paths to start now from the prompt, where ``free`` rows are. A wave starts whole or not at all."""
        wanted = self._wanted()
        count = min(wanted, free) if self.search.stop == "never" and not self.search.branches else wanted
        if not count or count > free:
            return []
        limit = self._limit if self._affordable() else min(self._limit, self.search.budget.tokens or self._limit)
        self._roots += count
        return [self._start(np.array(self.prompt), self.source, limit) for _ in range(count)]

    def took(self, path: LivePath, is_behind_step: bool) -> bool:
        """``path`` has one more token, behind which a step of its text ends or not; whether it waits there."""
        if path.ended is not None:
            self._ended.append(path)
            if self.search.verifier is not None:
                self._asked[path.index] = self._judges.ask(self.search.verifier, self._text(path))
            return False
        if not (is_behind_step and self.search.branches and path.depth < self.search.max_depth):
            return False
        if self.search.guide is not None:
            self._asked[path.index] = self._judges.ask(self.search.guide, self._text(path))
        return True

    def branch(self) -> list[LivePath]:
        """The paths that go on from a boundary, once all that live wait at one: the better half, and a fork for each
        path of the worse half, which is pruned, the best first."""
        paths = self.live
        if not paths or any(path.source is None for path in paths):
            return []
        scores = {path.index: 0.0 for path in paths}
        if self.search.guide is not None:
            if not all(self._asked[path.index].done() for path in paths):
                return []
            scores = {path.index: self._judgement(path).score for path in paths}
        ranked = best_first(paths, lambda path: scores[path.index])
        keep = -(-len(ranked) // 2)
        for path in ranked[keep:]:
            path.ended = "pruned"
            path.source = None
        kept = ranked[:keep]
        for path in kept:
            path.pass_boundary()
        forks: list[LivePath] = []
        while len(forks) < len(ranked) - keep and self._can_fork(kept[len(forks) % keep]):
            parent = kept[len(forks) % keep]
            forks.append(self._start(parent.ids[0, : parent.columns], parent.source, parent.limit, parent))
        return [*kept, *forks]

    def settle(self) -> None:
        """Judge the ended paths in their order, as far as verdicts are there, until it is enough."""
        while not self._enough and self._settled < len(self._ended):
            path = self._ended[self._settled]
            if path.index in self._asked:
                if not self._asked[path.index].done():
                    return
                path.verdict = self._judgement(path)
            path.counted = True
            if self.search.vote == "majority":
                path.answer = self.search.answer(self._text(path))
            self._settled += 1
            if self._is_enough(path):
                self._enough = True
                self._end_all("cancelled")

    def expire(self, seconds: float) -> None:
        """``seconds`` have passed since the call."""
        most = self.search.budget.seconds
        if most is not None and seconds > most and not self._late:
            self._late = True
            self._end_all("budget")

    # --- the paths ----------------------------------------------------------------------------------------------------
    def _wanted(self) -> int:
        """How many more paths to start from the prompt now, if there are rows for them."""
        if self._enough or self._late or (self.search.branches and self.started):
            return 0
        left = self._most - self._roots
        if self.search.stop != "never" and not self.search.branches:
            if self.live or self._settled < len(self._ended):
                return 0
            left = min(left, self.search.wave, self.search.rows)
        most = self._affordable()
        return left if most is None else min(left, most or int(not self.started))

    def _affordable(self) -> int | None:
        """For how many paths from the prompt there are tokens; None where nothing bounds them."""
        budget = self.search.budget.tokens
        return None if budget is None else (budget - self._committed()) // self._limit

    def _committed(self) -> int:
        """The tokens that paths have taken, or may."""
        return sum((path.limit if path.ended is None else path.new) - path.inherited for path in self.started)

    def _can_fork(self, parent: LivePath) -> bool:
        budget, samples = self.search.budget.tokens, self.search.budget.samples
        if samples is not None and len(self.started) >= samples:
            return False
        return budget is None or self._committed() + parent.limit - parent.new <= budget

    def _start(self, ids: np.ndarray, source: KVCache | None, limit: int, parent: LivePath | None = None) -> LivePath:
        index = len(self.started)
        seed = path_seed(self.search.seed, index)
        path = LivePath(
            index, seed, ids, len(self.prompt), self._rules, limit=limit, source=source or self.source, parent=parent
        )
        self.started.append(path)
        return path

    def _end_all(self, how: Ended) -> None:
        for path in self.live:
            path.ended = how
            path.source = None

    def _judgement(self, path: LivePath) -> Verdict:
        verdict, seconds = self._asked.pop(path.index).result()
        self.verify_seconds += seconds
        return verdict

    def _text(self, path: LivePath) -> str:
        if path.ended is None:
            return self._text_of(path.tokens)
        if path.text is None:
            path.text = self._text_of(path.tokens)
        return path.text

    # --- the votes ----------------------------------------------------------------------------------------------------
    def _is_enough(self, path: LivePath) -> bool:
        """Whether ``path``, judged last, settles it."""
        stop, verdict = self.search.stop, path.verdict
        if stop == "never":
            return False
        if stop == "first" or self.search.vote == "best":
            return verdict is not None and verdict.passed and (stop == "first" or verdict.score == 1)
        voters = self._voters()
        if self.search.verifier is not None and not any(one.verdict and one.verdict.passed for one in voters):
            return False  # those that fail vote only as long as none passes
        counts = list(Counter(one.answer for one in voters if one.answer is not None).values())
        left = self._most - self._settled
        return leader_probability(counts) >= self.search.confidence or (bool(counts) and decided(counts, left))

    def _voters(self) -> list[LivePath]:
        """Those that passed; where none did, all that were judged; where none was, those that ran out of time."""
        judged = [path for path in self.started if path.counted]
        passed = [path for path in judged if path.verdict is not None and path.verdict.passed]
        return passed or judged or [path for path in self.started if path.ended == "budget" and path.new]

    def _votes(self, paths: list[Path]) -> list[Vote]:
        return tally([path.answer for path in paths], [path.rank for path in paths], [path.index for path in paths])

    def _finished(self, path: LivePath) -> Path:
        return Path(
            index=path.index,
            seed=path.seed,
            tokens=tuple(path.tokens),
            text=self._text(path),
            ended=path.ended or "cancelled",
            log_probability=path.mean_log_probability,
            cost=Cost(path.new - path.inherited, path.seconds),
            verdict=path.verdict,
            answer=path.answer,
            parent=path.parent,
            branched_at=path.inherited,
            depth=path.depth,
        )

    def result(self) -> PathsResult:
        """What came of it. Raises ``PromptError`` where the caller's ``vote`` returns no place among the paths."""
        voters = self._voters()
        for path in voters:
            if self.search.vote == "majority" and not path.counted:
                path.answer = self.search.answer(self._text(path))
        voting = {path.index for path in voters}
        paths = [replace(self._finished(path), counted=path.index in voting) for path in self.started]
        eligible = [path for path in paths if path.counted]
        votes = self._votes(eligible) if self.search.vote == "majority" else []
        winner = self._winner(eligible, votes, paths)
        return PathsResult(
            self.search.seed, tuple(paths), winner, tuple(votes), self._confidence(winner, votes), self._totals(paths)
        )

    def _winner(self, eligible: list[Path], votes: list[Vote], paths: list[Path]) -> Path | None:
        vote = self.search.vote
        if vote == "majority":
            return paths[votes[0].path] if votes else None
        if not eligible:
            return None
        if vote == "best":
            return winner_by_rank(eligible)
        place = vote(eligible)
        if not isinstance(place, int | np.integer) or not 0 <= place < len(eligible):
            raise PromptError(f"vote must return a place among {len(eligible)} paths, got {place!r}")
        return eligible[int(place)]

    def _confidence(self, winner: Path | None, votes: list[Vote]) -> float | None:
        if winner is None or winner.ended not in COMPLETE:
            return None
        if self.search.vote == "majority":
            return leader_probability([vote.count for vote in votes])
        is_best = self.search.vote == "best" and winner.verdict is not None and winner.verdict.passed
        return 1.0 if is_best and winner.score == 1 else None

    def _totals(self, paths: list[Path]) -> Totals:
        return Totals(
            paths=len(paths),
            tokens=sum(path.cost.tokens for path in paths),
            prompt_tokens=len(self.prompt),
            reused_tokens=self.reused,
            steps=self.steps,
            seconds=sum(path.cost.seconds for path in paths),
            prefill_seconds=self.prefill_seconds,
            verify_seconds=self.verify_seconds,
            spared=max(0, self.search.n - self._roots) if self._enough else 0,
            cancelled=sum(path.ended == "cancelled" for path in paths),
        )
