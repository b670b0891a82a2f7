"""Test support: model directories as a user has them, made in a moment: tiny random weights, a small trained tokenizer.

The tokenizer is a byte-level BPE over a few lines of Python, so any text round-trips; the weights are those of the zoo.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from ryzen_compile.api import export
from tests.zoo import CASES, Case, build

TOKENS = 290
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}  # ids 0, 1, 2, as in the zoo
SOURCE = (
    "def add(first, second):\n    return first + second\n",
    "for index in range(10):\n    print(index, end=' ')\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n",
    "with open(path) as stream:\n    return [line.strip() for line in stream]\n",
)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_SHARED: dict[str, Path] = {}


def case_named(name: str, **settings: Any) -> Case:
    """The zoo's case ``name`` with some of its configuration changed."""
    found = next(case for case in CASES if case.name == name)
    return Case(name, {**found.settings, **settings}, found.hits, found.kv_heads, found.head_dim)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``TOKENS`` tokens with pad, bos and eos; shared, so not to be changed."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SOURCE, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=TEMPLATE, **SPECIAL)


def write_model(directory: Path, model: nn.Module) -> Path:
    """Saves ``model`` as safetensors with its configurations, and the tokenizer beside them; returns ``directory``."""
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def model_directory(directory: Path, name: str = "llama", **settings: Any) -> Path:
    """The zoo's model ``name`` with a vocabulary for the tokenizer, in ``directory``; it never stops by itself."""
    return write_model(directory, build(case_named(name, vocab_size=TOKENS, **settings)))


def shared_model(factory: pytest.TempPathFactory, name: str = "llama", **settings: Any) -> Path:
    """The same, made once in a run of the tests; not to be changed."""
    if name not in _SHARED:
        _SHARED[name] = model_directory(factory.mktemp("models") / name, name, **settings)
    return _SHARED[name]


def shared_artifact(factory: pytest.TempPathFactory, name: str = "llama", **settings: Any) -> Path:
    """Its float32 artifact, exported from the directory once in a run of the tests; not to be changed."""
    key = f"{name} artifact"
    if key not in _SHARED:
        out = factory.mktemp("artifacts") / name
        export(shared_model(factory, name, **settings), out, "fp32")
        _SHARED[key] = out
    return _SHARED[key]


def listing(directory: Path) -> dict[str, int]:
    """Every path below ``directory``, hidden ones too, with its size: equal listings mean that nothing was left."""
    return {
        path.relative_to(directory).as_posix(): path.stat().st_size if path.is_file() else -1
        for path in sorted(directory.rglob("*"))
    }
