"""Whole requests on the baseline and on the optimized model, in turns within one run: what a user of either waits for.

A request is one prompt and the tokens that follow it, batch 1, greedy, through any end token. Every round gives each
prompt to both engines, one right after the other, so that a slow minute of the machine meets both; who goes first
alternates. A round's figure is the mean of its prompts. Tokenizing and turning tokens into text are not in any time:
they are the same for both.

**TTFT**, the time to the first token, is here: the prompt's ids into an empty cache in one step, and the most likely
token drawn from the logits. Every further token is a step of one token and its drawing; the last one drawn is not
stepped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from ryzen_compile.errors import UsageError
from ryzen_compile.fields import Fields
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import Engine
from ryzen_compile.validate.measured import Measured, Spread, speed_up

if TYPE_CHECKING:  # it runs requests of this module's, in processes of their own
    from ryzen_compile.validate.footprint import Footprint

BASELINE, OPTIMIZED = "baseline", "optimized"
# Before each request. Idle threads of the engine that ran last wait busily for their next task, PyTorch's for some ten
# milliseconds, on the cores that the other engine computes with.
PAUSE_SECONDS = 0.05


class EngineFigures(Fields):
    """One engine's. Samples of a ``Spread`` are rounds, each the mean of its prompts, unless it says otherwise.

    Memory is measured elsewhere, in a process that holds this engine alone; None where it was not.
    """

    name: str
    ttft_ms: Spread = Field(description="prompt read and first token drawn; no tokenizing")
    tpot_ms: Spread = Field(description="time per output token behind the first")
    itl_ms: Spread = Field(description="inter-token latency: every token behind the first, of all prompts and rounds")
    request_ms: Spread = Field(description="prompt and all new tokens: TTFT plus decode")
    tokens_per_second: Spread = Field(description="new tokens of whole requests over the requests' time, TTFT included")
    peak_memory_bytes: int | None = Field(
        default=None, description="the most resident while loading and generating, above start_memory_bytes"
    )
    mean_memory_bytes: int | None = Field(default=None, description="its mean over time, above start_memory_bytes")
    start_memory_bytes: int | None = Field(
        default=None, description="resident with the libraries imported and nothing loaded; add it for whole processes"
    )
    weights_bytes: int = Field(ge=0, description="as stored, tied ones once; of a second form for prompts, too")
    cache_bytes: int = Field(ge=0, description="keys and values that the cache holds after a request, without room")
    samples: dict[str, tuple[float, ...]] = Field(description="ttft_ms and tpot_ms, in the order of the rounds")


class InferenceReport(Fields):
    """``engines`` are "baseline" and "optimized". ``speed_ups`` say how many times better the optimized one is, by
    rounds: ``ttft``, ``decode`` (time per token behind the first), ``end_to_end`` (a whole request) and ``throughput``
    (``tokens_per_second``, which for one request at a time says the same as ``end_to_end``)."""

    rounds: int = Field(ge=1)
    prompts: int = Field(default=1, ge=1, description="requests of a round")
    prompt_tokens: int = Field(ge=1)
    new_tokens: int = Field(ge=2)
    engines: dict[str, EngineFigures]
    speed_ups: dict[str, Measured]
    memory_ratio: Measured | None = Field(
        default=None, description="the baseline's peak over the optimized one's, both above what imports take"
    )

    def with_memory(self, baseline: Footprint, optimized: Footprint) -> InferenceReport:
        """This report with what each engine took in a process of its own."""
        engines = dict(self.engines)
        for name, found in ((BASELINE, baseline), (OPTIMIZED, optimized)):
            memory = {
                "peak_memory_bytes": found.peak_above_start_bytes,
                "mean_memory_bytes": found.mean_above_start_bytes,
                "start_memory_bytes": found.start_bytes,
            }
            engines[name] = engines[name].model_copy(update=memory)
        own = optimized.peak_above_start_bytes
        ratio = Measured(value=baseline.peak_above_start_bytes / own, unit="x") if own else None
        return self.model_copy(update={"engines": engines, "memory_ratio": ratio})


class InferenceValidator:
    """Measures ``optimized`` against ``baseline`` on ``prompts`` ``(N, P)`` int64, ``new_tokens`` behind each.

    Both compute with the threads that they were made with. ``warmup`` requests on each go before the ``rounds`` and are
    not counted. Raises ``UsageError``, before anything runs, for prompts that are none or do not fit a context, for
    vocabularies that differ, for engines of which nothing says what their weights take, and for counts out of range.
    """

    def __init__(
        self,
        baseline: Engine,
        optimized: Engine,
        prompts: np.ndarray,
        *,
        new_tokens: int,
        rounds: int,
        warmup: int = 1,
    ) -> None:
        if rounds < 1 or warmup < 0 or new_tokens < 2:
            raise UsageError(
                f"expected at least 1 round, 0 warm-ups and 2 new tokens, got {rounds}, {warmup} and {new_tokens}",
                hint="with a single token there is no time per token behind the first",
            )
        if baseline.spec.vocab != optimized.spec.vocab:
            raise UsageError(
                f"the baseline knows {baseline.spec.vocab} tokens, the optimized model {optimized.spec.vocab}",
                hint="compare with the model that it was made from",
            )
        _check_prompts(prompts, baseline.spec.vocab)
        self._prompts, self._new = np.ascontiguousarray(prompts), new_tokens
        self._rounds, self._warmup = rounds, warmup
        needed = prompts.shape[1] + new_tokens
        self._subjects = [_Subject(name, one, needed) for name, one in ((BASELINE, baseline), (OPTIMIZED, optimized))]

    def measure(self, progress: Callable[[int, int], None] | None = None) -> InferenceReport:
        """Runs everything; ``progress`` hears how many requests of how many are done, warm-ups included."""
        subjects, done = self._subjects, 0
        total = (self._warmup + self._rounds * len(self._prompts)) * len(subjects)
        for subject in subjects:
            subject.requests.clear()
        for turn in range(-self._warmup, self._rounds):
            for number, prompt in enumerate(self._prompts if turn >= 0 else self._prompts[:1]):
                # Forwards and backwards in turn: neither engine always runs in the wake of the other.
                for subject in subjects if (turn + number) % 2 == 0 else reversed(subjects):
                    subject.run(prompt, self._new, turn)
                    done += 1
                    if progress is not None:
                        progress(done, total)
        baseline, optimized = (subject.figures() for subject in subjects)
        return InferenceReport(
            rounds=self._rounds,
            prompts=len(self._prompts),
            prompt_tokens=self._prompts.shape[1],
            new_tokens=self._new,
            engines={BASELINE: baseline.summary, OPTIMIZED: optimized.summary},
            speed_ups={
                "ttft": speed_up(baseline.ttft, optimized.ttft),
                "decode": speed_up(baseline.tpot, optimized.tpot),
                "end_to_end": speed_up(baseline.request, optimized.request),
                "throughput": speed_up(optimized.rates, baseline.rates),  # more is better: the other way round
            },
        )


def timed_request(engine: Engine, cache: KVCache, prompt: np.ndarray, new_tokens: int) -> tuple[float, ...]:
    """Seconds until each of ``new_tokens`` greedy tokens behind ``prompt`` ``(P,)`` int64, each since the one before.

    The first is the TTFT. ``cache``, of one row with room for P + ``new_tokens`` - 1 tokens, is emptied before and
    holds as many afterwards. Raises what the engine raises.
    """
    cache.truncate(0)
    ids, token = np.ascontiguousarray(prompt[None]), np.empty((1, 1), np.int64)
    moments = [time.perf_counter()]
    for _ in range(new_tokens):
        logits = engine.step(ids, cache)
        token[0, 0] = logits[0, -1].argmax()
        cache.advance(ids.shape[1])
        ids = token
        moments.append(time.perf_counter())
    return tuple(after - before for before, after in pairwise(moments))


@dataclass(frozen=True)
class _Figures:
    """Milliseconds and rates by rounds, for the ratios, and the summary of them."""

    ttft: list[float]
    tpot: list[float]
    request: list[float]
    rates: list[float]
    summary: EngineFigures


@dataclass
class _Subject:
    """One engine while it is measured: milliseconds of each token, by rounds and the requests of each."""

    role: str
    engine: Engine
    tokens: int
    requests: dict[int, list[list[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec = self.engine.spec
        if self.tokens > spec.context:
            raise UsageError(
                f"prompts and new tokens take {self.tokens} positions, the {self.role} engine has a context of "
                f"{spec.context}",
                hint="give shorter prompts or ask for fewer new tokens",
            )
        self.weights = _weights_bytes(self.engine)
        # The last token drawn is never stepped.
        self.cache = KVCache(self.engine.slots, 1, self.tokens - 1, limit=spec.context, storage=self.engine.storage)

    def run(self, prompt: np.ndarray, new_tokens: int, turn: int) -> None:
        """One request; those of turns below 0 are not kept."""
        time.sleep(PAUSE_SECONDS)
        seconds = timed_request(self.engine, self.cache, prompt, new_tokens)
        if turn >= 0:
            self.requests.setdefault(turn, []).append([1e3 * one for one in seconds])

    def figures(self) -> _Figures:
        rounds = [self.requests[turn] for turn in sorted(self.requests)]
        ttft = [fmean(request[0] for request in one) for one in rounds]
        tpot = [fmean(step for request in one for step in request[1:]) for one in rounds]
        request = [fmean(sum(request) for request in one) for one in rounds]
        rates = [1e3 * len(one[0]) / mean for one, mean in zip(rounds, request, strict=True)]
        summary = EngineFigures(
            name=self.engine.name,
            ttft_ms=Spread.of(ttft, "ms"),
            tpot_ms=Spread.of(tpot, "ms"),
            itl_ms=Spread.of([step for one in rounds for request in one for step in request[1:]], "ms"),
            request_ms=Spread.of(request, "ms"),
            tokens_per_second=Spread.of(rates, "tok/s"),
            weights_bytes=self.weights,
            cache_bytes=_cache_bytes(self.engine, self.cache),
            samples={"ttft_ms": tuple(ttft), "tpot_ms": tuple(tpot)},
        )
        return _Figures(ttft, tpot, request, rates, summary)


def _check_prompts(prompts: np.ndarray, vocab: int) -> None:
    if prompts.ndim != 2 or prompts.dtype != np.int64 or not prompts.size:
        raise UsageError(
            f"expected at least one prompt of at least one token, (N, P) int64, got {prompts.shape} {prompts.dtype}"
        )
    if prompts.min() < 0 or prompts.max() >= vocab:
        raise UsageError(
            f"the prompts hold tokens from {prompts.min()} to {prompts.max()}, the model knows 0 to {vocab - 1}",
            hint="tokenize with the model's own tokenizer",
        )


def _weights_bytes(engine: Engine) -> int:
    """What an engine says its weights take."""
    said: int | None = getattr(engine, "weights_bytes", None)
    if not said:
        raise UsageError(
            f"nothing says how many bytes the weights of engine {engine.name!r} take",
            hint="measure an artifact's engine or HuggingFaceEager, or give the engine an attribute weights_bytes",
        )
    return said


def _cache_bytes(engine: Engine, cache: KVCache) -> int:
    """Bytes of keys and values held: by the engine itself where it keeps them, else the rows in use of ``cache``."""
    own: int | None = getattr(engine, "cache_bytes", None)
    return cache.memory_breakdown().used if own is None else own
