"""Linear layers on a GPU: the launchers of ``ryzen::linear_act`` and ``ryzen::gated_linear``, which let torch multiply
and run an activation's kernel behind it, and of ``ryzen::linear_nbits``.

Integer weights are multiplied in one of three ways. Few rows of ``x`` have a kernel of their own (``linear_few_rows``).
More of them are a product of tiles, decoded to the type of ``x`` on the way. Of many rows, decoding is a small part:
weights are decoded first, some rows at a time, and torch multiplies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.kernels import activation, launch, linear_few_rows
from ryzen_compile.kernels.embedding import stored_blocks
from ryzen_compile.numerics.blockwise import BlockTensor
from ryzen_compile.ops.activation import expect_activation

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MANY = 256  # rows from which on decoding first is worth its memory, where that was not measured
DECODED = 1 << 25  # weights that are decoded at a time


@triton.jit
def _codes(held: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Bytes (N, n) -> (N, n * 8 / BITS) in order."""
    codes = held
    if BITS == 4:
        codes = tl.join(held & 15, held >> 4)
    if BITS == 2:
        codes = tl.join(tl.join(held & 3, (held >> 4) & 3), tl.join((held >> 2) & 3, held >> 6))
    return tl.reshape(codes, (held.shape[0], held.shape[1] * (8 // BITS)))


@triton.jit
def _weights(
    packed: tl.tensor,  # (N, row_bytes) uint8
    scales: tl.tensor,  # (N, blocks) float32
    zeros: tl.tensor | None,  # (N, zero_bytes) uint8
    row: tl.tensor,  # (n,) int64: its products with a row's size overflow int32
    start: tl.tensor,  # the first channel
    row_bytes: tl.tensor,
    blocks: tl.tensor,
    zero_bytes: tl.tensor,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,  # channels that share a scale
    BLOCK_K: tl.constexpr,
) -> tl.tensor:  # (n, BLOCK_K) float32
    SHARED: tl.constexpr = min(BLOCK, BLOCK_K)  # channels here that share a scale
    byte = start * BITS // 8 + tl.arange(0, BLOCK_K * BITS // 8)[None, :]
    block = start // BLOCK + tl.arange(0, BLOCK_K // SHARED)[None, :]
    there = block < blocks
    held = tl.load(packed + (row * row_bytes)[:, None] + byte, mask=byte < row_bytes, other=0)
    scale = tl.load(scales + (row * blocks)[:, None] + block, mask=there, other=0.0)
    codes = tl.reshape(_codes(held, BITS).to(tl.float32), (row.shape[0], BLOCK_K // SHARED, SHARED))
    if zeros is None:
        codes -= 1 << (BITS - 1)
    else:
        bit = block * BITS
        zero = tl.load(zeros + (row * zero_bytes)[:, None] + bit // 8, mask=there, other=0).to(tl.int32)
        codes -= ((zero >> (bit % 8)) & ((1 << BITS) - 1)).to(tl.float32)[:, :, None]
    return tl.reshape(codes * scale[:, :, None], (row.shape[0], BLOCK_K))


@triton.jit
def _tiles_kernel(
    x: tl.tensor,  # (M, C)
    packed: tl.tensor,  # (N, row_bytes) uint8
    scales: tl.tensor,  # (N, blocks) float32
    zeros: tl.tensor | None,  # (N, zero_bytes) uint8
    bias: tl.tensor | None,  # (N,)
    out: tl.tensor,  # (M, N)
    M: tl.tensor,
    N: tl.tensor,
    C: tl.tensor,
    row_bytes: tl.tensor,
    blocks: tl.tensor,
    zero_bytes: tl.tensor,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,  # channels that share a scale
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    down = tl.cdiv(M, BLOCK_M)
    row = (tl.program_id(0) % down).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) // down * BLOCK_N + tl.arange(0, BLOCK_N)
    weight = tl.minimum(col, N - 1).to(tl.int64)
    channel = tl.arange(0, BLOCK_K)
    x_at = x + (tl.minimum(row, M - 1) * C)[:, None] + channel[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        a = tl.load(x_at + start, mask=(channel < C - start)[None, :], other=0.0)
        b = _weights(packed, scales, zeros, weight, start, row_bytes, blocks, zero_bytes, BITS, BLOCK, BLOCK_K)
        b = b.to(a.dtype)
        if INTERPRETED:  # which has no arithmetic of bfloat16
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + weight).to(tl.float32)[None, :]
    mask = (row < M)[:, None] & (col < N)[None, :]
    tl.store(out + row[:, None] * N + col[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _decode_kernel(
    packed: tl.tensor,  # (N, row_bytes) uint8
    scales: tl.tensor,  # (N, blocks) float32
    zeros: tl.tensor | None,  # (N, zero_bytes) uint8
    out: tl.tensor,  # (N, C)
    N: tl.tensor,
    C: tl.tensor,
    row_bytes: tl.tensor,
    blocks: tl.tensor,
    zero_bytes: tl.tensor,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    along = tl.cdiv(C, BLOCK_K)
    row = (tl.program_id(0) // along).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(0) % along * BLOCK_K
    weight = tl.minimum(row, N - 1)
    value = _weights(packed, scales, zeros, weight, start, row_bytes, blocks, zero_bytes, BITS, BLOCK, BLOCK_K)
    channel = start + tl.arange(0, BLOCK_K)
    mask = (row < N)[:, None] & (channel < C)[None, :]
    tl.store(out + (row * C)[:, None] + channel[None, :], value.to(out.dtype.element_ty), mask=mask)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """The operator ``ryzen::linear_act``: ``x`` (..., C), ``weight`` (N, C), ``bias`` (N,), of one type -> (..., N).

    Raises ``UsageError`` for tensors that do not fit together and an unknown name, ``UnsupportedError`` for types other
    than float32, float16 and bfloat16 and for tensors that are not on a GPU (unless Triton interprets its kernels); so
    do those below.
    """
    product = _product("linear_act", x, weight, bias, act)
    return product if act == "none" else activation.activation(product, act)


def gated_linear(x: Tensor, weight: Tensor, act: str) -> Tensor:
    """The operator ``ryzen::gated_linear``: ``x`` (..., C), ``weight`` (2F, C), of one type -> (..., F)."""
    if weight.ndim == 2 and weight.shape[0] % 2:
        raise UsageError(f"gated_linear: weight must be (2F, C), a gate's rows and as many, got {tuple(weight.shape)}")
    return activation.gated_activation(_product("gated_linear", x, weight, None, act), act)


def linear_nbits(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, block: int
) -> Tensor:
    """The operator ``ryzen::linear_nbits``: ``x`` (..., C) times a ``BlockTensor`` (N, C), plus ``bias`` (N,) of the
    type of ``x`` -> (..., N)."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise UsageError(f"linear_nbits: x must be (..., C) with channels, got {tuple(x.shape)}")
    weight = stored_blocks("linear_nbits", packed, scales, zeros, bits, block, x.shape[-1])
    _expect_types("linear_nbits", x, bias=bias)
    _expect_bias("linear_nbits", bias, weight.shape[0])
    device = launch.expect_device("linear_nbits", x=x, packed=packed, scales=scales, zeros=zeros, bias=bias)
    out = launch.empty((*x.shape[:-1], weight.shape[0]), x.dtype, device)
    if out.numel():
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        bias = None if bias is None else bias.contiguous()
        flat = out.view(-1, weight.shape[0])
        if linear_few_rows.fits(rows, weight):
            linear_few_rows.few_rows(rows, weight, bias, flat)
        else:
            _rows(rows, weight, bias, flat)
    return out


def _rows(x: Tensor, weight: BlockTensor, bias: Tensor | None, out: Tensor) -> None:
    def run(config: triton.Config) -> None:
        (_tiles if "BLOCK_M" in config.kwargs else _decoded)(x, weight, bias, out, config)

    form = weight.format
    key = (x.dtype, form.stored_bits, form.block, form.symmetric, *map(launch.bucket, (*x.shape, len(out[0]))))
    with launch.on(x):
        run(launch.tuned("linear_nbits", key, _candidates(x), run, x.device))


def _candidates(x: Tensor) -> list[triton.Config]:
    decoded = triton.Config({"BLOCK_N": 8, "BLOCK_K": 256}, num_warps=4)
    if x.dtype == torch.float32:
        shapes = [(16, 32, 32, 4, 2)] if len(x) <= 16 else [(32, 64, 16, 4, 2)]
    elif len(x) <= 16:
        shapes = [(16, 64, 64, 4, 4), (16, 32, 128, 4, 4)]
    elif len(x) <= 64:
        shapes = [(64, 32, 64, 4, 4), (64, 64, 64, 4, 4), (64, 128, 64, 4, 3)]
    else:
        shapes = [(64, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3)]
    tiles = [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in shapes
    ]
    return [decoded, *tiles] if len(x) >= MANY else [*tiles, decoded]


def _stored(weight: BlockTensor) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """Its tensors, and the sizes of their rows, as kernels take them."""
    zero_bytes = 0 if weight.zeros is None else weight.zeros.shape[1]
    sizes = weight.packed.shape[1] * weight.packed.shape[2], weight.scales.shape[1], zero_bytes
    return (weight.packed, weight.scales, weight.zeros), sizes


def _tiles(x: Tensor, weight: BlockTensor, bias: Tensor | None, out: Tensor, config: triton.Config) -> None:
    tensors, sizes = _stored(weight)
    (count, width), rows, form = x.shape, weight.shape[0], weight.format
    grid = (triton.cdiv(count, config.kwargs["BLOCK_M"]) * triton.cdiv(rows, config.kwargs["BLOCK_N"]),)
    constants = {"BITS": form.stored_bits, "BLOCK": form.block, "INTERPRETED": launch.interpreted()}
    _tiles_kernel[grid](x, *tensors, bias, out, count, rows, width, *sizes, **constants, **config.all_kwargs())


def _decoded(x: Tensor, weight: BlockTensor, bias: Tensor | None, out: Tensor, config: triton.Config) -> None:
    width, form = x.shape[1], weight.format
    step = max(1, DECODED // width)
    for start in range(0, weight.shape[0], step):
        tensors, sizes = _stored(weight.rows(start, start + step))
        count = min(step, weight.shape[0] - start)
        held = launch.empty((count, width), x.dtype, x.device)
        grid = (triton.cdiv(count, config.kwargs["BLOCK_N"]) * triton.cdiv(width, config.kwargs["BLOCK_K"]),)
        _decode_kernel[grid](
            *tensors, held, count, width, *sizes, BITS=form.stored_bits, BLOCK=form.block, **config.all_kwargs()
        )
        part = out[:, start : start + count]
        if bias is None:
            torch.mm(x, held.t(), out=part)
        else:
            torch.addmm(bias[start : start + count], x, held.t(), out=part)


def _product(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    try:
        expect_activation(act)
    except ValueError as error:
        raise UsageError(f"{op}: {error}") from None
    _expect_types(op, x, weight=weight, bias=bias)
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise UsageError(f"{op}: x must be (..., C) and weight (N, C), got {tuple(x.shape)} and {tuple(weight.shape)}")
    _expect_bias(op, bias, weight.shape[0])
    launch.expect_device(op, x=x, weight=weight, bias=bias)
    return functional.linear(x, weight, bias)


def _expect_types(op: str, x: Tensor, **others: Tensor | None) -> None:
    if x.dtype not in FLOATS:
        raise UnsupportedError(f"{op}: x must be float32, float16 or bfloat16, got {x.dtype}")
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise UsageError(f"{op}: {name} must be of the type of x, {x.dtype}, got {tensor.dtype}")


def _expect_bias(op: str, bias: Tensor | None, rows: int) -> None:
    if bias is not None and tuple(bias.shape) != (rows,):
        raise UsageError(f"{op}: bias must be ({rows},), got {tuple(bias.shape)}")
