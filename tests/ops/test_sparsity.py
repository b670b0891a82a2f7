"""Dropping small channels: what stays, what NaN and ties do, gradients, and the operators as torch sees them."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from ryzen_compile import ops
from ryzen_compile.errors import UsageError

X = torch.tensor([[0.5, -0.5, 0.25, -2.0, 0.0], [1.0, -0.75, 0.5, 0.49, -0.5]])


def test_what_reaches_the_threshold_stays_as_it_is() -> None:
    wanted = torch.tensor([[0.5, -0.5, 0.0, -2.0, 0.0], [1.0, -0.75, 0.5, 0.0, -0.5]])
    assert torch.equal(ops.sparsify(X, 0.5), wanted)
    assert torch.equal(ops.sparsify(X, 0.0), X)
    assert not ops.sparsify(X, 3.0).any()


def test_each_token_keeps_its_largest_and_ties_stay() -> None:
    wanted = torch.tensor([[0.0, 0.0, 0.0, -2.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(ops.sparsify_topk(X, 1), wanted)
    assert torch.equal(ops.sparsify_topk(X, 2)[0], torch.tensor([0.5, -0.5, 0.0, -2.0, 0.0]))
    assert torch.equal(ops.sparsify_topk(X, 5), X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_nothing_is_rounded(dtype: torch.dtype) -> None:
    x = torch.randn(3, 1, 127, generator=torch.Generator().manual_seed(0)).to(dtype)
    for kept in (ops.sparsify(x, 0.7), ops.sparsify_topk(x, 40)):
        assert kept.dtype == dtype
        assert torch.equal(kept[kept != 0], x[kept != 0])
        assert 0 < int((kept == 0).sum()) < x.numel()


def test_a_nan_is_not_hidden() -> None:
    assert ops.sparsify(torch.tensor([float("nan"), 0.1]), 5.0).isnan().tolist() == [True, False]


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf")])
def test_a_threshold_that_is_none_is_refused(threshold: float) -> None:
    with pytest.raises(UsageError, match="threshold"):
        ops.sparsify(X, threshold)


@pytest.mark.parametrize("keep", [0, 6, -1])
def test_more_than_all_and_less_than_one_are_refused(keep: int) -> None:
    with pytest.raises(UsageError, match="from 1 to 5"):
        ops.sparsify_topk(X, keep)


@pytest.mark.parametrize(("drop", "limit"), [(ops.sparsify, 0.6), (ops.sparsify_topk, 3)])
def test_gradients_go_straight_through_what_is_kept(drop: object, limit: float) -> None:
    x = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    kept = drop(x, limit)
    kept.backward(torch.full_like(x, 3.0))
    assert torch.equal(x.grad, torch.where(kept != 0, 3.0, 0.0).double())


@pytest.mark.parametrize("shape", [(1,), (2, 3, 7), (0, 5)])
def test_the_operators_are_what_torch_expects(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    opcheck(torch.ops.ryzen.sparsify.default, (x, 0.5))
    opcheck(torch.ops.ryzen.sparsify_topk.default, (x.detach(), 1))
    opcheck(torch.ops.ryzen.sparsify.default, (torch.randn(5, 4).t(), 0.5))
