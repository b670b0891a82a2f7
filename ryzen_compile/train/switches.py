"""What can be turned on and off while a run goes, components and levers behind one protocol.

Turned off for a moment, a switch is afterwards as if it had not been touched, bit for bit: what measures by switching
must not change the run that it measures.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from ryzen_compile.errors import UsageError
from ryzen_compile.train.component import Component
from ryzen_compile.train.distributed import gathered
from ryzen_compile.train.objective import Objective
from ryzen_compile.train.run_state import random_state, restore_random_state

COMPILE = "compile"
# The field of ``Levers``, and its value when the lever is off.
_FIELDS: dict[str, tuple[str, Any]] = {
    "precision": ("dtype", torch.float32),
    "loss": ("linear_cross_entropy", False),
    COMPILE: ("compiled", False),
    "operators": ("operators", False),
}
LEVER_NAMES = tuple(_FIELDS)


class Switch(Protocol):
    """A component or a lever."""

    @property
    def name(self) -> str: ...

    @property
    def on(self) -> bool: ...

    def off(self) -> None:
        """For good."""
        ...

    def without(self) -> AbstractContextManager[None]:
        """Inside it is off; afterwards it is exactly what it was."""
        ...


class LeverSwitch:
    """One of ``LEVER_NAMES``, as a field of the objective's ``levers``. Raises ``UsageError`` for another name."""

    def __init__(self, objective: Objective, name: str) -> None:
        if name not in _FIELDS:
            raise UsageError(f"there is no lever {name!r}, expected one of {', '.join(_FIELDS)}")
        self.name = name
        self._objective = objective
        self._field, self._plain = _FIELDS[name]

    @property
    def on(self) -> bool:
        return bool(getattr(self._objective.levers, self._field) != self._plain)

    def off(self) -> None:
        levers = replace(self._objective.levers, **{self._field: self._plain})
        if not levers.linear_cross_entropy:
            levers = replace(levers, operators=False)  # which end where the head begins
        self._objective.levers = levers

    @contextmanager
    def without(self) -> Iterator[None]:
        before = self._objective.levers
        self.off()
        try:
            yield
        finally:
            self._objective.levers = before


class ComponentSwitch:
    """A component with ``own``, the parameters that its ``prepare`` returned."""

    def __init__(self, component: Component, own: Sequence[nn.Parameter]) -> None:
        self.component, self.own = component, tuple(own)

    @property
    def name(self) -> str:
        return self.component.name

    @property
    def on(self) -> bool:
        return self.component.active

    def off(self) -> None:
        self.component.deactivate()

    @contextmanager
    def without(self) -> Iterator[None]:
        with self.exact():
            self.off()
            yield

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Whatever happens to it inside is undone. By its state, not by ``activate``, which may cluster anew."""
        tensors, values = self.component.state()
        tensors = {name: gathered(tensor).clone() for name, tensor in tensors.items()}
        values = copy.deepcopy(values)
        own = [parameter.detach().clone() for parameter in self.own]
        try:
            yield
        finally:
            self.component.restore(tensors, values)
            with torch.no_grad():
                for parameter, value in zip(self.own, own, strict=True):
                    parameter.copy_(value)


@contextmanager
def undisturbed(switches: Sequence[Switch]) -> Iterator[None]:
    """Forward and backward passes inside change neither components (which may count or anneal) nor random numbers."""
    drawn = random_state()
    with ExitStack() as stack:
        for switch in switches:
            if isinstance(switch, ComponentSwitch):
                stack.enter_context(switch.exact())
        try:
            yield
        finally:
            restore_random_state(drawn)
