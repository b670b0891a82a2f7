"""Measuring by leaving out: what is found, and that the run never notices."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ryzen_compile.errors import UsageError
from ryzen_compile.train.ablation import ROUNDS, step_timings, validation_shares
from ryzen_compile.train.objective import Levers, Objective
from ryzen_compile.train.switches import COMPILE, LEVER_NAMES, ComponentSwitch, LeverSwitch, undisturbed
from ryzen_compile.train.token_loss import TokenLoss
from tests.train.tiny_trainer import PLAIN, Clock, Hook, Run, llama, make_run

pytest.importorskip("accelerate")


def trained(directory: Path, *components: Hook, levers: Levers = PLAIN, kind: type[Objective] = Objective) -> Run:
    """After ten steps with all of them on."""
    run = make_run(directory, lambda _: components, steps=10, levers=levers, kind=kind, settings={"worth": 1e9})
    run.fit()
    return run


# --- the run does not notice ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("levers", [Levers(), Levers(torch.bfloat16, linear_cross_entropy=True)], ids=["plain", "fast"])
def test_a_measured_run_ends_with_the_same_bits(tmp_path: Path, levers: Levers) -> None:
    """Dropout, components that count their passes, and parameters of their own that turning them on draws anew."""

    def run(ablate: bool) -> Run:
        hooks = [Hook("first"), Hook("second", start=0.4)]
        settings = {"ablate": ablate, "worth": 1e9}
        model = llama(attention_dropout=0.2)
        made = make_run(
            tmp_path / str(ablate), lambda _: hooks, steps=25, settings=settings, levers=levers, model=model
        )
        made.fit()
        assert [hook.activations for hook in hooks] == [1, 1]
        return made

    plain, measured = run(False), run(True)
    expected, found = ({**r.weights(), **own(r)} for r in (plain, measured))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert [record["loss"] for record in measured.records("batch")] == [r["loss"] for r in plain.records("batch")]
    names = {"second", *(("precision", "loss") if levers.linear_cross_entropy else ()), "first"}
    last = measured.records("epoch")[-1]
    assert last["speedups"].keys() == last["quality"].keys() == names
    assert all(value > 0 for value in last["speedups"].values())
    assert all(record["quality"] == {} for record in plain.records("epoch"))


def own(run: Run) -> dict[str, Tensor]:
    return {name: values[0].detach() for name, values in run.controller.own_parameters()}


def test_what_the_test_above_relies_on_is_real(tmp_path: Path) -> None:
    """Turning a component off and on by its own methods would change it, as would a pass outside of ``undisturbed``."""
    hook = Hook("hook")
    run = trained(tmp_path, hook)
    before, passes, drawn = hook.own.detach().clone(), hook.passes, torch.get_rng_state()
    with undisturbed([ComponentSwitch(hook, [hook.own])]):
        run.trainer.validate(limit_rows=4)
        torch.randn(1)
        hook.deactivate()
        hook.activate()
        assert hook.passes != passes and not torch.equal(hook.own, before)
    assert hook.passes == passes and torch.equal(hook.own, before) and torch.equal(torch.get_rng_state(), drawn)


def test_no_gradient_is_left(tmp_path: Path) -> None:
    run = trained(tmp_path, Hook("hook"))
    step_timings(run.trainer, run.controller.active())
    assert all(p.grad is None for p in run.trainer.objective.parameters())
    assert run.trainer.objective.training


# --- what is found ----------------------------------------------------------------------------------------------------
def test_seconds_are_compared_within_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``slow`` takes a second more than the other two; all passes take longer and longer, by a tenth of a second."""
    clock = Clock(monkeypatch)
    passes = 0

    def rest(x: Tensor, stage: int) -> Tensor:
        clock.now += 1.0
        return x

    def seconds(levers: Levers) -> float:
        nonlocal passes
        passes += 1
        return 2.0 + 0.1 * passes

    slow, quick = Hook("slow", rest), Hook("quick")
    run = trained(tmp_path, slow, quick, kind=clock.objective(seconds))
    passes = 0
    timings, failures = step_timings(run.trainer, run.controller.active())
    assert failures == {}
    # Three passes a round, to and fro: with both 1 6 7 12, without slow 2 5 8 11, without quick 3 4 9 10.
    assert timings["slow"].seconds == pytest.approx(3.7) and timings["slow"].without == pytest.approx(2.8)
    assert timings["slow"].speedup == pytest.approx(3.1 / 4.2)  # the last round's is the median
    assert timings["slow"].slowdown == pytest.approx(4.2 / 3.1)
    assert timings["quick"].without == pytest.approx(3.9) and timings["quick"].speedup == pytest.approx(4.0 / 4.2)


def test_a_share_is_the_loss_with_minus_the_loss_without(tmp_path: Path) -> None:
    """The model was trained with ``turned``, so its loss is lower with it; higher with the opposite instead."""
    turned = Hook("turned", lambda x, stage: -x)
    run = trained(tmp_path, turned)
    turned.own.data.zero_()
    share = validation_shares(run.trainer, run.controller.active())["turned"]
    with_it = run.trainer.validate(limit_rows=16).loss
    with ComponentSwitch(turned, [turned.own]).without():
        without = run.trainer.validate(limit_rows=16).loss
    assert share == with_it - without < -0.05
    turned.change = lambda x, stage: 50 * x
    assert validation_shares(run.trainer, run.controller.active())["turned"] > 0.5


def test_only_what_is_on_is_measured_and_validated_in_bounds(tmp_path: Path) -> None:
    on, off = Hook("on"), Hook("off", start=1.0)
    run = trained(tmp_path, on, off)
    before = on.passes
    calls: list[int] = []
    run.trainer.forward_backward = lambda rows: calls.append(rows.numel()) or torch.zeros(3)  # type: ignore[method-assign, func-returns-value]
    timings, _ = step_timings(run.trainer, run.controller.active())
    assert timings.keys() == {"on"} and on.passes == before
    assert calls == [4] * (2 * (ROUNDS + 1))  # a batch each, with and without
    assert step_timings(run.trainer, []) == ({}, {}) and validation_shares(run.trainer, []) == {}


def test_nothing_but_compiling_is_measured_in_compiled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which code runs is all that is asked: compiling it would take longer than the rest of the file."""
    seen: list[Levers] = []
    monkeypatch.setattr(Objective, "_compiled", lambda self, name, module: module)

    def seconds(levers: Levers) -> float:
        seen.append(levers)
        return 3.0 if levers.compiled else 2.0 if levers.linear_cross_entropy else 1.0

    levers = Levers(linear_cross_entropy=True, compiled=True)
    run = trained(tmp_path, Hook("hook"), levers=levers, kind=Clock(monkeypatch).objective(seconds))
    seen.clear()
    timings, failures = step_timings(run.trainer, run.controller.active())
    assert failures == {}
    assert {name: t.speedup for name, t in timings.items()} == {"hook": 1.0, "loss": 0.5, COMPILE: pytest.approx(2 / 3)}
    assert [levers for levers in seen if levers.compiled] == [levers] * (ROUNDS + 1)
    seen.clear()
    assert validation_shares(run.trainer, run.controller.active()).keys() == {"hook", "loss"}
    assert seen and not any(levers.compiled for levers in seen)
    assert run.trainer.objective.levers == levers


class NeedsIt(Objective):
    """Runs out of memory where all logits are held."""

    def forward(self, rows: Tensor) -> TokenLoss:
        if self.training and not self.levers.linear_cross_entropy:
            raise torch.OutOfMemoryError("out of\nmemory")
        return super().forward(rows)


def test_what_cannot_run_without_it_is_not_measured(tmp_path: Path) -> None:
    levers = Levers(torch.bfloat16, linear_cross_entropy=True)
    run = trained(tmp_path, Hook("hook"), levers=levers, kind=NeedsIt)
    assert [(e["event"], e["facts"]) for e in run.records("event") if e["event"] == "unmeasured"] == [
        ("unmeasured", {"component": "loss", "reason": "out of memory"})
    ]
    timings, failures = step_timings(run.trainer, run.controller.active())
    assert timings.keys() == {"hook", "precision"} and failures == {"loss": "out of memory"}
    assert run.trainer.objective.levers == levers
    assert all(p.grad is None for p in run.trainer.objective.parameters())


# --- switches ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LEVER_NAMES)
def test_levers(name: str) -> None:
    objective = Objective(llama(), Levers(torch.bfloat16, linear_cross_entropy=True, compiled=True, operators=True))
    before = objective.levers
    # Fused operators end where the head begins: they go off with the loss from hidden states.
    along = {"loss": ["operators"]}.get(name, [])
    others = [LeverSwitch(objective, other) for other in LEVER_NAMES if other not in (name, *along)]
    lever = LeverSwitch(objective, name)

    def measure() -> None:
        with lever.without():
            assert not lever.on and all(other.on for other in others)
            raise MemoryError

    with pytest.raises(MemoryError):
        measure()
    assert lever.on and objective.levers == before
    lever.off()
    with lever.without():
        assert not lever.on
    assert not lever.on and all(other.on for other in others)


def test_a_lever_that_there_is_not() -> None:
    with pytest.raises(UsageError, match="no lever 'optimizer', expected one of precision, loss, compile"):
        LeverSwitch(Objective(llama(), Levers()), "optimizer")


def test_a_component_is_restored_when_measuring_fails() -> None:
    hook = Hook("hook")
    hook.activate()
    own, switch = hook.own.detach().clone(), ComponentSwitch(hook, [hook.own])

    def measure() -> None:
        with switch.without():
            assert not switch.on
            hook.own.data.fill_(math.nan)
            raise MemoryError

    with pytest.raises(MemoryError):
        measure()
    assert switch.on and torch.equal(hook.own, own) and hook.activations == 1
