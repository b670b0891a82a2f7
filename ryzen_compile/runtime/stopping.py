"""When a row is finished: EOS, stop strings, the caller's criteria; and how many tokens there may be at all.

A finished row is final: later checks never revive it. It knows no logits. Text is compared as transformers does it: a
stop string may begin in the prompt or inside a token and may end inside one, and the token that completes it is kept.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ryzen_compile.errors import PromptError

StoppingCriterion = Callable[..., Any]
DEFAULT_NEW_TOKENS = 20


class TextDecoder(Protocol):
    """The part of a tokenizer that stop strings and streamers need."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, **options: bool) -> str: ...


def integer(name: str, value: object, minimum: int) -> int:
    """``value`` as an int. Raises ``PromptError`` when it is no integer (bool included) or below ``minimum``."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= minimum:
        return int(value)
    raise PromptError(f"{name} must be an integer >= {minimum}, got {value!r}")


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """``value``, a token id or several (list, array, tensor), as ints; None is none. Raises ``PromptError``."""
    if value is None:
        return ()
    try:
        several = [value] if isinstance(value, int | np.integer) else list(value)
        found = tuple(operator.index(one) for one in several)
    except TypeError as error:
        raise PromptError(f"{name} must be a token id or a list of them, got {value!r}") from error
    if any(isinstance(one, bool) for one in several):
        raise PromptError(f"{name} must be a token id or a list of them, got {value!r}")
    return found


def new_token_limit(max_new_tokens: object, max_length: object, *, columns: int, longest: int, context: int) -> int:
    """How many tokens to generate at most.

    ``columns`` is the prompts' width with padding, which ``max_length`` counts, and ``longest`` the longest prompt
    without, which takes up the context. None, None means 20, or what the context leaves. Raises ``PromptError`` for
    limits below one new token, for two limits that contradict each other, and for what the context cannot hold.
    """
    if max_new_tokens is None and max_length is None:
        limit = min(DEFAULT_NEW_TOKENS, context - longest)
        if limit < 1:
            raise PromptError(f"prompt of {longest} tokens leaves no room in the model's context of {context} tokens")
        return limit
    if max_new_tokens is not None:
        limit = integer("max_new_tokens", max_new_tokens, 1)
        if max_length is not None and integer("max_length", max_length, 1) != columns + limit:
            raise PromptError(
                f"max_new_tokens {limit} after a prompt of {columns} tokens contradicts max_length {max_length}",
                hint="give one of the two",
            )
    else:
        limit = integer("max_length", max_length, 1) - columns
        if limit < 1:
            raise PromptError(
                f"max_length {max_length} leaves no new token after a prompt of {columns} tokens",
                hint="give max_new_tokens",
            )
    if longest + limit > context:
        raise PromptError(
            f"prompt of {longest} tokens plus {limit} new tokens exceeds the model's context of {context} tokens"
        )
    return limit


def min_token_limit(min_new_tokens: object, max_new_tokens: int) -> int:
    """Validated ``min_new_tokens`` (None: 0): an integer between 0 and ``max_new_tokens``."""
    minimum = 0 if min_new_tokens is None else integer("min_new_tokens", min_new_tokens, 0)
    if minimum > max_new_tokens:
        raise PromptError(f"min_new_tokens {minimum} is greater than the limit of {max_new_tokens} new tokens")
    return minimum


class StopStrings:
    """Tells whether the newest token of a row completed one of ``strings``.

    ``strings`` is a string or several, none empty; None is none. Without a tokenizer they cannot be looked for, which
    is a ``PromptError``, too.
    """

    def __init__(self, strings: object, tokenizer: TextDecoder | None) -> None:
        several = [strings] if isinstance(strings, str) else () if strings is None else strings
        if not isinstance(several, list | tuple) or not all(isinstance(one, str) and one for one in several):
            raise PromptError(f"stop_strings must be a non-empty string or a list of them, got {strings!r}")
        if several and tokenizer is None:
            raise PromptError("stop_strings need the model's tokenizer to see text", hint="pass tokenizer=")
        self._strings: tuple[str, ...] = tuple(several)
        self._tokenizer = tokenizer
        # At least one byte per token, so no match reaches further back; a few more tokens keep the first ones of the
        # window, whose decoding may differ for want of what precedes them, out of any match.
        self._reach = max((len(one.encode("utf-8", "replace")) for one in self._strings), default=0) + 4
        # Cleaning up spaces would rewrite text that is compared verbatim; only tokenizers that do it take the option.
        cleans_up = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._options = {"clean_up_tokenization_spaces": False} if cleans_up else {}

    def __bool__(self) -> bool:
        return bool(self._strings)

    def start(self, ids: list[int]) -> StopWindow:
        """Begin to watch a row whose prompt is ``ids``."""
        return StopWindow(self, ids)

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``, special tokens included."""
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(ids, skip_special_tokens=False, **self._options)

    def found_after(self, text: str, settled: int) -> bool:
        """Whether some stop string ends in ``text`` after its first ``settled`` characters."""
        return any(text.find(one, max(0, settled - len(one) + 1)) >= 0 for one in self._strings)

    @property
    def reach(self) -> int:
        """How many tokens back a match can begin, and some more."""
        return self._reach


class StopWindow:
    """The last tokens of one row and their text, so that a new token costs one short decode."""

    def __init__(self, strings: StopStrings, ids: list[int]) -> None:
        self._strings = strings
        self._ids = ids[-strings.reach :]
        self._text = strings.decode(self._ids)

    def push(self, token: int) -> bool:
        """Add ``token``; True when it completed a stop string."""
        if len(self._ids) >= 4 * self._strings.reach:
            self._ids = self._ids[-self._strings.reach :]
            self._text = self._strings.decode(self._ids)
        # A half-finished character shows as U+FFFD, which the new token may turn into the real one: it is not settled.
        settled = len(self._text.rstrip("\ufffd"))
        self._ids.append(token)
        self._text = self._strings.decode(self._ids)
        return self._strings.found_after(self._text, settled)


class StopTracker:
    """Which rows are finished. ``done`` ``(B,)`` bool is updated by ``update`` after every new token.

    ``windows`` watch for stop strings, one per row, or none at all.
    ``criteria`` are transformers' ``StoppingCriteria`` objects, or any callable ``(input_ids, scores) -> bool or (B,)``
    over a torch tensor; ``scores`` is None. A row is never looked at again once it is done.
    """

    def __init__(
        self,
        rows: int,
        *,
        eos: Sequence[int] = (),
        windows: Sequence[StopWindow] = (),
        criteria: Sequence[StoppingCriterion] = (),
    ) -> None:
        self.done = np.zeros(rows, dtype=bool)
        self._eos = frozenset(eos)
        self._windows = list(windows)
        self._criteria = list(criteria)
        self._running = rows
        for criterion in self._criteria:
            if not callable(criterion):
                raise PromptError(f"stopping_criteria must hold callables, got {criterion!r}")

    @property
    def running(self) -> int:
        """How many rows are not finished."""
        return self._running

    def update(self, chosen: np.ndarray, ids: np.ndarray) -> bool:
        """Look at ``chosen`` ``(B,)``, the last column of ``ids`` ``(B, L)``, too; True when all rows are done."""
        for row, token in enumerate(chosen.tolist()):
            if not self.done[row] and (token in self._eos or (self._windows and self._windows[row].push(token))):
                self.done[row] = True
                self._running -= 1
        if self._criteria:
            for criterion in self._criteria:
                self.done |= _ask(criterion, ids)
            self._running = int(len(self.done) - self.done.sum())
        return self._running == 0


def _ask(criterion: StoppingCriterion, ids: np.ndarray) -> np.ndarray:
    """``criterion``'s answer over ``ids`` ``(B, L)`` as ``(B,)`` bool."""
    import torch

    answer = criterion(torch.from_numpy(ids), None)
    flags = np.asarray(answer.detach().cpu().numpy() if isinstance(answer, torch.Tensor) else answer)
    if flags.dtype != np.bool_ or flags.shape not in ((), (1,), (len(ids),)):
        raise PromptError(
            f"stopping criterion {type(criterion).__name__} must return a bool or ({len(ids)},) bools, got {answer!r}"
        )
    return np.broadcast_to(flags, (len(ids),))
