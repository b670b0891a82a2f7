"""Pairs that can be learned in a second, and an encoder of two layers to learn them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ryzen_compile.train.config import TrainConfig, parse_config

NOUNS = 12
WORDS = ["[PAD]", "[UNK]", "[CLS]", "the", "of", *(f"ask{i}" for i in range(NOUNS)), *(f"is{i}" for i in range(NOUNS))]
DIMS = (32, 16, 8)


def encoder(seed: int = 0, **changes: Any) -> nn.Module:
    """A Bert of 32 channels, with the pooler that no vector needs and dropout."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, pad_token_id=0, **{**sizes, **changes})
    return BertModel(config)


def write_encoder(directory: Path, seed: int = 0) -> Path:
    """A model directory without a layout."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    encoder(seed).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special).save_pretrained(directory)
    return directory


def write_pairs(directory: Path) -> Path:
    """Two nouns are asked for, and the text that has both, in other words, is to be found."""
    path = directory / "pairs.jsonl"
    pairs = [(a, b) for a in range(NOUNS) for b in range(NOUNS) if a != b]
    lines = (
        json.dumps({"query": f"ask{a} of ask{b}", "positive": f"the is{b} of {'the ' * (a % 4)}is{a}"})
        for a, b in pairs
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def pair_config(directory: Path, **changes: Any) -> TrainConfig:
    """Six steps of 2 x 8 pairs in float32, a checkpoint every second step; ``changes`` replace settings, whole sections
    being merged."""
    if not (directory / "encoder").is_dir():
        write_encoder(directory / "encoder")
    tree: dict[str, Any] = {
        "output": str(directory / "run"),
        "model": {"path": str(directory / "encoder")},
        "data": {"train": {"path": str(write_pairs(directory))}, "length": 12, "validation_share": 0.2},
        "contrastive": {"query_length": 8},
        "optimization": {"steps": 6, "batch": 8, "accumulate": 2, "lr": 0.003},
        "schedule": {"warmup": 2},
        "precision": {"dtype": "fp32", "compile": False},
        "checkpoint": {"every": 2, "keep": 2},
        "validation": {"every": 3},
        "passes": {"matryoshka": {"dims": list(DIMS)}},
    }
    for name, value in changes.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, Mapping) else value
    return parse_config(tree)
