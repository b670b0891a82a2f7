"""What the kernels of attention, forward and backward, have in common: reading blocks of rows, products, what a query
sees, the order of programs, and what is tried for which problem.

Scores are in powers of two, the scale being folded into their unit. Rows are read wherever they lie in memory; half
precision at multiples of 16 bytes, which is nearly all there is, by the device's own copying engine, which takes
addresses off the threads and leaves them registers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.kernels import launch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 256  # channels of a head: more leave no room for a block of keys and values
CACHE = 24 << 20  # bytes that programs running at one time read again and again: half of an H200's L2 cache
FURTHEST_ROW = 1 << 22  # elements from one row to the next: within a block, places are 32-bit
LOG2_E = math.log2(math.e)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # below every score, yet its difference from itself is not NaN

Numbers = dict[str, Any]
Choice = tuple[int, int, int, int]  # queries, keys, warps, stages
Choices = dict[int, tuple[Choice, ...]]  # by the channels of a block


def channels(width: int) -> int:
    """That are worked on for so many: a power of two, of which products take 16 at least."""
    return max(1 << (width - 1).bit_length(), 16)


padded = triton.constexpr_function(channels)  # the same within kernels


@triton.jit
def placed(blocks: tl.tensor, together: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The head, of all in the batch, and the block of this program: of ``together`` heads the first blocks, then the
    second ones, and so on; then of the next heads. What these read stays in the cache, and nothing heavy comes late."""
    section = tl.program_id(0) // (together * blocks)
    within = tl.program_id(0) % (together * blocks)
    size = tl.minimum(together, tl.num_programs(0) // blocks - section * together)
    return section * together + within % size, within // size


@triton.jit
def load_rows(
    source: tl.tensor,  # (batch, heads, rows, WIDTH), or its descriptor
    strides: tl.tuple,  # from one sequence, one head and one row to the next
    batch: tl.tensor,
    head: tl.tensor,
    first: tl.tensor,  # row
    rows: tl.tensor,  # that the head has
    DESCRIBED: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:  # (COUNT, padded(WIDTH)), zeros where there is nothing
    BLOCK: tl.constexpr = padded(WIDTH)
    if DESCRIBED:
        return source.load([batch, head, first, 0]).reshape(COUNT, BLOCK)
    else:
        row = tl.arange(0, COUNT)[:, None]
        channel = tl.arange(0, BLOCK)[None, :]
        there = row < rows - first
        if WIDTH < BLOCK:
            there = there & (channel < WIDTH)
        source += tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
        source += tl.cast(first, tl.int64) * strides[2]
        return tl.load(source + (row * strides[2] + channel), mask=there, other=0.0)


@triton.jit
def product(a: tl.tensor, b: tl.tensor, total: tl.tensor | None, INTERPRETED: tl.constexpr) -> tl.tensor:
    """``total + a @ b`` in float32. The interpreter has no arithmetic of bfloat16; a GPU multiplies it as it is."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def bounded(products: tl.tensor, factor: tl.tensor) -> tl.tensor:
    """tanh(factor * products), off by 2e-7 at most."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(products * (factor * 2.8853900817779268)))  # 2 log2(e)


@triton.jit
def only_between(
    scores: tl.tensor,  # (M, N)
    low: tl.tensor,  # (M,)
    high: tl.tensor,  # (M,)
    column: tl.tensor,  # (N,)
    some_hidden: tl.tensor,  # whether there is anything to do
) -> tl.tensor:
    """Scores become -inf where the column is below ``low`` or not below ``high``."""
    if some_hidden:
        seen = (column[None, :] >= low[:, None]) & (column[None, :] < high[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def keys_seen(
    first: tl.tensor,  # query of the block
    tokens: tl.tensor,
    window: tl.tensor,
    reach: tl.tensor,
    BLOCK: tl.constexpr,  # queries
    STEP: tl.constexpr,  # keys that are taken at a time
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Of a block of queries: from the first to the last bound are the keys that some of them see, and from the second
    to the third those that all of them do. The first is a multiple of ``STEP``: places within are then constants."""
    begin, every_begin = tl.maximum(first + 1 - window, 0) // STEP * STEP, tl.maximum(first + BLOCK - window, 0)
    return begin, every_begin, tl.minimum(first + 1 + reach, tokens), tl.minimum(first + BLOCK + reach, tokens)


@triton.jit
def key_limits(
    first: tl.tensor, tokens: tl.tensor, window: tl.tensor, reach: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(BLOCK,) of each query from ``first`` on: the first key that it sees, and the one behind the last. Queries behind
    the last token see what the last one sees, so that none sees nothing."""
    query = tl.minimum(first + tl.arange(0, BLOCK), tokens - 1)
    return query + 1 - window, tl.minimum(query + 1 + reach, tokens)


@triton.jit
def queries_seeing(
    first: tl.tensor,  # key of the block
    tokens: tl.tensor,
    window: tl.tensor,
    reach: tl.tensor,
    BLOCK: tl.constexpr,  # keys
    STEP: tl.constexpr,  # queries that are taken at a time
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """As ``keys_seen``, of a block of keys: the queries that see some of them and those that see all."""
    begin, every_begin = tl.maximum(first - reach, 0) // STEP * STEP, tl.maximum(first + BLOCK - 1 - reach, 0)
    return begin, every_begin, first + window, tl.minimum(first + BLOCK - 1 + window, tokens)


@triton.jit
def weigh(
    scores: tl.tensor,  # (queries, keys)
    total: tl.tensor,  # (queries,) the sum of weights so far
    top: tl.tensor,  # (queries,) the highest score so far, which has weight 1
    unit: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The softmax's weights of ``scores`` in ``unit``, what everything before them is to be multiplied by, and
    ``total`` and ``top`` with them (online softmax: Milakov and Gimelshein, 2018)."""
    higher = tl.maximum(top, tl.max(scores, 1) * unit)
    weights = tl.exp2(scores * unit - higher[:, None])
    fade = tl.exp2(top - higher)
    return weights, fade, total * fade + tl.sum(weights, 1), higher


@triton.jit
def with_sink(
    sinks: tl.tensor,  # (H,)
    head: tl.tensor,
    sums: tl.tensor,  # (queries, channels), not divided by ``total`` yet
    total: tl.tensor,  # as in ``weigh``
    top: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """``sums``, ``total`` and ``top`` with the head's sink. It comes last: were it first and far above the scores, all
    weights would be too small for half precision."""
    sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634  # log2(e)
    higher = tl.maximum(top, sink)
    fade = tl.exp2(top - higher)
    return sums * fade[:, None], total * fade + tl.exp2(sink - higher), higher


@triton.jit
def store_rows(
    rows: tl.tensor,  # (COUNT, BLOCK)
    target: tl.tensor,  # pointer to the row 0 of a head
    stride: tl.tensor,  # from one row to the next
    first: tl.tensor,
    tokens: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    row = first + tl.arange(0, rows.shape[0])
    channel = tl.arange(0, rows.shape[1])
    there = (row < tokens)[:, None] & (channel < WIDTH)[None, :]
    place = row.to(tl.int64)[:, None] * stride + channel[None, :]
    tl.store(target + place, rows.to(target.dtype.element_ty), mask=there)


def expect_fit(
    op: str, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, window: int, mask: Tensor | None = None
) -> None:
    """Raises ``UsageError`` for tensors that do not fit together, ``UnsupportedError`` for types, widths and masks."""
    if mask is not None:
        raise UnsupportedError(
            f"{op}: there is no kernel for padding", hint="run the references, on tensors of the CPU"
        )
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
    batch, heads, tokens, dim = q.shape if q.dim() == 4 else (0, 0, 0, 0)
    fit = q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3]
    if not fit or (k.shape[0], k.shape[2], k.shape[3]) != (batch, tokens, dim):
        raise UsageError(f"{op}: expected q (B, H, T, D), k (B, K, T, D) and v (B, K, T, D'), got {shapes}")
    if min(heads, k.shape[1]) < 1 or heads % k.shape[1]:
        raise UsageError(f"{op}: q must have a multiple of the heads of k, got {heads} and {k.shape[1]}")
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_floating_point()):
        raise UsageError(f"{op}: sinks must be ({heads},) floats, got {tuple(sinks.shape)} of {sinks.dtype}")
    if window < 0:
        raise UsageError(f"{op}: window must be the number of keys that a query sees or 0 for all, got {window}")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        types = f"{q.dtype}, {k.dtype} and {v.dtype}"
        raise UnsupportedError(f"{op}: q, k and v must be of one type, float32, float16 or bfloat16, got {types}")
    if not (1 <= dim <= WIDEST and 1 <= v.shape[3] <= WIDEST):
        raise UnsupportedError(f"{op}: heads must have 1 to {WIDEST} channels, got {dim} and {v.shape[3]}")


def by_strides(x: Tensor) -> Tensor:
    """``x`` itself where its rows can be read wherever they lie, else a copy."""
    side_by_side = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if side_by_side and x.stride(-2) <= FURTHEST_ROW else x.contiguous()


def arguments(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float, causal: bool) -> Numbers:
    """Those of the kernels that are numbers, by name; ``scale`` is positive."""
    tokens, cap = q.shape[2], abs(softcap)
    near = min(window or tokens, tokens)
    return {
        "tokens": tokens,
        "heads": q.shape[1],
        "window": near,  # keys before a query that it sees, itself included
        "reach": 0 if causal else near - 1,  # keys behind a query that it sees
        "factor": scale / cap if cap else scale * LOG2_E,
        "cap": cap * LOG2_E,
        "GROUP": q.shape[1] // k.shape[1],
        "CAPPED": cap > 0,
        "INTERPRETED": launch.interpreted(),
        "D": q.shape[3],
        "DV": v.shape[3],
    }


def upwards(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries and a positive scale that give the same scores: the highest product must be the highest score."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)


def fitting(*tensors: Tensor) -> int:
    """Heads of ``tensors`` (B, K, T, D) that the cache holds, at least one."""
    return max(CACHE // sum(x[0, 0].nbytes for x in tensors), 1)


def alike(
    q: Tensor, k: Tensor, v: Tensor, window: int, softcap: float, causal: bool, described: bool
) -> tuple[object, ...]:
    """Of problems that share a choice of blocks."""
    sizes = (q.shape[0] * q.shape[1], q.shape[1] // k.shape[1], q.shape[2], window)
    kind = str(q.dtype), q.shape[3], v.shape[3], causal, softcap != 0, described
    return *kind, *(launch.bucket(size) for size in sizes)


def configs(half: Choices, single: Choices, x: Tensor, y: Tensor, described: bool) -> Sequence[triton.Config]:
    """The choices for blocks of ``x`` and ``y``, by descriptors where they can be described; the first by pointers as
    well."""
    width = max(64, channels(x.shape[3]), channels(y.shape[3]))
    return _configs((half if x.dtype.itemsize == 2 else single)[width], described)


@functools.cache
def _configs(choices: tuple[Choice, ...], described: bool) -> Sequence[triton.Config]:
    ways = [(True, choices), (False, choices[:1])] if described else [(False, choices)]
    return tuple(
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "DESCRIBED": way}, warps, stages)
        for way, some in ways
        for m, n, warps, stages in some
    )


def describable(*tensors: Tensor) -> bool:
    """Whether the device's copying engine (TMA) takes them: half precision, everything at multiples of 16 bytes."""
    return all(
        x.dtype.itemsize == 2
        and x.data_ptr() % 16 == 0
        and x.stride(-1) == 1
        and all(stride > 0 and stride % 8 == 0 for stride in x.stride()[:-1])
        for x in tensors
    )


def source(x: Tensor, rows: int, described: bool) -> Tensor | TensorDescriptor:
    """What a kernel reads so many rows of a head from at a time."""
    if not described:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, channels(x.shape[3])])
