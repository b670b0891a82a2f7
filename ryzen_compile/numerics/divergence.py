"""How far one set of next-token distributions is from another."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_TOKENS = 32  # whose distributions are held in float64 at a time


def mean_divergence(reference: Tensor, candidate: Tensor) -> tuple[float, float]:
    """(mean KL(reference || candidate) in nats per token, share of tokens whose most likely successor is the same).

    Both are logits (..., V) of any floating-point type; the sums are taken in float64.
    """
    theirs, ours = reference.flatten(0, -2), candidate.flatten(0, -2)
    divergence = agreement = 0.0
    for one, other in zip(theirs.split(CHUNK_TOKENS), ours.split(CHUNK_TOKENS), strict=True):
        p, q = (torch.log_softmax(part.double(), dim=-1) for part in (one, other))
        divergence += float((p.exp() * (p - q)).sum())
        agreement += int((p.argmax(-1) == q.argmax(-1)).sum())
    return divergence / len(theirs), agreement / len(theirs)
