"""RMSNorm and LayerNorm on a GPU, alone and behind a residual addition: the Triton kernels of ``ryzen::rms_norm``,
``ryzen::add_rms_norm``, ``ryzen::layer_norm`` and ``ryzen::add_layer_norm``.

They wait for memory. A row that fits registers is read once; narrow ones share a program. Wider ones are walked in
pieces twice, the second time out of the L2 cache. The variance is that of centred values: of squares less the squared
mean nothing would be left where the mean is large. The gradients are in ``norm_backward.py``.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.kernels import launch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WHOLE = 16384  # elements of the widest row that a program holds at once
TILE = 2048  # elements, up to which narrow rows share a program
PER_WARP = 512  # elements of a tile: 16 for each thread
PIECES = (triton.Config({"BLOCK": 8192}, num_warps=16), triton.Config({"BLOCK": 4096}, num_warps=8))


@triton.jit
def load_scale(
    weight: tl.tensor,  # (C,)
    col: tl.tensor,
    inside: tl.tensor,
    UNIT_OFFSET: tl.constexpr,
) -> tl.tensor:  # float32
    scale = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        scale += 1.0
    return scale


@triton.jit
def _load_sum(
    x: tl.tensor,
    residual: tl.tensor | None,
    total: tl.tensor,  # where the sum goes, none without a residual
    place: tl.tensor,
    inside: tl.tensor,
) -> tl.tensor:  # float32; 0 outside
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)  # what is normalised is what the residual stream reads again
        tl.store(total + place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    return value


@triton.jit
def row_statistics(
    x: tl.tensor,  # (rows, C)
    residual: tl.tensor | None,  # (rows, C), added
    total: tl.tensor | None,  # (rows, C), where the sum goes
    start: tl.tensor,  # of the row
    C: tl.tensor,
    eps: tl.tensor,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # mean, 0 unless CENTRED, and 1 / standard deviation or 1 / root mean square
    """Of a row in pieces: every lane keeps the mean and the spread of what it saw (Welford, 1962), merged at the end
    (Chan, Golub and LeVeque, 1979)."""
    lane = tl.arange(0, BLOCK)
    centre = tl.zeros((BLOCK,), tl.float32)
    spread = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, C, BLOCK):
        inside = begin + lane < C
        value = _load_sum(x, residual, total, start + begin + lane, inside)
        if CENTRED:
            delta = tl.where(inside, value - centre, 0.0)
            centre += delta / (begin // BLOCK + 1)
            spread += delta * (value - centre)
        else:
            spread += value * value
    mean = 0.0
    if CENTRED:
        seen = ((C - lane + BLOCK - 1) // BLOCK).to(tl.float32)
        mean = tl.sum(centre * seen, 0) / C
        spread += seen * (centre - mean) * (centre - mean)
    return mean, tl.rsqrt(tl.sum(spread, 0) / C + eps)


@triton.jit
def _norm_kernel(
    x: tl.tensor,  # (rows, C) contiguous, as all of this shape
    residual: tl.tensor | None,  # (rows, C), added
    weight: tl.tensor | None,  # (C,)
    bias: tl.tensor | None,  # (C,)
    y: tl.tensor,  # (rows, C)
    total: tl.tensor | None,  # (rows, C), the sum, where there is a residual
    rows: tl.tensor,
    C: tl.tensor,
    eps: tl.tensor,
    CENTRED: tl.constexpr,  # LayerNorm
    UNIT_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,  # of one program
    BLOCK: tl.constexpr,  # a power of two, C or more
) -> None:
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    known = col < C
    inside = (row < rows) & known
    place = row * C + col
    value = _load_sum(x, residual, total, place, inside)
    if weight is not None:
        scale = load_scale(weight, col, known, UNIT_OFFSET)  # before the sums: it comes while they wait
    if CENTRED:
        mean = tl.sum(value, 1, keep_dims=True) / C
        value = tl.where(known, value - mean, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / C + eps)
    if weight is not None:
        value *= scale
    if bias is not None:
        value += tl.load(bias + col, mask=known, other=0.0).to(tl.float32)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_pieces_kernel(
    x: tl.tensor,  # as above
    residual: tl.tensor | None,
    weight: tl.tensor | None,
    bias: tl.tensor | None,
    y: tl.tensor,
    total: tl.tensor | None,
    C: tl.tensor,
    eps: tl.tensor,
    CENTRED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,  # of one piece, a power of two
) -> None:
    start = tl.program_id(0).to(tl.int64) * C
    mean, rstd = row_statistics(x, residual, total, start, C, eps, CENTRED, BLOCK)
    if residual is not None:
        tl.debug_barrier()  # the sum is read again, by whichever thread
    for begin in range(0, C, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        inside = col < C
        if residual is not None:
            value = tl.load(total + start + col, mask=inside, other=0.0).to(tl.float32)
        else:
            value = tl.load(x + start + col, mask=inside, other=0.0).to(tl.float32)
        value = (value - mean) * rstd
        if weight is not None:
            value *= load_scale(weight, col, inside, UNIT_OFFSET)
        if bias is not None:
            value += tl.load(bias + col, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + start + col, value.to(y.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> Tensor:
    """The operator ``ryzen::rms_norm``: ``x`` (..., C) float32, float16 or bfloat16, ``weight`` (C,) -> (..., C).

    Raises ``UsageError`` for shapes that do not fit together, ``UnsupportedError`` for other types and for tensors that
    are not on a GPU (unless Triton interprets its kernels); so do those below.
    """
    device = expect_norm("rms_norm", x, weight)
    y = launch.empty(x.shape, x.dtype, device)
    _launch(x, None, weight, None, y, None, eps, unit_offset, centred=False)
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    """The operator ``ryzen::add_rms_norm``: two of (..., C), alike -> the norm of their sum, and the sum."""
    device = expect_norm("add_rms_norm", x, weight, residual=residual)
    y, total = launch.empty(x.shape, x.dtype, device), launch.empty(x.shape, x.dtype, device)
    _launch(x, residual, weight, None, y, total, eps, unit_offset, centred=False)
    return y, total


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The operator ``ryzen::layer_norm``: ``x`` (..., C), ``weight`` and ``bias`` (C,) -> (..., C)."""
    device = expect_norm("layer_norm", x, weight, bias)
    y = launch.empty(x.shape, x.dtype, device)
    _launch(x, None, weight, bias, y, None, eps, False, centred=True)
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The operator ``ryzen::add_layer_norm``: two of (..., C), alike -> the norm of their sum, and the sum."""
    device = expect_norm("add_layer_norm", x, weight, bias, residual=residual)
    y, total = launch.empty(x.shape, x.dtype, device), launch.empty(x.shape, x.dtype, device)
    _launch(x, residual, weight, bias, y, total, eps, False, centred=True)
    return y, total


def expect_norm(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None = None, **alike: Tensor | None
) -> torch.device:
    """The device of tensors that fit together: ``x`` (..., C), ``weight`` and ``bias`` (C,), others as ``x``."""
    if x.ndim == 0:
        raise UsageError(f"{op}: x must be (..., C), got ()")
    for name, tensor in {"x": x, "weight": weight, "bias": bias}.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise UnsupportedError(f"{op}: {name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise UsageError(f"{op}: {name} must be ({x.shape[-1]},), got {tuple(tensor.shape)}")
    for name, tensor in alike.items():
        if tensor is not None and (tensor.shape != x.shape or tensor.dtype != x.dtype):
            got = f"{tuple(tensor.shape)} in {tensor.dtype}"
            raise UsageError(f"{op}: {name} must be as x is, {tuple(x.shape)} in {x.dtype}, got {got}")
    return launch.expect_device(op, x=x, weight=weight, bias=bias, **alike)


@functools.cache
def _shapes(block: int, rows: int) -> tuple[triton.Config, ...]:
    """Candidates for rows that fit ``block`` elements, ``rows`` in all or fewer: powers of two."""
    share = max(min(TILE // block, rows), 1)
    warps = min(max(share * block // PER_WARP, 1), 16)
    tries = ((share, warps), (share, 2 * warps), (share, max(warps // 2, 1)), (max(share // 2, 1), max(warps // 2, 1)))
    return tuple(triton.Config({"ROWS": share}, num_warps=warps) for share, warps in dict.fromkeys(tries))


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    total: Tensor | None,
    eps: float,
    unit_offset: bool,
    *,
    centred: bool,
) -> None:
    if not x.numel():
        return
    C = x.shape[-1]
    rows, block = x.numel() // C, launch.bucket(C)
    tensors = [None if t is None else t.contiguous() for t in (x, residual, weight, bias, y, total)]
    forms = {"CENTRED": centred, "UNIT_OFFSET": unit_offset}

    def run(config: triton.Config) -> None:
        chosen = {**forms, **config.kwargs, "num_warps": config.num_warps}
        if block <= WHOLE:
            grid = (triton.cdiv(rows, config.kwargs["ROWS"]),)
            _norm_kernel[grid](*tensors, rows, C, eps, BLOCK=block, **chosen)
        else:
            _norm_pieces_kernel[(rows,)](*tensors, C, eps, **chosen)

    candidates = _shapes(block, launch.bucket(rows)) if block <= WHOLE else PIECES
    key = (x.dtype, centred, residual is not None, block, launch.bucket(rows))
    with launch.on(x):
        run(launch.tuned("norm", key, candidates, run, x.device))
