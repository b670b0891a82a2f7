"""The learning rate's shape: where it rises, where it stays, where it ends."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ryzen_compile.train.config import ScheduleSettings
from ryzen_compile.train.schedule import rate

KINDS = get_args(ScheduleSettings.model_fields["kind"].annotation)


def shape(steps: int, **settings: object) -> list[float]:
    """The share of the peak in every step of a run."""
    chosen = ScheduleSettings(**settings)  # type: ignore[arg-type]
    return [rate(step, steps, chosen) for step in range(steps)]


@given(
    kind=st.sampled_from(KINDS),
    steps=st.integers(1, 60),
    warmup=st.integers(0, 80),
    last=st.floats(0, 1),
    decay=st.floats(0.01, 1),
)
def test_it_rises_to_the_peak_and_never_again(kind: str, steps: int, warmup: int, last: float, decay: float) -> None:
    """Equal rises over the warm-up; from then on never up, never below ``last`` (to 1e-12)."""
    shares = shape(steps, kind=kind, warmup=warmup, last=last, decay=decay)
    assert all(0 <= share <= 1 for share in shares)
    rise, rest = shares[:warmup], shares[warmup:]
    assert rise == [(step + 1) / warmup for step in range(len(rise))]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(rest))
    assert all(share >= last - 1e-12 for share in rest)
    if rest:
        assert rest[0] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_behind_the_warm_up_is_the_peak(kind: str) -> None:
    shares = shape(50, kind=kind, warmup=10)
    assert shares[9] == shares[10] == 1
    assert shares[8] == pytest.approx(0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_step_is_the_peak(kind: str) -> None:
    assert shape(5, kind=kind, warmup=0)[0] == 1
    assert shape(1, kind=kind, warmup=0) == [1]


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"constant"}))
def test_it_would_be_at_its_last_value_one_step_behind_the_run(kind: str) -> None:
    settings = ScheduleSettings(kind=kind, warmup=7, last=0.1)
    assert rate(40, 40, settings) == pytest.approx(0.1, abs=1e-12)
    assert rate(39, 40, settings) > 0.1
    assert rate(400, 40, settings) == pytest.approx(0.1, abs=1e-12)


def test_values_between_the_ends() -> None:
    """A quarter of the way down, halfway, three quarters: what the formulas say, to 1e-12."""
    middle = [0.25, 0.5, 0.75]
    for kind, fallen in {
        "cosine": [0.5 * (1 - math.cos(math.pi * share)) for share in middle],
        "linear": middle,
        "wsd": [0, 0, 0.5],  # the fall is the last half
        "constant": [0, 0, 0],
    }.items():
        settings = ScheduleSettings(kind=kind, warmup=0, last=0.2, decay=0.5)
        found = [rate(step, 40, settings) for step in (10, 20, 30)]
        assert found == pytest.approx([1 - 0.8 * part for part in fallen], abs=1e-12), kind


def test_wsd_stays_at_the_peak_until_its_decay() -> None:
    shares = shape(110, kind="wsd", warmup=10, last=0.0, decay=0.2)
    assert shares[10:91] == [1.0] * 81
    assert shares[91:] == pytest.approx([1 - part / 20 for part in range(1, 20)])


def test_constant_knows_no_last_value() -> None:
    assert set(shape(20, kind="constant", warmup=0, last=0.0)) == {1.0}


def test_a_run_within_its_warm_up_only_rises() -> None:
    assert shape(3, warmup=100) == [0.01, 0.02, 0.03]


def test_the_rate_depends_on_nothing_but_the_step() -> None:
    settings = ScheduleSettings(warmup=3)
    forwards = [rate(step, 20, settings) for step in range(20)]
    assert [rate(step, 20, settings) for step in reversed(range(20))] == forwards[::-1]
