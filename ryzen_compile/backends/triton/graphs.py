"""Steps of a few tokens as CUDA graphs: hundreds of kernels started by one call.

A graph holds the addresses of what it reads and writes, so there is one for every shape of step and every set of cache
buffers; the least recently used goes when there are many. The first step of a kind runs plainly, which compiles its
kernels and measures their launches, and the second is captured. A capture that fails is not tried again, and said once;
models that are known not to be capturable (``Lowered.uncapturable``) do not come here.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MOST_TOKENS = 32  # of a step that is captured, in all rows; a longer one is bound by its arithmetic
KEPT = 64  # graphs


class StepGraphs:
    """Captured steps of one engine, which share memory, as they run one after the other."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Any, ...], _Captured | None] = OrderedDict()
        self._pool: Any = None
        self._capturable = True

    def run(self, key: tuple[Any, ...], inputs: Sequence[Tensor], step: Callable[..., Tensor]) -> Tensor:
        """``step(*inputs)``, captured when ``key`` was met before. The tensor returned is overwritten by the next run
        of the same key. ``key`` says what else the step depends on."""
        is_new = key not in self._known
        captured = None if is_new or not self._capturable else self._known[key] or self._captured(inputs, step)
        self._remember(key, captured)
        return step(*inputs) if captured is None else captured.replay(inputs)

    def _captured(self, inputs: Sequence[Tensor], step: Callable[..., Tensor]) -> _Captured | None:
        """None, with a warning, where that cannot be done."""
        try:
            captured = _Captured(inputs, step, self._pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._capturable = False
            cause = error.__context__ or error  # ending the capture fails as well, and hides what went wrong in it
            reason = str(cause).splitlines()[0]
            warnings.warn(f"steps run without CUDA graphs, as they cannot be captured: {reason}", stacklevel=4)
            return None
        self._pool = captured.graph.pool()
        return captured

    def clear(self) -> None:
        self._known.clear()

    def _remember(self, key: tuple[Any, ...], captured: _Captured | None) -> None:
        self._known[key] = captured
        self._known.move_to_end(key)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)


class _Captured:
    """One graph with the inputs and the output that it was captured over."""

    def __init__(self, inputs: Sequence[Tensor], step: Callable[..., Tensor], pool: Any) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # The outer context restores the stream where ending the capture fails; what other threads do is their business.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"),
        ):
            self._output = step(*self._inputs)

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        return self._output
