"""How fast an encoder turns texts into vectors: batches of random ids, all of one length, without tokenizing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ryzen_compile.errors import UsageError
from ryzen_compile.runtime.engine import EncoderEngine

LENGTHS = (16, 64, 256)
BATCH = 32


@dataclass(frozen=True)
class EncodingTiming:
    """Samples of one length: seconds per repeat, each for ``texts`` texts of ``tokens`` tokens."""

    tokens: int
    texts: int
    seconds: tuple[float, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """Texts per second of each repeat."""
        return tuple(self.texts / seconds for seconds in self.seconds)

    @property
    def mean(self) -> float:
        """Mean texts per second."""
        return statistics.fmean(self.rates)

    @property
    def sd(self) -> float:
        """Sample standard deviation of the rates; 0 for a single repeat."""
        return statistics.stdev(self.rates) if len(self.seconds) > 1 else 0.0


def measure_encoding(
    engine: EncoderEngine, *, lengths: Sequence[int] = LENGTHS, batch: int = BATCH, repeats: int = 5, seed: int = 0
) -> tuple[EncodingTiming, ...]:
    """One timing for each of ``lengths`` that the model can read, in turns, after a warm-up of each.

    Raises ``UsageError`` for numbers below 1, and where the model reads none of the lengths.
    """
    if min(*lengths, batch, repeats) < 1:
        raise UsageError(f"lengths, batch and repeats must be at least 1, got {lengths}, {batch} and {repeats}")
    read = [tokens for tokens in lengths if tokens <= engine.spec.context]
    if not read:
        raise UsageError(f"the model reads {engine.spec.context} tokens, fewer than any of {lengths}")
    rng = np.random.default_rng(seed)
    texts = [rng.integers(engine.spec.vocab, size=(batch, tokens)) for tokens in read]
    samples: list[list[float]] = [[] for _ in read]
    for turn in range(repeats + 1):
        for ids, kept in zip(texts, samples, strict=True):
            started = time.perf_counter()
            engine.embed(ids, np.ones_like(ids))
            if turn:
                kept.append(time.perf_counter() - started)
    return tuple(EncodingTiming(tokens, batch, tuple(kept)) for tokens, kept in zip(read, samples, strict=True))
