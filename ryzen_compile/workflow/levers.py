"""Which levers a run pulls: those that are asked for, less those that do not work for its model on its machine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ryzen_compile.backends import get_backend
from ryzen_compile.errors import CaptureError, UnsupportedError
from ryzen_compile.train.config import Mode, PassSettings, TrainConfig

if TYPE_CHECKING:
    import torch

    from ryzen_compile.train.loop import Watcher
    from ryzen_compile.train.objective import Levers, Objective


def wanted_levers(config: TrainConfig, mode: Mode, device: torch.device) -> Levers:
    """Those that a configuration asks for in ``mode``, before it is known whether they work here."""
    import torch

    from ryzen_compile.train.objective import Levers, fast_half

    if mode == "baseline":
        return Levers()
    wanted = config.precision.dtype
    if wanted == "auto":
        wanted = "bf16" if fast_half(device) else "fp32"
    dtype = torch.bfloat16 if wanted == "bf16" else torch.float32
    compiled = config.precision.compile is not False and mode != "test"
    operators = config.precision.operators
    if operators == "auto":
        operators = device.type == "cuda" and get_backend("triton").probe().available
    return Levers(dtype, config.precision.linear_cross_entropy, compiled, operators)


def checked_levers(objective: Objective, rows: torch.Tensor, watcher: Watcher | None = None) -> Levers:
    """The objective's levers less those that do not work here, each with a word to ``watcher``.

    ``rows`` (1, T + 1) are some to try on.
    """
    from ryzen_compile.train.objective import compiler_works

    levers = objective.levers
    if levers.linear_cross_entropy and not objective.logits_are_a_product(rows):
        tell(watcher, "loss without logits: off, the model's logits are more than its head's product")
        levers = replace(levers, linear_cross_entropy=False, operators=False)
    if levers.compiled and (reason := compiler_works()):
        tell(watcher, f"compiled code: off, {reason}")
        levers = replace(levers, compiled=False)
    return levers


def fused_levers(objective: Objective, passes: PassSettings, device: torch.device, watcher: Watcher | None) -> Levers:
    """The objective's levers, without fused operators where they cannot be had."""
    from ryzen_compile.train.config import STANDING_IN

    levers = objective.levers
    if not levers.operators:
        return levers
    reason = next((f"{name} stands in for weights" for name in STANDING_IN if getattr(passes, name) is not None), "")
    if not levers.linear_cross_entropy:
        reason = "the loss reads logits"
    if not reason:
        try:
            objective.fuse(device)
            if device.type == "cuda":
                from ryzen_compile.backends.triton import TritonBackend

                TritonBackend().attach()
        except (UnsupportedError, CaptureError) as error:
            reason = error.message
    if reason:
        tell(watcher, f"fused operators: off, {reason}")
    return replace(levers, operators=not reason)


def tell(watcher: Watcher | None, text: str) -> None:
    """Whoever looks on, if anybody does."""
    if watcher is not None:
        watcher.event(text)
