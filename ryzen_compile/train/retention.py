"""What is left of a model when its vectors are cut: figures at each depth, on rows that it was not trained on.

Of an encoder: recall@10 and the mean reciprocal rank of each query's own positive among all held-out positives, and how
its cosines correlate with those of whole vectors. Of a language model: nats per token from the first channels of its
hidden states and of its head. Either may be turned to principal axes first (Pearson, 1901), which whole vectors do not
notice: what cutting does to a model that was not trained for it is seen best there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ryzen_compile.train.contrastive import ContrastiveObjective
from ryzen_compile.train.objective import Objective
from ryzen_compile.train.token_loss import token_loss

FOUND_IN = 10  # the first so many that a search gives
AXES_ROWS = 512  # of the training rows, evenly spaced: what principal axes are of
CELLS = 1 << 22  # of a matrix of cosines, at a time
Figures = Mapping[int, Mapping[str, float]]


class Retention(Protocol):
    """Measures a model as it is now."""

    def axes(self) -> Tensor:
        """(C, C) float32, orthogonal: principal axes of the model's vectors of training rows, the largest first."""
        ...

    def figures(self, axes: Tensor | None = None) -> Figures:
        """At each depth, of vectors turned to ``axes``, if there are any."""
        ...


def make_retention(
    objective: Objective, dims: Sequence[int], train: Tensor, validation: Tensor, batch: int
) -> Retention:
    """For rows as the objective takes them; ``batch`` at a time."""
    sample = train[torch.linspace(0, len(train) - 1, min(AXES_ROWS, len(train))).long()]
    if isinstance(objective, ContrastiveObjective):
        return PairRetention(objective, dims, sample, validation, batch)
    return TokenRetention(objective, dims, sample, validation, batch)


class PairRetention:
    """Of an encoder, on rows of pairs."""

    def __init__(
        self, objective: ContrastiveObjective, dims: Sequence[int], train: Tensor, validation: Tensor, batch: int
    ) -> None:
        self._objective, self._dims, self._batch = objective, tuple(dims), batch
        self._train, self._validation = train, validation

    def axes(self) -> Tensor:
        return principal_axes(functional.normalize(torch.cat(self._vectors(self._train)), dim=-1))

    def figures(self, axes: Tensor | None = None) -> Figures:
        queries, positives = self._vectors(self._validation)
        if axes is not None:
            queries, positives = queries @ axes, positives @ axes
        query, positive = self._objective.numbered(self._validation)
        ranks: dict[int, list[Tensor]] = {dim: [] for dim in self._dims}
        moments = {dim: torch.zeros(3, 3, dtype=torch.float64) for dim in self._dims}
        # A block of queries at a time: all against all may be more than memory holds.
        for block in torch.arange(len(queries)).split(max(1, CELLS // len(queries))):
            same = (query[block, None] == query) | (positive[block, None] == positive)
            whole = _cosines(queries[block], positives)
            for dim in self._dims:
                cosines = _cosines(queries[block, :dim], positives[:, :dim])
                ranks[dim].append(retrieval_ranks(cosines, same, block))
                moments[dim] += _moments(cosines, whole)
        return {dim: retrieval_figures(torch.cat(ranks[dim])) | _correlation(moments[dim]) for dim in self._dims}

    def _vectors(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Whole ones of queries and of positives, (n, C) float32 each. Texts of like length are read together, so that
        little is padded."""
        found = []
        with as_it_is(self._objective) as device:
            for side in (rows[:, : self._objective.columns], rows[:, self._objective.columns :]):
                lengths = (side >= 0).sum(-1)
                order = lengths.argsort(stable=True)
                parts = [
                    self._objective.vectors(side[part, : int(lengths[part].max())].long().to(device)).cpu()
                    for part in order.split(self._batch)
                ]
                found.append(torch.cat(parts)[order.argsort()])
        return found[0], found[1]


class TokenRetention:
    """Of a language model, on rows of text."""

    def __init__(
        self, objective: Objective, dims: Sequence[int], train: Tensor, validation: Tensor, batch: int
    ) -> None:
        self._objective, self._dims, self._batch = objective, tuple(dims), batch
        self._train, self._validation = train, validation

    def axes(self) -> Tensor:
        with as_it_is(self._objective) as device:
            parts = [
                self._objective.hidden(rows[:, :-1].long().to(device)).flatten(0, 1).float().cpu()
                for rows in self._train.split(self._batch)
            ]
        return principal_axes(torch.cat(parts))

    def figures(self, axes: Tensor | None = None) -> Figures:
        sums = dict.fromkeys(self._dims, 0.0)
        with as_it_is(self._objective) as device:
            turn = torch.eye(self._objective.channels) if axes is None else axes
            turn = turn.to(device)
            head = self._objective.head.float() @ turn
            for batch in self._validation.split(self._batch):
                rows = batch.long().to(device)
                hidden = self._objective.hidden(rows[:, :-1]).flatten(0, 1).float() @ turn
                for dim in self._dims:
                    loss = token_loss(hidden[:, :dim], head[:, :dim], rows[:, 1:].flatten()).loss
                    sums[dim] += float(loss) * len(rows)
        return {dim: {"loss": total / len(self._validation)} for dim, total in sums.items()}


def retrieval_ranks(cosines: Tensor, same: Tensor, own: Tensor) -> Tensor:
    """(q,) int64, from 1: where each query finds its ``own`` (q,) of the positives, of ``cosines`` (q, n). What is as
    near stands before it, unless it is the ``same`` (q, n)."""
    return 1 + ((cosines >= cosines.gather(1, own[:, None])) & ~same).sum(-1)


def retrieval_figures(ranks: Tensor) -> dict[str, float]:
    """recall@FOUND_IN and the mean reciprocal rank."""
    return {
        f"recall@{FOUND_IN}": float((ranks <= FOUND_IN).double().mean()),
        "mrr": float((1 / ranks.double()).mean()),
    }


def principal_axes(vectors: Tensor) -> Tensor:
    """(C, C), columns of falling second moment about the origin of ``vectors`` (n, C): turning keeps products."""
    moments = vectors.double().t() @ vectors.double()
    return torch.linalg.eigh(moments).eigenvectors.flip(-1).to(vectors.dtype)


@contextmanager
def as_it_is(objective: Objective) -> Iterator[torch.device]:
    """Inside, without dropout, gradients or half precision; afterwards the objective is as it was."""
    training, levers = objective.training, objective.levers
    objective.levers = objective.exact_levers
    objective.eval()
    try:
        with torch.no_grad():
            yield next(objective.parameters()).device
    finally:
        objective.train(training)
        objective.levers = levers


def _moments(cosines: Tensor, whole: Tensor) -> Tensor:
    """(3, 3) float64: sums of products of 1 and of the two, over all of their cells."""
    columns = torch.stack([torch.ones_like(whole), cosines, whole]).flatten(1).double()
    return columns @ columns.t()


def _correlation(moments: Tensor) -> dict[str, float]:
    """Pearson's, of the two that ``moments`` are of."""
    mean = moments[0, 1:] / moments[0, 0]
    covariance = moments[1:, 1:] / moments[0, 0] - mean[:, None] * mean
    return {"cosine_correlation": float(covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt())}


def _cosines(queries: Tensor, positives: Tensor) -> Tensor:
    return functional.normalize(queries, dim=-1) @ functional.normalize(positives, dim=-1).t()
