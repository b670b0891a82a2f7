"""A real Trainer without files to read: a Llama of two layers, rows of 17 tokens, most of which can be foreseen."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ryzen_compile.train import ablation
from ryzen_compile.train.checkpoint import Checkpoints, Snapshot
from ryzen_compile.train.component import Component, ComponentFacts
from ryzen_compile.train.config import parse_config
from ryzen_compile.train.controller import OptimizationController
from ryzen_compile.train.loop import Trainer, TrainingResult
from ryzen_compile.train.metrics import MetricsCollector
from ryzen_compile.train.objective import Levers, Objective
from ryzen_compile.train.optimizer import hidden_matrices, make_optimizers
from ryzen_compile.train.plan import Rows, make_plan
from ryzen_compile.train.token_loss import TokenLoss

VOCAB, LENGTH = 64, 16
PLAIN = Levers()


def llama(seed: int = 0, **changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=32, **{**sizes, **changes}))


def patterned(rows: int, seed: int) -> Tensor:
    """(rows, LENGTH + 1) int64: the next token is 5 more, wrapped around, in one of eight cases any other."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (rows, 1), generator=g) + 5 * torch.arange(LENGTH + 1)
    noise = torch.rand(ids.shape, generator=g) < 1 / 8
    return torch.where(noise, torch.randint(VOCAB, ids.shape, generator=g), ids) % VOCAB


class Hook:
    """A component that changes the last hidden states (B, T, C) by ``change``; ``stages`` are only counted.

    Its ``own`` parameter is drawn anew by ``activate``, and it counts its forward passes: both have to survive whatever
    is measured.
    """

    def __init__(
        self,
        name: str,
        change: Callable[[Tensor, int], Tensor] = lambda x, stage: x,
        *,
        start: float = 0.0,
        stages: int = 1,
    ) -> None:
        self.name, self.start, self.active, self.optional = name, start, False, True
        self.change, self.stages = change, stages
        self.stage = self.passes = self.activations = 0
        self.progress: list[float] = []
        self.own = nn.Parameter(torch.zeros(32))

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        model.base_model.norm.register_forward_hook(self._forward)
        return [self.own]

    def _forward(self, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        if not self.active:
            return None
        self.passes += 1
        return self.change(out, self.stage) + self.own * (self.passes % 3)

    def activate(self) -> None:
        self.active = True
        self.activations += 1
        with torch.no_grad():
            self.own.copy_(0.01 * torch.randn(32))

    def deactivate(self) -> None:
        self.active = False

    def advance(self, progress: float) -> None:
        self.progress.append(progress)

    def tighten(self) -> bool:
        return self._enter(self.stage + 1)

    def relax(self) -> bool:
        return self._enter(self.stage - 1)

    def _enter(self, stage: int) -> bool:
        if not 0 <= stage < self.stages:
            return False
        self.stage = stage
        return True

    def facts(self) -> ComponentFacts:
        return ComponentFacts(2.0 + self.stage, 0.25, {"stage": self.stage})

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"active": self.active, "stage": self.stage, "passes": self.passes}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.active, self.stage, self.passes = values["active"], values["stage"], values["passes"]

    def detach(self, model: nn.Module) -> None:
        self.active = False

    def recipe_changes(self) -> Mapping[str, Any]:
        return {}


class Clock:
    """In place of the clock that steps are timed by: passes say how many seconds they take, so that a busy machine
    fails no test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(ablation, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def objective(self, seconds: Callable[[Levers], float]) -> type[Objective]:
        """One whose passes take so long."""
        clock = self

        class Timed(Objective):
            def forward(self, rows: Tensor) -> TokenLoss:
                clock.now += seconds(self.levers)
                return super().forward(rows)

        return Timed


def explode(x: Tensor, stage: int) -> Tensor:
    """Predictions that are sure and wrong."""
    return -50 * x.detach()


def spoil_gradients(x: Tensor, stage: int) -> Tensor:
    """The same values; the gradient is infinity times 0."""
    return x + (x * 0).sqrt()


@dataclass
class Run:
    """``directory`` has the run's records and checkpoints."""

    directory: Path
    trainer: Trainer
    controller: OptimizationController
    checkpoints: Checkpoints
    collector: MetricsCollector
    told: list[str]

    def fit(self, snapshot: Snapshot | None = None) -> TrainingResult:
        with closing(self.collector):
            return self.trainer.fit(snapshot)

    def records(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for line in lines if (record := json.loads(line))["kind"] == kind]

    def events(self, *kinds: str) -> list[tuple[int, str, str]]:
        """(step, event, component)."""
        found = [(e["step"], e["event"], e["facts"].get("component", "")) for e in self.records("event")]
        return [event for event in found if not kinds or event[1] in kinds]

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.trainer.objective.named_parameters()}


def make_run(
    directory: Path,
    components: Callable[[Objective], Sequence[Component]],
    *,
    steps: int = 40,
    every: int = 10,
    validate: int = 5,
    save: int = 0,
    settings: Mapping[str, Any] | None = None,
    levers: Levers = PLAIN,
    kind: type[Objective] = Objective,
    model: nn.Module | None = None,
    resume_step: int | None = None,
    **options: Any,
) -> Run:
    """Of 4 rows a step; an epoch of the controller is ``every`` steps."""
    from accelerate import Accelerator

    config = parse_config(
        {
            "output": str(directory),
            "model": {"tokenizer": {"vocab": 300}, "architecture": {"model_type": "llama"}},
            "data": {"train": {"path": "made in memory"}, "length": LENGTH},
            "optimization": {"steps": steps, "batch": 4, "lr": 3e-3},
            "schedule": {"warmup": 2, "kind": "constant"},
            "controller": {"every": every, "ablate": False, **(settings or {})},
            "checkpoint": {"every": save, "keep": 20},
            "validation": {"every": validate},
        }
    )
    rows = Rows(patterned(64, seed=1), patterned(32, seed=2))
    objective = kind(llama() if model is None else model, levers)
    hidden = hidden_matrices(objective.model)
    collector = MetricsCollector(directory, config.metrics, resume_step=resume_step)
    told: list[str] = []
    controller = OptimizationController(
        components(objective), config.controller, objective.model, objective, collector, told.append, **options
    )
    own = [parameter for _, parameters in controller.own_parameters() for parameter in parameters]
    optimizers = make_optimizers(objective.model, hidden, own, config.optimization, fused=False)
    checkpoints = Checkpoints(directory / "checkpoints", keep=20)
    trainer = Trainer(
        config,
        "optimized",
        objective,
        optimizers,
        controller,
        rows,
        make_plan(config, "optimized", rows, 1),
        checkpoints,
        accelerator=Accelerator(cpu=True),
        collector=collector,
    )
    torch.manual_seed(3)
    return Run(directory, trainer, controller, checkpoints, collector, told)
