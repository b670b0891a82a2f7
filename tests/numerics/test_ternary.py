"""Codes found again in weights that are products of a scale and codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ryzen_compile.numerics import blockwise
from ryzen_compile.numerics.ternary import recover, unpack


def product(rows: int, width: int, scales: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.randint(-1, 2, (rows, width), generator=torch.Generator().manual_seed(rows * width))
    return codes, codes * scales.reshape(-1, 1)


@pytest.mark.parametrize(("rows", "width"), [(1, 7), (5, 31), (13, 64), (3, 4)])
@pytest.mark.parametrize("each", [True, False], ids=["a scale a row", "one scale"])
def test_the_product_is_the_weight_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, rows: int, width: int, each: bool
) -> None:
    """In several runs of rows, as large weights are read."""
    monkeypatch.setattr(blockwise, "CHUNK_ELEMENTS", 40)
    scales = torch.rand(rows if each else 1, generator=torch.Generator().manual_seed(1)) + 0.1
    codes, weights = product(rows, width, scales)
    found = recover(weights)
    assert found is not None
    assert torch.equal(unpack(found[0], width), codes.to(torch.int8))
    assert found[1].shape == ((rows,) if each and rows > 1 else ())
    assert torch.equal(unpack(found[0], width) * found[1].reshape(-1, 1), weights)


def test_rows_of_zeros_do_not_ask_for_scales_of_their_own() -> None:
    weights = torch.tensor([[0.5, -0.5, 0.0], [0.0, 0.0, -0.0], [0.0, 0.5, 0.5]])
    found = recover(weights)
    assert found is not None and found[1].shape == () and float(found[1]) == 0.5
    assert torch.equal(unpack(found[0], 3) * found[1], weights)
    weights[2] *= 3
    found = recover(weights)
    assert found is not None and found[1].tolist() == [0.5, 0.0, 1.5]


def test_what_is_no_such_product() -> None:
    _, weights = product(4, 9, torch.tensor([0.3]))
    assert recover(weights) is not None
    for value in (0.3 * (1 + 2**-23), 0.15, torch.nan, torch.inf):
        other = weights.clone()
        other[2, 3] = value
        assert recover(other) is None, value
    assert recover(torch.zeros(3, 4)) is None and recover(torch.zeros(0, 4)) is None
