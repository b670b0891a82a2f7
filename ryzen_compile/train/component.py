"""What can be trained in the loop beside the plain model: one protocol, so that the controller treats all alike.

A component is prepared before the optimizer is made, inactive: parameters keep their identity whatever is turned on or
off later, so optimizer, checkpoints and compiled code need not know. Active, it changes what the forward pass computes
from the parameters; its gradients reach them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class ComponentFacts:
    """What a component does to the weights it holds now.

    ``ratio``: float32 bytes over stored bytes, everything counted; ``error``: squared error of what stands for the
    weights over their squares, 0 to 1; ``settings``: its parameters now, JSON.
    """

    ratio: float = 1.0
    error: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)


class Component(Protocol):
    """One of ``config.COMPONENTS``."""

    name: str
    start: float  # the share of the run at which it is turned on
    active: bool
    optional: bool  # whether a run goes on without it

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        """Attaches to ``model``, inactive; returns parameters of its own, which the optimizer trains as well."""
        ...

    def activate(self) -> None:
        """From the next step on the forward pass goes through it. May look at the weights (clusters begin here)."""
        ...

    def deactivate(self) -> None:
        """The forward pass is the plain model's again."""
        ...

    def advance(self, progress: float) -> None:
        """The share of the run that is done, 0 to 1, before each step."""
        ...

    def tighten(self) -> bool:
        """Goes to its next, smaller stage; False where there is none."""
        ...

    def relax(self) -> bool:
        """Goes back to its stage before; False where there is none."""
        ...

    def facts(self) -> ComponentFacts:
        """Measured on the weights as they are; minutes must not pass."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What ``restore`` needs to go on exactly: tensors, and JSON. Without parameters that ``prepare`` returned."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """The inverse, after ``prepare`` on a model with the same weights."""
        ...

    def detach(self, model: nn.Module) -> None:
        """Leaves a plain model whose parameters have the names that they had before ``prepare``.

        ``model`` may be a copy of the one that was prepared; then the component goes on with that one.
        """
        ...

    def recipe_changes(self) -> Mapping[str, Any]:
        """Fields of ``ryzen_compile.config.Recipe`` with which an export computes what the component trained for."""
        ...
