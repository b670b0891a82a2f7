"""The decode loop: prompts in, token ids out, over any engine, with the meaning of transformers' ``generate``.

Every prompt is prefilled alone, in chunks and without its padding, into its row of one cache; then all rows decode
together, each at its own position. Padding therefore never enters attention, and a row's tokens do not depend on its
neighbours. A finished row is stepped on with the pad token, so the batch keeps its shape. Arguments that are not
supported are refused by name: none is ever ignored. It knows no backend and holds no state between calls.
"""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ryzen_compile.errors import PromptError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import Engine
from ryzen_compile.runtime.sampling import LogitsProcessor, SamplingParams, TokenChooser
from ryzen_compile.runtime.stopping import (
    StoppingCriterion,
    StopStrings,
    StopTracker,
    TextDecoder,
    integer,
    min_token_limit,
    new_token_limit,
    token_ids,
)

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
LENGTHS = ("max_new_tokens", "max_length", "min_new_tokens")
SPECIAL = ("eos_token_id", "pad_token_id", "bos_token_id", "stop_strings", "num_return_sequences")
ONLY = {"use_cache": True, "return_dict_in_generate": False}
ACCEPTED = (*LENGTHS, *SAMPLING, *SPECIAL, *ONLY, "seed")
SPECULATIVE = ("prompt_lookup_num_tokens", "assistant_model")
# Features of transformers that this loop does not have, with the value that leaves each of them off (None always does).
UNSUPPORTED: dict[str, object] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "encoder_repetition_penalty", "typical_p", "guidance_scale"), 1),
    **dict.fromkeys(("penalty_alpha", "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_length"), 0),
    **dict.fromkeys(("top_h", "dola_layers", "constraints", "force_words_ids", "bad_words_ids", "sequence_bias")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "max_time", "assistant_early_exit")),
    **dict.fromkeys(("prefix_allowed_tokens_fn", "negative_prompt_ids", "custom_generate", *SPECULATIVE)),
    **dict.fromkeys(("remove_invalid_values", "token_healing", "use_mtp", "is_assistant"), False),
}
# The same, but without effect on a loop without beams and with its own cache: refused as arguments, idle in a config.
IDLE: dict[str, object] = {
    **dict.fromkeys(("early_stopping", "renormalize_logits", "low_memory", "synced_gpus"), False),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), False),
    "length_penalty": 1,
    "cache_implementation": "dynamic",
}
# transformers' default when sampling and nobody says otherwise.
DEFAULT_TOP_K = 50
# Room for new tokens that a generation starts with. Untouched zeros take no memory yet, while growing copies.
INITIAL_ROOM = 1024


class Streamer(Protocol):
    """What receives tokens as they come: transformers' ``TextStreamer`` and its kin."""

    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


@dataclass
class GenerationStats:
    """Filled in by ``generate(..., stats=...)``. Tokens count all rows, and no padding; times are wall seconds.

    ``time_to_first_token`` runs from the call to the first token chosen and includes the prefill; ``decode_seconds`` is
    the time of the ``decode_steps`` steps after it, which gave ``decode_tokens`` tokens.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0
    prefill_seconds: float = 0.0
    time_to_first_token: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class Prompt:
    """Validated prompts: ``ids`` ``(B, P)`` int64, row b's own tokens from column ``starts[b]`` on."""

    ids: np.ndarray
    starts: np.ndarray

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, without padding."""
        return int(self.ids.shape[1] - self.starts.min())

    def rows(self) -> list[list[int]]:
        """The prompts without padding."""
        return [row[start:].tolist() for row, start in zip(self.ids, self.starts, strict=True)]


def config_values(config: object) -> dict[str, Any]:
    """What a ``GenerationConfig`` (or a mapping, as in ``generation_config.json``) sets: all that is not None."""
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        try:
            config = vars(config)
        except TypeError as error:
            raise PromptError(f"generation_config must be a GenerationConfig or a mapping, got {config!r}") from error
    return {name: value for name, value in config.items() if value is not None}


class Settings:
    """A config's values overridden by a call's arguments, checked by name.

    An argument of None switches its feature off, as in transformers, except for lengths, where it means not given.
    """

    def __init__(self, config: object, arguments: dict[str, Any], vocab: int) -> None:
        self.config = config_values(config)
        self.arguments = arguments
        self.vocab = vocab
        for name, value in arguments.items():
            _refuse_unsupported(name, value, {**UNSUPPORTED, **IDLE, **ONLY})
        for name, value in self.config.items():
            _refuse_unsupported(name, value, {**UNSUPPORTED, "return_dict_in_generate": False}, is_config=True)
        chosen = {name: self.get(name) for name in SAMPLING}
        if "top_k" not in arguments and "top_k" not in self.config:
            chosen["top_k"] = DEFAULT_TOP_K
        self.params = SamplingParams(**{name: value for name, value in chosen.items() if value is not None})
        self.copies = integer("num_return_sequences", self.get("num_return_sequences", 1), 1)
        if self.copies > 1 and self.params.greedy:
            raise PromptError(
                f"num_return_sequences {self.copies} needs sampling: greedy copies would all be the same",
                hint="pass do_sample=True and a temperature above 0",
            )
        self.eos = self._known_ids("eos_token_id")
        self.own_pad = self._known_id("pad_token_id")
        self.bos = self._known_id("bos_token_id")

    @property
    def pad(self) -> int | None:
        """What follows a finished row: the pad token, else the first EOS, else None."""
        return self.own_pad if self.own_pad is not None or not self.eos else self.eos[0]

    def get(self, name: str, default: object = None) -> Any:
        """The call's value of ``name``, None included, else the config's."""
        return self.arguments[name] if name in self.arguments else self.config.get(name, default)

    def lengths(self, prompt: Prompt, context: int) -> tuple[int, int]:
        """The greatest and the least number of new tokens."""
        new, total = self.arguments.get("max_new_tokens"), self.arguments.get("max_length")
        if new is None and total is None:
            new = self.config.get("max_new_tokens")
            total = self.config.get("max_length") if new is None else None
        limit = new_token_limit(new, total, columns=prompt.ids.shape[1], longest=prompt.longest, context=context)
        return limit, min_token_limit(self.get("min_new_tokens"), limit)

    def _known_ids(self, name: str) -> tuple[int, ...]:
        found = token_ids(name, self.get(name))
        outside = [one for one in found if not 0 <= one < self.vocab]
        if outside and name in self.arguments:
            raise PromptError(
                f"{name} {outside[0]} is outside the vocabulary of {self.vocab} tokens",
                hint=f"{name}=None switches it off",
            )
        # Configs say -1 for "none" and may list tokens that were added to the tokenizer only.
        return tuple(one for one in found if 0 <= one < self.vocab)

    def _known_id(self, name: str) -> int | None:
        found = self._known_ids(name)
        if len(found) > 1:
            raise PromptError(f"{name} must be one token id, got {list(found)}")
        return found[0] if found else None


def _refuse_unsupported(name: str, value: object, off: dict[str, object], *, is_config: bool = False) -> None:
    """``PromptError`` for an argument that is unknown, or in ``off`` with a value that does not leave it off."""
    if name in off:
        is_off = value is None or (isinstance(value, int | float | str) and value == off[name])
        if is_off or (isinstance(value, list | tuple) and not value):
            return
        if name in ONLY:
            raise PromptError(f"{name} can only be {ONLY[name]}, got {value!r}")
        reason = "speculative decoding is not available in this version" if name in SPECULATIVE else "not supported"
        raise PromptError(
            f"generation argument {name}={value!r}: {reason}", hint=f"accepted: {', '.join(sorted(ACCEPTED))}"
        )
    # A config carries many names that concern no decoder loop, and transformers ignores those it does not know.
    if name in ACCEPTED or is_config:
        return
    near = difflib.get_close_matches(name, (*ACCEPTED, "input_ids", "attention_mask", "generation_config"), n=1)
    guess = f", did you mean {near[0]!r}?" if near else ""
    raise PromptError(f"unknown generation argument {name!r}{guess}", hint=f"accepted: {', '.join(sorted(ACCEPTED))}")


def read_prompt(input_ids: Any, attention_mask: Any, settings: Settings) -> Prompt:
    """Check ids and mask and find each row's padding.

    ``input_ids`` ``(B, P)`` or ``(P,)``, integers within the vocabulary where not masked; a rank-1 input is one prompt,
    an empty one is the empty batch ``(0, 0)``. ``(B, 0)`` becomes one BOS per row.
    """
    ids = _integers("input_ids", input_ids)
    if ids.ndim not in (1, 2):
        raise PromptError(f"input_ids must have rank 1 or 2, got shape {ids.shape}")
    ids = ids.reshape(0, 0) if ids.shape == (0,) else np.atleast_2d(ids)
    if len(ids) and not ids.shape[1]:
        if settings.bos is None:
            raise PromptError("the prompt is empty and no BOS token is defined", hint="give a prompt or a bos_token_id")
        return Prompt(np.full((len(ids), 1), settings.bos, dtype=np.int64), np.zeros(len(ids), dtype=np.int64))
    if attention_mask is not None:
        mask = np.atleast_2d(_integers("attention_mask", attention_mask))
        if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
            raise PromptError(
                f"attention_mask must hold 0 and 1 in the shape of input_ids {ids.shape}, got shape {mask.shape}"
            )
    elif settings.own_pad is not None and settings.own_pad not in settings.eos:
        mask = (ids != settings.own_pad).astype(np.int64)
    else:
        mask = np.ones(ids.shape, dtype=np.int64)
    starts = mask.argmax(axis=1) if ids.size else np.zeros(len(ids), dtype=np.int64)
    for row, start in enumerate(starts):
        zeros = np.flatnonzero(mask[row, start:] == 0)
        if zeros.size:
            where = f"at column {start + zeros[0]}, after a token" if mask[row].any() else "from end to end"
            raise PromptError(
                f"prompt row {row} is masked {where}: padding is only allowed at the left of a prompt",
                hint="set tokenizer.padding_side='left'; without attention_mask, pad_token_id marks the padding",
            )
    outside = np.argwhere((mask == 1) & ((ids < 0) | (ids >= settings.vocab)))
    if outside.size:
        row, column = outside[0]
        raise PromptError(
            f"input_ids[{row}, {column}] is {ids[row, column]}, expected 0 <= id < {settings.vocab} (vocabulary size)"
        )
    return Prompt(ids.astype(np.int64), starts)


def _torch_of(value: Any) -> Any:
    """The torch module if ``value`` is one of its tensors (then it has been imported already), else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(value, torch.Tensor) else None


def _integers(name: str, value: Any) -> np.ndarray:
    """``value`` as an integer array of its own shape; a bool mask counts as integers, floats are refused."""
    if _torch_of(value) is not None:
        if value.is_floating_point() or value.is_complex():
            raise PromptError(f"{name} must be integers, got {value.dtype}")
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise PromptError(f"{name} must be rectangular: pad shorter rows at the left ({error})") from error
    is_mask = name == "attention_mask" and array.dtype == np.bool_
    if array.dtype.kind not in "iu" and array.size and not is_mask:
        raise PromptError(f"{name} must be integers, got {array.dtype}")
    return array.astype(np.int64) if is_mask or not array.size else array


def as_input(given: Any, ids: np.ndarray, *, on_device: bool = True) -> Any:
    """``ids`` as the caller speaks: a torch tensor if ``given`` is one, else numpy."""
    torch = _torch_of(given)
    if torch is None:
        return ids
    tensor = torch.from_numpy(ids)
    return tensor.to(given.device) if on_device else tensor


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
    stats: GenerationStats | None = None,
    **kwargs: Any,
) -> Any:
    """Prompts and what follows them: ``(B * num_return_sequences, P + new)`` int64.

    ``input_ids`` is ``(B, P)`` or one prompt ``(P,)``: lists, numpy or torch integers; torch in gives torch out, to the
    streamer too. ``attention_mask`` has 0 for padding, which is only allowed at the left. Without a mask, a
    ``pad_token_id`` that is no EOS marks the padding. An empty prompt becomes BOS, an empty batch is returned as it is.
    ``kwargs`` are the names in ``ACCEPTED``; they override ``generation_config``. Rows that end early are filled with
    the pad token (default: EOS); without either they run on until all are finished, as in transformers.

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
    limit, minimum = settings.lengths(prompt, engine.spec.context)
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
    cache = KVCache(engine.slots, len(prompt.ids), 0, limit=engine.spec.context, budget_bytes=cache_budget_bytes)
    # The last token chosen is never stepped. Checked in full now, so that no run dies of memory in the middle.
    cache.require(prompt.longest + limit - 1, batch=rows)
    cache.reserve(prompt.longest + min(limit - 1, INITIAL_ROOM))
    show = None if streamer is None else _shower(streamer, input_ids)
    run = _Run(engine, prompt, settings, limit, chooser, tracker, show, stats or GenerationStats())
    run.decode(*run.prefill(cache, chunk), began)
    if streamer is not None:
        streamer.end()
    return as_input(input_ids, run.ids[:, : run.columns].copy())


def _shower(streamer: Streamer, given: Any) -> Callable[[np.ndarray], None]:
    """What puts copies of token arrays to ``streamer``: as torch tensors on the CPU if the caller speaks torch."""

    def show(tokens: np.ndarray) -> None:
        streamer.put(as_input(given, tokens.copy(), on_device=False))

    return show


class _Run:
    """One generation from checked arguments to ids. ``ids`` ``(B, P + limit)`` holds ``columns`` columns so far."""

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
    ) -> None:
        self.engine = engine
        self.prompt = prompt
        self.copies = settings.copies
        self.pad = settings.pad
        self.chooser = chooser
        self.tracker = tracker
        self.show = show
        self.stats = stats
        self.columns = prompt.ids.shape[1]
        self.ids = np.repeat(np.pad(prompt.ids, ((0, 0), (0, limit))), settings.copies, axis=0)
        self.starts = np.repeat(prompt.starts, settings.copies)
        stats.prompt_tokens, stats.new_tokens = int((self.columns - prompt.starts).sum()), 0

    def prefill(self, cache: KVCache, chunk: int) -> tuple[KVCache, np.ndarray]:
        """Fill each row of ``cache`` with its prompt, ``chunk`` tokens a step, then copy rows for further sequences.

        Returns the cache of all sequences and the logits ``(B, V)`` that follow their prompts.
        """
        if self.show is not None:
            self.show(self.prompt.ids)
        began = time.perf_counter()
        last: list[np.ndarray] = []
        for row, start in enumerate(self.prompt.starts):
            view = cache.row(row)
            for begin in range(int(start), self.columns, chunk):
                tokens = np.ascontiguousarray(self.prompt.ids[row : row + 1, begin : begin + chunk])
                logits = self.engine.step(tokens, view)[0, -1]
                view.advance(tokens.shape[1])
            # A copy, as the engine may reuse its output for the next row.
            last.append(logits.copy())
        logits = np.stack(last)
        if self.copies > 1:
            origin = np.repeat(np.arange(len(logits)), self.copies)
            cache, logits = cache.select(origin), logits[origin]
        self.stats.prefill_seconds = time.perf_counter() - began
        return cache, logits

    def decode(self, cache: KVCache, logits: np.ndarray, began: float) -> None:
        """Choose and step until every row is done or ``ids`` is full, from the ``logits`` ``(B, V)`` of the prompts."""
        rows, width = self.ids.shape
        tokens = np.empty((rows, 1), dtype=np.int64)
        held = int(cache.lengths.max())
        first = self.columns
        is_over = self._take(logits, 0)
        first_token_at = time.perf_counter()
        self.stats.time_to_first_token = first_token_at - began
        while not is_over and self.columns < width:
            tokens[:, 0] = self.ids[:, self.columns - 1]
            if held == cache.capacity:
                # By half, so that copying stays a constant share of the work.
                cache.reserve(min(held + 1 + held // 2, held + width - self.columns))
            logits = self.engine.step(tokens, cache)[:, -1]
            cache.advance(1)
            held += 1
            is_over = self._take(logits, self.columns - first)
        self.stats.decode_seconds = time.perf_counter() - first_token_at
        self.stats.decode_steps = self.columns - first - 1
        self.stats.decode_tokens = self.stats.new_tokens - rows

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
        self.ids[:, self.columns] = chosen
        self.columns += 1
        is_over = self.tracker.update(chosen, self.ids[:, : self.columns])
        if self.show is not None:
            self.show(chosen)
        return is_over
