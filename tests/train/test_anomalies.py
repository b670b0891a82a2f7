"""What is flagged, once and with the number it was held to, and above all what is not."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from ryzen_compile.errors import ArtifactError
from ryzen_compile.train.anomalies import WHOLE, Anomaly, AnomalyDetector
from ryzen_compile.train.metrics import BatchMetrics

NAN, INF = math.nan, math.inf
CURVES: dict[str, Callable[[int], float]] = {  # nats per token after a step, of 2,000
    "power law": lambda step: 1.5 + 8.5 * step**-0.3,
    "exponential": lambda step: 2.5 + 7.5 * math.exp(-step / 500),
    "cosine": lambda step: 4 + 3 * math.cos(math.pi * step / 2000) + 3 * math.exp(-step / 50),
}


def ordinary(
    seed: int = 0,
    steps: int = 2000,
    curve: Callable[[int], float] = CURVES["power law"],
    noise: float = 0.05,
    tokens: int = 1000,
) -> Iterator[BatchMetrics]:
    """A run as they are: the first step compiles, every 100th one waits for a checkpoint, gradients rise with the rate
    in the warm-up, ``tokens`` a step decide the accuracy."""
    r = random.Random(seed)
    for step in range(1, steps + 1):
        mean = curve(step)
        share = max(0.0, 0.75 - 0.07 * mean)
        hits = round(r.gauss(share * tokens, math.sqrt(share * (1 - share) * tokens)))
        speed = 2000 * math.exp(r.gauss(0, 0.1)) * (0.01 if step == 1 else 0.1 if step % 100 == 0 else 1)
        yield BatchMetrics(
            step=step,
            epoch=step / 2000,
            tokens=step * tokens,
            loss=mean + r.gauss(0, noise),
            accuracy=min(max(hits, 0), tokens) / tokens,
            learning_rate=3e-4 * min(1, step / 100),
            gradient_norm=(1 + 5 * math.exp(-step / 100)) * math.exp(r.gauss(0, 0.4)) * min(1, step / 100),
            tokens_per_second=speed,
            batch_seconds=tokens / speed,
            memory_bytes=1 << 30,
        )


def flagged(detector: AnomalyDetector, run: list[BatchMetrics] | Iterator[BatchMetrics]) -> list[Anomaly]:
    return [anomaly for metrics in run for anomaly in detector.observe(metrics)]


def changed(run: Iterator[BatchMetrics], **series: Callable[[int, float], float]) -> list[BatchMetrics]:
    """Figures as functions of step and what they were."""
    return [
        replace(metrics, **{name: f(metrics.step, getattr(metrics, name)) for name, f in series.items()})
        for metrics in run
    ]


@pytest.mark.parametrize("window", [5, 50, 83])
@pytest.mark.parametrize("curve", list(CURVES))
def test_nothing_is_wrong_with_an_ordinary_run(window: int, curve: str) -> None:
    for seed in range(3):
        noise = (0.01, 0.05, 0.15)[seed]
        run = ordinary(seed, curve=CURVES[curve], noise=noise, tokens=(1000, 8, 64)[seed])
        assert flagged(AnomalyDetector(window), run) == []


def test_a_spike_of_the_loss_is_flagged_once_with_its_bound() -> None:
    detector = AnomalyDetector(50)
    run = changed(ordinary(steps=400), loss=lambda step, x: 9.0 if 300 <= step < 304 else x)
    (found,) = flagged(detector, run)
    past = sorted(metrics.loss for metrics in run[249:299])
    assert (found.kind, found.step, found.value) == ("loss_spike", 300, 9.0)
    assert past[-1] < found.expected < past[25] + 1
    bound = f"{found.expected:.4g}"
    assert found.message == f"loss 9 at step 300, expected at most {bound} (median of the last 50 + 6 deviations)"


def test_a_second_spike_after_calm_is_another_incident() -> None:
    spikes = {300: 9.0, 301: 2.0, 302: 9.0, 320: 9.0}  # 302: not yet back to normal
    run = changed(ordinary(steps=400), loss=spikes.get)
    assert [a.step for a in flagged(AnomalyDetector(50), run)] == [300, 320]


def test_a_loss_that_stays_high_is_one_incident_and_then_normal() -> None:
    run = changed(ordinary(steps=900), loss=lambda step, x: x + 6 if step >= 300 else x)
    kinds = [a.kind for a in flagged(AnomalyDetector(50), run)]
    assert kinds.count("loss_spike") == 1


def test_nothing_is_flagged_before_the_window_is_full() -> None:
    """A spike on the last record before, and on the first after."""
    for step, expected in ((50, []), (51, ["loss_spike", "gradient_explosion"])):
        run = changed(
            ordinary(steps=60, curve=lambda step: 5.0),
            loss=lambda s, x, step=step: 50.0 if s == step else x,
            gradient_norm=lambda s, x, step=step: 1e6 if s == step else 1.0,
        )
        assert [a.kind for a in flagged(AnomalyDetector(50), run)] == expected


def test_an_even_loss_does_not_make_small_rises_spikes() -> None:
    run = changed(ordinary(steps=300), loss=lambda step, x: 4.1 if step == 200 else 4.0)
    assert flagged(AnomalyDetector(50), run) == []
    run = changed(ordinary(steps=300), loss=lambda step, x: 4.3 if step == 200 else 4.0)
    assert [a.kind for a in flagged(AnomalyDetector(50), run)] == ["loss_spike"]


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=["nan", "inf", "minus-inf"])
@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_a_number_that_is_none_is_flagged_at_once_and_spoils_no_window(name: str, value: float) -> None:
    detector, clean = AnomalyDetector(50), AnomalyDetector(50)
    wrong = {3, 150, 151, 170}
    run = changed(ordinary(steps=400), **{name: lambda step, x: value if step in wrong else x})
    found = flagged(detector, run)
    assert [(a.kind, a.step, a.expected) for a in found] == [("not_finite", s, None) for s in (3, 150, 170)]
    assert f"{name.replace('_', ' ')} {value} at step 3" in found[0].message
    # The rest of the state is that of a run without these steps' figure.
    flagged(clean, [m for m in run if m.step not in wrong])
    key = {"loss": "losses", "gradient_norm": "gradients"}[name]
    assert detector.state()[key] == clean.state()[key]


def test_a_run_of_nothing_but_nan_is_one_incident() -> None:
    run = changed(ordinary(steps=300), loss=lambda *_: NAN, gradient_norm=lambda *_: NAN)
    (found,) = flagged(AnomalyDetector(50), run)
    assert found.step == 1 and "loss nan and gradient norm nan" in found.message


def test_a_gradient_that_explodes() -> None:
    run = changed(ordinary(steps=400), gradient_norm=lambda step, x: x * (1e3 if step >= 300 else 1))
    found = flagged(AnomalyDetector(50), run)
    assert [a.kind for a in found] == ["gradient_explosion"] and 300 <= found[0].step <= 302
    assert found[0].value > found[0].expected > 5
    five_times = changed(ordinary(steps=400), gradient_norm=lambda step, x: x * (5 if step >= 300 else 1))
    assert flagged(AnomalyDetector(50), five_times) == []


@pytest.mark.parametrize("norm", [0.0, 1e300])
def test_gradients_of_any_size_are_looked_at(norm: float) -> None:
    run = changed(ordinary(steps=200), gradient_norm=lambda step, x: norm)
    assert flagged(AnomalyDetector(50), run) == []


def test_a_drop_of_throughput_that_lasts() -> None:
    run = changed(ordinary(steps=400), tokens_per_second=lambda step, x: x * (0.4 if step >= 250 else 1))
    (found,) = flagged(AnomalyDetector(50), run)
    assert found.kind == "throughput_drop" and 250 <= found.step <= 255
    assert found.value < found.expected < 2000 and "tokens per second" in found.message
    # Back, and down again: another incident.
    run = changed(ordinary(steps=600), tokens_per_second=lambda s, x: x * (0.4 if s // 100 in (2, 4) else 1))
    assert [a.kind for a in flagged(AnomalyDetector(50), run)] == ["throughput_drop"] * 2


def test_a_slow_beginning_is_no_drop() -> None:
    """Warm-up: half the window at a tenth of the speed, then at full speed; and two slow steps in a row later on."""
    slow = set(range(1, 26)) | {200, 201}
    run = changed(ordinary(steps=400), tokens_per_second=lambda step, x: x / 10 if step in slow else x)
    assert flagged(AnomalyDetector(50), run) == []


def test_a_plateau_is_flagged_after_several_windows_and_again_after_progress() -> None:
    flat = changed(ordinary(steps=2000), loss=lambda step, x: x - CURVES["power law"](step) + 3)
    found = flagged(AnomalyDetector(50), flat)
    assert [a.kind for a in found] == ["plateau"] and 500 <= found[0].step <= 1500
    assert found[0].value == pytest.approx(3, abs=0.02)  # standard error of 250 values with noise 0.05: 0.004
    steps = changed(ordinary(steps=3000), loss=lambda step, x: x - CURVES["power law"](step) + 3 - (step > 1500))
    assert [a.kind for a in flagged(AnomalyDetector(50), steps)] == ["plateau", "plateau"]


def test_a_constant_loss_is_a_plateau_and_a_falling_one_without_noise_is_none() -> None:
    constant = changed(ordinary(steps=600), loss=lambda *_: 3.0)
    assert [a.kind for a in flagged(AnomalyDetector(50), constant)] == ["plateau"]
    falling = changed(ordinary(steps=2000), loss=lambda step, _: 3.0 - 1e-5 * step)
    assert flagged(AnomalyDetector(50), falling) == []


def test_a_drop_of_the_batch_accuracy() -> None:
    run = changed(ordinary(steps=900), accuracy=lambda step, x: x - 0.15 if step >= 600 else x)
    (found,) = flagged(AnomalyDetector(50), run)
    assert found.kind == "accuracy_drop" and 600 < found.step <= 650
    assert found.value < found.expected and "median accuracy of 50" in found.message
    single = changed(ordinary(steps=900), accuracy=lambda step, x: 0.0 if step % 10 == 0 else x)
    assert flagged(AnomalyDetector(50), single) == []


def test_runs_without_accuracy() -> None:
    run = [replace(metrics, accuracy=None) for metrics in ordinary(steps=200)]
    assert flagged(AnomalyDetector(50), run) == []


def test_validations_are_held_to_the_best_one() -> None:
    detector = AnomalyDetector(50)
    accuracies = [0.30, 0.41, 0.40, 0.35, 0.34, 0.405, 0.42, 0.2]
    found = [detector.validation(100 * i, 3.0, a) for i, a in enumerate(accuracies)]
    assert [[a.kind for a in f] for f in found] == [[], [], [], ["accuracy_drop"], [], [], [], ["accuracy_drop"]]
    assert found[3][0].expected == pytest.approx(0.41 - 0.41 * 0.05)
    assert found[3][0].message.startswith("validation accuracy 0.35 at step 300, expected at least 0.3895 (the best")


def test_a_validation_that_is_not_finite() -> None:
    detector = AnomalyDetector(5)
    kinds = [[a.kind for a in detector.validation(s, loss, NAN)] for s, loss in enumerate((2.0, NAN, INF, 2.0, NAN))]
    assert kinds == [[], ["not_finite"], [], [], ["not_finite"]]
    assert [a.kind for a in detector.validation(9, NAN, None)] == []  # still the same incident


@pytest.mark.parametrize("at", [1, 49, 320, 602, 705])
def test_a_restored_detector_flags_what_the_first_one_would_have(at: int) -> None:
    """Through JSON, at every kind of moment: empty, filling, during incidents, after them."""
    run = changed(
        ordinary(steps=1200),
        loss=lambda step, x: NAN if step in (700, 704, 720) else 30.0 if step in (318, 322, 340) else x,
        accuracy=lambda step, x: x - 0.15 if step >= 600 else x,
        tokens_per_second=lambda step, x: x * (0.3 if 600 <= step < 700 else 1),
    )
    straight, first, second = (AnomalyDetector(50) for _ in range(3))
    for detector in (straight, first):
        detector.validation(0, 3.0, 0.5)
    expected = flagged(straight, run)
    found = flagged(first, run[:at])
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    found += flagged(second, run[at:])
    assert repr(found) == repr(expected)  # NaN does not equal itself
    assert Counter(a.kind for a in found) == {
        "loss_spike": 2,
        "not_finite": 2,
        "accuracy_drop": 1,
        "throughput_drop": 1,
    }
    assert second.state() == straight.state()
    assert repr(second.validation(1, 3.0, 0.4)) == repr(straight.validation(1, 3.0, 0.4)) != "[]"


def test_a_state_for_another_window_gives_its_latest_values() -> None:
    wide, narrow = AnomalyDetector(200), AnomalyDetector(10)
    flagged(wide, ordinary(steps=300))
    narrow.restore(wide.state())
    assert narrow.state()["gradients"] == wide.state()["gradients"][-10:]
    assert len(narrow.state()["accuracies"]) == WHOLE


@pytest.mark.parametrize("damage", [{}, {"losses": ["x"]}, {"best": 3}, {"open": {"a": None}}], ids=str)
def test_a_damaged_state_is_refused(damage: dict) -> None:
    state = {**AnomalyDetector(10).state(), **damage} if damage else {}
    with pytest.raises(ArtifactError, match="state of the anomaly detector is damaged"):
        AnomalyDetector(10).restore(state)
