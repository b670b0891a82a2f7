"""Scaled dot-product attention with grouped heads, over a whole sequence and over a cache.

Grouped heads as in GQA (Ainslie et al., 2023): query head ``h`` reads kv head ``h // (H / K)``. A ``window`` bounds how
far a query sees: keys less than ``window`` positions away, itself included, and where it is not causal so to both sides
(0: all). ``softcap`` bounds the scores by ``c tanh(s / c)`` (Gemma 2; 0: off). ``sinks`` (H,) adds one logit per head
to the softmax's denominator (gpt-oss).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ryzen_compile.numerics import rows
from ryzen_compile.ops.precision import wide
from ryzen_compile.ops.rotary import rotate
from ryzen_compile.spec import resident_rows

FLOAT = "fp32"  # the format of a cache that holds what the model computes, in the model's own precision


def _attend(
    q: Tensor,  # (B, H, T, D)
    k: Tensor,  # (B, K, S, D)
    v: Tensor,  # (B, K, S, D')
    visible: Tensor,  # bool, broadcastable to (B, 1, T, S)
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Returns (B, T, H, D'); zeros for a query that sees no key."""
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, dim=1)
    v = v.repeat_interleave(groups, dim=1)
    scores = wide(q @ k.transpose(-1, -2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1).masked_fill(~visible, 0.0)  # NaN where a query sees nothing
    return (weights.to(v.dtype) @ v).transpose(1, 2).contiguous()


def _visible(query: Tensor, key: Tensor, causal: bool, window: int) -> Tensor:
    """``query`` (..., T, 1) and ``key`` (..., 1, S) positions; true where the query may look."""
    ahead = key - query
    seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    return seen & (ahead.abs() < window) if window else seen


@torch.library.custom_op("ryzen::attention", mutates_args=())
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
    """Attention of a whole sequence to itself: ``q`` (B, H, T, D), ``k`` (B, K, T, D), ``v`` (B, K, T, D'), H a
    multiple of K; returns (B, T, H, D').

    ``mask`` (B, T), of integers or bool, is zero where a key is padding, which no query sees; one that sees no key at
    all, padding itself in a window of padding, gets zeros.
    """
    at = torch.arange(q.shape[2], device=q.device)
    visible = _visible(at[:, None], at[None, :], causal, window)
    if mask is not None:
        visible = visible & (mask != 0)[:, None, None, :]
    return _attend(q, k, v, visible, sinks, scale, softcap)


@attention.register_fake
def _(
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
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


@torch.library.custom_op("ryzen::cached_attention", mutates_args=())
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
    """Rotates the new queries and keys, appends keys and values to the cache, and attends causally over it.

    ``q`` (B, T, H D), ``k`` (B, T, K D), ``v`` (B, T, K D'); or ``q`` (B, T, H D + K (D + D')) packing all three,
    with ``k`` and ``v`` none. ``k_cache`` (B, K, S, W) and ``v_cache`` (B, K, S, W') hold rows as ``k_format`` and
    ``v_format`` (``numerics.rows``) store them, with ``k_scale`` (1, K, 1, D) and ``v_scale`` (1, K, 1, D') where
    scales are fixed. What is attended to is what is stored, the new tokens included. ``lengths`` (B,) counts each row's
    tokens *including* the T new ones, which therefore take positions ``lengths - T .. lengths - 1``. ``cos`` and
    ``sin`` (N, R), or none for no rotation. Before they are stored, rotated keys lose ``k_mean`` (1, K, 1, D): a
    constant changes all scores of a query by the same, which softmax does not see unless there are sinks or a soft cap.
    ``turned`` then multiplies queries and keys by ``hadamard(D)``, which leaves their products alone and spreads
    outliers before rounding. Keys are rounded once, as they are stored. A ``rolling`` cache keeps
    ``spec.resident_rows`` rows of a sequence. Returns the output (B, T, H D') and both caches with the new rows in
    place.
    """
    b, t = q.shape[:2]
    kv_heads = k_cache.shape[1]
    if k is None or v is None:
        d, value_dim = _channels(k_cache, k_format), _channels(v_cache, v_format)
        q, k, v = q.split((heads * d, kv_heads * d, kv_heads * value_dim), dim=-1)
    queries = wide(q.reshape(b, t, heads, -1).transpose(1, 2))
    keys = wide(k.reshape(b, t, kv_heads, -1).transpose(1, 2))
    values = v.reshape(b, t, kv_heads, -1).transpose(1, 2)
    positions = lengths.to(torch.int64)[:, None] - t + torch.arange(t, device=q.device)  # (B, T)
    if cos is not None and sin is not None:
        turn_cos, turn_sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
        queries, keys = (rotate(x, turn_cos, turn_sin, interleaved) for x in (queries, keys))
    if k_mean is not None:
        keys = keys - k_mean
    if turned:
        spread = torch.from_numpy(rows.hadamard(keys.shape[-1])).to(keys)
        queries, keys = queries @ spread, keys @ spread
    queries = queries.to(q.dtype)
    new = _stored(keys, k_format, k_scale, k_cache), _stored(values, v_format, v_scale, v_cache)
    place = _roll if rolling else _append
    held, at, caches = place((k_cache, v_cache), new, positions, window)
    key_rows, value_rows = (
        _read(held[0], k_format, keys.shape[-1], k_scale, queries),
        _read(held[1], v_format, values.shape[-1], v_scale, queries),
    )
    visible = _visible(positions[:, None, :, None], at[:, None, None, :], True, window) & (at >= 0)[:, None, None, :]
    out = _attend(queries, key_rows, value_rows, visible, sinks, scale, softcap)
    return out.reshape(b, t, -1), *caches


Caches = tuple[Tensor, Tensor]


def _append(caches: Caches, new: Caches, positions: Tensor, window: int) -> tuple[Caches, Tensor, Caches]:
    """Row p of the cache is position p. Returns the rows to attend to, their positions (B, S), and the caches."""
    batch, capacity = len(positions), caches[0].shape[2]
    rows_of = torch.arange(batch, device=positions.device)[:, None]
    both = tuple(c.clone(memory_format=torch.contiguous_format) for c in caches)
    for cache, added in zip(both, new, strict=True):
        cache[rows_of, :, positions] = added.transpose(1, 2)
    at = torch.arange(capacity, device=positions.device).expand(batch, -1)
    return (both[0], both[1]), at, (both[0], both[1])


def _roll(caches: Caches, new: Caches, positions: Tensor, window: int) -> tuple[Caches, Tensor, Caches]:
    """Old rows and new ones side by side, what is absent at position -1; the caches keep the most recent."""
    batch, t = positions.shape
    capacity = caches[0].shape[2]
    held = tuple(torch.cat((old, added), dim=2) for old, added in zip(caches, new, strict=True))
    at = torch.full((batch, capacity + t), -1, device=positions.device)
    kept = tuple(c.clone(memory_format=torch.contiguous_format) for c in caches)
    for b, (first, last) in enumerate(zip(positions[:, 0].tolist(), positions[:, -1].tolist(), strict=True)):
        before = resident_rows(first, capacity, window)
        at[b, :before] = torch.arange(first - before, first)
        at[b, capacity:] = positions[b]
        after = resident_rows(last + 1, capacity, window)
        order = torch.cat((torch.arange(before), torch.arange(capacity, capacity + t)))[-after:]
        for cache, both in zip(kept, held, strict=True):
            cache[b, :, :after] = both[b, :, order]
    return (held[0], held[1]), at, (kept[0], kept[1])


def _channels(cache: Tensor, form: str) -> int:
    """Of the rows that a cache holds."""
    return rows.RowFormat.parse(form).channels(cache.shape[3])


def _stored(x: Tensor, form: str, scale: Tensor | None, cache: Tensor) -> Tensor:
    """Rows (B, K, T, D) as ``cache`` holds them."""
    if form == FLOAT:
        return x.to(cache.dtype)
    fixed = None if scale is None else scale.detach().cpu().numpy()
    coded = rows.encode(wide(x).detach().cpu().numpy(), rows.RowFormat.parse(form), fixed)
    return torch.from_numpy(coded).to(x.device)


def _read(held: Tensor, form: str, dim: int, scale: Tensor | None, like: Tensor) -> Tensor:
    """The inverse of ``_stored``, in the precision of ``like``."""
    if form == FLOAT:
        return held.to(like.dtype)
    fixed = None if scale is None else scale.detach().cpu().numpy()
    decoded = rows.decode(held.cpu().numpy(), rows.RowFormat.parse(form), dim, fixed)
    return torch.from_numpy(decoded).to(like)


@cached_attention.register_fake
def _(
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
    out = q.new_empty((*q.shape[:2], heads * _channels(v_cache, v_format)))
    return out, k_cache.new_empty(k_cache.shape), v_cache.new_empty(v_cache.shape)


@torch.library.custom_op("ryzen::cached_attention_inplace", mutates_args=("k_cache", "v_cache"))
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
    """``cached_attention`` for engines that own their caches: the new rows are written to those given, and only the
    output (B, T, H D') is returned."""
    out, keys, values = cached_attention(
        q, k, v, k_cache, v_cache, lengths, cos, sin, sinks, heads, scale, window, softcap, interleaved, k_scale,
        v_scale, k_format, v_format, turned, rolling, k_mean,
    )  # fmt: skip
    k_cache.copy_(keys)
    v_cache.copy_(values)
    return out


@cached_attention_inplace.register_fake
def _(
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
    return q.new_empty((*q.shape[:2], heads * _channels(v_cache, v_format)))
