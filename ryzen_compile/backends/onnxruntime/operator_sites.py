"""Operators that are measured alone: what each reads and computes, in names of its graph's values and in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

Kind = Literal["product", "attention", "norm"]
KINDS: tuple[Kind, ...] = ("product", "attention", "norm")


@dataclass(frozen=True)
class Product:
    """``x`` (..., K) times a weight (N, K), with a bias or without."""

    kind: ClassVar[Kind] = "product"
    x: str
    shape: tuple[int, ...]
    width: int
    bias: bool
    out: str

    @property
    def out_shape(self) -> tuple[int, ...]:
        return *self.shape[:-1], self.width

    @property
    def text(self) -> str:
        """Rows x K x N."""
        return f"{prod(self.shape[:-1])}x{self.shape[-1]}x{self.width}"


@dataclass(frozen=True)
class Norm:
    """Over the last dimension of ``x``, to which ``skip`` and ``added`` are added first where they are given; ``sums``
    says that the sum is a result, too. ``weight``, ``shift`` and ``added`` are constants (C,)."""

    kind: ClassVar[Kind] = "norm"
    x: str
    shape: tuple[int, ...]
    centred: bool
    epsilon: float
    weight: str
    shift: str
    skip: str
    added: str
    sums: str
    out: str

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def text(self) -> str:
        """Rows x channels."""
        return f"{prod(self.shape[:-1])}x{self.shape[-1]}"


@dataclass(frozen=True)
class Attention:
    """Of ``tokens`` queries over the cache ``slot``; ``x`` are query, key and value, or all three packed in one.

    ``width`` is the size of a head as stored. ``window`` counts the keys a query sees (0: all). ``tables`` are the
    cosines and sines (N, R / 2) of a rotation inside, ``sinks`` (H,) logits of each head's softmax.
    """

    kind: ClassVar[Kind] = "attention"
    x: tuple[str, ...]
    tokens: int
    slot: int
    heads: int
    kv_heads: int
    width: int
    scale: float
    softcap: float
    window: int
    tables: tuple[str, str] | None
    interleaved: bool
    sinks: str
    out: str

    @property
    def out_shape(self) -> tuple[int, ...]:
        return 1, self.tokens, self.heads * self.width

    @property
    def text(self) -> str:
        """Tokens x heads / kv heads x channels of a head."""
        return f"{self.tokens}x{self.heads}/{self.kv_heads}x{self.width}"


Site = Product | Norm | Attention
