"""Differentiable k-means (DKM, Cho et al., 2022): points drawn to centroids softly enough to train through.

    a_ij = softmax_j(-|x_i - c_j|^2 / temperature)      attention of points x over centroids c
    c_j <- sum_i(w_i a_ij x_i) / sum_i(w_i a_ij)        repeated towards a fixed point
    y_i  = sum_j(a_ij c_j)                              what stands for x_i

Attention is a matrix of points by centroids, for every repetition. None of them is kept: the backward pass holds the
centroids of each repetition and computes attention again, a chunk of points at a time. On a line, 16-bit points have at
most 65 536 values, and everything is computed once for each value (eDKM, Cho et al., 2023). Neither changes a gradient:
they are those of the repetitions as they were run.

Distances are squared, so a temperature is in squares of the points' unit. Above two thirds of the squared distance of
neighbours, repetitions draw these together and never part them again (Rose, 1998, has the theory of it); far below it,
attention is the nearest centroid alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.search.kmeans import nearest

CHUNK = 1 << 20  # points times centroids worked on at a time
START, END = 0.3, 0.003  # temperatures to train between, in squared distances of neighbouring centroids
LOWEST = 1e-30  # temperature: its reciprocal and twice that have to be float32
HALVES = (torch.float16, torch.bfloat16)
VALUES = 1 << 16  # that a 16-bit number can have


class DKMLayer(nn.Module):
    """Points (N, d) in, softly clustered points out; ``centroids`` (k, d) are a parameter.

    ``temperature`` may be set at any time, or by ``anneal`` between its first value and ``final_temperature``. There
    are at most ``iterations`` repetitions, fewer where none of the centroids moves by more than ``tolerance``.
    Arithmetic is float32, or float64 where points or centroids are. ``chunk`` bounds the memory: points times centroids
    that are worked on at a time.

    Raises ``UsageError`` for arguments out of their range, and for points and weights of other shapes.
    """

    def __init__(
        self,
        centroids: Tensor,
        *,
        temperature: float,
        final_temperature: float | None = None,
        iterations: int = 3,
        tolerance: float = 0.0,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__()
        if centroids.ndim != 2 or not centroids.is_floating_point() or 0 in centroids.shape:
            raise UsageError(
                f"centroids must be (k, d) floating-point numbers, got {centroids.dtype} {tuple(centroids.shape)}"
            )
        for name, value, least in (("iterations", iterations, 0), ("tolerance", tolerance, 0), ("chunk", chunk, 1)):
            if not value >= least:
                raise UsageError(f"{name} must be {least} or more, got {value!r}")
        self.first_temperature = _positive(temperature)
        self.final_temperature = _positive(temperature if final_temperature is None else final_temperature)
        self.temperature = self.first_temperature
        self.iterations, self.tolerance, self.chunk = iterations, tolerance, chunk
        self.centroids = nn.Parameter(centroids.detach().clone())

    def forward(self, points: Tensor, weights: Tensor | None = None) -> Tensor:
        """(N, d) -> (N, d) of the same type; ``weights`` (N,), 0 or more, say how much a point draws centroids.

        Gradients reach points and centroids; weights are constants.
        """
        self._check(points, weights)
        out: Tensor = _SoftClustering.apply(points, self.centroids, weights, self._run())
        return out

    def anneal(self, progress: float) -> float:
        """Sets and returns the temperature for a share 0 to 1 of the training."""
        self.temperature = temperature_schedule(progress, self.first_temperature, self.final_temperature)
        return self.temperature

    @torch.no_grad()
    def settled(self, points: Tensor, weights: Tensor | None = None) -> Tensor:
        """The centroids (k, d) after the repetitions, in the type of arithmetic: those that ``forward`` attends to."""
        self._check(points, weights)
        with torch.autocast(points.device.type, enabled=False):
            groups = _Groups.of(points, weights, _arithmetic(points, self.centroids))
            return _repeated(groups, self.centroids.to(groups.values.dtype), self._run())[0][-1]

    def settle(self, points: Tensor, weights: Tensor | None = None) -> None:
        """Makes the settled centroids the parameter: few repetitions then stay close to the fixed point."""
        settled = self.settled(points, weights)
        with torch.no_grad():
            self.centroids.copy_(settled)

    @torch.no_grad()
    def harden(self, points: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(codes (N,) int32, centroids (k, d) float32): each point has the nearest of the settled centroids.

        It is what ``forward`` tends to as the temperature falls.
        """
        centroids = self.settled(points, weights).float()
        return nearest(points, centroids), centroids

    def extra_repr(self) -> str:
        k, dim = self.centroids.shape
        return f"{k} x {dim}, temperature={self.temperature:.3g}, iterations={self.iterations}"

    def _run(self) -> _Run:
        return _Run(_positive(self.temperature), self.iterations, self.tolerance, self.chunk)

    def _check(self, points: Tensor, weights: Tensor | None) -> None:
        dim = self.centroids.shape[1]
        if points.ndim != 2 or points.shape[1] != dim or not points.is_floating_point():
            raise UsageError(
                f"points must be (N, {dim}) floating-point numbers, got {points.dtype} {tuple(points.shape)}"
            )
        if weights is not None and (tuple(weights.shape) != (len(points),) or weights.requires_grad):
            raise UsageError(f"weights must be {(len(points),)} and need no gradient, got {tuple(weights.shape)}")


def temperature_schedule(progress: float, start: float, end: float) -> float:
    """From ``start`` (progress 0) to ``end`` (1), by the same factor for the same step."""
    if not 0 <= progress <= 1:
        raise UsageError(f"progress must be 0 to 1, got {progress!r}")
    return float(_positive(start) * (_positive(end) / start) ** progress)


@torch.no_grad()
def temperatures(centroids: Tensor) -> tuple[float, float]:
    """(first, last) to train ``centroids`` (k, d) with, from how far they are from their nearest neighbours.

    The first leaves attention to neighbours without merging them, the last leaves none.
    """
    if centroids.ndim != 2 or len(centroids) < 2:
        raise UsageError(f"temperatures need 2 or more centroids (k, d), got {tuple(centroids.shape)}")
    distances = torch.cdist(centroids.double(), centroids.double()).fill_diagonal_(torch.inf)
    spacing = float(distances.amin(1).square().mean())
    if not spacing > 0 or not math.isfinite(spacing):
        raise UsageError("all centroids have a twin: there is no distance to measure temperatures by")
    return START * spacing, END * spacing


@dataclass(frozen=True)
class _Run:
    temperature: float
    iterations: int
    tolerance: float
    chunk: int


class _Groups:
    """Points that are computed once: each its own, or on a line all of one 16-bit value.

    ``values`` (U, d), ``weights`` (U,) or none in the type of arithmetic.
    """

    def __init__(self, values: Tensor, weights: Tensor | None, place: Tensor | None) -> None:
        self.values, self.weights, self.place = values, weights, place

    @classmethod
    def of(cls, points: Tensor, weights: Tensor | None, dtype: torch.dtype) -> _Groups:
        if points.dtype not in HALVES or points.shape[1] != 1:
            return cls(points.to(dtype), None if weights is None else weights.to(dtype), None)
        patterns = points[:, 0].contiguous().view(torch.int16).int() + VALUES // 2
        mass = torch.bincount(patterns, minlength=VALUES)
        used = mass.nonzero()[:, 0]
        places = torch.zeros(VALUES, dtype=torch.int32, device=points.device)
        places[used] = torch.arange(len(used), dtype=torch.int32, device=points.device)
        values = (used - VALUES // 2).to(torch.int16).view(points.dtype).to(dtype)[:, None]
        if weights is not None:
            mass = torch.bincount(patterns, weights.double(), VALUES)
        return cls(values, mass[used].to(dtype), places.index_select(0, patterns))

    def summed(self, per_point: Tensor) -> Tensor:
        """(N, d) -> (U, d): what the points of a group have together."""
        if self.place is None:
            return per_point.to(self.values.dtype)
        total = torch.bincount(self.place, per_point[:, 0].double(), len(self.values))
        return total.to(self.values.dtype)[:, None]

    def spread(self, per_group: Tensor) -> Tensor:
        """(U, d) -> (N, d)."""
        return per_group if self.place is None else per_group.index_select(0, self.place)


class _SoftClustering(torch.autograd.Function):
    """Saves the points, their weights and (k, d) of every repetition; see the module's docstring for the formulas."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, centroids: Tensor, weights: Tensor | None, run: _Run) -> Tensor:
        with torch.autocast(points.device.type, enabled=False):
            groups = _Groups.of(points, weights, _arithmetic(points, centroids))
            history, masses = _repeated(groups, centroids.to(groups.values.dtype), run)
            out = torch.empty_like(groups.values)
            for part in _parts(groups.values, history[-1], run):
                out[part] = _attention(groups.values[part], history[-1], run) @ history[-1]
        ctx.save_for_backward(points, weights, torch.stack(history), torch.stack(masses) if masses else None)
        ctx.run, ctx.centroid_dtype = run, centroids.dtype
        return groups.spread(out).to(points.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        points, weights, history, masses = ctx.saved_tensors
        run: _Run = ctx.run
        with torch.autocast(points.device.type, enabled=False):
            groups = _Groups.of(points, weights, history.dtype)
            point_grad, centroid_grad = _through_output(groups, history[-1], grad, run)
            repetitions = torch.zeros_like(groups.values)
            for step in reversed(range(len(history) - 1)):
                centroid_grad = _through_repetition(
                    groups, history[step], history[step + 1], masses[step], centroid_grad, repetitions, run
                )
            # Of a group with no weight of its own the gradient is of one point; else each has its share by its weight.
            drawn = groups.spread(repetitions)
            point_grad += drawn if weights is None else drawn * weights.to(drawn.dtype)[:, None]
        needs_points, needs_centroids, *_ = ctx.needs_input_grad
        return (
            point_grad.to(points.dtype) if needs_points else None,
            centroid_grad.to(ctx.centroid_dtype) if needs_centroids else None,
            None,
            None,
        )


def _repeated(groups: _Groups, centroids: Tensor, run: _Run) -> tuple[list[Tensor], list[Tensor]]:
    """(centroids before each repetition and after the last, the attention (k,) that each centroid got in each)."""
    history, masses = [centroids.detach().clone()], []
    for _ in range(run.iterations):
        before = history[-1]
        mass = torch.zeros(len(before), dtype=torch.float64, device=before.device)
        total = torch.zeros_like(before, dtype=torch.float64)
        for part in _parts(groups.values, before, run):
            values = groups.values[part]
            attention = _weighted(_attention(values, before, run), groups, part)
            mass += attention.sum(0)
            total += attention.T @ values
        # A centroid that no point attends to stays where it is.
        drawn = mass > _least(before.dtype)
        after = torch.where(drawn[:, None], total / mass[:, None], before.double()).to(before.dtype)
        masses.append(torch.where(drawn, mass, 0.0).to(before.dtype))
        history.append(after)
        if float((after - before).abs().amax()) <= run.tolerance:
            break
    return history, masses


def _through_output(groups: _Groups, centroids: Tensor, grad: Tensor, run: _Run) -> tuple[Tensor, Tensor]:
    """Gradients of y = a c: of the points (N, d) and of the centroids (k, d).

    The gradient of a point is 2 / temperature times the covariance of the centroids under its attention, times that of
    its y. On a line the covariance is one number for all points of a group.
    """
    together = groups.summed(grad)
    centroid_grad = torch.zeros_like(centroids, dtype=torch.float64)
    point_grad = torch.empty_like(groups.values)
    for part in _parts(groups.values, centroids, run):
        values, of_y = groups.values[part], together[part]
        attention = _attention(values, centroids, run)
        of_scores = _through_softmax(attention, of_y @ centroids.T)
        centroid_grad += attention.T @ of_y
        centroid_grad += _through_distances(values, centroids, of_scores, run)
        if groups.place is None:
            point_grad[part] = of_scores @ centroids * (2 / run.temperature)
        else:
            mean = attention @ centroids
            spread = (attention * (centroids[:, 0] - mean).square()).sum(1, keepdim=True)
            point_grad[part] = spread * (2 / run.temperature)
    if groups.place is not None:
        point_grad = groups.spread(point_grad) * grad.to(point_grad.dtype)
    return point_grad, centroid_grad.to(centroids.dtype)


def _through_repetition(
    groups: _Groups, before: Tensor, after: Tensor, mass: Tensor, grad: Tensor, points: Tensor, run: _Run
) -> Tensor:
    """Gradient of the centroids ``before`` (k, d) from that of ``after``.

    Adds to ``points`` (U, d) the gradient of a point of weight 1: a point of weight w has w times as much.
    """
    drawn = mass > 0
    pull = torch.where(drawn[:, None], grad / torch.where(drawn, mass, 1.0)[:, None], 0.0)
    centroid_grad = torch.where(drawn[:, None], 0.0, grad).double()
    for part in _parts(groups.values, before, run):
        values = groups.values[part]
        attention = _attention(values, before, run)
        # d after_j / d a_ij = w_i (x_i - after_j) / mass_j
        of_scores = _through_softmax(attention, values @ pull.T - (after * pull).sum(1))
        points[part] += attention @ pull + of_scores @ before * (2 / run.temperature)
        centroid_grad += _through_distances(values, before, _weighted(of_scores, groups, part), run)
    return centroid_grad.to(before.dtype)


def _attention(values: Tensor, centroids: Tensor, run: _Run) -> Tensor:
    """(n, k). Distances are summed coordinate by coordinate: no cancellation, however low the temperature."""
    scores = (values[:, :1] - centroids[:, 0]).square_()
    for i in range(1, values.shape[1]):
        scores += (values[:, i, None] - centroids[:, i]).square_()
    scores -= scores.amin(1, keepdim=True)  # the nearest has 0, so that no row overflows everywhere
    return scores.mul_(-1 / run.temperature).softmax(1)


def _through_softmax(attention: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the scores, whose sum over centroids is 0; ``grad`` (n, k) is overwritten."""
    weighted = grad.mul_(attention)
    return weighted - attention * weighted.sum(1, keepdim=True)


def _through_distances(values: Tensor, centroids: Tensor, of_scores: Tensor, run: _Run) -> Tensor:
    """(k, d): scores are -|x - c|^2 / temperature, so each pulls its centroid by 2 (x - c) / temperature."""
    return (of_scores.T @ values - of_scores.sum(0)[:, None] * centroids) * (2 / run.temperature)


def _weighted(attention: Tensor, groups: _Groups, part: slice) -> Tensor:
    return attention if groups.weights is None else attention * groups.weights[part, None]


def _parts(values: Tensor, centroids: Tensor, run: _Run) -> list[slice]:
    step = max(1, run.chunk // len(centroids))
    return [slice(start, start + step) for start in range(0, len(values), step)]


def _arithmetic(points: Tensor, centroids: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (points.dtype, centroids.dtype) else torch.float32


def _least(dtype: torch.dtype) -> float:
    """Attention that counts as none: quotients of such small numbers have no digits left."""
    return torch.finfo(dtype).tiny / torch.finfo(dtype).eps


def _positive(temperature: float) -> float:
    if not (temperature >= LOWEST and math.isfinite(temperature)):
        raise UsageError(f"a temperature must be {LOWEST:g} or more and finite, got {temperature!r}")
    return float(temperature)
