"""A new tokenizer is the example's, reads every text back, and a stored one is loaded without running its code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ryzen_compile.errors import ConfigError, ModelError, UnsafeError
from ryzen_compile.train.config import NewTokenizer
from ryzen_compile.train.tokenizer import load_tokenizer, train_tokenizer

TEXTS = ["def one(two):\n    return two\n" * 9, "class Three:\n    one = 'é'\n" * 7, "the end, the end\n"]
STORED = Path(__file__).resolve().parents[2] / "examples" / "tiny-python-lm"
NEW = train_tokenizer(TEXTS, NewTokenizer(vocab=300))


def test_it_is_the_byte_level_bpe_of_the_example() -> None:
    """The recipe that made examples/tiny-python-lm, in the library's own words."""
    expected = Tokenizer(models.BPE())
    expected.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    expected.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    expected.train_from_iterator(TEXTS, trainer)
    end = "<|endoftext|>"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=expected, bos_token=end, eos_token=end, pad_token=end)
    assert NEW.backend_tokenizer.to_str() == wrapped.backend_tokenizer.to_str()
    assert 257 < len(NEW) == len(wrapped) < 300  # these texts have no more pairs
    assert NEW.bos_token_id == NEW.eos_token_id == NEW.pad_token_id == 0


def test_the_same_texts_give_the_same_tokenizer_and_others_another() -> None:
    again = train_tokenizer(tuple(TEXTS), NewTokenizer(vocab=300))
    other = train_tokenizer(TEXTS[1:], NewTokenizer(vocab=300))
    assert again.get_vocab() == NEW.get_vocab() != other.get_vocab()


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_every_text_is_read_back(text: str) -> None:
    assert NEW.decode(NEW(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_the_smallest_vocabulary_is_bytes_and_the_end_token() -> None:
    bytes_only = train_tokenizer(TEXTS, NewTokenizer(vocab=257, end="</s>"))
    assert len(bytes_only) == 257 and bytes_only.eos_token == "</s>" and bytes_only.eos_token_id == 0
    assert len(bytes_only("é a")["input_ids"]) == 4
    assert bytes_only("</s>")["input_ids"] == [0]


def test_a_text_with_few_pairs_gives_fewer_tokens() -> None:
    assert 257 < len(train_tokenizer(["abab"], NewTokenizer(vocab=4096))) < 264


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_without_text_there_is_none(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="needs text"):
        train_tokenizer(texts, NewTokenizer(vocab=300))


def test_an_end_token_that_stands_for_a_byte_is_refused() -> None:
    for letter in ("a", "Ġ"):
        with pytest.raises(ConfigError, match=r"model\.tokenizer\.end: .* stands for a byte"):
            train_tokenizer(TEXTS, NewTokenizer(vocab=300, end=letter))


def test_a_saved_one_comes_back(tmp_path: Path) -> None:
    NEW.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.get_vocab() == NEW.get_vocab()
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (0, 0, 0)
    assert again("def one(x)é")["input_ids"] == NEW("def one(x)é")["input_ids"]


def test_a_model_directory_has_one() -> None:
    assert load_tokenizer(STORED).eos_token == "<|endoftext|>"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_code_in_the_directory_is_never_run(tmp_path: Path, name: str, nested: bool) -> None:
    NEW.save_pretrained(tmp_path)
    path = tmp_path / name
    settings = json.loads(path.read_text()) if path.exists() else {"model_type": "odd"}
    reference = ["own.Own", None] if name == "tokenizer_config.json" else "own.Own"
    asked = {"auto_map": {"AutoTokenizer": reference}}
    path.write_text(json.dumps(settings | ({"inner": asked} if nested else asked)))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(UnsafeError, match=rf"^{name} asks to run code of its own: key '(inner\.)?auto_map'"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_damaged_or_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(ModelError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)
    shutil.copy(STORED / "tokenizer_config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((STORED / "tokenizer.json").read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        load_tokenizer(tmp_path)
