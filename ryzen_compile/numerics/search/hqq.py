"""Half-quadratic quantization (Badri and Shaji, 2023): a grid that does not bend to outliers, without calibration.

Minimized is the sum of ``|w - dequantized| ** p`` with p < 1, which forgives the few large errors of heavy-tailed
weights and takes care of the many small ones. A variable ``e`` splits it into two steps that are solved in turns:

    e     = shrink(w - dequantized)          closed form, element by element
    grid  = the best fit of codes to w - e   closed form: the scale by least squares, the zero point as a mean

The paper moves a real zero point. Here zero points are stored as integers and symmetric formats have none, so the zero
point is rounded and the scale moves as well. Of all rounds each block keeps the best, its starting grid included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ryzen_compile.numerics.blockwise import BlockFormat, BlockTensor, blocks_of, check_weight, quantize, usable_scales
from ryzen_compile.numerics.search.rtn import SEARCH_ELEMENTS, Grid, offsets_of, search_blocks

POWER = 0.7  # p, as in the paper
ROUNDS = 12
STIFFNESS, GROWTH = 30.0, 1.1  # beta of the penalty |e - error|² in units of the block's rms, and its factor per round


def half_quadratic(w: Tensor, form: BlockFormat) -> BlockTensor:
    """``w`` (N, K) on grids of small ``|error| ** POWER``; none is worse by it than the grid of least squares."""
    check_weight(w)
    scales = torch.empty(w.shape[0], form.blocks(w.shape[1]), device=w.device)
    zero_points = None if form.symmetric else torch.empty(scales.shape, dtype=torch.uint8, device=w.device)
    step = max(1, SEARCH_ELEMENTS // max(1, w.shape[1]))
    for start in range(0, w.shape[0], step):
        part = slice(start, start + step)
        found = _search(blocks_of(w[part], form.block), form)
        scales[part] = found[0]
        if zero_points is not None and found[1] is not None:
            zero_points[part] = found[1].to(torch.uint8)
    return quantize(w, form, scales, zero_points)


def _search(blocks: Tensor, form: BlockFormat) -> Grid:
    scales, zeros = search_blocks(blocks, form)
    most = usable_scales(blocks.abs().amax(-1, keepdim=True))
    unit = most[..., 0] * usable_scales((blocks / most).square().mean(-1).sqrt())  # the root mean square
    blocks, scales = blocks / unit[..., None], scales / unit
    zeros = None if zeros is None else zeros.float()
    best, best_zeros, least = scales, zeros, torch.full_like(scales, torch.inf)
    stiffness = STIFFNESS
    for _ in range(ROUNDS):
        offsets = offsets_of(blocks, scales, zeros, form)
        error = blocks - offsets * scales[..., None]
        loss = error.abs().pow(POWER).sum(-1)
        better = loss < least
        least, best = torch.where(better, loss, least), torch.where(better, scales, best)
        if zeros is not None and best_zeros is not None:
            best_zeros = torch.where(better, zeros, best_zeros)
        target = blocks - _shrink(error, stiffness)
        scales, zeros = _fit(target, offsets, scales, zeros, form)
        stiffness *= GROWTH
    return usable_scales(best * unit), best_zeros


def _shrink(error: Tensor, stiffness: float) -> Tensor:
    """The minimizer e of ``|e| ** p + stiffness / 2 * (e - error) ** 2``, approximated as in the paper."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-8).pow(POWER - 1) / stiffness).clamp(min=0)


def _fit(target: Tensor, offsets: Tensor, scales: Tensor, zeros: Tensor | None, form: BlockFormat) -> Grid:
    if zeros is not None:
        moved = (zeros + (offsets - target / scales[..., None]).mean(-1)).round()
        moved = moved.clamp(0, (1 << form.bits) - 1)
        offsets, zeros = offsets + (zeros - moved)[..., None], moved
    size = offsets.square().sum(-1)
    fitted = (offsets * target).sum(-1) / size
    return torch.where((size > 0) & (fitted != 0), fitted, scales), zeros
