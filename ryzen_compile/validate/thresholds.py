"""What an optimized model has to reach, as a file may say it."""

from __future__ import annotations

from pydantic import Field

from ryzen_compile.settings import Section
from ryzen_compile.validate.outcome import Target

AT_MOST = ("accuracy_loss", "ttft_ms")
ADVISORY = ("ttft_ms", "tokens_per_second")


class Thresholds(Section):
    """Ratios are to the model in Hugging Face eager float32, measured in the same run. A threshold of none is not
    checked. ``ttft_ms`` (of the prompt that is measured) and ``tokens_per_second`` are for a machine, not for a model:
    missing them is a warning. A miss by a share of ``tolerance`` is one, too."""

    kernel_speedup: float | None = Field(default=3.0, gt=0)
    compression_ratio: float | None = Field(default=2.0, gt=0)
    kv_memory_saving: float | None = Field(default=0.30, ge=0, le=1)
    speculation_speedup: float | None = Field(default=1.2, gt=0)
    end_to_end_speedup: float | None = Field(default=3.0, gt=0)
    accuracy_loss: float | None = Field(default=0.01, ge=0)
    test_pass_rate: float | None = Field(default=0.95, ge=0, le=1)
    ttft_ms: float | None = Field(default=120.0, gt=0)
    tokens_per_second: float | None = Field(default=25.0, gt=0)
    tolerance: float = Field(default=0.0, ge=0, le=1)

    def target(self, name: str) -> Target | None:
        """The target of a threshold by its field's name; none where it is not checked."""
        value = getattr(self, name)
        if value is None:
            return None
        return Target(value=value, at_least=name not in AT_MOST, tolerance=self.tolerance, advisory=name in ADVISORY)
