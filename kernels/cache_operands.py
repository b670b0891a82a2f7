"""Stored rows of a key/value cache as operands of products, for kernels that attend over them.

Integers are read two bytes at a time, as the elements that a GPU's tensor cores load, and become operands where they
lie: two 8-bit channels or four 4-bit ones that share such a unit belong to as many products of a part of the width, so
that no channel has to move. Fixed scales belong to channels: those of keys are multiplied into the queries and those
of values into the result. Scales that lie in the rows are multiplied in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ryzen_compile.errors import UnsupportedError
from ryzen_compile.kernels import launch
from ryzen_compile.kernels.cache_step import Side

NARROWEST = 16  # columns of an operand
DIM, PARTS, GROUP, GROUPS, INSIDE, ALIGN, PACKED = (tl.constexpr(place) for place in range(7))  # in a Layout


class Layout(NamedTuple):
    """How a row's channels lie in operands (n, groups * inside), ``parts`` of them: what kernels know of a format.

    ``group`` channels share a scale in the row (0: none does). Operands are padded to powers of two: ``groups`` of
    them, ``inside`` columns each. Strides between rows, heads and sequences are multiples of ``align`` elements.
    ``packed``: whether to decode by instructions that the interpreter does not have.
    """

    dim: int
    parts: int
    group: int
    groups: int
    inside: int
    align: int
    packed: bool


class StoredRows:
    """A side of a cache as kernels read it: ``cache`` (B, K, S, n) floats, or int16 that hold the bytes of integers."""

    def __init__(self, side: Side) -> None:
        """Raises ``UnsupportedError`` for integers that do not lie in pairs of bytes."""
        form = side.form
        parts = 1 if form.floats else 16 // form.bits
        span = form.group or side.dim
        self.cache = side.cache if form.floats else _in_pairs(side.cache, f"{form} rows of {side.dim} channels")
        if span % parts:
            raise UnsupportedError(f"cached_attention: {span} channels of {form} are no multiple of {parts}")
        inside, groups = triton.next_power_of_2(span // parts), triton.next_power_of_2(side.dim // span)
        if groups * inside < NARROWEST:
            groups, inside = (NARROWEST // inside, inside) if form.group else (1, NARROWEST)
        self.align = _alignment(self.cache)
        self.layout = Layout(side.dim, parts, form.group, groups, inside, self.align, not launch.interpreted())
        self.floats = form.floats

    @property
    def strides(self) -> tuple[int, int, int]:
        """From a sequence to the next, from a head and from a row, in ``align`` elements."""
        batch, head, row = (stride // self.align for stride in self.cache.stride()[:3])
        return batch, head, row

    def operand(self, model: torch.dtype) -> tl.dtype:
        """What the rows are multiplied as. Codes are exact in float16, as are the model's half-precision numbers in
        their own type; the interpreter cannot multiply bfloat16."""
        own = self.cache.dtype if self.floats and self.cache.dtype != torch.float32 else model
        if model == torch.float32 or (own == torch.bfloat16 and self.floats and launch.interpreted()):
            return tl.float32
        return tl.bfloat16 if own == torch.bfloat16 and self.floats else tl.float16


def _in_pairs(cache: Tensor, what: str) -> Tensor:
    """(B, K, S, W) bytes -> (B, K, S, W / 2) int16."""
    if cache.shape[3] % 2 or any(place % 2 for place in (*cache.stride()[:3], cache.data_ptr())):
        raise UnsupportedError(
            f"cached_attention: {what} do not lie in pairs of bytes", hint="the operator's reference reads any row"
        )
    return cache.view(torch.int16)


def _alignment(cache: Tensor) -> int:
    """Elements that divide all strides: from it the compiler learns how much it may load at once. Axes of one have
    strides that are never used."""
    align = 16
    for size, stride in zip(cache.shape[:3], cache.stride()[:3], strict=True):
        while size > 1 and stride % align:
            align //= 2
    return align


@triton.jit
def _channels(L: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(1, columns) which channel of a head a column of the first part is, and whether there is one."""
    SPAN: tl.constexpr = L[GROUP] or L[DIM]
    column = tl.arange(0, L[GROUPS] * L[INSIDE])[None, :]
    group, inside = column // L[INSIDE], column % L[INSIDE]
    return group * SPAN + inside * L[PARTS], (group < L[DIM] // SPAN) & (inside < SPAN // L[PARTS])


@triton.jit
def _column(
    heads: tl.tensor,
    there: tl.tensor,
    channel: tl.tensor,
    filled: tl.tensor,
    scale: tl.tensor | None,
    TYPE: tl.constexpr,
) -> tl.tensor:
    x = tl.load(heads + channel, mask=there & filled, other=0.0).to(tl.float32)
    if scale is not None:
        x *= tl.load(scale + channel, mask=filled, other=0.0)
    if tl.float16 == TYPE:
        x = tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))
    return x.to(TYPE)


@triton.jit
def load_columns(
    heads: tl.tensor,  # (n, 1) pointers to heads' first channels
    there: tl.tensor,  # (n, 1) which to read
    scale: tl.tensor | None,  # pointer to a float32 for every channel
    L: tl.constexpr,
    TYPE: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Parts (n, columns) of TYPE, scaled, in the order of stored rows' operands; zeros where there is nothing."""
    channel, filled = _channels(L)
    a = _column(heads, there, channel, filled, scale, TYPE)
    if L[PARTS] == 1:
        return (a,)
    elif L[PARTS] == 2:
        return a, _column(heads, there, channel + 1, filled, scale, TYPE)
    else:
        b = _column(heads, there, channel + 1, filled, scale, TYPE)
        c = _column(heads, there, channel + 2, filled, scale, TYPE)
        return a, b, c, _column(heads, there, channel + 3, filled, scale, TYPE)


@triton.jit
def store_columns(
    heads: tl.tensor,  # (n, 1) pointers to heads' first channels
    parts: tl.tuple,  # (n, columns) float32 each
    share: tl.tensor,  # (n, 1) of it
    there: tl.tensor,  # (n, 1) which to write
    scale: tl.tensor | None,
    L: tl.constexpr,
) -> None:
    """The inverse of ``load_columns``, scaled too."""
    COUNT: tl.constexpr = L[PARTS]
    channel, filled = _channels(L)
    for i in tl.static_range(COUNT):
        x = parts[i] * share
        if scale is not None:
            x *= tl.load(scale + channel + i, mask=filled, other=0.0)
        tl.store(heads + channel + i, x.to(heads.dtype.element_ty), mask=there & filled)


@triton.jit
def _load(
    place: tl.tensor,
    there: tl.tensor,  # which columns are
    row: tl.tensor,
    left: tl.tensor,  # how many rows are
    MASKED: tl.constexpr,  # whether these may be fewer than the block has
    WHOLE: tl.constexpr,  # whether columns fill the block
) -> tl.tensor:  # zeros where there is nothing
    if MASKED and WHOLE:
        return tl.load(place, mask=row < left, other=0)
    elif MASKED:
        return tl.load(place, mask=(row < left) & there, other=0)
    elif WHOLE:
        return tl.load(place)
    else:
        return tl.load(place, mask=there, other=0)


@triton.jit
def _decoded(units: tl.tensor, L: tl.constexpr, TYPE: tl.constexpr) -> tuple[tl.tensor, ...]:
    """int16 that hold two or four codes -> so many parts. Packed, codes become the last bits of float16 numbers near
    1024, or of ones near 64, that are subtracted again."""
    if L[PARTS] == 2 and L[PACKED] and tl.float16 == TYPE:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 raised;
            xor.b32 raised, $2, 0x80808080;
            prmt.b32 $0, raised, 0x64646464, 0x4240;
            prmt.b32 $1, raised, 0x64646464, 0x4341;
            }""",
            "=r,=r,r", [units], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
        return low - 1152.0, high - 1152.0
    elif L[PARTS] == 2:
        return ((units & 255) ^ 128).to(TYPE) - 128.0, (((units >> 8) & 255) ^ 128).to(TYPE) - 128.0
    elif L[PACKED] and tl.float16 == TYPE:
        a, b, c, d = tl.inline_asm_elementwise(
            """{
            .reg .b32 lower, upper;
            mov.b32 lower, $4;
            shr.u32 upper, $4, 8;
            lop3.b32 $0, lower, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $1, lower, 0x00f000f0, 0x54005400, 0xea;
            lop3.b32 $2, upper, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $3, upper, 0x00f000f0, 0x54005400, 0xea;
            }""",
            "=r,=r,=r,=r,r", [units], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
        return a - 1032.0, b - 72.0, c - 1032.0, d - 72.0
    else:
        a, b = (units & 15).to(TYPE) - 8.0, ((units >> 4) & 15).to(TYPE) - 8.0
        return a, b, ((units >> 8) & 15).to(TYPE) - 8.0, ((units >> 12) & 15).to(TYPE) - 8.0


@triton.jit
def _grouped(
    first: tl.tensor,
    stride: tl.tensor,
    left: tl.tensor,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """(BLOCK, groups, inside) units of rows that carry scales, and those, (BLOCK, groups, 1) float16."""
    COUNT: tl.constexpr = L[DIM] // L[GROUP]
    STORED: tl.constexpr = L[GROUP] // L[PARTS]
    row = tl.arange(0, BLOCK)[:, None, None]
    group = tl.arange(0, L[GROUPS])[None, :, None]
    inside = tl.arange(0, L[INSIDE])[None, None, :]
    there = (group < COUNT) & (inside < STORED)
    start = first + row * (stride * L[ALIGN])
    units = _load(start + group * STORED + inside, there, row, left, MASKED, L[GROUPS] == COUNT and L[INSIDE] == STORED)
    carried = _load(start + COUNT * STORED + group, group < COUNT, row, left, MASKED, L[GROUPS] == COUNT)
    return units, carried.to(tl.float16, bitcast=True)


@triton.jit
def _flat(x: tl.tensor) -> tl.tensor:
    return tl.reshape(x, (x.shape[0], x.shape[1] * x.shape[2]))


@triton.jit
def _scaled(parts: tl.tuple, scale: tl.tensor, L: tl.constexpr) -> tuple[tl.tensor, ...]:
    """(BLOCK, groups, inside) parts times (BLOCK, groups, 1) -> (BLOCK, groups * inside)."""
    a, b = _flat(parts[0] * scale), _flat(parts[1] * scale)
    if L[PARTS] == 2:
        return a, b
    else:
        return a, b, _flat(parts[2] * scale), _flat(parts[3] * scale)


@triton.jit
def operands(
    first: tl.tensor,  # pointer to the first row
    stride: tl.tensor,  # from one row to the next
    left: tl.tensor,  # rows that may be read
    L: tl.constexpr,  # Layout
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,  # whether fewer may be left than the block has
    TYPE: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Parts (BLOCK, columns) of TYPE, zeros where there is nothing."""
    STORED: tl.constexpr = L[DIM] // L[PARTS]
    if L[GROUP]:
        units, scale = _grouped(first, stride, left, L, BLOCK, MASKED)
        if tl.float16 == TYPE:
            # No product overflows: what float16 cannot hold is attended to as the largest number that it can.
            MOST: tl.constexpr = 511.0 if L[PARTS] == 2 else 8188.0
            scale = tl.where(scale > MOST, MOST, tl.where(scale < -MOST, -MOST, scale))
        return _scaled(_decoded(units, L, TYPE), scale.to(TYPE), L)
    else:
        row = tl.arange(0, BLOCK)[:, None]
        column = tl.arange(0, L[INSIDE])[None, :]
        units = _load(
            first + row * (stride * L[ALIGN]) + column, column < STORED, row, left, MASKED, L[INSIDE] == STORED
        )
        if L[PARTS] == 1:
            return (units.to(TYPE),)
        else:
            return _decoded(units, L, TYPE)
