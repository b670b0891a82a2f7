"""k-means against the best there is: exhaustive partitions, the Lloyd-Max quantizer, and its own objective."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.search.kmeans import BINS, closeness, kmeans, nearest, spread


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def error_of(points: Tensor, centroids: Tensor, weights: Tensor | None = None) -> float:
    """The objective in float64, each point with the best centroid by explicit distances."""
    each = torch.ones_like(points) if weights is None else weights.reshape(len(points), -1).expand_as(points)
    distances = points.double()[:, None] - centroids.double()
    return float((distances.square() * each.double()[:, None]).sum(-1).amin(1).sum())


def signal_to_noise(points: Tensor, centroids: Tensor) -> float:
    error = (points - centroids[nearest(points, centroids)]).double().square().sum()
    return 10 * math.log10(float(points.double().square().sum() / error))


# --- on a line ------------------------------------------------------------------------------------------------------


def best_partition_error(values: Tensor, weights: Tensor, k: int) -> float:
    """Of all ways to cut the sorted values into k runs."""
    order = values.argsort()
    values, weights = values[order].double(), weights[order].double()
    least = math.inf
    for inner in itertools.combinations(range(1, len(values)), k - 1):
        cuts = (0, *inner, len(values))
        error = 0.0
        for start, stop in itertools.pairwise(cuts):
            v, w = values[start:stop], weights[start:stop]
            if w.sum() > 0:
                error += float((w * (v - (w * v).sum() / w.sum()).square()).sum())
        least = min(least, error)
    return least


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_few_values_are_partitioned_as_well_as_can_be(k, seed, weighted):
    # Lumps and stragglers: where Lloyd from most starts ends in a worse partition.
    values = torch.cat([gaussian(5, seed=seed) * 0.1, gaussian(4, seed=seed + 9) * 0.1 + 3, gaussian(4, seed=seed) * 8])
    weights = uniform(13, seed=seed + 5).square() if weighted else torch.ones(13)
    found = kmeans(values[:, None], k, weights=weights if weighted else None)
    best = best_partition_error(values, weights, k)
    assert error_of(values[:, None], found, weights) <= best * (1 + 1e-4) + 1e-9


# Max (1960) and Lloyd: signal to noise of the best scalar quantizer of a Gaussian.
LLOYD_MAX_DB = {1: 4.396, 2: 9.300, 3: 14.616, 4: 20.223, 5: 26.02, 8: 43.84}


@pytest.mark.parametrize("bits", LLOYD_MAX_DB)
def test_a_gaussian_reaches_lloyd_max(bits):
    x = gaussian(1 << 18, 1)
    found = signal_to_noise(x, kmeans(x, 1 << bits))
    # 2 ** 18 samples: some 0.02 dB of sampling noise; 256 entries fit the sample's own tails by up to 0.3 dB.
    assert LLOYD_MAX_DB[bits] - 0.05 <= found <= LLOYD_MAX_DB[bits] + (0.35 if bits == 8 else 0.05)


@pytest.mark.parametrize(
    "values",
    [
        gaussian(1 << 16) / gaussian(3, 1 << 16, seed=1).square().mean(0).sqrt(),
        gaussian(50, seed=2)[torch.randint(50, (1 << 16,), generator=torch.Generator().manual_seed(3))] * 5
        + gaussian(1 << 16) * 0.05,
        (gaussian(1 << 16) * 8).round(),
    ],
    ids=["heavy tails", "lumps", "few distinct"],
)
def test_the_start_beats_quantiles_on_uneven_values(values):
    points, k = values[:, None], 64
    quantiles = values.sort().values[((torch.arange(k) + 0.5) / k * len(values)).long()]
    found = error_of(points, kmeans(points, k))
    assert found <= error_of(points, kmeans(points, k, start=quantiles[:, None])) * (1 + 1e-6)


def test_as_many_entries_as_values_leave_no_error_and_more_repeat():
    values = torch.tensor([[3.0], [-1.0], [2.5], [-1.0], [7.0]])
    assert kmeans(values, 4).flatten().tolist() == [-1.0, 2.5, 3.0, 7.0]
    more = kmeans(values, 9)
    assert more.shape == (9, 1) and error_of(values, more) == 0
    assert kmeans(torch.zeros(5, 1), 4).flatten().tolist() == [0.0] * 4


def test_values_that_weigh_nothing_draw_nothing():
    values = torch.cat([gaussian(400), torch.full((100,), 50.0)])[:, None]
    weights = (values[:, 0] < 50).float()
    assert kmeans(values, 8, weights=weights).amax() < 5


def test_far_from_zero_as_near_it():
    """Sums before a place are float64 and distances differences: an offset of a thousand steps costs no precision."""
    x = gaussian(1 << 14, 1)
    near, far = (signal_to_noise(x, kmeans(x + shift, 16) - shift) for shift in (0.0, 1000.0))
    assert abs(near - far) < 0.02


def test_histogram_is_no_worse_than_all_values():
    """More distinct values than bins: Lloyd on the values finishes what the partition of bins began."""
    x = gaussian(4 * BINS, 1)
    first = kmeans(x, 32)
    again = kmeans(x, 32, start=first)
    assert error_of(x, first) <= error_of(x, again) * (1 + 1e-5)


# --- several dimensions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "bits", "least"),
    # What one code of so many bits adds to the scalar quantizer of bits / dim (9.30, 4.40 and 20.22 dB).
    [(2, 4, 9.30 + 0.25), (4, 4, 4.40 + 0.2), (4, 8, 9.30 + 0.6), (2, 8, 20.22 + 0.5)],
)
def test_vectors_beat_scalars_at_equal_bits(dim, bits, least):
    x = gaussian(1 << 15, dim)
    held_out = gaussian(1 << 15, dim, seed=1)
    centroids = kmeans(x, 1 << bits)
    assert signal_to_noise(x, centroids) > least
    assert signal_to_noise(held_out, centroids) > least - 0.2


def test_separate_clusters_are_found():
    centres = gaussian(40, 3, seed=4) * 100
    points = (centres[:, None] + gaussian(40, 25, 3)).flatten(0, 1)
    # From random points of the set, some cluster of forty is missed nearly always.
    assert error_of(points, kmeans(points, 40)) < 1.05 * float(gaussian(40, 25, 3).square().sum())


@pytest.mark.parametrize("columns", [None, 1, 3], ids=["plain", "a point", "a coordinate"])
def test_rounds_do_not_raise_the_error(columns):
    points = gaussian(999, 3)
    weights = None if columns is None else uniform(999, columns, seed=2).square()
    start = gaussian(13, 3, seed=1)
    errors = [
        error_of(points, kmeans(points, 13, weights=weights, start=start, iterations=n), weights) for n in range(8)
    ]
    assert errors[0] == error_of(points, start, weights)
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]


def test_weights_of_points_are_like_repeating_them():
    points, start = gaussian(200, 2), gaussian(7, 2, seed=1)
    counts = torch.arange(200) % 4
    repeated = kmeans(points.repeat_interleave(counts, 0), 7, start=start)
    weighted = kmeans(points, 7, start=start, weights=counts)
    torch.testing.assert_close(weighted, repeated, atol=1e-5, rtol=1e-5)


def test_a_centroid_without_points_moves_to_the_largest_error():
    points = torch.cat([gaussian(50, 2), gaussian(50, 2) + 30])
    start = torch.tensor([[0.0, 0.0], [-500.0, 0.0], [-600.0, 0.0]])
    found = kmeans(points, 3, start=start)
    assert error_of(points, found) < 2 * float(gaussian(100, 2).square().sum())
    on_a_line = kmeans(points[:, :1], 2, start=torch.tensor([[0.0], [-500.0]]))
    assert error_of(points[:, :1], on_a_line) < 2 * 100


def test_coordinates_count_by_their_weights():
    """The second coordinate counts for nothing: as if it were not there."""
    points = gaussian(2000, 2)
    weights = torch.tensor([1.0, 0.0]).expand(2000, 2)
    found = kmeans(points, 8, weights=weights)
    along = error_of(points, found, weights)
    assert along < 1.1 * error_of(points[:, :1], kmeans(points[:, :1], 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_points_of_any_float_type(dtype):
    found = kmeans(gaussian(300, 2).to(dtype), 4)
    assert found.dtype == torch.float32 and found.shape == (4, 2)


@pytest.mark.parametrize("dim", [1, 2])
def test_the_same_arguments_give_the_same_centroids(dim):
    points = gaussian(3000, dim)
    first = kmeans(points, 9, sample=500, seed=3)
    torch.randn(5)
    torch.manual_seed(99)
    assert torch.equal(first, kmeans(points, 9, sample=500, seed=3))
    assert not torch.equal(first, kmeans(points, 9, sample=500, seed=4))


@pytest.mark.parametrize("dim", [1, 3])
def test_progress_rises_to_one_at_most(dim):
    heard: list[float] = []
    kmeans(gaussian(3000, dim), 9, progress=heard.append)
    assert heard == sorted(heard) and heard[0] > 0 and heard[-1] <= 1


# --- nearest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 4, 8])
@pytest.mark.parametrize("k", [1, 3, 256])
@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_nearest_is_nearest(dim, k, shift):
    points, centroids = gaussian(501, dim) + shift, gaussian(k, dim, seed=1) + shift  # not in order, for dim 1 neither
    distances = (points.double()[:, None] - centroids.double()).square().sum(-1)
    codes = nearest(points, centroids)
    assert codes.dtype == torch.int32 and codes.shape == (501,)
    chosen = distances.gather(1, codes[:, None].long())[:, 0]
    assert (chosen <= distances.amin(1) + 2e-5 * (1 + shift / 100)).all()


def test_nearest_by_coordinates():
    points, centroids, weights = gaussian(333, 4), gaussian(16, 4, seed=1), uniform(333, 4, seed=2)
    errors = ((points[:, None] - centroids).square() * weights[:, None]).sum(-1)
    chosen = errors.gather(1, nearest(points, centroids, weights)[:, None].long())[:, 0]
    torch.testing.assert_close(chosen, errors.amin(1), atol=1e-5, rtol=0)
    assert (nearest(points, centroids, weights) != nearest(points, centroids)).any()
    scores = closeness(points, centroids, weights)
    torch.testing.assert_close(scores[:, 1:] - scores[:, :1], (errors[:, :1] - errors[:, 1:]) / 2, atol=1e-4, rtol=1e-4)


def test_nothing_is_nearest_to_nothing():
    assert nearest(torch.empty(0, 2), gaussian(4, 2)).shape == (0,)
    assert nearest(torch.empty(0, 1), gaussian(4, 1)).shape == (0,)


@pytest.mark.parametrize(("count", "sample"), [(10, 10), (10, 20), (1000, 7), (3, 2), (1, 1)])
def test_samples_are_spread_evenly(count, sample):
    places = spread(count, sample, torch.Generator().manual_seed(0))
    assert len(places) == min(count, sample) and (places.diff() >= 0).all()
    assert places[0] >= 0 and places[-1] < count
    if count > sample:
        stretch = count / sample
        starts = torch.arange(sample) * stretch
        assert ((places + 1 > starts) & (places < starts + stretch)).all()


# --- bad inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": gaussian(5)}, r"points must be \(N, d\)"),
        ({"points": torch.zeros(5, 2, dtype=torch.int64)}, "floating-point"),
        ({"points": gaussian(0, 2)}, r"\(0, 2\)"),
        ({"points": torch.tensor([[1.0, torch.nan], [0.0, 0.0]])}, "1 of 4 points"),
        ({"k": 0}, "k must be 1 or more, got 0"),
        ({"k": 2.0}, "k must be"),
        ({"iterations": -1}, "iterations must be 0"),
        ({"sample": 0}, "sample must be 1"),
        ({"start": gaussian(3, 2)}, r"start must be \(2, 2\), got \(3, 2\)"),
        ({"weights": torch.ones(4)}, r"weights must be \(5,\) or \(5, 2\), got \(4,\)"),
        ({"weights": torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0])}, "0 or more"),
        ({"weights": torch.zeros(5)}, "not all of them 0"),
        ({"weights": torch.full((5,), torch.inf)}, "weights are NaN or infinite"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_clustered_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        kmeans(**{"points": gaussian(5, 2), "k": 2} | arguments)


def test_numbers_whose_sum_overflows_are_still_numbers():
    points = torch.full((400, 2), 1e36)
    points[::2] = -1e36
    points[0] = 3e38
    assert kmeans(points.abs(), 1).isfinite().all()
