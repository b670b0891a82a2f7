"""Sampling: transformers' distributions, exact draws, ranges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ryzen_compile.errors import NumericalError, PromptError
from ryzen_compile.runtime.sampling import (
    SamplingParams,
    TokenChooser,
    _kth_highest,
    candidates,
    distribution,
    draw,
    penalise_repeats,
    softmax,
    spawn_generators,
)

GRID: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 500},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.7, "top_k": 7, "top_p": 0.5},
]
NONE_DONE = np.zeros(1, dtype=bool)


def probabilities(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    ids, kept = candidates(scores, params)
    result = np.zeros(len(scores))
    result[ids] = softmax(kept.astype(np.float64))
    return result


def transformers_probabilities(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    warpers = LogitsProcessorList()
    if params.temperature != 1:
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    warped = warpers(torch.zeros((1, 1), dtype=torch.long), torch.from_numpy(scores.copy())[None])
    return torch.softmax(warped[0].double(), dim=-1).numpy()


@pytest.mark.parametrize("settings", GRID, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 31, 97, 1000])
def test_distribution_equals_transformers(settings: dict[str, Any], vocab: int) -> None:
    params = SamplingParams(do_sample=True, **settings)
    generator = np.random.default_rng(vocab)
    for spread in (0.1, 3.0):
        scores = (generator.standard_normal(vocab) * spread).astype(np.float32)
        expected = transformers_probabilities(scores, params)
        np.testing.assert_allclose(probabilities(scores, params), expected, rtol=0, atol=1e-6)


def test_distribution_equals_transformers_with_ties_and_masked_tokens() -> None:
    scores = np.array([2, -np.inf, 2, 1, 1, 0, -np.inf, 2], dtype=np.float32)
    for settings in ({"top_k": 2}, {"top_k": 4}, {"min_p": 0.5}, {"temperature": 0.5, "top_k": 7}):
        params = SamplingParams(do_sample=True, **settings)
        expected = transformers_probabilities(scores, params)
        np.testing.assert_allclose(probabilities(scores, params), expected, rtol=0, atol=1e-6)


def test_repetition_penalty_equals_transformers() -> None:
    generator = np.random.default_rng(0)
    for penalty in (0.5, 1.3, 5.0):
        scores = generator.standard_normal(50).astype(np.float32)
        history = np.array([3, 7, 3, 49, 0])
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        expected = processor(torch.from_numpy(history)[None], torch.from_numpy(scores.copy())[None])[0].numpy()
        penalise_repeats(scores, history, penalty)
        np.testing.assert_array_equal(scores, expected)


def chi_square_p(observed: np.ndarray, expected: np.ndarray) -> float:
    """Upper tail of chi-square by Wilson and Hilferty's cube root; cells expecting fewer than 5 are pooled."""
    rare = expected < 5
    seen, due = np.append(observed[~rare], observed[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    seen, due = seen[due > 0], due[due > 0]
    freedom = len(due) - 1
    if freedom == 0:
        return 1.0
    statistic = float(((seen - due) ** 2 / due).sum())
    variance = 2 / (9 * freedom)
    return 0.5 * math.erfc(((statistic / freedom) ** (1 / 3) - (1 - variance)) / math.sqrt(2 * variance))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 2.0},
        {"temperature": 0.5, "top_k": 9, "top_p": 0.9},
    ],
    ids=str,
)
def test_draws_follow_the_distribution_and_never_leave_it(settings: dict[str, Any]) -> None:
    params = SamplingParams(do_sample=True, **settings)
    scores = np.random.default_rng(5).standard_normal(16).astype(np.float32)
    scores[[0, 15]] = -np.inf
    expected = transformers_probabilities(scores, params)
    generator = spawn_generators(11, 1)[0]
    ids, probabilities = distribution(scores, params)
    draws = 30_000
    observed = np.bincount([draw(ids, probabilities, generator) for _ in range(draws)], minlength=16)
    assert not observed[expected == 0].any()
    assert chi_square_p(observed, expected * draws) > 1e-4
    # The test has teeth: a distribution that is a fifth off in its largest entry is rejected.
    wrong = expected.copy()
    wrong[expected.argmax()] *= 1.2
    assert chi_square_p(observed, wrong / wrong.sum() * draws) < 1e-4 or (expected > 0).sum() == 1


def test_a_draw_at_either_end_of_the_unit_interval_stays_inside() -> None:
    class Fixed:
        def __init__(self, value: float) -> None:
            self.value = value

        def random(self) -> float:
            return self.value

    ids = np.array([4, 6, 8, 9])
    probabilities = np.array([0, 0.5, 0.5, 0])
    assert draw(ids, probabilities, Fixed(0.0)) == 6  # type: ignore[arg-type]
    assert draw(ids, probabilities, Fixed(np.nextafter(1.0, 0.0))) == 8  # type: ignore[arg-type]


def test_rows_have_independent_streams_that_do_not_depend_on_the_batch() -> None:
    few, many = spawn_generators(3, 2), spawn_generators(3, 5)
    first = [generator.random() for generator in few]
    assert first == [generator.random() for generator in many[:2]]
    assert len({*first, many[2].random(), spawn_generators(4, 1)[0].random()}) == 4
    assert spawn_generators(None, 1)[0].random() != spawn_generators(None, 1)[0].random()


def choose(params: SamplingParams, logits: np.ndarray, **options: Any) -> int:
    history = np.zeros((1, 1), dtype=np.int64)
    chooser = TokenChooser(params, 1, **options)
    return int(chooser.choose(logits[None], 4, history, np.zeros(1, dtype=np.int64), NONE_DONE)[0])


def test_greedy_takes_the_first_of_equals_as_torch_does() -> None:
    for logits in ([1, 3, 3, 2], [-0.0, 0.0, -1], [-np.inf, -5, -5]):
        array = np.array(logits, dtype=np.float32)
        expected = int(torch.argmax(torch.from_numpy(array)))
        assert choose(SamplingParams(), array) == expected
        assert choose(SamplingParams(do_sample=True, temperature=0), array) == expected
        # The long way round, which processors and penalties take, agrees with the short one.
        assert choose(SamplingParams(), array, processors=[lambda ids, scores: scores]) == expected


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(do_sample=True)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("logits", "found"),
    [([1, np.nan, 2], "nan at token 1"), ([1, 0, np.inf], "inf at token 2"), ([-np.inf] * 3, "no token left")],
)
def test_logits_that_are_not_finite_name_row_and_step(params: SamplingParams, logits: list[float], found: str) -> None:
    with pytest.raises(NumericalError, match=f"logits of row 0 at step 4 have {found}"):
        choose(params, np.array(logits, dtype=np.float32))


def test_processors_that_mask_everything_or_misbehave_are_named() -> None:
    logits = np.array([1, 2, 3], dtype=np.float32)
    with pytest.raises(NumericalError, match="processed scores of row 0 at step 4 have no token left"):
        choose(SamplingParams(), logits, processors=[lambda ids, scores: scores - torch.inf])
    with pytest.raises(PromptError, match=r"logits processor function must return floating scores of shape \(1, 3\)"):
        choose(SamplingParams(), logits, processors=[lambda ids, scores: scores[0]])
    with pytest.raises(PromptError, match="must hold callables, got 3"):
        choose(SamplingParams(), logits, processors=[3])


def test_the_engines_logits_are_not_written_to() -> None:
    logits = np.array([1, 2, 3], dtype=np.float32)
    params = SamplingParams(do_sample=True, temperature=0.5, repetition_penalty=2.0)

    def in_place(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.mul_(2)

    choose(params, logits, processors=[in_place], held_back=[1], min_new_tokens=9)
    assert logits.tolist() == [1, 2, 3]


def test_bfloat16_processors_are_accepted() -> None:
    logits = np.array([1, 2, 3], dtype=np.float32)
    assert choose(SamplingParams(), logits, processors=[lambda ids, scores: -scores.bfloat16()]) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"temperature must be a finite number >= 0 \(0 = greedy\), got -0.1"),
        ({"temperature": math.nan}, "temperature must be a finite number >= 0"),
        ({"temperature": math.inf}, "temperature must be a finite number >= 0"),
        ({"temperature": "hot"}, "temperature must be .*, got 'hot'"),
        ({"top_p": 0}, "top_p must be a number with 0 < top_p <= 1, got 0"),
        ({"top_p": 1.1}, "top_p must be a number with 0 < top_p <= 1, got 1.1"),
        ({"top_k": -1}, r"top_k must be an integer >= 0 \(0 = off\), got -1"),
        ({"top_k": 2.0}, "top_k must be an integer >= 0"),
        ({"top_k": True}, "top_k must be an integer >= 0"),
        ({"min_p": -0.1}, "min_p must be a number with 0 <= min_p <= 1, got -0.1"),
        ({"min_p": 1.5}, "min_p must be a number with 0 <= min_p <= 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a finite number > 0, got 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be a finite number > 0"),
        ({"repetition_penalty": True}, "repetition_penalty must be a finite number > 0"),
        ({"do_sample": "yes"}, "do_sample must be True or False, got 'yes'"),
    ],
)
def test_ranges(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize("seed", [-1, 1.5, "x", True])
def test_seeds_are_checked_even_when_greedy(seed: Any) -> None:
    with pytest.raises(PromptError, match="seed must be an integer >= 0"):
        TokenChooser(SamplingParams(), 1, seed=seed)


@pytest.mark.parametrize("vocab", [1, 7, 799, 800, 801, 4096, 32003])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_the_kth_highest_is_that_of_a_sort(vocab: int, k: int) -> None:
    generator = np.random.default_rng(vocab + k)
    for scores in (
        generator.standard_normal(vocab),
        generator.integers(0, 5, vocab),  # many ties
        np.where(generator.random(vocab) < 0.999, -np.inf, 1.0),
        np.arange(vocab),  # the highest lie together
        np.zeros(vocab),
    ):
        scores = scores.astype(np.float32)
        if k <= vocab:
            assert _kth_highest(scores, k) == np.sort(scores)[vocab - k]
