"""The gradients of RMSNorm and LayerNorm on a GPU: the Triton kernels of ``ryzen::rms_norm_backward`` and
``ryzen::layer_norm_backward``.

A weight's gradient is a sum over all rows. As many programs as the GPU has room for each walk several rows and keep
their part of it in registers; a second, small kernel adds the parts. Nothing is cleared beforehand and nothing is added
atomically: the order of sums is fixed, and with it every bit of the result. A row's statistics are computed again, for
the row is read anyway. Rows too wide for registers are read by one kernel for their own gradient, which leaves the
statistics behind, and by another down the columns for the weight's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ryzen_compile.kernels import launch
from ryzen_compile.kernels.norm import PIECES, expect_norm, load_scale, row_statistics

WHOLE = 8192  # elements of the widest row that a program holds at once, beside its part of the sums
TILE = 2048  # elements, up to which narrow rows share a step
PER_WARP = 512  # elements of a tile: 16 for each thread
WARPS = 16  # of a multiprocessor, over all its programs: 128 registers for each thread
COLUMNS = (16, 256, 8)  # rows and columns of a tile that goes down the columns of x, its warps
PARTS = (128, 32, 8)  # of one that adds the parts


@triton.jit
def _norm_backward_kernel(
    grad: tl.tensor,  # (rows, C) contiguous, as all of this shape
    x: tl.tensor,  # (rows, C)
    weight: tl.tensor | None,  # (C,)
    extra: tl.tensor | None,  # (rows, C), added to dx
    dx: tl.tensor,  # (rows, C)
    parts: tl.tensor,  # (gradients, programs, C) float32: of the weight, then of the bias, where they are wanted
    rows: tl.tensor,
    C: tl.tensor,
    eps: tl.tensor,
    CENTRED: tl.constexpr,  # LayerNorm
    UNIT_OFFSET: tl.constexpr,
    WEIGHT: tl.constexpr,  # whether its gradient is wanted
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,  # of one step
    BLOCK: tl.constexpr,  # a power of two, C or more
    STAGES: tl.constexpr,  # steps whose rows are on their way at once
) -> None:
    col = tl.arange(0, BLOCK)[None, :]
    known = col < C
    if weight is not None:
        scale = load_scale(weight, col, known, UNIT_OFFSET)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (step * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & known
        place = row * C + col
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        scaled = g
        if weight is not None:
            scaled = g * scale
        if CENTRED:
            value = tl.where(inside, value - tl.sum(value, 1, keep_dims=True) / C, 0.0)
        rstd = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / C + eps)
        along = tl.sum(scaled * value, 1, keep_dims=True) * rstd / C
        if CENTRED:
            scaled -= tl.sum(scaled, 1, keep_dims=True) / C
        normed = tl.where(inside, value * rstd, 0.0)  # without an eps, rstd is infinite in a row behind the last
        result = rstd * (scaled - normed * along)
        if extra is not None:
            result += tl.load(extra + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask=inside)
        if WEIGHT:
            dweight += g * normed
        if BIAS:
            dbias += g
    part = parts + tl.program_id(0).to(tl.int64) * C + col
    if WEIGHT:
        tl.store(part, tl.sum(dweight, 0, keep_dims=True), mask=known)
        part += tl.num_programs(0).to(tl.int64) * C
    if BIAS:
        tl.store(part, tl.sum(dbias, 0, keep_dims=True), mask=known)


@triton.jit
def _norm_backward_pieces_kernel(
    grad: tl.tensor,  # as above
    x: tl.tensor,
    weight: tl.tensor | None,
    extra: tl.tensor | None,
    dx: tl.tensor,
    means: tl.tensor | None,  # (rows,) float32, written when CENTRED
    rstds: tl.tensor,  # (rows,) float32, written
    C: tl.tensor,
    eps: tl.tensor,
    CENTRED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,  # of one piece, a power of two
) -> None:
    row = tl.program_id(0).to(tl.int64)
    start = row * C
    mean, rstd = row_statistics(x, None, None, start, C, eps, CENTRED, BLOCK)
    tl.store(rstds + row, rstd)
    if CENTRED:
        tl.store(means + row, mean)
    along = tl.zeros((BLOCK,), tl.float32)
    level = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, C, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        inside = col < C
        scaled = tl.load(grad + start + col, mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            scaled *= load_scale(weight, col, inside, UNIT_OFFSET)
        value = tl.load(x + start + col, mask=inside, other=0.0).to(tl.float32)
        along += tl.where(inside, scaled * (value - mean), 0.0)
        level += scaled
    slope = tl.sum(along, 0) * rstd / C
    shift = tl.sum(level, 0) / C if CENTRED else 0.0
    for begin in range(0, C, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        inside = col < C
        scaled = tl.load(grad + start + col, mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            scaled *= load_scale(weight, col, inside, UNIT_OFFSET)
        value = tl.load(x + start + col, mask=inside, other=0.0).to(tl.float32)
        result = rstd * (scaled - shift - (value - mean) * rstd * slope)
        if extra is not None:
            result += tl.load(extra + start + col, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + start + col, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _column_parts_kernel(
    grad: tl.tensor,  # (rows, C)
    x: tl.tensor,  # (rows, C)
    means: tl.tensor | None,  # (rows,) float32, read when CENTRED
    rstds: tl.tensor,  # (rows,) float32
    parts: tl.tensor,  # (gradients, programs in the second dimension, C) float32, as above
    rows: tl.tensor,
    C: tl.tensor,
    CENTRED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    known = col < C
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = (step * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        place = row[:, None] * C + col
        inside = (row < rows)[:, None] & known
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        if WEIGHT:
            value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            if CENTRED:
                value -= tl.load(means + row, mask=row < rows, other=0.0)[:, None]
            dweight += g * value * tl.load(rstds + row, mask=row < rows, other=0.0)[:, None]
        if BIAS:
            dbias += g
    part = parts + tl.program_id(1).to(tl.int64) * C + col
    if WEIGHT:
        tl.store(part, tl.sum(dweight, 0, keep_dims=True), mask=known)
        part += tl.num_programs(1).to(tl.int64) * C
    if BIAS:
        tl.store(part, tl.sum(dbias, 0, keep_dims=True), mask=known)


@triton.jit
def _add_parts_kernel(
    parts: tl.tensor,  # (gradients, count, C) float32, the second dimension of programs choosing among gradients
    first: tl.tensor,  # (C,)
    second: tl.tensor,  # (C,)
    count: tl.tensor,
    C: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    known = col < C
    which = tl.program_id(1).to(tl.int64) * count
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, count, ROWS):
        row = begin + tl.arange(0, ROWS)[:, None]
        total += tl.load(parts + (which + row) * C + col, mask=(row < count) & known, other=0.0)
    result = tl.sum(total, 0, keep_dims=True)
    if tl.program_id(1) == 0:
        tl.store(first + col, result.to(first.dtype.element_ty), mask=known)
    else:
        tl.store(second + col, result.to(second.dtype.element_ty), mask=known)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, extra: Tensor | None, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    """The operator ``ryzen::rms_norm_backward``: ``grad``, ``x`` and ``extra`` alike (..., C), ``weight`` (C,) ->
    ``dx`` (..., C) and ``dweight`` (C,), which is (0,) without a weight.

    Raises ``UsageError`` for shapes that do not fit together, ``UnsupportedError`` for types but float32, float16 and
    bfloat16 and for tensors that are not on a GPU (unless Triton interprets its kernels); so does the next.
    """
    expect_norm("rms_norm_backward", x, weight, grad=grad, extra=extra)
    forms = {"CENTRED": False, "UNIT_OFFSET": unit_offset, "WEIGHT": weight is not None, "BIAS": False}
    return _backward(grad, x, weight, extra, eps, forms)[:2]


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias_is_there: bool, extra: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``ryzen::layer_norm_backward``: as above, and ``dbias`` (C,) or (0,) -> ``dx, dweight, dbias``."""
    expect_norm("layer_norm_backward", x, weight, grad=grad, extra=extra)
    forms = {"CENTRED": True, "UNIT_OFFSET": False, "WEIGHT": weight is not None, "BIAS": bias_is_there}
    return _backward(grad, x, weight, extra, eps, forms)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, extra: Tensor | None, eps: float, forms: dict[str, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    C = x.shape[-1]
    dtype = x.dtype if weight is None else weight.dtype
    dx = launch.empty(x.shape, x.dtype, x.device)
    dweight, dbias = (launch.empty((C if forms[name] else 0,), dtype, x.device) for name in ("WEIGHT", "BIAS"))
    if not x.numel():
        return dx, dweight.zero_(), dbias.zero_()
    rows, block = x.numel() // C, launch.bucket(C)
    tensors = [None if t is None else t.contiguous() for t in (grad, x, weight, extra, dx)]
    wanted = [tensor for tensor in (dweight, dbias) if tensor.numel()]

    def run(config: triton.Config) -> None:
        parts = (_launch_whole if block <= WHOLE else _launch_pieces)(tensors, eps, forms, config)
        if wanted:
            _launch_sums(parts, wanted)

    candidates = _shapes(block, launch.bucket(rows)) if block <= WHOLE else PIECES
    key = (x.dtype, *forms.values(), extra is not None, block, launch.bucket(rows))
    with launch.on(x):
        run(launch.tuned("norm_backward", key, candidates, run, x.device))
    return dx, dweight, dbias


@functools.cache
def _shapes(block: int, rows: int) -> tuple[triton.Config, ...]:
    """Candidates for rows that fit ``block`` elements, ``rows`` in all or fewer; FILL programs a multiprocessor."""
    share = max(min(TILE // block, rows), 1)
    warps = min(max(share * block // PER_WARP, 1), 16)
    fill = WARPS // warps
    tries = ((warps, fill, 1), (warps, 2 * fill, 1), (warps, fill, 2), (warps, fill, 3), (2 * warps, fill, 2))
    return tuple(
        triton.Config({"ROWS": share, "FILL": fill, "STAGES": stages}, num_warps=warps) for warps, fill, stages in tries
    )


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _launch_whole(tensors: list[Any], eps: float, forms: dict[str, bool], config: triton.Config) -> Tensor:
    """Rows that fit registers; returns the parts of sums (gradients, programs, C)."""
    rows, C = tensors[0].numel() // tensors[0].shape[-1], tensors[0].shape[-1]
    chosen = config.kwargs | {"BLOCK": launch.bucket(C), "num_warps": config.num_warps}
    count = min(triton.cdiv(rows, chosen["ROWS"]), _processors(tensors[0].device) * chosen.pop("FILL"))
    parts = launch.empty((forms["WEIGHT"] + forms["BIAS"], count, C), torch.float32, tensors[0].device)
    _norm_backward_kernel[(count,)](*tensors, parts, rows, C, eps, **forms, **chosen)
    return parts


def _launch_pieces(tensors: list[Any], eps: float, forms: dict[str, bool], config: triton.Config) -> Tensor:
    """Wider ones, as above."""
    grad, x, weight, extra, dx = tensors
    rows, C, device = x.numel() // x.shape[-1], x.shape[-1], x.device
    rstds = launch.empty((rows,), torch.float32, device)
    means = launch.empty((rows,), torch.float32, device) if forms["CENTRED"] else None
    chosen = config.kwargs | {name: forms[name] for name in ("CENTRED", "UNIT_OFFSET")}
    _norm_backward_pieces_kernel[(rows,)](
        grad, x, weight, extra, dx, means, rstds, C, eps, **chosen, num_warps=config.num_warps
    )
    high, wide, warps = COLUMNS
    across = triton.cdiv(C, wide)
    down = min(triton.cdiv(rows, high), max(_processors(device) * 32 // warps // across, 1))
    parts = launch.empty((forms["WEIGHT"] + forms["BIAS"], down, C), torch.float32, device)
    if parts.numel():
        chosen = {"ROWS": high, "BLOCK": wide} | {name: forms[name] for name in ("CENTRED", "WEIGHT", "BIAS")}
        _column_parts_kernel[(across, down)](grad, x, means, rstds, parts, rows, C, **chosen, num_warps=warps)
    return parts


def _launch_sums(parts: Tensor, wanted: list[Tensor]) -> None:
    gradients, count, C = parts.shape
    high, wide, warps = PARTS
    _add_parts_kernel[(triton.cdiv(C, wide), gradients)](
        parts, wanted[0], wanted[-1], count, C, ROWS=high, BLOCK=wide, num_warps=warps
    )
