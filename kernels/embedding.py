"""Looking up rows of a table of codes on a GPU: the Triton kernels of ``ryzen::codebook_embedding`` and
``ryzen::embedding_nbits``, forward only.

Each program decodes a piece of one row: the table is read where it is asked for and never expanded. Every step of the
formula is rounded by itself, as the reference does, so results are equal to the bit; the compiler would otherwise join
the product with the gain and the sum with the offset into one rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ryzen_compile.errors import UsageError
from ryzen_compile.kernels import launch
from ryzen_compile.numerics.blockwise import BlockFormat, BlockTensor
from ryzen_compile.numerics.codebook import CodebookTensor, expect_ids

CHANNELS = 1024  # of one program at most: wider rows are cut, and the machine is full from few rows on


@triton.jit
def _entries(
    codes: tl.tensor,  # (row_bytes,) uint8, one row
    codebook: tl.tensor,  # (2 ** BITS, DIM) float32, one stage
    index: tl.tensor,  # (BLOCK,) which of the row's codes
    wanted: tl.tensor,  # (BLOCK,) bool
    BITS: tl.constexpr,
    DIM: tl.constexpr,
) -> tl.tensor:  # (BLOCK, DIM) float32, 0 where not wanted
    bit = index * BITS
    shift = bit % 8
    code = tl.load(codes + bit // 8, mask=wanted, other=0).to(tl.int32) >> shift
    if 8 % BITS != 0:
        # The rest of a code that begins in one byte and ends in the next. Behind the last byte of the table is nothing.
        split = wanted & (shift + BITS > 8)
        code |= tl.load(codes + bit // 8 + 1, mask=split, other=0).to(tl.int32) << (8 - shift)
    code &= (1 << BITS) - 1
    entry = code[:, None] * DIM + tl.arange(0, DIM)[None, :]
    return tl.load(codebook + entry, mask=wanted[:, None], other=0.0).to(tl.float32)


@triton.jit
def _codebook_embedding_kernel(
    ids: tl.tensor,  # (n,) integers
    codes: tl.tensor,  # (V, row_bytes) uint8
    codebook: tl.tensor,  # (STAGES, 2 ** BITS, DIM) float32
    scales: tl.tensor | None,  # (V, groups) float16
    gain: tl.tensor | None,  # (C,) float32
    offset: tl.tensor | None,  # (C,) float32
    slots: tl.tensor | None,  # (V,) int16
    kept: tl.tensor | None,  # (kept_rows, C) float16 or float32
    out: tl.tensor,  # (n, C) float32
    rows: tl.tensor,  # V
    vectors: tl.tensor,  # C / DIM, codes of one stage in a row
    row_bytes: tl.tensor,
    groups: tl.tensor,
    kept_rows: tl.tensor,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    STAGES: tl.constexpr,
    VECTORS_PER_SCALE: tl.constexpr,  # 0: a row has one scale
    BLOCK: tl.constexpr,  # vectors of one program, a power of two
) -> None:
    place = tl.program_id(0).to(tl.int64)  # int64, as are rows: their products with a row's size overflow int32
    vector = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel = vector[:, None] * DIM + tl.arange(0, DIM)[None, :]

    row = tl.load(ids + place).to(tl.int64)
    known = (row >= 0) & (row < rows)
    coded = known
    if slots is not None:
        slot = tl.load(slots + row, mask=known, other=-1).to(tl.int64)
        known = known & (slot < kept_rows)
        coded = known & (slot < 0)
    # Masks by vector, as comparisons: triton 3.9's interpreter takes no mask that a single condition was spread to.
    wanted = vector < tl.where(coded, vectors, 0)
    answered = vector < tl.where(known, vectors, 0)

    row_codes = codes + row * row_bytes
    value = _entries(row_codes, codebook, vector, wanted, BITS, DIM)
    if STAGES == 2:
        value += _entries(row_codes, codebook + (1 << BITS) * DIM, vectors + vector, wanted, BITS, DIM)
    if scales is not None:
        group = vector // VECTORS_PER_SCALE if VECTORS_PER_SCALE else vector * 0
        value *= tl.load(scales + row * groups + group, mask=wanted, other=0.0).to(tl.float32)[:, None]
    if gain is not None:
        value *= tl.load(gain + channel, mask=wanted[:, None], other=0.0).to(tl.float32)
    if offset is not None:
        value += tl.load(offset + channel, mask=wanted[:, None], other=0.0).to(tl.float32)
    if slots is not None:
        exact = vector < tl.where(known & (slot >= 0), vectors, 0)
        stored = tl.load(kept + slot * (vectors * DIM) + channel, mask=exact[:, None], other=0.0).to(tl.float32)
        value = tl.where(exact[:, None], stored, value)
    value = tl.where(answered[:, None], value, float("nan"))
    tl.store(out + place * (vectors * DIM) + channel, value, mask=(vector < vectors)[:, None])


def codebook_embedding(
    ids: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    slots: Tensor | None,
    kept: Tensor | None,
    width: int,
    bits: int,
    group: int,
) -> Tensor:
    """The operator ``ryzen::codebook_embedding``: ``ids`` (...) of any integer type -> (..., width) float32.

    An id that is no row's, and a row whose slot is beyond the kept rows, give a row of NaN: nothing outside of the
    table is read, and an error would make every lookup wait for the GPU. Raises ``UsageError`` for tensors that do not
    fit together, ``UnsupportedError`` for tensors that are not on a GPU (unless Triton interprets its kernels).
    """
    table = CodebookTensor.stored(codes, codebook, scales, gain, offset, slots, kept, width, bits, group)
    expect_ids(ids)
    device = launch.expect_device("codebook_embedding", ids=ids, **table.tensors)
    out = launch.empty((*ids.shape, width), torch.float32, device)
    if out.numel():
        with launch.on(ids):
            _launch(ids.contiguous(), table, out)
    return out


def _launch(ids: Tensor, table: CodebookTensor, out: Tensor) -> None:
    form, (rows, width) = table.format, table.shape
    block = min(triton.next_power_of_2(width), CHANNELS)
    stored = {name: tensor.contiguous() for name, tensor in table.tensors.items()}
    optional = (stored.get(name) for name in ("scales", "gain", "offset", "slots", "kept"))
    _codebook_embedding_kernel[(ids.numel(), triton.cdiv(width, block))](
        ids,
        stored["codes"],
        stored["codebook"],
        *optional,
        out,
        rows,
        form.codes(width),
        form.row_bytes(width),
        form.groups(width),
        0 if table.kept is None else len(table.kept),
        BITS=form.bits,
        DIM=form.dim,
        STAGES=form.stages,
        VECTORS_PER_SCALE=(form.group or 0) // form.dim,
        BLOCK=block // form.dim,
        num_warps=launch.warps(block),
        enable_fp_fusion=False,  # no fused multiply-add: it rounds once where the formula rounds twice
    )


@triton.jit
def _embedding_nbits_kernel(
    ids: tl.tensor,  # (n,) integers
    packed: tl.tensor,  # (V, row_bytes) uint8
    scales: tl.tensor,  # (V, blocks) float32
    zeros: tl.tensor | None,  # (V, zero_bytes) uint8
    out: tl.tensor,  # (n, C) float32
    rows: tl.tensor,  # V
    C: tl.tensor,
    row_bytes: tl.tensor,
    blocks: tl.tensor,
    zero_bytes: tl.tensor,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,  # weights that share a scale
    BYTES: tl.constexpr,  # of one program, a power of two
) -> None:
    place = tl.program_id(0).to(tl.int64)  # int64, as are rows: their products with a row's size overflow int32
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    lane = tl.arange(0, 8 // BITS)[None, :]
    channel = byte[:, None] * (8 // BITS) + lane
    group = byte * (8 // BITS) // BLOCK  # a byte's codes share a block

    row = tl.load(ids + place).to(tl.int64)
    known = (row >= 0) & (row < rows)
    wanted = byte < tl.where(known, row_bytes, 0)
    code = tl.load(packed + row * row_bytes + byte, mask=wanted, other=0).to(tl.int32)[:, None]
    code = (code >> (lane * BITS)) & ((1 << BITS) - 1)
    if zeros is None:
        code -= 1 << (BITS - 1)
    else:
        bit = group * BITS
        zero = tl.load(zeros + row * zero_bytes + bit // 8, mask=wanted, other=0).to(tl.int32)
        code -= ((zero >> (bit % 8)) & ((1 << BITS) - 1))[:, None]
    scale = tl.load(scales + row * blocks + group, mask=wanted, other=0.0)
    value = tl.where(wanted[:, None], code.to(tl.float32) * scale[:, None], float("nan"))
    tl.store(out + place * C + channel, value, mask=channel < C)


def embedding_nbits(
    ids: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, width: int, bits: int, block: int
) -> Tensor:
    """The operator ``ryzen::embedding_nbits``: rows ``ids`` (...) of a table (V, width) -> (..., width) float32.

    Equal to the reference to the bit, but for an id outside the table, negative ones included, whose row is all NaN as
    with ``codebook_embedding``. Raises ``UsageError`` for tensors that do not fit together, ``UnsupportedError`` for
    tensors that are not on a GPU (unless Triton interprets its kernels).
    """
    table = stored_blocks("embedding_nbits", packed, scales, zeros, bits, block, width)
    expect_ids(ids)
    device = launch.expect_device("embedding_nbits", ids=ids, packed=packed, scales=scales, zeros=zeros)
    out = launch.empty((*ids.shape, width), torch.float32, device)
    if out.numel():
        row_bytes = table.packed.shape[1] * table.packed.shape[2]
        step = min(triton.next_power_of_2(row_bytes), CHANNELS * bits // 8)
        with launch.on(ids):
            _embedding_nbits_kernel[(ids.numel(), triton.cdiv(row_bytes, step))](
                ids.contiguous(),
                table.packed,
                table.scales,
                table.zeros,
                out,
                table.shape[0],
                width,
                row_bytes,
                table.scales.shape[1],
                0 if table.zeros is None else table.zeros.shape[1],
                BITS=bits,
                BLOCK=block,
                BYTES=step,
                num_warps=launch.warps(step * 8 // bits),
            )
    return out


def stored_blocks(
    op: str, packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, block: int, width: int
) -> BlockTensor:
    """The weight (N, ``width``) that an operator's tensors store, contiguous; ``bits`` are those of a stored code.

    Raises ``UsageError`` where types and shapes are not those of a ``BlockTensor``.
    """
    form = BlockFormat(bits, block, zeros is None)
    if bits != form.stored_bits or width < 1:
        raise UsageError(f"{op}: expected codes of 2, 4 or 8 bits in rows of 1 or more, got {bits} and {width}")
    rows, blocks = packed.shape[0] if packed.ndim else 0, form.blocks(width)
    for name, tensor, dtype, shape in (
        ("packed", packed, torch.uint8, (rows, blocks, block * bits // 8)),
        ("scales", scales, torch.float32, (rows, blocks)),
        ("zeros", zeros, torch.uint8, (rows, -(-blocks * bits // 8))),
    ):
        if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != shape):
            raise UsageError(
                f"{op}: {name} must be {shape} in {dtype} for rows of {width}, "
                f"got {tuple(tensor.shape)} in {tensor.dtype}"
            )
    zeros = None if zeros is None else zeros.contiguous()
    return BlockTensor(form, (rows, width), packed.contiguous(), scales.contiguous(), zeros)
