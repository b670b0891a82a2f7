"""What each component and lever does for a run, measured by leaving it out: a step's seconds, and validation loss.

All else stays as the run has it, with one exception: code is not compiled, on both sides, unless compiling is what is
measured. Each combination would be compiled anew, which takes minutes, and ``torch.compile`` stops after eight of them.

The run itself goes on as if nothing had been measured (``switches.undisturbed``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Protocol, TypeVar

from torch import Tensor

from ryzen_compile.train.plan import Plan
from ryzen_compile.train.switches import COMPILE, Switch, undisturbed

ROUNDS = 3  # in each, every variant is timed once
VALIDATION_BATCHES = 4  # of each process

T = TypeVar("T")


class Measurable(Protocol):
    """What measuring needs of the ``Trainer``."""

    plan: Plan

    @property
    def step(self) -> int: ...
    def next_rows(self) -> Tensor: ...
    def forward_backward(self, rows: Tensor) -> Tensor: ...
    def zero_grad(self) -> None: ...
    def validate(self, *, limit_rows: int | None = None) -> tuple[float, float, float]: ...
    def of_main(self, value: T) -> T: ...


@dataclass(frozen=True)
class Timing:
    """Seconds of a batch's forward and backward pass, medians, with something and ``without`` it.

    ``speedup``: the median of without over with, each pair taken from one round.
    """

    seconds: float
    without: float
    speedup: float

    @property
    def slowdown(self) -> float:
        """How many times as long it takes with it as without."""
        return 1 / self.speedup


def step_timings(trainer: Measurable, switches: Sequence[Switch]) -> tuple[dict[str, Timing], dict[str, str]]:
    """Of every switch that is on; and why for those that could not be measured, which may need more memory.

    Interleaved, so that a machine that slows down meanwhile slows all of them. On several processes these are the
    main process's times.
    """
    switches = [switch for switch in switches if switch.on]
    if not switches:
        return {}, {}
    variants = _variants(switches)
    rows = trainer.next_rows()[:1]
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    failures: dict[str, str] = {}
    with undisturbed(switches):
        for index in range(ROUNDS + 1):
            for name in list(variants)[:: -1 if index % 2 else 1]:
                if name in failures:
                    continue
                try:
                    taken = _seconds(trainer, rows, variants[name])
                except RuntimeError as error:  # out of memory, or an operator that is missing for another type
                    failures[name] = " ".join(str(error).split())[:200]
                    continue
                if index:  # the first round warms up
                    seconds[name].append(taken)
    seconds, failures = trainer.of_main((seconds, failures))
    found: dict[str, Timing] = {}
    unmeasured: dict[str, str] = {}
    for switch in switches:
        pair = (COMPILE, _BASE) if switch.name == COMPILE else (_BASE, switch.name)
        if reasons := [failures[name] for name in pair if name in failures]:
            unmeasured[switch.name] = reasons[0]
        else:
            found[switch.name] = _timing(*(seconds[name] for name in pair))
    return found, unmeasured


def validation_shares(trainer: Measurable, switches: Sequence[Switch]) -> dict[str, float]:
    """Validation loss with each switch that is on minus without it, nats per token, on ``VALIDATION_BATCHES`` batches:
    negative is better with it.

    It is the loss of the model as it is: what a component did for the weights before is not undone. Compiled code
    computes the same and is left out.
    """
    others = [switch for switch in switches if switch.on and switch.name != COMPILE]
    if not others:
        return {}
    limit = VALIDATION_BATCHES * trainer.plan.batch * trainer.plan.processes
    losses: dict[str, float] = {}
    with undisturbed(switches):
        for name, left_out in _variants([switch for switch in switches if switch.on]).items():
            if name != COMPILE:
                with ExitStack() as stack:
                    for switch in left_out:
                        stack.enter_context(switch.without())
                    losses[name] = trainer.validate(limit_rows=limit)[0]
    return {switch.name: losses[_BASE] - losses[switch.name] for switch in others}


_BASE = ""  # nothing left out but compiling


def _variants(switches: Sequence[Switch]) -> Mapping[str, tuple[Switch, ...]]:
    """What is left out in each, by the name of the switch that it is about; ``COMPILE`` is the run as it is."""
    base = tuple(switch for switch in switches if switch.name == COMPILE)
    found: dict[str, tuple[Switch, ...]] = {_BASE: base}
    found |= {switch.name: (*base, switch) for switch in switches if switch.name != COMPILE}
    return found | ({COMPILE: ()} if base else {})


def _seconds(trainer: Measurable, rows: Tensor, left_out: Sequence[Switch]) -> float:
    with ExitStack() as stack:
        for switch in left_out:
            stack.enter_context(switch.without())
        started = time.perf_counter()
        try:
            trainer.forward_backward(rows)  # its sums are on the CPU: a GPU has finished
            return time.perf_counter() - started
        finally:
            trainer.zero_grad()


def _timing(with_it: Sequence[float], without: Sequence[float]) -> Timing:
    ratios = [b / a if a > 0 else math.inf for a, b in zip(with_it, without, strict=True)]
    return Timing(median(with_it), median(without), median(ratios))
