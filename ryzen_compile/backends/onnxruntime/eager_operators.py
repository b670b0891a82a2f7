"""What PyTorch does eagerly, in float32, where an artifact has one operator: what its operators are measured against.

Each function returns a call that computes all of its operators once, one after the other, with the functions that a
model in PyTorch calls: ``linear``; ``rms_norm`` or ``layer_norm``, behind an addition where the norm has one; for an
attention, what transformers does: heads are split and turned, the new keys and values appended with ``cat`` to those in
the cache, and ``scaled_dot_product_attention`` runs over all of them. Where scores are capped or have sinks, which that
function does not know, softmax is spelled out, as transformers spells it then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ryzen_compile.backends.onnxruntime.operator_sites import Attention, Norm, Product

Run = Callable[[], list[Tensor]]
Arrays = Mapping[str, np.ndarray]
Constant = Callable[[str], np.ndarray]


def products(sites: Sequence[Product], arrays: Arrays) -> Run:
    """Over random weights (N, K), each of its own: the time of a float32 product does not depend on their values, but
    on how much memory it reads."""
    random = torch.Generator().manual_seed(0)
    parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for site in sites:
        weight = torch.rand(site.width, site.shape[-1], generator=random) - 0.5
        parts.append((_tensor(arrays[site.x]), weight, torch.rand(site.width) if site.bias else None))
    return lambda: [functional.linear(x, weight, bias) for x, weight, bias in parts]


def norms(sites: Sequence[Norm], arrays: Arrays, constant: Constant) -> Run:
    """Over the model's own weights."""
    parts = [_norm(site, arrays, constant) for site in sites]
    return lambda: [part() for part in parts]


def _norm(site: Norm, arrays: Arrays, constant: Constant) -> Callable[[], Tensor]:
    x, size = _tensor(arrays[site.x]), site.shape[-1:]
    weight = _tensor(constant(site.weight)).reshape(size)
    skip = _tensor(arrays[site.skip]) if site.skip else None
    shift, added = (_tensor(constant(name)).reshape(size) if name else None for name in (site.shift, site.added))

    def run() -> Tensor:
        total = x if added is None else x + added
        total = total if skip is None else total + skip
        if site.centred:
            return functional.layer_norm(total, size, weight, shift, site.epsilon)
        return functional.rms_norm(total, size, weight, site.epsilon)

    return run


def attentions(
    sites: Sequence[Attention],
    arrays: Arrays,
    constant: Constant,
    caches: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    context: int,
    channels: Sequence[int],
) -> Run:
    """Behind ``caches``, one pair (1, K, ``kept(site, context)``, D) float32 for each site, which stay as they are.

    Heads are cut to ``channels``, one number for each site: the model's own, where the artifact pads them. What
    rotations need is looked up once for all attentions, as transformers does.
    """
    parts = [
        _EagerAttention(site, arrays, constant, cache, context, own)
        for site, cache, own in zip(sites, caches, channels, strict=True)
    ]
    tables = {part.turn: [_tensor(constant(name)) for name in part.site.tables] for part in parts if part.site.tables}
    positions = torch.arange(context, context + sites[0].tokens)

    def run() -> list[Tensor]:
        turns = {key: [_spread(table[positions], *key[1:]) for table in pair] for key, pair in tables.items()}
        return [part(turns) for part in parts]

    return run


def kept(site: Attention, context: int) -> int:
    """The cached tokens, of ``context``, that an attention still reads: a window holds the new token as well."""
    return min(context, site.window - 1) if site.window else context


class _EagerAttention:
    """One attention, called with the cosines and sines of each rotation."""

    def __init__(
        self,
        site: Attention,
        arrays: Arrays,
        constant: Constant,
        cache: tuple[np.ndarray, np.ndarray],
        context: int,
        channels: int,
    ) -> None:
        self.site, self.channels = site, channels
        self.turn = site.tables, channels, site.interleaved  # what its rotation depends on
        self.x = [_cut(_tensor(arrays[name]), site.width, channels) for name in site.x]
        self.keys, self.values = (_tensor(np.ascontiguousarray(half[..., :channels])) for half in cache)
        self.sinks = _tensor(constant(site.sinks)).view(1, -1, 1, 1) if site.sinks else None
        held = kept(site, context)
        self.mask = _mask(site.tokens, held, site.window)
        self.spelled = bool(site.softcap) or self.sinks is not None
        self.causal = site.tokens > 1 and self.mask is None

    def __call__(self, turns: Mapping[Any, Sequence[Tensor]]) -> Tensor:
        site, d = self.site, self.channels
        if len(self.x) == 1:
            q, k, v = self.x[0].split((site.heads * d, site.kv_heads * d, site.kv_heads * d), dim=-1)
        else:
            q, k, v = self.x
        q, k, v = (x.view(1, site.tokens, -1, d).transpose(1, 2) for x in (q, k, v))
        if site.tables:
            cos, sin = turns[self.turn]
            q, k = _turn(q, cos, sin, site.interleaved), _turn(k, cos, sin, site.interleaved)
        k, v = torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2)
        if self.spelled:
            out = self._spelled_out(q, k, v)
        else:
            out = functional.scaled_dot_product_attention(
                q, k, v, self.mask, is_causal=self.causal, scale=site.scale, enable_gqa=site.heads != site.kv_heads
            )
        return out.transpose(1, 2).reshape(1, site.tokens, -1)

    def _spelled_out(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        site = self.site
        groups = site.heads // site.kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(2, 3) * site.scale
        if site.softcap:
            scores = torch.tanh(scores / site.softcap) * site.softcap
        mask = self.mask if self.mask is not None or site.tokens == 1 else _mask(site.tokens, 0, site.tokens + 1)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        if self.sinks is None:
            return scores.softmax(-1) @ v
        sinks = self.sinks.expand(1, -1, site.tokens, 1)
        return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1] @ v


def _mask(tokens: int, held: int, window: int) -> Tensor | None:
    """(T, held + T) bool, true where a token may look; None where it may look at all, or ``is_causal`` says as much."""
    if tokens == 1 or not (held or window):
        return None
    query, key = torch.arange(held, held + tokens)[:, None], torch.arange(held + tokens)[None]
    seen = key <= query
    return seen & (key > query - window) if window else seen


def _spread(angles: Tensor, channels: int, interleaved: bool) -> Tensor:
    """(T, R / 2) cosines or sines -> (T, R), one for each channel that is turned, of at most ``channels``."""
    half = angles[:, : channels // 2]
    return half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """``x`` (1, H, T, D) with its first R channels turned in pairs."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if interleaved:
        partners = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        low, high = turned.chunk(2, -1)
        partners = torch.cat((-high, low), -1)
    turned = turned * cos + partners * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def _cut(x: Tensor, width: int, channels: int) -> Tensor:
    """(1, T, heads ``width``) -> (1, T, heads ``channels``)."""
    return x if width == channels else x.unflatten(-1, (-1, width))[..., :channels].flatten(-2)


def _tensor(array: np.ndarray) -> Tensor:
    """Over a copy of its own: neither side is to find in a cache what the other has just read."""
    return torch.from_numpy(np.array(array, np.float32))
