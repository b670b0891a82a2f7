"""What ``generate`` is asked for: prompts as arrays, settings from a config and arguments, checked or refused by name.

The names and their meaning are transformers'. None is ever ignored: what this loop does not have is refused, as an
argument at once and as a config's value when it is not neutral.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ryzen_compile.errors import PromptError
from ryzen_compile.runtime.sampling import SamplingParams
from ryzen_compile.runtime.speculative.settings import TRANSFORMERS_NAMES
from ryzen_compile.runtime.stopping import (
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
ELSEWHERE = ("window", "sinks", "speculation", *TRANSFORMERS_NAMES)  # arguments of a model's generate, not of the loop
# Features of transformers that this loop does not have, with the value that leaves each of them off (None always does).
UNSUPPORTED: dict[str, object] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "encoder_repetition_penalty", "typical_p", "guidance_scale"), 1),
    **dict.fromkeys(("penalty_alpha", "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_length"), 0),
    **dict.fromkeys(("top_h", "dola_layers", "constraints", "force_words_ids", "bad_words_ids", "sequence_bias")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "max_time")),
    **dict.fromkeys(("prefix_allowed_tokens_fn", "negative_prompt_ids", "custom_generate")),
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
        raise PromptError(
            f"generation argument {name}={value!r}: not supported", hint=f"accepted: {', '.join(sorted(ACCEPTED))}"
        )
    # A config carries many names that concern no decoder loop, and transformers ignores those it does not know.
    if name in ACCEPTED or is_config or (name in ELSEWHERE and value is None):
        return
    if name in ELSEWHERE:
        raise PromptError(f"generation argument {name}={value!r} is for CompiledModel.generate, not for the loop alone")
    known = (*ACCEPTED, *ELSEWHERE, "input_ids", "attention_mask", "generation_config")
    near = difflib.get_close_matches(name, known, n=1)
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
