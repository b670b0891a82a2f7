"""Linear maps learned from a collection's vectors, after which fewer dimensions or single bits say more.

PCA puts the variance into the first dimensions, so that the rest can go. For bits it is then spread again: after PCA
alone a few dimensions carry most of the distance, and the bits of the others are noise. A random rotation spreads it
evenly; ITQ goes on from there until signs are as close to the vectors it sees as they can be (Gong and Lazebnik,
Iterative Quantization, CVPR 2011, which compares both).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from ryzen_compile.errors import NumericalError, UsageError
from ryzen_compile.numerics.embedding_codes import as_rows

ITERATIONS = 50  # as the paper does; the error has settled before
ORTHOGONAL_TOLERANCE = 1e-4  # of the columns' inner products: float32 leaves 1e-6


@dataclass(frozen=True, eq=False)
class Projection:
    """x -> (x - mean) @ matrix. ``mean`` (C,), ``matrix`` (C, d) with orthonormal columns, d <= C; both float32."""

    mean: np.ndarray
    matrix: np.ndarray

    def __post_init__(self) -> None:
        matrix = as_rows(self.matrix, "projection matrix")
        mean = as_rows(np.asarray(self.mean)[None], "projection mean", len(matrix))[0]
        if matrix.shape[1] > len(matrix):
            raise UsageError(f"a projection gives no more dimensions than it takes, got a matrix {matrix.shape}")
        error = np.abs(matrix.T @ matrix - np.eye(matrix.shape[1], dtype=np.float32)).max()
        if error > ORTHOGONAL_TOLERANCE:
            raise NumericalError(f"the projection's columns are {error:.1e} away from orthonormal")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "matrix", matrix)

    @property
    def dims(self) -> int:
        """d, the number of dimensions that come out."""
        return int(self.matrix.shape[1])

    @classmethod
    def pca(cls, x: np.ndarray, dims: int) -> Self:
        """The ``dims`` directions in which ``x`` (N, C), N > dims, varies most, the strongest first.

        Their signs are free; the largest entry of each is made positive, so that equal vectors give equal projections.
        """
        rows = as_rows(x, "vectors to fit a projection on").astype(np.float64)
        if not 1 <= dims <= rows.shape[1]:
            raise UsageError(f"cannot project vectors of {rows.shape[1]} dimensions to {dims}")
        if len(rows) <= dims:
            raise UsageError(
                f"{len(rows)} vectors determine no {dims} directions around their mean",
                hint="fit it on more vectors, or to fewer dimensions",
            )
        mean = rows.mean(axis=0)
        centered = rows - mean
        _, vectors = np.linalg.eigh(centered.T @ centered)  # the weakest first
        matrix = vectors[:, ::-1][:, :dims]
        largest = matrix[np.abs(matrix).argmax(axis=0), np.arange(dims)]
        return cls(mean, matrix * np.sign(largest))

    @classmethod
    def random(cls, x: np.ndarray, dims: int, *, seed: int = 0) -> Self:
        """PCA to ``dims`` dimensions, then a random rotation: only mean and principal directions depend on ``x``."""
        start = cls.pca(x, dims)
        return cls(start.mean, start.matrix.astype(np.float64) @ _random_rotation(dims, seed))

    @classmethod
    def itq(cls, x: np.ndarray, dims: int, *, iterations: int = ITERATIONS, seed: int = 0) -> Self:
        """PCA to ``dims`` dimensions, then the rotation that brings them closest to their signs, from ``random``'s on.

        Each iteration takes the signs of the rotated vectors, then the rotation that fits them best (orthogonal
        Procrustes, by an SVD of a d x d matrix); the squared error never rises.
        """
        if iterations < 0:
            raise UsageError(f"iterations must be 0 or more, got {iterations}")
        start = cls.pca(x, dims)
        reduced = start.apply(x).astype(np.float64)
        rotation = _random_rotation(dims, seed)
        for _ in range(iterations):
            signs = np.where(reduced @ rotation > 0, 1.0, -1.0)
            left, _, right = np.linalg.svd(reduced.T @ signs)
            rotation = left @ right
        return cls(start.mean, start.matrix.astype(np.float64) @ rotation)

    @classmethod
    def centering(cls, x: np.ndarray) -> Self:
        """The mean of ``x`` (N, C) taken away and nothing turned: the least that makes signs of vectors informative."""
        rows = as_rows(x, "vectors to center").astype(np.float64)
        return cls(rows.mean(axis=0), np.eye(rows.shape[1]))

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Stored vectors (N, C) -> float32 (N, d)."""
        rows = as_rows(x, "vectors", len(self.mean))
        return (rows - self.mean) @ self.matrix

    def direction(self, queries: np.ndarray) -> np.ndarray:
        """Queries (Q, C) -> float32 (Q, d), not centered: their inner products with applied vectors are those with
        the vectors themselves, as far as d dimensions hold them, less one number for each query (q . mean)."""
        return as_rows(queries, "queries", len(self.mean)) @ self.matrix


def _random_rotation(dims: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dims, dims)))[0]
