"""Stopping: EOS, stop strings across token boundaries, criteria, limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import StoppingCriteria
from transformers.generation.stopping_criteria import StopStringCriteria

from ryzen_compile.errors import PromptError
from ryzen_compile.runtime.stopping import (
    StopStrings,
    StopTracker,
    min_token_limit,
    new_token_limit,
    token_ids,
)
from tests.runtime.torch_engine import EOS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def encode(*pieces: str) -> list[int]:
    vocabulary = TOKENIZER.get_vocab()
    return [vocabulary[piece] for piece in pieces]


def first_stop(strings: Any, prompt: list[int], new: list[int]) -> int | None:
    """How many new tokens there are when the first stop string is completed."""
    window = StopStrings(strings, TOKENIZER).start(prompt)
    return next((count for count, token in enumerate(new, 1) if window.push(token)), None)


@pytest.mark.parametrize(
    ("strings", "prompt", "new", "expected"),
    [
        ("abc", [], ["a", "b", "c", "d"], 3),
        ("sto", [], ["as", "t", "o"], 3),  # begins inside a token
        ("ast", [], ["as", "t", "o"], 2),
        ("sb", [], ["as", "bt", "o"], 2),  # ends inside a token
        ("asbtcu", [], ["x", "as", "bt", "cu"], 4),  # three tokens
        (["zz", "ty"], [], ["a", "t", "y"], 3),
        ("abc", ["a", "b"], ["c"], 1),  # begins in the prompt
        ("abc", ["a", "b", "c"], ["a", "b"], None),  # over before the first new token
        ("abab", ["a", "b"], ["a", "b"], 2),
        ("a", [], ["b", "c"], None),
        ("\u20ac", [], ["a", "â", "Ĥ", "¬", "b"], 4),  # one character in three tokens
        ("\u20acb", [], ["â", "Ĥ", "¬", "b"], 4),
        ("</s>", [], ["a", "</s>"], 2),  # special tokens are text, too
        ("a b", [], ["a", "Ġ", "b"], 3),
    ],
)
def test_stop_strings_at_token_boundaries(
    strings: Any, prompt: list[str], new: list[str], expected: int | None
) -> None:
    assert first_stop(strings, encode(*prompt), encode(*new)) == expected


def test_stop_strings_agree_with_transformers_on_random_tokens() -> None:
    generator = np.random.default_rng(0)
    strings = ["ab", "sa", "tbu", "\u20ac", "zzz"]
    criterion = StopStringCriteria(TOKENIZER, strings)
    stops = 0
    for _ in range(60):
        tokens = generator.integers(3, 60, size=60).tolist()
        expected = next((end - 4 for end in range(5, 61) if bool(criterion(torch.tensor([tokens[:end]]), None))), None)
        assert first_stop(strings, tokens[:4], tokens[4:]) == expected
        stops += expected is not None
    assert stops > 10  # neither all nor none


def test_a_long_run_keeps_the_window_short() -> None:
    lengths = []

    class Counting:
        def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
            lengths.append(len(ids))
            return "".join(chr(97 + one % 26) for one in ids)

    window = StopStrings("zzz", Counting()).start(list(range(1000)))
    assert not any(window.push(7) for _ in range(500))
    assert max(lengths) <= 4 * (3 + 4) + 1 and len(lengths) < 550
    assert [window.push(25) for _ in range(3)] == [False, False, True]


def test_space_cleaning_is_switched_off_for_tokenizers_that_do_it() -> None:
    seen = []

    class Cleaning:
        clean_up_tokenization_spaces = True

        def decode(self, ids: list[int], **options: bool) -> str:
            seen.append(options)
            return ""

    StopStrings("x", Cleaning()).start([1])
    assert seen == [{"skip_special_tokens": False, "clean_up_tokenization_spaces": False}]


@pytest.mark.parametrize("strings", ["", ["a", ""], 3, [b"a"], {"a": 1}])
def test_bad_stop_strings_are_refused(strings: Any) -> None:
    with pytest.raises(PromptError, match="stop_strings must be a non-empty string or a list of them"):
        StopStrings(strings, TOKENIZER)


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(PromptError, match=r"stop_strings need the model's tokenizer.*pass tokenizer="):
        StopStrings("a", None)
    assert not StopStrings(None, None) and not StopStrings([], None)


def test_rows_finish_on_their_own_and_stay_finished() -> None:
    tracker = StopTracker(3, eos=[EOS, 5])
    ids = np.zeros((3, 1), dtype=np.int64)
    assert not tracker.update(np.array([9, EOS, 9]), ids)
    assert tracker.done.tolist() == [False, True, False] and tracker.running == 2
    assert not tracker.update(np.array([5, 9, 9]), ids)
    assert tracker.update(np.array([9, 9, 5]), ids)
    assert tracker.running == 0


def test_criteria_see_torch_ids_and_may_answer_for_one_or_all() -> None:
    class Longer(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            assert input_ids.dtype == torch.int64 and scores is None
            return input_ids[:, -1] > 3

    tracker = StopTracker(2, criteria=[Longer(), lambda ids, scores: ids.shape[1] > 2])
    assert not tracker.update(np.array([1, 4]), np.array([[0, 1], [0, 4]]))
    assert tracker.done.tolist() == [False, True] and tracker.running == 1
    assert tracker.update(np.array([1, 1]), np.array([[0, 1, 1], [0, 4, 1]]))


def test_bad_criteria_are_named() -> None:
    with pytest.raises(PromptError, match="stopping_criteria must hold callables, got 'x'"):
        StopTracker(1, criteria=["x"])  # type: ignore[list-item]
    tracker = StopTracker(2, criteria=[lambda ids, scores: torch.tensor([1.0, 2.0])])
    with pytest.raises(PromptError, match=r"stopping criterion function must return a bool or \(2,\) bools"):
        tracker.update(np.array([1, 1]), np.zeros((2, 1), dtype=np.int64))


@pytest.mark.parametrize(
    ("new", "length", "expected"), [(7, None, 7), (None, 12, 2), (None, None, 20), (7, 17, 7), (np.int32(3), None, 3)]
)
def test_limits(new: Any, length: Any, expected: int) -> None:
    assert new_token_limit(new, length, columns=10, longest=8, context=64) == expected


def test_the_default_limit_is_what_the_context_leaves() -> None:
    assert new_token_limit(None, None, columns=60, longest=60, context=64) == 4
    with pytest.raises(PromptError, match="prompt of 64 tokens leaves no room in the model's context of 64"):
        new_token_limit(None, None, columns=64, longest=64, context=64)


@pytest.mark.parametrize(
    ("new", "length", "message"),
    [
        (0, None, "max_new_tokens must be an integer >= 1, got 0"),
        (-1, None, "max_new_tokens must be an integer >= 1, got -1"),
        (1.5, None, "max_new_tokens must be an integer >= 1"),
        (True, None, "max_new_tokens must be an integer >= 1"),
        (2**63, None, f"prompt of 8 tokens plus {2**63} new tokens exceeds the model's context of 64"),
        (57, None, "prompt of 8 tokens plus 57 new tokens exceeds the model's context of 64"),
        (None, 10, "max_length 10 leaves no new token after a prompt of 10 tokens"),
        (None, "x", "max_length must be an integer >= 1, got 'x'"),
        (5, 20, "max_new_tokens 5 after a prompt of 10 tokens contradicts max_length 20"),
    ],
)
def test_impossible_limits_are_refused(new: Any, length: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        new_token_limit(new, length, columns=10, longest=8, context=64)


def test_minimum() -> None:
    assert (min_token_limit(None, 5), min_token_limit(5, 5)) == (0, 5)
    with pytest.raises(PromptError, match="min_new_tokens 6 is greater than the limit of 5 new tokens"):
        min_token_limit(6, 5)
    with pytest.raises(PromptError, match="min_new_tokens must be an integer >= 0, got -1"):
        min_token_limit(-1, 5)


def test_token_ids() -> None:
    assert [token_ids("eos_token_id", value) for value in (None, 3, [3, 4], np.array([5]), torch.tensor([6, 7]))] == [
        (),
        (3,),
        (3, 4),
        (5,),
        (6, 7),
    ]
    for bad in ("x", 1.5, [1.5], [True]):
        with pytest.raises(PromptError, match="eos_token_id must be a token id or a list of them"):
            token_ids("eos_token_id", bad)
