"""Choosing an early exit: the formula against a sum written out, agreement against a count, and what is not tried."""

from __future__ import annotations

import numpy as np
import pytest

from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.speculative.exit_choice import (
    CHUNK,
    ExitChoice,
    agreement,
    candidate_layers,
    choose_exit,
    expected_gain,
    step_seconds,
)
from tests.runtime.torch_engine import TableEngine

FLAT = dict.fromkeys(range(1, 18), 1.0)  # checking costs nothing
STEEP = {m: float(m) for m in range(1, 18)}  # checking costs as much as decoding


@pytest.mark.parametrize(
    ("layers", "exits", "tried"),
    [
        (22, range(1, 22), (4, 6, 7, 11)),  # sixths are 3.67, quarters 5.5, thirds 7.33
        (6, range(1, 6), (1, 2, 3)),
        (2, (1,), (1,)),
        (4, (3,), ()),
        (1, (), ()),
        (22, (), ()),
    ],
)
def test_depths_worth_trying(layers: int, exits: range, tried: tuple[int, ...]) -> None:
    assert candidate_layers(layers, exits) == tried


def test_gain_is_that_of_the_best_length() -> None:
    a, t = 0.8, 0.1
    by_hand = [sum(a**i for i in range(k + 1)) / (1 + k * t) for k in range(1, 9)]
    assert expected_gain(a, t, FLAT) == pytest.approx(max(by_hand), rel=1e-12)
    assert max(by_hand) not in (by_hand[0], by_hand[-1])  # the best length lies between


@pytest.mark.parametrize(
    ("alike", "seconds", "curve", "gain"),
    [
        (1.0, 1e-9, FLAT, 9.0),  # eight drafted tokens and the model's own
        (0.0, 1e-9, FLAT, 1.0),
        (1.0, 1e-9, STEEP, 1.0),
        (0.0, 1.0, STEEP, 1 / 3),  # the shortest draft: checked in 2, drafted in 1
        (1.0, 1.0, FLAT, 9 / 9),
        (1.0, 1e-9, {1: 1.0, 2: 1.0}, 2.0),  # no longer draft than the curve has a figure for
        (1.0, 1e-9, {1: 1.0}, 0.0),
    ],
)
def test_ends_of_the_gain(alike: float, seconds: float, curve: dict[int, float], gain: float) -> None:
    assert expected_gain(alike, seconds, curve) == pytest.approx(gain, abs=1e-6)


def test_the_exit_to_expect_most_of_is_chosen_and_may_not_pay() -> None:
    best = choose_exit([(1, 0.2, 0.1), (2, 0.9, 0.2), (3, 0.95, 0.9)], FLAT)
    assert best == ExitChoice(2, 0.9, 0.2, expected_gain(0.9, 0.2, FLAT)) and best.pays
    poor = choose_exit([(1, 0.1, 0.5)], STEEP)
    assert poor is not None and poor.gain < 1 and not poor.pays
    assert choose_exit([], FLAT) is None


class Noted(TableEngine):
    """Writes down how many tokens were held, fed and asked for."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__(table)
        self.calls: list[tuple[int, int, int]] = []

    def step(self, tokens: np.ndarray, cache: KVCache, last: int = 1) -> np.ndarray:
        assert cache.lengths.max() + tokens.shape[1] <= cache.capacity
        self.calls.append((int(cache.lengths[0]), tokens.shape[1], last))
        return super().step(tokens, cache, last)


def test_agreement_is_a_count_over_one_cache() -> None:
    rng = np.random.default_rng(0)
    table, other = rng.standard_normal((2, 20, 20))
    other[:10] = table[:10]  # alike behind half of the tokens
    whole, early = Noted(table), Noted(other)
    windows = rng.integers(0, 20, (3, CHUNK + 5))
    want = (table.argmax(1)[windows] == other.argmax(1)[windows]).mean()
    assert 0.4 < want < 0.7
    assert agreement(whole, early, windows) == want
    assert whole.calls == early.calls == [(0, CHUNK, CHUNK), (CHUNK, 5, 5)] * 3
    assert agreement(whole, whole, windows) == 1


def test_a_step_is_timed_behind_its_context() -> None:
    early = Noted(np.eye(5))
    assert 0 < step_seconds(early, 7) < 1
    assert set(early.calls) == {(7, 1, 1)}
    assert step_seconds(early, 0) > 0
