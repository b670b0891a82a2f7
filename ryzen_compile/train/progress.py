"""How far a run has come, in numbers: what the loop counts, and takes over from a checkpoint."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ryzen_compile.errors import ModelError

REMEMBERED = 1000  # speeds of steps, of which the median is told
NEVER = -1


@dataclass
class Progress:
    """``refused`` steps in a row; the ``lowest`` validation loss since ``revision``, the controller's last change to
    the model, and how many validations since it were ``poor``; the last validation's loss, and which step it followed.
    """

    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    refused: int = 0
    lowest: float = math.inf
    poor: int = 0
    revision: int = 0
    validation: float | None = None
    validated_at: int = NEVER
    stopped_early: bool = False
    speeds: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    @property
    def speed(self) -> float:
        """Tokens per second, the median of the last ``REMEMBERED`` steps; NaN before the first one."""
        return statistics.median(self.speeds) if self.speeds else math.nan

    def validated(self, loss: float, least: float, revision: int) -> bool:
        """Takes note of a validation; whether it is the best since the model was changed last, by ``least`` nats."""
        if revision != self.revision:
            self.revision, self.lowest, self.poor = revision, math.inf, 0
        gained = loss < self.lowest - least
        self.poor = 0 if gained else self.poor + 1
        self.lowest = min(self.lowest, loss) if math.isfinite(loss) else self.lowest
        self.validation, self.validated_at = loss, self.step
        return gained

    def metric(self, revision: int) -> float | None:
        """What a checkpoint of this step is measured by; none where the model was not measured as it is."""
        measured = self.validated_at == self.step and self.revision == revision
        return self.validation if measured else None

    def state(self) -> dict[str, Any]:
        """JSON."""
        return {name: _plain(value) for name, value in vars(self).items()}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Progress:
        """The inverse. Raises ``ModelError`` for another state."""
        expected = set(vars(cls()))
        if set(state) != expected:
            raise ModelError(f"the checkpoint's progress holds {sorted(state)}, expected {sorted(expected)}")
        values = {name: _number(value) for name, value in state.items() if name != "speeds"}
        return cls(**values, speeds=deque(state["speeds"], maxlen=REMEMBERED))


def _plain(value: Any) -> Any:
    """JSON has no infinities."""
    if isinstance(value, deque):
        return list(value)
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value
