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
from ryzen_compile.train.progress import NEVER, Progress
from ryzen_compile.train.retention import Figures
from ryzen_compile.train.run_state import (
    component_states,
    model_tensors,
    optimizer_tensors,
    own_parameters,
    parameter_names,
    parts_of,
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
    """How a run ended: ``stopped`` is "finished" or "early". Losses are in nats per token, ``train_loss`` that of the
    last step; the ``validation`` scores are of the whole validation text, in float32."""

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
        depths: Callable[[], Figures] | None = None,
    ) -> None:
        self.config, self.mode, self.rows, self.plan = config, mode, rows, plan
        self.objective, self.controller, self.progress = objective, controller, Progress()
        self._accelerator, self._collector, self._watcher, self._samples = accelerator, collector, watcher, samples
        self._depths = depths
        self._checkpoints, self._saved = checkpoints, NEVER
        self._module, *prepared = accelerator.prepare(objective, *optimizers)
        self._optimizers: list[Any] = prepared
        self._raw = [getattr(optimizer, "optimizer", optimizer) for optimizer in prepared]
        for group in self._groups():
            group["peak"] = group["lr"]
        # Behind prepare: FSDP2 puts other parameters in the place of the model's.
        self._names = parameter_names(objective.model, controller.own_parameters())
        self._extra = own_parameters(self._names, controller.own_parameters())

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    # --- the run ------------------------------------------------------------------------------------------------------
    def fit(self, snapshot: Snapshot | None = None) -> TrainingResult:
        """Runs to the end, or until validation says so, and returns how it ended; goes on from ``snapshot`` if there is
        one. The model is left with its components attached; one that was stopped early with its best weights.

        Ctrl-C and SIGTERM end the step that runs, write a checkpoint and then raise. Raises ``NumericalError`` when
        gradients stay infinite with nothing left to turn off, ``ConfigError`` for a run that was started under other
        settings, ``ModelError`` for a snapshot of another model.
        """
        if snapshot is not None:
            self._resume(snapshot)
        with Interruption() as interruption:
            while self.step < self.plan.steps and not self.progress.stopped_early:
                self.advance()
                self._after_step()
                if self._any(interruption.asked is not None):
                    if self._saved != self.step:
                        self.save()
                    interruption.raise_it()
        if self._saved != self.step:
            self.save()
        if self.progress.stopped_early:
            self._take_best()
        progress = self.progress
        return TrainingResult(
            self.step,
            self.step * self.plan.tokens_per_step,
            progress.loss,
            self.validate(exact=True),
            progress.speed,
            progress.seconds,
            "early" if progress.stopped_early else "finished",
        )

    def advance(self) -> BatchMetrics:
        """One step, without what may be due behind it."""
        self.controller.before_step(self.step, self.plan.steps)
        metrics = self._train_step()
        self.progress.step += 1
        self.progress.loss = metrics.loss
        self._record(metrics)
        self.controller.after_step(self, metrics)
        return metrics

    def wait_for_everyone(self) -> None:
        """Until all processes are here."""
        self._accelerator.wait_for_everyone()

    def _after_step(self) -> None:
        """Whatever is due; a checkpoint last, for it has to hold what the others decided."""
        last = self.step == self.plan.steps
        save = _due(self.step, self.config.checkpoint.every)
        if last or _due(self.step, self.config.validation.every):
            save |= self._validated(self.validate())
        if last or _due(self.step, self.plan.epoch):
            self.controller.end_epoch(self, self.step)
        if save:
            self.save()

    def _train_step(self) -> BatchMetrics:
        started = time.perf_counter()
        rows = self.next_rows()
        share = rate(self.step, self.plan.steps, self.config.schedule)
        for group in self._groups():
            group["lr"] = group["peak"] * share
        sums = self.forward_backward(rows)
        norm = self._clip()
        if math.isfinite(norm):
            self.progress.refused = 0
            for optimizer in self._optimizers:
                optimizer.step()
        else:
            self._refuse(norm)
        self.zero_grad()
        text, correct, _ = (sums / len(rows)).tolist()
        seconds = time.perf_counter() - started
        tokens = self.plan.tokens_per_step
        self.progress.seconds += seconds
        self.progress.speeds.append(tokens / seconds)
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
        progress = self.progress
        progress.refused += 1
        self._event("step_refused", step=self.step + 1, gradient_norm=norm, in_a_row=progress.refused)
        if progress.refused < REFUSED_STEPS:
            return
        if not self.controller.fall_back(self.step + 1, f"gradients were {norm} in {progress.refused} steps in a row"):
            saved = self._checkpoints.steps()
            raise NumericalError(
                f"the gradients' norm is {norm} in {progress.refused} steps in a row, up to step {self.step + 1}",
                hint=(f"the last checkpoint is of step {saved[-1]}; " if saved else "")
                + "try a lower optimization.lr or precision.dtype=fp32",
            )
        progress.refused = 0

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

    def _validated(self, scores: Scores) -> bool:
        """Takes note; whether a run that is stopped early would have to end with the model as it is."""
        if self._collector is not None:
            depths = {} if self._depths is None else self._depths()
            self._hear(self._collector.validation(self.step, scores.loss, scores.accuracy, depths))
        self._tell(f"step {self.step}: validation loss {scores.loss:.4f}, accuracy {scores.accuracy:.1%}")
        if self._samples is not None:
            self._samples(self.step)
        self.controller.validated(self.step, *scores)
        stopping = self.config.early_stopping
        least = 0.0 if stopping is None else stopping.least
        gained = self.progress.validated(scores.loss, least, self.controller.revision)
        if stopping is None:
            return False
        if not gained and self.progress.poor >= stopping.patience:
            self.progress.stopped_early = True
            self._event(
                "early_stop",
                step=self.step,
                validations_without_gain=self.progress.poor,
                lowest=self.progress.lowest,
            )
        return gained

    def _take_best(self) -> None:
        """The weights with the lowest validation loss since the model was changed last, if they are not these."""
        best = self._checkpoints.best()
        if best is None:
            return
        snapshot = self._checkpoints.load(best)
        if snapshot.state["progress"]["revision"] == self.progress.revision and snapshot.step != self.step:
            restore_model(self.objective.model, self._extra, snapshot.model)
            components = parts_of(snapshot.optimizer)["component"]
            restore_components(self.controller.components, components, snapshot.state["components"])
            self._event("best_taken", step=self.step, from_step=snapshot.step)

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
                "text": self.rows.digest,
                "optimizer": plain,
                "components": components,
                "controller": self.controller.state(),
                "collector": None if self._collector is None else self._collector.state(),
                "progress": self.progress.state(),
            },
        )
        if self._accelerator.is_main_process:
            self._checkpoints.save(snapshot, metric=self.progress.metric(self.controller.revision))
        self.wait_for_everyone()
        self._saved = self.step

    def _resume(self, snapshot: Snapshot) -> None:
        state = snapshot.state
        refuse_other_run(snapshot, self.config, self.mode, self.plan, self.rows)
        restore_model(self.objective.model, self._extra, snapshot.model)
        parts = parts_of(snapshot.optimizer)
        restore_optimizers(self._raw, self._names, parts["optimizer"], state["optimizer"])
        restore_components(self.controller.components, parts["component"], state["components"])
        self.controller.restore(state["controller"])
        if self._collector is not None and state["collector"] is not None:
            self._collector.restore(state["collector"])
        self.progress = Progress.restored(state["progress"])
        self._saved = snapshot.step
        restore_random_state(snapshot.optimizer)  # last: preparing may have drawn
        self._tell(f"going on behind step {self.step} of {self.plan.steps}")

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
        # All of the module's, in its own order: by that accelerate knows a sharded model.
        return float(gathered(self._accelerator.clip_grad_norm_(list(self._module.parameters()), limit)))

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

    def _any(self, mine: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self._mean(torch.tensor([float(mine)]))[0] > 0)

    def _mean(self, values: Tensor) -> Tensor:
        """Over processes."""
        if self._accelerator.num_processes == 1:
            return values
        mean: Tensor = self._accelerator.reduce(values.to(self._accelerator.device), "mean").cpu()
        return mean


def refuse_other_run(snapshot: Snapshot, config: TrainConfig, mode: Mode, plan: Plan, rows: Rows) -> None:
    """Raises ``ConfigError``, listing what is different, unless ``snapshot`` is of the run that the others describe."""
    state = snapshot.state
    changes = changed_settings(state["config"], config)
    if state["mode"] != mode:
        changes.append(f"the mode was {state['mode']}, now {mode}")
    if state["processes"] != plan.processes:
        changes.append(f"it ran in {state['processes']} process(es), now in {plan.processes}")
    if state["text"] != rows.digest:
        changes.append("the text, or the tokenizer, is another one")
    if changes:
        raise ConfigError(
            f"the run cannot go on under other settings: {'; '.join(changes[:5])}",
            hint="set them back, or start a run of its own with another output",
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)
