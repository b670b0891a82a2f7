"""Statistics against values computed by hand, and whether an interval of a ratio means what it says."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from pydantic import ValidationError

from ryzen_compile.errors import UsageError
from ryzen_compile.validate.measured import INTERVAL_FROM, Measured, Spread, speed_up

RATIO = 3.0


# --- statistics -------------------------------------------------------------------------------------------------------
def test_statistics_by_hand() -> None:
    found = Spread.of([10, 1, 3, 2], "ms")
    assert (found.unit, found.count, found.mean, found.median) == ("ms", 4, 4, 2.5)
    assert (found.minimum, found.maximum) == (1, 10)
    assert found.stdev == pytest.approx(math.sqrt((9 + 4 + 1 + 36) / 3))
    # 95 % of the way from the first of four samples to the last is 2.85 steps: 3, and 0.85 of what is left up to 10.
    assert found.p95 == pytest.approx(3 + 0.85 * 7)


def test_a_percentile_falls_on_a_sample_where_there_is_one() -> None:
    assert Spread.of([float(one) for one in range(21)], "").p95 == 19


def test_one_sample_has_no_spread() -> None:
    found = Spread.of([2.5], "ms")
    assert (found.mean, found.median, found.p95, found.minimum, found.maximum) == (2.5,) * 5
    assert (found.count, found.stdev) == (1, 0)


def test_samples_of_any_numbers_become_json() -> None:
    found = Spread.of(list(np.array([1, 2], np.float32)), "tok/s")
    assert json.loads(found.model_dump_json())["mean"] == 1.5
    assert Spread.model_validate_json(found.model_dump_json()) == found


def test_no_samples_have_no_statistics() -> None:
    with pytest.raises(UsageError, match="at least one sample, got none"):
        Spread.of([], "ms")


# --- ratios -----------------------------------------------------------------------------------------------------------
def test_a_ratio_is_that_of_the_medians() -> None:
    found = speed_up([6, 2, 10], [1, 2, 4])
    assert (found.value, found.unit, found.samples) == (3, "x", 3)  # neither 18/7 of the means nor 2.5 of the ratios
    assert speed_up([1, 2, 4], [6, 2, 10]).value == pytest.approx(1 / 3)


def test_few_rounds_bound_nothing() -> None:
    few, enough = [3.0] * (INTERVAL_FROM - 1), [3.0] * INTERVAL_FROM
    assert speed_up(few, few).low is speed_up(few, few).high is None
    assert (speed_up(enough, enough).low, speed_up(enough, enough).high) == (1, 1)


def test_the_same_samples_give_the_same_interval() -> None:
    random = np.random.default_rng(0)
    theirs, own = random.uniform(2, 4, 9).tolist(), random.uniform(1, 2, 9).tolist()
    found = speed_up(theirs, own)
    assert found == speed_up(theirs, own)
    assert found.low is not None and found.high is not None and found.low < found.value < found.high


def coverage(truth: float, experiments: int = 200, rounds: int = 21) -> float:
    """How often the interval holds ``truth`` where both engines' times spread by a tenth, and the ratio is RATIO."""
    random = np.random.default_rng(11)
    held = 0
    for _ in range(experiments):
        own = np.exp(random.normal(0, 0.1, rounds))
        theirs = RATIO * np.exp(random.normal(0, 0.1, rounds))
        found = speed_up(theirs.tolist(), own.tolist())
        assert found.low is not None and found.high is not None
        held += found.low <= truth <= found.high
    return held / experiments


def test_an_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    # 95 % is the limit for many rounds; of 200 experiments the share itself spreads by 0.015.
    assert 0.9 <= coverage(RATIO) <= 0.99


def test_an_interval_does_not_hold_another_ratio() -> None:
    """The control: intervals so wide that they always hold the truth would hold this, too."""
    assert coverage(RATIO * 1.2) < 0.05


def width(found: Measured) -> float:
    assert found.low is not None and found.high is not None
    return found.high - found.low


def test_what_meets_both_engines_does_not_widen_the_interval() -> None:
    random = np.random.default_rng(3)
    weather = np.exp(random.normal(0, 0.5, 31))  # the machine's, the same for both in a round
    own, theirs = weather * np.exp(random.normal(0, 0.01, 31)), RATIO * weather * np.exp(random.normal(0, 0.01, 31))
    paired = speed_up(theirs.tolist(), own.tolist())
    unpaired = speed_up(random.permutation(theirs).tolist(), own.tolist())
    assert paired.value == unpaired.value
    assert width(paired) < 0.2 * width(unpaired)
    exact = speed_up((RATIO * weather).tolist(), weather.tolist())
    assert (exact.value, exact.low, exact.high) == pytest.approx((RATIO,) * 3)


def test_one_slow_round_moves_neither_ratio_nor_interval_far() -> None:
    own = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01, 0.99]
    found = speed_up([3.0] * 8 + [300.0], own)
    assert found.value == 3 and width(found) < 0.2


@pytest.mark.parametrize(("theirs", "own"), [([], []), ([1.0], []), ([], [1.0]), ([1.0, 2.0], [1.0])])
def test_samples_that_do_not_pair_up(theirs: list[float], own: list[float]) -> None:
    with pytest.raises(UsageError, match=f"in pairs, got {len(theirs)} and {len(own)}"):
        speed_up(theirs, own)


# --- a value ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("measured", "text"),
    [
        (Measured(value=7.4123, low=7.0199, high=7.9311, unit="x"), "7.412 x (7.02 to 7.931)"),
        (Measured(value=7.4123, unit="ms"), "7.412 ms"),
        (Measured(value=7.4123, low=7.0199, unit="ms"), "7.412 ms"),
        (Measured(value=0.5), "0.5"),
        (Measured(value=123456, low=1, high=2, unit="bytes"), "1.235e+05 bytes (1 to 2)"),
        (Measured(value=math.nan, unit="share"), "nan share"),
    ],
)
def test_a_value_as_text(measured: Measured, text: str) -> None:
    assert measured.to_text() == text


def test_numbers_that_json_lacks_come_back() -> None:
    for value in (math.nan, math.inf, -math.inf):
        written = Measured(value=value, high=value).model_dump_json()
        assert "NaN" in written or "Infinity" in written
        json.loads(written, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        found = Measured.model_validate_json(written)
        assert repr(found.value) == repr(found.high) == repr(value) and found.low is None


def test_a_value_does_not_change_and_has_no_other_fields() -> None:
    found = Measured(value=1)
    with pytest.raises(ValidationError, match="frozen"):
        found.value = 2
    with pytest.raises(ValidationError, match="Extra inputs"):
        Measured(value=1, error=0.5)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Measured(value=1, samples=0)
