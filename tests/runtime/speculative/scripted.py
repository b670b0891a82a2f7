"""Drafters that tests know the mind of, and the generation of one sequence with them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.generate import GenerationStats, generate
from ryzen_compile.runtime.sampling import SamplingParams
from ryzen_compile.runtime.speculative.drafter import Draft, Drafter
from ryzen_compile.runtime.speculative.speculator import Experience, Speculator


class Scripted:
    """Base: drafts what ``guess`` returns for every place behind the context."""

    cost: Literal["free", "steps"] = "free"
    confidence = 3

    def __init__(self, name: str = "scripted") -> None:
        self.name = name
        self.contexts: list[int] = []
        self.accepted: list[int] = []
        self.begun = self.ended = 0

    def begin(self, sampling: SamplingParams, generator: np.random.Generator | None, row: KVCache) -> None:
        self.begun += 1
        self.sampling, self.generator = sampling, generator

    def draft(self, context: np.ndarray, most: int) -> Draft | None:
        self.contexts.append(len(context))
        tokens = [self.guess(context, len(context) + place) for place in range(most)]
        return Draft(tokens, self.confidence) if tokens else None

    def guess(self, context: np.ndarray, place: int) -> int:
        raise NotImplementedError

    def observe(self, accepted: int) -> None:
        self.accepted.append(accepted)

    def end(self) -> None:
        self.ended += 1


class Replay(Scripted):
    """Knows the text and says it, but only with probability ``right``; else a token that is wrong."""

    def __init__(self, text: np.ndarray, vocab: int, right: float = 1.0, seed: int = 0) -> None:
        super().__init__("replay")
        self.text, self.vocab, self.right = text, vocab, right
        self.random = np.random.default_rng(seed)

    def guess(self, context: np.ndarray, place: int) -> int:
        token = int(self.text[min(place, len(self.text) - 1)])
        return token if self.random.random() < self.right else (token + 1) % self.vocab


class Random(Scripted):
    """Any token of the vocabulary."""

    def __init__(self, vocab: int, seed: int = 0) -> None:
        super().__init__("random")
        self.vocab, self.random = vocab, np.random.default_rng(seed)

    def guess(self, context: np.ndarray, place: int) -> int:
        return int(self.random.integers(self.vocab))


class Drawing(Scripted):
    """Draws from ``table[last token]`` ``(V, V)``, and says what it drew from."""

    cost: Literal["free", "steps"] = "steps"

    def __init__(self, table: np.ndarray) -> None:
        super().__init__("drawing")
        self.table = table

    def draft(self, context: np.ndarray, most: int) -> Draft | None:
        if self.generator is None:
            raise ValueError("nothing to draw with")
        tokens: list[int] = []
        proposals = []
        last = int(context[-1])
        for _ in range(most):
            ids = np.flatnonzero(self.table[last])
            probabilities = self.table[last][ids]
            last = int(self.generator.choice(ids, p=probabilities))
            tokens.append(last)
            proposals.append((ids, probabilities))
        return Draft(tokens, self.confidence, proposals)


def speculator(drafters: list[Drafter], vocab: int, tokens: int, **settings: Any) -> Speculator:
    """With drafts of ``tokens`` tokens at most; always as many, unless told otherwise."""
    settings = {"fixed": True, **settings}
    experience = settings.pop("experience", None) or Experience()
    return Speculator(drafters, experience, vocab=vocab, most=tokens, **settings)


def drafted(
    engine: Any, prompt: list[int], drafters: list[Drafter], tokens: int, **arguments: Any
) -> tuple[np.ndarray, GenerationStats]:
    """``generate`` with drafts of ``tokens`` tokens, and its statistics."""
    stats = GenerationStats()
    made = arguments.pop("speculator", None) or speculator(drafters, engine.spec.vocab, tokens)
    return generate(engine, [prompt], speculator=made, stats=stats, **arguments)[0], stats
