"""The Triton backend: the same Program on a GPU, with our own kernels in the place of the operators' references."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ryzen_compile.backends.base import Capability
from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.kernels import attach, probe, supported_ops

if TYPE_CHECKING:  # torch and the kernels are imported when something is compiled
    from ryzen_compile.backends.triton.engine import TritonEngine
    from ryzen_compile.program import Program

PRECISIONS = ("bf16", "fp16", "fp32")
DEFAULT_PRECISION = "bf16"


def expect_precision(precision: str) -> None:
    """Raises ``UsageError`` for a precision that is not among ``PRECISIONS``."""
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


class TritonBackend:
    """Runs on a CUDA device; on ``device`` "cpu" only where Triton interprets its kernels, for tests."""

    name = "triton"
    cache_formats = None
    evicts = False

    def __init__(self, device: str = "cuda") -> None:
        self.device = device

    @property
    def supported_ops(self) -> frozenset[str]:
        found: frozenset[str] = supported_ops()
        return found

    def probe(self) -> Capability:
        lack, remedy = probe(self.device)
        if lack:
            return Capability(False, lack, remedy)
        import torch
        import triton

        where = torch.cuda.get_device_name() if self.device == "cuda" else "its interpreter"
        return Capability(True, f"triton {triton.__version__}, torch {torch.__version__}, {where}")

    def attach(self) -> None:
        """From now on operators run their kernels on this device, whoever calls them: a training step, too.

        Raises ``UnsupportedError`` where they cannot.
        """
        attach(self.device)

    def compile(self, program: Program, precision: str = DEFAULT_PRECISION) -> TritonEngine:
        """See ``Backend``. ``precision`` is "bf16", "fp16" or "fp32": of weights, activations and float caches.

        Raises ``UnsupportedError`` where the kernels cannot run, ``UsageError`` for another precision.
        """
        expect_precision(precision)
        able = self.probe()
        if not able.available:
            raise UnsupportedError(f"backend 'triton' is not available here: {able.reason}", hint=able.hint)
        import torch

        from ryzen_compile.backends.triton.engine import TritonEngine
        from ryzen_compile.backends.triton.lowering import TORCH_TYPES

        self.attach()
        device = torch.device(f"cuda:{torch.cuda.current_device()}" if self.device == "cuda" else "cpu")
        return TritonEngine(program, device, TORCH_TYPES[precision])
