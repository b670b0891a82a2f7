"""Texts to vectors on the command line, and what the other commands say to an encoder."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ryzen_compile
from ryzen_compile.api import export
from ryzen_compile.cli import defaults, narrate
from ryzen_compile.config import ENCODER_RECIPE, find_recipe
from ryzen_compile.recipe_file import RECIPE_NAME, recipe_text
from ryzen_compile.runtime.encoder import EncodingStats
from ryzen_compile.spec import EncoderSettings
from tests.tiny_encoder import HIDDEN, write_directory

TEXTS = ["the cat sat", "", "a dog €", "the big red dog " * 5]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = EncoderSettings(context=12, prompts={"query": "find the "})
    return write_directory(tmp_path_factory.mktemp("encoder") / "model", settings)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "encoder"
    export(model, out)
    return out


@pytest.fixture(scope="module")
def vectors(artifact: Path) -> np.ndarray:
    with ryzen_compile.load(artifact) as encoder:
        return encoder.encode(TEXTS, stats=EncodingStats())


def test_defaults_are_the_configurations() -> None:
    assert defaults.ENCODER_RECIPE == ENCODER_RECIPE


def test_vectors_are_lines_on_stdout(run: Any, artifact: Path, vectors: np.ndarray) -> None:
    status, out, err = run("embed", artifact, *TEXTS)
    assert status == 0
    got = np.array([json.loads(line) for line in out.splitlines()], dtype=np.float32)
    np.testing.assert_array_equal(got, vectors)
    assert err.startswith("[4 texts, ") and "1 cut to 12 tokens" in err


def test_texts_from_stdin_are_lines(
    run: Any, artifact: Path, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\r\n".join(TEXTS) + "\n"))
    status, out, _ = run("embed", artifact)
    assert status == 0
    np.testing.assert_array_equal(np.array([json.loads(line) for line in out.splitlines()], np.float32), vectors)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_texts_from_a_file(run: Any, artifact: Path, vectors: np.ndarray, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"texts{suffix}"
    lines = TEXTS if suffix == ".txt" else [json.dumps(TEXTS[0]), *(json.dumps({"text": text}) for text in TEXTS[1:])]
    file.write_text("\n".join(lines), encoding="utf-8")
    status, out, err = run("embed", artifact, "--file", file, "--out", tmp_path / "vectors.npy")
    assert status == 0, err
    assert out == f"wrote 4 vector(s) of {HIDDEN} dimensions, float32, to {tmp_path / 'vectors.npy'}\n"
    np.testing.assert_array_equal(np.load(tmp_path / "vectors.npy"), vectors)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name, "vectors.npy"]


def test_a_file_of_lines(run: Any, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors.jsonl"
    out.write_text("replaced")
    status, _, err = run("embed", artifact, *TEXTS, "--out", out, "--dims", 11, "--precision", "binary", "-q")
    assert status == 0 and err == ""
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [one["text"] for one in found] == TEXTS
    assert all(len(one["embedding"]) == 2 and all(0 <= byte < 256 for byte in one["embedding"]) for one in found)


def test_json_says_what_was_done(run: Any, artifact: Path, tmp_path: Path) -> None:
    status, out, err = run("embed", artifact, *TEXTS, "--json", "--precision", "int8")
    found = json.loads(out)
    assert status == 0 and err == ""
    assert (found["texts"], found["truncated"], found["dims"], found["precision"]) == (4, 1, HIDDEN, "int8")
    assert np.array(found["vectors"]).shape == (4, HIDDEN)
    status, out, _ = run("embed", artifact, "a", "--json", "--out", tmp_path / "x.npy")
    assert status == 0 and "vectors" not in json.loads(out) and json.loads(out)["out"] == str(tmp_path / "x.npy")


def test_prompts(run: Any, artifact: Path) -> None:
    named, given, plain = (
        run("embed", artifact, text, *more)[1]
        for text, more in (
            ("cat", ["--prompt-name", "query"]),
            ("cat", ["--prompt", "find the "]),
            ("find the cat", []),
        )
    )
    assert named == given == plain


def test_a_model_directory_is_compiled_for_the_call(run: Any, model: Path, vectors: np.ndarray) -> None:
    status, out, err = run("embed", model, *TEXTS)
    assert status == 0, err
    got = np.array([json.loads(line) for line in out.splitlines()], np.float32)
    np.testing.assert_allclose(got, vectors, rtol=0, atol=1e-6)  # two sessions may split float32 sums differently
    assert "capturing the graph" in err


@pytest.mark.parametrize("trained_for", [None, "int8"])
def test_the_bar_counts_the_passes_of_the_recipe_that_is_used(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained_for: str | None
) -> None:
    directory = write_directory(tmp_path / "model")
    if trained_for is not None:
        (directory / RECIPE_NAME).write_text(recipe_text(find_recipe(trained_for)))
    totals, passes, narrated = [], [], narrate.narrated

    @contextmanager
    def counted(total: int, **options: Any) -> Iterator[Any]:
        totals.append(total)
        with narrated(total, **options) as tell:
            yield lambda event: (passes.append(event) if not isinstance(event, str) else None, tell(event))

    monkeypatch.setattr(narrate, "narrated", counted)
    status, _, err = run("embed", directory, "a cat")
    assert status == 0, err
    assert totals == [len(passes)]
    assert ("quantize_weights" in [record.name for record in passes]) is (trained_for == "int8")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["a", "--file", "x.txt"], 2, "texts were given twice"),
        (["--file", "no-such.txt"], 2, "there is no text at"),
        (["a", "--out", "x.csv"], 2, "ends in .npy or .jsonl"),
        (["a", "--out", "no/such/x.npy"], 2, "is not a file in a directory that exists"),
        (["a", "--precision", "int4"], 2, "no 'int4'"),
        (["a", "--pooling", "median"], 2, "no 'median'"),
        (["a", "--no-normalize"], 2, "about a pooling that is given"),
        (["a", "--pooling", "cls"], 2, "not for an artifact"),
        (["a", "--recipe", "int8"], 2, "not for an artifact"),
        (["a", "--dims", "25"], 3, "dims 25 exceeds the 24"),
        (["a", "--dims", "0"], 3, "dims must be a number of at least 1"),
        (["a", "--prompt-name", "x"], 3, "no prompt 'x'"),
    ],
)
def test_what_cannot_be_done(run: Any, artifact: Path, arguments: list[str], status: int, said: str) -> None:
    got, out, err = run("embed", artifact, *arguments)
    assert (got, out) == (status, "") and said in err


def test_a_decoder_does_not_embed(run: Any, tiny_python_lm: Path, tmp_path: Path, artifact: Path) -> None:
    status, _, err = run("generate", artifact, "a")
    assert status == 2 and "is made to embed, not to generate" in err
    for command in ("eval", "tune"):
        status, _, err = run(command, artifact)
        assert status == 2 and "is made to embed, not to generate" in err, command


# --- the other commands -----------------------------------------------------------------------------------------------
def test_export_says_what_a_vector_is(run: Any, model: Path, tmp_path: Path) -> None:
    status, out, err = run("export", model, tmp_path / "out", "--pooling", "max", "--no-normalize")
    assert status == 0, err
    assert out.splitlines()[-1] == f"vectors: {HIDDEN} dimensions, max of up to 12 tokens"
    assert out.splitlines()[0].split()[:3] == ["pass", "status", "hits"]
    status, _, err = run("export", model, tmp_path / "other", "--kv", "int8")
    assert status == 3 and "kv int8 is for models that generate" in err


@pytest.mark.parametrize("what", ["model", "artifact"])
def test_explain(run: Any, model: Path, artifact: Path, what: str) -> None:
    status, out, err = run("explain", model if what == "model" else artifact)
    assert status == 0, err
    assert "fuse_add_norm" in out and "insert_kv_cache" not in out


def test_explain_pools_as_it_is_told(run: Any, model: Path, artifact: Path, tiny_python_lm: Path) -> None:
    plain, pooled = (run("explain", model, *more) for more in ((), ("--pooling", "max", "--no-normalize")))
    assert plain[0] == pooled[0] == 0, pooled[2]
    assert "aten.amax" in pooled[1] and "aten.amax" not in plain[1]
    for target, arguments, said in (
        (artifact, ["--pooling", "max"], "not for an artifact"),
        (artifact, ["--task", "embed"], "not for an artifact"),
        (model, ["--pooling", "median"], "no 'median'"),
        (model, ["--no-normalize"], "about a pooling that is given"),
        (model, ["--task", "translate"], "no task 'translate'"),
        (tiny_python_lm, ["--pooling", "cls"], "--pooling is for encoders"),
    ):
        status, out, err = run("explain", target, *arguments)
        assert (status, out) == (2, "") and said in err


def test_bench_counts_texts(run: Any, artifact: Path) -> None:
    status, out, err = run("bench", artifact, "-r", 2)
    assert status == 0, err
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| 16 ")]
    assert len(rows) == 1 and float(rows[0][1].split("±")[0]) > 0  # of the lengths, the tiny model reads one
    status, out, err = run("bench", artifact, "-r", 1, "-o", "json")
    assert status == 0 and [test["tokens"] for test in json.loads(out)["tests"]] == [16]
    for option in (["-p", "5"], ["--engine", "hf"], ["--speculate", "auto"]):
        status, _, err = run("bench", artifact, *option)
        assert status == 2 and f"{option[0]} is about generating" in err
    assert run("bench", artifact, "-o", "csv")[0] == 2
