from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ryzen_compile
from ryzen_compile import cli
from ryzen_compile.api import export, read_source
from ryzen_compile.errors import ParityError
from ryzen_compile.manifest import read_manifest, write_manifest
from ryzen_compile.text import BUILTIN_CHARACTERS, digest, read_text, token_windows
from ryzen_compile.validate.quality import EngineScorer, ModelScorer, perplexity, score

SMALL = ("--tokens", 1000, "--length", 64, "-t", 1)
NUMBER = r"[\d.]+(?:e-\d+)?"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_python_lm: Path) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "fp32"
    export(tiny_python_lm, out, "fp32", verify=False)
    return out


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main(["eval", *map(str, arguments)])
        return (status, *capsys.readouterr())

    return call


def windows_of(artifact: Path, content: str, length: int, tokens: int) -> np.ndarray:
    with ryzen_compile.load(artifact) as model:
        return token_windows(content, model.tokenizer.encode, length, tokens)


def test_beside_the_model_everything_is_measured(run: Any, artifact: Path, tiny_python_lm: Path) -> None:
    status, out, err = run(artifact, "--reference", tiny_python_lm, *SMALL, "--json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    content = read_text("builtin")[BUILTIN_CHARACTERS // 2 :]
    windows = windows_of(artifact, content, 64, 1000)
    assert (found["tokens"], found["windows"], found["length"]) == (16 * 63, 16, 64)
    assert (found["text"], found["sha256"]) == ("builtin, second half", digest(content))
    assert found["machine"] and found["versions"]["onnxruntime"] and found["threads"] == 1
    with ryzen_compile.load(artifact, threads=1) as model:
        expected = score(EngineScorer(model.engine), ModelScorer(read_source(tiny_python_lm).model), windows)
    for name in ("kl", "top1", "perplexity", "reference_perplexity", "ratio"):
        estimate = getattr(expected, name)
        # Another batch or thread count may sum in another order.
        assert found[name]["value"] == pytest.approx(estimate.value, rel=1e-5, abs=1e-9), name
        assert found[name]["error"] == pytest.approx(estimate.error, rel=1e-3, abs=1e-6), name
    for name in ("accuracy", "reference_accuracy", "accuracy_loss"):
        # In another order of sums one prediction of 1,008 may turn over, and the loss is relative to some 40 % of them.
        assert found[name]["value"] == pytest.approx(getattr(expected, name).value, abs=3e-3), name
        assert found[name]["error"] >= 0, name
    assert 0.1 < found["accuracy"]["value"] < 0.9  # a trained model, and text that cannot be foreseen
    assert found["accuracy_loss_bound"] == pytest.approx(expected.accuracy_loss_bound, abs=1e-2)
    assert 0 <= found["kl"]["value"] < 1e-8 and found["top1"]["value"] >= 0.999
    assert 5 < found["perplexity"]["value"] < 60  # a trained model on text that it has half seen


def test_for_people_every_value_has_its_standard_error(run: Any, artifact: Path, tiny_python_lm: Path) -> None:
    status, out, _ = run(artifact, "--reference", tiny_python_lm, *SMALL, "-q")
    assert status == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["text"] == f"builtin, second half (sha256 {digest(read_text('builtin')[400_000:])[:16]})"
    assert lines["predicted"] == "1008 tokens in 16 windows of 64"
    assert re.fullmatch(rf"KL +{NUMBER} ± {NUMBER} nats per token \(reference \|\| artifact\)", lines["mean"])
    assert re.fullmatch(rf"100\.000 ± {NUMBER} % the same token", lines["top-1"])
    assert re.fullmatch(rf"{NUMBER} ± {NUMBER}, reference {NUMBER} ± {NUMBER}", lines["perplexity"])
    assert re.fullmatch(rf"1\.00000 ± {NUMBER}", lines["ratio"])
    own = rf"{NUMBER} ± {NUMBER} % the text's own token, reference {NUMBER} ± {NUMBER} %"
    assert re.fullmatch(own, lines["accuracy"])
    loss = rf"-?{NUMBER} ± {NUMBER} % of the reference's accuracy, at 95 % confidence up to -?{NUMBER} %"
    assert re.fullmatch(loss, lines["loss"])
    assert re.fullmatch(rf"window \d+: mean KL {NUMBER}", lines["worst"])
    assert lines["machine"].endswith(", 1 threads") and "onnxruntime " in lines["versions"]


def test_alone_there_is_a_perplexity_only(run: Any, artifact: Path, tmp_path: Path) -> None:
    content = read_text("builtin", characters=9000)
    (tmp_path / "own.txt").write_text(content, encoding="utf-8")
    arguments = (artifact, "--text", tmp_path / "own.txt", "--tokens", 500, "--length", 50, "-t", 1)
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    assert re.search(rf"^text +own\.txt \(sha256 {digest(content)[:16]}\)$", out, re.MULTILINE)
    assert re.search(rf"^perplexity +{NUMBER} ± {NUMBER}$", out, re.MULTILINE)
    assert "no reference: perplexity only; --reference MODEL adds KL, agreement, accuracy and the ratio\n" in out
    assert "top-1" not in out and "\naccuracy" not in out
    found = json.loads(run(*arguments, "--json")[1])
    assert "kl" not in found and found["reference"] is None
    with ryzen_compile.load(artifact, threads=1) as model:
        alone = perplexity(EngineScorer(model.engine), windows_of(artifact, content, 50, 500))
    assert found["perplexity"]["value"] == pytest.approx(alone.perplexity.value, rel=1e-5)


def test_one_window_has_no_standard_error(run: Any, artifact: Path) -> None:
    arguments = (artifact, "--reference", artifact, "--tokens", 20, "--length", 20, "-t", 1, "--no-native")
    found = json.loads(run(*arguments, "--json")[1])
    assert found["ratio"] == {"value": 1.0, "error": None}
    assert found["accuracy_loss"] == {"value": 0.0, "error": None} and found["accuracy_loss_bound"] is None
    out = run(*arguments)[1]
    assert "ratio        1.00000 ± unknown\n" in out
    assert "loss         0.000 ± unknown % of the reference's accuracy\n" in out


def test_limits_are_held_to(run: Any, artifact: Path) -> None:
    measure = (artifact, "--reference", artifact, "--tokens", 160, "--length", 20, "-t", 1, "--no-native")
    status, out, err = run(*measure, "--fail-above-ratio", 1, "--fail-below-top1", 1)
    assert (status, err) == (0, "") and "ratio " in out
    status, out, err = run(*measure, "--fail-above-ratio", 0.999)
    assert status == ParityError.exit_code == 7
    assert err == (
        "ryzen-compile: error[parity]: perplexity ratio 1.00000 ± 0.00000, at 95 % confidence up to 1.00000: expected "
        "at most 0.999; use a finer format or calibrate, or measure more tokens\n"
    )
    assert "ratio " in out  # what was measured is printed all the same


def test_a_damaged_head_misses_both_limits(run: Any, artifact: Path, tiny_python_lm: Path, tmp_path: Path) -> None:
    import torch

    source = read_source(tiny_python_lm)
    with torch.no_grad():
        source.model.model.norm.weight.add_(0.3 * torch.randn(256, generator=torch.Generator().manual_seed(0)))
    source.model.save_pretrained(tmp_path / "damaged")
    source.tokenizer.save_pretrained(tmp_path / "damaged")
    measure = (artifact, "--reference", tmp_path / "damaged", "--tokens", 640, "--length", 40, "-t", 1)
    status, _, err = run(*measure, "--fail-below-top1", 0.99)
    assert status == 7
    assert re.search(
        r"top-1 agreement 0\.\d+ ± 0\.\d+, at 95 % confidence down to 0\.\d+: expected at least 0\.99;", err
    )
    found = json.loads(run(*measure, "--json")[1])
    mean, error = found["top1"]["value"], found["top1"]["error"]
    # The mean reaches this limit, the bound does not.
    assert run(*measure, "--fail-below-top1", mean - error)[0] == 7
    assert run(*measure, "--fail-below-top1", mean - 3 * error)[0] == 0
    assert found["accuracy_loss_bound"] > found["accuracy_loss"]["value"]
    ratio = found["ratio"]["value"] + found["ratio"]["error"]
    assert run(*measure, "--fail-above-ratio", ratio)[0] == 7
    assert run(*measure, "--fail-above-ratio", ratio + 3 * found["ratio"]["error"])[0] == 0


# --- bad inputs -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--fail-above-ratio", 1.1], 2, "compare with a model; give --reference MODEL"),
        (["--fail-below-top1", 0.9], 2, "compare with a model; give --reference MODEL"),
        (["--reference", "x", "--fail-above-ratio", 0], 2, "--fail-above-ratio must be above 0, got 0.0"),
        (["--reference", "x", "--fail-above-ratio", "nan"], 2, "--fail-above-ratio must be above 0, got nan"),
        (["--reference", "x", "--fail-below-top1", 99], 2, "must be a share from 0 to 1, got 99.0; 99 % is 0.99"),
        (
            ["--reference", "x", "--fail-below-top1", 0.9, "--tokens", 150, "--length", 50],
            2,
            "3 windows are too few for a confidence bound, expected at least 4",
        ),
        (["--length", 1025], 2, "--length 1025 exceeds the model's context of 1024 tokens; use --length 1024 or less"),
        (["--length", 1], 2, "'--length': Input should be greater than or equal to 2"),
        (["--batch", 0], 2, "'--batch': Input should be greater than or equal to 1"),
        (["--tokens", "many"], 2, "'--tokens': Input should be a valid integer"),
        (["--refrence", "x"], 2, "--reference"),
        (
            ["--text", "absent.txt"],
            2,
            "there is no text at 'absent.txt'; give a file, a directory or the word 'builtin'",
        ),
        (["--text", "short.txt"], 2, "tokens, 20480 are needed for the 20000 asked for (40 x 512)"),
        (["--reference", "absent/model"], 3, "absent/model"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured(
    run: Any, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[object], status: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a few words only")
    found, out, err = run(artifact, *arguments)
    assert (found, out) == (status, ""), err
    assert said in err and err.count("\n") == 1


def test_an_artifact_without_tokenizer(run: Any, artifact: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(artifact, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    facts = {k: v for k, v in read_manifest(bare).items() if k not in ("schema_version", "made_by", "files")}
    write_manifest(bare, facts)
    status, out, err = run(bare)
    assert (status, out) == (3, "")
    assert "holds no tokenizer.json" in err


def test_a_reference_of_another_vocabulary(run: Any, artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.model_directory import shared_model

    status, _, err = run(artifact, "--reference", shared_model(tmp_path_factory), "--tokens", 40, "--length", 20)
    assert status == 2 and "tokenize with the model's own tokenizer" in err
