"""``ryzen-compile train`` from a configuration file to a model that generates, and every way in which it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ryzen_compile.train.config import TrainConfig, parse_config

Run = Callable[..., tuple[int, str, str]]
STEPS = 3
TREE: dict[str, Any] = {
    "model": {
        "tokenizer": {"vocab": 300},
        "architecture": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
    },
    "data": {"length": 32, "validation_share": 0.1},
    "optimization": {"optimizer": "muon", "lr": 0.01, "batch": 2, "steps": STEPS},
    "schedule": {"warmup": 1},
    "precision": {"dtype": "fp32", "compile": False},
    "controller": {"ablate": False},
}


def write(directory: Path, **sections: Any) -> Path:
    """The tiny run as a file, with its text beside it; ``sections`` replace settings of theirs."""
    text = directory / "text.jsonl"
    lines = [json.dumps({"text": f"def f{i}(x):\n    return x * {i * 7919 % 1009}\n" * 2}) for i in range(80)]
    text.write_text("\n".join(lines) + "\n")
    tree = {"output": str(directory / "run"), **TREE, "data": {**TREE["data"], "train": {"path": str(text)}}}
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a baseline run that is through, below its configuration."""
    from ryzen_compile import cli

    directory = tmp_path_factory.mktemp("train")
    assert cli.main(["train", "--config", str(write(directory)), "--mode", "baseline"]) == 0
    return directory / "run" / "baseline"


def one_line(err: str, code: str) -> str:
    """The error, of the given code, which has to be the last line and the only one of its kind."""
    lines = err.splitlines()
    assert lines[-1].startswith(f"ryzen-compile: error[{code}]: "), err
    assert sum("error[" in line for line in lines) == 1 and "Traceback" not in err
    return lines[-1]


# --- runs -------------------------------------------------------------------------------------------------------------
def test_a_run_leaves_a_model_that_transformers_loads_and_generates_with(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "model", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(finished / "model", local_files_only=True)
    assert model.dtype == torch.float32 and len(tokenizer) == 300
    ids = tokenizer("def f1(x", return_tensors="pt").input_ids
    found = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert found.shape == (1, ids.shape[1] + 4)
    assert tokenizer.decode(found[0]).startswith("def f1(x")


def test_a_run_leaves_its_numbers_and_checkpoints(finished: Path) -> None:
    names = {"model", "checkpoints", "metrics.jsonl", "training_metrics_report.json", "training_metrics.csv"}
    assert {path.name for path in finished.iterdir()} == names
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "batch"] == [1, 2, 3]
    assert [record["step"] for record in records if record["kind"] == "validation"][-1] == STEPS
    assert not [path for path in finished.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]


def test_test_mode_as_json_says_how_it_went(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path, optimization={"steps": 1000})
    status, out, err = run("train", "--config", path, "--mode", "test", "--json", "--set", "save_dtype=bf16")
    assert status == 0, err
    facts = json.loads(out)
    assert (facts["mode"], facts["steps"], facts["tokens"], facts["stopped"]) == ("test", 8, 8 * 2 * 32, "finished")
    assert facts["seconds"] > 0 and facts["tokens_per_second"] > 0
    assert 0 < facts["validation_loss"] < 6 and 0 <= facts["validation_accuracy"] <= 1
    model = Path(facts["model"])
    assert model == tmp_path / "run" / "test" / "model"
    assert json.loads((model / "config.json").read_text())["dtype"] == "bfloat16"
    assert "step 8/8" in err and "80 documents" not in err and "documents, " in err


def test_going_on_with_a_run_that_is_through_changes_nothing(run: Run, finished: Path) -> None:
    config = finished.parent.parent / "run.yaml"
    weights = (finished / "model" / "model.safetensors").read_bytes()
    before = {path.name for path in (finished / "checkpoints").iterdir()}
    status, out, err = run("train", "--config", config, "--mode", "baseline", "--resume", "--json")
    assert status == 0, err
    assert json.loads(out)["steps"] == STEPS
    assert (finished / "model" / "model.safetensors").read_bytes() == weights
    assert {path.name for path in (finished / "checkpoints").iterdir()} == before


def test_going_on_under_other_settings_is_refused(run: Run, finished: Path) -> None:
    config = finished.parent.parent / "run.yaml"
    arguments = ("train", "--config", config, "--mode", "baseline", "--resume")
    status, _, err = run(*arguments, "--set", "optimization.lr=0.5")
    assert status == 3
    assert "optimization.lr was 0.01, now 0.5" in one_line(err, "config")


def test_a_second_run_into_the_same_output_is_refused(run: Run, finished: Path) -> None:
    before = sorted(finished.rglob("*"))
    status, out, err = run("train", "--config", finished.parent.parent / "run.yaml", "--mode", "baseline")
    assert (status, out) == (3, "")
    line = one_line(err, "config")
    assert f"checkpoints of a run already, the last of step {STEPS}" in line and "--resume" in line
    assert sorted(finished.rglob("*")) == before


# --- refusals ---------------------------------------------------------------------------------------------------------
def test_without_a_configuration(run: Run) -> None:
    status, _, err = run("train")
    assert status == 2 and "train needs a configuration" in one_line(err, "usage")


def test_a_configuration_that_does_not_exist(run: Run, tmp_path: Path) -> None:
    status, _, err = run("train", "--config", tmp_path / "none.yaml")
    assert status == 3 and "none.yaml' cannot be read: No such file or directory" in one_line(err, "config")


def test_an_unknown_mode(run: Run, tmp_path: Path) -> None:
    status, _, err = run("train", "--config", write(tmp_path), "--mode", "fast")
    assert status == 2 and "mode 'fast': expected test, baseline, optimized" in one_line(err, "usage")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "optimization.step=1"], "optimization.step: there is no such setting, the nearest is 'steps'"),
        (["--set", "optimization.lr=-1"], "optimization.lr: Input should be greater than 0, got '-1'"),
        (["--set", "optimization.lr"], "'optimization.lr': expected a.b=value; for example optimization.lr=1e-3"),
        (["--resume"], "holds no run to resume; start it without --resume"),
        (["--set", "data.length=100000"], "are needed for one row; give more text or set a smaller data.length"),
        (["--set", "optimization.steps=null", "--set", "optimization.tokens=63"], "shorter than a step"),
        (["--set", "data.train.path=/none/such.txt"], "data.train: there is no text at '/none/such.txt'"),
        (["--set", "model.architecture.hiden_size=8"], "no setting 'hiden_size', the nearest is 'hidden_size'"),
        (["--set", "model.architecture.num_attention_heads=5"], "multiple of the number of attention heads"),
        (["--set", "precision.dtype=fp16"], "precision.dtype: Input should be 'auto', 'fp32' or 'bf16', got 'fp16'"),
    ],
    ids=["unknown", "value", "syntax", "resume", "text", "short", "path", "field", "heads", "fp16"],
)
def test_refusals_are_one_line_and_leave_no_model(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    mode = "baseline" if "optimization.tokens=63" in arguments else "test"  # which takes a step of any length
    status, out, err = run("train", "--config", write(tmp_path), "--mode", mode, *arguments)
    assert (status, out) == (3, "")
    assert message in one_line(err, "config")
    assert not list(tmp_path.rglob("model.safetensors"))


# --- schema -----------------------------------------------------------------------------------------------------------
def test_the_schema_is_json_and_needs_no_configuration(run: Run) -> None:
    status, out, err = run("train", "--schema")
    assert (status, err) == (0, "")
    schema = json.loads(out)
    assert schema["title"] == TrainConfig.__name__ and set(schema["properties"]) == set(TrainConfig.model_fields)


def test_the_configuration_of_these_tests_is_one(tmp_path: Path) -> None:
    assert parse_config(yaml.safe_load(write(tmp_path).read_text())).optimization.steps == STEPS
