"""The controller: what it turns on, what it undoes and why, how it adapts, and that a resumed run decides the same."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ryzen_compile.errors import ConfigError, NumericalError
from ryzen_compile.train.config import ControllerSettings
from ryzen_compile.train.controller import WARM_STEPS, LossWatch, OptimizationController
from ryzen_compile.train.loop import REFUSED_STEPS, TrainingResult
from ryzen_compile.train.objective import Levers, Objective
from tests.train.tiny_trainer import Clock, Hook, Run, explode, llama, make_run, spoil_gradients

pytest.importorskip("accelerate")


# --- losses -----------------------------------------------------------------------------------------------------------
def complaints(losses: list[float], **options: Any) -> list[bool]:
    watch = LossWatch(rise=0.5, **options)
    return [bool(watch.complaint(loss)) for loss in losses]


def test_two_losses_in_a_row_above_the_limit_are_too_many() -> None:
    assert complaints([3.0, 3.6, 3.6]) == [False, False, True]
    assert complaints([3.0, 3.6, 3.4, 3.6]) == [False] * 4  # not in a row
    assert complaints([3.0, 3.5, 3.5]) == [False] * 3  # at the limit, not above it
    assert complaints([3.0, 2.0, 2.6, 2.6]) == [False] * 3 + [True]  # the limit follows the lowest
    assert complaints([9.0, 8.0]) == [False, False]  # nothing is known yet


def test_the_validation_after_a_change_is_let_pass() -> None:
    assert complaints([3.6, 3.6, 3.6], lowest=3.0, grace=True) == [False, False, True]
    assert complaints([3.4, 3.6, 3.6], lowest=3.0, grace=True) == [False, False, True]  # whatever it was
    watch = LossWatch(0.5, lowest=3.0, above=1)
    watch.changed()
    assert not watch.complaint(3.6) and not watch.complaint(3.6) and watch.complaint(3.6)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_not_waited_for(loss: float) -> None:
    watch = LossWatch(0.5, lowest=3.0, grace=True)
    assert "not finite" in watch.complaint(loss)
    assert watch.lowest == 3.0


# --- on and off -------------------------------------------------------------------------------------------------------
def test_components_are_turned_on_at_their_share_of_the_run(tmp_path: Path) -> None:
    first, second, never = Hook("first"), Hook("second", start=0.55), Hook("never", start=1.0)
    run = make_run(tmp_path, lambda _: [first, second, never], steps=10, validate=0)
    run.fit()
    assert first.progress == second.progress == [step / 10 for step in range(10)]
    assert run.events("activate") == [(1, "activate", "first"), (7, "activate", "second")]
    assert first.activations == second.activations == 1 and never.activations == 0
    assert any("second" in text for text in run.told)


def test_a_component_that_breaks_the_loss_is_turned_off_and_the_run_recovers(tmp_path: Path) -> None:
    """On at step 19 of 60: validation 20 is let pass, 24 and 28 are too many."""
    harmless, bad = Hook("harmless"), Hook("bad", explode, start=0.3)
    run = make_run(tmp_path, lambda _: [bad, harmless], steps=60, validate=4)
    result = run.fit()
    assert run.events("fallback") == [(28, "fallback", "bad")]
    assert result.steps == 60 and not bad.active and harmless.active
    losses = {record["step"]: record["loss"] for record in run.records("validation")}
    (event,) = (e for e in run.records("event") if e["event"] == "fallback")
    assert event["facts"]["value"] == losses[28] > event["facts"]["expected"] == losses[16] + 0.5
    assert result.validation.loss < losses[16]
    assert any("bad" in text and "fallback" in text for text in run.told)


def test_gradients_that_are_not_finite_turn_it_off(tmp_path: Path) -> None:
    run = make_run(tmp_path, lambda _: [Hook("bad", spoil_gradients, start=0.5)], steps=20)
    result = run.fit()
    assert run.events("fallback") == [(10 + REFUSED_STEPS, "fallback", "bad")]
    assert result.steps == 20 and math.isfinite(result.validation.loss)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_run_ends_where_nothing_is_left_to_undo(tmp_path: Path, enabled: bool) -> None:
    """Without its controller the run above does; and with it when the model itself is the cause."""
    bad = Hook("bad", spoil_gradients)
    run = make_run(tmp_path, lambda _: [bad], steps=20, settings={"enabled": enabled})
    if enabled:
        next(run.trainer.objective.model.parameters()).data.fill_(math.nan)
    with pytest.raises(NumericalError, match="gradients' norm is nan"):
        run.fit()
    assert bad.active is not enabled


def test_a_disabled_controller_turns_on_and_records_only(tmp_path: Path) -> None:
    bad = Hook("bad", explode)
    settings = {"enabled": False, "ablate": True, "loss_rise": 1e-3}
    run = make_run(tmp_path, lambda _: [bad], steps=20, validate=2, settings=settings)
    run.fit()
    assert bad.active and run.events() == [(1, "activate", "bad")]
    assert [record["epoch"] for record in run.records("epoch")] == [1, 2]
    assert all(record["speedups"] == record["quality"] == {} for record in run.records("epoch"))


def controller_of(*components: Hook, **settings: Any) -> OptimizationController:
    """Without a trainer: it is told losses, and nothing of it is measured."""
    objective = Objective(llama(), Levers())
    chosen = ControllerSettings(**{"ablate": False, "every": 10, **settings})
    return OptimizationController(components, chosen, objective.model, objective, None, lambda _: None)


def told(controller: OptimizationController, *losses: float) -> None:
    for index, loss in enumerate(losses):
        controller.validated(index, loss, 0.5, 0.0)


def test_the_last_one_turned_on_is_the_culprit() -> None:
    """Whatever its place in the list; and the one before it only after three more bad validations."""
    late, early = Hook("late", start=0.5), Hook("early")
    controller = controller_of(late, early)
    controller.before_step(0, 10)
    told(controller, 3.0, 3.0)
    controller.before_step(5, 10)
    told(controller, 4.0, 4.0)
    assert late.active and early.active
    told(controller, 4.0)
    assert not late.active and early.active
    told(controller, 4.0, 4.0)
    assert early.active
    told(controller, 4.0)
    assert not early.active
    told(controller, 4.0, 4.0, 4.0, 4.0)  # nothing is left, nothing happens
    controller.before_step(6, 10)
    assert not late.active and not early.active  # given up for good
    assert not controller.fall_back(7, "whatever")


def test_two_components_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected each once"):
        controller_of(Hook("same"), Hook("same"))


# --- stages -----------------------------------------------------------------------------------------------------------
def epochs(controller: OptimizationController, *losses: float, left: int = 100) -> None:
    trainer: Any = SimpleNamespace(step=0, plan=SimpleNamespace(steps=left, epoch=10, tokens_per_step=1))
    for loss in losses:
        controller.validated(0, loss, 0.5, 0.0)
        controller.end_epoch(trainer, 0)


def staged(**settings: Any) -> tuple[Hook, OptimizationController]:
    hook = Hook("staged", stages=3)
    controller = controller_of(hook, **settings)
    controller.before_step(0, 10)
    return hook, controller


def test_a_settled_loss_leads_to_the_next_stage() -> None:
    """Each stage needs two epochs' losses of its own; the last stage stays."""
    hook, controller = staged()
    epochs(controller, 3.0)
    assert hook.stage == 0
    epochs(controller, 2.98)  # 0.02 is not below 0.02
    assert hook.stage == 0
    epochs(controller, 2.97)
    assert hook.stage == 1
    epochs(controller, 2.97)
    assert hook.stage == 1
    epochs(controller, 2.97)
    assert hook.stage == 2
    epochs(controller, 2.97, 2.97, 2.97)
    assert hook.stage == 2 and hook.active


@pytest.mark.parametrize("rise", [0.49, 0.51])
def test_a_stage_that_costs_too_much_is_left_for_good(rise: float) -> None:
    hook, controller = staged()
    epochs(controller, 3.0, 3.0)
    assert hook.stage == 1
    epochs(controller, 3.0 + rise)
    assert hook.stage == (0 if rise > 0.5 else 1) and hook.active
    epochs(controller, 3.0, 3.0, 3.0)
    assert hook.stage == (0 if rise > 0.5 else 2)


def test_a_stage_that_breaks_the_loss_is_left_before_the_component_is_turned_off() -> None:
    hook, controller = staged()
    epochs(controller, 3.0, 3.0)
    told(controller, 9.0, 9.0, 9.0)
    assert hook.active and hook.stage == 0
    told(controller, 9.0, 9.0, 9.0)
    assert not hook.active


def test_no_stage_is_entered_that_is_not_trained_for() -> None:
    for left, stage in ((9, 0), (10, 1)):
        hook, controller = staged()
        epochs(controller, 3.0, 3.0, left=left)
        assert hook.stage == stage
    hook, controller = staged(adapt=False)
    epochs(controller, 3.0, 3.0, 3.0)
    assert hook.stage == 0


def test_an_epoch_without_a_validation_settles_nothing() -> None:
    """The loss of an earlier epoch would equal itself."""
    hook, controller = staged()
    trainer: Any = SimpleNamespace(step=0, plan=SimpleNamespace(steps=100, epoch=10, tokens_per_step=1))
    epochs(controller, 3.0)
    for _ in range(3):
        controller.end_epoch(trainer, 0)
    assert hook.stage == 0
    epochs(controller, 3.0)
    assert hook.stage == 1


def test_stages_of_a_real_run_are_recorded_with_their_reasons(tmp_path: Path) -> None:
    """The second stage explodes: entered at step 20, where the losses of two epochs are known, left at step 30."""
    hook = Hook("staged", lambda x, stage: explode(x, stage) if stage else x, stages=2)
    run = make_run(tmp_path, lambda _: [hook], steps=50, validate=10, settings={"settled": 9.0})
    run.fit()
    assert run.events("tighten", "relax", "fallback") == [(20, "tighten", "staged"), (30, "relax", "staged")]
    losses = {record["step"]: record["loss"] for record in run.records("validation")}
    entered, left = (e["facts"] for e in run.records("event") if e["event"] in ("tighten", "relax"))
    assert (entered["loss_before"], entered["loss"]) == (losses[10], losses[20])
    assert entered["settings_before"] == {"stage": 0} and entered["settings"] == {"stage": 1}
    assert left["value"] == losses[30] > left["expected"] == losses[20] + 0.5
    assert [record["settings"]["staged"]["stage"] for record in run.records("epoch")] == [0, 0, 1, 0, 0]
    assert [record["compression_ratio"] for record in run.records("epoch")] == [2, 2, 3, 2, 2]


# --- levers -----------------------------------------------------------------------------------------------------------
def slower(levers: Levers) -> float:
    """Seconds of a pass, with the loss without logits and without."""
    return 1.5 if levers.linear_cross_entropy else 1.0


def lever_run(directory: Path, kind: type[Objective], *, every: int = 10, **settings: Any) -> Run:
    """Of 25 steps. Half a second in each of the 15 behind the first epoch is to be gained."""
    levers = Levers(linear_cross_entropy=True)
    settings = {"slowdown": 1.4, "worth": 4.4, **settings}
    return make_run(
        directory, lambda _: [], steps=25, every=every, settings=settings, levers=levers, kind=kind, save=20
    )


@pytest.mark.parametrize(("every", "step"), [(WARM_STEPS + 2, WARM_STEPS), (10, 10)])
def test_a_lever_that_slows_a_step_down_is_turned_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, step: int
) -> None:
    """After a few steps or the first epoch, whichever comes first; a run that goes on from there keeps it off."""
    kind = Clock(monkeypatch).objective(slower)
    run = lever_run(tmp_path, kind, every=every)
    run.fit()
    assert run.events() == [(step, "fallback", "loss")]
    (event,) = run.records("event")
    assert event["facts"]["value"] == pytest.approx(1.5) and event["facts"]["expected"] == 1.4
    assert run.trainer.objective.levers == Levers()
    (tmp_path / "metrics.jsonl").unlink()
    again = lever_run(tmp_path, kind, every=every)
    again.fit(run.checkpoints.load(tmp_path / "checkpoints" / "step-00000020"))
    assert again.trainer.objective.levers == Levers() and again.events() == []
    assert all(torch.equal(value, again.weights()[name]) for name, value in run.weights().items())


@pytest.mark.parametrize(
    "settings",
    [{"slowdown": 1.6}, {"worth": 7.6}, {"enabled": False}],
    ids=["slow is allowed", "not worth it", "disabled"],
)
def test_a_lever_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    run = lever_run(tmp_path, Clock(monkeypatch).objective(slower), **settings)
    run.fit()
    assert run.events() == []
    assert run.trainer.objective.levers.linear_cross_entropy
    assert run.records("epoch")[-1]["active"] == ["loss"]


@pytest.mark.parametrize(("busy", "dropped"), [(3, False), (10, False), (10**9, True)])
def test_a_busy_moment_is_no_slow_lever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: int, dropped: bool
) -> None:
    """Passes with the lever take ten times as long until ``busy`` of all passes that are timed: in one of three rounds,
    in the whole of the first measurement (four rounds of two), or always."""
    passes = -10  # of the epoch before

    def seconds(levers: Levers) -> float:
        nonlocal passes
        passes += run.trainer.objective.training
        return 10.0 if levers.linear_cross_entropy and 0 < passes <= busy else 1.0

    run = lever_run(tmp_path, Clock(monkeypatch).objective(seconds))
    run.fit()
    assert run.events() == ([(10, "fallback", "loss")] if dropped else [])


# --- records and states -----------------------------------------------------------------------------------------------
def test_epochs_are_recorded(tmp_path: Path) -> None:
    run = make_run(tmp_path, lambda _: [Hook("on"), Hook("later", start=0.7)], steps=25, validate=10)
    run.fit()
    found = run.records("epoch")
    losses = [record["loss"] for record in run.records("batch")]
    validations = {record["step"]: record["loss"] for record in run.records("validation")}
    assert [(record["epoch"], record["step"]) for record in found] == [(1, 10), (2, 20), (3, 25)]
    for record, part in zip(found, (losses[:10], losses[10:20], losses[20:]), strict=True):
        assert record["train_loss"] == pytest.approx(sum(part) / len(part), rel=1e-9)
        assert record["validation_loss"] == validations[record["step"]]
        assert record["tokens_per_second"] * record["seconds"] == pytest.approx(len(part) * 64)
    assert [record["active"] for record in found] == [["on"], ["on", "later"], ["on", "later"]]
    assert found[0]["settings"] == {"on": {"stage": 0}} and found[0]["reconstruction_error"] == 0.25


def test_an_export_is_measured_and_may_fail(tmp_path: Path) -> None:
    calls: list[bool] = []

    def measure(model: torch.nn.Module) -> dict[str, float]:
        calls.append(model.eval().training)
        torch.randn(1)
        if len(calls) == 2:
            raise RuntimeError("no disk")
        return {"ttft_seconds": 0.5, "decode_tokens_per_second": 7.0}

    run = make_run(tmp_path / "measured", lambda _: [], steps=30, model=llama(attention_dropout=0.1))
    plain = run.fit()
    run = make_run(
        tmp_path / "plain", lambda _: [], steps=30, model=llama(attention_dropout=0.1), measure_export=measure
    )
    assert run.fit().validation == plain.validation
    assert [record["ttft_seconds"] for record in run.records("epoch")] == [0.5, None, 0.5]
    assert [record["decode_tokens_per_second"] for record in run.records("epoch")] == [7.0, None, 7.0]
    (event,) = run.records("event")
    assert (event["step"], event["event"], event["facts"]) == (20, "export_failed", {"reason": "no disk"})


def lasting(controller: OptimizationController) -> dict[str, Any]:
    """Its state but for what a clock said."""
    state = controller.state()
    assert state["sums"].pop("seconds") >= 0
    return state


def eventful(directory: Path, resume_step: int | None = None) -> Run:
    """A component that is turned off, one that changes stages, dropout, ablation."""
    stages = Hook("stages", lambda x, stage: explode(x, stage) if stage == 2 else x, stages=3)
    return make_run(
        directory,
        lambda _: [stages, Hook("bad", explode, start=0.3)],
        steps=50,
        save=5,
        validate=3,
        settings={"settled": 9.0, "ablate": True},
        model=llama(attention_dropout=0.1),
        resume_step=resume_step,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, TrainingResult]:
    run = eventful(tmp_path_factory.mktemp("whole"))
    return run, run.fit()


@pytest.mark.parametrize("step", [15, 25, 40])
def test_a_resumed_run_decides_what_an_uninterrupted_one_does(
    tmp_path: Path, uninterrupted: tuple[Run, TrainingResult], step: int
) -> None:
    """From before a component is turned on that breaks the loss, amid, and behind."""
    whole, result = uninterrupted
    assert {event for _, event, _ in whole.events()} >= {"activate", "tighten", "fallback"}
    resumed = eventful(tmp_path, step)
    found = resumed.fit(whole.checkpoints.load(whole.directory / "checkpoints" / f"step-{step:08}"))
    assert found.validation == result.validation
    weights = resumed.weights()
    assert all(torch.equal(value, weights[name]) for name, value in whole.weights().items())
    assert lasting(resumed.controller) == lasting(whole.controller)
    assert [e for e in resumed.events() if e[1] != "resume"] == [e for e in whole.events() if e[0] > step]
