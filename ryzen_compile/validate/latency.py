"""How long prefill and decode take, with llama-bench's meaning of the tests.

``pp512`` feeds 512 random ids at once to an empty cache; ``tg128`` feeds 128 random ids one by one; ``@ d512`` does so
behind 512 tokens already held. Batch 1, one warm-up, every sample kept; tokenizing and sampling are not in the time.
Engines that are compared are sampled in turns within one run, so that a slower minute of the machine meets all of them.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ryzen_compile.errors import UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import Engine
from ryzen_compile.runtime.layout import droppable


@dataclass(frozen=True)
class Workload:
    """One test: ``kind`` ``pp`` (prompt processing, at once) or ``tg`` (text generation, one by one)."""

    kind: Literal["pp", "tg"]
    tokens: int
    depth: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.depth < 0:
            raise UsageError(
                f"a test needs at least 1 token and a depth of at least 0, got {self.tokens} and {self.depth}"
            )

    @property
    def name(self) -> str:
        """``pp512``, or ``pp512 @ d512`` behind other tokens."""
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")

    @classmethod
    def parse(cls, text: str) -> Workload:
        """From a name; spaces are optional. Raises ``UsageError`` on anything else."""
        found = re.fullmatch(r"\s*(pp|tg)(\d{1,9})\s*(?:@\s*d(\d{1,9}))?\s*", text)
        if not found:
            raise UsageError(f"unknown test {text!r}", hint="write pp512, tg128 or tg128 @ d512")
        return cls("pp" if found[1] == "pp" else "tg", int(found[2]), int(found[3] or 0))


@dataclass(frozen=True)
class Timing:
    """The samples of one engine on one workload: seconds per repeat, each over all of the workload's tokens."""

    engine: str
    workload: Workload
    seconds: tuple[float, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """Tokens per second of each repeat."""
        return tuple(self.workload.tokens / seconds for seconds in self.seconds)

    @property
    def mean(self) -> float:
        """Mean tokens per second."""
        return statistics.fmean(self.rates)

    @property
    def sd(self) -> float:
        """Sample standard deviation of the rates; 0 for a single repeat."""
        return statistics.stdev(self.rates) if len(self.seconds) > 1 else 0.0


def prefill_seconds(engine: Engine, tokens: int, repeats: int, *, depth: int = 0, seed: int = 0) -> tuple[float, ...]:
    """Seconds for ``tokens`` new tokens in one step behind ``depth`` others, ``repeats`` times.

    At depth 0 this is the time to the first token without its sampling.
    """
    return measure([engine], [Workload("pp", tokens, depth)], repeats, seed=seed)[0].seconds


def decode_seconds(engine: Engine, context: int, tokens: int, repeats: int, *, seed: int = 0) -> tuple[float, ...]:
    """Seconds for ``tokens`` steps of one token each behind ``context`` others, ``repeats`` times."""
    return measure([engine], [Workload("tg", tokens, context)], repeats, seed=seed)[0].seconds


def measure(engines: Sequence[Engine], workloads: Sequence[Workload], repeats: int, *, seed: int = 0) -> list[Timing]:
    """Every workload on every engine: workloads in order, engines within each, in turns within each repeat.

    The same ids go to all engines. Raises ``UsageError`` before anything runs when a workload does not fit the context
    of an engine's model, or ``repeats`` is below 1.
    """
    if repeats < 1:
        raise UsageError(f"repeats must be at least 1, got {repeats}")
    for engine in engines:
        for workload in workloads:
            needed = workload.depth + workload.tokens
            if needed > engine.spec.context:
                raise UsageError(
                    f"test {workload.name} needs {needed} positions, "
                    f"the model of engine {engine.name} has a context of {engine.spec.context}"
                )
    timings = []
    for workload in workloads:
        subjects = [_Subject(engine, workload, seed) for engine in engines]
        samples: list[list[float]] = [[] for _ in engines]
        for subject in subjects:
            subject.sample()
        for repeat in range(repeats):
            # Forwards and backwards in turn: no engine always runs in the wake of the same other one.
            order = range(len(subjects)) if repeat % 2 == 0 else reversed(range(len(subjects)))
            for index in order:
                samples[index].append(subjects[index].sample())
        timings += [
            Timing(engine.name, workload, tuple(seconds)) for engine, seconds in zip(engines, samples, strict=True)
        ]
    return timings


class _Subject:
    """One engine on one workload, with a cache of just the room it needs."""

    def __init__(self, engine: Engine, workload: Workload, seed: int) -> None:
        self.engine, self.workload = engine, workload
        ids = np.random.default_rng(seed)
        self.context = ids.integers(0, engine.spec.vocab, (1, workload.depth), dtype=np.int64)
        self.tokens = ids.integers(0, engine.spec.vocab, (1, workload.tokens), dtype=np.int64)
        tokens = workload.depth + workload.tokens
        self.cache = KVCache(engine.slots, 1, tokens, limit=engine.spec.context, storage=engine.storage)

    def sample(self) -> float:
        """Seconds of one repeat; going back to the workload's depth is not timed."""
        self._rewind()
        pieces = [self.tokens] if self.workload.kind == "pp" else np.split(self.tokens, self.workload.tokens, axis=1)
        start = time.perf_counter()
        for piece in pieces:
            self.engine.step(piece, self.cache)
            self.cache.advance(piece.shape[1])
        return time.perf_counter() - start

    def _rewind(self) -> None:
        # The last context token is run again, not only forgotten up to: an engine that has to rebuild or move its state
        # after a truncation does so here. The first time, the whole context runs.
        kept = max(0, self.workload.depth - 1)
        seen = int(self.cache.lengths[0])
        if any(droppable(slot, seen) < seen - kept for slot in self.cache.slots):
            kept = 0  # a layer with a window has dropped rows that the context needs
        self.cache.truncate(kept)
        held = int(self.cache.lengths[0])
        if held < self.workload.depth:
            self.engine.step(self.context[:, held:], self.cache)
            self.cache.advance(self.workload.depth - held)
