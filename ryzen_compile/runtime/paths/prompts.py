"""What people give as a prompt, or as several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ryzen_compile.errors import PromptError


@dataclass(frozen=True)
class Prompts:
    """Token ids ``(1, T)`` each, and whether there are ``several``, a list of one among them."""

    ids: tuple[Any, ...]
    several: bool


def as_prompts(given: Any, tokenizer: Any) -> Prompts:
    """``given`` is a text, ids ``(T,)`` or ``(1, T)``, None (the empty prompt), or a list of these.

    A list of integers is one prompt. Raises ``PromptError`` for a text without a tokenizer.
    """
    several = isinstance(given, list | tuple) and not (
        given and all(isinstance(one, int | np.integer) for one in given)
    )
    return Prompts(tuple(_ids(one, tokenizer) for one in (given if several else [given])), several)


def _ids(prompt: Any, tokenizer: Any) -> Any:
    if prompt is None:
        return np.zeros((1, 0), np.int64)
    if isinstance(prompt, str):
        if tokenizer is None:
            raise PromptError("a prompt in words needs the model's tokenizer", hint="give token ids")
        ids = np.asarray(tokenizer(prompt)["input_ids"])
        return ids.reshape(1, -1).astype(np.int64)  # an empty text is an empty prompt
    if isinstance(prompt, list | tuple):
        return prompt if len(prompt) else np.zeros((1, 0), np.int64)
    if getattr(prompt, "ndim", 1) == 2 and len(prompt) != 1:
        raise PromptError(f"a prompt is one sequence of ids, got {len(prompt)} of them", hint="give a list of prompts")
    return prompt
