"""All checks of an optimized model, in the order of reports; one that cannot be made says why and stops no other."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from ryzen_compile.errors import ResourceError, RyzenCompileError, UnsupportedError
from ryzen_compile.validate.optimization import checks
from ryzen_compile.validate.optimization.checks import Blame, Check
from ryzen_compile.validate.optimization.measurements import Measurements, Subject
from ryzen_compile.validate.optimization.table import table_rows
from ryzen_compile.validate.outcome import Component, Outcome

CHECKS: tuple[tuple[Component, str, Check], ...] = (
    ("kernels", "kernel_speedup", checks.kernel_speedup),
    ("passes", "passes_hold", checks.passes_hold),
    ("embedding", "compression_ratio", checks.compression_ratio),
    ("embedding", "table_rows", table_rows),
    ("kv_cache", "kv_memory_saving", checks.kv_memory_saving),
    ("speculation", "same_text", checks.same_text),
    ("speculation", "speculation_speedup", checks.speculation_speedup),
    ("correctness", "accuracy_loss", checks.accuracy_loss),
    ("end_to_end", "end_to_end_speedup", checks.end_to_end_speedup),
    ("end_to_end", "ttft_ms", checks.ttft_ms),
    ("end_to_end", "tokens_per_second", checks.tokens_per_second),
    ("end_to_end", "peak_memory", checks.peak_memory),
)


class OptimizationValidator:
    """Holds ``subject`` to its settings' thresholds.

    ``blame`` says which part of the work lost the accuracy that is missing; it is asked only where some is.
    ``progress`` hears what is being measured. What was measured stays in ``measurements``.
    """

    def __init__(
        self, subject: Subject, *, blame: Blame | None = None, progress: Callable[[str], None] | None = None
    ) -> None:
        self.measurements = Measurements(subject, progress)
        self._blame = blame

    def validate(self) -> tuple[Outcome, ...]:
        """Every check's outcome. An error of this package's while measuring is the outcome of what it was to measure;
        others pass through."""
        return tuple(self.outcome(name) for _, name, _ in CHECKS)

    def outcome(self, name: str) -> Outcome:
        """Of one check, by its name in ``CHECKS``.

        What the artifact does not have and what this machine cannot hold is no failure of the artifact's; nor is
        anything where no threshold asks for it.
        """
        component, _, check = next(one for one in CHECKS if one[1] == name)
        if check is checks.accuracy_loss:
            check = partial(checks.accuracy_loss, blame=self._blame)
        started = time.perf_counter()
        try:
            outcome = check(self.measurements)
        except (UnsupportedError, ResourceError) as error:
            outcome = checks.skipped(component, name, str(error))
        except RyzenCompileError as error:
            thresholds = self.measurements.subject.settings.thresholds
            if hasattr(thresholds, name) and thresholds.target(name) is None:
                outcome = checks.skipped(component, name, f"no threshold, and {error.code}: {error}")
            else:
                outcome = checks.broken(component, name, error)
        seconds = time.perf_counter() - started
        return outcome.model_copy(update={"command": self.measurements.subject.arguments, "seconds": seconds})
