"""A run from its configuration to a model that exports: what was trained is what the export computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from ryzen_compile.api import optimize
from ryzen_compile.recipe_file import CODES_NAME, RECIPE_NAME, read_recipe
from ryzen_compile.train.config import TrainConfig
from ryzen_compile.workflow.exported import plain_copy
from ryzen_compile.workflow.training import FinishedRun, Run, open_run, prepare_text, train
from tests.train.tiny_run import GPT2_WITH_DROPOUT, tiny_config

pytest.importorskip("accelerate")


def exported_loss(run: FinishedRun, config: TrainConfig) -> float:
    """Nats per token of the exported model, in the references, on the run's validation text."""
    rows = prepare_text(config).rows.validation
    compiled = optimize(run.directory / "model", backend="eager", logits="all", verify=False)
    losses = []
    for row in rows:
        logits = torch.from_numpy(compiled(row[None, :-1].numpy())).double()
        losses.append(functional.cross_entropy(logits.flatten(0, 1), row[1:]))
    return float(torch.stack(losses).mean())


WIDE = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "intermediate_size": 64}
PASSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "qat": {"qat": {"block": 32, "bits": [4]}},
    "qat-stages": {"qat": {"block": 16, "bits": [8, 3], "symmetric": False, "head_bits": 8}},
    "ternary": {"ternary": {}},
    "dkm": {"dkm": {"bits": [4], "cluster_dim": 2}},
    "qat+dkm": {"qat": {"block": 32}, "dkm": {"bits": [4], "cluster_dim": 2, "start": 0.5}},
}


@pytest.mark.parametrize("name", PASSES)
def test_the_exported_model_is_the_trained_one(tmp_path: Path, name: str) -> None:
    """Its loss on the validation text is the run's own last figure, relative 1e-5: rounding of float32 sums."""
    config = tiny_config(tmp_path, passes=PASSES[name], optimization={"steps": 12})
    architecture = {**config.model.architecture, **WIDE}
    config = tiny_config(
        tmp_path, passes=PASSES[name], optimization={"steps": 12}, model={"architecture": architecture}
    )
    run = train(config)
    recipe = read_recipe(run.directory / "model")
    assert (recipe is None) == (name == "plain")
    assert (run.directory / "model" / CODES_NAME).exists() == ("dkm" in name)
    if recipe is None:
        found = optimize(run.directory / "model", "fp32", backend="eager", logits="all", verify=False)
        row = prepare_text(config).rows.validation
        logits = torch.stack([torch.from_numpy(found(r[None, :-1].numpy()))[0] for r in row]).double()
        loss = float(functional.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten()))
    else:
        loss = exported_loss(run, config)
    assert loss == pytest.approx(run.result.validation.loss, rel=1e-5)


def test_the_recipe_is_what_makes_it_so(tmp_path: Path) -> None:
    """Negative control: at another rounding the trained model's loss is another one."""
    config = tiny_config(tmp_path, passes={"qat": {"block": 16, "bits": [2]}}, optimization={"steps": 12})
    run = train(config)
    path = run.directory / "model" / RECIPE_NAME
    assert exported_loss(run, config) == pytest.approx(run.result.validation.loss, rel=1e-5)
    other = json.loads(path.read_text(encoding="utf-8"))
    other["recipe"]["weights"]["block"] = 32
    path.write_text(json.dumps(other), encoding="utf-8")
    assert abs(exported_loss(run, config) / run.result.validation.loss - 1) > 1e-4


def test_lora_is_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = train(tiny_config(tmp_path))
    (tmp_path / "tuned").mkdir()
    config = tiny_config(
        tmp_path / "tuned", model={"architecture": None, "path": str(base.directory / "model"), "tokenizer": None},
        passes={"lora": {"rank": 2}},
    )  # fmt: skip
    run = train(config)
    assert run.result.validation.loss < base.result.validation.loss
    found = optimize(run.directory / "model", "fp32", backend="eager", logits="all", verify=False)
    rows = prepare_text(config).rows.validation
    logits = torch.stack([torch.from_numpy(found(r[None, :-1].numpy()))[0] for r in rows]).double()
    loss = float(functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
    assert loss == pytest.approx(run.result.validation.loss, rel=1e-5)


def test_a_distilled_draft_says_how_much_to_draft(tmp_path: Path) -> None:
    teacher = train(tiny_config(tmp_path, optimization={"steps": 30}))
    (tmp_path / "draft").mkdir()
    config = tiny_config(
        tmp_path / "draft",
        model={"architecture": {**tiny_config(tmp_path).model.architecture, "num_hidden_layers": 1},
               "tokenizer": str(teacher.directory / "model")},
        passes={"distill": {"teacher": str(teacher.directory / "model"), "weight": 0.9}},
        optimization={"steps": 30},
    )  # fmt: skip
    run = train(config)
    saved = json.loads((run.directory / "model" / "generation_config.json").read_text(encoding="utf-8"))
    assert saved["num_assistant_tokens"] >= 1
    assert 0 < run.result.validation.agreement <= 1
    assert "agreement with its teacher" in (run.directory / "model" / "README.md").read_text(encoding="utf-8")


def test_the_card_states_the_run(tmp_path: Path) -> None:
    run = train(tiny_config(tmp_path, model={"architecture": GPT2_WITH_DROPOUT}))
    card = (run.directory / "model" / "README.md").read_text(encoding="utf-8")
    assert f"{run.result.validation.loss:.4f} nats per token" in card
    assert str(tmp_path) not in card.split("```yaml")[0]


def test_epochs_measure_the_exported_model(tmp_path: Path) -> None:
    """With metrics.export a float and a rounded model are exported and measured at each epoch's end."""
    run = train(tiny_config(tmp_path, metrics={"export": True}, controller={"every": 6}, passes={"qat": {"block": 16}}))
    lines = (run.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    epochs = [record for line in lines if (record := json.loads(line))["kind"] == "epoch"]
    assert len(epochs) == 1
    assert epochs[0]["ttft_seconds"] > 0 and epochs[0]["decode_tokens_per_second"] > 0
    assert epochs[0]["compression_ratio"] > 1


@pytest.mark.parametrize("name", ["qat", "ternary", "dkm", "lora"])
def test_a_copy_is_made_plain_and_the_run_goes_on(tmp_path: Path, name: str) -> None:
    """What is measured as an export is a copy: the model in training keeps what stands in for its weights."""
    settings = {"qat": {"block": 16}, "dkm": {"bits": [4]}, "lora": {"rank": 2}, "ternary": {}}[name]
    with open_run(tiny_config(tmp_path, passes={name: settings})) as run:
        run.trainer.advance()
        before = run.trainer.validate().loss
        plain = plain_copy(run.model, run.components)
        assert [n for n, _ in plain.named_parameters()] == [n for n, _ in build_plain(run).named_parameters()]
        assert run.trainer.validate().loss == before
        run.trainer.advance()
        assert all(component.active for component in run.components)


def build_plain(run: Run) -> torch.nn.Module:
    """A model like the run's that nothing was ever attached to."""
    return type(run.model)(run.model.config)
