"""The cache from the command line: formats, windows, and prompts that are kept in files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ryzen_compile
from ryzen_compile.cli.generate import _Printer
from tests.model_directory import shared_artifact, shared_model, tokenizer

PROMPT = "def add(first, second):\n    return first"


@pytest.mark.parametrize(("kv", "per_token"), [("fp32", 512), ("int8", 128), ("int4", 64)])
def test_export_keeps_the_cache_as_asked_and_says_what_a_token_costs(
    run: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, kv: str, per_token: int
) -> None:
    out = tmp_path / "out"
    status, shown, err = run(
        "export", shared_model(tmp_path_factory), out, "--recipe", "fp32", "--kv", kv, "--no-verify"
    )
    assert status == 0, err
    with ryzen_compile.load(out) as model:
        assert {slot.value_format for slot in model.engine.slots} == {kv}
        breakdown = model.memory_breakdown(tokens=10)
    assert breakdown.bytes_per_token == per_token
    assert re.search(rf"^cache: {per_token} bytes per token$", shown, re.MULTILINE)


def test_windows_of_layers_are_told_apart(run: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = shared_model(tmp_path_factory, "gemma2", tie_word_embeddings=False)
    status, shown, err = run("export", source, tmp_path / "out", "--recipe", "fp32", "--no-verify")
    assert status == 0, err
    assert re.search(r"^cache: \d+ bytes per token, and \d+ per sequence for windows$", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv", "int3"], "kv.dtype"),
        (["--kv", "int8-g"], "kv.group"),
        (["--kv", "k8v4"], "backend 'onnxruntime' cannot keep a cache of k8v4"),
        (["--sinks", "3"], "sinks 3 belong to a window"),
        (["--window", "5000"], "takes a cache of 6254 tokens"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(
    run: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, options: list[str], message: str
) -> None:
    out = tmp_path / "out"
    status, _, err = run("export", shared_model(tmp_path_factory), out, "--recipe", "fp32", "--no-verify", *options)
    assert status in (2, 3) and message in err.splitlines()[-1]
    assert not out.exists()


def test_a_model_with_learned_positions_is_not_exported_with_a_window(
    run: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = shared_model(tmp_path_factory, "gpt2")
    status, _, err = run("export", source, tmp_path / "out", "--recipe", "fp32", "--no-verify", "--window", "16")
    assert status == 3 and "positions enter outside of the attention" in err
    assert not (tmp_path / "out").exists()


def test_a_window_goes_on_beyond_the_context(run: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    artifact = shared_artifact(tmp_path_factory)
    status, out, err = run("generate", artifact, PROMPT, "-n", 400, "--window", 32, "--json")
    assert status == 0, err
    assert json.loads(out)["new_tokens"] == 400
    status, _, err = run("generate", artifact, PROMPT, "-n", 400)
    assert status == 3 and "exceeds the model's context" in err


def test_a_prompt_is_kept_and_begun_from(run: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    artifact, first, second = shared_artifact(tmp_path_factory), tmp_path / "a.st", tmp_path / "b.st"
    plain = json.loads(run("generate", artifact, PROMPT + " + second", "-n", 8, "--json")[1])
    kept = json.loads(run("generate", artifact, PROMPT, "-n", 8, "--save-prompt-cache", first, "--json")[1])
    assert first.exists() and kept["reused_tokens"]
    both = ("--prompt-cache", first, "--save-prompt-cache", second)
    more = json.loads(run("generate", artifact, PROMPT + " + second", "-n", 8, *both, "--json")[1])
    assert second.exists() and more["ids"] == plain["ids"]
    assert not plain["reused_tokens"] and more["reused_tokens"] > kept["reused_tokens"]
    for option, path in (("--prompt-cache", first), ("--save-prompt-cache", tmp_path / "c.st")):
        status, _, err = run("generate", artifact, PROMPT, "--window", 32, option, path)
        assert status == 2 and "give either --window or a prompt cache" in err
    assert not (tmp_path / "c.st").exists()


@pytest.mark.parametrize("text", ["a\u20acb \U0001f600 c\n    d  e", "x", "\u6a21\u578b\u6a21\u578b"])
def test_text_is_shown_as_it_comes_and_whole(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = tokenizer()
    printer = _Printer(known)
    printer.put(np.array([[1, 2]]))
    shown = ""
    for token in known.encode(text):
        printer.put(np.array([token]))
        out = capsys.readouterr().out
        assert "\ufffd" not in out
        shown += out
    assert len(printer._ids) < 16, "what is settled is not decoded again"
    printer.end()
    assert shown + capsys.readouterr().out == text + "\n"
