"""PromptLookup: the longest n-gram, its most recent occurrence, whatever the steps that the text grows by."""

from __future__ import annotations

import numpy as np
import pytest

from ryzen_compile.errors import UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.sampling import SamplingParams
from ryzen_compile.runtime.speculative.drafter import Draft, Drafter
from ryzen_compile.runtime.speculative.lookup import PromptLookup, confidence_of, continuation
from tests.runtime.torch_engine import SLOT

ROW = KVCache([SLOT], 1, 1)


def started(*sizes: int) -> PromptLookup:
    lookup = PromptLookup(*sizes)
    lookup.begin(SamplingParams(), None, ROW)
    return lookup


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int64)


def brute(text: list[int], most_ngram: int, least_ngram: int, most: int) -> Draft | None:
    for size in range(most_ngram, least_ngram - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                length = size
                while length < end and text[end - length - 1] == text[-length - 1]:
                    length += 1
                period = len(text) - end
                return Draft([text[end + place % period] for place in range(most)], confidence_of(length))
    return None


@pytest.mark.parametrize(("most_ngram", "least_ngram"), [(3, 2), (1, 1), (5, 1), (2, 2), (17, 3)])
@pytest.mark.parametrize("alphabet", [1, 2, 5, 30])
def test_equals_brute_force_however_the_text_grows(most_ngram: int, least_ngram: int, alphabet: int) -> None:
    generator = np.random.default_rng(alphabet)
    text = generator.integers(0, alphabet, 31)
    text = np.concatenate([text, text[3:29], generator.integers(0, alphabet, 31)])
    lookup = started(most_ngram, least_ngram)
    held, drafts = 0, 0
    while held < len(text):
        held += int(generator.choice([1, 1, 1, 2, 7]))
        context = text[:held]
        for most in (1, 3, 8):  # asked again with the same text, it says the same
            draft = lookup.draft(context, most)
            assert draft == brute(context.tolist(), most_ngram, least_ngram, most)
            drafts += draft is not None
    assert drafts


def test_the_longer_ngram_wins_over_the_more_recent_one() -> None:
    text = ids(1, 2, 3, 50, 51, 9, 2, 3, 60, 61, 1, 2, 3)
    assert started(3, 2).draft(text, 2) == Draft([50, 51], confidence_of(3))
    assert started(2, 2).draft(text, 2) == Draft([60, 61], confidence_of(2))


def test_of_equal_ngrams_the_most_recent_is_continued() -> None:
    assert started().draft(ids(1, 2, 50, 1, 2, 60, 7, 1, 2), 3) == Draft([60, 7, 1], confidence_of(2))


def test_a_copy_that_reaches_the_end_goes_on_as_a_loop() -> None:
    assert started().draft(ids(9, 1, 2, 3, 1, 2, 3, 1, 2), 8) == Draft([3, 1, 2, 3, 1, 2, 3, 1], confidence_of(5))
    assert started().draft(ids(4, 4, 4), 5) == Draft([4] * 5, confidence_of(2))


@pytest.mark.parametrize("text", [[], [1], [1, 1], [1, 2], [1, 2, 3, 2, 1], [1, 2, 3, 1, 3, 2]])
def test_nothing_to_say(text: list[int]) -> None:
    assert started().draft(ids(*text), 4) is None


def test_confidence_is_the_length_of_the_whole_match() -> None:
    steps = {1: 0, 2: 1, 3: 2, 4: 3, 5: 3, 6: 4, 8: 4, 9: 5, 16: 5, 17: 6, 400: 6}
    assert {length: confidence_of(length) for length in steps} == steps
    for length in range(2, 40):
        repeat = list(range(100, 100 + length))
        draft = started().draft(ids(1, *repeat, 7, 8, 2, *repeat), 1)
        assert draft == Draft([7], confidence_of(length))


def test_continuation_repeats_what_follows() -> None:
    tokens = [5, 6, 7]
    assert [continuation(tokens, 1, count) for count in range(1, 6)] == [
        *([6], [6, 7], [6, 7, 6], [6, 7, 6, 7], [6, 7, 6, 7, 6]),
    ]
    assert tokens == [5, 6, 7]


def test_a_new_sequence_knows_nothing_of_the_last() -> None:
    lookup = started()
    assert lookup.draft(ids(1, 2, 3, 1, 2), 1) is not None
    lookup.observe(1)
    lookup.end()
    lookup.end()
    lookup.begin(SamplingParams(do_sample=True), np.random.default_rng(0), ROW)
    assert lookup.draft(ids(1, 2), 1) is None


@pytest.mark.parametrize("sizes", [(3, 0), (2, 3), (0, 0), (3, -1)])
def test_sizes_out_of_range_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=r"1 <= least <= most, got least"):
        PromptLookup(*sizes)


def test_is_a_drafter() -> None:
    drafter: Drafter = PromptLookup()
    assert (drafter.name, drafter.cost) == ("lookup", "free")
