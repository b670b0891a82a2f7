"""The gradients of attention on a GPU: the Triton kernels behind ``attention_backward``.

FlashAttention-2 (Dao, 2023): with weights P of the scores, the gradient of a score is P (dO V^T - sum of dO O). The
forward pass keeps no log-sum-exp, so it is found again here, without a pass of its own: the gradient of a query is,
like its output, an average under the softmax, of keys instead of values, and is made the same way, by an online
softmax. The kernel of queries therefore goes first and leaves the log-sum-exp and the sum of dO O of each query to the
kernel of keys and values, where a program keeps a block of keys and walks over the queries of all heads that see it.
Every number is summed up by one program in one order: results are the same each time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ryzen_compile.kernels.attention_tile import (
    LOWEST,
    bounded,
    key_limits,
    keys_seen,
    load_rows,
    only_between,
    padded,
    placed,
    product,
    queries_seeing,
    store_rows,
    weigh,
    with_sink,
)


@triton.jit
def row_size(tokens: tl.tensor) -> tl.tensor:
    """From one head's numbers to the next: every row begins at a multiple of 16 bytes."""
    return (tokens + 3) // 4 * 4


@triton.jit
def _load_numbers(
    source: tl.tensor,  # (B H, row_size(T)) float32, or its descriptor
    pair: tl.tensor,  # head, of all in the batch
    first: tl.tensor,
    tokens: tl.tensor,
    DESCRIBED: tl.constexpr,
    COUNT: tl.constexpr,
) -> tl.tensor:  # (COUNT,), zeros behind the last
    if DESCRIBED:
        return source.load([pair, first]).reshape(COUNT)
    else:
        query = first + tl.arange(0, COUNT)
        return tl.load(source + tl.cast(pair, tl.int64) * row_size(tokens) + query, mask=query < tokens, other=0.0)


@triton.jit
def _store_numbers(
    numbers: tl.tensor,  # (COUNT,)
    target: tl.tensor,  # (B H, row_size(T)) float32
    pair: tl.tensor,
    first: tl.tensor,
    tokens: tl.tensor,
) -> None:
    query = first + tl.arange(0, numbers.shape[0])
    tl.store(target + pair.to(tl.int64) * row_size(tokens) + query, numbers, mask=query < tokens)


@triton.jit(do_not_specialize=["tokens", "heads", "together", "window", "reach"])
def queries_kernel(
    q: tl.tensor,  # (B, H, T, D) by its strides
    k: tl.tensor,  # (B, K, T, D), as is
    v: tl.tensor,  # (B, K, T, D')
    grad: tl.tensor,  # (B, H, T, D'), as is
    out: tl.tensor,
    sinks: tl.tensor | None,  # (H,)
    dq: tl.tensor,  # (B, H, T, D) contiguous
    sizes: tl.tensor,  # (B H, row_size(T)) float32: log2 of the softmax's denominator
    deltas: tl.tensor,  # as is: the sum of grad * out
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    grad_strides: tl.tuple,
    out_strides: tl.tuple,
    tokens: tl.tensor,
    heads: tl.tensor,
    together: tl.tensor,  # of ``placed``
    window: tl.tensor,  # from here on as in the forward pass
    reach: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    CAPPED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIBED: tl.constexpr,  # k and v are descriptors
) -> None:
    pair, block = placed(tl.cdiv(tokens, BLOCK_M), together)
    batch, head, first = pair // heads, pair % heads, (tl.cdiv(tokens, BLOCK_M) - 1 - block) * BLOCK_M
    queries = load_rows(q, q_strides, batch, head, first, tokens, False, BLOCK_M, D)
    grads = load_rows(grad, grad_strides, batch, head, first, tokens, False, BLOCK_M, DV)
    outs = load_rows(out, out_strides, batch, head, first, tokens, False, BLOCK_M, DV)
    delta = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    key = tl.arange(0, BLOCK_N)
    low, high = key_limits(first, tokens, window, reach, BLOCK_M)
    total, top = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), LOWEST, tl.float32)
    sums = tl.zeros((BLOCK_M, padded(D)), tl.float32)
    begin, every_begin, every_end, end = keys_seen(first, tokens, window, reach, BLOCK_M, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        keys = load_rows(k, k_strides, batch, head // GROUP, start, tokens, DESCRIBED, BLOCK_N, D)
        values = load_rows(v, v_strides, batch, head // GROUP, start, tokens, DESCRIBED, BLOCK_N, DV)
        scores = product(queries, tl.trans(keys), None, INTERPRETED)
        pulls = product(grads, tl.trans(values), None, INTERPRETED) - delta[:, None]
        if CAPPED:
            bound = bounded(scores, factor)
            scores, pulls = bound * cap, pulls * (1.0 - bound * bound)
        scores = only_between(scores, low, high, start + key, (start < every_begin) | (start + BLOCK_N > every_end))
        weights, fade, total, top = weigh(scores, total, top, 1.0 if CAPPED else factor)
        sums = product((weights * pulls).to(keys.dtype), keys, sums * fade[:, None], INTERPRETED)
    if sinks is not None:
        sums, total, top = with_sink(sinks, head, sums, total, top)
    store_rows(sums * (scale / total)[:, None], dq + pair.to(tl.int64) * tokens * D, D, first, tokens, D)
    _store_numbers(top + tl.log2(total), sizes, pair, first, tokens)
    _store_numbers(delta, deltas, pair, first, tokens)


@triton.jit(do_not_specialize=["tokens", "heads", "together", "window", "reach"])
def keys_kernel(
    q: tl.tensor,  # (B, H, T, D) by its strides
    k: tl.tensor,  # (B, K, T, D), as is
    v: tl.tensor,  # (B, K, T, D')
    grad: tl.tensor,  # (B, H, T, D'), read as 0 behind the last query: what is there adds nothing, whatever its weight
    sizes: tl.tensor,  # of the kernel of queries
    deltas: tl.tensor,
    dk: tl.tensor,  # (B, K, T, D) contiguous
    dv: tl.tensor,  # (B, K, T, D') contiguous
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    grad_strides: tl.tuple,
    tokens: tl.tensor,
    heads: tl.tensor,
    together: tl.tensor,  # of ``placed``
    window: tl.tensor,  # from here on as in the forward pass
    reach: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    CAPPED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIBED: tl.constexpr,  # q and grad are descriptors
) -> None:
    pair, block = placed(tl.cdiv(tokens, BLOCK_N), together)
    batch, kv_head, first = pair // (heads // GROUP), pair % (heads // GROUP), block * BLOCK_N
    keys = load_rows(k, k_strides, batch, kv_head, first, tokens, False, BLOCK_N, D)
    values = load_rows(v, v_strides, batch, kv_head, first, tokens, False, BLOCK_N, DV)
    key, query = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    key_sums = tl.zeros((BLOCK_N, padded(D)), tl.float32)
    value_sums = tl.zeros((BLOCK_N, padded(DV)), tl.float32)
    begin, every_begin, every_end, end = queries_seeing(first, tokens, window, reach, BLOCK_N, BLOCK_M)
    steps = tl.cdiv(end - begin, BLOCK_M)
    for step in tl.range(0, GROUP * steps):
        head, start = kv_head * GROUP + step // steps, begin + step % steps * BLOCK_M
        queries = load_rows(q, q_strides, batch, head, start, tokens, DESCRIBED, BLOCK_M, D)
        grads = load_rows(grad, grad_strides, batch, head, start, tokens, DESCRIBED, BLOCK_M, DV)
        size = _load_numbers(sizes, batch * heads + head, start, tokens, DESCRIBED, BLOCK_M)
        scores = product(keys, tl.trans(queries), None, INTERPRETED)
        if CAPPED:
            bound = bounded(scores, factor)
            scores = bound * cap
        some_hidden = (start < every_begin) | (start + BLOCK_M > every_end)
        scores = only_between(scores, key - reach, key + window, start + query, some_hidden)
        weights = tl.exp2(scores * (1.0 if CAPPED else factor) - size[None, :])
        value_sums = product(weights.to(grads.dtype), grads, value_sums, INTERPRETED)
        delta = _load_numbers(deltas, batch * heads + head, start, tokens, DESCRIBED, BLOCK_M)
        pulls = weights * (product(values, tl.trans(grads), None, INTERPRETED) - delta[None, :])
        if CAPPED:
            pulls *= 1.0 - bound * bound
        key_sums = product(pulls.to(queries.dtype), queries, key_sums, INTERPRETED)
    store_rows(key_sums * scale, dk + pair.to(tl.int64) * tokens * D, D, first, tokens, D)
    store_rows(value_sums, dv + pair.to(tl.int64) * tokens * DV, DV, first, tokens, DV)


@triton.jit(do_not_specialize=["batch", "heads", "tokens"])
def sinks_kernel(
    sinks: tl.tensor,  # (H,)
    sizes: tl.tensor,  # of the kernel of queries
    deltas: tl.tensor,
    dsinks: tl.tensor,  # (H,)
    batch: tl.tensor,
    heads: tl.tensor,
    tokens: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634  # log2(e)
    total = tl.zeros((BLOCK,), tl.float32)
    query = tl.arange(0, BLOCK)
    steps = tl.cdiv(tokens, BLOCK)
    for step in tl.range(0, batch * steps):
        start = step % steps * BLOCK
        there = query < tokens - start
        at = (tl.cast(step // steps, tl.int64) * heads + head) * row_size(tokens) + start + query
        delta = tl.load(deltas + at, mask=there, other=0.0)
        total -= tl.exp2(sink - tl.load(sizes + at, mask=there, other=float("inf"))) * delta
    tl.store(dsinks + head, tl.sum(total, 0).to(dsinks.dtype.element_ty))
