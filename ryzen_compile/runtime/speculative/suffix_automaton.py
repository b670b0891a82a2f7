"""The suffix automaton of a text that grows: all of its substrings, in memory and time linear in its length.

Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985), built online; for several texts in
one automaton, Mohri, Moreno, Weinstein, "General suffix automaton construction algorithm and space bounds" (2009).

A state stands for the substrings that end at the same places. They are suffixes of one another: ``length`` is that of
the longest, and ``link`` leads to the state of the longest suffix that ends in more places. From state to state lead
tokens. State 0 is the empty string.
"""

from __future__ import annotations

import numpy as np

ROOT = 0
MOST_MARKED = 32  # states a token marks as seen; only a text that repeats itself over and over has longer chains


class SuffixAutomaton:
    """The automaton of the tokens given to ``extend``, and of nothing at first; its lists are indexed by state.

    ``recent`` is where the state's strings ended last, as the number of tokens up to there, before the end of the text;
    it may be an earlier place in texts that repeat themselves more than ``MOST_MARKED`` times. ``prefixes`` counts
    those tokens up to which a text is a string of this state. A token takes some 500 bytes, and at most two states.
    """

    def __init__(self) -> None:
        self.length = [0]
        self.link = [-1]
        self.next: list[dict[int, int]] = [{}]
        self.recent = [0]
        self.prefixes = [0]
        self.last = ROOT
        self.tokens = 0

    def restart(self) -> None:
        """What comes next is another text: no substring spans the two."""
        self.last = ROOT

    def extend(self, token: int) -> None:
        """Append ``token``; constant time on average."""
        length, link, following = self.length, self.link, self.next
        self._mark()
        self.tokens += 1
        state = self.last
        known = following[state].get(token)
        if known is not None:  # only in a text that begins as an earlier one
            self.last = known if length[known] == length[state] + 1 else self._split(state, token, known)
            self.prefixes[self.last] += 1
            return
        new = self.last = len(length)
        length.append(length[state] + 1)
        following.append({})
        self.recent.append(self.tokens)
        self.prefixes.append(1)
        while state >= 0 and token not in following[state]:
            following[state][token] = new
            state = link[state]
        if state < 0:
            link.append(ROOT)
            return
        known = following[state][token]
        link.append(-1)  # ``new`` needs its place before another state is made
        link[new] = known if length[known] == length[state] + 1 else self._split(state, token, known)

    def longest_repeat(self) -> tuple[int, int]:
        """The longest suffix of the text that occurs in it earlier: its length, and the number of tokens up to the end
        of its last known earlier occurrence. ``(0, 0)``: there is none."""
        state = self.link[self.last]
        return (self.length[state], self.recent[state]) if state > ROOT else (0, 0)

    def counts(self) -> np.ndarray:
        """How often the strings of each state occur, ``(states,)`` int64; for the empty one, the number of tokens."""
        counts = list(self.prefixes)
        by_length = np.argsort(np.array(self.length), kind="stable").tolist()
        for state in reversed(by_length[1:]):
            counts[self.link[state]] += counts[state]
        return np.array(counts, dtype=np.int64)

    def _mark(self) -> None:
        """The text so far is an occurrence of all its suffixes, which the next token may find."""
        link, recent, here = self.link, self.recent, self.tokens
        state = self.last
        for _ in range(MOST_MARKED):
            if state <= ROOT:
                return
            recent[state] = here
            state = link[state]

    def _split(self, state: int, token: int, known: int) -> int:
        """The strings of ``known`` as long as ``token`` behind ``state``, and shorter, get a state of their own."""
        length, link, following = self.length, self.link, self.next
        new = len(length)
        length.append(length[state] + 1)
        link.append(link[known])
        following.append(following[known].copy())
        self.recent.append(self.recent[known])
        self.prefixes.append(0)
        link[known] = new
        while state >= 0 and following[state].get(token) == known:
            following[state][token] = new
            state = link[state]
        return new
