"""From logits to the next token: penalties, warpers, the draw.

The order and the arithmetic (float32) are transformers': repetition penalty, EOS held back until ``min_new_tokens``,
the caller's processors, then, only when sampling, temperature, top-k, top-p, min-p. Everything is numpy; torch is
imported only when the caller brings processors, which speak torch. It knows no engine, no cache and no stopping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ryzen_compile.errors import NumericalError, PromptError

LogitsProcessor = Callable[..., Any]
Draw = Callable[[np.ndarray, np.ndarray, np.random.Generator], int]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are picked. Raises ``PromptError`` naming the range of what is out of it.

    ``temperature`` 0 means greedy, as does ``do_sample=False``; ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and
    ``repetition_penalty`` 1 switch the respective step off. Only the repetition penalty acts on greedy decoding.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool | np.bool_):
            raise PromptError(f"do_sample must be True or False, got {self.do_sample!r}")
        if not isinstance(self.top_k, int | np.integer) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise PromptError(f"top_k must be an integer >= 0 (0 = off), got {self.top_k!r}")
        self._check("temperature", "a finite number >= 0 (0 = greedy)", lambda value: value >= 0)
        self._check("top_p", "a number with 0 < top_p <= 1", lambda value: 0 < value <= 1)
        self._check("min_p", "a number with 0 <= min_p <= 1", lambda value: 0 <= value <= 1)
        self._check("repetition_penalty", "a finite number > 0", lambda value: value > 0)

    def _check(self, name: str, expected: str, in_range: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not in_range(value):
            raise PromptError(f"{name} must be {expected}, got {value!r}")

    @property
    def greedy(self) -> bool:
        """Whether the token of the highest score is taken, the first of equals."""
        return not self.do_sample or self.temperature == 0


def penalise_repeats(scores: np.ndarray, history: np.ndarray, penalty: float) -> None:
    """Make the tokens in ``history`` ``(N,)`` less likely, in place, in ``scores`` ``(V,)``: CTRL's penalty."""
    # A token that occurs twice is gathered twice and written twice with the same value, so no deduplication is needed.
    seen = scores[history]
    scores[history] = np.where(seen < 0, seen * penalty, seen / penalty)


def candidates(scores: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """What survives temperature, top-k, top-p and min-p of ``scores`` ``(V,)`` float32.

    Returns the token ids ``(N,)`` in ascending order and their scores ``(N,)``; every other token has probability zero.
    A token that ties with the last one kept by top-k is kept too.
    """
    scaled = scores if params.temperature in (0, 1) else scores / np.float32(params.temperature)
    lowest = np.float32(np.finfo(np.float32).min)  # leaves out -inf
    if 0 < params.top_k < len(scaled):
        lowest = max(lowest, _kth_highest(scaled, params.top_k))
    ids = np.flatnonzero(scaled >= lowest)
    kept = scaled[ids]
    if params.top_p < 1:
        ids, kept = _keep(_nucleus(softmax(kept), params.top_p), ids, kept)
    if params.min_p > 0:
        likelihood = softmax(kept)
        ids, kept = _keep(likelihood >= params.min_p * likelihood.max(), ids, kept)
    return ids, kept


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities of ``scores`` ``(N,)``, in its dtype."""
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum())


def distribution(scores: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """What a token is drawn from: ``candidates`` ``(N,)`` and their probabilities ``(N,)`` float64."""
    ids, kept = candidates(scores, params)
    return ids, softmax(kept.astype(np.float64))


def draw(ids: np.ndarray, probabilities: np.ndarray, generator: np.random.Generator) -> int:
    """One of ``ids`` ``(N,)`` at random by ``probabilities`` ``(N,)`` float64. Takes one uniform number."""
    cumulative = np.cumsum(probabilities)
    # A uniform number below 1 times the last sum stays below it, and "right" steps over entries of probability zero.
    return int(ids[np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")])


def spawn_generators(seed: int | None, rows: int) -> list[np.random.Generator]:
    """An independent random stream per row; row b's does not depend on how many rows there are.

    ``seed`` None asks the system for entropy; a negative or non-integer seed raises ``PromptError``.
    """
    if seed is not None and (not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0):
        raise PromptError(f"seed must be an integer >= 0, got {seed!r}")
    children = np.random.SeedSequence(seed).spawn(rows)
    return [np.random.Generator(np.random.PCG64(child)) for child in children]


class TokenChooser:
    """Picks the next token of every row from the logits of a step.

    ``held_back`` are the EOS ids that may not be picked before step ``min_new_tokens``. ``processors`` are
    transformers' ``LogitsProcessor`` objects, or any callable ``(input_ids, scores) -> scores`` over torch tensors.
    ``drafting`` is a random stream beside those of the rows, for tokens that are only guessed; None when greedy.
    """

    def __init__(
        self,
        params: SamplingParams,
        rows: int,
        *,
        seed: int | None = None,
        held_back: Sequence[int] = (),
        min_new_tokens: int = 0,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self.params = params
        self._held_back = list(held_back)
        self._min_new_tokens = min_new_tokens
        self._processors = list(processors)
        # A seed is checked even where greedy decoding has no use for it.
        generators = spawn_generators(seed, 0 if params.greedy else rows + 1)
        self._generators, self.drafting = generators[:rows], generators[rows] if generators else None
        self._chosen = np.zeros(rows, dtype=np.int64)
        for processor in self._processors:
            if not callable(processor):
                raise PromptError(f"logits_processor must hold callables, got {processor!r}")

    def choose(
        self,
        logits: np.ndarray,
        step: int,
        ids: np.ndarray,
        starts: np.ndarray,
        done: np.ndarray,
        draw: Draw = draw,
    ) -> np.ndarray:
        """The next tokens ``(B,)`` int64 of ``logits`` ``(B, V)`` float32; the array is reused by the next call.

        ``ids`` ``(B, L)`` is prompt and tokens so far, row b's own from ``starts[b]`` on. ``step`` counts new tokens
        from 0. Rows with ``done[b]`` are skipped, their entry is meaningless. When sampling, ``draw`` picks from the
        distribution. Raises ``NumericalError``, naming step and row, for logits with NaN, with +inf, or with nothing
        but -inf.
        """
        params = self.params
        holds_back = step < self._min_new_tokens and bool(self._held_back)
        if params.greedy and params.repetition_penalty == 1 and not holds_back and not self._processors:
            for row in range(len(logits)):
                if not done[row]:
                    self._chosen[row] = _best(logits[row], row, step)
            return self._chosen
        scores = logits.astype(np.float32)
        for row in range(len(scores)):
            if not done[row]:
                _best(scores[row], row, step)
                if params.repetition_penalty != 1:
                    penalise_repeats(scores[row], ids[row, starts[row] :], params.repetition_penalty)
        if holds_back:
            scores[:, self._held_back] = -np.inf
        for processor in self._processors:
            scores = _call_processor(processor, ids, scores)
        for row in range(len(scores)):
            if not done[row]:
                best = _best(scores[row], row, step, "processed scores")
                self._chosen[row] = (
                    best if params.greedy else draw(*distribution(scores[row], params), self._generators[row])
                )
        return self._chosen


def _kth_highest(scores: np.ndarray, k: int) -> np.float32:
    """The k-th highest of ``scores`` ``(V,)``, ``k`` <= V.

    Of 4 k groups, the k-th highest maximum is a bound that at least k scores reach, and few of a large vocabulary do:
    only those are partitioned, which takes many times longer for a score than comparing it.
    """
    groups = 4 * k
    if len(scores) >= 4 * groups:
        whole = len(scores) // groups * groups
        maxima = scores[:whole].reshape(-1, groups).max(axis=0)
        scores = scores[scores >= np.partition(maxima, groups - k)[groups - k]]
    place = len(scores) - k
    return np.float32(np.partition(scores, place)[place])


def _nucleus(likelihood: np.ndarray, top_p: float) -> np.ndarray:
    """Which of the tokens with probabilities ``likelihood`` ``(N,)`` top-p keeps, as ``(N,)`` bool.

    From the unlikeliest up, tokens go while all of them together hold no more than 1 - top_p; the last one stays.
    """
    # Sorting the values alone is many times faster than sorting indices, and tells where the line is.
    ascending = np.sort(likelihood)
    gone = int(np.count_nonzero(np.cumsum(ascending)[:-1] <= 1 - top_p))
    line = ascending[gone]
    is_kept = likelihood > line
    level = np.flatnonzero(likelihood == line)
    is_kept[level[np.count_nonzero(is_kept) + len(level) - (len(likelihood) - gone) :]] = True
    return np.asarray(is_kept)


def _keep(mask: np.ndarray, ids: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return ids[mask], scores[mask]


def _best(scores: np.ndarray, row: int, step: int, what: str = "logits") -> int:
    """The first index of the maximum, as ``torch.argmax``.

    One pass also tells bad rows: numpy's argmax stops at a NaN, and else +inf, or -inf if there is nothing else, wins.
    """
    best = int(scores.argmax())
    highest = float(scores[best])
    if not math.isfinite(highest):
        found = "no token left above -inf" if highest == -math.inf else f"{highest} at token {best}"
        raise NumericalError(f"{what} of row {row} at step {step} have {found}, expected finite numbers")
    return best


def _call_processor(processor: LogitsProcessor, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """``processor`` over ``ids`` ``(B, L)`` and ``scores`` ``(B, V)`` as torch tensors; its result as float32 numpy."""
    import torch

    result = processor(torch.from_numpy(ids), torch.from_numpy(scores))
    processed = result.detach().cpu().float().numpy() if isinstance(result, torch.Tensor) else np.asarray(result)
    if processed.shape != scores.shape or processed.dtype.kind != "f":
        raise PromptError(
            f"logits processor {type(processor).__name__} must return floating scores of shape {scores.shape}, "
            f"got {processed.dtype} of shape {processed.shape}"
        )
    return np.ascontiguousarray(processed, dtype=np.float32)
