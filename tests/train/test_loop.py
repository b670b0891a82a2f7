"""The loop: what a step does, and that a run which was stopped goes on as if it had not been."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ryzen_compile.errors import ConfigError, NumericalError
from ryzen_compile.train.metrics import BatchMetrics
from ryzen_compile.workflow import training
from tests.train.tiny_run import GPT2_WITH_DROPOUT, tiny_config

pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A suite that a shell started in the background ignores Ctrl-C: these tests must not depend on that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Stops:
    """A watcher that asks the run to stop, as Ctrl-C does, when ``step`` is done."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.told: list[str] = []

    def batch(self, metrics: BatchMetrics, steps: int) -> None:
        if metrics.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)

    def event(self, text: str) -> None:
        self.told.append(text)


def records(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def weights(run: training.FinishedRun) -> dict[str, torch.Tensor]:
    return load_file(run.directory / training.MODEL / "model.safetensors")


def losses(directory: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(directory, "batch")]


@pytest.mark.parametrize(
    ("architecture", "optimizer"),
    [(None, "adamw"), (None, "muon"), (GPT2_WITH_DROPOUT, "adamw")],
    ids=["llama-adamw", "llama-muon", "gpt2-dropout"],
)
@pytest.mark.parametrize("stopped_at", [3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    tmp_path: Path, architecture: dict[str, Any] | None, optimizer: str, stopped_at: int
) -> None:
    changes: dict[str, Any] = {"optimization": {"optimizer": optimizer}}
    if architecture is not None:
        changes["model"] = {"architecture": architecture}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = training.train(tiny_config(tmp_path / "whole", **changes))
    config = tiny_config(tmp_path / "parts", **changes)
    with pytest.raises(KeyboardInterrupt):
        training.train(config, watcher=Stops(stopped_at))
    resumed = training.train(config, resume=True)
    expected, found = weights(whole), weights(resumed)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert losses(resumed.directory) == losses(whole.directory)
    assert [step for step, _ in losses(whole.directory)] == [1, 2, 3, 4, 5, 6]
    assert resumed.result.validation == whole.result.validation


def test_the_dropout_of_the_test_above_is_real(tmp_path: Path) -> None:
    """Without the generators' states a resumed run would differ: here they differ, and so do the weights."""
    config = tiny_config(tmp_path, model={"architecture": GPT2_WITH_DROPOUT})
    first = training.train(config)
    other = training.train(config.model_copy(update={"output": str(tmp_path / "other")}))
    assert losses(first.directory) == losses(other.directory)
    no_dropout = {**GPT2_WITH_DROPOUT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    (tmp_path / "plain").mkdir()
    plain = training.train(tiny_config(tmp_path / "plain", model={"architecture": no_dropout}))
    assert losses(plain.directory) != losses(first.directory)


def test_accumulated_gradients_are_those_of_one_larger_batch(tmp_path: Path) -> None:
    """Loss curves agree within float32 rounding: relative 1e-5 over six steps."""
    curves = []
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        (tmp_path / str(batch)).mkdir()
        changes = {"optimization": {"batch": batch, "accumulate": accumulate}}
        curves.append(losses(training.train(tiny_config(tmp_path / str(batch), **changes)).directory))
    for curve in curves[1:]:
        assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in curves[0]], rel=1e-5)


def test_the_loss_falls_and_the_report_says_so(tmp_path: Path) -> None:
    run = training.train(tiny_config(tmp_path, optimization={"steps": 40}))
    curve = [loss for _, loss in losses(run.directory)]
    assert curve[0] > 5 and curve[-1] < 0.8 * curve[0]
    report = json.loads((run.directory / "training_metrics_report.json").read_text(encoding="utf-8"))
    assert report["summary"]["validation_loss"] == run.result.validation.loss
    assert run.result.validation.loss < curve[0]
    assert run.result.stopped == "finished"


def test_early_stopping_ends_a_run_that_no_longer_gains(tmp_path: Path) -> None:
    changes = {"optimization": {"steps": 60, "lr": 1e-9}, "early_stopping": {"patience": 2, "least": 0.01}}
    run = training.train(tiny_config(tmp_path, **changes))
    assert run.result.stopped == "early"
    assert run.result.steps == 9  # the first validation is at 3 and counts as a gain, 6 and 9 are none
    assert [event["event"] for event in records(run.directory, "event")] == ["early_stop", "best_taken"]


def test_a_run_that_was_stopped_early_ends_with_its_best_weights_and_stays_stopped(tmp_path: Path) -> None:
    """At a rate that is far too high the loss soon rises: the weights are those of the lowest validation."""
    changes = {"optimization": {"steps": 90, "lr": 0.3}, "schedule": {"warmup": 0}, "early_stopping": {"patience": 3}}
    run = training.train(tiny_config(tmp_path, **changes))
    assert run.result.stopped == "early"
    found = {record["step"]: record["loss"] for record in records(run.directory, "validation")}
    best = min(found, key=found.__getitem__)
    assert best < run.result.steps and found[best] < found[run.result.steps]
    assert run.result.validation.loss == pytest.approx(found[best], rel=1e-5)
    again = training.train(tiny_config(tmp_path, **changes), resume=True)
    assert again.result.steps == run.result.steps and again.result.stopped == "early"
    for name, value in weights(run).items():
        assert torch.equal(value, weights(again)[name]), name


def test_another_text_is_another_run(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        training.train(tiny_config(tmp_path), watcher=Stops(2))
    config = tiny_config(tmp_path)
    with (tmp_path / "text.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"text": "one document more"}\n')
    with pytest.raises(ConfigError, match="the text, or the tokenizer, is another one"):
        training.train(config, resume=True)


def test_a_validation_loss_that_is_no_number_does_not_keep_a_run_from_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ryzen_compile.train.loop import Scores, Trainer

    plain = Trainer.validate

    def validate(self: Trainer, **options: Any) -> Scores:
        return plain(self, **options)._replace(loss=float("nan")) if self.step == 3 else plain(self, **options)

    monkeypatch.setattr(Trainer, "validate", validate)
    run = training.train(tiny_config(tmp_path, checkpoint={"every": 3}))
    assert run.result.steps == 6
    assert training.train(tiny_config(tmp_path, checkpoint={"every": 3}), resume=True).result.steps == 6


def test_a_text_longer_than_the_models_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="context 33 exceeds the 32 positions"):
        training.train(tiny_config(tmp_path, data={"length": 33}))


def test_a_test_run_may_be_repeated(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert training.train(config, "test").result.steps == training.train(config, "test").result.steps


def test_a_poisoned_run_is_given_up_with_its_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 4 on the loss is NaN. No such step is taken, and the run can be resumed when the cause is gone."""
    config = tiny_config(tmp_path, optimization={"steps": 8}, validation={"every": 0})
    from ryzen_compile.train.objective import Objective

    plain, seen = Objective.forward, []

    def poisoned(self: Objective, rows: torch.Tensor) -> Any:
        scores = plain(self, rows)
        seen.append(1)
        return scores._replace(loss=scores.loss * float("nan")) if len(seen) > 6 else scores

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "forward", poisoned)
        with pytest.raises(NumericalError, match=r"3 steps in a row, up to step 6.*checkpoint is of step 4"):
            training.train(config)
    refused = [e for e in records(tmp_path / "run" / "optimized", "event") if e["event"] == "step_refused"]
    assert [event["step"] for event in refused] == [4, 5, 6]
    resumed = training.train(config, resume=True)
    assert resumed.result.steps == 8
    assert all(torch.isfinite(value).all() for value in weights(resumed).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimization": {"lr": 0.02}}, r"optimization\.lr was 0\.01, now 0\.02"),
        ({"seed": 5}, r"seed was 0, now 5"),
        ({"passes": {"qat": {}}}, r"passes\.qat was None"),
        ({"data": {"length": 16}}, r"data\.length was 17, now 16"),
    ],
    ids=["rate", "seed", "pass", "length"],
)
def test_a_run_does_not_go_on_under_other_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        training.train(tiny_config(tmp_path), watcher=Stops(2))
    with pytest.raises(ConfigError, match=message):
        training.train(tiny_config(tmp_path, **changes), resume=True)


def test_what_is_only_written_down_may_change(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        training.train(tiny_config(tmp_path), watcher=Stops(2))
    run = training.train(tiny_config(tmp_path, checkpoint={"every": 1}, metrics={"every": 2}), resume=True)
    assert run.result.steps == 6


def test_a_finished_run_is_not_overwritten_and_resuming_it_changes_nothing(tmp_path: Path) -> None:
    first = training.train(tiny_config(tmp_path))
    with pytest.raises(ConfigError, match="holds checkpoints of a run already, the last of step 6"):
        training.train(tiny_config(tmp_path))
    again = training.train(tiny_config(tmp_path), resume=True)
    assert again.result.steps == 6
    for name, value in weights(first).items():
        assert torch.equal(value, weights(again)[name]), name


def test_there_has_to_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run to resume"):
        training.train(tiny_config(tmp_path), resume=True)


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(tmp_path: Path) -> None:
    whole_directory = tmp_path / "whole"
    whole_directory.mkdir()
    whole = training.train(tiny_config(whole_directory))
    with pytest.raises(KeyboardInterrupt):
        training.train(tiny_config(tmp_path), watcher=Stops(4))
    newest = tmp_path / "run" / "optimized" / "checkpoints" / "step-00000004" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-3] ^= 1
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match=r"damaged checkpoint step-00000004: .*step-00000002 is taken"):
        run = training.train(tiny_config(tmp_path), resume=True)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(run)[name]), name


@pytest.mark.parametrize("mode", ["baseline", "test"])
def test_modes_have_directories_of_their_own(tmp_path: Path, mode: Any) -> None:
    run = training.train(tiny_config(tmp_path, optimization={"steps": 30}), mode)
    assert run.directory == tmp_path / "run" / mode
    assert run.result.steps == (8 if mode == "test" else 30)
