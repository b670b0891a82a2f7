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
from ryzen_compile.runtime.layout import check_fits, reversible
from ryzen_compile.runtime.pool import CachePool
from ryzen_compile.runtime.prefix import PrefixStore
from ryzen_compile.runtime.prompt_cache import PromptCache
from ryzen_compile.runtime.reuse import Reuse
from ryzen_compile.runtime.sampling import Draw, LogitsProcessor, TokenChooser, draw
from ryzen_compile.runtime.speculative.drafter import Draft
from ryzen_compile.runtime.speculative.speculator import Speculator
from ryzen_compile.runtime.speculative.stats import SpeculationStats
from ryzen_compile.runtime.speculative.verifier import Verdict
from ryzen_compile.runtime.stopping import (
    StoppingCriterion,
    StopStrings,
    StopTracker,
    TextDecoder,
    integer,
)
from ryzen_compile.runtime.stream import Stream
from ryzen_compile.spec import CacheSlot

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
    it, which gave ``decode_tokens`` tokens. ``speculation`` is what drafts did to them, None where none were asked for.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0
    prefill_seconds: float = 0.0
    time_to_first_token: float = 0.0
    decode_seconds: float = 0.0
    speculation: SpeculationStats | None = None


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
    speculator: Speculator | None = None,
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
    A ``speculator`` drafts tokens of a single sequence, several of which one step verifies; the text stays what it is
    without, and so does a sampled one where drafts are not drawn themselves, else its distribution.

    Raises ``PromptError`` for whatever is out of range, contradictory, unknown or too long for the context,
    ``MemoryLimitError`` when the cache would exceed its budget, ``NumericalError`` when logits are not finite.
    """
    began = time.perf_counter()
    settings = Settings(generation_config, kwargs, engine.spec.vocab)
    prompt = read_prompt(input_ids, attention_mask, settings)
    chunk = integer("prefill_chunk_size", prefill_chunk_size, 1)
    rows = len(prompt.ids) * settings.copies
    stats = stats or GenerationStats()
    stats.speculation = None if speculator is None else speculator.stats
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
        pool = CachePool(engine.slots, limit=context, storage=engine.storage)
    show = None if streamer is None else _shower(streamer, input_ids)
    known = prefixes if stream is None else None
    reuse = Reuse([source for source in (known, prompt_cache) if source is not None], known)
    if speculator is not None and not speculator.serves(engine, rows):
        speculator = None
    run = _Run(engine, prompt, settings, limit, chooser, tracker, show, stats, reuse, stream, speculator)
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


def read_reusing(
    engine: Engine, row: KVCache, prompt: list[int], reuse: Reuse, *, chunk: int, stream: Stream | None = None
) -> tuple[np.ndarray, int]:
    """Fills an empty row with its prompt; returns the logits ``(V,)`` that follow it, and how much of it was known."""
    tokens = np.array(prompt, dtype=np.int64)
    # What is left has to be computed as it would be within the whole prompt.
    known = reuse.fill(row, tokens[: max(1, len(tokens) - engine.prompt_from + 1)])
    logits = read(engine, row, prompt, known=known, chunk=chunk, stream=stream)
    if min(chunk, len(tokens) - known) >= engine.prompt_from:  # else it was computed in another way
        reuse.learn(row, tokens)
    return logits, known


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
        speculator: Speculator | None,
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
        self.speculator = speculator
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
        last = []
        for row, tokens in enumerate(self.prompt.rows()):
            logits, known = read_reusing(
                self.engine, cache.row(row), tokens, self.reuse, chunk=chunk, stream=self.stream
            )
            self.stats.reused_tokens += known
            last.append(logits)
        self.stats.prefill_seconds = time.perf_counter() - began
        return np.stack(last)

    def copied(self, cache: KVCache) -> KVCache:
        """A row for every sequence; those of one prompt share its pages until they are written."""
        room = min(self.width - self.columns, INITIAL_ROOM)
        if self.stream is not None:
            room = self.stream.capacity - int(cache.lengths.max())
        return cache.select(np.repeat(np.arange(cache.batch), self.copies), room=room)

    def decode(self, cache: KVCache, logits: np.ndarray, began: float) -> None:
        """Choose and step until every row is done or ``ids`` is full, from the ``logits`` ``(B, V)`` of the prompts."""
        rows, first = len(self.ids), self.columns
        is_over = self._take(logits, 0)
        first_token_at = time.perf_counter()
        self.stats.time_to_first_token = first_token_at - began
        self.stats.decode_steps = 0
        if is_over:
            pass
        elif self.speculator is None:
            self._decode_plainly(cache, first)
        else:
            with self.speculator.drafting(self.chooser.params, self.chooser.drafting, cache) as speculator:
                self._decode_drafting(cache, first, speculator)
        self.stats.decode_seconds = time.perf_counter() - first_token_at
        self.stats.decode_tokens = self.stats.new_tokens - rows

    def _decode_plainly(self, cache: KVCache, first: int) -> None:
        """A step, a token for every row, behind the column ``first`` of the first token."""
        tokens, is_over = np.empty((len(self.ids), 1), dtype=np.int64), False
        while not is_over and self.columns < self.width:
            is_over = self._step_once(tokens, cache, first)

    def _decode_drafting(self, cache: KVCache, first: int, speculator: Speculator) -> None:
        """The same for a single row, whose steps also verify what was drafted: a token of the text for each drafted one
        that is the one chosen, and one more."""
        start, windowed = int(self.starts[0]), [slot for slot in self.engine.slots if slot.rows]
        tokens, is_over = np.empty((1, 1), dtype=np.int64), False
        while not is_over and self.columns < self.width:
            held, before, accepted = int(cache.lengths[0]), self.columns, 0
            draft = speculator.draft(self.ids[0, start:before], self._verifiable(windowed, held))
            began = time.perf_counter()
            if draft is None:
                end = min(before + speculator.pause, self.width)
                while not is_over and self.columns < end:
                    is_over = self._step_once(tokens, cache, first)
            else:
                accepted, is_over = self._step_draft(draft, cache, first)
            speculator.observe(draft, held, time.perf_counter() - began, accepted, self.columns - before)

    def _step_once(self, tokens: np.ndarray, cache: KVCache, first: int) -> bool:
        """One more token in every row, by way of ``tokens`` ``(B, 1)``; whether all rows are done."""
        tokens[:, 0] = self.ids[:, self.columns - 1]
        self._make_room(cache, 1)
        logits = self.engine.step(tokens, cache)[:, -1]
        cache.advance(1)
        self.stats.decode_steps += 1
        return self._take(logits, self.columns - first)

    def _step_draft(self, draft: Draft, cache: KVCache, first: int) -> tuple[int, bool]:
        """Steps the newest token and those of ``draft`` together and takes what the text has of them, and one more; how
        many of them that were, and whether the row is done."""
        count, held = len(draft.tokens) + 1, int(cache.lengths[0])
        tokens = np.array([[self.ids[0, self.columns - 1], *draft.tokens]])
        self._make_room(cache, count)
        logits = self.engine.step(tokens, cache, last=count)[:, -count:]
        cache.advance(count)
        self.stats.decode_steps += 1
        accepted, is_over = self._verify(logits, draft, first)
        cache.truncate(held + 1 + accepted)
        return accepted, is_over

    def _verify(self, logits: np.ndarray, draft: Draft, first: int) -> tuple[int, bool]:
        """Choose from ``logits`` ``(1, k + 1, V)`` behind the newest token and each of the ``k`` drafted ones, as long
        as what is chosen was drafted; how many of them that were, and whether the row is done."""
        for place, token in enumerate(draft.tokens):
            pick = draw if draft.proposals is None else Verdict(token, draft.proposals[place])
            is_over = self._take(logits[:, place], self.columns - first, pick)
            is_kept = int(self.ids[0, self.columns - 1]) == token
            if is_over or not is_kept:
                return place + is_kept, is_over
        return len(draft.tokens), self._take(logits[:, -1], self.columns - first)

    def _verifiable(self, windowed: Sequence[CacheSlot], held: int) -> int:
        """How many drafted tokens can be stepped behind ``held`` and one more, and be taken back."""
        left = self.width - self.columns - 1  # what is accepted is followed by one more
        if self.stream is not None:
            return min(left, self.stream.capacity - held - 1, self.stream.slack - 1)
        return reversible(windowed, held + 1, left) if windowed else left

    def _make_room(self, cache: KVCache, tokens: int) -> None:
        """For ``tokens`` more in every row."""
        if self.stream is not None:
            self.stream.make_room(cache, tokens)
            return
        held = int(cache.lengths.max())
        if held + tokens > cache.capacity:
            # By half, so that copying stays a constant share of the work.
            cache.reserve(min(held + tokens + held // 2, held + self.width - self.columns))

    def _take(self, logits: np.ndarray, step: int, draw: Draw = draw) -> bool:
        """Choose every row's token from ``logits`` ``(B, V)``, append it, show it; whether all rows are done."""
        done = self.tracker.done
        self.stats.new_tokens += self.tracker.running
        # Without a pad token there is nothing to fill a finished row with, so its tokens go on being chosen.
        is_padding = self.pad is not None and self.tracker.running < len(done)
        skipped = done if is_padding else np.zeros_like(done)
        chosen = self.chooser.choose(logits, step, self.ids[:, : self.columns], self.starts, skipped, draw)
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
