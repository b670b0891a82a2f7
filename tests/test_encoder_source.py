"""Whether a model is an encoder, and the body, tokenizer and settings that a directory of one holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ryzen_compile.encoder_source import load_encoder, task_of_directory, task_of_model
from ryzen_compile.errors import ModelError, UnsafeError, UnsupportedError
from ryzen_compile.spec import EncoderSettings, Pooling
from tests.tiny_encoder import CONTEXT, HIDDEN, VOCAB, bert, change, write_directory

KINDS = {
    "BertModel": "embed",
    "BertForMaskedLM": "embed",
    "RobertaModel": "embed",
    "MPNetModel": "embed",
    "DistilBertModel": "embed",
    "ModernBertModel": "embed",
    "BertForSequenceClassification": "generate",  # a head that we do not know: left to the decoders' own words
    "LlamaModel": "generate",
    "LlamaForCausalLM": "generate",
    "GPT2LMHeadModel": "generate",
    "T5ForConditionalGeneration": "generate",
}


@pytest.mark.parametrize(("name", "task"), KINDS.items())
def test_the_task_follows_from_head_and_attention(name: str, task: str, tmp_path: Path) -> None:
    kind = getattr(transformers, name)
    config = kind.config_class()
    with torch.device("meta"):
        assert task_of_model(kind(config)) == task
    config.architectures = [name]
    config.save_pretrained(tmp_path)
    assert task_of_directory(tmp_path) == task


def test_a_module_of_ones_own_generates() -> None:
    assert task_of_model(nn.Linear(3, 3)) == "generate"


def test_the_layout_settles_the_task(tmp_path: Path, tiny_python_lm: Path) -> None:
    assert task_of_directory(tiny_python_lm) == "generate"
    assert task_of_directory(tmp_path) == "generate"
    (tmp_path / "modules.json").write_text("[]")
    assert task_of_directory(tmp_path) == "embed"


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"], ["os"], [5], ["BertConfig"], "BertModel"])
def test_architectures_that_are_none(tmp_path: Path, architectures: Any) -> None:
    write_directory(tmp_path)
    change(tmp_path / "config.json", architectures=architectures)
    assert task_of_directory(tmp_path) == "generate"


def test_an_architecture_of_another_type_is_refused(tmp_path: Path) -> None:
    write_directory(tmp_path)
    change(tmp_path / "config.json", architectures=["RobertaModel"])
    with pytest.raises(UnsupportedError, match="declares a 'RobertaModel' of another model type, BertConfig"):
        task_of_directory(tmp_path)


def test_code_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    write_directory(tmp_path)
    change(tmp_path / "config.json", auto_map={"AutoModel": "x.Y"})
    with pytest.raises(UnsafeError, match="asks to run code"):
        task_of_directory(tmp_path)
    change(tmp_path / "config.json", auto_map=None, num_hidden_layers=10**9)
    with pytest.raises(ModelError, match="the limit is 10000"):
        task_of_directory(tmp_path)


# --- loading ----------------------------------------------------------------------------------------------------------
def same(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_plain_model_is_pooled_by_its_mean(tmp_path: Path) -> None:
    model = bert()
    found = load_encoder(write_directory(tmp_path, model=model))
    assert found.settings == EncoderSettings(Pooling("mean", normalize=True), context=CONTEXT)
    assert same(found.model, model) and not found.model.training and found.tokenizer is not None
    cls = Pooling("cls", normalize=False)
    assert load_encoder(tmp_path, pooling=cls).settings.pooling == cls


def test_a_layout_says_how_and_may_be_overruled(tmp_path: Path) -> None:
    settings = EncoderSettings(Pooling("cls", normalize=False), 12, prompts={"q": "find "}, dims=3)
    write_directory(tmp_path, settings)
    assert load_encoder(tmp_path).settings == settings
    assert load_encoder(tmp_path, pooling=Pooling()).settings.pooling == Pooling()


@pytest.mark.parametrize("limit", [CONTEXT - 7, int(1e30)])
def test_the_tokenizers_own_limit_counts(tmp_path: Path, limit: int) -> None:
    write_directory(tmp_path, EncoderSettings(context=CONTEXT - 3))
    change(tmp_path / "tokenizer_config.json", model_max_length=limit)
    assert load_encoder(tmp_path).settings.context == min(CONTEXT - 3, limit)


def test_a_masked_language_model_leaves_its_head(tmp_path: Path) -> None:
    whole = transformers.BertForMaskedLM(bert().config)
    found = load_encoder(write_directory(tmp_path, model=whole))
    assert type(found.model).__name__ == "BertModel" and same(found.model, whole.bert)


def test_a_pooler_may_be_there_or_not(tmp_path: Path) -> None:
    without = transformers.BertModel(bert().config, add_pooling_layer=False)
    assert same(load_encoder(write_directory(tmp_path / "a", model=without)).model, without)
    assert load_encoder(write_directory(tmp_path / "b")).model.pooler is not None


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    write_directory(tmp_path)
    change(tmp_path / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"tensor.* missing"):
        load_encoder(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = bert()
    model.encoder.layer[1].output.dense.weight.data[0, 0] = torch.inf
    write_directory(tmp_path, model=model)
    with pytest.raises(ModelError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        load_encoder(tmp_path)


def test_a_model_with_a_decoder_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=len(VOCAB), d_model=HIDDEN, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    write_directory(tmp_path, EncoderSettings(), model=transformers.T5ForConditionalGeneration(config))
    with pytest.raises(UnsupportedError, match="has an encoder and a decoder"):
        load_encoder(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    write_directory(tmp_path, EncoderSettings())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeError, match="only pickled weights"):
        load_encoder(tmp_path)
