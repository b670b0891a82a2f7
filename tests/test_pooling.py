"""Pooling against plain expressions over the tokens that count, forwards and backwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ryzen_compile.pooling import pool
from ryzen_compile.spec import Pooling

MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]])


def expected(tokens: Tensor, mode: str, *, normalize: bool) -> Tensor:
    """One text's vector, of its (T, C) tokens alone."""
    vector = {"mean": tokens.mean(0), "cls": tokens[0], "max": tokens.amax(0), "last": tokens[-1]}[mode]
    return vector / vector.norm() if normalize else vector


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", ["mean", "cls", "max", "last"])
def test_padding_is_passed_by(mode: Any, normalize: bool, dtype: torch.dtype) -> None:
    """In float64, with padding larger than any token; gradients of tokens are those of a text alone, of padding 0."""
    states = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states[MASK == 0] = 100
    states.requires_grad_()
    weights = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = pool(states, MASK.to(dtype), Pooling(mode, normalize))
    (got * weights).sum().backward()
    assert states.grad is not None
    for row, kept in enumerate(MASK.bool()):
        tokens = states[row, kept].detach().requires_grad_()
        want = expected(tokens, mode, normalize=normalize)
        (want * weights[row]).sum().backward()
        torch.testing.assert_close(got[row], want, rtol=0, atol=1e-14)
        torch.testing.assert_close(states.grad[row, kept], tokens.grad, rtol=0, atol=1e-14)
        assert not states.grad[row, ~kept].any()


def test_each_mode_is_what_it_is_called() -> None:
    states = torch.tensor([[[1.0, -4.0], [3.0, -2.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0]])
    modes: tuple[Any, ...] = ("mean", "cls", "max", "last")
    found = {mode: pool(states, mask, Pooling(mode, normalize=False)).tolist() for mode in modes}
    assert found == {"mean": [[2, -3]], "cls": [[1, -4]], "max": [[3, -2]], "last": [[3, -2]]}
