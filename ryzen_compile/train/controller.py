"""Who turns components on and off while a run goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ryzen_compile.train.component import Component


class Controller:
    """Turns each component on at its start, and off when it breaks the run."""

    def __init__(self, components: Sequence[Component], model: nn.Module) -> None:
        self.components = tuple(components)
        self._own = [(component.name, tuple(component.prepare(model))) for component in self.components]
        self._given_up: set[str] = set()

    def own_parameters(self) -> list[tuple[str, tuple[nn.Parameter, ...]]]:
        return self._own

    def before_step(self, progress: float) -> None:
        for component in self.components:
            if not component.active and component.name not in self._given_up and progress >= component.start:
                component.activate()
            component.advance(progress)

    def validated(self, step: int, loss: float) -> None: ...

    def end_epoch(self, trainer: Any, step: int) -> None: ...

    def fall_back(self, step: int, reason: str) -> bool:
        active = [component for component in self.components if component.active]
        if not active:
            return False
        active[-1].deactivate()
        self._given_up.add(active[-1].name)
        return True

    def state(self) -> dict[str, Any]:
        return {"given_up": sorted(self._given_up)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._given_up = set(state["given_up"])
