"""The learning rate as a function of the step alone: a resumed run needs nothing but its position."""

from __future__ import annotations

import math

from ryzen_compile.train.config import ScheduleSettings


def rate(step: int, steps: int, settings: ScheduleSettings) -> float:
    """The share of the peak, 0 to 1, with which step ``step`` (from 0) of ``steps`` is taken.

    A linear rise over the warm-up ends at 1; then half a cosine, a line, or, for "wsd", the peak and a line in the last
    ``decay`` of what is left (Hu et al., 2024), to ``last``.
    """
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    rest = max(1, steps - settings.warmup)
    done = min(1.0, (step - settings.warmup) / rest)
    if settings.kind == "constant":
        return 1.0
    if settings.kind == "cosine":
        fallen = 0.5 * (1 - math.cos(math.pi * done))
    elif settings.kind == "linear":
        fallen = done
    else:
        fallen = max(0.0, (done - (1 - settings.decay)) / settings.decay)
    return 1 - (1 - settings.last) * fallen
