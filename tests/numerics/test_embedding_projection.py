"""Projections against a decomposition done another way, and against what they are for."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ryzen_compile.errors import NumericalError, UsageError
from ryzen_compile.numerics.embedding_codes import pack_signs, unpack_signs
from ryzen_compile.numerics.embedding_projection import Projection


def clustered(count: int = 400, dims: int = 31, seed: int = 0) -> np.ndarray:
    """Points around centers in a few directions, away from the origin: what embeddings of text are like."""
    rng = np.random.default_rng(seed)
    spread = rng.standard_normal((dims, dims)) * np.geomspace(1, 0.03, dims)
    centers = rng.standard_normal((12, dims))
    points = centers[rng.integers(12, size=count)] + 0.3 * rng.standard_normal((count, dims))
    return (points @ spread.T + 2).astype(np.float32)


@pytest.mark.parametrize("dims", [1, 7, 31])
def test_pca_keeps_what_the_svd_keeps(dims: int) -> None:
    x = clustered()
    found = Projection.pca(x, dims)
    assert found.dims == dims and found.matrix.shape == (31, dims) and found.matrix.dtype == np.float32
    centered = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    kept = np.linalg.svd(centered, compute_uv=False)[:dims]
    lengths = np.linalg.norm(found.apply(x).astype(np.float64), axis=0)
    np.testing.assert_allclose(lengths, kept, rtol=1e-3)  # float32 in the weakest direction, 30 times below the first


def test_pca_is_the_same_for_the_same_vectors_in_another_order() -> None:
    x = clustered()
    one, other = Projection.pca(x, 5), Projection.pca(x[::-1], 5)
    np.testing.assert_allclose(one.matrix, other.matrix, atol=1e-5)


@pytest.mark.parametrize("dims", [1, 8, 31])
def test_every_iteration_brings_vectors_closer_to_their_signs(dims: int) -> None:
    x = clustered()

    def error(iterations: int) -> float:
        rotated = Projection.itq(x, dims, iterations=iterations).apply(x).astype(np.float64)
        return float(np.square(rotated - np.where(rotated > 0, 1, -1)).sum())

    errors = [error(n) for n in (0, 1, 2, 5, 20)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))
    assert dims == 1 or errors[-1] < errors[0]


def test_rotations_turn_the_same_space() -> None:
    x = clustered()
    one = Projection.pca(x, 9).apply(x)
    for turned in (Projection.itq(x, 9), Projection.random(x, 9)):
        other = turned.apply(x)
        np.testing.assert_allclose(one @ one.T, other @ other.T, atol=1e-3 * np.abs(one @ one.T).max())


def test_itq_starts_at_the_random_rotation_of_its_seed() -> None:
    x = clustered()
    one, other = Projection.random(x, 9, seed=3), Projection.itq(x, 9, seed=3, iterations=0)
    np.testing.assert_array_equal(one.matrix, other.matrix)
    assert np.abs(Projection.random(x, 9, seed=4).matrix - one.matrix).max() > 0.1


def test_a_random_rotation_spreads_the_variance() -> None:
    x = clustered()
    before, after = (fit(x, 16).apply(x).var(axis=0) for fit in (Projection.pca, Projection.random))
    assert after.max() / after.min() < 0.1 * before.max() / before.min()


def nearest_kept(x: np.ndarray, projection: Projection) -> float:
    """Of each point's ten nearest by distance, the share among the ten whose signs agree most."""
    signs = unpack_signs(pack_signs(projection.apply(x)), projection.dims)
    scores = signs @ signs.T
    distances = np.square(x[:, None] - x[None]).sum(-1)
    np.fill_diagonal(scores, -np.inf)
    np.fill_diagonal(distances, np.inf)
    best, near = np.argsort(-scores)[:, :10], np.argsort(distances)[:, :10]
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(best.tolist(), near.tolist(), strict=True)]))


def test_signs_say_more_when_centered_and_after_a_rotation_than_after_pca_alone() -> None:
    points = clustered(900)
    train, test = points[:600], points[600:]
    plain = nearest_kept(test, Projection(np.zeros(31), np.eye(31)))
    centered = nearest_kept(test, Projection.centering(train))
    assert plain + 0.02 < centered, (plain, centered)
    fits = (Projection.pca, Projection.random, Projection.itq)
    pca, spread, turned = (nearest_kept(test, fit(train, 16)) for fit in fits)
    assert pca + 0.02 < min(spread, turned), (pca, spread, turned)


def test_products_with_a_direction_differ_by_one_number_a_query() -> None:
    x, queries = clustered(), clustered(seed=3)[:5]
    projection = Projection.itq(x, 31)
    difference = queries @ x.T - projection.direction(queries) @ projection.apply(x).T
    expected = queries @ projection.mean
    np.testing.assert_allclose(difference, np.broadcast_to(expected[:, None], difference.shape), rtol=1e-4)


def test_as_many_vectors_as_directions_are_too_few() -> None:
    x = clustered(count=9)
    assert Projection.pca(x, 8).dims == 8
    for fit in (Projection.pca, Projection.itq):
        with pytest.raises(UsageError, match="9 vectors determine no 9 directions"):
            fit(x, 9)
        with pytest.raises(UsageError, match="31 dimensions to 32"):
            fit(clustered(), 32)
        with pytest.raises(UsageError, match="31 dimensions to 0"):
            fit(clustered(), 0)
    with pytest.raises(UsageError, match="iterations"):
        Projection.itq(x, 3, iterations=-1)


def test_identical_vectors_still_give_orthonormal_directions() -> None:
    found = Projection.itq(np.ones((6, 4), np.float32), 3)
    np.testing.assert_allclose(found.apply(np.ones((1, 4))), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "matrix", "error"),
    [
        (np.zeros(3), np.eye(4), UsageError),
        (np.zeros(2), np.eye(2, 3), UsageError),
        (np.zeros(3), np.ones((3, 2)), NumericalError),
        (np.zeros(3), np.full((3, 2), np.nan), NumericalError),
        (np.full(3, np.inf), np.eye(3), NumericalError),
    ],
)
def test_what_is_no_projection_is_refused(mean: np.ndarray, matrix: np.ndarray, error: type[Exception]) -> None:
    with pytest.raises(error):
        Projection(mean, matrix)


def test_vectors_of_other_dimensions_are_refused() -> None:
    projection = Projection.pca(clustered(), 3)
    for use in (projection.apply, projection.direction):
        with pytest.raises(UsageError, match="31 dimensions, got 30"):
            use(clustered()[:, :30])
