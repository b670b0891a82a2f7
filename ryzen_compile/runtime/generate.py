"""The decode loop: prompts in, token ids out, over any engine, with the meaning of transformers' ``generate``.

Every prompt is prefilled alone, in chunks and without its padding, into its row of one cache, less what is known of its
beginning; then all rows decode together, each at its own position. Padding therefore never enters attention, and a
row's tokens do not depend on its neighbours. A finished row is stepped on with the pad token, so the batch keeps its
shape. Arguments that are not supported are refused by name: none is ever ignored. It knows no backend and holds no
state between calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ryzen_compile.errors import PromptError
from ryzen_compile.runtime.arguments import Prompt, Settings, as_input, read_prompt
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import Engine
from ryzen_compile.runtime.layout import check_fits
from ryzen_compile.runtime.pool import CachePool
from ryzen_compile.runtime.prefix import PrefixStore
from ryzen_compile.runtime.prompt_cache import PromptCache
from ryzen_compile.runtime.reuse import Reuse
from ryzen_compile.runtime.sampling import LogitsProcessor, TokenChooser
from ryzen_compile.runtime.stopping import (
    StoppingCriterion,
    StopStrings,
    StopTracker,
    TextDecoder,
    integer,
)
from ryzen_compile.runtime.stream import Stream

# Room for new tokens that a generation starts with. Untouched zeros take no memory yet, while growing copies.
INITIAL_ROOM = 1024
ENDLESS = 1 << 40  # the context of a stream


class Streamer(Protocol):
    """What receives tokens as they come: transformers' ``TextStreamer`` and its kin."""

    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


@dataclass
class GenerationStats:
    """Filled in by ``generate(..., stats=...)``. Tokens count all rows, and no padding; times are wall seconds.

    ``reused_tokens`` of the prompts were known and not computed again. ``time_to_first_token`` runs from the call to
    the first token chosen and includes the prefill; ``decode_seconds`` is the time of the ``decode_steps`` steps after
    it, which gave ``decode_tokens`` tokens.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0
    prefill_seconds: float = 0.0
    time_to_first_token: float = 0.0
    decode_seconds: float = 0.0


def generate(
    engine: Engine,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    generation_config: object = None,
    tokenizer: TextDecoder | None = None,
    streamer: Streamer | None = None,
    logits_processor: Iterable[LogitsProcessor] | None = None,
    stopping_criteria: Iterable[StoppingCriterion] | None = None,
    seed: int | None = None,
    prefill_chunk_size: int = 512,
    cache_budget_bytes: int | None = None,
    pool: CachePool | None = None,
    prefixes: PrefixStore | None = None,
    prompt_cache: PromptCache | None = None,
    stream: Stream | None = None,
    stats: GenerationStats | None = None,
    **kwargs: Any,
) -> Any:
    """Prompts and what follows them: ``(B * num_return_sequences, P + new)`` int64.

    ``input_ids`` is ``(B, P)`` or one prompt ``(P,)``: lists, numpy or torch integers; torch in gives torch out, to the
    streamer too. ``attention_mask`` has 0 for padding, which is only allowed at the left. Without a mask, a
    ``pad_token_id`` that is no EOS marks the padding. An empty prompt becomes BOS, an empty batch is returned as it is.
    ``kwargs`` are the names in ``ACCEPTED``; they override ``generation_config``. Rows that end early are filled with
    the pad token (default: EOS); without either they run on until all are finished, as in transformers.

    The cache is lent by ``pool`` (default: one for this call) and takes at most ``cache_budget_bytes``. What
    ``prompt_cache`` or ``prefixes`` hold of a prompt's beginning is copied, and ``prefixes`` learns what was computed.
    With a ``stream`` a sequence has no end: the cache keeps its first tokens and its last ones, and nothing is reused.

    Raises ``PromptError`` for whatever is out of range, contradictory, unknown or too long for the context,
    ``MemoryLimitError`` when the cache would exceed its budget, ``NumericalError`` when logits are not finite.
    """
    began = time.perf_counter()
    settings = Settings(generation_config, kwargs, engine.spec.vocab)
    prompt = read_prompt(input_ids, attention_mask, settings)
    chunk = integer("prefill_chunk_size", prefill_chunk_size, 1)
    rows = len(prompt.ids) * settings.copies
    if streamer is not None and rows > 1:
        raise PromptError(f"a streamer takes one sequence, got {rows}", hint="generate one prompt at a time")
    if not rows:
        return as_input(input_ids, prompt.ids)
    context = engine.spec.context
    if stream is not None:
        if prompt_cache is not None:
            raise PromptError("prompt_cache cannot be used with a window, whose cache does not keep whole prompts")
        stream.check(engine.slots, context)
        chunk = min(chunk, stream.slack)
    limit, minimum = settings.lengths(prompt, context if stream is None else ENDLESS)
    chooser = TokenChooser(
        settings.params,
        rows,
        seed=seed,
        held_back=settings.eos,
        min_new_tokens=minimum,
        processors=list(logits_processor or ()),
    )
    strings = StopStrings(settings.get("stop_strings"), tokenizer)
    windows = [strings.start(own) for own in prompt.rows() for _ in range(settings.copies)] if strings else []
    tracker = StopTracker(rows, eos=settings.eos, windows=windows, criteria=list(stopping_criteria or ()))
    if pool is None:
        pool = CachePool(engine.slots, limit=context)
    show = None if streamer is None else _shower(streamer, input_ids)
    known = prefixes if stream is None else None
    reuse = Reuse([source for source in (known, prompt_cache) if source is not None], known)
    run = _Run(engine, prompt, settings, limit, chooser, tracker, show, stats or GenerationStats(), reuse, stream)
    run.complete(pool, chunk, began, cache_budget_bytes)
    if streamer is not None:
        streamer.end()
    return as_input(input_ids, run.ids[:, : run.columns].copy())


def _shower(streamer: Streamer, given: Any) -> Callable[[np.ndarray], None]:
    """What puts copies of token arrays to ``streamer``: as torch tensors on the CPU if the caller speaks torch."""

    def show(tokens: np.ndarray) -> None:
        streamer.put(as_input(given, tokens.copy(), on_device=False))

    return show


def read(
    engine: Engine,
    row: KVCache,
    prompt: Sequence[int],
    *,
    known: int = 0,
    chunk: int = 512,
    stream: Stream | None = None,
) -> np.ndarray:
    """Steps a prompt, ``chunk`` tokens at a time, into a row that holds its first ``known`` tokens and has room for the
    rest; returns the logits ``(V,)`` that follow it."""
    tokens = np.array([prompt], dtype=np.int64)
    most = chunk if stream is None else stream.slack
    while known < len(prompt):
        size = _part(len(prompt) - known, chunk, engine.prompt_from, most)
        part = np.ascontiguousarray(tokens[:, known : known + size])
        if stream is not None:
            stream.make_room(row, size)
        logits = engine.step(part, row)[0, -1]
        row.advance(size)
        known += size
    return logits.copy()  # as the engine may reuse its output


def _part(left: int, chunk: int, least: int, most: int) -> int:
    """How many of ``left`` tokens to step next: ``chunk``, or less or more of them so that no step is left with fewer
    than ``least``; never above ``most``, which may force one."""
    size = min(chunk, left)
    rest = left - size
    if not 0 < rest < least:
        return size
    if left >= 2 * least:
        return left - least
    return left if left <= most else size


class _Run:
    """One generation from checked arguments to ids: ``ids`` ``(B, columns)`` so far, ``width`` columns at most, in an
    array that may be wider."""

    def __init__(
        self,
        engine: Engine,
        prompt: Prompt,
        settings: Settings,
        limit: int,
        chooser: TokenChooser,
        tracker: StopTracker,
        show: Callable[[np.ndarray], None] | None,
        stats: GenerationStats,
        reuse: Reuse,
        stream: Stream | None,
    ) -> None:
        self.engine = engine
        self.prompt = prompt
        self.copies = settings.copies
        self.pad = settings.pad
        self.chooser = chooser
        self.tracker = tracker
        self.show = show
        self.stats = stats
        self.reuse = reuse
        self.stream = stream
        self.columns = prompt.ids.shape[1]
        self.width = self.columns + limit
        self.ids = np.repeat(np.pad(prompt.ids, ((0, 0), (0, min(limit, INITIAL_ROOM)))), settings.copies, axis=0)
        self.starts = np.repeat(prompt.starts, settings.copies)
        stats.prompt_tokens, stats.new_tokens = int((self.columns - prompt.starts).sum()), 0
        stats.reused_tokens = 0

    def complete(self, pool: CachePool, chunk: int, began: float, budget_bytes: int | None) -> None:
        """Prefill and decode in a cache that ``pool`` lends; refused at once where its end would not fit."""
        prompts, longest = len(self.prompt.ids), self.prompt.longest
        limit = self.width - self.columns - 1  # the last token chosen is never stepped
        if self.stream is None:
            room, most = longest + min(limit, INITIAL_ROOM), longest + limit
        else:
            room = most = self.stream.capacity
        # Copies are made while the prompts' own rows are still held.
        rows = len(self.ids) + (prompts if self.copies > 1 else 0)
        check_fits(self.engine.slots, rows, most, limit=self.engine.spec.context, budget=budget_bytes, shared=False)
        pool.require(rows, most)
        with pool.borrowed(prompts, room) as cache:
            logits = self.prefill(cache, chunk)
            pool.ask(cache, 0)  # what was learned of the prompts shares the budget
            if self.copies == 1:
                self.decode(cache, logits, began)
                return
            copies = self.copied(cache)
        self.decode(copies, np.repeat(logits, self.copies, axis=0), began)

    def prefill(self, cache: KVCache, chunk: int) -> np.ndarray:
        """Fill each row of ``cache`` with its prompt, ``chunk`` tokens a step; returns the logits ``(B, V)`` that
        follow them."""
        if self.show is not None:
            self.show(self.prompt.ids)
        began = time.perf_counter()
        last = [self._read(cache.row(row), tokens, chunk) for row, tokens in enumerate(self.prompt.rows())]
        self.stats.prefill_seconds = time.perf_counter() - began
        return np.stack(last)

    def copied(self, cache: KVCache) -> KVCache:
        """A row for every sequence; those of one prompt share its pages until they are written."""
        room = min(self.width - self.columns, INITIAL_ROOM)
        if self.stream is not None:
            room = self.stream.capacity - int(cache.lengths.max())
        return cache.select(np.repeat(np.arange(cache.batch), self.copies), room=room)

    def _read(self, row: KVCache, prompt: list[int], chunk: int) -> np.ndarray:
        """Fill an empty row with its prompt; returns the logits ``(V,)`` that follow it."""
        tokens = np.array(prompt, dtype=np.int64)
        # What is left has to be computed as it would be within the whole prompt.
        known = self.reuse.fill(row, tokens[: max(1, len(tokens) - self.engine.prompt_from + 1)])
        self.stats.reused_tokens += known
        logits = read(self.engine, row, prompt, known=known, chunk=chunk, stream=self.stream)
        if min(chunk, len(tokens) - known) >= self.engine.prompt_from:  # else it was computed in another way
            self.reuse.learn(row, tokens)
        return logits

    def decode(self, cache: KVCache, logits: np.ndarray, began: float) -> None:
        """Choose and step until every row is done or ``ids`` is full, from the ``logits`` ``(B, V)`` of the prompts."""
        rows, width = len(self.ids), self.width
        tokens = np.empty((rows, 1), dtype=np.int64)
        first = self.columns
        is_over = self._take(logits, 0)
        first_token_at = time.perf_counter()
        self.stats.time_to_first_token = first_token_at - began
        while not is_over and self.columns < width:
            tokens[:, 0] = self.ids[:, self.columns - 1]
            self._make_room(cache, width - self.columns)
            logits = self.engine.step(tokens, cache)[:, -1]
            cache.advance(1)
            is_over = self._take(logits, self.columns - first)
        self.stats.decode_seconds = time.perf_counter() - first_token_at
        self.stats.decode_steps = self.columns - first - 1
        self.stats.decode_tokens = self.stats.new_tokens - rows

    def _make_room(self, cache: KVCache, left: int) -> None:
        """For one token more in every row, of ``left`` that may still come."""
        if self.stream is not None:
            self.stream.make_room(cache, 1)
            return
        held = int(cache.lengths.max())
        if held == cache.capacity:
            # By half, so that copying stays a constant share of the work.
            cache.reserve(min(held + 1 + held // 2, held + left))

    def _take(self, logits: np.ndarray, step: int) -> bool:
        """Choose every row's token from ``logits`` ``(B, V)``, append it, show it; whether all rows are done."""
        done = self.tracker.done
        self.stats.new_tokens += self.tracker.running
        # Without a pad token there is nothing to fill a finished row with, so its tokens go on being chosen.
        is_padding = self.pad is not None and self.tracker.running < len(done)
        skipped = done if is_padding else np.zeros_like(done)
        chosen = self.chooser.choose(logits, step, self.ids[:, : self.columns], self.starts, skipped)
        if is_padding:
            chosen[done] = self.pad
        if self.columns == self.ids.shape[1]:
            self.ids = np.pad(self.ids, ((0, 0), (0, min(self.columns, self.width - self.columns))))
        self.ids[:, self.columns] = chosen
        self.columns += 1
        is_over = self.tracker.update(chosen, self.ids[:, : self.columns])
        if self.show is not None:
            self.show(chosen)
        return is_over
