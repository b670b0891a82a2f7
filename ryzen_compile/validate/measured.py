"""What was measured, with its spread: ratios of engines that took turns, and statistics of samples."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np
from pydantic import Field

from ryzen_compile.errors import UsageError
from ryzen_compile.fields import Fields, Number

RESAMPLES = 2000
INTERVAL_FROM = 4  # rounds; fewer say too little about their own spread


class Measured(Fields):
    """A value with its 95 % confidence interval, where enough was measured for one."""

    value: Number
    low: Number | None = Field(default=None, description="lower end of the 95 % interval")
    high: Number | None = Field(default=None, description="upper end of the 95 % interval")
    unit: str = Field(
        default="", description='"x" for ratios, "share", "ms", "tok/s", "bytes"; empty for plain numbers'
    )
    samples: int = Field(default=1, ge=1, description="rounds, windows or tests that it was computed from")

    def to_text(self) -> str:
        """``7.41 x (7.02 to 7.93)``."""
        text = f"{self.value:.4g}{' ' + self.unit if self.unit else ''}"
        return text if self.low is None or self.high is None else f"{text} ({self.low:.4g} to {self.high:.4g})"


class Spread(Fields):
    """Statistics of samples in one unit; ``stdev`` is the sample standard deviation, 0 for a single one."""

    unit: str
    count: int = Field(ge=1)
    mean: float
    median: float
    p95: float = Field(description="95th percentile, between samples by linear interpolation")
    stdev: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, samples: Sequence[float], unit: str) -> Spread:
        """Raises ``UsageError`` for no samples."""
        if not samples:
            raise UsageError("statistics need at least one sample, got none")
        values = [float(sample) for sample in samples]
        return cls(
            unit=unit,
            count=len(values),
            mean=statistics.fmean(values),
            median=statistics.median(values),
            p95=float(np.percentile(values, 95)),
            stdev=statistics.stdev(values) if len(values) > 1 else 0.0,
            minimum=min(values),
            maximum=max(values),
        )


def speed_up(baseline: Sequence[float], ours: Sequence[float]) -> Measured:
    """How many times faster ``ours`` is: the median of ``baseline``'s seconds over that of ours.

    Sample i of both is from round i of one run, in which the two took turns; rounds are resampled together (the
    percentile bootstrap of Efron, 1979, with a fixed seed), so that a slow minute that met both does not widen the
    interval. There is none below ``INTERVAL_FROM`` rounds. Raises ``UsageError`` for samples that do not pair up.
    """
    if len(baseline) != len(ours) or not baseline:
        raise UsageError(f"a ratio needs samples in pairs, got {len(baseline)} and {len(ours)}")
    theirs, own = np.asarray(baseline, float), np.asarray(ours, float)
    low, high = _interval(lambda rounds: np.median(theirs[rounds], axis=1) / np.median(own[rounds], axis=1), len(own))
    return Measured(value=float(np.median(theirs) / np.median(own)), low=low, high=high, unit="x", samples=len(own))


def median_of(samples: Sequence[float], unit: str) -> Measured:
    """The median of ``samples``, with the interval that resampling them gives; see ``speed_up``."""
    if not len(samples):
        raise UsageError("a median needs at least one sample, got none")
    values = np.asarray(samples, float)
    low, high = _interval(lambda rounds: np.median(values[rounds], axis=1), len(values))
    return Measured(value=float(np.median(values)), low=low, high=high, unit=unit, samples=len(values))


def _interval(statistic: Callable[[np.ndarray], np.ndarray], count: int) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of ``statistic``, which takes indices of rounds ``(RESAMPLES, count)`` to a value for each."""
    if count < INTERVAL_FROM:
        return None, None
    rounds = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    low, high = np.percentile(statistic(rounds), (2.5, 97.5))
    return float(low), float(high)
