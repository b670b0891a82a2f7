"""The layout of sentence-transformers: read as every release wrote it, written so that it reads it, refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile.errors import ModelError, UnsafeError, UnsupportedError
from ryzen_compile.sentence_layout import read_layout, write_layout
from ryzen_compile.spec import EncoderSettings, Pooling
from tests.tiny_encoder import HIDDEN, change, write_directory

FULL = EncoderSettings(
    Pooling("cls", normalize=True), 17, False, {"query": "find: ", "doc": ""}, "query", "dot", dims=8
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_layout(tmp_path, EncoderSettings(), hidden=HIDDEN)
    return tmp_path


def modules(directory: Path, *kinds: str, **changes: Any) -> None:
    """``modules.json`` of these kinds, each in a folder of its number; ``changes`` are to the first."""
    listed = [{"idx": i, "name": str(i), "path": f"{i}_X", "type": kind} for i, kind in enumerate(kinds)]
    listed[0] |= changes
    (directory / "modules.json").write_text(json.dumps(listed), encoding="utf-8")


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_what_is_written_is_read(tmp_path: Path, mode: Any, normalize: bool) -> None:
    settings = EncoderSettings(Pooling(mode, normalize), 17, True, {"query": "find: "}, "query", "dot", 8)
    write_layout(tmp_path, settings, hidden=HIDDEN)
    found = read_layout(tmp_path)
    assert found is not None and found.settings == settings and found.transformer == tmp_path
    assert (tmp_path / "2_Normalize").exists() is normalize


def test_sentence_transformers_reads_what_is_written(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    write_directory(tmp_path, FULL)
    model = library.SentenceTransformer(str(tmp_path), device="cpu", local_files_only=True)
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    assert model[1].pooling_mode == "cls" and model.max_seq_length == 17 and model.similarity_fn_name == "dot"
    assert model.prompts == {"query": "find: ", "doc": "", "document": ""} and model.default_prompt_name == "query"
    assert model.truncate_dim == 8 and model.encode("a cat").shape == (8,)


def test_what_sentence_transformers_writes_is_read(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(write_directory(tmp_path / "a", FULL)), device="cpu", local_files_only=True)
    model.save_pretrained(str(tmp_path / "b"), create_model_card=False)
    found = read_layout(tmp_path / "b")
    assert found is not None
    assert found.settings.pooling == FULL.pooling and found.settings.similarity == "dot" and found.settings.dims == 8
    assert found.settings.prompts["query"] == "find: " and found.settings.default_prompt == "query"


def test_a_directory_without_modules_has_no_layout(tmp_path: Path) -> None:
    assert read_layout(tmp_path) is None


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_lasttoken": False}, "max"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode": "max", "pooling_mode_mean_tokens": True}, "max"),
        ({"pooling_mode_mean_tokens": False}, "mean"),
        ({}, "mean"),
    ],
)
def test_poolings_of_every_release(directory: Path, pooling: dict[str, Any], mode: str) -> None:
    (directory / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 24, **pooling}))
    found = read_layout(directory)
    assert found is not None and found.settings.pooling.mode == mode


@pytest.mark.parametrize(
    ("pooling", "said"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "2 poolings side by side: 'cls', 'mean'"),
        ({"pooling_mode": ["mean", "max"]}, "2 poolings side by side: 'mean', 'max'"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "pools by 'mean_sqrt_len_tokens'"),
        ({"pooling_mode": "weightedmean"}, "pools by 'weightedmean'"),
        ({"pooling_mode": "mean", "include_prompt": False}, "leaves the prompt's tokens out"),
    ],
)
def test_poolings_that_are_not_carried(directory: Path, pooling: dict[str, Any], said: str) -> None:
    (directory / "1_Pooling/config.json").write_text(json.dumps(pooling))
    with pytest.raises(UnsupportedError, match=said):
        read_layout(directory)


@pytest.mark.parametrize("pooling", [{"pooling_mode": 5}, {"pooling_mode": ["cls", 5]}, {"pooling_mode": {"a": 1}}])
def test_poolings_that_are_none(directory: Path, pooling: dict[str, Any]) -> None:
    (directory / "1_Pooling/config.json").write_text(json.dumps(pooling))
    with pytest.raises(ModelError, match="expected a pooling mode"):
        read_layout(directory)


@pytest.mark.parametrize(
    "kinds",
    [
        ["Transformer"],
        ["Transformer", "Pooling", "Dense"],
        ["Transformer", "Pooling", "Dense", "Normalize"],
        ["Transformer", "Normalize", "Pooling"],
        ["WordEmbeddings", "Pooling"],
        ["WordEmbeddings", "LSTM", "Pooling"],
        ["Pooling"],
        ["StaticEmbedding"],
    ],
)
def test_other_chains_are_refused_by_name(directory: Path, kinds: list[str]) -> None:
    modules(directory, *(f"sentence_transformers.models.{kind}" for kind in kinds))
    with pytest.raises(UnsupportedError, match=", ".join(f"'{kind}'" for kind in kinds)):
        read_layout(directory)


def test_modules_of_the_models_own_code_are_unsafe(directory: Path) -> None:
    modules(directory, "custom_st.Transformer", "sentence_transformers.models.Pooling")
    with pytest.raises(UnsafeError, match=r"module 0 is 'custom_st.Transformer', code of the model's own"):
        read_layout(directory)


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../b", "C:x", "a\\b", "~", "a\0b", "./a"])
def test_paths_that_leave_the_directory(directory: Path, path: str) -> None:
    modules(directory, "sentence_transformers.models.Transformer", path=path)
    with pytest.raises(UnsafeError, match="module 0: its path"):
        read_layout(directory)


def test_a_folder_that_is_a_link_elsewhere(tmp_path: Path) -> None:
    write_layout(tmp_path, EncoderSettings(), hidden=HIDDEN)
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    (tmp_path / "1_Pooling").rename(outside)
    (tmp_path / "modules.json").rename(inside / "modules.json")
    (inside / "1_Pooling").symlink_to(outside)
    with pytest.raises(UnsafeError, match="leads out of the directory"):
        read_layout(inside)


@pytest.mark.parametrize(
    "text", ["", "{}", "[5]", '[{"type": "x"}]', '[{"type": 5, "path": ""}]', "[", "\x00", "[" * 9999]
)
def test_modules_that_are_none(directory: Path, text: str) -> None:
    (directory / "modules.json").write_text(text)
    with pytest.raises(ModelError, match=r"modules\.json"):
        read_layout(directory)


def test_modules_with_arguments_are_refused(directory: Path) -> None:
    modules(directory, "sentence_transformers.models.Transformer", kwargs=["task"])
    with pytest.raises(UnsupportedError, match="takes arguments of its own"):
        read_layout(directory)


def test_a_transformer_in_a_folder(tmp_path: Path) -> None:
    write_layout(tmp_path, EncoderSettings(context=9), hidden=HIDDEN)
    listed = json.loads((tmp_path / "modules.json").read_text())
    listed[0]["path"] = "0_Transformer"
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "0_Transformer").mkdir()
    (tmp_path / "sentence_bert_config.json").rename(tmp_path / "0_Transformer/sentence_roberta_config.json")
    found = read_layout(tmp_path)
    assert found is not None and found.transformer == tmp_path / "0_Transformer" and found.settings.context == 9


@pytest.mark.parametrize(
    ("file", "changes", "kind", "said"),
    [
        ("sentence_bert_config.json", {"max_seq_length": 0}, ModelError, "max_seq_length is '0'"),
        ("sentence_bert_config.json", {"max_seq_length": "9"}, ModelError, "max_seq_length is '9'"),
        ("sentence_bert_config.json", {"max_seq_length": True}, ModelError, "max_seq_length is 'True'"),
        ("sentence_bert_config.json", {"do_lower_case": "yes"}, ModelError, "do_lower_case is 'yes'"),
        ("sentence_bert_config.json", {"model_args": {"a": 1}}, UnsupportedError, "'model_args' is .* not carried"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, UnsupportedError, "'transformer_task'"),
        ("sentence_bert_config.json", {"x": {"trust_remote_code": True}}, UnsafeError, "asks to run code"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, UnsupportedError, "a 'SparseEncoder'"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "maxsim"}, UnsupportedError, "'maxsim'"),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, ModelError, "prompts by name"),
        ("config_sentence_transformers.json", {"prompts": {"a": 5}}, ModelError, "prompt 'a' is no text"),
        ("config_sentence_transformers.json", {"prompts": {"a": "x" * 100_001}}, ModelError, "or too long"),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, ModelError, "default prompt 'q'"),
        ("config_sentence_transformers.json", {"truncate_dim": -1}, ModelError, "truncate_dim is '-1'"),
        ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, UnsupportedError, "something else"),
    ],
)
def test_settings_that_are_damaged_or_not_carried(
    directory: Path, file: str, changes: dict[str, Any], kind: type[Exception], said: str
) -> None:
    change(directory / file, **changes)
    with pytest.raises(kind, match=said):
        read_layout(directory)


def test_settings_of_other_releases_that_say_nothing_new(directory: Path) -> None:
    plain = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    change(
        directory / "sentence_bert_config.json",
        transformer_task="feature-extraction",
        modality_config=plain,
        module_output_name="token_embeddings",
        unpad_inputs=False,
    )
    (directory / "config_sentence_transformers.json").write_text('{"__version__": {"pytorch": "1.8.1"}}')
    found = read_layout(directory)
    assert found is not None and found.settings == EncoderSettings()


def test_a_huge_file_is_not_read(directory: Path) -> None:
    os.truncate(directory / "modules.json", 65 << 20)
    with pytest.raises(ModelError, match="the limit is"):
        read_layout(directory)
