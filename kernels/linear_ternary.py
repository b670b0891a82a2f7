"""Ternary linear layers on a GPU: the Triton kernels of ``ryzen::linear_ternary`` (BitNet b1.58, Ma et al., 2024).

Activations are rounded once, then all products are exact integers, whose sums are the same in any order: results are
equal to the reference's to the bit. A byte's four weights belong to four phases, each multiplied by the activations
that stand there, which were laid out by phase when they were rounded. So weights are never moved: a word shifted and
masked is four of them, as the tensor cores take them. They are multiplied as 0, 1 and 2, and the row's sum is
subtracted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ryzen_compile.errors import UnsupportedError
from ryzen_compile.kernels import launch
from ryzen_compile.numerics.ternary import SMALLEST_MAXIMUM, expect_fit

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FEW = 32  # rows at most that wait for weights
CHANNELS = 2048  # that rounded rows are filled up to a multiple of: every block below divides it
PIECE = 4096  # channels that are rounded at a time
LEAST = tl.constexpr(SMALLEST_MAXIMUM)
HALVES = tl.constexpr(1.5 * 2**23)  # a float32 this far up has no halves: adding it rounds to nearest even


@triton.jit
def _round_kernel(
    x: tl.tensor,  # (M, C)
    codes: tl.tensor,  # (M, 4, row_bytes) int8: of channel c at (c % 4, c // 4), then zeros
    steps: tl.tensor,  # (M,) float32
    sums: tl.tensor,  # (M,) int32
    C: tl.tensor,
    row_bytes: tl.tensor,
    BYTES: tl.constexpr,  # of one phase, at a time
) -> None:
    row = tl.program_id(0).to(tl.int64)
    byte = tl.arange(0, BYTES)[:, None]
    phase = tl.arange(0, 4)[None, :]
    channel = byte * 4 + phase
    most = tl.zeros((BYTES, 4), tl.int32)  # of magnitudes as integers: a NaN is above every number and not lost
    for start in range(0, C, BYTES * 4):
        value = tl.load(x + row * C + start + channel, mask=start + channel < C, other=0.0).to(tl.float32)
        most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    bits = tl.max(tl.max(most, 1), 0)
    largest = bits.to(tl.float32, bitcast=True)
    finite = bits < 0x7F800000
    usable = finite & (largest >= LEAST)
    inverse = tl.where(usable, tl.div_rn(127.0, tl.where(usable, largest, 1.0)), 0.0)
    total = tl.zeros((BYTES, 4), tl.int32)
    for start in range(0, row_bytes * 4, BYTES * 4):
        value = tl.load(x + row * C + start + channel, mask=start + channel < C, other=0.0).to(tl.float32)
        code = (tl.where(usable, value, 0.0) * inverse + HALVES) - HALVES
        total += code.to(tl.int32)
        at = start // 4 + byte
        tl.store(codes + (row * 4 + phase) * row_bytes + at, code.to(tl.int8), mask=at < row_bytes)
    step = tl.where(usable, tl.div_rn(largest, 127.0), tl.where(finite, 0.0, float("nan")))
    tl.store(steps + row, step)
    tl.store(sums + row, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def _store(
    total: tl.tensor,  # (m, n) int32: products with 0, 1 and 2
    steps: tl.tensor,  # (M,) float32
    sums: tl.tensor,  # (M,) int32
    scale: tl.tensor,  # (N,) float32, or one
    out: tl.tensor,  # (M, N)
    row: tl.tensor,  # (m,) int64
    col: tl.tensor,  # (n,)
    M: tl.tensor,
    N: tl.tensor,
    SCALES: tl.constexpr,  # one for each row of the weight
) -> None:
    step = tl.load(steps + row, mask=row < M, other=0.0)[:, None]
    exact = total - tl.load(sums + row, mask=row < M, other=0)[:, None]
    weight = col if SCALES else col * 0
    by = tl.load(scale + weight, mask=col < N, other=0.0)[None, :]
    value = exact.to(tl.float32) * step * by
    mask = (row < M)[:, None] & (col < N)[None, :]
    tl.store(out + row[:, None] * N + col[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _few_rows_kernel(
    codes: tl.tensor,  # (M, 4, row_bytes) int8
    steps: tl.tensor,
    sums: tl.tensor,
    packed: tl.tensor,  # (N, words) int32
    scale: tl.tensor,
    out: tl.tensor,  # (M, N)
    M: tl.tensor,  # ROWS at most
    N: tl.tensor,
    row_bytes: tl.tensor,
    words: tl.tensor,
    SCALES: tl.constexpr,
    WORDS: tl.constexpr,  # of a slice
    SLICES: tl.constexpr,  # at a time, shared out among warps
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,  # reads ahead
    INTERPRETED: tl.constexpr,
) -> None:
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight = tl.minimum(col, N - 1).to(tl.int64)  # int64: its products with a row's size overflow int32
    part = tl.arange(0, SLICES)[:, None, None]
    row = tl.arange(0, ROWS)[None, :, None]
    word = part * WORDS + tl.arange(0, WORDS)[None, None, :]
    byte = part * (4 * WORDS) + tl.arange(0, 4 * WORDS)[None, None, :]
    real = (row < M) & (byte >= 0)
    word_at = packed + (weight * words)[None, :, None] + word
    total = tl.zeros((SLICES, ROWS, BLOCK_N), tl.int32)
    for start in tl.range(0, words, SLICES * WORDS, num_stages=STAGES):
        held = tl.load(word_at + start, mask=start + word < words, other=0)
        for phase in tl.static_range(4):
            at = codes + (row * 4 + phase) * row_bytes + byte + start * 4
            four = (held >> (2 * phase)) & 0x03030303
            if not INTERPRETED:  # or LLVM masks the bytes one by one
                four = tl.inline_asm_elementwise(
                    "mov.b32 $0, $1;", "=r,r", [four], dtype=tl.int32, is_pure=True, pack=1
                )
            even = tl.join(four.to(tl.int8), (four >> 16).to(tl.int8))
            odd = tl.join((four >> 8).to(tl.int8), (four >> 24).to(tl.int8))
            b = tl.reshape(tl.join(even, odd), (SLICES, BLOCK_N, 4 * WORDS))
            total = tl.dot(tl.load(at, mask=real, other=0), tl.permute(b, (0, 2, 1)), total, out_dtype=tl.int32)
    rows = tl.arange(0, ROWS).to(tl.int64)
    _store(tl.sum(total, 0), steps, sums, scale, out, rows, col, M, N, SCALES)


@triton.jit
def _tiles_kernel(
    codes: tl.tensor,  # (M, 4, row_bytes) int8
    steps: tl.tensor,
    sums: tl.tensor,
    packed: tl.tensor,  # (N, packed_bytes) uint8
    scale: tl.tensor,
    out: tl.tensor,  # (M, N)
    M: tl.tensor,
    N: tl.tensor,
    row_bytes: tl.tensor,
    packed_bytes: tl.tensor,
    SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # bytes
) -> None:
    down = tl.cdiv(M, BLOCK_M)
    row = (tl.program_id(0) % down).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) // down * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.arange(0, BLOCK_K)
    code_at = codes + (tl.minimum(row, M - 1) * 4 * row_bytes)[:, None] + byte[None, :]
    byte_at = packed + (tl.minimum(col, N - 1).to(tl.int64) * packed_bytes)[:, None] + byte[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, packed_bytes, BLOCK_K):
        held = tl.load(byte_at + start, mask=(byte < packed_bytes - start)[None, :], other=0)
        for phase in tl.static_range(4):
            b = ((held >> (2 * phase)) & 3).to(tl.int8)
            total = tl.dot(tl.load(code_at + phase * row_bytes + start), tl.trans(b), total, out_dtype=tl.int32)
    _store(total, steps, sums, scale, out, row, col, M, N, SCALES)


def linear_ternary(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """The operator ``ryzen::linear_ternary``: ``x`` (..., C), ``packed`` (N, ceil(C / 4)) uint8, ``scale`` () or (N,)
    float32 -> (..., N). A code 3 counts as +2.

    Raises ``UsageError`` for tensors that do not fit together, ``UnsupportedError`` for ``x`` of other types than
    float32, float16 and bfloat16 and for tensors that are not on a GPU (unless Triton interprets its kernels).
    """
    expect_fit(x, packed, scale)
    if x.dtype not in FLOATS or scale.dtype != torch.float32:
        raise UnsupportedError(
            f"linear_ternary: x must be float32, float16 or bfloat16 and scale float32, got {x.dtype} and {scale.dtype}"
        )
    device = launch.expect_device("linear_ternary", x=x, packed=packed, scale=scale)
    out = launch.empty((*x.shape[:-1], packed.shape[0]), x.dtype, device)
    if out.numel():
        with launch.on(x):
            rounded = _rounded(x.reshape(-1, x.shape[-1]).contiguous())
            _multiply(rounded, packed.contiguous(), scale.contiguous(), out.view(-1, packed.shape[0]))
    return out


Rounded = tuple[Tensor, Tensor, Tensor]  # codes (M, 4, row bytes), steps (M,), sums (M,)


def _rounded(x: Tensor) -> Rounded:
    (count, width), device = x.shape, x.device
    row_bytes = triton.cdiv(width, CHANNELS) * CHANNELS // 4
    codes = launch.empty((count, 4, row_bytes), torch.int8, device)
    steps, sums = launch.empty((count,), torch.float32, device), launch.empty((count,), torch.int32, device)
    piece = CHANNELS if width <= CHANNELS else PIECE
    _round_kernel[(count,)](
        x,
        codes,
        steps,
        sums,
        width,
        row_bytes,
        BYTES=piece // 4,
        num_warps=launch.warps(piece),
        enable_fp_fusion=False,  # a product is rounded before it is rounded to an integer
    )
    return codes, steps, sums


def _multiply(rounded: Rounded, packed: Tensor, scale: Tensor, out: Tensor) -> None:
    count, (rows, packed_bytes) = len(out), packed.shape
    few = count <= FEW and packed_bytes % 4 == 0 and packed.storage_offset() % 4 == 0
    constants = {"SCALES": scale.ndim == 1} | ({"INTERPRETED": launch.interpreted()} if few else {})
    held = packed.view(torch.int32) if few else packed
    sizes = (count, rows, rounded[0].shape[2], held.shape[1])

    def run(config: triton.Config) -> None:
        if few:
            kernel, grid = _few_rows_kernel, triton.cdiv(rows, config.kwargs["BLOCK_N"])
        else:
            kernel, down = _tiles_kernel, triton.cdiv(count, config.kwargs["BLOCK_M"])
            grid = down * triton.cdiv(rows, config.kwargs["BLOCK_N"])
        kernel[(grid,)](*rounded, held, scale, out, *sizes, **constants, **config.all_kwargs())

    key = ("few" if few else "tiles", out.dtype, *map(launch.bucket, (count, rows, packed_bytes)))
    run(launch.tuned("linear_ternary", key, _few_rows(count, rows) if few else _tiles(count), run, out.device))


def _few_rows(count: int, rows: int) -> list[triton.Config]:
    """(rows of the weight, slices of 128 channels, warps, stages): wide where every processor has some nevertheless."""
    narrow = [(16, 8, 4, 4), (16, 16, 8, 3)]
    wide = [(32, 8, 4, 3), (32, 8, 4, 4), (32, 16, 8, 3), (64, 8, 4, 3)]
    return [
        triton.Config(
            {"WORDS": 8, "SLICES": slices, "ROWS": 16 if count <= 16 else FEW, "BLOCK_N": block, "STAGES": stages},
            num_warps=warps,
            num_stages=stages,
        )
        for block, slices, warps, stages in (wide + narrow if rows >= 8192 else narrow + wide)
    ]


def _tiles(count: int) -> list[triton.Config]:
    if count <= 64:
        shapes = [(32, 64, 64, 4, 4), (64, 64, 64, 4, 4), (64, 128, 64, 4, 3)]
    else:
        shapes = [(64, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4)]
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in shapes
    ]
