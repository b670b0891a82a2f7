"""All checks of an optimized model, in the order of reports; one that cannot be made says why and stops no other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from ryzen_compile.errors import RyzenCompileError, UnsupportedError
from ryzen_compile.validate.optimization import checks
from ryzen_compile.validate.optimization.checks import Blame, Check
from ryzen_compile.validate.optimization.measurements import Measurements, Subject
from ryzen_compile.validate.outcome import Component, Outcome

# In their order: an error takes the place of the next one.
NAMES: dict[Component, tuple[str, ...]] = {
    "kernels": ("kernel_speedup",),
    "passes": ("passes_hold",),
    "embedding": ("compression_ratio", "table_rows"),
    "kv_cache": ("kv_memory_saving",),
    "speculation": ("same_text", "speculation_speedup"),
    "correctness": ("accuracy_loss",),
    "end_to_end": ("end_to_end_speedup", "ttft_ms", "tokens_per_second", "peak_memory"),
}


class OptimizationValidator:
    """Holds ``subject`` to its settings' thresholds.

    ``blame`` says which part of the work lost the accuracy that is missing; it is asked only where some is.
    ``progress`` hears what is being measured. What was measured stays in ``measurements``.
    """

    def __init__(
        self, subject: Subject, *, blame: Blame | None = None, progress: Callable[[str], None] | None = None
    ) -> None:
        self.measurements = Measurements(subject, progress)
        self._checks: dict[Component, Check] = {
            "kernels": checks.kernels,
            "passes": checks.passes,
            "embedding": checks.embedding,
            "kv_cache": checks.kv_cache,
            "speculation": checks.speculation,
            "correctness": partial(checks.correctness, blame=blame),
            "end_to_end": checks.end_to_end,
        }

    def validate(self) -> tuple[Outcome, ...]:
        """Every check's outcome. An error of this package's while measuring is the outcome of what it was to measure;
        others pass through."""
        return tuple(outcome for component in self._checks for outcome in self._checked(component))

    def _checked(self, component: Component) -> Iterator[Outcome]:
        started = time.perf_counter()
        made: list[Outcome] = []
        try:
            made.extend(self._checks[component](self.measurements))
        except UnsupportedError as error:
            made.append(checks.skipped(component, NAMES[component][len(made)], str(error)))
        except RyzenCompileError as error:
            made.append(checks.broken(component, NAMES[component][len(made)], error))
        share = (time.perf_counter() - started) / max(1, len(made))
        command = self.measurements.subject.arguments
        for outcome in made:
            yield outcome.model_copy(
                update={"command": outcome.command or command, "seconds": outcome.seconds or share}
            )
