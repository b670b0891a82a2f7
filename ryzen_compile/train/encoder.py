"""An encoder that is trained: the model, and what its directory says is done before and after it."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ryzen_compile.encoder_source import load_encoder
from ryzen_compile.errors import ConfigError
from ryzen_compile.sentence_layout import read_layout
from ryzen_compile.source import resolve
from ryzen_compile.spec import EncoderSettings
from ryzen_compile.train.config import ModelSettings
from ryzen_compile.train.model import ready
from ryzen_compile.train.pairs import Pair, Pairs
from ryzen_compile.train.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prepare_reading(settings: ModelSettings) -> tuple[PreTrainedTokenizerBase, EncoderSettings]:
    """How the encoder reads texts. Raises what ``resolve``, ``read_layout`` and ``load_tokenizer`` raise."""
    directory = _directory(settings)
    layout = read_layout(directory)
    if layout is None:
        return load_tokenizer(directory), EncoderSettings()
    return load_tokenizer(layout.transformer), layout.settings


def prompted(pairs: Pairs, settings: EncoderSettings) -> Pairs:
    """Texts as the model reads them: behind their prompts (the default one where there is none for their part), and
    lowered where it asks for that."""
    names = (settings.prompt_name_for("query"), settings.prompt_name_for("document"))
    query, positive = ("" if name is None else settings.prompts[name] for name in names)

    def read(pair: Pair) -> Pair:
        texts = (query + pair.query, positive + pair.positive)
        return Pair(*(text.lower() for text in texts)) if settings.lower_case else Pair(*texts)

    return replace(pairs, train=tuple(map(read, pairs.train)), validation=tuple(map(read, pairs.validation)))


def prepare_encoder(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[PreTrainedModel, EncoderSettings]:
    """The encoder to train on texts of up to ``length`` tokens, and what its directory says of its vectors.

    Raises ``ConfigError`` for a length that it has no room for, and what ``load_encoder`` and ``ready`` raise. What a
    configuration calls its positions may be more than can be read (RoBERTa's two are of padding), so that a text of
    that length is tried.
    """
    found = load_encoder(_directory(settings))
    limits = (found.settings.context, getattr(found.model.config, "max_position_embeddings", None))
    room = min(limit for limit in (*limits, length) if limit is not None)
    room = _tokens_read(found.model, room)
    if length > room:
        raise ConfigError(
            f"the model reads {room} tokens at most, and texts are cut at {length}",
            hint=f"set data.length and contrastive.query_length to {room} or less",
        )
    return ready(found.model, tokenizer, settings.freeze or ()), found.settings


@torch.no_grad()
def _tokens_read(model: PreTrainedModel, most: int) -> int:
    """How many tokens ``model`` reads at a time, up to ``most``."""
    token = 0 if getattr(model.config, "pad_token_id", None) else 1  # not the one whose positions do not count

    def fails(tokens: int) -> bool:
        ids = torch.full((1, tokens), token)
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (IndexError, RuntimeError):  # a table of positions that is too short
            return True
        return False

    return bisect_left(range(1, most), True, key=fails) if fails(most) else most


def _directory(settings: ModelSettings) -> Path:
    if settings.path is None:  # the configuration has seen to that
        raise ConfigError("model: there is no encoder to train")
    return resolve(settings.path)
