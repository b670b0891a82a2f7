"""New rows of a key/value cache on a GPU: splitting the projections, rotating, storing rows as the cache holds them.

One kernel is the first half of ``ryzen::cached_attention``: it leaves the rotated queries in scratch memory and the
new keys and values in the caches, encoded as ``numerics.rows`` encodes them. Every step is rounded by itself, so stored
bytes are equal to the reference's. Which scale of a group of 4-bit codes has the least squared error is decided in
float64, for the same reason. Rows that a Hadamard matrix turns are rotated into scratch memory, multiplied by PyTorch
and stored by a second launch.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ryzen_compile.kernels import launch
from ryzen_compile.kernels.cache_step import CacheStep
from ryzen_compile.kernels.rotary import turned
from ryzen_compile.numerics import rows

ELEMENTS = 1024  # of one program at most, where there are
MANY_TOKENS = 64  # or more; one head a program otherwise
LARGEST_HALF = tl.constexpr(rows.LARGEST_HALF)
SMALLEST_SCALE = tl.constexpr(rows.SMALLEST_SCALE)
REACHES = tl.constexpr(rows.REACHES)
TRIES = tl.constexpr(len(rows.REACHES))


@triton.jit
def _clamped(x: tl.tensor, least: tl.constexpr, most: tl.constexpr) -> tl.tensor:
    """NaN stays."""
    return tl.where(x < least, least, tl.where(x > most, most, x))


@triton.jit
def _rounded(x: tl.tensor, scale: tl.tensor, LIMIT: tl.constexpr) -> tl.tensor:
    """The codes of ``x``, as floats: half to even, which adding and subtracting 1.5 * 2^23 does where codes are."""
    return (_clamped(tl.div_rn(x, scale), -LIMIT - 1, LIMIT) + 12582912.0) - 12582912.0


@triton.jit
def _half(size: tl.tensor, positive: tl.tensor) -> tl.tensor:
    """As float16 holds it, never zero and never infinite."""
    size = _clamped(tl.abs(size), SMALLEST_SCALE, LARGEST_HALF)
    return tl.where(positive, size, -size).to(tl.float16).to(tl.float32)


@triton.jit
def _error(x: tl.tensor, y: tl.tensor, scale: tl.tensor, LIMIT: tl.constexpr) -> tl.tensor:
    """The squared error of the groups of which ``x`` are the even channels and ``y`` the odd ones, in float64."""
    a = _rounded(x, tl.broadcast_to(scale, x.shape), LIMIT) * scale - x
    b = _rounded(y, tl.broadcast_to(scale, y.shape), LIMIT) * scale - y
    return tl.sum((a * a).to(tl.float64) + (b * b).to(tl.float64), axis=2, keep_dims=True)


@triton.jit
def _group_scale(x: tl.tensor, y: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """(heads, groups, n) -> (heads, groups, 1): ``numerics.rows``' choice; NaN for groups that have one. ``x`` and
    ``y`` are even and odd channels, or the same ones, with zeros where there are none."""
    LIMIT: tl.constexpr = 2 ** (BITS - 1) - 1
    bad = tl.max(((x != x) | (y != y)).to(tl.int32), axis=2, keep_dims=True) > 0
    x = _clamped(tl.where(x == x, x, 0.0), -LARGEST_HALF * LIMIT, LARGEST_HALF * LIMIT)
    y = _clamped(tl.where(y == y, y, 0.0), -LARGEST_HALF * LIMIT, LARGEST_HALF * LIMIT)
    top = tl.max(tl.maximum(x, y), axis=2, keep_dims=True)
    bottom = tl.min(tl.minimum(x, y), axis=2, keep_dims=True)
    if BITS == 8:
        size = tl.maximum(top, -bottom)
        best = _half(tl.div_rn(size, tl.full(size.shape, LIMIT, tl.float32)), size >= 0)
    else:
        outermost = tl.where(top > -bottom, top, bottom) * -0.125
        best = _half(outermost, outermost > 0)
        least = _error(x, y, best, LIMIT)
        for i in tl.static_range(TRIES):
            scale = _half(outermost * REACHES[i], outermost > 0)
            error = _error(x, y, scale, LIMIT)
            best = tl.where(error < least, scale, best)
            least = tl.minimum(error, least)
    return tl.where(bad, float("nan"), best)


@triton.jit
def _code(x: tl.tensor, scale: tl.tensor, LIMIT: tl.constexpr) -> tl.tensor:
    """int32; of what is not a number, 0."""
    code = _rounded(x, scale, LIMIT)
    return tl.where(code == code, code, 0.0).to(tl.int32)


@triton.jit
def _store_coded(
    target: tl.tensor,  # (HEADS, 1, 1) pointers to rows
    x: tl.tensor,  # (HEADS, GROUPS, n): with 4 bits the even channels, and
    y: tl.tensor,  # the odd ones
    wanted: tl.tensor,
    scale: tl.tensor,  # that broadcasts against x, and
    odd_scale: tl.tensor,  # against y
    place: tl.tensor,  # (1, GROUPS, n) of the codes in a row
    BITS: tl.constexpr,
) -> None:
    LIMIT: tl.constexpr = 2 ** (BITS - 1) - 1
    code = _code(x, tl.broadcast_to(scale, x.shape), LIMIT)
    if BITS == 4:
        code = (code + 8) | ((_code(y, tl.broadcast_to(odd_scale, y.shape), LIMIT) + 8) << 4)
    if target.dtype.element_ty == tl.uint8:
        code = code & 255
    tl.store(target + place, code.to(target.dtype.element_ty), mask=wanted)


@triton.jit
def _store_rows(
    source: tl.tensor,  # pointer to the token's first head
    target: tl.tensor,  # the same, where it is stored
    source_head: tl.tensor,  # strides
    target_head: tl.tensor,
    head: tl.tensor,  # (HEADS,)
    heads: tl.tensor,  # how many there are; 0 when nothing is to be stored
    cos: tl.tensor | None,
    sin: tl.tensor | None,
    position: tl.tensor,
    positions: tl.tensor,
    mean: tl.tensor | None,  # (heads, D)
    scale: tl.tensor | None,  # (heads, D) float32
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # channels that share a scale in the row; 0: scales are fixed, or none
) -> None:
    """Channels are (groups, channels of a group), with 4 bits the even ones and the odd ones apart."""
    STEP: tl.constexpr = 2 if BITS == 4 else 1
    SPAN: tl.constexpr = GROUP or D
    group = tl.arange(0, triton.next_power_of_2(D // SPAN))[None, :, None]
    inside = tl.arange(0, triton.next_power_of_2(SPAN // STEP))[None, None, :]
    head = head[:, None, None]
    wanted = (head < heads) & (group < D // SPAN) & (inside < SPAN // STEP)
    channel = group * SPAN + inside * STEP
    first = source + head.to(tl.int64) * source_head
    row = target + head.to(tl.int64) * target_head

    x = turned(first, channel, wanted, cos, sin, position, positions, R, INTERLEAVED)
    if mean is not None:
        x -= tl.load(mean + head * D + channel, mask=wanted, other=0.0).to(tl.float32)
    y = x
    if STEP == 2:
        y = turned(first, channel + 1, wanted, cos, sin, position, positions, R, INTERLEAVED)
        if mean is not None:
            y -= tl.load(mean + head * D + channel + 1, mask=wanted, other=0.0).to(tl.float32)
    place = group * (SPAN // STEP) + inside
    if BITS >= 16:
        if BITS == 16:
            x = _clamped(x, -LARGEST_HALF, LARGEST_HALF)
        tl.store(row + place, x.to(target.dtype.element_ty), mask=wanted)
    elif GROUP:
        x, y = tl.where(wanted, x, 0.0), tl.where(wanted, y, 0.0)
        shared = _group_scale(x, y, BITS)
        _store_coded(row, x, y, wanted, shared, shared, place, BITS)
        there = (head < heads) & (group < D // SPAN)
        half = shared.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        carried = row + D // STEP + 2 * group  # in bytes: rows may begin anywhere
        tl.store(carried, (half & 255).to(tl.uint8), mask=there)
        tl.store(carried + 1, ((half >> 8) & 255).to(tl.uint8), mask=there)
    else:
        even = tl.load(scale + head * D + channel, mask=wanted, other=1.0)
        odd = tl.load(scale + head * D + channel + 1, mask=wanted, other=1.0) if STEP == 2 else even
        _store_coded(row, x, y, wanted, even, odd, place, BITS)


@triton.jit(do_not_specialize=["tokens", "capacity", "positions", "heads", "kv_heads", "q_blocks", "k_blocks"])
def _cache_rows_kernel(
    q: tl.tensor,  # (B, T, H D), the heads of a token next to each other, as in
    k: tl.tensor,  # (B, T, K D)
    v: tl.tensor,  # (B, T, K D')
    queries: tl.tensor,  # (B, T, H, D) contiguous
    k_cache: tl.tensor,  # (B, K, S, W), elements of a row next to each other
    v_cache: tl.tensor,  # (B, K, S, W')
    lengths: tl.tensor,  # (B,) integers, with the new tokens
    cos: tl.tensor | None,  # (N, R)
    sin: tl.tensor | None,
    k_mean: tl.tensor | None,  # (K, D)
    k_scale: tl.tensor | None,  # (K, D)
    v_scale: tl.tensor | None,  # (K, D')
    q_batch: tl.tensor,  # strides
    q_token: tl.tensor,
    k_batch: tl.tensor,
    k_token: tl.tensor,
    v_batch: tl.tensor,
    v_token: tl.tensor,
    k_cache_batch: tl.tensor,
    k_cache_head: tl.tensor,
    k_cache_row: tl.tensor,
    v_cache_batch: tl.tensor,
    v_cache_head: tl.tensor,
    v_cache_row: tl.tensor,
    tokens: tl.tensor,  # T
    capacity: tl.tensor,  # S
    positions: tl.tensor,  # N
    heads: tl.tensor,  # H
    kv_heads: tl.tensor,  # K
    q_blocks: tl.tensor,  # programs of a token for its queries, and
    k_blocks: tl.tensor,  # for its keys
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    K_BITS: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_BITS: tl.constexpr,
    V_GROUP: tl.constexpr,
    PLACED: tl.constexpr,  # whether a token's row is its position, or its place among the new ones
    HEADS: tl.constexpr,  # of one program, a power of two
) -> None:
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    position = tl.load(lengths + batch).to(tl.int64) - tokens + token
    row = position if PLACED else token
    stored = tl.where((row >= 0) & (row < capacity), kv_heads, 0)
    block = tl.program_id(1)
    head = block * HEADS + tl.arange(0, HEADS)
    if block < q_blocks:
        _store_rows(
            q + batch * q_batch + token * q_token, queries + (batch * tokens + token) * heads * D, D, D, head, heads,
            cos, sin, position, positions, None, None, D, R, INTERLEAVED, 32, 0,
        )  # fmt: skip
    elif block < q_blocks + k_blocks:
        _store_rows(
            k + batch * k_batch + token * k_token, k_cache + batch * k_cache_batch + row * k_cache_row, D,
            k_cache_head, head - q_blocks * HEADS, stored, cos, sin, position, positions, k_mean, k_scale, D, R,
            INTERLEAVED, K_BITS, K_GROUP,
        )  # fmt: skip
    else:
        _store_rows(
            v + batch * v_batch + token * v_token, v_cache + batch * v_cache_batch + row * v_cache_row, DV,
            v_cache_head, head - (q_blocks + k_blocks) * HEADS, stored, None, None, position, positions, None, v_scale,
            DV, 0, INTERLEAVED, V_BITS, V_GROUP,
        )  # fmt: skip


def store(step: CacheStep) -> Tensor:
    """Writes the new rows to the caches; returns the queries (B, T, H, D) as they attend, in the type of ``step.q``.

    A row whose position is outside of the cache is not written, and one that the tables do not have turns to NaN.
    """
    size = (step.batch, step.tokens, step.heads, step.keys.dim)
    if not step.turned:
        queries = launch.empty(size, step.q.dtype, step.q.device)
        _launch(step, step.k, queries)
        return queries
    wide = launch.empty(size, torch.float32, step.q.device)
    keys = launch.empty((*size[:2], step.kv_heads, size[3]), torch.float32, step.q.device)
    _launch(step, step.k, wide, keys)
    spread = _spread(size[3], step.q.device)
    _launch(step, (keys @ spread).flatten(2), None)
    return (wide @ spread).to(step.q.dtype)


def _launch(step: CacheStep, k: Tensor, queries: Tensor | None, scratch: Tensor | None = None) -> None:
    """``queries`` and ``scratch`` (B, T, K, D) are where rotated ones go; keys go to the cache where there is no
    ``scratch``, and are no longer rotated where there are no ``queries``; values go where keys go for good."""
    keys, values = step.keys, step.values
    cos, sin, mean = (step.cos, step.sin, step.k_mean) if queries is not None else (None, None, None)
    k_cache = keys.cache if scratch is None else scratch.transpose(1, 2)
    channels = triton.next_power_of_2(max(keys.dim, values.dim))
    several = step.batch * step.tokens >= MANY_TOKENS
    together = min(triton.next_power_of_2(step.kv_heads), max(ELEMENTS // channels, 1)) if several else 1
    q_blocks = 0 if queries is None else triton.cdiv(step.heads, together)
    kv_blocks = triton.cdiv(step.kv_heads, together)
    blocks = q_blocks + kv_blocks * (2 if scratch is None else 1)
    with launch.on(k):
        _cache_rows_kernel[(step.batch * step.tokens, blocks)](
            step.q, k, step.v, step.q if queries is None else queries, k_cache, values.cache, step.lengths, cos, sin,
            mean, keys.scale, values.scale, *step.q.stride()[:2], *k.stride()[:2], *step.v.stride()[:2],
            *k_cache.stride()[:3], *values.cache.stride()[:3], step.tokens, k_cache.shape[2],
            0 if cos is None else len(cos), step.heads, step.kv_heads, q_blocks, kv_blocks,
            D=keys.dim, DV=values.dim, R=0 if cos is None else cos.shape[1], INTERLEAVED=step.interleaved,
            K_BITS=keys.form.bits if scratch is None else 32, K_GROUP=keys.form.group if scratch is None else 0,
            V_BITS=values.form.bits, V_GROUP=values.form.group, PLACED=scratch is None, HEADS=together,
            num_warps=launch.warps(together * channels),
            enable_fp_fusion=False,  # no fused multiply-add: it rounds once where the formula rounds twice
        )  # fmt: skip


@functools.lru_cache(maxsize=16)
def _spread(dim: int, device: torch.device) -> Tensor:
    """The Hadamard matrix, kept on the device: a copy to it would make every step wait, and cannot be captured."""
    return torch.from_numpy(rows.hadamard(dim)).to(device, torch.float32)
