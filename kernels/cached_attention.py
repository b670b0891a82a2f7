"""Attention over a key/value cache on a GPU: ``ryzen::cached_attention`` and its in-place form.

New rows are stored (``cache_rows``), programs walk over stored rows, several for the same queries where there are too
few queries to fill the device, and what these found is merged (``cache_walk``). Everything is decided from shapes:
nothing waits for the device, and a captured graph serves every length.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.kernels import cache_rows, launch
from ryzen_compile.kernels.cache_operands import StoredRows
from ryzen_compile.kernels.cache_step import CacheStep
from ryzen_compile.kernels.cache_walk import merge_kernel, walk_kernel
from ryzen_compile.kernels.rotary import expect_floats
from ryzen_compile.ops.attention import FLOAT

FEWEST_ROWS, FEW_ROWS = 16, 32  # queries of a tile: the least that a product takes, and what counts as decoding
NARROW = 128  # channels of a head, up to which a block may be of full size
# Queries of a tile, rows of a block, warps, stages, and programs that a processor is meant to run at a time; float32
# is multiplied without tensor cores and takes more registers. The first of each kind spill little or nothing.
Shapes = tuple[tuple[int, int, int, int, int], ...]
DECODING: Shapes = (
    (32, 64, 4, 3, 2), (32, 64, 4, 2, 3), (32, 64, 4, 4, 2), (32, 128, 4, 3, 2), (32, 128, 8, 3, 1), (32, 32, 4, 4, 3),
    (32, 64, 2, 3, 4), (32, 64, 8, 3, 2),
)  # fmt: skip
DECODING_FLOAT32: Shapes = ((32, 32, 8, 2, 2), (32, 32, 8, 3, 2), (32, 16, 4, 2, 3), (32, 64, 8, 2, 1))
READING: Shapes = (
    (64, 64, 4, 2, 2), (128, 64, 8, 2, 1), (128, 64, 8, 3, 1), (128, 128, 8, 2, 1), (64, 32, 4, 3, 2),
    (64, 64, 8, 2, 2),
)  # fmt: skip
READING_WIDE: Shapes = ((64, 64, 8, 2, 1), (64, 32, 8, 2, 2), (128, 32, 8, 2, 1), (128, 64, 8, 2, 1))
READING_FLOAT32: Shapes = ((32, 16, 8, 2, 2), (32, 32, 8, 2, 2), (64, 32, 8, 2, 1))
MERGING = 2  # what the second kernel costs, in blocks
MOST_SPLITS = 256
INTERPRETED_PROCESSORS = 2
LOG2_E = math.log2(math.e)


@dataclass(frozen=True, eq=False)
class _Attention:
    """One step with its rows as they are read, and how products become weights."""

    step: CacheStep
    keys: StoredRows
    values: StoredRows
    sinks: Tensor | None
    scale: float
    window: int
    softcap: float

    @property
    def factor(self) -> float:
        """Of products: to powers of two, or into the soft cap's exponent."""
        return 2 * LOG2_E * self.scale / self.softcap if self.softcap else LOG2_E * self.scale

    @property
    def sharing(self) -> int:
        """Heads that share a kv head."""
        return self.step.heads // self.step.kv_heads


def cached_attention_inplace(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    sinks: Tensor | None,
    heads: int,
    scale: float,
    window: int,
    softcap: float,
    interleaved: bool,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_format: str = FLOAT,
    v_format: str = FLOAT,
    turned: bool = False,
    rolling: bool = False,
    k_mean: Tensor | None = None,
) -> Tensor:
    """The operator ``ryzen::cached_attention_inplace``: writes the new rows to the caches, returns (B, T, H D').

    Nothing of a cache behind a sequence's length is read. Rows of a length beyond the capacity or the tables, or below
    T, are neither written nor read; what comes out for them means nothing. Raises ``UsageError`` for tensors that do
    not fit together, ``UnsupportedError`` for rolling caches, types and sizes that the kernels do not have.
    """
    op = "cached_attention"
    if rolling:
        raise UnsupportedError(
            f"{op}: the kernels keep every row, this cache drops old ones",
            hint="keep the layer's window in a cache of the whole context",
        )
    step = CacheStep.of(
        op, q, k, v, k_cache, v_cache, lengths, cos, sin, heads, interleaved, k_scale, v_scale, k_format, v_format,
        turned, k_mean,
    )  # fmt: skip
    if sinks is not None:
        expect_floats(op, sinks=sinks)
        if sinks.shape != (heads,):
            raise UsageError(f"{op}: sinks must be ({heads},), got {tuple(sinks.shape)}")
        launch.expect_device(op, q=q, sinks=sinks)
        sinks = sinks.contiguous()
    attention = _Attention(
        step, StoredRows(step.keys), StoredRows(step.values), sinks, scale, window, softcap
    )  # which refuses before anything is written
    out = launch.empty((step.batch, step.tokens, heads * step.values.dim), q.dtype, q.device)
    if out.numel():
        with launch.on(q):
            _attend(attention, cache_rows.store(step), out)
    return out


def cached_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    sinks: Tensor | None,
    heads: int,
    scale: float,
    window: int,
    softcap: float,
    interleaved: bool,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_format: str = FLOAT,
    v_format: str = FLOAT,
    turned: bool = False,
    rolling: bool = False,
    k_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``ryzen::cached_attention``: as in place, on copies of the caches, which are returned too."""
    keys, values = (cache.clone(memory_format=torch.contiguous_format) for cache in (k_cache, v_cache))
    out = cached_attention_inplace(
        q, k, v, keys, values, lengths, cos, sin, sinks, heads, scale, window, softcap, interleaved, k_scale, v_scale,
        k_format, v_format, turned, rolling, k_mean,
    )  # fmt: skip
    return out, keys, values


def _attend(attention: _Attention, queries: Tensor, out: Tensor) -> None:
    """Fills ``out`` (B, T, H D'), in the way that is fastest for caches that are full."""
    step = attention.step
    rows = step.tokens * attention.sharing
    full: list[Tensor] = []

    def trial(config: triton.Config) -> None:
        if not full:
            full.append(torch.full_like(step.lengths, step.capacity))
        _launch(attention, queries, full[0], out, config)

    key = (
        out.dtype, step.keys.form, step.values.form, step.keys.dim, step.values.dim, launch.bucket(rows),
        launch.bucket(step.batch * step.kv_heads), launch.bucket(step.capacity), attention.window > 0,
    )  # fmt: skip
    config = launch.tuned("cached_attention", key, _candidates(step, rows, out.dtype), trial, out.device)
    _launch(attention, queries, step.lengths, out, config)


def _candidates(step: CacheStep, rows: int, dtype: torch.dtype) -> list[triton.Config]:
    """Tiles of ``ROWS`` queries, ``BLOCK`` rows of the cache at a time, ``EACH`` programs for every processor."""
    wide, few = max(step.keys.dim, step.values.dim) > NARROW, rows <= FEW_ROWS
    if dtype == torch.float32:
        shapes = DECODING_FLOAT32 if few else READING_FLOAT32
    else:
        shapes = DECODING if few else READING_WIDE if wide else READING
    halved = 2 if wide and few else 1
    return [
        triton.Config(
            {"ROWS": tile, "BLOCK": max(block // halved, FEWEST_ROWS), "EACH": each}, num_warps=warps, num_stages=stages
        )
        for tile, block, warps, stages, each in shapes
    ]


def _launch(attention: _Attention, queries: Tensor, lengths: Tensor, out: Tensor, config: triton.Config) -> None:
    """Both kernels, the second only where there is something to merge."""
    step, keys, values, sharing = attention.step, attention.keys, attention.values, attention.sharing
    rows = min(max(launch.bucket(step.tokens * sharing), FEWEST_ROWS), config.kwargs["ROWS"])
    block, window = config.kwargs["BLOCK"], attention.window
    tiles = triton.cdiv(step.tokens * sharing, rows)
    reach = min(step.capacity, window + rows // sharing) if window else step.capacity
    programs = step.batch * step.kv_heads * tiles
    splits = _splits(programs, triton.cdiv(reach, block), _processors(out.device) * config.kwargs["EACH"])
    count = step.batch * step.tokens * step.heads
    parts = out if splits == 1 else launch.empty((splits, count, step.values.dim), torch.float32, out.device)
    sizes = None if splits == 1 else launch.empty((splits, count), torch.float32, out.device)
    walk_kernel[(programs, splits)](
        queries, keys.cache, values.cache, lengths, step.keys.scale, step.values.scale,
        attention.sinks if splits == 1 else None, parts, sizes, *keys.strides, *values.strides, step.tokens,
        step.capacity, window, step.kv_heads, tiles, splits, attention.factor, attention.softcap * LOG2_E,
        K=tuple(keys.layout), V=tuple(values.layout), SHARING=sharing, K_TYPE=keys.operand(out.dtype),
        V_TYPE=values.operand(out.dtype), WINDOWED=window > 0, CAPPED=attention.softcap != 0, ROWS=rows, BLOCK=block,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if sizes is not None:
        width = triton.next_power_of_2(step.values.dim)
        merge_kernel[(count,)](
            parts, sizes, attention.sinks, out, count, step.heads, splits, DV=step.values.dim, CHANNELS=width,
            SPLITS=triton.next_power_of_2(splits), BLOCK=16, num_warps=launch.warps(16 * width),
        )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _splits(programs: int, blocks: int, slots: int) -> int:
    """How many programs share the blocks of each of ``programs`` tiles, ``slots`` programs running at a time.

    The fewest that take little longer than the best number: time is how many rounds the device makes, times the blocks
    that a program reads in one.
    """
    most = max(min(blocks, MOST_SPLITS), 1)
    times = [-(-programs * n // slots) * -(-blocks // n) + MERGING * (n > 1) for n in range(1, most + 1)]
    return next(n for n, time in enumerate(times, 1) if time <= 1.1 * min(times))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
