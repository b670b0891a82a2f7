"""The training loop: steps, validations, checkpoints, and what is told of them.

It decides nothing about the model. What is minimised is the ``Objective``, what else is trained or switched is the
``OptimizationController``'s, where devices and processes are concerned Accelerate knows. A step depends on the weights,
the optimizers, the generators' states and its number alone, so a run that was killed goes on from a checkpoint as if it
had never stopped: bit for bit on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ryzen_compile.errors import ConfigError, NumericalError
from ryzen_compile.train.checkpoint import Checkpoints, Snapshot
from ryzen_compile.train.config import Mode, TrainConfig, changed_settings
from ryzen_compile.train.controller import OptimizationController
from ryzen_compile.train.distributed import gathered
from ryzen_compile.train.interruption import Interruption
from ryzen_compile.train.metrics import BatchMetrics, MetricsCollector
from ryzen_compile.train.objective import Objective
from ryzen_compile.train.plan import Plan, Rows
from ryzen_compile.train.run_state import (
    component_states,
    model_tensors,
    optimizer_tensors,
    parameter_names,
    random_state,
    restore_components,
    restore_model,
    restore_optimizers,
    restore_random_state,
)
from ryzen_compile.train.schedule import rate

T = TypeVar("T")
REFUSED_STEPS = 3  # in a row whose gradients are not finite, before the run is given up


class Scores(NamedTuple):
    """``loss``: nats per token of the text; ``accuracy``: share of tokens whose first guess was right; ``agreement``:
    share for which the teacher's guess was the same, 0 without one."""

    loss: float
    accuracy: float
    agreement: float


class Watcher(Protocol):
    """Whoever looks on while a run goes."""

    def batch(self, metrics: BatchMetrics, steps: int) -> None: ...

    def event(self, text: str) -> None: ...


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended: ``stopped`` is "finished" or "early". Losses are in nats per token; the ``validation`` scores
    are of the whole validation text, in float32."""

    steps: int
    tokens: int
    train_loss: float
    validation: Scores
    tokens_per_second: float
    seconds: float
    stopped: str


class Trainer:
    """One run. ``accelerator`` has prepared nothing yet; ``optimizers`` hold the objective's parameters."""

    def __init__(
        self,
        config: TrainConfig,
        mode: Mode,
        objective: Objective,
        optimizers: Sequence[torch.optim.Optimizer],
        controller: OptimizationController,
        rows: Rows,
        plan: Plan,
        checkpoints: Checkpoints,
        *,
        accelerator: Any,
        collector: MetricsCollector | None,
        watcher: Watcher | None = None,
        samples: Callable[[int], None] | None = None,
    ) -> None:
        self.config, self.mode, self.rows, self.plan = config, mode, rows, plan
        self.objective, self.controller = objective, controller
        self.step, self.seconds, self.refused = 0, 0.0, 0
        self.lowest, self.poor = math.inf, 0  # validation loss, and validations in turn that were no better
        self.last_validation: float | None = None
        self.validated_at = self._saved = -1  # steps
        self._accelerator, self._collector, self._watcher, self._samples = accelerator, collector, watcher, samples
        names = parameter_names(objective.model, controller.own_parameters())
        self._extra = {
            name: parameter
            for component, own in controller.own_parameters()
            for parameter in own
            if (name := names[id(parameter)]).startswith(f"{component}.")
        }
        self._names = names
        self._module, *prepared = accelerator.prepare(objective, *optimizers)
        self._optimizers: list[Any] = prepared
        self._raw = [getattr(optimizer, "optimizer", optimizer) for optimizer in prepared]
        for group in self._groups():
            group["peak"] = group["lr"]
        self._parameters = [p for group in self._groups() for p in group["params"]]
        self._checkpoints = checkpoints
        self._tokens_per_second: list[float] = []

    # --- the run ------------------------------------------------------------------------------------------------------
    def fit(self, snapshot: Snapshot | None = None) -> TrainingResult:
        """Runs to the end, or until validation says so, and returns how it ended; goes on from ``snapshot`` if there is
        one. The model is left with its components attached.

        Ctrl-C and SIGTERM end the step that runs, write a checkpoint and then raise. Raises ``NumericalError`` when
        gradients stay infinite with nothing left to turn off, ``ConfigError`` for a run that was started under other
        settings, ``ModelError`` for a snapshot of another model.
        """
        if snapshot is not None:
            self._resume(snapshot)
        stopped, loss = "finished", math.nan
        with Interruption() as interruption:
            while self.step < self.plan.steps and stopped == "finished":
                loss = self.advance().loss
                stopped = self._after_step()
                if interruption.asked:
                    self.save()
                    interruption.raise_it()
        if self._saved != self.step:
            self.save()
        return TrainingResult(
            self.step,
            self.step * self.plan.tokens_per_step,
            loss,
            self.validate(exact=True),
            _median(self._tokens_per_second),
            self.seconds,
            stopped,
        )

    def advance(self) -> BatchMetrics:
        """One step, without what may be due behind it."""
        self.controller.before_step(self.step, self.plan.steps)
        metrics = self._train_step()
        self.step += 1
        self._record(metrics)
        self.controller.after_step(self, metrics)
        return metrics

    def wait_for_everyone(self) -> None:
        """Until all processes are here."""
        self._accelerator.wait_for_everyone()

    def _after_step(self) -> str:
        """Whatever is due; "early" when validation says that it is enough."""
        last = self.step == self.plan.steps
        stopped = "finished"
        if _due(self.step, self.config.validation.every) and not last:
            stopped = self._validated(self.validate())
        if _due(self.step, self.plan.epoch) or last:
            if last or self.last_validation is None:
                self._validated(self.validate())
            self.controller.end_epoch(self, self.step)
        if _due(self.step, self.config.checkpoint.every):
            self.save()
        return stopped

    def _train_step(self) -> BatchMetrics:
        started = time.perf_counter()
        rows = self.next_rows()
        share = rate(self.step, self.plan.steps, self.config.schedule)
        for group in self._groups():
            group["lr"] = group["peak"] * share
        sums = self.forward_backward(rows)
        norm = self._clip()
        if math.isfinite(norm):
            self.refused = 0
            for optimizer in self._optimizers:
                optimizer.step()
        else:
            self._refuse(norm)
        self.zero_grad()
        text, correct, _ = (sums / len(rows)).tolist()
        seconds = time.perf_counter() - started
        self.seconds += seconds
        tokens = self.plan.tokens_per_step
        self._tokens_per_second.append(tokens / seconds)
        done = self.step + 1
        return BatchMetrics(
            step=done,
            epoch=self.plan.order.epoch(done * self.plan.rows_per_step),
            tokens=done * tokens,
            loss=text,
            accuracy=correct / (self.plan.batch * self.plan.length),
            learning_rate=self.config.optimization.lr * share,
            gradient_norm=norm,
            tokens_per_second=tokens / seconds,
            batch_seconds=seconds,
            memory_bytes=_memory(self._accelerator.device),
        )

    def next_rows(self) -> Tensor:
        """(accumulate, batch) int64: what this process reads in the step that follows."""
        return self.plan.rows_of(self.step, self._accelerator.process_index)

    def forward_backward(self, rows: Tensor) -> Tensor:
        """Adds the gradients of ``rows`` (accumulate, batch), numbers of training rows, to the parameters; returns
        (3,): nats per token, right guesses and agreements, summed over batches and averaged over processes."""
        sums = torch.zeros(3, dtype=torch.float64)
        for index, batch in enumerate(rows):
            ids = self.rows.train[batch].long().to(self._accelerator.device)
            last = index == len(rows) - 1
            with nullcontext() if last else self._accelerator.no_sync(self._module):
                scores = self._module(ids)
                self._accelerator.backward(scores.loss / len(rows))
            sums += torch.stack([scores.text.double(), scores.correct.double(), scores.agreed.double()]).cpu()
        return self._mean(sums)

    def _refuse(self, norm: float) -> None:
        """A step whose gradients are not finite is not taken; after some in a row, whatever may cause it goes off."""
        self.refused += 1
        self._event("step_refused", step=self.step + 1, gradient_norm=norm, in_a_row=self.refused)
        if self.refused < REFUSED_STEPS:
            return
        if not self.controller.fall_back(self.step + 1, f"gradients were {norm} in {self.refused} steps in a row"):
            saved = self._checkpoints.steps()
            raise NumericalError(
                f"the gradients' norm is {norm} in {self.refused} steps in a row, up to step {self.step + 1}",
                hint=(f"the last checkpoint is of step {saved[-1]}; " if saved else "")
                + "try a lower optimization.lr or precision.dtype=fp32",
            )
        self.refused = 0

    # --- validation ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def validate(self, *, exact: bool = False, limit_rows: int | None = None) -> Scores:
        """The model as it is now, components and all, on the validation text: the first ``validation_tokens`` of it in
        the run's precision, or, ``exact``, all of it in float32; ``limit_rows`` of these."""
        rows, levers = self.rows.validation, self.objective.levers
        limit = self.config.data.validation_tokens
        if limit is not None and not exact:
            rows = rows[: max(1, limit // self.plan.length)]
        rows = rows[:limit_rows]
        if exact:
            self.objective.levers = self.objective.exact_levers
        training = self.objective.training
        self._module.eval()
        try:
            return self._score(rows)
        finally:
            self._module.train(training)
            self.objective.levers = levers

    def _score(self, rows: Tensor) -> Scores:
        sums, counted = torch.zeros(3, dtype=torch.float64), 0
        processes, mine = self._accelerator.num_processes, self._accelerator.process_index
        # All processes run equally many passes, or those that are through would be waited for: one without rows left
        # runs others', which count nothing.
        passes = -(-len(rows) // (processes * self.plan.batch))
        for index in range(passes):
            batch = rows[mine::processes][index * self.plan.batch : (index + 1) * self.plan.batch]
            tokens = len(batch) * self.plan.length
            scores = self._module((batch if tokens else rows[:1]).long().to(self._accelerator.device))
            if not tokens:
                continue
            found = torch.stack([scores.text.double() * tokens, scores.correct.double(), scores.agreed.double()])
            sums, counted = sums + found.cpu(), counted + tokens
        total = self._mean(torch.cat([sums, torch.tensor([float(counted)], dtype=torch.float64)]))
        return Scores(*(total[:3] / total[3]).tolist())

    def _validated(self, scores: Scores) -> str:
        self.last_validation, self.validated_at = scores.loss, self.step
        if self._collector is not None:
            self._hear(self._collector.validation(self.step, scores.loss, scores.accuracy))
        self._tell(f"step {self.step}: validation loss {scores.loss:.4f}, accuracy {scores.accuracy:.1%}")
        if self._samples is not None:
            self._samples(self.step)
        self.controller.validated(self.step, *scores)
        stopping = self.config.early_stopping
        least = 0.0 if stopping is None else stopping.least
        self.poor = 0 if scores.loss < self.lowest - least else self.poor + 1
        self.lowest = min(self.lowest, scores.loss)
        if stopping is None or self.poor < stopping.patience:
            return "finished"
        self._event("early_stop", step=self.step, validations_without_gain=self.poor, lowest=self.lowest)
        return "early"

    # --- checkpoints --------------------------------------------------------------------------------------------------
    def save(self) -> None:
        """Writes a checkpoint of the run as it stands between two steps."""
        tensors, plain = optimizer_tensors(self._raw, self._names)
        own, components = component_states(self.controller.components)
        snapshot = Snapshot(
            step=self.step,
            model=model_tensors(self.objective.model, self._extra),
            optimizer={
                **{f"optimizer/{name}": value for name, value in tensors.items()},
                **{f"component/{name}": value for name, value in own.items()},
                **random_state(),
            },
            state={
                "config": self.config.model_dump(mode="json"),
                "mode": self.mode,
                "processes": self.plan.processes,
                "optimizer": plain,
                "components": components,
                "controller": self.controller.state(),
                "collector": None if self._collector is None else self._collector.state(),
                "seconds": self.seconds,
                "lowest": None if math.isinf(self.lowest) else self.lowest,
                "poor": self.poor,
                "last_validation": self.last_validation,
                "validated_at": self.validated_at,
                "refused": self.refused,
            },
        )
        if self._accelerator.is_main_process:
            # Only weights that were measured can be the best.
            measured = self.validated_at == self.step
            self._checkpoints.save(snapshot, metric=self.last_validation if measured else None)
        self._accelerator.wait_for_everyone()
        self._saved = self.step

    def _resume(self, snapshot: Snapshot) -> None:
        state = snapshot.state
        self._expect_unchanged(state)
        restore_model(self.objective.model, self._extra, snapshot.model)
        parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "component": {}}
        for name, value in snapshot.optimizer.items():
            kind, _, rest = name.partition("/")
            if kind in parts:
                parts[kind][rest] = value
        restore_optimizers(self._raw, self._names, parts["optimizer"], state["optimizer"])
        restore_components(self.controller.components, parts["component"], state["components"])
        self.controller.restore(state["controller"])
        if self._collector is not None and state["collector"] is not None:
            self._collector.restore(state["collector"])
        self.step, self.seconds, self.refused = snapshot.step, state["seconds"], state["refused"]
        self.lowest = math.inf if state["lowest"] is None else state["lowest"]
        self.poor, self.last_validation = state["poor"], state["last_validation"]
        self.validated_at, self._saved = state["validated_at"], snapshot.step
        restore_random_state(snapshot.optimizer)  # last: preparing may have drawn
        self._tell(f"going on behind step {self.step} of {self.plan.steps}")

    def _expect_unchanged(self, state: Any) -> None:
        changes = changed_settings(state["config"], self.config)
        if state["mode"] != self.mode:
            changes.append(f"the mode was {state['mode']}, now {self.mode}")
        if state["processes"] != self.plan.processes:
            changes.append(f"it ran in {state['processes']} process(es), now in {self.plan.processes}")
        if changes:
            raise ConfigError(
                f"the run cannot go on under other settings: {'; '.join(changes[:5])}",
                hint="set them back, or start a run of its own with another output",
            )

    # --- small things -------------------------------------------------------------------------------------------------
    def _record(self, metrics: BatchMetrics) -> None:
        if self._collector is not None:
            self._hear(self._collector.batch(metrics))
        if self._watcher is not None:
            self._watcher.batch(metrics, self.plan.steps)

    def _hear(self, anomalies: Sequence[Any]) -> None:
        for anomaly in anomalies:
            self._tell(f"anomaly: {anomaly.message}")

    def _event(self, kind: str, *, step: int, **facts: Any) -> None:
        if self._collector is not None:
            self._collector.event(step, kind, **facts)
        self._tell(f"step {step}: {kind.replace('_', ' ')}, " + ", ".join(f"{k} {v}" for k, v in facts.items()))

    def _tell(self, text: str) -> None:
        if self._watcher is not None:
            self._watcher.event(text)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._raw for group in optimizer.param_groups]

    def _clip(self) -> float:
        limit = self.config.optimization.clip or math.inf
        return float(gathered(self._accelerator.clip_grad_norm_(self._parameters, limit)))

    def zero_grad(self) -> None:
        """No parameter has a gradient."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def of_main(self, value: T) -> T:
        """The main process's ``value``, on all of them."""
        if self._accelerator.num_processes == 1:
            return value
        from accelerate.utils import broadcast_object_list

        found: list[T] = broadcast_object_list([value])
        return found[0]

    def _mean(self, values: Tensor) -> Tensor:
        """Over processes."""
        if self._accelerator.num_processes == 1:
            return values
        mean: Tensor = self._accelerator.reduce(values.to(self._accelerator.device), "mean").cpu()
        return mean


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median()) if values else math.nan


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)
