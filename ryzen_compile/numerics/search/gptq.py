"""GPTQ (Frantar et al., 2022): round column by column, let the columns that follow make up for the error, then polish.

Minimized is the error of the product's output over calibration inputs, ``tr(E H Eᵀ)`` with E = w - dequantized and H
the inputs' second moments. With ``H = U D Uᵀ``, U unit upper triangular, that is the sum over columns k of
``D_k (E U)_k²``: the error a column is left with after those before it. So column k is rounded towards

    w_k + Σ_{j<k} E_j U_jk

which is GPTQ without inverting H (Chee et al., 2023, show that both are one). Beyond the paper:

*   A block's grid is searched when its turn comes, on what is left to be rounded then, weighted by D.
*   Columns of large inputs go first, while many are left to make up for them: blocks in the order of their mean
    moment, columns within a block in the order of their own. Blocks stay blocks, so nothing about it is stored.
*   Then coordinate descent on the same objective: every scale in closed form, every code again given all others.
    Neither step can make the objective worse.

Measured on the shipped model, 4 bits in blocks of 64, output error of ``q_proj`` in layer 0: round-to-nearest 23.6 dB,
GPTQ 28.3, with the order 29.0, after the descent 29.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.blockwise import BlockFormat, BlockTensor, blocks_of, check_weight, usable_scales
from ryzen_compile.numerics.search.rtn import best_grid, offset_range, offsets_of, search_blocks
from ryzen_compile.numerics.search.statistics import InputStatistics

SWEEPS = 2  # of coordinate descent; the third gives 0.02 dB
ROW_ELEMENTS = 1 << 24  # of a weight at a time: rows are independent, and some five matrices of this size are held


def gptq(w: Tensor, form: BlockFormat, statistics: InputStatistics) -> BlockTensor:
    """``w`` (N, K) of the least output error on inputs of ``statistics``; no row does worse than on searched grids.

    Raises ``UsageError`` for NaN and infinities, and for statistics of another width.
    """
    check_weight(w)
    rows, width = w.shape
    if statistics.width != width:
        raise UsageError(f"the weight reads {width} channels, the statistics are of {statistics.width}")
    problem = _Problem.of(statistics, form)
    step = max(1, ROW_ELEMENTS // max(1, width))
    parts = [_quantize_rows(w[start : start + step], form, problem) for start in range(0, max(1, rows), step)]
    return BlockTensor.concat(parts)


@dataclass(frozen=True)
class _Problem:
    """The objective, with channels in working order and padded to whole blocks.

    ``order`` (P,) names the channel at each place, ``place`` (P,) the place of each channel; ``hessian`` (P, P),
    ``feedback`` (P, P) is U and ``weights`` (P,) is D; ``importance`` (K,) in the order of the channels.
    """

    order: Tensor
    place: Tensor
    hessian: Tensor
    feedback: Tensor
    weights: Tensor
    importance: Tensor

    @classmethod
    def of(cls, statistics: InputStatistics, form: BlockFormat) -> _Problem:
        importance = statistics.importance()
        padding = -statistics.width % form.block
        hessian = torch.nn.functional.pad(statistics.damped(), (0, padding, 0, padding))
        hessian.diagonal()[statistics.width :] = statistics.damping
        order = _working_order(hessian.diagonal(), form.block)
        hessian = hessian[order][:, order]
        feedback, weights = _unit_upper(hessian)
        return cls(order, order.argsort(), hessian, feedback, weights, importance)


def _working_order(moments: Tensor, block: int) -> Tensor:
    """Blocks by falling mean, places within them by falling moment."""
    table = moments.view(-1, block)
    within = table.argsort(dim=1, descending=True) + torch.arange(len(table), device=moments.device)[:, None] * block
    return within[table.mean(1).argsort(descending=True)].flatten()


def _unit_upper(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """(U, D) with ``hessian = U diag(D) Uᵀ``, U upper triangular with ones on its diagonal."""
    # The usual factor of the matrix read from its last row and column to the first.
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed:
        raise UsageError("the second moments of the inputs are not positive semidefinite", hint="were they edited?")
    upper = lower.flip(0, 1)
    diagonal = upper.diagonal()
    return upper / diagonal, diagonal.square()


class _State:
    """Rows (R, P) of a weight in working order: ``offsets`` (R, P) from zero, ``scales`` and ``zeros`` (R, B)."""

    def __init__(self, target: Tensor, form: BlockFormat) -> None:
        blocks = (target.shape[0], target.shape[1] // form.block)
        self.form, self.target = form, target
        self.offsets, self.error = torch.zeros_like(target), torch.zeros_like(target)
        self.scales = target.new_ones(blocks)
        self.zeros = None if form.symmetric else target.new_zeros(blocks)

    def grid(self, index: int) -> tuple[Tensor, Tensor | None]:
        return self.scales[:, index], None if self.zeros is None else self.zeros[:, index]

    def spans(self) -> list[tuple[int, int, int]]:
        """(index, start, stop) of every block."""
        block = self.form.block
        return [(i, i * block, (i + 1) * block) for i in range(self.scales.shape[1])]


def _quantize_rows(w: Tensor, form: BlockFormat, problem: _Problem) -> BlockTensor:
    width = w.shape[1]
    target = blocks_of(w, form.block).flatten(1)
    state = _State(target[:, problem.order], form)
    _round_with_feedback(state, problem)
    slope = _start_from_the_better(state, target, problem, width)
    _descend(state, problem, slope)
    return _stored(state, problem, (w.shape[0], width))


def _round_with_feedback(state: _State, problem: _Problem) -> None:
    for index, start, stop in state.spans():
        left = state.target[:, start:stop] + state.error[:, :start] @ problem.feedback[:start, start:stop]
        scales, zeros = search_blocks(left[:, None], state.form, problem.weights[None, start:stop])
        state.scales[:, index] = scales[:, 0]
        if state.zeros is not None and zeros is not None:
            state.zeros[:, index] = zeros[:, 0].float()
        _round_block(state, index, start, stop, left, problem.feedback[start:stop, start:stop])


def _round_block(state: _State, index: int, start: int, stop: int, left: Tensor, feedback: Tensor) -> None:
    """One block, column by column; ``left`` (R, block) is what is to be rounded, without the block's own feedback."""
    scale, zero = state.grid(index)
    low, high = offset_range(zero, state.form)
    target = state.target[:, start:stop].T.contiguous()  # columns as contiguous rows
    left = left.T.contiguous()
    offsets, error = torch.empty_like(left), torch.empty_like(left)
    for k in range(stop - start):
        offsets[k] = (left[k] / scale).round_().clamp_(low, high)
        error[k] = target[k] - offsets[k] * scale
        left[k + 1 :].addr_(feedback[k, k + 1 :], error[k])
    state.offsets[:, start:stop], state.error[:, start:stop] = offsets.T, error.T


def _start_from_the_better(state: _State, target: Tensor, problem: _Problem, width: int) -> Tensor:
    """Rows that plain rounding to searched grids serves better, as may be by chance, take its codes.

    Returns ``error @ hessian`` (R, P), the slope of the objective.
    """
    scales, zeros = best_grid(target[:, :width], state.form, problem.importance)
    zeros = None if zeros is None else zeros.float()
    table = target.unflatten(1, (-1, state.form.block))
    plain = offsets_of(table, scales, zeros, state.form)
    error = (table - plain * scales[..., None]).flatten(1)[:, problem.order]
    plain_slope, slope = error @ problem.hessian, state.error @ problem.hessian
    worse = (plain_slope * error).sum(1) < (slope * state.error).sum(1)
    if not worse.any():
        return slope
    slope[worse] = plain_slope[worse]
    blocks = problem.order[:: state.form.block] // state.form.block
    state.offsets[worse] = plain.flatten(1)[:, problem.order][worse]
    state.error[worse] = error[worse]
    state.scales[worse] = scales[:, blocks][worse]
    if state.zeros is not None and zeros is not None:
        state.zeros[worse] = zeros[:, blocks][worse]
    return slope


def _descend(state: _State, problem: _Problem, slope: Tensor) -> None:
    """Coordinate descent; ``slope`` (R, P) is ``error @ hessian`` and is kept up to date."""
    for _ in range(SWEEPS):
        for index, start, stop in state.spans():
            before = state.error[:, start:stop].clone()
            near = problem.hessian[start:stop, start:stop]
            _improve_block(state, index, start, stop, slope[:, start:stop].T.contiguous(), near)
            slope.addmm_(state.error[:, start:stop] - before, problem.hessian[start:stop])


def _improve_block(state: _State, index: int, start: int, stop: int, slope: Tensor, hessian: Tensor) -> None:
    """A block's scale, then its every code; ``slope`` (block, R) and ``hessian`` (block, block) are the block's."""
    scale, zero = state.grid(index)
    low, high = offset_range(zero, state.form)
    target = state.target[:, start:stop].T
    offsets, error = (t[:, start:stop].T.contiguous() for t in (state.offsets, state.error))
    curvature = hessian @ offsets
    step = ((offsets * slope).sum(0) / (curvature * offsets).sum(0)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    refitted = torch.where(scale + step == 0, scale, usable_scales(scale + step))
    slope -= curvature * (refitted - scale)
    scale, error = refitted, target - offsets * refitted
    for k in range(stop - start):
        # Without rounding, this value would bring the slope to zero.
        ideal = target[k] - error[k] + slope[k] / hessian[k, k]
        offsets[k] = (ideal / scale).round_().clamp_(low, high)
        changed = target[k] - offsets[k] * scale - error[k]
        error[k] += changed
        slope.addr_(hessian[k], changed)
    state.scales[:, index] = scale
    state.offsets[:, start:stop], state.error[:, start:stop] = offsets.T, error.T


def _stored(state: _State, problem: _Problem, shape: tuple[int, int]) -> BlockTensor:
    form = state.form
    blocks = problem.place[:: form.block] // form.block  # where each block's first channel went, its block did
    scales = state.scales[:, blocks]
    zeros = None if state.zeros is None else state.zeros[:, blocks]
    zero = form.zero_code if zeros is None else zeros[..., None]
    codes = state.offsets[:, problem.place].unflatten(1, (-1, form.block)) + zero
    return BlockTensor.from_codes(codes, scales, zeros, form, shape)
