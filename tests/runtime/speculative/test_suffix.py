"""Corpus and SuffixDrafter: matches, counts and choices against brute force over all substrings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from ryzen_compile.errors import UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.sampling import SamplingParams
from ryzen_compile.runtime.speculative.drafter import MOST_CONFIDENT, Draft, Drafter
from ryzen_compile.runtime.speculative.lookup import confidence_of, continuation
from ryzen_compile.runtime.speculative.suffix import FEW_ALIKE, MANY_ALIKE, Corpus, SuffixDrafter
from ryzen_compile.runtime.speculative.suffix_automaton import ROOT
from tests.runtime.torch_engine import SLOT

ROW = KVCache([SLOT], 1, 1)
Documents = Sequence[Sequence[int]]


def started(corpus: Corpus | None = None, **settings: Any) -> SuffixDrafter:
    drafter = SuffixDrafter(corpus, **settings)
    drafter.begin(SamplingParams(), None, ROW)
    return drafter


def random_documents(seed: int, alphabet: int = 3) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    documents = [generator.integers(0, alphabet, length).tolist() for length in (1, 17, 0, 9, 31)]
    return [*documents, documents[1][:8], documents[4]]


def occurrences(documents: Documents, string: Sequence[int]) -> int:
    size = len(string)
    return sum(list(document[at : at + size]) == list(string) for document in documents for at in range(len(document)))


def brute_match(documents: Documents, text: list[int]) -> int:
    """Length of the longest suffix of ``text`` that occurs."""
    return next(size for size in range(len(text), -1, -1) if not size or occurrences(documents, text[-size:]))


def brute_continuation(documents: Documents, match: list[int], most: int, least: float) -> tuple[list[int], float]:
    found: list[int] = []
    first = 0.0
    while len(found) < most:
        string = [*match, *found]
        after: Counter[int] = Counter()
        for document in documents:
            for at in range(len(document) - len(string)):
                if list(document[at : at + len(string)]) == string:
                    after[document[at + len(string)]] += 1
        if not after:
            break
        token, count = min(after.items(), key=lambda item: (-item[1], item[0]))
        share = count / (occurrences(documents, string) + 1)
        if share < least:
            break
        first = first or share
        found.append(token)
    return found, first


def brute_repeat(text: list[int]) -> tuple[int, int]:
    for length in range(len(text) - 1, 0, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == text[-length:]:
                return length, end
    return 0, 0


def brute_draft(documents: Documents, text: list[int], most: int, least_match: int, least_share: float) -> Draft | None:
    length, end = brute_repeat(text)
    matched = brute_match(documents, text)
    if matched > length and matched >= least_match:
        tokens, share = brute_continuation(documents, text[-matched:], most, least_share)
        if tokens:
            confidence = confidence_of(matched) + (share >= MANY_ALIKE) - (share < FEW_ALIKE)
            return Draft(tokens, min(max(confidence, 0), MOST_CONFIDENT))
    return Draft(continuation(text, end, most), confidence_of(length)) if length >= least_match else None


# The corpus


@pytest.mark.parametrize("seed", range(3))
def test_counts_of_every_short_string(seed: int) -> None:
    documents = random_documents(seed)
    corpus = Corpus(documents)
    strings = [[a, b, c][:size] for a in range(4) for b in range(4) for c in range(4) for size in (1, 2, 3)]
    for string in [*strings, *(document for document in documents if document)]:
        assert corpus.occurrences(string) == occurrences(documents, string)
    assert corpus.tokens == sum(map(len, documents)) == corpus.occurrences([])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alphabet", [2, 4])
def test_follow_keeps_the_longest_match_of_a_text(seed: int, alphabet: int) -> None:
    documents = random_documents(seed, alphabet)
    corpus = Corpus(documents)
    text = np.random.default_rng(seed).integers(0, alphabet + 1, 60).tolist()  # with a token that is in none
    state, length = ROOT, 0
    for held, token in enumerate(text, start=1):
        state, length = corpus.follow(state, length, [token])
        assert length == brute_match(documents, text[:held])
        for least in (0.0, 0.4, 0.75):
            match = text[held - length : held]
            found, share = corpus.continuation(state, 6, least)
            assert (found, share) == brute_continuation(documents, match, 6, least)
    assert corpus.follow(ROOT, 0, text) == (state, length)


def test_no_match_spans_two_documents() -> None:
    corpus = Corpus([[1, 2, 3], [4, 5, 6]])
    assert corpus.occurrences([3, 4]) == 0
    assert corpus.follow(ROOT, 0, [2, 3, 4])[1] == 1
    assert corpus.continuation(corpus.follow(ROOT, 0, [1, 2])[0], 5, 0.0) == ([3], 0.5)


def test_the_most_frequent_continuation_and_of_equals_the_lower_token() -> None:
    corpus = Corpus([[1, 2, 9], [1, 2, 7], [1, 2, 9], [8, 2, 6], [8, 2, 5]])
    assert corpus.continuation(corpus.follow(ROOT, 0, [1, 2])[0], 3, 0.0) == ([9], 2 / 4)
    assert corpus.continuation(corpus.follow(ROOT, 0, [8, 2])[0], 3, 0.0) == ([5], 1 / 3)
    assert corpus.continuation(corpus.follow(ROOT, 0, [8, 2])[0], 3, 0.34) == ([], 0.0)


def test_a_continuation_ends_where_occurrences_part() -> None:
    corpus = Corpus([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 4, 7]])
    assert corpus.continuation(corpus.follow(ROOT, 0, [1, 2])[0], 8, 0.5) == ([3, 4], 3 / 4)


def test_documents_may_be_arrays_of_any_integers() -> None:
    documents = [[1, 2, 3], [2, 3]]
    for dtype in (np.int64, np.int32, np.uint8):
        corpus = Corpus(np.array(document, dtype) for document in documents)
        assert corpus.occurrences([2, 3]) == 2
    assert Corpus([[2**31 - 1, 0]]).occurrences([2**31 - 1]) == 1


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_an_empty_corpus_matches_nothing(documents: Documents) -> None:
    corpus = Corpus(documents)
    assert corpus.tokens == 0 and corpus.follow(ROOT, 0, [1, 2, 3]) == (ROOT, 0)
    assert started(corpus).draft(np.array([1, 2, 3]), 4) is None


@pytest.mark.parametrize("document", ["text", [1.5], [[1, 2]], [-1], [2**31], [True], 7, [None]], ids=repr)
def test_documents_that_are_no_token_ids_are_refused(document: Any) -> None:
    with pytest.raises(UsageError, match="document 1 of a corpus must be one row of token ids"):
        Corpus([[1], document])


def test_what_is_kept_is_a_tenth_of_what_it_was_built_from() -> None:
    corpus = Corpus([np.random.default_rng(0).zipf(1.3, 3000) % 500])
    assert corpus.bytes / corpus.tokens < 64  # near 50; never above 2 states of 20 bytes and 3 transitions of 8


def test_threads_share_a_corpus() -> None:
    documents = random_documents(0)
    corpus = Corpus(documents)
    text = np.random.default_rng(5).integers(0, 3, 80)

    def drafts() -> list[Draft | None]:
        drafter = started(corpus)
        return [drafter.draft(text[:held], 6) for held in range(1, len(text))]

    expected = drafts()
    with ThreadPoolExecutor(4) as threads:
        assert all(found == expected for found in threads.map(lambda _: drafts(), range(8)))


# The drafter


@pytest.mark.parametrize("with_corpus", [True, False])
@pytest.mark.parametrize(("least_match", "least_share"), [(2, 0.5), (1, 0.0), (4, 0.7)])
@pytest.mark.parametrize("alphabet", [2, 5])
def test_equals_brute_force_however_the_text_grows(
    with_corpus: bool, least_match: int, least_share: float, alphabet: int
) -> None:
    documents = random_documents(7, alphabet) if with_corpus else []
    generator = np.random.default_rng(alphabet)
    text = np.concatenate([generator.integers(0, alphabet, 37), np.array([*random_documents(7, alphabet)[4], 1, 0])])
    drafter = started(Corpus(documents) if with_corpus else None, least_match=least_match, least_share=least_share)
    held = drafts = 0
    while held < len(text):
        held += int(generator.choice([1, 1, 1, 2, 7]))
        for most in (1, 3, 8):
            draft = drafter.draft(text[:held], most)
            assert draft == brute_draft(documents, text[:held].tolist(), most, least_match, least_share)
            drafts += draft is not None
    assert drafts


def test_the_longer_match_wins_and_ties_go_to_the_text() -> None:
    corpus = Corpus([[1, 2, 3, 90], [4, 5, 91]])
    assert started(corpus).draft(np.array([2, 3, 80, 7, 1, 2, 3]), 1) == Draft([90], confidence_of(3) - 1)
    assert started(corpus).draft(np.array([4, 5, 80, 7, 4, 5]), 1) == Draft([80], confidence_of(2))


def test_a_corpus_without_a_clear_continuation_leaves_the_draft_to_the_text() -> None:
    corpus = Corpus([[1, 2, 3, 90], [1, 2, 3, 91], [1, 2, 3, 92]])
    assert started(corpus).draft(np.array([2, 3, 80, 7, 1, 2, 3]), 1) == Draft([80], confidence_of(2))
    assert started(corpus).draft(np.array([7, 1, 2, 3]), 1) is None


def test_confidence_from_a_corpus_grows_with_what_agrees() -> None:
    match = [1, 2, 3, 4]

    def confidence(*endings: int) -> int:
        draft = started(Corpus([[*match, ending] for ending in endings])).draft(np.array([9, *match]), 1)
        assert draft is not None and draft.tokens == [7]
        return draft.confidence

    assert confidence(7) == confidence_of(4) - 1
    assert confidence(7, 7) == confidence_of(4)
    assert confidence(7, 7, 7) == confidence_of(4) + 1
    assert confidence(7, 7, 8) == confidence_of(4) - 1


def test_confidence_stays_on_the_scale() -> None:
    match = list(range(100, 140))
    draft = started(Corpus([[*match, 7]] * 9)).draft(np.array(match), 1)
    assert draft == Draft([7], MOST_CONFIDENT)
    draft = started(Corpus([[1, 7]]), least_match=1).draft(np.array([1]), 1)
    assert draft == Draft([7], 0)


def test_a_copy_that_reaches_the_end_goes_on_as_a_loop() -> None:
    assert started().draft(np.array([9, 1, 2, 3, 1, 2, 3, 1, 2]), 8) == Draft([3, 1, 2] * 2 + [3, 1], confidence_of(5))


def test_a_new_sequence_knows_the_corpus_and_nothing_of_the_last_text() -> None:
    drafter = started(Corpus([[5, 6, 7]]))
    assert drafter.draft(np.array([1, 2, 3, 1, 2]), 1) is not None
    drafter.observe(0)
    drafter.end()
    drafter.end()
    drafter.begin(SamplingParams(), None, ROW)
    assert drafter.draft(np.array([1, 2]), 1) is None
    assert drafter.draft(np.array([1, 2, 5, 6]), 1) == Draft([7], confidence_of(2) - 1)


@pytest.mark.parametrize("settings", [{"least_match": 0}, {"least_share": -0.1}, {"least_share": 1.1}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="needs least_match >= 1 and least_share from 0 to 1"):
        SuffixDrafter(**settings)


def test_is_a_drafter() -> None:
    drafter: Drafter = SuffixDrafter()
    assert (drafter.name, drafter.cost) == ("suffix", "free")
