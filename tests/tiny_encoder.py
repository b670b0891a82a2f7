"""Test support: a tiny random BERT with a WordPiece tokenizer, as directories and behind the engine protocol.

``TorchEncoder`` runs the transformers model and pools by hand: the slow, obviously right engine.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from ryzen_compile.sentence_layout import write_layout
from ryzen_compile.spec import EncoderSettings, ModelSpec, Pooling

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "red", "blue", "big", "small", "and")
ENDINGS = ("##s", "##ing", "##ed")
LETTERS = [*"abcdefghijklmnopqrstuvwxyz.,!", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys([*WORDS, *ENDINGS, *LETTERS])]
HIDDEN, CONTEXT = 24, 40


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over single letters and a few words, with [CLS] and [SEP] around a text; not to be changed."""
    backend = tokenizers.Tokenizer(
        models.WordPiece({word: at for at, word in enumerate(VOCAB)}, unk_token="[UNK]", max_input_chars_per_word=20)
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=CONTEXT,
    )


def bert(seed: int = 0, **settings: Any) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=37,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        **settings,
    )
    return BertModel(config).eval()


def write_directory(directory: Path, settings: EncoderSettings | None = None, model: Any = None) -> Path:
    """A model directory; with ``settings`` one of the layout of sentence-transformers."""
    (model or bert()).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    if settings is not None:
        write_layout(directory, settings, hidden=HIDDEN)
    return directory


def change(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON object in a file; None removes one."""
    found = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}), encoding="utf-8")


class TorchEncoder:
    """``model`` as an ``EncoderEngine``; what it is asked for is kept in ``shapes``."""

    name = "torch"

    def __init__(self, model: Any, pooling: Pooling = Pooling(), context: int = CONTEXT) -> None:  # noqa: B008 - frozen
        config = model.config
        self.model = model
        self.spec = ModelSpec(
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_attention_heads,
            config.hidden_size // config.num_attention_heads,
            config.hidden_size,
            config.vocab_size,
            context,
            False,
            0,
            "bert",
            pooling,
        )
        self.shapes: list[tuple[int, ...]] = []
        self.closed = 0

    @torch.inference_mode()
    def embed(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        assert tokens.dtype == mask.dtype == np.int64 and tokens.shape == mask.shape and mask.any(axis=1).all()
        assert self.spec.pooling is not None and tokens.shape[1] <= self.spec.context
        self.shapes.append(tokens.shape)
        kept = torch.from_numpy(mask)
        states = self.model(input_ids=torch.from_numpy(tokens), attention_mask=kept).last_hidden_state
        weights = kept[..., None].float()
        if self.spec.pooling.mode == "mean":
            pooled = (states * weights).sum(1) / weights.sum(1)
        elif self.spec.pooling.mode == "cls":
            pooled = states[:, 0]
        elif self.spec.pooling.mode == "max":
            pooled = states.masked_fill(kept[..., None] == 0, -torch.inf).amax(1)
        else:
            pooled = states[torch.arange(len(states)), kept.sum(1) - 1]
        if self.spec.pooling.normalize:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        return pooled.numpy().copy()

    def close(self) -> None:
        self.closed += 1
