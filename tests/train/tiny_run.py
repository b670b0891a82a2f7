"""A training run that takes a second: a text of a few kilobytes, a model of two layers, a vocabulary of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ryzen_compile.train.config import TrainConfig, parse_config

LLAMA = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
GPT2_WITH_DROPOUT = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 32}


def write_text(directory: Path) -> Path:
    """Sixty short documents, one a line of a .jsonl file."""
    path = directory / "text.jsonl"
    lines = (
        f'{{"text": "{i} bottles and {i * i} corks, {"la " * (i % 7)}then {i + 1} more. {"x" * (i % 13)}"}}'
        for i in range(60)
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_config(directory: Path, **changes: Any) -> TrainConfig:
    """Six steps of 2 x 2 rows of 17 tokens in float32, with a checkpoint every second step; ``changes`` replace
    settings, whole sections being merged."""
    tree: dict[str, Any] = {
        "output": str(directory / "run"),
        "model": {"tokenizer": {"vocab": 300}, "architecture": LLAMA},
        "data": {"train": {"path": str(write_text(directory))}, "length": 17, "validation_share": 0.1},
        "optimization": {"steps": 6, "batch": 2, "accumulate": 2, "lr": 0.01},
        "schedule": {"warmup": 2},
        "precision": {"dtype": "fp32", "compile": False},
        "checkpoint": {"every": 2, "keep": 2},
        "validation": {"every": 3},
    }
    for name, value in changes.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, Mapping) else value
    return parse_config(tree)
