"""Which way each threshold points, what missing it means, and what a file may say of it."""

from __future__ import annotations

import pytest

from ryzen_compile.errors import ConfigError
from ryzen_compile.settings import parse_settings, read_settings
from ryzen_compile.validate.measured import Measured
from ryzen_compile.validate.outcome import judge
from ryzen_compile.validate.thresholds import ADVISORY, AT_MOST, Thresholds

NAMES = [name for name in Thresholds.model_fields if name != "tolerance"]
# A value that is better than every default, and one that is worse, whichever way the threshold points.
BETTER = {name: 1e-6 if name in AT_MOST else 1e6 for name in NAMES}
WORSE = {name: 1e6 if name in AT_MOST else 1e-6 for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_defaults_can_be_met_and_missed(name: str) -> None:
    target = Thresholds().target(name)
    assert target is not None and target.tolerance == 0
    assert judge(Measured(value=target.value), target)[0] == "PASS"
    assert judge(Measured(value=BETTER[name]), target)[0] == "PASS"
    missed = "WARN" if name in ("ttft_ms", "tokens_per_second") else "FAIL"
    assert judge(Measured(value=WORSE[name]), target)[0] == missed


def test_less_is_better_for_losses_and_times_alone() -> None:
    downwards = {name for name in NAMES if not Thresholds().target(name).at_least}  # type: ignore[union-attr]
    assert downwards == {"accuracy_loss", "ttft_ms"} == set(AT_MOST)
    assert {*AT_MOST, *ADVISORY} <= set(NAMES), "each names a threshold"


@pytest.mark.parametrize("name", NAMES)
def test_a_threshold_of_none_is_not_checked(name: str) -> None:
    thresholds = Thresholds(**{name: None})
    assert thresholds.target(name) is None
    assert all(thresholds.target(other) is not None for other in NAMES if other != name)


def test_a_tolerance_is_for_all() -> None:
    thresholds = Thresholds(tolerance=0.25, end_to_end_speedup=4)
    assert {thresholds.target(name).tolerance for name in NAMES} == {0.25}  # type: ignore[union-attr]
    target = thresholds.target("end_to_end_speedup")
    assert target is not None
    assert [judge(Measured(value=value), target)[0] for value in (4, 3, 2.99)] == ["PASS", "WARN", "FAIL"]


def test_there_is_no_target_of_another_name() -> None:
    with pytest.raises(AttributeError):
        Thresholds().target("kernel_speedups")


def test_what_a_file_says(tmp_path) -> None:
    path = tmp_path / "thresholds.yaml"
    path.write_text("kernel_speedup: 2.5\naccuracy_loss: 1e-3\nttft_ms: null\ntolerance: 0.05\n")
    found = read_settings(Thresholds, path, ["compression_ratio=3"])
    assert (found.kernel_speedup, found.accuracy_loss, found.ttft_ms, found.compression_ratio) == (2.5, 1e-3, None, 3)
    assert found.end_to_end_speedup == Thresholds().end_to_end_speedup


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kernel_speed_up": 2}, "there is no such setting, the nearest is 'kernel_speedup'"),
        ({"kernel_speedup": 0}, "kernel_speedup: Input should be greater than 0"),
        ({"kv_memory_saving": 30}, "less than or equal to 1"),
        ({"test_pass_rate": -0.1}, "greater than or equal to 0"),
        ({"accuracy_loss": float("nan")}, "finite number"),
        ({"ttft_ms": float("inf")}, "finite number"),
        ({"tolerance": 2}, "less than or equal to 1"),
        ({"tolerance": None}, "tolerance"),
        ({"speculation_speedup": "fast"}, "valid number"),
    ],
)
def test_what_a_file_may_not_say(given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_settings(Thresholds, given)
