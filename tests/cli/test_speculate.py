"""Speculation from the command line: ``generate --speculate`` and the sg tests of ``bench``."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile.api import export
from ryzen_compile.cli import generate
from ryzen_compile.config import find_recipe
from tests.model_directory import shared_artifact

# Something to repeat: an edit of what stands above.
PROMPT = "def add(first, second):\n    return first + second\n\n\ndef sub(first, second):\n    return first - sec"
NEW = 48


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_python_lm: Path) -> Path:
    """The shipped model in integers: on native operators a step of many tokens computes what single ones do."""
    out = tmp_path_factory.mktemp("artifact") / "int4"
    export(tiny_python_lm, out, find_recipe("int4", method="rtn"), verify=False)
    return out


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    (directory / "a.py").write_text("def sub(first, second):\n    return first - second\n\n\ndef mul(first, second):\n")
    (directory / "b.txt").write_text("class Point:\n    pass\n")
    return directory


@pytest.fixture
def generated(run: Any, artifact: Path) -> Any:
    """What ``generate --json`` says with some options."""

    def call(*options: object) -> dict[str, Any]:
        status, out, err = run("generate", artifact, PROMPT, "-n", NEW, "-t", 1, "--json", *options)
        assert status == 0 and not err, err
        return dict(json.loads(out))

    return call


# --- generate ---------------------------------------------------------------------------------------------------------
def test_the_text_stays_the_same_whoever_drafts(generated: Any, artifact: Path, corpus: Path) -> None:
    plain = generated()
    assert plain["speculation"] is None
    ways = {
        ("--speculate", "auto"): {"lookup"},
        ("--speculate", "lookup"): {"lookup"},
        ("--speculate", "lookup,suffix,lookup", "--draft-tokens", 3): {"lookup", "suffix"},
        ("--corpus", corpus, "--corpus", corpus / "b.txt"): {"suffix"},
        ("--speculate", "auto", "--corpus", corpus): {"lookup", "suffix"},
        ("--early-exit", 3, "--draft-threshold", 0): {"early_exit"},
        ("--draft", artifact): {"draft_model"},
        ("--speculate", "draft_model", "--draft", artifact, "--no-digests"): {"draft_model"},
        ("--speculate", "suffix", "--draft", artifact, "--early-exit", 2): {"suffix", "early_exit", "draft_model"},
    }
    for options, drafters in ways.items():
        found = generated(*options)
        assert found["ids"] == plain["ids"] and found["text"] == plain["text"], options
        assert found["speculation"]["drafters"].keys() <= drafters, options
        assert found["speculation"]["tokens"] == found["new_tokens"] - 1, options


def test_json_says_what_drafts_did(generated: Any) -> None:
    found = generated("--speculate", "lookup", "--draft-tokens", 5)["speculation"]
    assert found["drafts"] and found["accepted"] and not found["idle"] and not found["dropped"]
    assert found["acceptance_rate"] == found["accepted"] / found["drafted"]
    assert found["steps_saved"] == found["tokens"] - found["steps"]
    assert found["drafted"] <= 5 * found["drafts"] and max(map(int, found["accepted_per_draft"])) <= 5
    assert sum(found["accepted_per_draft"].values()) == found["drafts"]
    assert found["drafters"]["lookup"]["drafts"] == found["drafts"]


def test_people_are_told_behind_the_text(run: Any, artifact: Path) -> None:
    status, plain, err = run("generate", artifact, PROMPT, "-n", NEW)
    assert status == 0 and "speculation" not in err
    status, out, err = run("generate", artifact, PROMPT, "-n", NEW, "--speculate", "auto")
    assert status == 0 and out == plain
    lines = err.splitlines()
    assert re.fullmatch(rf"\[{NEW} tokens, first after \d+ ms, [\d.]+ tok/s\]", lines[0])
    assert re.fullmatch(rf"speculation: {NEW - 1} tokens in \d+ steps, [\d.]+ x the estimate without", lines[1]), (
        "a step less than tokens: the first one needs none"
    )
    assert re.fullmatch(r"  lookup: \d+ drafts, \d+ of \d+ tokens accepted \(\d+ %\), [\d.]+ ms", lines[2])


def test_a_seed_gives_the_same_sample_with_drafts_that_are_not_drawn(generated: Any) -> None:
    sampled = ("--temperature", 0.7, "--top-k", 20, "--seed", 5)
    assert generated(*sampled, "--speculate", "lookup")["ids"] == generated(*sampled)["ids"]


def test_a_prompt_cache_and_a_window_go_with_drafts(generated: Any, tmp_path: Path) -> None:
    plain, kept = generated(), ("--save-prompt-cache", tmp_path / "prompt.st")
    assert generated("--speculate", "auto", *kept)["ids"] == plain["ids"]
    again = generated("--speculate", "auto", "--prompt-cache", tmp_path / "prompt.st")
    assert again["ids"] == plain["ids"] and again["reused_tokens"]
    window = ("--window", 64)
    assert generated(*window, "--speculate", "lookup")["ids"] == generated(*window)["ids"]


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (
            ["--speculate", "nonsense"],
            2,
            "error[usage]: --speculate: unknown drafter 'nonsense'; give auto, or some of",
        ),
        (["--speculate", "lookup,"], 2, "error[usage]: --speculate: unknown drafter ''"),
        (["--speculate", "auto,lookup"], 2, "error[usage]: --speculate auto chooses by itself"),
        (["--speculate", "lookup,draft_model"], 2, "error[usage]: --speculate draft_model needs a model that drafts"),
        (["--draft-tokens", "4"], 2, "error[usage]: --draft-tokens belongs to speculation, which nothing asks for"),
        (["--draft-threshold", "0.5"], 2, "error[usage]: --draft-threshold belongs to speculation, which nothing asks"),
        (["--speculate", "lookup", "--draft-threshold", "0.5"], 2, "--draft-threshold is for a model that drafts"),
        (["--speculate", "auto", "--draft-threshold", "1.01"], 2, "'--draft-threshold'"),
        (["--speculate", "auto", "--draft-tokens", "0"], 2, "'--draft-tokens'"),
        (
            ["--speculate", "auto", "--draft-tokens", "65"],
            3,
            "tokens of a draft must be an integer from 1 to 64, got 65",
        ),
        (["--early-exit", "0"], 2, "'--early-exit'"),
        (["--corpus", "no such file"], 2, "error[usage]: there is no text at 'no such file'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_mean_nothing_are_refused_before_the_artifact_is_looked_for(
    run: Any, options: list[str], status: int, said: str
) -> None:
    found, out, err = run("generate", "no such artifact", PROMPT, *options)
    assert found == status and said in err and err.count("\n") == 1 and not out


def test_a_corpus_that_is_too_long_is_refused(run: Any, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "CORPUS_CHARACTERS", 20)
    status, _, err = run("generate", "no such artifact", PROMPT, "--corpus", corpus / "b.txt")
    assert status == 2 and "b.txt' holds more than 20 characters" in err


def test_what_the_artifact_cannot_do_is_refused_before_the_first_token(
    run: Any, artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stranger = shared_artifact(tmp_path_factory)
    for options, said in (
        (("--early-exit", 6), "error[unsupported]: the model cannot be left after 6 of its 6 layers"),
        (("--speculate", "early_exit"), "error[prompt]: an early exit needs the number of layers"),
        (("--draft", stranger), "error[prompt]: the assistant model has a vocabulary of 290 tokens"),
        (("--draft", stranger.parent), "error[artifact]"),
    ):
        status, out, err = run("generate", artifact, PROMPT, "-n", 4, *options)
        assert status == 3 and said in err and not out, options


# --- bench ------------------------------------------------------------------------------------------------------------
SMALL = ("-p", 0, "-n", 12, "-r", 2, "-t", 1)


def test_bench_sets_speculation_beside_plain_generation(run: Any, artifact: Path) -> None:
    kinds = ("--speculate", "auto,lookup,early_exit", "--early-exit", 3)
    status, out, err = run("bench", artifact, *SMALL, *kinds)
    assert status == 0, err
    table = [[cell.strip() for cell in line.split("|")] for line in out.splitlines() if line.startswith("|")]
    rows = {row[6]: row[7] for row in table[2:]}
    assert list(rows) == ["tg12", "sg12", "sg12 +auto", "sg12 +lookup", "sg12 +early_exit"]
    rates = {test: float(re.fullmatch(r"([\d.]+) ± [\d.]+", rate)[1]) for test, rate in rows.items()}  # type: ignore[index]
    for kind in ("auto", "lookup", "early_exit"):
        line = re.search(
            rf"^sg12 \+{kind}: ([\d.]+) x plain, \d+ % of \d+ drafted tokens accepted, ([\d.]+) tokens per step, "
            r"the same text in (\d) of 4$",
            out,
            re.MULTILINE,
        )
        assert line, out
        # Both are rounded to hundredths.
        assert float(line[1]) == pytest.approx(rates[f"sg12 +{kind}"] / rates["sg12"], abs=0.006)
        assert float(line[2]) >= 1 and line[3] == "4"
    assert re.search(r"^peak memory of this process: [\d.]+ GiB\n\Z", out, re.MULTILINE)


@pytest.mark.parametrize("form", ["json", "jsonl", "csv"])
def test_bench_for_machines(run: Any, artifact: Path, form: str) -> None:
    draft = ("--speculate", "draft_model", "--draft", artifact)
    status, out, err = run("bench", artifact, *SMALL, *draft, "-o", form)
    assert status == 0, err
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(out)))
    else:
        rows = json.loads(out) if form == "json" else [json.loads(line) for line in out.splitlines()]
    assert [row["test"] for row in rows] == ["tg12", "sg12", "sg12 +draft_model"]
    assert not rows[0].get("drafts") and rows[1]["drafts"] == "" and rows[2]["drafts"] == "draft_model"
    plain, drafted = ({name: float(row[name]) for name in FIGURES} for row in rows[1:])
    assert plain["times_plain"] == plain["tokens_per_step"] == 1 and plain["acceptance"] == 0
    assert drafted["times_plain"] == pytest.approx(drafted["avg_ts"] / plain["avg_ts"])
    assert 0 <= drafted["acceptance"] <= 1 <= drafted["tokens_per_step"] <= 17
    assert plain["n_texts"] == plain["same_text"] == drafted["same_text"] == 4
    assert (drafted["n_gen"], drafted["n_prompt"], drafted["n_depth"]) == (12, 0, 128)
    if form != "csv":
        row = rows[2]
        assert row["samples_ts"] == pytest.approx([12 / (1e-9 * took) for took in row["samples_ns"]], rel=1e-4)


FIGURES = (
    *("n_prompt", "n_gen", "n_depth", "avg_ts", "n_texts", "same_text"),
    *("times_plain", "acceptance", "tokens_per_step"),
)


def test_bench_continues_the_text_it_is_given(run: Any, artifact: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text("for index in range(10):\n    print(index, end=' ')\n\n\n" * 60)
    given = ("--speculate", "suffix", "--text", text)
    status, out, err = run("bench", artifact, "-p", 0, "-n", 0, "-r", 1, "-t", 1, *given, "-o", "json")
    assert status == 0, err
    plain, drafted = json.loads(out)
    assert (plain["test"], drafted["test"]) == ("sg128", "sg128 +suffix"), "no tg test, and the usual length"
    assert drafted["tokens_per_step"] > 2 and drafted["acceptance"] > 0.5, "it repeats itself"
    text.write_text("too short")
    status, out, err = run("bench", artifact, *SMALL, *given)
    assert status == 2 and "512 are needed for 4 prompts of 128" in err and not out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--speculate", "nonsense"], "--speculate: unknown drafter 'nonsense'"),
        (["--speculate", "auto", "--engine", "onnxruntime", "--engine", "hf"], "measures artifacts, not engine 'hf'"),
        (["--speculate", "auto", "--engine", "eager"], "measures artifacts, not engine 'eager'"),
        (["--speculate", "draft_model"], "--speculate draft_model needs a model that drafts"),
        (["--text", "a.txt"], "--text is read by sg tests alone; give --speculate auto as well"),
        (["--draft", "a"], "--draft is read by sg tests alone; give --speculate auto or draft_model as well"),
        (["--speculate", "lookup", "--early-exit", "2"], "--early-exit is read by sg tests alone"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bench_refuses_by_name(run: Any, options: list[str], said: str) -> None:
    status, out, err = run("bench", "no such artifact", *options)
    assert status == 2 and said in err and err.count("\n") == 1 and not out


def test_bench_refuses_a_shape_and_an_artifact_without_its_tokenizer(run: Any, artifact: Path, tmp_path: Path) -> None:
    status, _, err = run("bench", "--shape", "tinyllama-1.1b", "--speculate", "auto")
    assert status == 2 and "--speculate continues text, and a shape has no tokenizer" in err
    silent = Path(shutil.copytree(artifact, tmp_path / "silent"))
    forget(silent, "tokenizer.json")
    status, _, err = run("bench", silent, *SMALL, "--speculate", "auto")
    assert status == 3 and "holds no tokenizer.json" in err


def forget(artifact: Path, name: str) -> None:
    """As if it had been made without the file ``name``."""
    from ryzen_compile.manifest import read_manifest, write_manifest

    (artifact / name).unlink()
    own = ("schema_version", "made_by", "files")
    write_manifest(artifact, {key: value for key, value in read_manifest(artifact).items() if key not in own})


def test_bench_refuses_a_context_that_is_too_short_before_it_measures(run: Any, artifact: Path) -> None:
    status, out, err = run("bench", artifact, "-n", 900, "-t", 1, "--speculate", "auto")
    assert status == 2 and "test sg900 needs 1029 positions, the model has a context of 1024" in err and not out
