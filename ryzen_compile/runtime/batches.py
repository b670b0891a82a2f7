"""Texts of about one length side by side: what an encoder reads at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

BATCH_TOKENS = 16_384  # of a batch with its padding: attention takes memory by the square of a text's length


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[np.ndarray]:
    """The numbers of texts that share a batch, the longest first; texts of no tokens are in none."""
    order = np.argsort(-np.array(lengths, dtype=np.int64), kind="stable")
    order = order[: int(np.count_nonzero(lengths))]
    start = 0
    while start < len(order):
        size = max(1, min(batch_size, BATCH_TOKENS // lengths[order[start]]))
        yield order[start : start + size]
        start += size


def padded(ids: Sequence[np.ndarray], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as tokens and mask, both ``(B, T)`` int64, T that of the longest; padding is behind."""
    lengths = np.array([len(row) for row in ids])
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    tokens = np.full(mask.shape, pad, np.int64)
    tokens[mask == 1] = np.concatenate(ids)
    return tokens, mask
