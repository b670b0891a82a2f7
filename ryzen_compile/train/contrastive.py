"""What a step minimises when an encoder learns from pairs: InfoNCE with the negatives of its batch.

    loss = mean over queries i of  -log softmax_j (s cos(q_i, p_j)) [j = i]

(van den Oord et al., 2018; as "multiple negatives ranking", Henderson et al., 2017), and, symmetric, the mean of that
and of the same with queries and positives exchanged. A positive that is the same as query i's own is no negative of
it, nor is one whose query is the same: these are masked. With depths the loss is the weighted mean of that of vectors
cut to each; a cosine renormalises what was cut.

A pair is a row of integers: the query's tokens, then, from a fixed column on, the positive's, each filled up with
``PAD``. The loop deals, counts and stores such rows as it does rows of text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ryzen_compile.pooling import pool
from ryzen_compile.train.objective import Levers, Objective
from ryzen_compile.train.token_loss import TokenLoss

if TYPE_CHECKING:
    from ryzen_compile.spec import Pooling

PAD = -1  # no token


class ContrastiveObjective(Objective):
    """``forward(rows (B, Q + P) int64) -> TokenLoss``, of pairs where others have tokens: ``text`` in nats per pair,
    ``correct`` counts the queries whose own positive is nearest. Both are of whole vectors.

    ``model`` is a transformers encoder; ``columns`` is Q. Only the precision of ``levers`` applies: lengths change from
    batch to batch, and there are no logits to do without.
    """

    def __init__(
        self, model: nn.Module, levers: Levers, pooling: Pooling, columns: int, *, scale: float, symmetric: bool
    ) -> None:
        super().__init__(model, replace(levers, linear_cross_entropy=False, compiled=False, operators=False))
        self.pooling, self.columns, self.scale, self.symmetric = pooling, columns, scale, symmetric

    @property
    def channels(self) -> int:
        """C, of the vectors."""
        return int(self.model.config.hidden_size)

    def forward(self, rows: Tensor) -> TokenLoss:
        """See the class."""
        with torch.autocast(rows.device.type, dtype=self.levers.dtype, enabled=self.levers.dtype != torch.float32):
            queries, positives = (self.vectors(part) for part in self.parts(rows))
        counted = ~self.same(rows) | torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        scores = self._scores(queries, positives, counted)
        text = self._loss(scores)
        correct = (scores.detach().argmax(-1) == torch.arange(len(rows), device=rows.device)).sum()
        whole = TokenLoss(text, text.detach(), correct, correct.new_zeros(()))
        if self.depths is None:
            return whole
        return self.depths.joined(
            whole, lambda dim: self._loss(self._scores(queries[:, :dim], positives[:, :dim], counted))
        )

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The queries' tokens (B, up to Q) and the positives', each no longer than the longest of them."""
        return _trimmed(rows[:, : self.columns]), _trimmed(rows[:, self.columns :])

    def same(self, rows: Tensor) -> Tensor:
        """(B, B), whether pairs i and j have one query or one positive."""
        query, positive = self.numbered(rows)
        return (query[:, None] == query) | (positive[:, None] == positive)

    def numbered(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) int64 each: queries, and positives, by numbers that equal ones share."""
        sides = (rows[:, : self.columns], rows[:, self.columns :])
        query, positive = (torch.unique(side, dim=0, return_inverse=True)[1] for side in sides)
        return query, positive

    def vectors(self, tokens: Tensor) -> Tensor:
        """(B, C) of ``tokens`` (B, T) with ``PAD`` behind them, at least float32: pooled, not normalised."""
        mask = tokens != PAD
        pad = getattr(self.model.config, "pad_token_id", None) or 0
        ids = torch.where(mask, tokens, pad)
        hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        with torch.autocast(tokens.device.type, enabled=False):  # a mean is a product, which it would round
            hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            return pool(hidden, mask, replace(self.pooling, normalize=False))

    def _scores(self, queries: Tensor, positives: Tensor, counted: Tensor) -> Tensor:
        """(B, B), at least float32: cosines times the scale, minus infinity where they are not ``counted``."""
        with torch.autocast(queries.device.type, enabled=False):
            cosines = functional.normalize(queries, dim=-1) @ functional.normalize(positives, dim=-1).t()
        return (self.scale * cosines).masked_fill(~counted, -torch.inf)

    def _loss(self, scores: Tensor) -> Tensor:
        own = torch.arange(len(scores), device=scores.device)
        loss = functional.cross_entropy(scores, own)
        return (loss + functional.cross_entropy(scores.t(), own)) / 2 if self.symmetric else loss


def _trimmed(tokens: Tensor) -> Tensor:
    return tokens[:, : int((tokens != PAD).sum(-1).max())]
