"""What an error in a row of a table costs the model's predictions: its diagonal Fisher information, on text.

The squared gradient of the log-likelihood of tokens drawn from the model's own predictions, at what the lookup gave
(SqueezeLLM, Kim et al., 2023, weights k-means by the same quantity). It counts how often a token occurs and how much
hangs on it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ryzen_compile.train.lookup import SubstitutedLookup, check_looked_up, evaluating, find_table, logits

SMOOTHING = 0.01  # of the mean, for rows that the text does not reach


def row_fisher(model: nn.Module, name: str, windows: Tensor, *, seed: int = 0) -> Tensor:
    """(V,) float32 with a mean of 1, for the parameter ``name`` (V, C) and text ``windows`` (n, T) int64.

    Mean over a row's channels, summed over its occurrences; one draw a token, one window at a time. The model is left
    as it was. Raises ``UsageError`` for a parameter that is not there, or not looked up.
    """
    table = find_table(model, name)
    sums = torch.zeros(len(table))
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        for ids in windows.split(1):
            sums.index_add_(0, ids.reshape(-1), _squared_gradients(model, table, name, ids, generator))
    mean = sums.mean()
    return torch.where(mean > 0, sums / mean, 1.0) * (1 - SMOOTHING) + SMOOTHING


def _squared_gradients(model: nn.Module, table: Tensor, name: str, ids: Tensor, generator: torch.Generator) -> Tensor:
    """(T,) float32: of the rows that ``ids`` (1, T) look up."""
    rows = table.detach()[ids].requires_grad_()
    with SubstitutedLookup(table, ids, lambda given: rows.reshape(*given.shape, -1)) as lookup:
        likelihood = torch.log_softmax(logits(model, ids), dim=-1).flatten(0, 1)
    check_looked_up(lookup.calls, name)
    drawn = torch.multinomial(likelihood.detach().exp(), 1, generator=generator)
    (gradient,) = torch.autograd.grad(likelihood.gather(1, drawn).sum(), rows)
    return gradient.float().square().mean(-1).reshape(-1)
