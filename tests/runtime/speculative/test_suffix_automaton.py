"""SuffixAutomaton: every substring of random texts, its number of occurrences and its last one, against brute force."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pytest

from ryzen_compile.runtime.speculative.suffix_automaton import MOST_MARKED, ROOT, SuffixAutomaton

FIBONACCI = [0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0]


def random_text(length: int, alphabet: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, alphabet, length).tolist()


TEXTS = [
    [5],
    [5, 5],
    [5, 7],
    [3] * 17,
    [1, 2] * 9,
    FIBONACCI,
    *(random_text(length, alphabet, length) for length in (7, 31, 64) for alphabet in (2, 3, 5, 1000)),
]


def built(*texts: Sequence[int]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    for text in texts:
        automaton.restart()
        for token in text:
            automaton.extend(token)
    return automaton


def state_of(automaton: SuffixAutomaton, string: Sequence[int]) -> int | None:
    state = ROOT
    for token in string:
        if token not in automaton.next[state]:
            return None
        state = automaton.next[state][token]
    return state


def substrings(text: Sequence[int]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(text[begin:end]) for begin in range(len(text)) for end in range(begin + 1, len(text) + 1))


def brute_longest_repeat(text: Sequence[int]) -> tuple[int, int]:
    for length in range(len(text) - 1, 0, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == text[-length:]:
                return length, end
    return 0, 0


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: f"{len(text)} of {len(set(text))}")
def test_holds_every_substring_as_often_as_it_occurs_and_nothing_else(text: list[int]) -> None:
    automaton = built(text)
    counts = automaton.counts()
    expected = substrings(text)
    for string, count in expected.items():
        state = state_of(automaton, string)
        assert state is not None and counts[state] == count, string
    assert counts[ROOT] == len(text)
    # Every path from the root is a substring: as many paths as there are substrings, all of which were found.
    paths = [1] + [0] * (len(automaton.length) - 1)
    for state in sorted(range(len(paths)), key=automaton.length.__getitem__):
        for target in automaton.next[state].values():
            paths[target] += paths[state]
    assert sum(paths) - 1 == len(expected)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: f"{len(text)} of {len(set(text))}")
def test_a_state_for_every_set_of_places_where_substrings_end(text: list[int]) -> None:
    automaton = built(text)
    ends = defaultdict(set)
    for begin in range(len(text)):
        for end in range(begin + 1, len(text) + 1):
            ends[tuple(text[begin:end])].add(end)
    longest: dict[frozenset[int], int] = defaultdict(int)
    for string, places in ends.items():
        longest[frozenset(places)] = max(longest[frozenset(places)], len(string))
    assert len(automaton.length) == len(longest) + 1 <= max(2 * len(text), 2)
    for string, places in ends.items():
        state = state_of(automaton, string)
        assert state is not None and automaton.length[state] == longest[frozenset(places)]
        assert automaton.length[automaton.link[state]] < len(string) <= automaton.length[state]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: f"{len(text)} of {len(set(text))}")
def test_longest_repeat_of_every_prefix(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    assert automaton.longest_repeat() == (0, 0)
    for length, token in enumerate(text, start=1):
        automaton.extend(token)
        assert automaton.longest_repeat() == brute_longest_repeat(text[:length])


def test_longest_repeat_is_an_earlier_occurrence_where_not_all_states_are_marked() -> None:
    text = [4] * (3 * MOST_MARKED) + [9] + [4] * (2 * MOST_MARKED) + [9, 4, 4]
    automaton = SuffixAutomaton()
    for held, token in enumerate(text, start=1):
        automaton.extend(token)
        length, end = automaton.longest_repeat()
        assert length == brute_longest_repeat(text[:held])[0]
        assert end < held and text[end - length : end] == text[held - length : held]


@pytest.mark.parametrize("seed", range(6))
def test_several_texts_share_substrings_and_none_spans_two(seed: int) -> None:
    texts = [random_text(length, 3, 100 * seed + length) for length in (1, 13, 8, 21, 2)]
    texts += [list(texts[1]), [*texts[3][:9], 2, 1]]  # one as a whole again, one that begins as an earlier one
    automaton = built(*texts)
    counts = automaton.counts()
    expected: Counter[tuple[int, ...]] = Counter()
    for text in texts:
        expected += substrings(text)
    for string, count in expected.items():
        state = state_of(automaton, string)
        assert state is not None and counts[state] == count
    joined = [token for text in texts for token in text]
    spanning = set(substrings(joined)) - set(expected)
    assert spanning and all(state_of(automaton, string) is None for string in spanning)
    assert automaton.tokens == counts[ROOT] == len(joined)


def test_a_text_given_again_adds_no_state() -> None:
    text = random_text(50, 4, 0)
    once, thrice = built(text), built(text, text, text)
    assert thrice.length == once.length and thrice.next == once.next
    np.testing.assert_array_equal(thrice.counts(), 3 * once.counts())
