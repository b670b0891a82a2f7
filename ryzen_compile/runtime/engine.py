"""What the decode loop needs from a backend, and nothing more: one ``step``; and what encoding needs: one ``embed``.

An engine turns new tokens plus a cache into logits. It knows no sampling, no stopping and no batch policy; the loop in
``generate`` knows no backend. ``ModelSpec`` and ``CacheSlot`` are re-exported, so that an engine can be written against
this module alone.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ryzen_compile.errors import UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.storage import Storage
from ryzen_compile.spec import CacheSlot, ModelSpec

__all__ = ["CacheSlot", "EncoderEngine", "Engine", "ModelSpec", "check_last"]


class Engine(Protocol):
    """A compiled model that can be advanced by some tokens.

    ``slots`` lays out the cache that ``step`` reads and writes. ``all_logits`` says whether ``step`` returns the logits
    of every new token, ``(B, T, V)``, or of as many as it is asked for. ``verifies`` says whether those may be more
    than one, as checking drafted tokens takes. Steps of ``prompt_from`` tokens and more compute a token's row alike,
    whatever else is in the step, but for the last bits of a float32 sum; smaller ones may use another form of the
    weights. ``storage`` is where the caches that it steps on must lie.
    """

    name: str
    spec: ModelSpec
    slots: tuple[CacheSlot, ...]
    all_logits: bool
    verifies: bool
    prompt_from: int
    storage: Storage

    def step(self, tokens: np.ndarray, cache: KVCache, last: int = 1) -> np.ndarray:
        """Logits ``(B, n, V)`` float32 after ``tokens`` ``(B, T)`` int64 were appended to ``cache``; those of the
        ``last`` newest tokens, ``1 <= last <= T``, are ``[:, -last:]``.

        The T new tokens of row b take the positions ``cache.lengths[b] .. cache.lengths[b] + T - 1``; the cache has
        room for them. Their keys and values are written into its buffers in place; its lengths are left alone, the
        caller advances them. T > 1 together with B > 1 occurs only when every row is empty. The array returned is
        the caller's until the next ``step``: an engine may reuse its storage.

        ``last`` > 1 occurs only where the engine ``verifies``. Such a step uses the form of the weights that steps of
        one token use.
        """
        ...

    def close(self) -> None:
        """Give up sessions and buffers. ``step`` is not called afterwards; ``close`` may be called again."""
        ...


class EncoderEngine(Protocol):
    """A compiled encoder: a batch of texts becomes a vector each, pooled as ``spec.pooling`` says.

    A row's vector does not depend on the rows beside it nor on how far they are padded, but for float32 rounding.
    """

    name: str
    spec: ModelSpec

    def embed(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Vectors ``(B, C)`` float32 of ``tokens`` ``(B, T)`` int64, of which those count whose ``mask`` ``(B, T)``
        int64 is 1; every row has one. The array returned is the caller's."""
        ...

    def close(self) -> None:
        """Give up sessions and buffers. ``embed`` is not called afterwards; ``close`` may be called again."""
        ...


def check_last(last: int, tokens: np.ndarray, verifies: bool) -> None:
    """Raises ``UsageError`` for a number of tokens whose logits a step of ``tokens`` ``(B, T)`` cannot give."""
    if not 1 <= last <= tokens.shape[1]:
        raise UsageError(f"logits of {last} tokens were asked for in a step of {tokens.shape[1]}")
    if last > 1 and not verifies:
        raise UsageError(f"logits of {last} tokens were asked for, and the model gives those of the newest one only")
