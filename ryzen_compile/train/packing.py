"""Documents become rows of tokens without padding, and rows get an order that can be entered anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ryzen_compile.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS = 1 << 22  # tokenized at a time: a tokenizer needs about 100 bytes a token beside the ids it returns


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, *, tokens: int | None = None) -> Tensor:
    """The texts, each closed by the end token, as ``(n, length + 1)`` int64: the row's inputs and, one on, its targets.

    Rows are a strided view of one stream and overlap by one token, so that every token but the first is a target once;
    what does not fill a row at the end is left out. With ``tokens`` there are at most ``tokens // length`` rows, and
    one at least; texts behind them are not tokenized. A text longer than ``CHARACTERS`` is tokenized in parts cut at
    line ends, where tokens may differ from those of the whole. A special token that a text spells out is that token.

    Raises ``ConfigError`` for a tokenizer without an end token and for too little text to fill a row.
    """
    if length < 1:
        raise UsageError(f"length must be at least 1, got {length}")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no end token to close documents with", hint="set eos_token in tokenizer_config.json"
        )
    needed = None if tokens is None else max(1, tokens // length) * length + 1
    pieces: list[np.ndarray] = []
    held = 0
    for piece in _pieces(texts, tokenizer):
        pieces.append(piece)
        held += len(piece)
        if needed is not None and held >= needed:
            break
    rows = ((held if needed is None else min(held, needed)) - 1) // length
    if rows < 1:
        raise ConfigError(
            f"the text has {held} tokens, end tokens included, {length + 1} are needed for one row",
            hint="give more text or set a smaller data.length",
        )
    stream = torch.empty(held, dtype=torch.int64)
    start = 0
    for piece in pieces:
        stream[start : start + len(piece)] = torch.from_numpy(piece)
        start += len(piece)
    return stream[: rows * length + 1].unfold(0, length + 1, length)


def _pieces(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Ids of the texts in their order, int32, some ``CHARACTERS`` characters at a time."""
    batch: list[tuple[str, bool]] = []
    held = 0
    for text in texts:
        for part, last in _parts(text):
            if batch and held + len(part) > CHARACTERS:
                yield _ids(batch, tokenizer)
                batch, held = [], 0
            batch.append((part, last))
            held += len(part)
    if batch:
        yield _ids(batch, tokenizer)


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """The text in parts of at most ``CHARACTERS``, and whether each is its last."""
    start = 0
    while len(text) - start > CHARACTERS:
        end = text.rfind("\n", start, start + CHARACTERS) + 1 or start + CHARACTERS
        yield text[start:end], False
        start = end
    yield text[start:], True


def _ids(batch: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    encoded = tokenizer(
        [part for part, _ in batch],
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # a text longer than the model's context is no mistake here
    )["input_ids"]
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    found: list[np.ndarray] = []
    for ids, (_, last) in zip(encoded, batch, strict=True):
        found.append(np.array(ids, dtype=np.int32))
        if last:
            found.append(end)
    return np.concatenate(found)


@dataclass(frozen=True)
class RowOrder:
    """An endless sequence of permutations of ``rows`` row numbers, one after another, each drawn from ``seed``.

    A position in it says all there is to know, so a resumed run needs no generator's state.
    """

    rows: int
    seed: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.seed < 0:
            raise UsageError(f"expected at least one row and a seed of at least 0, got {self.rows} and {self.seed}")

    def at(self, position: int, count: int) -> Tensor:
        """The row numbers at ``position`` to ``position + count - 1``, ``(count,)`` int64."""
        if position < 0 or count < 0:
            raise UsageError(f"position and count must be at least 0, got {position} and {count}")
        found = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, start = divmod(position + done, self.rows)
            taken = _permutation(self.rows, self.seed, epoch)[start : start + count - done]
            found[done : done + len(taken)] = taken
            done += len(taken)
        return torch.from_numpy(found)

    def epoch(self, position: int) -> float:
        """How many passes over all rows end at ``position``."""
        return position / self.rows


@lru_cache(maxsize=2)  # a batch may lie across the end of an epoch
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    """``(rows,)`` int64. Of the raw stream of bits, which numpy keeps from version to version; its shuffles it may
    change."""
    keys = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(rows)
    order = np.argsort(keys, kind="stable")
    order.setflags(write=False)
    return order
