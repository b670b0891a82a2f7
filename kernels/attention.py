"""Attention of a whole sequence on a GPU: the Triton kernel of ``ryzen::attention``, forward.

FlashAttention-2 (Dao, 2023): a program keeps one block of queries and walks over the keys that they see, with the
softmax's maximum and sum so far beside what is summed up (online softmax: Milakov and Gimelshein, 2018). Scores are in
powers of two, the scale being folded into their unit. Blocks of keys that no query of the program sees are not visited,
and only those that some do not see are masked: in the middle of a long walk there is nothing but products and powers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ryzen_compile.kernels import attention_tile as tile
from ryzen_compile.kernels import launch
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
    store_rows,
    weigh,
    with_sink,
)


@triton.jit(do_not_specialize=["tokens", "heads", "together", "window", "reach"])
def _attention_kernel(
    q: tl.tensor,  # (B, H, T, D) by its strides
    k: tl.tensor,  # (B, K, T, D), as is
    v: tl.tensor,  # (B, K, T, D')
    sinks: tl.tensor | None,  # (H,)
    out: tl.tensor,  # (B, T, H, D') contiguous
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    tokens: tl.tensor,
    heads: tl.tensor,
    together: tl.tensor,  # of ``placed``
    window: tl.tensor,  # keys before a query that it sees, itself included
    reach: tl.tensor,  # keys behind a query that it sees
    factor: tl.tensor,  # positive: makes powers of two of products or, with a soft cap, what it is applied to
    cap: tl.tensor,  # in powers of two
    GROUP: tl.constexpr,
    CAPPED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIBED: tl.constexpr,  # k and v are descriptors
) -> None:
    blocks = tl.cdiv(tokens, BLOCK_M)
    pair, block = placed(blocks, together)
    batch, head, first = pair // heads, pair % heads, (blocks - 1 - block) * BLOCK_M
    kv_head = head // GROUP
    queries = load_rows(q, q_strides, batch, head, first, tokens, False, BLOCK_M, D)
    key = tl.arange(0, BLOCK_N)
    low, high = key_limits(first, tokens, window, reach, BLOCK_M)
    unit = 1.0 if CAPPED else factor
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    sums = tl.zeros((BLOCK_M, padded(DV)), tl.float32)
    begin, every_begin, every_end, end = keys_seen(first, tokens, window, reach, BLOCK_M, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        keys = load_rows(k, k_strides, batch, kv_head, start, tokens, DESCRIBED, BLOCK_N, D)
        scores = product(queries, tl.trans(keys), None, INTERPRETED)
        if CAPPED:
            scores = bounded(scores, factor) * cap
        some_hidden = (start < every_begin) | (start + BLOCK_N > every_end)
        scores = only_between(scores, low, high, start + key, some_hidden)
        weights, fade, total, top = weigh(scores, total, top, unit)
        values = load_rows(v, v_strides, batch, kv_head, start, tokens, DESCRIBED, BLOCK_N, DV)
        sums = product(weights.to(values.dtype), values, sums * fade[:, None], INTERPRETED)
    if sinks is not None:
        sums, total, top = with_sink(sinks, head, sums, total, top)
    out += (batch.to(tl.int64) * tokens * heads + head) * DV
    store_rows(sums * (1.0 / total)[:, None], out, heads * DV, first, tokens, DV)


# With few registers or few rows, programs share a multiprocessor: one multiplies while another takes powers.
HALF: tile.Choices = {
    64: ((128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2)),
    128: ((128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2)),
    256: ((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3), (64, 32, 4, 3)),
}
SINGLE: tile.Choices = {
    64: ((32, 32, 4, 2), (64, 32, 4, 2)),
    128: ((32, 32, 4, 2), (64, 32, 8, 2)),
    256: ((16, 16, 4, 2), (32, 16, 8, 2)),
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
    mask: Tensor | None = None,
) -> Tensor:
    """The operator ``ryzen::attention``: ``q`` (B, H, T, D), ``k`` (B, K, T, D), ``v`` (B, K, T, D') of one type
    -> (B, T, H, D').

    Rows are read wherever they lie, if the channels of each are next to each other. Raises ``UsageError`` for tensors
    that do not fit together, ``UnsupportedError`` for types other than float32, float16 and bfloat16, for heads of
    more than 256 channels, for a mask, and for tensors that are not on a GPU (unless Triton interprets its kernels).
    """
    tile.expect_fit("attention", q, k, v, sinks, window, mask)
    device = launch.expect_device("attention", q=q, k=k, v=v, sinks=sinks)
    out = launch.empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), q.dtype, device)
    if not out.numel():
        return out
    q, scale = tile.upwards(q, scale)
    q, k, v = tile.by_strides(q), tile.by_strides(k), tile.by_strides(v)
    heads, tokens = q.shape[0] * q.shape[1], q.shape[2]
    numbers = tile.arguments(q, k, v, scale, window, softcap, causal)
    sinks = None if sinks is None else sinks.contiguous()

    def run(config: triton.Config) -> None:
        m, n, engine = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "DESCRIBED"))
        _attention_kernel[(heads * triton.cdiv(tokens, m),)](
            q,
            tile.source(k, n, engine),
            tile.source(v, n, engine),
            sinks,
            out,
            *(x.stride()[:3] for x in (q, k, v)),
            together=min(numbers["GROUP"] * tile.fitting(k, v), heads),
            **numbers,
            **config.all_kwargs(),
        )

    described = tile.describable(k, v)
    choices = tile.configs(HALF, SINGLE, k, v, described)
    with launch.on(q):
        run(launch.tuned("attention", tile.alike(q, k, v, window, softcap, causal, described), choices, run, device))
    return out
