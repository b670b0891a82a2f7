"""The best draft length by cost and acceptance; both are learned."""

from __future__ import annotations

import pytest

from ryzen_compile.runtime.speculative.length import LEAST_WAIT, MOST_WAIT, Acceptance, StepCost, best_length

FLAT = {512: {1: 10.0, 17: 10.4}}  # a step of many tokens costs little more than one
STEEP = {512: {1: 10.0, 2: 20.0}}  # as many steps as tokens


def test_long_drafts_where_steps_are_flat_and_none_where_they_are_steep() -> None:
    assert best_length(0.9, 16, StepCost(FLAT), 512)[0] == 16
    assert best_length(0.9, 5, StepCost(FLAT), 512)[0] == 5
    length, gain = best_length(0.9, 16, StepCost(STEEP), 512)
    assert length == 1 and gain == pytest.approx(1.9 / 2)
    assert best_length(0.0, 16, StepCost(FLAT), 512)[1] < 1


def test_the_gain_is_tokens_per_second_against_one_per_step() -> None:
    cost = StepCost({0: {1: 2.0, 2: 2.5, 3: 3.5, 4: 5.0}})
    rates = {k: (1 - 0.6 ** (k + 1)) / 0.4 / cost.seconds(k + 1, 0) * 2.0 for k in (1, 2, 3)}
    length, gain = best_length(0.6, 3, cost, 0)
    assert length == max(rates, key=lambda k: rates[k]) and gain == pytest.approx(rates[length], rel=1e-12)


def test_drafting_that_takes_time_shortens_drafts() -> None:
    free, _ = best_length(0.8, 16, StepCost(FLAT), 512)
    dear, gain = best_length(0.8, 16, StepCost(FLAT), 512, draft_seconds=2.0)
    assert 0 < dear < free and gain > 1
    assert best_length(0.8, 16, StepCost(FLAT), 512, draft_seconds=50.0)[1] < 1


def test_a_curve_is_straight_between_its_points_and_goes_on_behind_them() -> None:
    cost = StepCost({100: {1: 1.0, 5: 3.0, 9: 4.0}})
    assert [cost.seconds(m, 100) for m in (1, 3, 5, 7, 9, 13)] == pytest.approx([1, 2, 3, 3.5, 4, 5])
    assert cost.seconds(3, 5000) == cost.seconds(3, 100)  # nothing is known of other contexts


def test_two_contexts_give_a_line_that_never_falls_below_half() -> None:
    cost = StepCost({100: {1: 10.0, 2: 12.0}, 300: {1: 14.0, 2: 20.0}})
    assert [cost.seconds(1, c) for c in (100, 200, 300, 500)] == pytest.approx([10, 12, 14, 18])
    assert cost.seconds(2, 200) == pytest.approx(16)
    falling = StepCost({100: {1: 10.0}, 300: {1: 4.0}})  # a noisy measurement
    assert falling.seconds(1, 10_000) == pytest.approx(5)


def test_without_a_curve_the_first_steps_tell() -> None:
    cost = StepCost()
    assert not cost.measured and cost.seconds(3, 10) == pytest.approx(1.2)  # a guess, in steps
    cost.observe(1, 10, 99.0)  # warms up
    assert not cost.measured
    cost.observe(1, 10, 0.02)
    assert cost.measured and cost.seconds(1, 10) == pytest.approx(0.02)
    assert 0.02 < cost.seconds(4, 10) < 0.04
    for _ in range(20):
        cost.observe(1, 10, 0.02)
        cost.observe(5, 10, 0.06)
    assert [cost.seconds(m, 10) for m in (1, 3, 5, 9)] == pytest.approx([0.02, 0.04, 0.06, 0.10], rel=0.05)


def test_what_steps_take_now_overrules_the_curve() -> None:
    cost = StepCost({512: {1: 10.0, 2: 15.0, 9: 16.0}})
    for _ in range(60):  # the machine has become twice as slow, and more so for many tokens
        cost.observe(1, 512, 20.0)
        cost.observe(9, 512, 48.0)
    assert cost.seconds(1, 512) == pytest.approx(20, rel=0.05) and cost.seconds(9, 512) == pytest.approx(48, rel=0.05)
    assert 30 < cost.seconds(2, 512) < 36  # the curve's bend is kept


def test_an_interruption_counts_little_and_is_forgotten() -> None:
    cost = StepCost()
    for _ in range(30):
        cost.observe(1, 0, 1.0)
        cost.observe(5, 0, 1.4)
    before = cost.seconds(5, 0)
    cost.observe(5, 0, 500.0)
    assert cost.seconds(5, 0) < 1.1 * before
    for _ in range(200):  # steps of five tokens are not made any more, and are not given up for that
        cost.observe(1, 0, 1.0)
    assert cost.seconds(5, 0) == pytest.approx(1.4, rel=0.1)


def test_a_line_through_nonsense_stays_above_zero() -> None:
    cost = StepCost()
    for _ in range(30):
        cost.observe(1, 0, 1.0)
        cost.observe(17, 0, 0.01)
    assert all(cost.seconds(m, 0) > 0 for m in range(1, 65))


@pytest.mark.parametrize("curves", [None, {64: {1: 1.0, 2: 1.1, 9: 2.0}}], ids=["untuned", "tuned"])
def test_short_drafts_after_a_slow_minute_do_not_make_long_ones_free(curves: dict | None) -> None:
    cost = StepCost(curves)
    for _ in range(60):
        cost.observe(1, 64, 4.0)
        for _ in range(6):
            cost.observe(2, 64, 1.1)
        assert all(cost.seconds(m, 64) >= cost.seconds(1, 64) / 2 > 0 for m in range(1, 65))
        assert best_length(0.5, 16, cost, 64)[1] < 4


@pytest.mark.parametrize(("rate", "accepted"), [(0.2, (1, 0, 0, 0)), (0.75, (3,)), (0.98, (49,))])
def test_acceptance_is_learned(rate: float, accepted: tuple[int, ...]) -> None:
    acceptance = Acceptance(0.5)
    for _ in range(60):
        for kept in accepted:
            acceptance.observe(kept + 1, kept)
    assert acceptance.rate == pytest.approx(rate, abs=0.02)


def test_drafts_accepted_whole_leave_no_doubt() -> None:
    acceptance = Acceptance(0.5)
    for _ in range(30):
        acceptance.observe(4, 4)
    assert acceptance.rate > 0.98


def test_the_recent_past_counts() -> None:
    acceptance = Acceptance(0.5)
    for _ in range(200):
        acceptance.observe(4, 4)
    for _ in range(40):
        acceptance.observe(4, 0)
    assert acceptance.rate < 0.75
    for _ in range(200):
        acceptance.observe(4, 0)
    assert acceptance.rate < 0.02


def test_refused_drafts_are_tried_again_less_and_less_often() -> None:
    acceptance = Acceptance(0.1)

    def refusals() -> int:
        count = 1
        while not acceptance.is_due():
            count += 1
        return count

    assert refusals() == LEAST_WAIT
    for expected in (16, 32, 64, 128, 256, 256):
        acceptance.observe(1, 0)
        assert refusals() == expected <= MOST_WAIT
    acceptance.observe(1, 1)
    assert refusals() == LEAST_WAIT
