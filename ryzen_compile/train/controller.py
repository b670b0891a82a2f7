"""Who turns components and levers on and off while a run goes, and changes their parameters.

Decisions follow from losses, which are averages over all processes, and are part of a checkpoint: a run that is resumed
decides what it would have decided. Only a lever that slows a run down is judged by a clock, the main process's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ryzen_compile.errors import ConfigError
from ryzen_compile.train.ablation import Measurable, Timing, step_timings, validation_shares
from ryzen_compile.train.component import Component, ComponentFacts
from ryzen_compile.train.config import ControllerSettings
from ryzen_compile.train.distill import DistillComponent
from ryzen_compile.train.metrics import BatchMetrics, EpochMetrics, MetricsCollector
from ryzen_compile.train.objective import Objective
from ryzen_compile.train.run_state import random_state, restore_random_state
from ryzen_compile.train.switches import LEVER_NAMES, ComponentSwitch, LeverSwitch, Switch

WARM_STEPS = 16  # after which levers are looked at for the first time
IN_A_ROW = 2  # validations above the limit, before a component is blamed


@dataclass
class LossWatch:
    """Whether validation losses are still what they have been: at most ``rise`` nats above the lowest one.

    After a change the next validation is let pass.
    """

    rise: float
    lowest: float = math.inf
    above: int = 0
    grace: bool = False

    @property
    def limit(self) -> float:
        return self.lowest + self.rise

    def changed(self) -> None:
        """Something was turned on, or undone."""
        self.above, self.grace = 0, True

    def complaint(self, loss: float) -> str:
        """What is wrong with the next validation ``loss``; empty if nothing is, or not for long enough."""
        if not math.isfinite(loss):
            return "the validation loss is not finite"
        excused, self.grace = self.grace, False
        self.above = self.above + 1 if loss > self.limit and not excused else 0
        self.lowest = min(self.lowest, loss)
        return "the validation loss rose" if self.above >= IN_A_ROW else ""


@dataclass(frozen=True)
class Change:
    """``kind`` "activate" or "tighten", of a ``component``, when the validation ``loss`` of the epoch was this."""

    kind: str
    component: str
    loss: float | None = None


@dataclass
class Sums:
    """Of the steps of an epoch; losses of ``finite`` steps only."""

    steps: int = 0
    finite: int = 0
    loss: float = 0.0
    seconds: float = 0.0

    def add(self, metrics: BatchMetrics) -> None:
        self.steps += 1
        self.seconds += metrics.batch_seconds
        if math.isfinite(metrics.loss):
            self.finite += 1
            self.loss += metrics.loss


@dataclass
class Validated:
    """The last validation; ``fresh`` if it was in this epoch."""

    loss: float | None = None
    accuracy: float | None = None
    fresh: bool = False


@dataclass
class _Memory:
    """What later decisions and records depend on, all of it JSON but for the dataclasses."""

    epochs: int = 0
    given_up: dict[str, str] = field(default_factory=dict)  # components and levers, and why
    held: list[str] = field(default_factory=list)  # components that stay in the stage they went back to
    changes: list[Change] = field(default_factory=list)  # not undone, the latest last
    revision: int = 0  # changes made and undone: losses of different ones are not comparable
    losses: list[float] = field(default_factory=list)  # of the epochs since the last change, two at most
    sums: Sums = field(default_factory=Sums)
    validated: Validated = field(default_factory=Validated)


class OptimizationController:
    """``components`` in their order, on ``model``, which is that of ``objective`` with its levers.

    Events go to ``collector`` (of the main process) and to ``say``. ``measure_export`` gives ``ttft_seconds`` and
    ``decode_tokens_per_second`` of the model as it would be exported, at each epoch's end; what it raises is an event.
    Raises ``ConfigError`` for two components of one name, and what their ``prepare`` raises.
    """

    def __init__(
        self,
        components: Sequence[Component],
        settings: ControllerSettings,
        model: nn.Module,
        objective: Objective,
        collector: MetricsCollector | None,
        say: Callable[[str], None],
        *,
        measure_export: Callable[[nn.Module], Mapping[str, float]] | None = None,
    ) -> None:
        self.components, self.settings = tuple(components), settings
        self._objective, self._collector, self._say = objective, collector, say
        self._measure_export = measure_export
        self._switches = [ComponentSwitch(component, component.prepare(model)) for component in self.components]
        self._levers = [LeverSwitch(objective, name) for name in LEVER_NAMES]
        self._by_name = {component.name: component for component in self.components}
        if len(self._by_name) < len(self.components):
            raise ConfigError(f"components {[c.name for c in self.components]}: expected each once")
        self._watch = LossWatch(settings.loss_rise)
        self._memory = _Memory()

    @property
    def revision(self) -> int:
        """Counts the changes to what the model computes."""
        return self._memory.revision

    def own_parameters(self) -> list[tuple[str, tuple[nn.Parameter, ...]]]:
        """By component, what is trained beside the model's parameters."""
        return [(switch.name, switch.own) for switch in self._switches]

    def active(self) -> list[Switch]:
        """Components and levers that are on."""
        switches: list[Switch] = [*self._switches, *self._levers]
        return [switch for switch in switches if switch.on]

    # --- what the loop tells ------------------------------------------------------------------------------------------
    def before_step(self, step: int, steps: int) -> None:
        """``step`` of ``steps`` are done, the next one follows: what is due is turned on."""
        progress = step / steps
        for component in self.components:
            due = progress >= component.start and component.name not in self._memory.given_up
            if due and not component.active:
                component.activate()
                self._changed(Change("activate", component.name))
                # Belongs to the step that follows: a run resumed at ``step`` gets here again.
                self._event(step + 1, "activate", component=component.name, start=component.start)
            component.advance(progress)

    def after_step(self, trainer: Measurable, metrics: BatchMetrics) -> None:
        """A step was done."""
        self._memory.sums.add(metrics)
        if self.settings.enabled and trainer.step == WARM_STEPS < trainer.plan.epoch:
            self._drop_slow_levers(trainer, self._timed(trainer, self._levers))

    def validated(self, step: int, loss: float, accuracy: float, agreement: float) -> None:
        """A validation after ``step``: what broke the loss is undone."""
        self._memory.validated = Validated(loss, accuracy, fresh=True)
        if not self.settings.enabled:
            return
        self._adapt_drafts(step, agreement)
        limit = self._watch.limit
        if complaint := self._watch.complaint(loss):
            self._undo(step, complaint, value=loss, expected=limit)

    def fall_back(self, step: int, reason: str) -> bool:
        """Undoes the last change to a component; False where there is nothing left to undo."""
        return self.settings.enabled and self._undo(step, reason, value=None, expected=None)

    def end_epoch(self, trainer: Measurable, step: int) -> None:
        """Measures, records and adapts."""
        memory = self._memory
        memory.epochs += 1
        facts = {c.name: c.facts() for c in self.components if c.active}
        timings: dict[str, Timing] = {}
        quality: dict[str, float] = {}
        first = memory.epochs == 1
        measured = self.active() if self.settings.ablate else [lever for lever in self._levers if first and lever.on]
        if self.settings.enabled and measured:
            timings = self._timed(trainer, measured)
            quality = validation_shares(trainer, measured) if self.settings.ablate else {}
        speedups = {name: timing.speedup for name, timing in timings.items()}
        self._record(trainer, step, facts, speedups, quality)
        if self.settings.enabled and first:
            self._drop_slow_levers(trainer, timings)
        if self.settings.enabled and self.settings.adapt and memory.validated.fresh:
            self._adapt(trainer, step, facts)
        memory.sums, memory.validated.fresh = Sums(), False

    def state(self) -> dict[str, Any]:
        """JSON: all that later decisions depend on."""
        watch = self._watch
        lowest = watch.lowest if math.isfinite(watch.lowest) else None
        found = asdict(self._memory)
        found["validated"] |= {key: _finite(found["validated"][key]) for key in ("loss", "accuracy")}
        return {**found, "watch": {"lowest": lowest, "above": watch.above, "grace": watch.grace}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over a ``state``, after the components were restored."""
        values = copy.deepcopy(dict(state))
        watch = values.pop("watch")
        lowest = math.inf if watch["lowest"] is None else watch["lowest"]
        self._watch = LossWatch(self.settings.loss_rise, lowest, watch["above"], watch["grace"])
        values["changes"] = [Change(**change) for change in values["changes"]]
        values["sums"], values["validated"] = Sums(**values["sums"]), Validated(**values["validated"])
        self._memory = _Memory(**values)
        for lever in self._levers:
            if lever.name in self._memory.given_up:
                lever.off()

    # --- undoing ------------------------------------------------------------------------------------------------------
    def _changed(self, change: Change) -> None:
        self._memory.changes.append(change)
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Losses before a change do not tell whether it has settled."""
        self._memory.revision += 1
        self._memory.losses.clear()
        self._watch.changed()

    def _undo(self, step: int, reason: str, *, value: float | None, expected: float | None) -> bool:
        """Of the last change: a narrower stage is left, and not entered again; a component is turned off."""
        while self._memory.changes:
            change = self._memory.changes.pop()
            component = self._by_name[change.component]
            facts: dict[str, Any] = {"component": change.component, "reason": reason}
            facts |= {"value": value, "expected": expected}
            if not component.active or (change.kind == "activate" and not component.optional):
                continue
            if change.kind == "activate":
                component.deactivate()
                self._memory.given_up[change.component] = reason
                self._event(step, "fallback", **facts)
            elif component.relax():
                self._memory.held.append(change.component)
                self._event(step, "relax", **facts, settings=dict(component.facts().settings))
            else:
                continue
            self._begin_anew()
            return True
        return False

    def _timed(self, trainer: Measurable, switches: Sequence[Switch]) -> dict[str, Timing]:
        timings, failures = step_timings(trainer, switches)
        for name, reason in failures.items():
            self._event(trainer.step, "unmeasured", component=name, reason=reason)
        return timings

    def _drop_slow_levers(self, trainer: Measurable, timings: Mapping[str, Timing]) -> None:
        """Those that slow the run down, seen twice: one measurement may have met a busy machine."""
        suspects = [
            lever for lever in self._levers if lever.name in timings and self._is_slow(trainer, timings[lever.name])
        ]
        again = self._timed(trainer, self._levers) if suspects else {}
        for lever in suspects:
            timing = again.get(lever.name)
            if timing is not None and self._is_slow(trainer, timing):
                reason = "a step takes longer with it than without"
                lever.off()
                self._memory.given_up[lever.name] = reason
                facts = {"reason": reason, "value": timing.slowdown, "expected": self.settings.slowdown}
                self._event(trainer.step, "fallback", component=lever.name, **facts)

    def _is_slow(self, trainer: Measurable, timing: Timing) -> bool:
        batches = (trainer.plan.steps - trainer.step) * trainer.plan.accumulate
        gain = (timing.seconds - timing.without) * batches
        return timing.slowdown > self.settings.slowdown and gain > self.settings.worth

    # --- adapting -----------------------------------------------------------------------------------------------------
    def _adapt_drafts(self, step: int, agreement: float) -> None:
        for component in self.components:
            if self.settings.adapt and component.active and isinstance(component, DistillComponent):
                before = component.draft_length()
                component.observe(agreement)
                if (length := component.draft_length()) != before:
                    facts = {"agreement": agreement, "draft_length": length, "before": before}
                    self._event(step, "adapt", component=component.name, **facts)

    def _adapt(self, trainer: Measurable, step: int, facts: Mapping[str, ComponentFacts]) -> None:
        """One change at most: back from a stage that cost too much, or on to the next where the loss has settled."""
        memory, loss = self._memory, self._memory.validated.loss
        if loss is None or not math.isfinite(loss):
            return
        last = memory.changes[-1] if memory.changes else None
        if last is not None and last.kind == "tighten" and last.loss is not None:
            limit = last.loss + self.settings.loss_rise
            if loss > limit:
                self._undo(step, "the validation loss rose since its last stage", value=loss, expected=limit)
                return
        memory.losses = [*memory.losses[-1:], loss]
        # A stage that an epoch does not follow would not be trained for.
        if trainer.plan.steps - step >= trainer.plan.epoch and len(memory.losses) == 2:
            before = memory.losses[0]
            if abs(loss - before) < self.settings.settled:
                self._tighten(step, loss, before, facts)

    def _tighten(self, step: int, loss: float, before: float, facts: Mapping[str, ComponentFacts]) -> None:
        for component in self.components:
            name = component.name
            if component.active and name not in self._memory.held and component.tighten():
                self._changed(Change("tighten", name, loss))
                settings = {"settings": dict(component.facts().settings)}
                if name in facts:
                    settings["settings_before"] = dict(facts[name].settings)
                self._event(step, "tighten", component=name, loss=loss, loss_before=before, **settings)
                return

    # --- recording ----------------------------------------------------------------------------------------------------
    def _record(
        self,
        trainer: Measurable,
        step: int,
        facts: Mapping[str, ComponentFacts],
        speedups: Mapping[str, float],
        quality: Mapping[str, float],
    ) -> None:
        """Where components overlap, the whole model's ratio is at least that of the one that saves most."""
        exported = self._exported(step)
        sums, validated = self._memory.sums, self._memory.validated
        if self._collector is None:
            return
        metrics = EpochMetrics(
            epoch=self._memory.epochs,
            step=step,
            train_loss=sums.loss / sums.finite if sums.finite else math.nan,
            validation_loss=validated.loss if validated.fresh else None,
            validation_accuracy=validated.accuracy if validated.fresh else None,
            tokens_per_second=sums.steps * trainer.plan.tokens_per_step / sums.seconds if sums.seconds else 0.0,
            seconds=sums.seconds,
            compression_ratio=max((fact.ratio for fact in facts.values()), default=None),
            reconstruction_error=max((fact.error for fact in facts.values()), default=None),
            ttft_seconds=exported.get("ttft_seconds"),
            decode_tokens_per_second=exported.get("decode_tokens_per_second"),
            speedups=speedups,
            quality=quality,
            active=tuple(switch.name for switch in self.active()),
            settings={name: dict(fact.settings) for name, fact in facts.items()},
        )
        self._collector.epoch(metrics)

    def _exported(self, step: int) -> Mapping[str, float]:
        if self._measure_export is None:
            return {}
        drawn, training = random_state(), self._objective.training
        try:
            return self._measure_export(self._objective.model)
        except Exception as error:  # noqa: BLE001 - whatever an export raises, the run is worth more
            self._event(step, "export_failed", reason=" ".join(str(error).split())[:500] or type(error).__name__)
            return {}
        finally:
            self._objective.train(training)
            restore_random_state(drawn)

    def _event(self, step: int, kind: str, **facts: Any) -> None:
        if self._collector is not None:
            self._collector.event(step, kind, **facts)
        told = ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)
        self._say(f"step {step}: {kind.replace('_', ' ')}, {told}")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
