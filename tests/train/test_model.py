"""The model that a configuration asks for, and the directory that a trained one is saved to."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ryzen_compile.errors import ArtifactError, ConfigError, ModelError, NumericalError, RyzenCompileError
from ryzen_compile.source import load_model
from ryzen_compile.train.config import ModelSettings, NewTokenizer
from ryzen_compile.train.model import DTYPES, load_teacher, prepare_model, prepare_tokenizer, save_model
from tests.model_directory import tokenizer, write_model

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
MIXTRAL: dict[str, Any] = LLAMA | {"model_type": "mixtral", "num_local_experts": 2}  # stored under other names
MODELS = {
    "llama, tied": LLAMA | {"tie_word_embeddings": True},
    "llama, untied": LLAMA | {"tie_word_embeddings": False},
    "gpt2, tied": GPT2,
    "gpt2, untied": GPT2 | {"tie_word_embeddings": False},
    "mixtral, untied": MIXTRAL,
}
IDS = torch.tensor([[5, 17, 80, 33, 5, 200]])


def new(architecture: dict[str, Any], seed: int = 0) -> Any:
    return prepare_model(ModelSettings(architecture=architecture, tokenizer="unused"), tokenizer(), seed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of ``LLAMA`` and its tokenizer."""
    return write_model(tmp_path_factory.mktemp("saved") / "model", new(LLAMA))


# --- new models -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_a_new_model_is_float32_in_training_with_the_tokenizers_numbers(name: str) -> None:
    model = new(MODELS[name])
    assert model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer()) == model.get_input_embeddings().num_embeddings
    assert model.config.eos_token_id == model.config.bos_token_id == tokenizer().eos_token_id
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied is (", tied" in name)


def test_what_an_architecture_says_of_tokens_stays() -> None:
    model = new(LLAMA | {"vocab_size": 320, "eos_token_id": 1, "bos_token_id": 0})
    assert model.get_input_embeddings().num_embeddings == 320
    assert (model.config.eos_token_id, model.config.bos_token_id) == (1, 0)


def test_the_seed_gives_the_weights_and_the_generator_is_left_alone() -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first, second, third = new(LLAMA, 3), new(LLAMA, 3), new(LLAMA, 4)
    assert torch.equal(torch.get_rng_state(), before)
    states = [model.state_dict() for model in (first, second, third)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5000.0}),
        ("rope_theta", 5000.0),  # as it was spelled before; transformers moves it to where it is now
        ("head_dim", 4),
        ("attention_bias", True),
        ("rms_norm_eps", 1e-5),
        ("tie_word_embeddings", True),
        ("initializer_range", 0.01),
        ("use_cache", False),
    ],
)
def test_settings_that_an_architecture_has(field: str, value: Any) -> None:
    config = new(LLAMA | {field: value}).config
    if field.startswith("rope"):
        assert config.rope_parameters["rope_theta"] == 5000.0
    else:
        assert getattr(config, field) == value


def test_settings_may_have_the_common_names() -> None:
    assert new({"model_type": "gpt2", "hidden_size": 16, "n_layer": 1, "n_head": 2}).config.n_embd == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 32}, "'llama' has no setting 'hiden_size', the nearest is 'hidden_size'"),
        ({"atention_bias": True}, "no setting 'atention_bias', the nearest is 'attention_bias'"),
        ({"xyzzy": 1}, "no setting 'xyzzy'$"),
        ({"model_type": "lama"}, "there is no model_type 'lama', the nearest is 'llama'"),
        ({"model_type": "xyzzy"}, "there is no model_type 'xyzzy'$"),
        ({"hidden_size": "wide"}, "'llama' cannot be built: .*'hidden_size' expected int"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ({"num_attention_heads": 0}, "'llama' cannot be built: ZeroDivisionError"),
        ({"hidden_act": "xyzzy"}, "'llama' cannot be built: KeyError: 'xyzzy'"),
        ({"layer_types": ["xyzzy"]}, "'llama' cannot be built: .*layer_types"),
        ({"vocab_size": -4}, "'llama' cannot be built: "),
        ({"vocab_size": 100}, r"the tokenizer has \d+ tokens, the model's table 100 rows"),
    ],
)
def test_architectures_that_cannot_be_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        new(LLAMA | changes)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_kind_that_predicts_no_text() -> None:
    with pytest.raises(ConfigError, match="'vit' cannot be built: ValueError: Unrecognized configuration"):
        new({"model_type": "vit"})


# --- existing models, tokenizers, teachers ----------------------------------------------------------------------------
def test_an_existing_model_is_trained_in_float32(saved: Path, tmp_path: Path) -> None:
    half = write_model(tmp_path / "half", new(LLAMA).half())
    for path in (saved, half):
        model = prepare_model(ModelSettings(path=str(path)), tokenizer(), 0)
        assert model.training and {p.dtype for p in model.parameters()} == {torch.float32}
        assert all(p.requires_grad for p in model.parameters())


def test_a_tokenizer_larger_than_the_table(saved: Path) -> None:
    larger = copy.deepcopy(tokenizer())
    larger.add_tokens([f"<extra {i}>" for i in range(3)])
    with pytest.raises(ConfigError, match=f"the tokenizer has {len(larger)} tokens, the model's table"):
        prepare_model(ModelSettings(path=str(saved)), larger, 0)


def test_where_the_tokenizer_comes_from(saved: Path) -> None:
    own = prepare_tokenizer(ModelSettings(path=str(saved)), [])
    assert own.get_vocab() == tokenizer().get_vocab()
    other = prepare_tokenizer(ModelSettings(architecture=LLAMA, tokenizer=str(saved)), [])
    assert other.get_vocab() == own.get_vocab()
    fresh = prepare_tokenizer(ModelSettings(path=str(saved), tokenizer=NewTokenizer(vocab=257)), ["some text"])
    assert len(fresh) == 257


def test_a_path_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(RyzenCompileError, match="missing"):
        prepare_model(ModelSettings(path=str(tmp_path / "missing")), tokenizer(), 0)
    with pytest.raises(ModelError, match=r"config\.json"):
        prepare_model(ModelSettings(path=str(tmp_path)), tokenizer(), 0)


def test_a_teacher_is_frozen(saved: Path) -> None:
    teacher = load_teacher(str(saved), tokenizer())
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_a_teacher_with_another_vocabulary(saved: Path) -> None:
    other = prepare_tokenizer(ModelSettings(architecture=LLAMA, tokenizer=NewTokenizer(vocab=257)), ["some text"])
    with pytest.raises(ConfigError, match=r"another vocabulary.*model.tokenizer"):
        load_teacher(str(saved), other)


def beside(name: str, text: str) -> Callable[[Path], object]:
    """Writes ``text`` into the directory that is being made."""
    return lambda directory: (directory / name).write_text(text, encoding="utf-8")


# --- saving -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_what_is_loaded(name: str, dtype: str, tmp_path: Path) -> None:
    """Every tensor is the trained one rounded to ``dtype``, stored once, and nothing else is in the file."""
    model = new(MODELS[name])
    save_model(model, tokenizer(), tmp_path / "out", dtype)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    assert {value.dtype for value in stored.values()} == {DTYPES[dtype]}
    assert sum(value.numel() for value in stored.values()) == sum(p.numel() for p in model.parameters())
    loaded, own, _ = load_model(tmp_path / "out")
    assert own is not None and own.get_vocab() == tokenizer().get_vocab()
    expected = {key: value.to(DTYPES[dtype]).float() for key, value in model.state_dict().items()}
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    if dtype == "fp32":
        assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_saved_configuration_names_the_type_of_the_weights(dtype: str, tmp_path: Path) -> None:
    save_model(new(LLAMA), tokenizer(), tmp_path / "out", dtype)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert f"torch.{config['dtype']}" == str(DTYPES[dtype])
    assert config["architectures"] == ["LlamaForCausalLM"] and config["vocab_size"] == len(tokenizer())
    assert load_model(tmp_path / "out", dtype=config["dtype"])[0].dtype == DTYPES[dtype]


def test_saving_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = new(MODELS["gpt2, tied"])
    state = copy.deepcopy(model.state_dict())
    places = [value.data_ptr() for value in model.state_dict().values()]
    before = model.config.dtype
    save_model(model, tokenizer(), tmp_path / "out", "fp16")
    assert model.config.dtype == before and model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [value.data_ptr() for value in model.state_dict().values()] == places


def test_companions_lie_beside_the_model(tmp_path: Path) -> None:
    save_model(new(LLAMA), tokenizer(), tmp_path / "out", "fp32", beside("README.md", "größer\n"))
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "größer\n"
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_model_replaces_a_model_and_nothing_else(tmp_path: Path) -> None:
    first, second = new(LLAMA, 1), new(LLAMA, 2)
    save_model(first, tokenizer(), tmp_path / "out", "fp32", beside("note", "first"))
    save_model(second, tokenizer(), tmp_path / "out", "fp32")
    assert not (tmp_path / "out" / "note").exists()
    loaded = load_model(tmp_path / "out")[0]
    assert torch.equal(loaded.lm_head.weight, second.lm_head.weight)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="not ours to replace"):
        save_model(first, tokenizer(), tmp_path / "mine", "fp32")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_weights_beyond_the_type_are_refused(tmp_path: Path) -> None:
    """float16 ends at 65504. The other two hold the value."""
    model = new(LLAMA)
    with torch.no_grad():
        model.model.norm.weight[3] = -70000.0
    with pytest.raises(NumericalError, match=r"norm.weight' holds values that torch.float16 cannot, up to 7e\+04"):
        save_model(model, tokenizer(), tmp_path / "out", "fp16")
    assert not list(tmp_path.iterdir())
    for dtype in ("bf16", "fp32"):
        save_model(model, tokenizer(), tmp_path / dtype, dtype)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(NumericalError, match=r"model\.norm\.weight"):
        save_model(model, tokenizer(), tmp_path / "out", "fp32")


def test_saving_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No bar on stderr where transformers would show one, and bars as they were afterwards."""
    from transformers.utils import logging

    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(logging, "_tqdm_active", True)
    model = new(LLAMA)
    model.save_pretrained(tmp_path / "loud")
    assert "Writing model shards" in capfd.readouterr().err
    save_model(model, tokenizer(), tmp_path / "out", "fp32")
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()
