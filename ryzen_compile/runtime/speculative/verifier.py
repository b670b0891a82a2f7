"""Whether a drafted token is kept: the target's distribution comes out exactly, however bad the draft.

Speculative sampling (Leviathan et al., 2023; Chen et al., 2023). A token x that was drawn from q is kept with
probability min(1, p(x) / q(x)), p being the target's distribution; else another one is drawn from (p - q)+, normalised.
Summed over all x that is p. A token that was not drawn has q = 1: it is kept with probability p(x), and else the draw
is from p without x. Drawing from p at once and comparing is the same, and takes the same random numbers as a generation
without drafts, so that drafts which are not drawn leave even the text of a seed as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ryzen_compile.runtime.sampling import draw


@dataclass(frozen=True, slots=True)
class Verdict:
    """Draws the target's token in the place of ``token``, which was drawn from ``proposal``: ids ``(N,)`` ascending and
    their probabilities ``(N,)`` float64."""

    token: int
    proposal: tuple[np.ndarray, np.ndarray]

    def __call__(self, ids: np.ndarray, probabilities: np.ndarray, generator: np.random.Generator) -> int:
        """``token``, or another one of ``ids`` ``(M,)`` ascending, with ``probabilities`` ``(M,)`` float64: a
        ``sampling.Draw``."""
        if generator.random() < acceptance(ids, probabilities, self.token, self.proposal):
            return self.token
        left = residual(ids, probabilities, self.proposal)
        # Nothing is left where p = q but for rounding, and then every token is to be kept.
        return draw(ids, left, generator) if left.any() else self.token


def acceptance(
    ids: np.ndarray, probabilities: np.ndarray, token: int, proposal: tuple[np.ndarray, np.ndarray]
) -> float:
    """min(1, p(token) / q(token)); q(token) is above 0."""
    p = probability(ids, probabilities, token)
    return min(1.0, p / probability(*proposal, token))


def residual(ids: np.ndarray, probabilities: np.ndarray, proposal: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(p - q)+ of ``ids`` ``(M,)``, normalised; zeros if there is nothing of it."""
    drawn, q = proposal
    places = np.searchsorted(drawn, ids)
    places[places == len(drawn)] = 0
    left = np.maximum(probabilities - np.where(drawn[places] == ids, q[places], 0.0), 0.0)
    total = left.sum()
    return left / total if total > 0 else left


def probability(ids: np.ndarray, probabilities: np.ndarray, token: int) -> float:
    """Of ``token`` in a distribution over ``ids`` ``(N,)`` ascending; 0 if it is not among them."""
    place = int(np.searchsorted(ids, token))
    return float(probabilities[place]) if place < len(ids) and ids[place] == token else 0.0
