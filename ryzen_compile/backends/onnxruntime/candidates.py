"""Ways to run an artifact, timed by visits, and how one of them is chosen."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TypeVar

PROMPT, NEW = 512, 128  # tokens of the request that candidates are compared by
NOISE_FLOOR = 0.02  # of a median: differences below it are not worth a thread


class Timed:
    """One way to run, and the seconds that a request of ``PROMPT`` + ``NEW`` tokens took by each visit's measure."""

    visits: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of the request."""
        return statistics.median(self.visits)

    @property
    def spread(self) -> float:
        """Seconds by which the median may be off: 1.48 median absolute deviations (a standard deviation, of a normal
        distribution) over the square root of the number of visits, and no less than ``NOISE_FLOOR`` of the median."""
        deviation = statistics.median(abs(seconds - self.median) for seconds in self.visits)
        return max(1.4826 * deviation / math.sqrt(len(self.visits)), NOISE_FLOOR / 2 * self.median)

    @property
    def simplicity(self) -> tuple[int, ...]:
        """The smaller, the rather it is taken where times do not tell."""
        raise NotImplementedError


@dataclass(frozen=True)
class Candidate(Timed):
    """A number of threads, and whether idle ones wait busily."""

    threads: int
    spinning: bool
    visits: tuple[float, ...]

    @property
    def simplicity(self) -> tuple[int, ...]:
        return self.threads, not self.spinning

    def __str__(self) -> str:
        return f"{self.threads} thread{'s'[: self.threads > 1]}, spinning {'on' if self.spinning else 'off'}"


@dataclass(frozen=True)
class NativeCandidate(Timed):
    """Kinds of nodes that our own operators take over; none: ONNX Runtime's."""

    kinds: frozenset[str]
    visits: tuple[float, ...]

    @property
    def simplicity(self) -> tuple[int, ...]:
        """The more kinds, the simpler: all of them is what runs where nothing was measured."""
        return (-len(self.kinds),)

    def __str__(self) -> str:
        return f"native {', '.join(sorted(self.kinds))}" if self.kinds else "stock operators"


Way = TypeVar("Way", bound=Timed)


def choose(candidates: tuple[Way, ...]) -> tuple[Way, str]:
    """The simplest candidate (fewest threads, then spinning on; most native operators) that the fastest does not beat
    by more than the noise, and why in words. The noise between two is twice their spreads, added as independent errors
    are."""
    fastest = min(candidates, key=lambda c: c.median)

    def noise(candidate: Way) -> float:
        return 2 * math.hypot(candidate.spread, fastest.spread)

    simplest_first = sorted(candidates, key=lambda c: c.simplicity)
    chosen = next(c for c in simplest_first if c is fastest or c.median - fastest.median <= noise(c))
    if len(candidates) == 1:
        return chosen, f"{chosen}: nothing else was tried"
    if chosen is fastest:
        return chosen, f"{chosen}: the fastest, and nothing simpler comes within the noise"
    gap = chosen.median - fastest.median
    return chosen, (
        f"{chosen}: {fastest} is {1e3 * gap:.1f} ms a request faster, which is within the noise of "
        f"{1e3 * noise(chosen):.1f} ms"
    )
