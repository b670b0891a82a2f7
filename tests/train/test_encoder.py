"""An encoder to train: how it reads texts, and what it has no room for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ryzen_compile.errors import ConfigError
from ryzen_compile.sentence_layout import write_layout
from ryzen_compile.spec import EncoderSettings, Pooling
from ryzen_compile.train.config import ModelSettings
from ryzen_compile.train.documents import Corpus
from ryzen_compile.train.encoder import prepare_encoder, prepare_reading, prompted
from ryzen_compile.train.pairs import Pair, Pairs
from tests.train.tiny_pairs import WORDS, write_encoder

PROMPTS = {"query": "Ask: ", "passage": "Found: ", "other": "Else: "}


def settings(directory: Path) -> ModelSettings:
    return ModelSettings(path=str(directory))


@pytest.mark.parametrize(
    ("encoder", "expected"),
    [
        (EncoderSettings(), Pair("Where", "There")),
        (EncoderSettings(prompts=PROMPTS), Pair("Ask: Where", "Found: There")),
        (EncoderSettings(prompts=PROMPTS, lower_case=True), Pair("ask: where", "found: there")),
        (EncoderSettings(prompts={"other": "Else: "}, default_prompt="other"), Pair("Else: Where", "Else: There")),
        (EncoderSettings(prompts=PROMPTS, default_prompt="other"), Pair("Ask: Where", "Found: There")),
    ],
)
def test_texts_are_read_behind_their_prompts(tmp_path: Path, encoder: EncoderSettings, expected: Pair) -> None:
    directory = write_encoder(tmp_path / "encoder")
    write_layout(directory, encoder, hidden=32)
    _, reading = prepare_reading(settings(directory))
    assert reading == encoder
    pairs = Pairs((Pair("Where", "There"),), (Pair("Where", "There"),) * 2, Corpus((), (), ""))
    found = prompted(pairs, reading)
    assert found.train == (expected,) and found.validation == (expected,) * 2


def test_a_plain_directory_is_read_as_it_is(tmp_path: Path) -> None:
    directory = write_encoder(tmp_path / "encoder")
    tokenizer, reading = prepare_reading(settings(directory))
    assert reading == EncoderSettings()
    model, encoder = prepare_encoder(settings(directory), tokenizer, 16)
    assert model.training and encoder.pooling == Pooling("mean", normalize=True)


def test_no_more_is_read_than_the_layout_allows(tmp_path: Path) -> None:
    directory = write_encoder(tmp_path / "encoder")
    write_layout(directory, replace(EncoderSettings(), context=9), hidden=32)
    tokenizer, _ = prepare_reading(settings(directory))
    prepare_encoder(settings(directory), tokenizer, 9)
    with pytest.raises(ConfigError, match="reads 9 tokens at most, and texts are cut at 10"):
        prepare_encoder(settings(directory), tokenizer, 10)


@pytest.mark.parametrize("pad", [0, 3])
def test_positions_of_padding_are_not_read(tmp_path: Path, pad: int) -> None:
    """RoBERTa counts positions from behind the padding token's number: of 16, fewer are left for tokens."""
    from transformers import RobertaConfig, RobertaModel

    directory = write_encoder(tmp_path / "encoder")
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=len(WORDS), max_position_embeddings=16, pad_token_id=pad, **sizes)
    RobertaModel(config).save_pretrained(directory)
    tokenizer, _ = prepare_reading(settings(directory))
    model, _ = prepare_encoder(settings(directory), tokenizer, 15 - pad)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    for length in (16 - pad, 16):
        with pytest.raises(ConfigError, match=f"reads {15 - pad} tokens at most, and texts are cut at {length}"):
            prepare_encoder(settings(directory), tokenizer, length)


def test_a_larger_tokenizer_is_refused(tmp_path: Path) -> None:
    directory = write_encoder(tmp_path / "encoder")
    tokenizer, _ = prepare_reading(settings(directory))
    path = directory / "tokenizer.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    tokenizer.add_tokens(["more"])
    with pytest.raises(ConfigError, match="30 tokens, the model's table 29 rows"):
        prepare_encoder(settings(directory), tokenizer, 16)
    assert json.loads(path.read_text(encoding="utf-8")) == found
