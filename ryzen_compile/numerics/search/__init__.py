"""Ways to choose the codes, scales and zero points of a weight, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from torch import Tensor

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.blockwise import BlockFormat, BlockTensor
from ryzen_compile.numerics.search import gptq as _gptq
from ryzen_compile.numerics.search.rtn import round_to_best, round_to_nearest
from ryzen_compile.numerics.search.statistics import InputStatistics, StatisticsBuilder

Quantizer = Callable[[Tensor, BlockFormat, InputStatistics | None], BlockTensor]

__all__ = ["METHODS", "InputStatistics", "Method", "Quantizer", "StatisticsBuilder", "quantize_with"]


@dataclass(frozen=True)
class Method:
    """``function`` takes a weight (N, K), its format and the statistics of its inputs, which some need."""

    name: str
    needs_statistics: bool
    description: str
    function: Quantizer


def _rtn(w: Tensor, form: BlockFormat, statistics: InputStatistics | None) -> BlockTensor:
    return round_to_nearest(w, form)


def _mse(w: Tensor, form: BlockFormat, statistics: InputStatistics | None) -> BlockTensor:
    return round_to_best(w, form, None if statistics is None else statistics.importance())


def _with_feedback(w: Tensor, form: BlockFormat, statistics: InputStatistics | None) -> BlockTensor:
    if statistics is None:
        raise _missing("gptq")
    return _gptq.gptq(w, form, statistics)


METHODS = {
    method.name: method
    for method in (
        Method("rtn", False, "nearest code on the grid that spans each block", _rtn),
        Method("mse", False, "nearest code on the grid of the smallest squared error", _mse),
        Method(
            "gptq", True, "least output error on calibration text, columns making up for each other", _with_feedback
        ),
    )
}


def quantize_with(method: str, w: Tensor, form: BlockFormat, statistics: InputStatistics | None = None) -> BlockTensor:
    """``w`` (N, K) of any floating-point type in ``form``.

    Raises ``UsageError`` for an unknown method, naming the nearest; for one that needs statistics when there are none;
    for statistics of another width; and for weights that are NaN or infinite.
    """
    chosen = _find(method)
    if statistics is None and chosen.needs_statistics:
        raise _missing(method)
    if statistics is not None and w.ndim == 2 and statistics.width != w.shape[1]:
        raise UsageError(f"the weight reads {w.shape[1]} channels, the statistics are of {statistics.width}")
    return chosen.function(w.detach(), form, statistics)


def _find(method: str) -> Method:
    if method in METHODS:
        return METHODS[method]
    near = get_close_matches(method.lower(), METHODS, n=1, cutoff=0.0)
    raise UsageError(f"unknown method {method!r}, known are {', '.join(METHODS)}", hint=f"did you mean {near[0]!r}?")


def _missing(method: str) -> UsageError:
    return UsageError(
        f"{method} needs statistics of the weight's inputs, got none",
        hint="give calibration text, or choose mse, which needs none",
    )
