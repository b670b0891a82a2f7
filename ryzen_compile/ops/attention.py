"""Scaled dot-product attention with grouped heads, over a whole sequence and over a cache.

Grouped heads as in GQA (Ainslie et al., 2023): query head ``h`` reads kv head ``h // (H / K)``. ``window`` counts the
keys a query sees, itself included (0: all). ``softcap`` bounds the scores by ``c tanh(s / c)`` (Gemma 2; 0: off).
``sinks`` (H,) adds one logit per head to the softmax's denominator (gpt-oss).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ryzen_compile.ops.precision import wide
from ryzen_compile.ops.rotary import rotate


def _attend(
    q: Tensor,  # (B, H, T, D)
    k: Tensor,  # (B, K, S, D)
    v: Tensor,  # (B, K, S, D')
    visible: Tensor,  # bool, broadcastable to (B, 1, T, S)
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Returns (B, T, H, D')."""
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
        weights = scores.softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).contiguous()


def _visible(query: Tensor, key: Tensor, causal: bool, window: int) -> Tensor:
    """``query`` (..., T, 1) and ``key`` (..., 1, S) positions; true where the query may look."""
    seen = key <= query if causal else torch.ones_like(key <= query)
    return seen & (key > query - window) if window else seen


@torch.library.custom_op("ryzen::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float, causal: bool
) -> Tensor:
    """Attention of a whole sequence to itself: ``q`` (B, H, T, D), ``k`` (B, K, T, D), ``v`` (B, K, T, D'), H a
    multiple of K; returns (B, T, H, D')."""
    at = torch.arange(q.shape[2], device=q.device)
    return _attend(q, k, v, _visible(at[:, None], at[None, :], causal, window), sinks, scale, softcap)


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float, causal: bool
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotates the new queries and keys, appends keys and values to the cache, and attends causally over it.

    ``q`` (B, T, H D), ``k`` (B, T, K D), ``v`` (B, T, K D'); or ``q`` (B, T, (H + 2 K) D) packing all three, with
    ``k`` and ``v`` none. ``k_cache`` (B, K, S, D), ``v_cache`` (B, K, S, D'). ``lengths`` (B,) counts each row's tokens
    *including* the T new ones, which therefore take positions ``lengths - T .. lengths - 1``. ``cos`` and ``sin``
    (N, R), or none for no rotation. Returns the output (B, T, H D') and both caches with the new rows in place.
    """
    b, t = q.shape[:2]
    kv_heads, capacity, d = k_cache.shape[1:]
    if k is None or v is None:
        q, k, v = q.split((heads * d, kv_heads * d, kv_heads * v_cache.shape[3]), dim=-1)
    queries = q.reshape(b, t, heads, d).transpose(1, 2)
    keys = k.reshape(b, t, kv_heads, d).transpose(1, 2)
    values = v.reshape(b, t, kv_heads, -1).transpose(1, 2)
    positions = lengths.to(torch.int64)[:, None] - t + torch.arange(t, device=q.device)  # (B, T)
    if cos is not None and sin is not None:
        turn_cos, turn_sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
        queries, keys = (rotate(x, turn_cos, turn_sin, interleaved) for x in (queries, keys))
    rows = torch.arange(b, device=q.device)[:, None]
    k_cache, v_cache = (c.clone(memory_format=torch.contiguous_format) for c in (k_cache, v_cache))
    k_cache[rows, :, positions] = keys.transpose(1, 2)
    v_cache[rows, :, positions] = values.transpose(1, 2)
    at = torch.arange(capacity, device=q.device)
    visible = _visible(positions[:, None, :, None], at[None, None, None, :], True, window)
    out = _attend(queries, k_cache, v_cache, visible, sinks, scale, softcap)
    return out.reshape(b, t, -1), k_cache, v_cache


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
) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty((*q.shape[:2], heads * v_cache.shape[3]))
    return out, k_cache.new_empty(k_cache.shape), v_cache.new_empty(v_cache.shape)
