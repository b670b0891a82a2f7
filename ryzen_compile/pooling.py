"""The vectors of a text's tokens as one: what is captured of an encoder, and what is trained through."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ryzen_compile.spec import Pooling

SHORTEST = 1e-12  # a vector that is normalized is divided by this at least


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """``states`` (B, T, C) as one vector (B, C) a row, over the tokens where ``mask`` (B, T), of whole numbers or bool,
    is not 0: at least one in each row, wherever it lies. Gradients reach these alone."""
    counts = mask != 0
    if pooling.mode == "mean":
        weights = counts.to(states.dtype)
        vectors = (weights.unsqueeze(1) @ states).squeeze(1) / weights.sum(1, keepdim=True).clamp(min=1)
    elif pooling.mode == "max":
        vectors = states.masked_fill(~counts.unsqueeze(-1), torch.finfo(states.dtype).min).amax(1)
    else:
        order = torch.arange(mask.shape[1], device=mask.device)
        order = order + 1 if pooling.mode == "last" else mask.shape[1] - order
        chosen = (counts * order).argmax(1)
        vectors = states.gather(1, chosen[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1)
    return nn.functional.normalize(vectors, dim=1, eps=SHORTEST) if pooling.normalize else vectors
