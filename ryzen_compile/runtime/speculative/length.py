"""How many tokens to draft: what a step of M tokens costs, how many of them will be accepted, and what follows.

A draft of k tokens of which each is accepted with probability a, if those before it were, gives

    E(k) = 1 + a + a^2 + ... + a^k

tokens in one step of T(k + 1) seconds, where a step without one gives a single token in T(1) (Leviathan et al., 2023).
The best k is that of the most tokens per second; none is one of the choices. T is the artifact's own, measured by
``tune`` or in the first steps, and a is learned for each drafter by how sure it says it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

MARGIN = 1.1  # what a draft must promise: of many estimates that are not exact, the flattering ones get chosen
UNKNOWN_SLOPE = 0.1  # of one step, for each further token, until it is measured
SLOPE_WEIGHT = 4.0  # what that counts: as much as having seen a step of three tokens
KEPT = 0.98  # of the weight of what was observed before
OUTLIER = 2.0  # a step was interrupted that took so many times as long as expected
MOST_ABOVE = 10.0  # times what a step of one token is taken for, that steps take on average
LEAST_WAIT, MOST_WAIT = 8, 256


class StepCost:
    """Seconds of a step of M new tokens behind a context, from ``curves`` (context -> M -> seconds) where there are
    some, corrected by what steps take now.

    The correction is a straight line in M through the recent past, by which the curve is multiplied: every step tells
    something of all lengths, so that no length is given up for good after a bad moment. Without curves the line itself
    is the cost.
    """

    def __init__(self, curves: Mapping[int, Mapping[int, float]] | None = None) -> None:
        self._curves = sorted((context, _Line(curve)) for context, curve in (curves or {}).items() if curve)
        self._slope = 0.0 if self._curves else UNKNOWN_SLOPE  # of the line, relative to its height, to begin with
        # Sums over the steps observed, x = M - 1 and y = seconds over the curve's: 1, x, x^2, y, x y.
        self._sums = [0.0] * 5
        self._line = (1.0, self._slope)
        self._begun: set[int] = set()

    @property
    def measured(self) -> bool:
        """Whether ``seconds`` are seconds."""
        return bool(self._curves or self._sums[0])

    def seconds(self, tokens: int, context: int) -> float:
        """Of a step of ``tokens`` new tokens behind ``context`` others. In seconds once a step was observed, or from
        the start with curves; until then, in steps of one token."""
        height, slope = self._line
        # A line that falls tells nothing of lengths that were never stepped: more tokens are not taken for free.
        return self._expected(tokens, context) * max(height + slope * (tokens - 1), height / 2)

    def observe(self, tokens: int, context: int, seconds: float) -> None:
        """A step took so long. The first one of its size only warms up: it is not counted."""
        if tokens not in self._begun:
            self._begun.add(tokens)
            return
        if self.measured:
            seconds = min(seconds, OUTLIER * self.seconds(tokens, context))
        x, y = tokens - 1, seconds / self._expected(tokens, context)
        ones, xs, squares, ys, products = self._sums = [
            KEPT * old + new for old, new in zip(self._sums, (1.0, x, x * x, y, x * y), strict=True)
        ]
        # Least squares, with a pull towards the slope that is assumed to begin with.
        s, pull = self._slope, SLOPE_WEIGHT
        ones, cross, squares = ones + pull * s * s, xs - pull * s, squares + pull
        bottom = ones * squares - cross * cross
        height = max((ys * squares - products * cross) / bottom, ys / ones / MOST_ABOVE)
        self._line = (height, (ones * products - cross * ys) / bottom)

    def _expected(self, tokens: int, context: int) -> float:
        if not self._curves:
            return 1.0
        (low, first), (high, last) = self._curves[0], self._curves[-1]
        near = first.at(tokens)
        if low == high:
            return near
        # Attention takes time in proportion to the context; a line may not fall below what the shorter one takes.
        return max(near + (last.at(tokens) - near) * (context - low) / (high - low), near / 2)


class _Line:
    """Seconds by tokens, straight between those measured and going on behind them."""

    def __init__(self, points: Mapping[int, float]) -> None:
        self._at: dict[int, float] = dict(points)
        self._points = sorted(points.items())

    def at(self, tokens: int) -> float:
        found = self._at.get(tokens)
        if found is None:
            found = self._at[tokens] = self._between(tokens)
        return found

    def _between(self, tokens: int) -> float:
        if len(self._points) == 1:
            ((_, seconds),) = self._points
            return seconds * (1 + UNKNOWN_SLOPE * max(0, tokens - 1))
        pairs = list(pairwise(self._points))
        (left, low), (right, high) = next((pair for pair in pairs if tokens < pair[1][0]), pairs[-1])
        return max(low + (high - low) * (tokens - left) / (right - left), low)


class Acceptance:
    """How often a drafted token is accepted if those before it were; the last thirty drafts or so count.

    It also says when a draft that does not promise anything is to be tried all the same: after ``LEAST_WAIT`` others,
    and after twice as many whenever that failed.
    """

    def __init__(self, expected: float) -> None:
        self._kept, self._tried = 2 * expected, 2.0  # as if two tokens had been seen
        self._wait = LEAST_WAIT
        self._refused = 0

    @property
    def rate(self) -> float:
        return self._kept / self._tried

    def observe(self, drafted: int, accepted: int) -> None:
        """``accepted`` of ``drafted`` tokens were kept; what follows the first rejected one was not tried."""
        self._kept = 0.97 * self._kept + accepted
        self._tried = 0.97 * self._tried + accepted + (accepted < drafted)
        self._wait = LEAST_WAIT if accepted else min(2 * self._wait, MOST_WAIT)

    def is_due(self) -> bool:
        """A draft was refused: whether this one is to be tried instead."""
        self._refused += 1
        if self._refused < self._wait:
            return False
        self._refused = 0
        return True


def best_length(rate: float, most: int, cost: StepCost, context: int, draft_seconds: float = 0.0) -> tuple[int, float]:
    """The k from 1 to ``most`` that gives the most tokens per second, and how many times those of a step without.

    ``rate`` is the probability that a token is accepted, ``draft_seconds`` what drafting one more token takes.
    """
    plain = cost.seconds(1, context)
    best, gain = 0, 0.0
    tokens = survival = 1.0
    for k in range(1, most + 1):
        survival *= rate
        tokens += survival
        faster = tokens * plain / (cost.seconds(k + 1, context) + k * draft_seconds)
        if faster > gain:
            best, gain = k, faster
    return best, gain
