"""The posterior against Monte Carlo, exact cases, and the table of votes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ryzen_compile.runtime.paths.votes import Vote, decided, leader_probability, tally

DRAWS = 200_000


@pytest.mark.parametrize(
    "counts", [(1,), (2, 1), (3, 3), (5, 2, 2), (10, 9), (1, 1, 1, 1), (30, 12, 8, 1), (200, 180), (7, 0)]
)
def test_the_posterior_is_that_of_monte_carlo(counts: tuple[int, ...]) -> None:
    shapes = np.array([*sorted(counts, reverse=True), 0]) + 1  # and an answer that nobody has given
    drawn = np.random.default_rng(0).dirichlet(shapes, DRAWS)
    expected = (drawn.argmax(axis=1) == 0).mean()
    # Four standard errors of DRAWS draws.
    assert leader_probability(counts) == pytest.approx(expected, abs=4 * 0.5 / DRAWS**0.5)


@pytest.mark.parametrize("votes", [1, 2, 5, 40, 300])
def test_unanimous_votes_are_a_beta(votes: int) -> None:
    # P(p > 1/2) under Beta(v + 1, 1); tolerance: the grid's.
    assert leader_probability([votes]) == pytest.approx(1 - 0.5 ** (votes + 1), abs=1e-5)


def test_no_votes_say_nothing() -> None:
    assert leader_probability([]) == leader_probability([0]) == 0


def test_order_and_empty_answers_do_not_matter() -> None:
    assert leader_probability([1, 4, 2]) == leader_probability([4, 2, 1])


def test_decided_is_what_no_remaining_votes_can_change() -> None:
    for first, second, left in itertools.product(range(5), repeat=3):
        ahead, behind = max(first, second), min(first, second)
        changes = any(behind + more >= ahead for more in range(left + 1))
        assert decided([first, second], left) == (not changes)


def test_the_table() -> None:
    answers = ["x", "y", None, "x", "y", "z"]
    ranks = [(0.0, -1.0), (1.0, -3.0), (1.0, 0.0), (0.0, -0.5), (0.0, -0.1), (1.0, -0.1)]
    table = tally(answers, ranks, [4, 5, 6, 7, 8, 9])
    assert table == [Vote("y", 2, 5), Vote("x", 2, 7), Vote("z", 1, 9)], "of equals the one with the better path"
    assert tally(["a", "b"], [(0.0, 0.0)] * 2, [3, 2])[0] == Vote("b", 1, 2), "then the one that was started first"
    assert tally([None], [(1.0, 1.0)], [0]) == []
