"""The distribution that comes out of verifying is the target's: exactly, by summing over all that can happen."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from ryzen_compile.runtime.speculative import verifier
from ryzen_compile.runtime.speculative.verifier import Verdict, acceptance, probability, residual

TOKENS = 7
IDS = np.arange(TOKENS)
EXACT = 1e-12  # of a probability, in float64
Proposal = tuple[np.ndarray, np.ndarray]


def dense(ids: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    full = np.zeros(TOKENS)
    full[ids] = probabilities
    return full


def some(seed: int, ids: np.ndarray = IDS) -> Proposal:
    weights = np.random.default_rng(seed).random(len(ids)) ** 3
    return ids, weights / weights.sum()


def one_hot(token: int) -> Proposal:
    return np.array([token]), np.array([1.0])


PAIRS: dict[str, tuple[Proposal, Proposal]] = {
    "other": (some(0), some(1)),
    "the same": (some(2), some(2)),
    "disjoint": (some(3, np.array([0, 2, 5])), some(4, np.array([1, 3, 4, 6]))),
    "overlapping": (some(3, np.array([0, 2, 5])), some(4, np.array([2, 3, 5, 6]))),
    "certain target": (one_hot(4), some(5)),
    "certain draft": (some(6), one_hot(2)),
    "certain and wrong": (one_hot(0), one_hot(6)),
    "certain and right": (one_hot(3), one_hot(3)),
    "unlikely draft": (some(7), (IDS, np.array([1 - 6e-9, *[1e-9] * 6]))),
}


def outcome(target: Proposal, proposal: Proposal) -> np.ndarray:
    """The distribution of a verified token: the sum over all that could have been drafted."""
    out = np.zeros(TOKENS)
    for token, chance in zip(*proposal, strict=True):
        kept = verifier.acceptance(*target, int(token), proposal)
        out[token] += chance * kept
        if kept < 1:
            out += chance * (1 - kept) * dense(target[0], verifier.residual(*target, proposal))
    return out


@pytest.mark.parametrize("name", PAIRS)
def test_a_verified_token_has_the_targets_distribution(name: str) -> None:
    target, proposal = PAIRS[name]
    assert np.abs(outcome(target, proposal) - dense(*target)).max() < EXACT


def chain(seed: int) -> Callable[[tuple[int, ...]], Proposal]:
    """A toy language model: the next token's distribution by all tokens before it, some of it zero."""

    def after(history: tuple[int, ...]) -> Proposal:
        generator = np.random.default_rng([seed, *history])
        ids = np.sort(generator.choice(TOKENS, size=4, replace=False))
        weights = generator.random(4)
        return ids, weights / weights.sum()

    return after


def joint(
    target: Callable[[tuple[int, ...]], Proposal],
    draft: Callable[[tuple[int, ...]], Proposal],
    drafted: int,
    length: int,
    shift: int = 0,
) -> dict[tuple[int, ...], float]:
    """Of the first ``length`` tokens of a generation that drafts ``drafted`` tokens at a time: every path summed.

    ``shift`` judges a token by the distribution of another position: a mistake.
    """
    out: dict[tuple[int, ...], float] = {}

    def step(text: tuple[int, ...], chance: float) -> None:
        if len(text) >= length:
            out[text[:length]] = out.get(text[:length], 0.0) + chance
            return
        verify(text, text, chance, drafted)

    def verify(text: tuple[int, ...], drafts: tuple[int, ...], chance: float, left: int) -> None:
        judged = target(text[: len(text) - shift] if shift else text)
        if not left:  # all were kept: one more, from the target alone
            for token, p in zip(*judged, strict=True):
                step((*text, int(token)), chance * p)
            return
        proposal = draft(drafts)
        for token, q in zip(*proposal, strict=True):
            kept = verifier.acceptance(*judged, int(token), proposal)
            if kept:
                verify((*text, int(token)), (*drafts, int(token)), chance * q * kept, left - 1)
            if kept < 1:
                for other, p in zip(judged[0], verifier.residual(*judged, proposal), strict=True):
                    if p:
                        step((*text, int(other)), chance * q * (1 - kept) * p)

    step((), 1.0)
    return out


def worst(found: dict[tuple[int, ...], float], target: Callable[[tuple[int, ...]], Proposal], length: int) -> float:
    error = 0.0
    for text in itertools.product(range(TOKENS), repeat=length):
        wanted = 1.0
        for place, token in enumerate(text):
            wanted *= probability(*target(text[:place]), token)
        error = max(error, abs(found.get(text, 0.0) - wanted))
    return error


@pytest.mark.parametrize("drafted", [1, 2, 3])
def test_a_verified_text_has_the_targets_distribution(drafted: int) -> None:
    target, draft = chain(0), chain(1)
    assert worst(joint(target, draft, drafted, 3), target, 3) < EXACT


def test_wrong_rules_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = chain(0), chain(1)
    assert worst(joint(target, draft, 2, 3, shift=1), target, 3) > 1e-3  # judged one position off
    with monkeypatch.context() as patch:
        patch.setattr(verifier, "acceptance", lambda *_: 1.0)
        assert worst(joint(target, draft, 2, 3), target, 3) > 1e-3
    with monkeypatch.context() as patch:
        patch.setattr(verifier, "residual", lambda ids, probabilities, proposal: probabilities)
        assert worst(joint(target, draft, 2, 3), target, 3) > 1e-3
    assert worst(joint(target, draft, 2, 3), target, 3) < EXACT


class Scripted:
    """Random numbers that are not."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def random(self) -> float:
        return self.values.pop(0)


def test_a_verdict_keeps_below_the_ratio_and_draws_from_what_is_left() -> None:
    target, proposal = (np.array([1, 3, 5]), np.array([0.2, 0.3, 0.5])), (np.array([1, 3]), np.array([0.8, 0.2]))
    verdict = Verdict(1, proposal)
    assert acceptance(*target, 1, proposal) == 0.25
    assert residual(*target, proposal) == pytest.approx([0, 1 / 6, 5 / 6], abs=EXACT)
    assert verdict(*target, Scripted(0.2499)) == 1  # type: ignore[arg-type]
    assert verdict(*target, Scripted(0.25, 0.16)) == 3  # type: ignore[arg-type]
    assert verdict(*target, Scripted(0.25, 0.17)) == 5  # type: ignore[arg-type]
    assert Verdict(3, proposal)(*target, Scripted(np.nextafter(1, 0))) == 3  # type: ignore[arg-type]


def test_where_nothing_is_left_the_token_is_kept() -> None:
    target = (np.array([2, 4]), np.array([0.5, 0.5]))
    # A proposal that sums to a rounding more than 1 is above the target everywhere.
    assert Verdict(4, (target[0], target[1] * (1 + 1e-9)))(*target, Scripted(np.nextafter(1, 0), 0.1)) == 4  # type: ignore[arg-type]


def test_probability_of_what_is_not_there() -> None:
    assert probability(np.array([2, 4]), np.array([0.25, 0.75]), 4) == 0.75
    assert [probability(np.array([2, 4]), np.array([0.25, 0.75]), token) for token in (0, 3, 9)] == [0, 0, 0]
