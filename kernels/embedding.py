"""Looking up rows of a table of codes on a GPU: the Triton kernel of ``ryzen::codebook_embedding``, forward only.

Each program decodes a piece of one row: the table is read where it is asked for and never expanded. Every step of the
formula is rounded by itself, as the reference does, so results are equal to the bit; the compiler would otherwise join
the product with the gain and the sum with the offset into one rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.numerics.codebook import CodebookTensor, expect_ids

CHANNELS = 1024  # of one program at most: wider rows are cut, and the machine is full from few rows on
CHANNELS_PER_WARP = 256  # 8 for each of its 32 threads


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
    _expect_together(ids, table)
    out = torch.empty((*ids.shape, width), dtype=torch.float32, device=ids.device)
    if out.numel():
        # Triton launches on the current device, which need not be the tensors' own. On a CPU this does nothing.
        with torch.cuda.device_of(ids):
            _launch(ids.contiguous(), table, out)
    return out


def interpreted() -> bool:
    """Whether Triton interprets these kernels, on the CPU: the environment said so when they were imported."""
    return not isinstance(_codebook_embedding_kernel, triton.JITFunction)


def _expect_together(ids: Tensor, table: CodebookTensor) -> None:
    expect_ids(ids)
    elsewhere = [f"{name} on {t.device}" for name, t in table.tensors.items() if t.device != ids.device]
    if elsewhere:
        raise UsageError(f"all tensors must be on one device: ids are on {ids.device}, {', '.join(elsewhere)}")
    if not ids.is_cuda and not interpreted():
        raise UnsupportedError(
            f"a Triton kernel runs on a GPU, the tensors are on {ids.device}",
            hint="move them to a CUDA device; TRITON_INTERPRET=1 in the environment of the process runs it on the CPU",
        )


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
        num_warps=max(1, block // CHANNELS_PER_WARP),
        enable_fp_fusion=False,  # no fused multiply-add: it rounds once where the formula rounds twice
    )
