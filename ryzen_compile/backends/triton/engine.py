"""The engine on a GPU: a lowered Program, stepped on caches in the device's memory."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ryzen_compile.backends.triton.graphs import MOST_TOKENS, StepGraphs
from ryzen_compile.backends.triton.lowering import lower
from ryzen_compile.backends.triton.memory import DeviceStorage
from ryzen_compile.backends.triton.rest import compile_rest
from ryzen_compile.errors import UsageError
from ryzen_compile.program import Program
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import check_last
from ryzen_compile.runtime.storage import Storage


class TritonEngine:
    """An ``Engine`` on ``device``; ``precision`` is what weights and activations are there.

    On a GPU, short steps are captured in CUDA graphs, and what is not a kernel of ours, where several such operations
    follow each other, is compiled by ``torch.compile``. On a CPU, where Triton interprets the kernels, neither.
    """

    name = "triton"

    def __init__(self, program: Program, device: torch.device, precision: torch.dtype) -> None:
        lowered = lower(program, device, precision)
        self.spec = program.spec
        self.slots = lowered.slots
        self.all_logits = lowered.all_logits
        self.verifies = True
        self.prompt_from = 2  # products of one row are other kernels
        self.storage: Storage = DeviceStorage(device)
        self._device = device
        self._module: Any = compile_rest(lowered.module) if device.type == "cuda" else lowered.module
        self._graphs = StepGraphs() if device.type == "cuda" and not lowered.uncapturable else None
        if device.type == "cuda" and lowered.uncapturable:
            warnings.warn(f"steps run without CUDA graphs: {lowered.uncapturable}", stacklevel=3)

    @torch.inference_mode()
    def step(self, tokens: np.ndarray, cache: KVCache, last: int = 1) -> np.ndarray:
        """See ``Engine.step``; the array returned is freshly allocated.

        Raises ``UsageError`` for a cache that has no room for the tokens or lies elsewhere.
        """
        check_last(last, tokens, self.verifies)
        batch, new = tokens.shape
        total = int(cache.lengths.max()) + new
        if total > cache.capacity or batch != cache.batch:
            raise UsageError(
                f"the cache has {cache.batch} rows of {cache.capacity} tokens, the step needs {batch} of {total}",
                hint="call cache.reserve before the step",
            )
        buffers = [buffer for pair in zip(cache.keys, cache.values, strict=True) for buffer in pair]
        if not all(isinstance(buffer, Tensor) and buffer.device == self._device for buffer in buffers):
            raise UsageError(
                f"the cache lies elsewhere than on {self._device}", hint="make it with storage=engine.storage"
            )
        # One transfer: the ids, then the length of every row with the new tokens.
        packed = np.empty((batch, new + 1), np.int64)
        packed[:, :new] = tokens
        packed[:, new] = cache.lengths + new
        given = torch.from_numpy(packed)
        if self._device.type == "cuda":
            given = given.pin_memory().to(self._device, non_blocking=True)

        def run(given: Tensor) -> Tensor:
            ids, lengths = given[:, :new].contiguous(), given[:, new].contiguous()
            positions = lengths[:, None] - new + torch.arange(new, device=given.device)
            logits: Tensor = self._module(ids, positions, lengths, last, *buffers)
            return logits.float()

        if self._graphs is None or batch * new > MOST_TOKENS:
            return run(given).cpu().numpy()
        addresses = tuple(buffer.data_ptr() for buffer in buffers)
        key = (batch, new, last, cache.capacity, addresses)
        return self._graphs.run(key, [given], run).cpu().numpy()

    def close(self) -> None:
        if self._graphs is not None:
            self._graphs.clear()
        self._module = None
