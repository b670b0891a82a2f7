"""What looks wrong in a training run while it goes on, held to the run's own recent past.

Every bound is a median and deviations from it, by the median absolute deviation (Rousseeuw and Croux, 1993), so that
single wild values move none. Nothing is flagged before the window is full, and what was flagged is an incident: it is
not flagged again until the figure has been normal for a while. Values that are NaN or infinite are flagged and enter no
window.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, Protocol

from ryzen_compile.errors import ArtifactError

Kind = Literal[
    "loss_spike", "not_finite", "plateau", "gradient_explosion", "throughput_drop", "accuracy_drop"
]  # fmt: skip
DEVIATIONS = 6.0  # from the median, with WHOLE records to know it by; more with fewer
WHOLE = 50
MEDIAN_DEVIATION = 1.4826  # times the median absolute deviation is a standard deviation, for normal noise
MEAN_DEVIATION = 1.2533  # times the mean absolute deviation, the same
MEDIAN_ERROR = 1.2533  # standard error of a median of n normal values, times sqrt(n), in standard deviations
CALM = 0.1  # of the window: so many records in turn have to be normal before an incident is over
RECENT = 0.1  # of the window: throughput is the median of so many records, as single slow steps are normal
LOSS_RISE = 0.05  # of the median; less is no spike, however even the loss was, nor is LEAST_RISE nats
LEAST_RISE = 0.05
EXPLOSION = 10.0  # times the median gradient norm
SLOWED = 0.7  # of the median throughput
ACCURACY_LOST = 0.02  # of all tokens, or this share of the best:
ACCURACY_SHARE = 0.05
PLATEAU_WINDOWS = 5  # compared with as many before them
PLATEAU_NOISE = 0.5  # standard errors by which their medians have to differ at least


@dataclass(frozen=True)
class Anomaly:
    """``value`` is what came at ``step``, ``expected`` the number it was held to (none where any finite one would do),
    ``message`` both of them in a sentence."""

    kind: Kind
    step: int
    value: float
    expected: float | None
    message: str


class Observed(Protocol):
    """The figures of a step that are looked at (``metrics.BatchMetrics`` has them)."""

    @property
    def step(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def accuracy(self) -> float | None: ...
    @property
    def gradient_norm(self) -> float: ...
    @property
    def tokens_per_second(self) -> float: ...


class AnomalyDetector:
    """Looks at records in their order; ``window`` of them, WHOLE at least where trends are looked for, are
    what is normal.

    loss_spike: above the median by DEVIATIONS and LOSS_RISE. gradient_explosion: the same for the logarithm of the
    norm, and EXPLOSION times the median. not_finite: loss, gradient norm or validation loss. throughput_drop: the
    median of the last few records below SLOWED of the window before them. accuracy_drop: the window's median, or a
    validation's accuracy, below the best one so far. plateau: the median loss of PLATEAU_WINDOWS windows no lower than
    that of as many before.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._many = DEVIATIONS * max(1.0, math.sqrt(WHOLE / window))
        self._long = max(WHOLE, window)  # what slow figures are judged by: few records would tell too little
        self._calm = max(3, round(CALM * window))
        self._recent = max(3, round(RECENT * window))
        self._losses: deque[float] = deque(maxlen=2 * PLATEAU_WINDOWS * self._long)
        self._gradients: deque[float] = deque(maxlen=window)  # logarithms
        self._accuracies: deque[float] = deque(maxlen=self._long)
        self._speeds: deque[float] = deque(maxlen=window + self._recent)
        self._seen = 0  # losses
        self._best: dict[str, float] = {}  # accuracy: the window's median, and of validations
        self._open: dict[str, int] = {}  # incident -> how often in turn it looked normal since

    def observe(self, metrics: Observed) -> list[Anomaly]:
        """What is wrong with this record; it then counts as past."""
        found = [
            self._not_finite(metrics),
            self._loss(metrics.step, metrics.loss),
            self._plateau(metrics.step),
            self._gradient(metrics.step, metrics.gradient_norm),
            self._throughput(metrics.step, metrics.tokens_per_second),
            self._accuracy(metrics.step, metrics.accuracy),
        ]
        return [anomaly for anomaly in found if anomaly is not None]

    def validation(self, step: int, loss: float, accuracy: float | None) -> list[Anomaly]:
        """What is wrong with a validation after ``step``."""
        found = []
        if self._opens("not_finite of validation", not math.isfinite(loss), math.isfinite(loss), 1):
            found.append(_unbounded(step, {"validation loss": loss}))
        if accuracy is not None and math.isfinite(accuracy):
            found += self._below_best("validation accuracy", "the best validation so far", step, accuracy, 0.0, 1)
        return found

    def state(self) -> dict[str, Any]:
        """JSON, from which ``restore`` goes on exactly."""
        series = {name: list(values) for name, values in self._series().items()}
        return {**series, "seen": self._seen, "best": dict(self._best), "open": dict(self._open)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over a ``state``; of one with a larger window the latest values. Raises ``ArtifactError``."""
        try:
            for name, values in self._series().items():
                values.clear()
                values.extend(float(value) for value in state[name])
            self._seen = int(state["seen"])
            self._best = {str(name): float(value) for name, value in state["best"].items()}
            self._open = {str(name): int(value) for name, value in state["open"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"the state of the anomaly detector is damaged: {type(error).__name__}: {error}",
                hint="resume from another checkpoint",
            ) from error

    def _series(self) -> dict[str, deque[float]]:
        return {
            "losses": self._losses,
            "gradients": self._gradients,
            "accuracies": self._accuracies,
            "speeds": self._speeds,
        }

    def _not_finite(self, metrics: Observed) -> Anomaly | None:
        figures = {"loss": metrics.loss, "gradient norm": metrics.gradient_norm}
        wrong = {name: value for name, value in figures.items() if not math.isfinite(value)}
        return _unbounded(metrics.step, wrong) if self._opens("not_finite", bool(wrong), not wrong) else None

    def _loss(self, step: int, loss: float) -> Anomaly | None:
        if not math.isfinite(loss):
            return None
        past = list(self._losses)[-self.window :]
        self._losses.append(loss)
        self._seen += 1
        if len(past) < self.window:
            return None
        middle = median(past)
        margin, words = max(
            (self._many * _deviation(past, middle), f"{self._many:.2g} deviations"),
            (LOSS_RISE * abs(middle), f"{LOSS_RISE:.0%}"),
            (LEAST_RISE, f"{LEAST_RISE} nats"),
        )
        if not self._opens("loss_spike", loss > middle + margin, loss <= middle + margin / 2):
            return None
        bound = middle + margin
        return _held("loss_spike", "loss", step, loss, "most", bound, f"median of the last {self.window} + {words}")

    def _gradient(self, step: int, norm: float) -> Anomaly | None:
        if not math.isfinite(norm) or norm <= 0:  # of a norm of 0 there is no logarithm; it is no explosion either
            return None
        value, past = math.log(norm), list(self._gradients)
        self._gradients.append(value)
        if len(past) < self.window:
            return None
        middle = median(past)
        margin = max(self._many * _deviation(past, middle), math.log(EXPLOSION))
        if not self._opens("gradient_explosion", value > middle + margin, value <= middle + margin / 2):
            return None
        bound = math.exp(min(middle + margin, 700.0))  # exp(710) is no float64
        why = f"{math.exp(min(margin, 700.0)):.3g} times the median of the last {self.window}"
        return _held("gradient_explosion", "gradient norm", step, norm, "most", bound, why)

    def _throughput(self, step: int, speed: float) -> Anomaly | None:
        if not math.isfinite(speed):
            return None
        self._speeds.append(speed)
        if len(self._speeds) < self.window + self._recent:
            return None
        values = list(self._speeds)
        before, now = values[: self.window], median(values[self.window :])
        middle = median(before)
        # The median of a few records, not a single one, is compared: its error is smaller than their deviation.
        margin = self._many * MEDIAN_ERROR * _deviation(before, middle) / math.sqrt(self._recent)
        margin = max(margin, (1 - SLOWED) * middle)
        if not self._opens("throughput_drop", now < middle - margin, now >= middle - margin / 2):
            return None
        why = f"{(middle - margin) / middle:.2g} of the median of the {self.window} before the last {self._recent}"
        return _held("throughput_drop", "tokens per second", step, now, "least", middle - margin, why)

    def _accuracy(self, step: int, accuracy: float | None) -> Anomaly | None:
        if accuracy is None or not math.isfinite(accuracy):
            return None
        self._accuracies.append(accuracy)
        if len(self._accuracies) < self._long:
            return None
        values = list(self._accuracies)
        middle = median(values)
        error = MEDIAN_ERROR * _deviation(values, middle) / math.sqrt(self._long)
        where = f"the best median of {self._long} so far"
        found = self._below_best(f"median accuracy of {self._long}", where, step, middle, error, self._calm)
        return found[0] if found else None

    def _below_best(self, name: str, where: str, step: int, value: float, error: float, calm: int) -> list[Anomaly]:
        """``error``, the standard error of ``value``, is counted more often than elsewhere: the best of many medians is
        a flattering one."""
        best = self._best[name] = max(value, self._best.get(name, value))
        margin = max(2 * self._many * error, ACCURACY_LOST, ACCURACY_SHARE * best)
        if not self._opens(f"accuracy_drop of {name}", value < best - margin, value >= best - margin / 2, calm):
            return []
        return [_held("accuracy_drop", name, step, value, "least", best - margin, f"{where} - {margin:.2g}")]

    def _plateau(self, step: int) -> Anomaly | None:
        half = PLATEAU_WINDOWS * self._long
        if self._seen % self._long or len(self._losses) < 2 * half:
            return None
        values = list(self._losses)
        before, now = median(values[:half]), median(values[half:])
        noise = math.hypot(_deviation(values[:half], before), _deviation(values[half:], now))
        error = MEDIAN_ERROR * noise / math.sqrt(half)
        bound = before - PLATEAU_NOISE * error
        if not self._opens("plateau", now >= bound, now < before - 2 * error, 1):
            return None
        why = f"median of the {half} before them - {PLATEAU_NOISE:g} standard errors"
        return _held("plateau", f"median loss of the last {half}", step, now, "most", bound, why)

    def _opens(self, incident: str, bad: bool, normal: bool, calm: int | None = None) -> bool:
        """Whether an incident begins now. One is over when ``calm`` records in turn were normal; between normal and bad
        nothing changes."""
        if incident not in self._open:
            if bad:
                self._open[incident] = 0
            return bad
        self._open[incident] = self._open[incident] + 1 if normal else 0
        if self._open[incident] >= (self._calm if calm is None else calm):
            del self._open[incident]
        return False


def _deviation(values: Sequence[float], middle: float) -> float:
    """By the median, and by the mean where that is more: of a few values, or of shares of a few tokens, most may be
    equal by chance. One in ten can be wild without hiding the next."""
    distances = [abs(value - middle) for value in values]
    return max(MEDIAN_DEVIATION * median(distances), MEAN_DEVIATION * sum(distances) / len(distances))


def _unbounded(step: int, wrong: Mapping[str, float]) -> Anomaly:
    came = " and ".join(f"{name} {value}" for name, value in wrong.items())
    return Anomaly("not_finite", step, next(iter(wrong.values())), None, f"{came} at step {step}, expected a number")


def _held(kind: Kind, name: str, step: int, value: float, side: str, bound: float, why: str) -> Anomaly:
    message = f"{name} {value:.4g} at step {step}, expected at {side} {bound:.4g} ({why})"
    return Anomaly(kind, step, value, bound, message)
