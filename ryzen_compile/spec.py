"""What a decoder is, in numbers: plain facts that every layer may hold and JSON can carry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSpec:
    """Read off the captured graph and the model's config.

    ``heads``, ``kv_heads`` and ``head_dim`` are the first attention layer's; models whose layers differ carry the
    exact numbers in their cache slots. ``architecture`` is for people to read: nothing branches on it.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    context: int
    tied: bool
    parameters: int
    architecture: str


@dataclass(frozen=True)
class CacheSlot:
    """One attention layer's place in the key/value cache; ``dtype`` is ``"fp32"``."""

    layer: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str = "fp32"
