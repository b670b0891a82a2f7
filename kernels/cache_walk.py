"""Walking over the stored rows of a key/value cache on a GPU, and merging what several walks found: the kernels that
``cached_attention`` launches.

A program reads rows for the queries that share a kv head, all heads of a group and as many tokens as fit, with the
softmax kept up to date (FlashAttention-2, Dao, 2023). Where several programs share the rows of a tile, each leaves its
part and the logarithm of its weights' sum (Flash-Decoding, Dao et al., 2023). Which rows are whose follows from the
lengths on the device: a captured graph serves every length.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ryzen_compile.kernels.cache_operands import (
    ALIGN,
    DIM,
    GROUPS,
    INSIDE,
    PARTS,
    load_columns,
    operands,
    store_columns,
)

LOWEST = tl.constexpr(-3.4028234663852886e38)  # below every score, yet its difference from itself is not NaN


@triton.jit
def _scores(q: tl.tuple, k: tl.tuple, COUNT: tl.constexpr) -> tl.tensor:
    """(ROWS, BLOCK) products of queries and keys."""
    scores = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    for i in tl.static_range(1, COUNT):
        scores = tl.dot(q[i], tl.trans(k[i]), scores, input_precision="ieee")
    return scores


@triton.jit
def _added(sums: tl.tensor, fade: tl.tensor, weights: tl.tensor, values: tl.tensor) -> tl.tensor:
    return tl.dot(weights, values, sums * fade, input_precision="ieee")


@triton.jit
def _sums(
    sums: tl.tuple,
    fade: tl.tensor,  # (ROWS, 1)
    weights: tl.tensor,  # (ROWS, BLOCK)
    v: tl.tuple,
    COUNT: tl.constexpr,  # of parts
) -> tuple[tl.tensor, ...]:
    """Every part faded, and the weighed values added."""
    a = _added(sums[0], fade, weights, v[0])
    if COUNT == 1:
        return (a,)
    elif COUNT == 2:
        return a, _added(sums[1], fade, weights, v[1])
    else:
        b, c = _added(sums[1], fade, weights, v[1]), _added(sums[2], fade, weights, v[2])
        return a, b, c, _added(sums[3], fade, weights, v[3])


@triton.jit
def _nothing(ROWS: tl.constexpr, L: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The sums of a walk that has not begun."""
    zeros = tl.zeros((ROWS, L[GROUPS] * L[INSIDE]), tl.float32)
    if L[PARTS] == 1:
        return (zeros,)
    elif L[PARTS] == 2:
        return zeros, zeros
    else:
        return zeros, zeros, zeros, zeros


@triton.jit
def _walk(
    q: tl.tuple,  # parts (ROWS, columns)
    keys: tl.tensor,  # pointer to the head's row 0
    values: tl.tensor,
    k_row: tl.tensor,  # strides
    v_row: tl.tensor,
    sums: tl.tuple,  # parts (ROWS, columns) float32 so far
    total: tl.tensor,  # (ROWS,) the sum of the weights, and
    top: tl.tensor,  # (ROWS,) the highest score so far
    at: tl.tensor,  # (ROWS,) positions of the queries
    begin: tl.tensor,  # rows of the cache
    end: tl.tensor,
    window: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    K_TYPE: tl.constexpr,
    V_TYPE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tuple[tl.tensor, ...], tl.tensor, tl.tensor]:
    """``sums``, ``total`` and ``top`` with the rows from ``begin`` to ``end`` taken in."""
    for start in tl.range(begin, end, BLOCK):
        row, left = begin.to(tl.int64) + (start - begin), end - start
        k = operands(keys + row * (k_row * K[ALIGN]), k_row, left, K, BLOCK, MASKED, K_TYPE)
        scores = _scores(q, k, K[PARTS]) * factor
        if CAPPED:
            scores = cap - 2.0 * cap / (1.0 + tl.exp2(scores))  # cap tanh(x), off by 2e-7 of the cap
        if MASKED:
            key = start + tl.arange(0, BLOCK)[None, :]
            visible = (key <= at[:, None]) & (key < end)
            if WINDOWED:
                visible = visible & (key > at[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, 1)
        top = higher
        v = operands(values + row * (v_row * V[ALIGN]), v_row, left, V, BLOCK, MASKED, V_TYPE)
        sums = _sums(sums, fade[:, None], weights.to(V_TYPE), v, V[PARTS])
    return sums, total, top


@triton.jit
def _inverse(total: tl.tensor, none: tl.constexpr) -> tl.tensor:
    """``none`` where a query has seen no row."""
    return tl.where(total == 0, none, 1.0 / tl.where(total == 0, 1.0, total))


@triton.jit
def _bounds(
    first: tl.tensor,  # position of the tile's first query and
    last: tl.tensor,  # of its last one
    capacity: tl.tensor,
    window: tl.tensor,
    split: tl.tensor,
    splits: tl.tensor,
    WINDOWED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A program's rows of the cache: the first, the first that must be masked, and the one behind the last."""
    end = tl.minimum(last + 1, capacity)
    begin = end * 0
    if WINDOWED:
        begin = tl.maximum(first - window + 1, 0)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), BLOCK) * BLOCK
    begin += split * share
    end = tl.minimum(begin + share, end)
    masked = begin
    if not WINDOWED:
        masked += tl.maximum(tl.minimum(first + 1, end) - begin, 0) // BLOCK * BLOCK
    return begin, masked, end


@triton.jit(do_not_specialize=["tokens", "capacity", "window", "kv_heads", "tiles", "splits"])
def walk_kernel(
    queries: tl.tensor,  # (B, T, H, D) contiguous
    k_cache: tl.tensor,  # (B, K, S, W)
    v_cache: tl.tensor,  # (B, K, S, W')
    lengths: tl.tensor,  # (B,) integers
    k_scale: tl.tensor | None,  # (K, D)
    v_scale: tl.tensor | None,  # (K, D')
    sinks: tl.tensor | None,  # (H,), unless they enter when all is merged
    out: tl.tensor,  # (splits, B, T, H, D')
    sizes: tl.tensor | None,  # (splits, B, T, H): logarithms of sums of weights; none when alone
    k_batch: tl.tensor,  # strides, in the layout's units
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    tokens: tl.tensor,  # T
    capacity: tl.tensor,  # S
    window: tl.tensor,
    kv_heads: tl.tensor,
    tiles: tl.tensor,  # of a kv head's queries
    splits: tl.tensor,  # programs that share the rows of a tile
    factor: tl.tensor,  # of products: to powers of two, or into the soft cap's exponent
    cap: tl.tensor,  # in powers of two
    K: tl.constexpr,  # Layout of keys
    V: tl.constexpr,  # and of values
    SHARING: tl.constexpr,  # heads that share a kv head
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    K_TYPE: tl.constexpr,  # of operands
    V_TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    pair = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles  # those with most rows to read first
    split = tl.program_id(1)
    batch, kv = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    query = tile * ROWS + tl.arange(0, ROWS)
    token = query // SHARING
    there = (token < tokens)[:, None]
    head = kv * SHARING + query % SHARING
    place = (batch * tokens + token) * (kv_heads * SHARING) + head  # among all queries
    oldest = tl.load(lengths + batch).to(tl.int32) - tokens  # position of token 0
    at = oldest + tl.minimum(token, tokens - 1)

    k_scale = None if k_scale is None else k_scale + kv * K[DIM]
    v_scale = None if v_scale is None else v_scale + kv * V[DIM]
    q = load_columns(queries + (place * K[DIM])[:, None], there, k_scale, K, K_TYPE)
    last = tl.minimum((tile * ROWS + ROWS - 1) // SHARING, tokens - 1)
    begin, masked, end = _bounds(
        oldest + tile * ROWS // SHARING, oldest + last, capacity, window, split, splits, WINDOWED, BLOCK
    )
    keys = k_cache + (batch * k_batch + kv * k_head) * K[ALIGN]
    values = v_cache + (batch * v_batch + kv * v_head) * V[ALIGN]
    sums = _nothing(ROWS, V)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), LOWEST, tl.float32)
    if not WINDOWED:
        sums, total, top = _walk(
            q, keys, values, k_row, v_row, sums, total, top, at, begin, masked, window, factor, cap, K, V, K_TYPE,
            V_TYPE, WINDOWED, CAPPED, False, BLOCK,
        )  # fmt: skip
    sums, total, top = _walk(
        q, keys, values, k_row, v_row, sums, total, top, at, masked, end, window, factor, cap, K, V, K_TYPE, V_TYPE,
        WINDOWED, CAPPED, True, BLOCK,
    )  # fmt: skip

    if sizes is not None:
        place += split * (tl.num_programs(0) // tiles // kv_heads).to(tl.int64) * tokens * (kv_heads * SHARING)
        size = tl.where(total == 0, float("-inf"), top + tl.log2(tl.where(total == 0, 1.0, total)))
        tl.store(sizes + place, size, mask=token < tokens)
        there = there & (begin < end)  # otherwise there is nothing, as the size says
        share = _inverse(total, 0.0)
    else:
        if sinks is not None:
            sink = tl.load(sinks + head, mask=token < tokens, other=0.0).to(tl.float32) * 1.4426950408889634  # log2(e)
            higher = tl.maximum(top, sink)
            fade = tl.exp2(top - higher)
            share = fade * _inverse(total * fade + tl.exp2(sink - higher), float("nan"))
        else:
            share = _inverse(total, float("nan"))
    store_columns(out + (place * V[DIM])[:, None], sums, share[:, None], there, v_scale, V)


@triton.jit(do_not_specialize=["splits", "heads"])
def merge_kernel(
    parts: tl.tensor,  # (splits, B T H, D') float32
    sizes: tl.tensor,  # (splits, B T H) float32
    sinks: tl.tensor | None,  # (H,)
    out: tl.tensor,  # (B T H, D')
    queries: tl.tensor,  # B T H
    heads: tl.tensor,  # H
    splits: tl.tensor,
    DV: tl.constexpr,
    CHANNELS: tl.constexpr,  # a power of two >= D'
    SPLITS: tl.constexpr,  # a power of two >= splits
    BLOCK: tl.constexpr,  # of them at a time
) -> None:
    query = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    every = tl.arange(0, SPLITS)
    size = tl.load(sizes + every * queries.to(tl.int64) + query, mask=every < splits, other=float("-inf"))
    top = tl.maximum(tl.max(size, 0), LOWEST)
    if sinks is not None:
        sink = tl.load(sinks + query % heads).to(tl.float32) * 1.4426950408889634  # log2(e)
        top = tl.maximum(top, sink)
    total = tl.sum(tl.exp2(size - top), 0)
    if sinks is not None:
        total += tl.exp2(sink - top)
    sums = tl.zeros((CHANNELS,), tl.float32)
    for start in tl.range(0, splits, BLOCK):
        split = start + tl.arange(0, BLOCK)
        place = split * queries.to(tl.int64) + query
        weight = tl.exp2(tl.load(sizes + place, mask=split < splits, other=float("-inf")) - top)
        # What weighs nothing was not written where a program had no rows.
        there = (weight != 0)[:, None] & (channel < DV)[None, :]
        part = tl.load(parts + place[:, None] * DV + channel[None, :], mask=there, other=0.0)
        sums += tl.sum(part * weight[:, None], 0)
    tl.store(
        out + query * DV + channel, (sums * _inverse(total, float("nan"))).to(out.dtype.element_ty), mask=channel < DV
    )
