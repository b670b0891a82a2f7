"""The layer's gradients against finite differences and autograd, its memory, and where its training ends."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.dkm import DKMLayer, temperature_schedule, temperatures
from ryzen_compile.numerics.search.kmeans import kmeans, nearest


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(centroids: Tensor, iterations: int = 2, temperature: float = 0.7, **options) -> DKMLayer:
    return DKMLayer(centroids, temperature=temperature, iterations=iterations, **options)


def unrolled(points: Tensor, centroids: Tensor, weights: Tensor | None, iterations: int, temperature: float) -> Tensor:
    """The formulas, left to autograd."""
    w = torch.ones(len(points), dtype=points.dtype) if weights is None else weights
    for _ in range(iterations):
        attention = attend(points, centroids, temperature) * w[:, None]
        centroids = attention.T @ points / attention.sum(0)[:, None]
    return attend(points, centroids, temperature) @ centroids


def attend(points: Tensor, centroids: Tensor, temperature: float) -> Tensor:
    return ((points[:, None] - centroids).square().sum(-1) / -temperature).softmax(1)


# --- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("iterations", range(4))
@pytest.mark.parametrize(("count", "dim", "k"), [(7, 1, 3), (11, 2, 4), (23, 4, 5), (3, 2, 1)])
def test_gradients_are_those_of_finite_differences(count, dim, k, iterations, weighted):
    points = gaussian(count, dim, dtype=torch.float64).requires_grad_()
    weights = torch.linspace(0, 2, count, dtype=torch.float64) if weighted else None
    # A chunk of 11 cuts the points at odd places.
    model = layer(gaussian(k, dim, seed=1, dtype=torch.float64), iterations, chunk=11)

    def run(points: Tensor, centroids: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"centroids": centroids}, (points, weights))

    assert torch.autograd.gradcheck(run, (points, model.centroids))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dim", "iterations"), [*itertools.product((1, 2, 8), (0, 1, 4))])
def test_values_and_gradients_are_those_of_the_unrolled_formulas(dim, iterations, weighted):
    points = gaussian(501, dim, dtype=torch.float64).requires_grad_()
    weights = gaussian(501, seed=3, dtype=torch.float64).square() if weighted else None
    model = layer(gaussian(16, dim, seed=1, dtype=torch.float64), iterations)
    target = gaussian(501, dim, seed=2, dtype=torch.float64)
    out = model(points, weights)
    found = torch.autograd.grad((out * target).sum(), (points, model.centroids))
    expected_out = unrolled(points, model.centroids, weights, iterations, 0.7)
    expected = torch.autograd.grad((expected_out * target).sum(), (points, model.centroids))
    torch.testing.assert_close(out, expected_out, atol=1e-12, rtol=1e-11)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("iterations", [0, 3])
def test_computing_each_value_once_changes_nothing(dtype, weighted, iterations):
    """16-bit points on a line, of which many are equal, against the same numbers in float64, each for itself."""
    points = torch.cat([gaussian(700, 1), torch.tensor([[0.0], [-0.0], [1e-7], [60000.0]])]).to(dtype)
    points = torch.cat([points, points[:300]]).requires_grad_()
    wide = points.detach().double().requires_grad_()
    weights = gaussian(len(points), seed=3).abs() if weighted else None
    target = gaussian(len(points), 1, seed=2).to(dtype)
    centroids = gaussian(7, 1, seed=1)
    halves, doubles = layer(centroids, iterations), layer(centroids.double(), iterations)
    out, expected = halves(points, weights), doubles(wide, None if weights is None else weights.double())
    digits = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, atol=digits, rtol=digits)
    assert out.dtype == dtype
    (out * target).sum().backward()
    (expected * target.double()).sum().backward()
    assert points.grad is not None and points.grad.dtype == dtype and wide.grad is not None
    torch.testing.assert_close(points.grad.double(), wide.grad, atol=4 * digits, rtol=4 * digits)
    assert halves.centroids.grad is not None and doubles.centroids.grad is not None
    torch.testing.assert_close(halves.centroids.grad.double(), doubles.centroids.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 5, 64, 1 << 20])
def test_chunks_change_nothing_but_the_order_of_sums(chunk):
    points = gaussian(101, 3, dtype=torch.float64).requires_grad_()
    whole, cut = (layer(gaussian(6, 3, seed=1, dtype=torch.float64), chunk=size) for size in (1 << 30, chunk))
    results = []
    for model in (whole, cut):
        out = model(points)
        results.append((out, *torch.autograd.grad(out.square().sum(), (points, model.centroids))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_gradients_are_computed_for_what_needs_them():
    points = gaussian(20, 2)
    model = layer(gaussian(3, 2, seed=1))
    model(points).sum().backward()
    assert model.centroids.grad is not None
    model.requires_grad_(False)
    points.requires_grad_()
    model(points).sum().backward()
    assert points.grad is not None


def test_no_points():
    points = gaussian(0, 2).requires_grad_()
    model = layer(gaussian(3, 2))
    out = model(points)
    out.sum().backward()
    assert out.shape == (0, 2) and torch.equal(model.settled(points), model.centroids)


@pytest.mark.parametrize("temperature", [1e-30, 1e-12])
def test_a_temperature_of_next_to_nothing_is_the_nearest_centroid(temperature):
    points = (gaussian(200, 2) * 1e3).requires_grad_()
    model = layer(gaussian(6, 2, seed=1), 1, temperature)
    out = model(points)
    codes, centroids = model.harden(points)
    torch.testing.assert_close(out.detach(), centroids[codes])
    out.sum().backward()
    assert points.grad is not None and points.grad.isfinite().all()
    assert model.centroids.grad is not None and model.centroids.grad.isfinite().all()


def test_a_centroid_that_nothing_attends_to_stays_and_keeps_its_gradient():
    points = gaussian(50, 1)
    model = layer(torch.tensor([[-0.5], [0.5], [1e4]]), 3, 0.01)
    assert float(model.settled(points)[2]) == 1e4
    (model(points).sum() + 2 * model.centroids[2, 0]).backward()
    assert model.centroids.grad is not None and float(model.centroids.grad[2]) == 2


def test_autocast_does_not_reach_inside():
    points, model = gaussian(64, 2), layer(gaussian(4, 2, seed=1))
    with torch.autocast("cpu", torch.bfloat16):
        inside = model(points)
    assert torch.equal(inside, model(points))


# --- memory ---------------------------------------------------------------------------------------------------------


def saved_bytes(model: DKMLayer, points: Tensor, weights: Tensor | None = None) -> int:
    """Of tensors kept for the backward pass besides points, weights and parameters themselves."""
    given = {x.untyped_storage().data_ptr() for x in (points, model.centroids, weights) if x is not None}
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(points, weights)
    return sum(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [100, 10_000])
def test_what_is_kept_does_not_grow_with_the_points(count, dtype):
    k, dim, iterations = 16, 1, 5
    points = gaussian(count, dim).to(dtype).requires_grad_()
    kept = saved_bytes(layer(gaussian(k, dim, seed=1), iterations), points, gaussian(count).abs())
    # Centroids before every repetition and after the last, and the attention that each got: float32.
    assert kept == 4 * ((iterations + 1) * k * dim + iterations * k)


def test_attention_is_never_whole():
    """Both passes allocate chunks of attention at a time, not N x k of it."""
    points = gaussian(1 << 15, 2).requires_grad_()
    model = layer(gaussian(64, 2, seed=1), 2, chunk=1 << 14)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        model(points).sum().backward()
    largest = max(abs(event.cpu_memory_usage) for event in profiled.events() if event.name.startswith("aten::"))
    assert largest < 2 * points.nbytes < 4 * len(points) * 64 // 10


# --- the fixed point, temperatures, and where training ends -----------------------------------------------------------


def test_repetitions_end_where_nothing_moves():
    points = torch.cat([gaussian(100, 2) * 0.1, gaussian(100, 2, seed=1) * 0.1 + 5])
    model = layer(torch.tensor([[1.0, 1.0], [4.0, 4.0]]), 1000, 0.1, tolerance=1e-6)
    model.settle(points)
    torch.testing.assert_close(model.centroids.detach(), torch.stack([points[:100].mean(0), points[100:].mean(0)]))
    settled = model.centroids.detach().clone()
    assert float((model.settled(points) - settled).abs().amax()) <= 2e-6


def test_repetitions_lower_the_free_energy():
    """What soft k-means descends: -temperature times the sum of log-sum-exp of the scores."""
    points, centroids = gaussian(300, 2, dtype=torch.float64), gaussian(9, 2, seed=1, dtype=torch.float64)
    weights = gaussian(300, seed=4, dtype=torch.float64).square()
    energies = []
    for iterations in range(6):
        settled = layer(centroids, iterations, 0.3).settled(points, weights)
        scores = (points[:, None] - settled).square().sum(-1) / -0.3
        energies.append(float(-(scores.logsumexp(1) * weights).sum()))
    assert all(after < before for before, after in itertools.pairwise(energies))


def test_schedule_is_geometric():
    found = [temperature_schedule(share, 8.0, 0.5) for share in (0, 0.25, 0.5, 1)]
    assert found == pytest.approx([8, 4, 2, 0.5])
    model = layer(gaussian(3, 1), temperature=8.0, final_temperature=0.5)
    assert model.anneal(0.5) == model.temperature == pytest.approx(2)
    assert model.anneal(0) == 8 and model.anneal(1) == pytest.approx(0.5)
    assert "temperature=0.5" in repr(model)


def test_temperatures_suit_the_spacing():
    """Centroids in places do not merge at the first, and do not overlap at the last."""
    points = torch.linspace(-4, 4, 4001)[:, None]
    centroids = torch.linspace(-3.5, 3.5, 8)[:, None]
    first, last = temperatures(centroids)
    settled = layer(centroids, 200, first).settled(points)
    assert float(settled.diff(dim=0).amin()) > 0.5
    soft = layer(centroids, 0, last)(points).detach()
    hard = centroids[nearest(points, centroids)]
    assert float((soft - hard).abs().mean()) < 0.01


@pytest.mark.parametrize(("dim", "k"), [(1, 5), (3, 8)])
def test_hard_codes_are_the_nearest_of_the_settled_centroids(dim, k):
    points, model = gaussian(300, dim), layer(gaussian(k, dim, seed=1).flip(0))
    codes, centroids = model.harden(points)
    assert codes.shape == (300,) and centroids.dtype == torch.float32 and not centroids.requires_grad
    torch.testing.assert_close(centroids, model.settled(points))
    distances = torch.cdist(points.double(), centroids.double())
    chosen = distances.gather(1, codes[:, None].long())[:, 0]
    torch.testing.assert_close(chosen, distances.amin(1), atol=1e-5, rtol=0)


# Max (1960): the best scalar quantizers of a Gaussian.
@pytest.mark.parametrize(("bits", "decibels"), [(2, 9.30), (3, 14.62), (4, 20.22)])
def test_training_with_annealing_reaches_lloyd_max(bits, decibels):
    """From evenly spaced centroids, by gradients of a reconstruction error, on batches."""
    x = gaussian(1 << 17, 1)
    centroids = torch.linspace(-2.5, 2.5, 1 << bits)[:, None]
    first, last = temperatures(centroids)
    model = layer(centroids, 1, first, final_temperature=last)
    steps, generator = 150, torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for step in range(steps):
        model.anneal(step / (steps - 1))
        batch = x[torch.randint(len(x), (8192,), generator=generator)]
        optimizer.zero_grad()
        (model(batch) - batch).square().mean().backward()
        optimizer.step()
        schedule.step()
    codes, found = model.harden(x)
    power = float(x.double().square().mean())
    reached = 10 * math.log10(power / float((found[codes] - x).double().square().mean()))
    assert reached > decibels - 0.1
    best = kmeans(x, 1 << bits)
    assert reached > 10 * math.log10(power / float((best[nearest(x, best)] - x).double().square().mean())) - 0.1


# --- bad inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layer(gaussian(4)), r"\(k, d\)"),
        (lambda: layer(torch.ones(4, 1, dtype=torch.int64)), "floating-point"),
        (lambda: layer(gaussian(0, 1)), r"\(0, 1\)"),
        (lambda: layer(gaussian(4, 1), iterations=-1), "iterations must be 0 or more"),
        (lambda: layer(gaussian(4, 1), tolerance=math.nan), "tolerance must be 0 or more"),
        (lambda: layer(gaussian(4, 1), chunk=0), "chunk must be 1 or more"),
        (lambda: layer(gaussian(4, 1), temperature=0.0), "temperature must be"),
        (lambda: layer(gaussian(4, 1), temperature=math.inf), "temperature must be"),
        (lambda: layer(gaussian(4, 1), final_temperature=-1.0), "temperature must be"),
        (lambda: layer(gaussian(4, 1))(gaussian(3, 2)), r"points must be \(N, 1\)"),
        (lambda: layer(gaussian(4, 1))(torch.ones(3, 1, dtype=torch.int32)), "floating-point"),
        (lambda: layer(gaussian(4, 1))(gaussian(3, 1), torch.ones(2)), r"weights must be \(3,\)"),
        (lambda: layer(gaussian(4, 1))(gaussian(3, 1), torch.ones(3, requires_grad=True)), "need no gradient"),
        (lambda: layer(gaussian(4, 1)).anneal(1.5), "progress must be 0 to 1"),
        (lambda: temperature_schedule(0.5, 0.0, 1.0), "temperature must be"),
        (lambda: temperatures(gaussian(1, 2)), "2 or more centroids"),
        (lambda: temperatures(torch.ones(3, 2)), "twin"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_a_temperature_that_was_set_is_checked_when_used():
    model = layer(gaussian(4, 1))
    model.temperature = -1.0
    with pytest.raises(UsageError, match="temperature must be"):
        model(gaussian(3, 1))
