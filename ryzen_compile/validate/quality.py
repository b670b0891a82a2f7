"""How much of a model's quality is left: an engine against a reference on the same windows of text.

Every token of a window but the first is predicted from those before it in the window. Mean KL divergence and top-1
agreement say how far the candidate's predictions are from the reference's, the perplexity ratio and the loss of
accuracy what that costs on this text. Tokens of one window are not independent, so standard errors take the windows as
the samples; those of a perplexity follow from the mean negative log-likelihood by the delta method (its derivative
times the error), that of the loss from the two accuracies of each window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ryzen_compile.errors import NumericalError, UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import Engine
from ryzen_compile.spec import ModelSpec
from ryzen_compile.validate.measured import Measured

if TYPE_CHECKING:
    from torch import nn

    from ryzen_compile.program import Program

CHUNK = 1 << 17  # logits that are widened to float64 at a time: they stay in the cache
BOUND_WINDOWS = 4  # fewer say too little about their own spread
# What is kept of a window: means over the tokens that are predicted in it.
_COMPARED = ("kl", "agreement", "nll", "reference's nll", "accuracy", "reference's accuracy")

Progress = Callable[[int, int], None]


class Scorer(Protocol):
    """Anything that predicts every token of a window."""

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Float32 ``(B, L, V)`` for ``ids`` ``(B, L)`` int64; row t predicts token t + 1. The array is the caller's."""
        ...


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, which is NaN when there was one window only."""

    value: float
    error: float


@dataclass(frozen=True)
class Perplexity:
    """Of one scorer on one text; ``tokens`` are those predicted, ``worst_window`` is the hardest one's index."""

    tokens: int
    windows: int
    perplexity: Estimate
    worst_window: int


@dataclass(frozen=True)
class Quality:
    """A candidate beside its reference.

    ``tokens`` are those predicted: one less per window than were read. ``kl`` is the mean KL divergence (reference ||
    candidate) in nats per token, ``top1`` the share of tokens for which both rank the same token first, ``ratio`` the
    candidate's perplexity over the reference's. ``worst_window`` is the index of the window with the largest mean KL.

    ``accuracy`` and ``reference_accuracy`` are the shares of tokens whose most likely prediction is the text's own
    token. ``accuracy_loss`` is the part of the reference's that the candidate has lost, 1 - r with
    r = mean(a) / mean(b), where a_i is the candidate's accuracy in window i of n and b_i the reference's. Its error is
    sd(a - r b) / (sqrt(n) mean(b)), sd dividing by n - 1 (delta method, paired by windows: what makes a window hard for
    both cancels). It is NaN where the reference predicts no token, and negative where the candidate predicts more.
    """

    tokens: int
    windows: int
    kl: Estimate
    top1: Estimate
    perplexity: Estimate
    reference_perplexity: Estimate
    ratio: Estimate
    accuracy: Estimate
    reference_accuracy: Estimate
    accuracy_loss: Estimate
    worst_window: int
    worst_kl: float

    @property
    def ratio_bound(self) -> float:
        """The upper end of the ratio's 95 % confidence interval; not finite below ``BOUND_WINDOWS`` windows."""
        return self.ratio.value + confidence_factor(self.windows) * self.ratio.error

    @property
    def top1_bound(self) -> float:
        """The lower end of the agreement's 95 % confidence interval; not finite below ``BOUND_WINDOWS`` windows."""
        return self.top1.value - confidence_factor(self.windows) * self.top1.error

    @property
    def accuracy_loss_bound(self) -> float:
        """The upper end of the loss's 95 % confidence interval; not finite below ``BOUND_WINDOWS`` windows."""
        return self.accuracy_loss.value + confidence_factor(self.windows) * self.accuracy_loss.error


def score(
    candidate: Scorer, reference: Scorer, windows: np.ndarray, *, batch: int = 8, progress: Progress | None = None
) -> Quality:
    """Compares two scorers on ``windows`` ``(n, L)`` int64.

    Holds the float32 logits of ``batch`` windows of both and little more; sums are float64. ``progress`` hears how many
    windows of how many are done. Raises ``UsageError`` when the vocabularies differ, ``NumericalError`` for logits that
    are NaN or infinite.
    """
    rows = np.empty((len(windows), len(_COMPARED)))
    for start, ids in _batches(windows, batch, progress):
        ours, theirs = _logits(candidate, ids), _logits(reference, ids)
        if ours.shape != theirs.shape:
            raise UsageError(
                f"the candidate predicts {ours.shape[-1]} tokens, the reference {theirs.shape[-1]}",
                hint="compare with the model that it was made from",
            )
        for row, (own, other, tokens) in enumerate(zip(ours, theirs, ids, strict=True), start):
            rows[row] = _compare(own, other, tokens, row)
    kl, top1, own_nll, other_nll, own_hits, other_hits = rows.T
    return Quality(
        tokens=len(windows) * (windows.shape[1] - 1),
        windows=len(windows),
        kl=_mean(kl),
        top1=_mean(top1),
        perplexity=_exponential(own_nll),
        reference_perplexity=_exponential(other_nll),
        ratio=_exponential(own_nll - other_nll),
        accuracy=_mean(own_hits),
        reference_accuracy=_mean(other_hits),
        accuracy_loss=_lost_share(own_hits, other_hits),
        worst_window=int(kl.argmax()),
        worst_kl=float(kl.max()),
    )


def perplexity(scorer: Scorer, windows: np.ndarray, *, batch: int = 8, progress: Progress | None = None) -> Perplexity:
    """One scorer alone on ``windows`` ``(n, L)`` int64; see ``score``."""
    nll = np.empty(len(windows))
    for start, ids in _batches(windows, batch, progress):
        for row, (logits, tokens) in enumerate(zip(_logits(scorer, ids), ids, strict=True), start):
            total = sum(_surprise(_log_softmax(logits[part], row), tokens, part) for part in _parts(logits))
            nll[row] = total / (len(tokens) - 1)
    return Perplexity(
        tokens=len(windows) * (windows.shape[1] - 1),
        windows=len(windows),
        perplexity=_exponential(nll),
        worst_window=int(nll.argmax()),
    )


def confidence_factor(windows: int) -> float:
    """How many standard errors a 95 % confidence interval of ``windows`` samples reaches to either side.

    Student's t quantile by its expansion in 1 / (windows - 1) (Abramowitz & Stegun 26.7.5), within 1 % from 4 windows
    up; infinite below that.
    """
    if windows < BOUND_WINDOWS:
        return math.inf
    z, v = 1.959963984540054, windows - 1
    terms = (
        z,
        (z**3 + z) / (4 * v),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3),
    )
    return math.fsum(terms)


def interval(estimate: Estimate, windows: int, unit: str) -> Measured:
    """An estimate over ``windows`` windows with its 95 % interval."""
    reach = confidence_factor(windows) * estimate.error
    known = math.isfinite(reach)
    return Measured(
        value=estimate.value,
        low=estimate.value - reach if known else None,
        high=estimate.value + reach if known else None,
        unit=unit,
        samples=windows,
    )


def fitting_batch(batch: int, length: int, vocab: int, budget_bytes: int) -> int:
    """At most ``batch`` windows, fewer (but one) where two scorers' logits for them would exceed ``budget_bytes``."""
    return max(1, min(batch, budget_bytes // (2 * 4 * length * vocab)))


# --- scorers ----------------------------------------------------------------------------------------------------------
class ModelScorer:
    """A torch model in eval mode, transformers' or ``forward(ids (B, L)) -> (B, L, V)``: the float reference."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model.eval()

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """See ``Scorer``. Raises ``UsageError`` for tokens that the model's table does not have."""
        import torch

        if hasattr(self._model, "get_input_embeddings"):
            _check_tokens(ids, self._model.get_input_embeddings().num_embeddings)
        with torch.inference_mode():
            result = self._model(torch.from_numpy(ids))
        logits = getattr(result, "logits", result)
        found: np.ndarray = (logits[0] if isinstance(logits, tuple) else logits).float().numpy()
        return found


class EngineScorer:
    """An engine as generation runs it.

    One that returns all logits reads each window in one step, row by row. One that returns the last token's only, as an
    artifact for generation does, is fed B windows side by side, one token at a time (teacher forcing): slower, and
    exactly the graph that makes tokens.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """See ``Scorer``. Raises ``UsageError`` beyond the vocabulary or the context."""
        _check_fit(ids, self._engine.spec)
        out = np.empty((*ids.shape, self._engine.spec.vocab), np.float32)
        (self._read_rows if self._engine.all_logits else self._read_steps)(ids, out)
        return out

    def _read_rows(self, ids: np.ndarray, out: np.ndarray) -> None:
        cache = self._cache(1, ids.shape[1])
        for row in range(len(ids)):
            # Nothing was counted in the cache, so each row starts from an empty one.
            out[row] = self._engine.step(ids[row : row + 1], cache)[0]

    def _read_steps(self, ids: np.ndarray, out: np.ndarray) -> None:
        cache = self._cache(*ids.shape)
        for position in range(ids.shape[1]):
            token = np.ascontiguousarray(ids[:, position : position + 1])
            out[:, position] = self._engine.step(token, cache)[:, -1]
            cache.advance(1)

    def _cache(self, rows: int, tokens: int) -> KVCache:
        engine = self._engine
        return KVCache(engine.slots, rows, tokens, limit=engine.spec.context, storage=engine.storage)


class ProgramScorer:
    """A Program without a cache, run node by node with the references: quality without ONNX."""

    def __init__(self, program: Program) -> None:
        if program.slots:
            raise UsageError(
                f"this Program has a cache of {len(program.slots)} slots, scoring it needs one without",
                hint="score it before insert_kv_cache, or compile it and use EngineScorer",
            )
        self._program = program

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """See ``Scorer``. Raises ``UsageError`` beyond the vocabulary or the context."""
        import torch

        from ryzen_compile.validate.parity import full_logits

        _check_fit(ids, self._program.spec)
        found: np.ndarray = full_logits(self._program, torch.from_numpy(ids)).numpy()
        return found


def _check_fit(ids: np.ndarray, spec: ModelSpec) -> None:
    if ids.shape[1] > spec.context:
        raise UsageError(
            f"windows of {ids.shape[1]} tokens exceed the model's context of {spec.context}",
            hint="ask for a shorter length",
        )
    _check_tokens(ids, spec.vocab)


def _check_tokens(ids: np.ndarray, vocab: int) -> None:
    if ids.min() < 0 or ids.max() >= vocab:
        raise UsageError(
            f"the windows hold tokens from {ids.min()} to {ids.max()}, the model knows 0 to {vocab - 1}",
            hint="tokenize with the model's own tokenizer",
        )


# --- sums -------------------------------------------------------------------------------------------------------------
def _batches(windows: np.ndarray, batch: int, progress: Progress | None) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the first, windows (B, L)), reporting each batch when the next one is asked for."""
    if windows.ndim != 2 or windows.dtype != np.int64 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UsageError(
            f"expected at least one window of at least 2 tokens, (n, L) int64, got {windows.shape} {windows.dtype}"
        )
    if batch < 1:
        raise UsageError(f"batch must be at least 1, got {batch}")
    for start in range(0, len(windows), batch):
        ids = np.ascontiguousarray(windows[start : start + batch])
        yield start, ids
        if progress is not None:
            progress(start + len(ids), len(windows))


def _logits(scorer: Scorer, ids: np.ndarray) -> np.ndarray:
    logits = scorer.logits(ids)
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise UsageError(
            f"{type(scorer).__name__} gave logits {logits.shape} for tokens {ids.shape}, expected one row per token",
            hint="a model that was pruned to its last token's logits cannot be scored at once",
        )
    return logits


def _parts(logits: np.ndarray) -> list[slice]:
    """The rows of ``logits`` (L, V) that have a target, all but the last, in runs of at most ``CHUNK`` numbers."""
    last, step = len(logits) - 1, max(1, CHUNK // logits.shape[1])
    return [slice(start, min(start + step, last)) for start in range(0, last, step)]


def _compare(ours: np.ndarray, theirs: np.ndarray, tokens: np.ndarray, window: int) -> np.ndarray:
    """Means over a window's predictions, logits (L, V) twice: ``_COMPARED``."""
    totals = np.zeros(len(_COMPARED))
    for part in _parts(ours):
        q, p = _log_softmax(ours[part], window), _log_softmax(theirs[part], window)
        own, other, text = ours[part].argmax(-1), theirs[part].argmax(-1), _targets(tokens, part)
        totals += (
            (np.exp(p) * (p - q)).sum(),
            (own == other).sum(),
            _surprise(q, tokens, part),
            _surprise(p, tokens, part),
            (own == text).sum(),
            (other == text).sum(),
        )
    return totals / (len(tokens) - 1)


def _log_softmax(logits: np.ndarray, window: int) -> np.ndarray:
    """Float64 (rows, V)."""
    wide = logits.astype(np.float64)
    largest = wide.max(-1, keepdims=True)
    if not (np.isfinite(largest).all() and np.isfinite(wide.min())):
        raise NumericalError(
            f"logits of window {window} are NaN or infinite", hint="the model overflowed or is damaged"
        )
    wide -= largest
    normalized: np.ndarray = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return normalized


def _surprise(log_probability: np.ndarray, tokens: np.ndarray, part: slice) -> float:
    """Summed negative log-likelihood of the tokens that the rows ``part`` predict."""
    targets = _targets(tokens, part)
    return -float(log_probability[np.arange(len(targets)), targets].sum())


def _targets(tokens: np.ndarray, part: slice) -> np.ndarray:
    """The tokens of a window (L,) that the rows ``part`` predict."""
    return tokens[part.start + 1 : part.stop + 1]


def _mean(samples: np.ndarray) -> Estimate:
    error = samples.std(ddof=1) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
    return Estimate(float(samples.mean()), float(error))


def _exponential(samples: np.ndarray) -> Estimate:
    """exp of the mean, infinite where it overflows."""
    mean = _mean(samples)
    with np.errstate(over="ignore", invalid="ignore"):
        value = np.exp(np.float64(mean.value))
        return Estimate(float(value), float(value * mean.error))


def _lost_share(own: np.ndarray, other: np.ndarray) -> Estimate:
    """1 - mean(own) / mean(other) of samples (n,) that pair up; see ``Quality``."""
    whole = float(other.mean())
    if not whole:
        return Estimate(math.nan, math.nan)
    ratio = float(own.mean()) / whole
    return Estimate(1.0 - ratio, _mean(own - ratio * other).error / whole)
