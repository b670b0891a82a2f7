"""Text in a model's tokens, for the passes that look at what a model does with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.config import Recipe
from ryzen_compile.errors import ConfigError, UsageError
from ryzen_compile.text import BUILTIN

if TYPE_CHECKING:
    from torch import Tensor

LENGTH, TOKENS = 256, 16_384
HELD_BACK = 4  # windows of the same text that no method sees: the parity gate measures on them
TABLE_TOKENS = 262_144  # at most, for counting how often each occurs, and for training a table
CHARACTERS = 40  # read for each token wanted, at most; it is rarely more than a few


@dataclass(frozen=True)
class Calibration:
    """Text in the model's tokens, and where it is from.

    ``windows`` (B, T) int64 for the methods that look at activations, ``held_back`` (b, T) for measuring what they did,
    ``long`` (n, T), which begins with ``windows``, for a table of tokens: each of them occurs rarely. ``special`` are
    the tokenizer's own tokens.
    """

    windows: Tensor
    held_back: Tensor
    name: str
    digest: str
    long: Tensor | None = None
    special: tuple[int, ...] = ()


def read_calibration(
    tokenizer: Any,
    recipe: Recipe,
    text: str | os.PathLike[str] = BUILTIN,
    progress: Callable[[str], None] | None = None,
) -> Calibration | None:
    """Text for a recipe with integers or codes: what its methods look at, and what the parity gate measures them on.

    None where weights and cache stay float32, and for a model without a tokenizer when no text was asked for. Raises
    ``UsageError`` for a text that was named and cannot be used, or that is too short.
    """
    rounds = recipe.weights is not None or recipe.ternary or recipe.kv.dtype != "fp32"
    reads = rounds or recipe.embedding is not None or recipe.sparsity is not None
    if tokenizer is None and recipe.embedding is not None and recipe.embedding.reads_text:
        raise ConfigError(
            f"method {recipe.embedding.method!r} with weighting {recipe.embedding.weighting!r} of the embedding reads "
            "text, and the model came without a tokenizer",
            hint="method 'kmeans' with weighting 'frequency' does without",
        )
    if not reads or (tokenizer is None and text == BUILTIN):
        return None
    if tokenizer is None:
        raise UsageError(f"calibration text {os.fspath(text)!r} cannot be read: the model has no tokenizer")
    import torch

    from ryzen_compile.text import digest, read_text, token_windows

    if progress is not None:
        progress("calibration")
    needed = TOKENS + HELD_BACK * LENGTH
    wanted = needed if recipe.embedding is None else TABLE_TOKENS
    content = read_text(text, characters=CHARACTERS * (TOKENS if recipe.embedding is None else TABLE_TOKENS))
    found = token_windows(content, lambda part: _encode(tokenizer, part), LENGTH, wanted, fewest=needed)
    windows = torch.from_numpy(found)
    first = TOKENS // LENGTH
    held_back = slice(first, first + HELD_BACK)
    long = None if recipe.embedding is None else torch.cat([windows[:first], windows[held_back.stop :]])
    special = tuple(getattr(tokenizer, "all_special_ids", ()))
    return Calibration(windows[:first], windows[held_back], Path(text).name, digest(content), long, special)


def _encode(tokenizer: Any, text: str) -> list[int]:
    # verbose: a warning that a text is longer than the context, which is cut into windows right after
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found
