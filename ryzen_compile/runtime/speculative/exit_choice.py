"""Whether drafting with a model's own first layers pays, and with how many of them.

The exit and the whole model read the same text over one cache, as they do when the one drafts for the other. Of their
agreement, the exit's time and the seconds of a step of M tokens follows the speed that greedy decoding may expect: a
draft of k tokens gives

    E(k) = 1 + a + a^2 + ... + a^k        tokens in        T(1 + k) + k t

seconds (Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023), where a is the share of
tokens that both predict alike and t the exit's time for one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import Engine

DEPTHS = (1 / 6, 1 / 4, 1 / 3, 1 / 2)  # of a model's layers
MOST_DRAFTED = 8
CHUNK = 16  # tokens of a step while predictions are compared
STEPS = 15


@dataclass(frozen=True)
class ExitChoice:
    """An exit behind ``layers`` layers: ``agreement`` is the share of tokens, 0 to 1, that it predicts as the whole
    model does, ``seconds`` the time of its step of one token, ``gain`` the decoding speed to be expected with it, 1
    being that without."""

    layers: int
    agreement: float
    seconds: float
    gain: float

    @property
    def pays(self) -> bool:
        return self.gain > 1


def candidate_layers(layers: int, exits: Collection[int]) -> tuple[int, ...]:
    """The depths of a model of ``layers`` layers that are worth trying, of those ``exits`` that it has."""
    return tuple(sorted({max(1, round(share * layers)) for share in DEPTHS} & set(exits)))


def agreement(engine: Engine, early: Engine, windows: np.ndarray) -> float:
    """The share of tokens of ``windows`` ``(n, T)`` int64 behind which ``early``, an exit of ``engine``, has the same
    best next token, from 0 to 1. Both have to be able to verify."""
    same = 0
    cache = KVCache(engine.slots, 1, windows.shape[1], limit=engine.spec.context, storage=engine.storage)
    for window in windows:
        cache.truncate(0)
        for start in range(0, len(window), CHUNK):
            tokens = window[None, start : start + CHUNK]
            count = tokens.shape[1]
            # The exit first, as when it drafts; the whole model then writes the same rows again, and the others.
            guesses = early.step(tokens, cache, count)[0, -count:].argmax(-1)
            same += int((guesses == engine.step(tokens, cache, count)[0, -count:].argmax(-1)).sum())
            cache.advance(count)
    return same / windows.size


def step_seconds(early: Engine, context: int) -> float:
    """The median time of a step of one token behind ``context`` others, which are counted, not computed."""
    cache = KVCache(early.slots, 1, context + 1, limit=early.spec.context, storage=early.storage)
    cache.advance(context)
    token = np.zeros((1, 1), np.int64)
    taken = []
    for _ in range(STEPS + 1):
        started = time.perf_counter()
        early.step(token, cache)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])  # the first one allocates


def expected_gain(agreement: float, seconds: float, curve: Mapping[int, float]) -> float:
    """The speed of decoding over that without drafts, for the best length of drafts up to ``MOST_DRAFTED``.

    ``curve`` has the seconds of a step of M tokens; lengths that it has no figure for are not looked at. 0 where there
    are none.
    """
    best = 0.0
    tokens = 1.0
    for length in range(1, MOST_DRAFTED + 1):
        tokens += agreement**length
        if 1 + length in curve:
            best = max(best, tokens * curve[1] / (curve[1 + length] + length * seconds))
    return best


def choose_exit(measured: Iterable[tuple[int, float, float]], curve: Mapping[int, float]) -> ExitChoice | None:
    """The one to expect most of, of exits as (layers, agreement, seconds of a step); None without any."""
    choices = [
        ExitChoice(layers, alike, seconds, expected_gain(alike, seconds, curve)) for layers, alike, seconds in measured
    ]
    return max(choices, key=lambda choice: choice.gain, default=None)
