"""Every command once, as a user types it: results on stdout, everything else on stderr."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ryzen_compile
from ryzen_compile import cli
from ryzen_compile.cli.defaults import DEFAULT_RECIPE
from ryzen_compile.config import RECIPES, Recipe, find_recipe
from ryzen_compile.manifest import read_manifest
from ryzen_compile.pipeline import default_passes
from tests.model_directory import listing, shared_artifact, shared_model

PROMPT = "def add(first"
PASSES = [step.name for step in default_passes(Recipe())]
DEFAULT_PASSES = [step.name for step in default_passes(find_recipe(DEFAULT_RECIPE))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_model(tmp_path_factory)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_artifact(tmp_path_factory)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line that must succeed; returns its stdout and stderr."""

    def call(*arguments: object) -> tuple[str, str]:
        status = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out, err

    return call


def expected(artifact: Path, prompt: str, new: int, **options: Any) -> list[int]:
    with ryzen_compile.load(artifact) as model:
        ids = np.array([model.tokenizer.encode(prompt)])
        return model.generate(ids, max_new_tokens=new, **options)[0, ids.shape[1] :].tolist()


# --- export -----------------------------------------------------------------------------------------------------------
def test_export_writes_an_artifact_and_tells_how(run: Any, model: Path, artifact: Path, tmp_path: Path) -> None:
    before = listing(model)
    out, err = run("export", model, tmp_path / "out", "--recipe", "fp32", "--context", 64, "--logits", "all")
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["pass", "status", "hits"]
    assert [line.split()[0] for line in lines[1 : len(PASSES)]] == [name for name in PASSES if name != "prune_logits"]
    assert re.fullmatch(rf"wrote {re.escape(str(tmp_path / 'out'))} \([\d.]+ [KM]iB\)", lines[-2])
    assert re.fullmatch(r"cache: \d+ bytes per token", lines[-1])
    steps = [re.sub(r"^ *[\d.]+ s  ", "", line) for line in err.splitlines()]
    assert steps == [
        "loading weights",
        "capturing the graph",
        "computing the float64 reference",
        "writing the artifact",
    ]
    assert listing(model) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    manifest = read_manifest(tmp_path / "out")
    assert manifest["spec"]["context"] == manifest["recipe"]["context"] == 64
    assert manifest["recipe"]["logits"] == "all"
    assert expected(tmp_path / "out", PROMPT, 17) == expected(artifact, PROMPT, 17)


def test_export_as_json_replaces_with_force(run: Any, model: Path, artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "out")
    options = ("--force", "--no-verify", "--json", "--context", 32, "--recipe", "fp32")
    out, err = run("export", model, tmp_path / "out", *options)
    found = json.loads(out)
    assert err == ""
    assert found["artifact"] == str(tmp_path / "out")
    assert [record["name"] for record in found["report"]["records"]] == PASSES
    assert all(record["max_error"] is None for record in found["report"]["records"])
    assert read_manifest(tmp_path / "out")["recipe"]["context"] == 32
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough to calibrate on."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("".join(f"def add_{i}(a, b):\n    return a + {i} * b\n" for i in range(900)))
    return path


def test_export_quantizes_as_it_is_told(run: Any, model: Path, text: Path, tmp_path: Path) -> None:
    out, err = run(
        "export", model, tmp_path / "out", "--recipe", "int3-mixed", "--target-bits", 5, "--prefill", "int8",
        "--calibration", text, "--override", "lm_head=8,block=32", "--override", "embed=float", "--no-verify",
    )  # fmt: skip
    assert re.search(r"^quantize_weights +applied +9 ", out, re.MULTILINE)
    steps = [re.sub(r"^ *[\d.]+ s  ", "", line) for line in err.splitlines()]
    assert steps == ["loading weights", "reading the calibration text", "capturing the graph", "writing the artifact"]
    recipe = read_manifest(tmp_path / "out")["recipe"]
    assert (recipe["name"], recipe["prefill"], recipe["weights"]["target_bits"]) == ("int3-mixed", "int8", 5.0)
    assert set(recipe["weights"]["overrides"]) == {"lm_head", "embed"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["facts"]["calibration"]["text"] == text.name
    hits = next(r for r in report["records"] if r["name"] == "quantize_weights")["hits"]
    head = next(hit for hit in hits if hit["note"].startswith("lm_head"))
    assert head["note"] == "lm_head: 8 bits, blocks of 32 with zero points, gptq"
    assert (tmp_path / "out" / "prefill.onnx").exists()
    assert len(expected(tmp_path / "out", PROMPT * 4, 5)) == 5


# --- generate ---------------------------------------------------------------------------------------------------------
def test_generate_continues_the_prompt(run: Any, artifact: Path) -> None:
    out, err = run("generate", artifact, PROMPT, "-n", 17)
    with ryzen_compile.load(artifact) as model:
        text = model.tokenizer.decode(expected(artifact, PROMPT, 17), skip_special_tokens=True)
    assert out == text + "\n"
    assert re.fullmatch(r"\[17 tokens, first after \d+ ms, [\d.]+ tok/s\]\n", err)


def test_generate_reads_stdin(run: Any, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argument, _ = run("generate", artifact, PROMPT, "-n", 5)
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    piped, _ = run("generate", artifact, "-n", 5)
    assert piped == argument


def test_generate_as_json(run: Any, artifact: Path) -> None:
    out, err = run("generate", artifact, PROMPT, "--max-new-tokens", 7, "--json", "--threads", 1, "--no-digests")
    found = json.loads(out)
    assert err == ""
    assert found["ids"] == expected(artifact, PROMPT, 7)
    assert found["new_tokens"] == 7
    with ryzen_compile.load(artifact) as model:
        assert found["text"] == model.tokenizer.decode(found["ids"], skip_special_tokens=True)
        assert found["prompt_tokens"] == len(model.tokenizer.encode(PROMPT))
    assert found["time_to_first_token_s"] > 0 and found["decode_tokens_per_s"] > 0
    one, _ = run("generate", artifact, PROMPT, "-n", 1, "--json")
    assert json.loads(one)["decode_tokens_per_s"] is None
    assert re.fullmatch(r"\[1 token, first after \d+ ms\]\n", run("generate", artifact, PROMPT, "-n", 1)[1])


def test_an_empty_prompt_starts_from_bos(run: Any, artifact: Path) -> None:
    out, _ = run("generate", artifact, "", "-n", 5, "--json")
    with ryzen_compile.load(artifact) as model:
        assert json.loads(out)["ids"] == model.generate([[1]], max_new_tokens=5)[0, 1:].tolist()
    assert (json.loads(out)["prompt_tokens"], json.loads(out)["new_tokens"]) == (1, 5)


def test_generate_stops_at_a_string(run: Any, artifact: Path) -> None:
    ids = expected(artifact, PROMPT, 17)
    with ryzen_compile.load(artifact) as model:
        pieces = [model.tokenizer.decode([token]) for token in ids]
    at = next(i for i, piece in enumerate(pieces) if i >= 3 and piece.isprintable() and piece not in pieces[:i])
    out, _ = run("generate", artifact, PROMPT, "-n", 17, "--json", "--stop", "never said", "--stop", pieces[at])
    assert json.loads(out)["ids"] == ids[: at + 1]


def test_a_seed_repeats_a_sample(run: Any, artifact: Path) -> None:
    options = ("generate", artifact, PROMPT, "-n", 17, "--temperature", 1.5, "--top-p", 0.95, "--json")
    found = [json.loads(run(*options, "--seed", seed)[0])["ids"] for seed in (3, 3, 4)]
    assert found[0] == found[1] != found[2]
    assert found[0] == expected(artifact, PROMPT, 17, do_sample=True, temperature=1.5, top_p=0.95, seed=3)
    assert found[0] != expected(artifact, PROMPT, 17)


def test_sampling_settings_reach_the_sampler(run: Any, artifact: Path) -> None:
    greedy = expected(artifact, PROMPT, 7)
    options = ("generate", artifact, PROMPT, "-n", 7, "--temperature", 9, "--seed", 1, "--json")
    assert json.loads(run(*options)[0])["ids"] != greedy
    for narrowing in (("--top-k", 1), ("--min-p", 1), ("--top-p", 1e-9)):
        assert json.loads(run(*options, *narrowing)[0])["ids"] == greedy, narrowing
    penalised = run("generate", artifact, PROMPT, "-n", 7, "--repetition-penalty", 1e6, "--json")[0]
    assert json.loads(penalised)["ids"] == expected(artifact, PROMPT, 7, repetition_penalty=1e6)


# --- bench ------------------------------------------------------------------------------------------------------------
TINY = ("-p", 5, "-n", 3, "-r", 2, "-t", 1)


def test_bench_compares_engines_in_one_table(run: Any, model: Path) -> None:
    out, _ = run("bench", model, "--engine", "onnxruntime", "--engine", "hf", *TINY)
    table = [line.split("|") for line in out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in table]
    assert cells[0][1:-1] == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    rows = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    assert sorted((row["backend"], row["test"]) for row in rows) == [
        ("huggingface", "pp5"), ("huggingface", "tg3"), ("onnxruntime", "pp5"), ("onnxruntime", "tg3"),
    ]  # fmt: skip
    assert all(re.fullmatch(r"[\d.]+ ± [\d.]+", row["t/s"]) for row in rows)
    assert {row["threads"] for row in rows} == {"1"}
    assert re.search(r"^tg3: onnxruntime is [\d.]+ x huggingface$", out, re.MULTILINE)
    assert re.search(r"^onnxruntime: pp5: first token after \d+ ms", out, re.MULTILINE)
    assert re.search(r"GB/s, \d+ % of a plain read \([\d.]+ GB/s\)$", out, re.MULTILINE)
    assert re.search(r"^peak memory of this process: [\d.]+ GiB$", out, re.MULTILINE)


@pytest.mark.parametrize("form", ["json", "jsonl", "csv"])
def test_bench_of_an_artifact_for_machines(run: Any, artifact: Path, form: str) -> None:
    out, _ = run("bench", artifact, *TINY, "-d", 0, "-d", 7, "-o", form)
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(out)))
    elif form == "jsonl":
        rows = [json.loads(line) for line in out.splitlines()]
    else:
        whole = json.loads(out)
        rows = whole if isinstance(whole, list) else next(v for v in whole.values() if isinstance(v, list))
    tests = [json.dumps(row) for row in rows]
    for name in ("pp5", "pp5 @ d7", "tg3", "tg3 @ d7"):
        assert any(f'"{name}"' in line for line in tests), name


# --- explain, passes, recipes -----------------------------------------------------------------------------------------
def test_explain_an_artifact_shows_its_report(run: Any, artifact: Path) -> None:
    out, err = run("explain", artifact)
    report, native = out.split("\n## Native operators on this machine\n")
    assert report.rstrip("\n") == (artifact / "report.md").read_text(encoding="utf-8").rstrip("\n") and native
    assert err == f"from {artifact / 'report.json'}\n"
    out, err = run("explain", artifact, "--json")
    found = json.loads(out)
    assert found.pop("native")
    assert found == json.loads((artifact / "report.json").read_text(encoding="utf-8"))
    assert err == ""


def test_explain_a_model_shows_hits_reasons_and_operators(run: Any, model: Path) -> None:
    before = listing(model)
    out, err = run("explain", model, "--recipe", "fp32")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line[:1].isalpha()}
    assert set(PASSES) <= set(rows)
    assert rows["insert_kv_cache"][1:3] == ["applied", "2"]
    assert re.search(r"^ {4}\d+ x its input is not a sum  \[model\.embed_tokens\]$", out, re.MULTILINE)
    assert re.search(r"^operators before: .*ryzen\.attention 2", out, re.MULTILINE)
    assert re.search(r"^operators after: .*ryzen\.cached_attention 2", out, re.MULTILINE)
    assert "capturing the graph" in err and "writing" not in err
    assert listing(model) == before


def test_passes_are_listed_in_order(run: Any) -> None:
    out, err = run("passes")
    assert [line.split()[:2] for line in out.splitlines()] == [[str(i), n] for i, n in enumerate(DEFAULT_PASSES, 1)]
    assert err == ""
    rows = json.loads(run("passes", "--json", "--recipe", "fp32")[0])
    assert [(row["order"], row["name"]) for row in rows] == list(enumerate(PASSES, 1))
    assert all(row["promise"] == "exact" and len(row["does"]) > 10 for row in rows)
    lossy = [row["name"] for row in json.loads(run("passes", "--json")[0]) if row["promise"] == "lossy"]
    assert lossy == ["quantize_weights"]


def test_recipes_are_listed(run: Any) -> None:
    out, err = run("recipes")
    rows = [line.split(maxsplit=3) for line in out.splitlines()]
    assert [(row[0], row[3]) for row in rows] == [(recipe.name, recipe.description) for recipe in RECIPES]
    bits = {row[0]: float(row[1]) for row in rows}  # codes, and a float32 scale and a zero point for each block
    assert bits["fp32"] == 32 and bits["int4"] == 4 + 32 / 128 and bits["int8"] == 8 + 32 / 128
    assert bits["int4-accurate"] == pytest.approx(4 + 36 / 32, abs=0.005) and bits["int3-mixed"] == 3.25
    assert err == ""
    assert [Recipe(**row) for row in json.loads(run("recipes", "--json")[0])] == list(RECIPES)
