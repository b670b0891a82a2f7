"""Who wins among paths, and how sure it is that more of them would not change that.

Adaptive consistency (Aggarwal et al., 2023, "Let's Sample Step by Step"): answers are draws from an unknown
distribution with a flat Dirichlet prior, so after counts v its posterior is Dirichlet(v + 1). The leader is safe when
it is the most probable answer with enough posterior probability; sampling may stop there.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

GRID = 4096


@dataclass(frozen=True)
class Vote:
    """An ``answer``, how many paths gave it (``count``), and the best of them (``path``, its index)."""

    answer: Hashable
    count: int
    path: int


def leader_probability(counts: Sequence[int]) -> float:
    """The posterior probability that the answer with the most votes is the most probable one.

    ``counts`` are the votes of each answer that was given. An answer that nobody has given yet is one more, with none:
    so a single vote, or a unanimous one of few, is not yet certain. Probabilities p_i of a Dirichlet are Gamma(v_i + 1)
    variables g_i over their sum, so P(p_1 > all others) is the integral of the density of g_1 times the distribution
    functions of the others; for whole v those are sums of Poisson terms. No votes give 0.
    """
    if not any(counts):
        return 0.0
    votes = np.sort(np.array([*counts, 0]))[::-1]
    most = int(votes[0])
    x = np.linspace(0, most + 1 + 12 * math.sqrt(most + 1) + 20, GRID + 1)[1:]
    logs = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, most + 1)))))  # of factorials
    terms = np.exp(np.arange(most + 1)[:, None] * np.log(x) - x - logs[:, None])  # Poisson(x) at each count
    below = 1 - np.cumsum(terms, axis=0)[votes[1:]]  # P(g_i < x)
    density = terms[most] * below.prod(axis=0)
    return float(np.clip(np.trapezoid(density, x), 0.0, 1.0))


def decided(counts: Sequence[int], left: int) -> bool:
    """Whether ``left`` votes more cannot change who leads, nor tie with it."""
    first, second = (sorted([*counts, 0, 0], reverse=True))[:2]
    return first - second > left


def tally(answers: Sequence[Hashable | None], ranks: Sequence[tuple[float, float]], paths: Sequence[int]) -> list[Vote]:
    """The vote table, most votes first, ties by the best rank among those who gave the answer. None is no vote.

    ``answers``, ``ranks`` (greater is better) and ``paths`` (indices) belong together; equal ranks prefer the lower
    index.
    """
    given: dict[Hashable, list[int]] = {}
    for place, answer in enumerate(answers):
        if answer is not None:
            given.setdefault(answer, []).append(place)
    best = {answer: max(places, key=lambda place: (ranks[place], -paths[place])) for answer, places in given.items()}
    order = sorted(given, key=lambda answer: (len(given[answer]), ranks[best[answer]], -paths[best[answer]]))
    return [Vote(answer, len(given[answer]), paths[best[answer]]) for answer in reversed(order)]
