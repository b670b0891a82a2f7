"""The verdict that follows from what was measured and what was wanted."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from pydantic import ValidationError

from ryzen_compile.validate.measured import Measured
from ryzen_compile.validate.outcome import STATUSES, Outcome, Status, Target, failed, judge


def interval(value: float, low: float | None = None, high: float | None = None) -> Measured:
    return Measured(value=value, low=low, high=high, unit="x")


@pytest.mark.parametrize(
    ("measured", "target", "status"),
    [
        # At least 3.
        (interval(3.0), Target(value=3), "PASS"),
        (interval(2.9999), Target(value=3), "FAIL"),
        (interval(3.5, 3.0, 4.0), Target(value=3), "PASS"),
        (interval(3.5, 2.99, 4.0), Target(value=3), "WARN"),
        (interval(2.9, 2.5, 3.5), Target(value=3), "FAIL"),  # an interval excuses nothing
        (interval(math.inf), Target(value=3), "PASS"),
        (interval(-math.inf), Target(value=3), "FAIL"),
        (interval(math.nan), Target(value=3), "FAIL"),
        # At most 0.01.
        (interval(0.01), Target(value=0.01, at_least=False), "PASS"),
        (interval(0.0101), Target(value=0.01, at_least=False), "FAIL"),
        (interval(-0.5), Target(value=0.01, at_least=False), "PASS"),
        (interval(0.005, 0.001, 0.01), Target(value=0.01, at_least=False), "PASS"),
        (interval(0.005, 0.001, 0.011), Target(value=0.01, at_least=False), "WARN"),
        (interval(math.nan), Target(value=0.01, at_least=False), "FAIL"),
        # A tolerance is a share of the target.
        (interval(2.8), Target(value=3, tolerance=0.1), "WARN"),
        (interval(2.6), Target(value=3, tolerance=0.1), "FAIL"),
        (interval(0.75), Target(value=1, tolerance=0.25), "WARN"),  # exactly: of what floats hold exactly
        (interval(0.012), Target(value=0.01, at_least=False, tolerance=0.25), "WARN"),
        (interval(0.013), Target(value=0.01, at_least=False, tolerance=0.25), "FAIL"),
        (interval(math.nan), Target(value=3, tolerance=1), "FAIL"),
        (interval(3.5, 2.0, 4.0), Target(value=3, tolerance=0.5), "WARN"),
        # Nothing is a share of nothing.
        (interval(1e-9), Target(value=0, at_least=False, tolerance=1), "FAIL"),
        (interval(0.0), Target(value=0, at_least=False), "PASS"),
        # Of a target for a machine, a miss warns.
        (interval(0.1), Target(value=25, advisory=True), "WARN"),
        (interval(math.nan), Target(value=25, advisory=True), "WARN"),
        (interval(26.0), Target(value=25, advisory=True), "PASS"),
        # Only the end that could miss counts.
        (interval(3.5, None, 4.0), Target(value=3), "PASS"),
        (interval(3.5, 3.1, math.nan), Target(value=3), "PASS"),
        (interval(3.5, math.nan, 4.0), Target(value=3), "WARN"),
    ],
)
def test_verdicts(measured: Measured, target: Target, status: Status) -> None:
    found, why = judge(measured, target)
    assert found == status
    assert bool(why) == (status != "PASS"), "whatever is no plain pass says why"


def test_reasons_name_what_came_and_what_was_expected() -> None:
    assert judge(interval(2.5), Target(value=3)) == ("FAIL", "2.5 x, expected >= 3")
    assert judge(interval(2.5), Target(value=3, tolerance=0.25)) == (
        "WARN", "2.5 x, expected >= 3; within the tolerance of 25%",
    )  # fmt: skip
    assert judge(interval(0.02), Target(value=0.01, at_least=False)) == ("FAIL", "0.02 x, expected <= 0.01")
    assert judge(interval(3.5, 2.5, 4), Target(value=3)) == (
        "WARN", "3.5 x (2.5 to 4): the interval reaches beyond >= 3",
    )  # fmt: skip


def outcome(status: Status) -> Outcome:
    return Outcome(component="passes", check=f"one that is {status}", status=status)


def test_only_failures_fail() -> None:
    outcomes = [outcome(status) for status in (*STATUSES, "FAIL")]
    assert [one.status for one in failed(outcomes)] == ["FAIL", "FAIL"]
    assert failed(iter(outcomes)) == failed(outcomes) and failed([]) == []
    assert get_args(Status) == STATUSES


def test_an_outcome_comes_back_from_json() -> None:
    whole = Outcome(
        component="kv_cache", check="kv_memory_saving", status="FAIL", measured=interval(math.nan, -math.inf, 2),
        target=Target(value=0.3), reason="a layer's", culprit="layer 3", command="ryzen-compile validate", seconds=1.5,
        details={"layers": [1, 2.5, None], "inner": {"a": True}},
    )  # fmt: skip
    assert repr(Outcome.model_validate_json(whole.model_dump_json())) == repr(whole)  # NaN equals nothing
    least = outcome("SKIPPED")
    assert Outcome.model_validate_json(least.model_dump_json()) == least
    assert least.measured is least.target is None and (least.reason, least.details) == ("", {})


@pytest.mark.parametrize(
    "given", [{"status": "OK"}, {"component": "kernel"}, {"seconds": -1}, {"passed": True}, {"status": "pass"}]
)
def test_outcomes_that_are_none(given: dict) -> None:
    with pytest.raises(ValidationError):
        Outcome(**{"component": "tests", "check": "x", "status": "PASS", **given})


def test_a_tolerance_is_not_negative() -> None:
    with pytest.raises(ValidationError):
        Target(value=1, tolerance=-0.1)
