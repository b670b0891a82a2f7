"""Rotary position embedding against complex multiplication in float64, and as a custom operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.testing import assert_close

from ryzen_compile import ops
from ryzen_compile.ops.rotary import rotate

POSITIONS = 13


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


def by_hand(x: Tensor, positions: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Each pair of channels as one complex number, turned by its angle; the rest as it is."""
    r = angles.shape[1]
    out = x.double().clone()
    first = [2 * i if interleaved else i for i in range(r)]
    second = [2 * i + 1 if interleaved else i + r for i in range(r)]
    turn = torch.polar(torch.ones(r, dtype=torch.float64), torch.zeros(r, dtype=torch.float64))
    for b in range(x.shape[0]):
        for t in range(x.shape[2]):
            turn = torch.polar(torch.ones(r, dtype=torch.float64), angles[positions[b, t]].double())
            turned = torch.complex(out[b, :, t, first], out[b, :, t, second]) * turn
            out[b, :, t, first], out[b, :, t, second] = turned.real, turned.imag
    return out


def sample(width: int, rotated: int, batch: int = 2, heads: int = 3, tokens: int = 5) -> tuple[Tensor, ...]:
    """x, positions in no order, and angles that follow no rule, so that every mistake of an index shows."""
    x = torch.randn(batch, heads, tokens, width)
    return x, torch.randint(POSITIONS, (batch, tokens)), torch.rand(POSITIONS, rotated) * 6


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "rotated"), [(2, 1), (8, 4), (8, 2), (7, 3), (31, 5)])  # whole, partial, odd widths
def test_is_complex_multiplication(width: int, rotated: int, interleaved: bool) -> None:
    x, positions, angles = sample(width, rotated)
    got = ops.rotary(x, positions, angles.cos(), angles.sin(), interleaved)
    assert_close(got.double(), by_hand(x, positions, angles, interleaved), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_one_token_of_one_head(interleaved: bool) -> None:
    x, positions, angles = sample(8, 3, batch=1, heads=1, tokens=1)
    got = ops.rotary(x, positions, angles.cos(), angles.sin(), interleaved)
    assert_close(got.double(), by_hand(x, positions, angles, interleaved), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_keeps_lengths_and_turns_back(interleaved: bool) -> None:
    x, positions, angles = sample(8, 4)
    y = ops.rotary(x, positions, angles.cos(), angles.sin(), interleaved)
    assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-6)
    assert_close(ops.rotary(y, positions, angles.cos(), -angles.sin(), interleaved), x, rtol=1e-5, atol=1e-5)


def test_only_the_distance_decides_a_score() -> None:
    angles = torch.arange(POSITIONS)[:, None] / 10.0 ** torch.arange(4)
    q, k = torch.randn(2, 1, 1, 1, 8)

    def score(query: int, key: int) -> float:
        turned = [
            ops.rotary(x, torch.tensor([[at]]), angles.cos(), angles.sin(), False) for x, at in ((q, query), (k, key))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(6, 1), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_comparison_sees_a_wrong_rotation(interleaved: bool) -> None:
    x, positions, angles = sample(8, 3)
    want = by_hand(x, positions, angles, interleaved)

    def matches(positions: Tensor = positions, angles: Tensor = angles, pairs: bool = interleaved) -> bool:
        got = ops.rotary(x, positions, angles.cos(), angles.sin(), pairs)
        return torch.allclose(got.double(), want, rtol=1e-5, atol=1e-6)

    assert matches()
    assert not matches(positions=(positions + 1) % POSITIONS)
    assert not matches(angles=1.01 * angles)
    assert not matches(angles=-angles)
    assert not matches(pairs=not interleaved)
    assert not matches(angles=angles[:, :2])


def test_rotate_broadcasts_its_angles() -> None:
    x, _, angles = sample(8, 2)
    cos, sin = angles[:5].cos(), angles[:5].sin()
    whole = rotate(x, cos, sin, True)
    positions = torch.arange(5).expand(2, 5)
    assert_close(whole, ops.rotary(x, positions, angles.cos(), angles.sin(), True), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tables", ["float32", "half"])
def test_half_precision_is_computed_wide_and_rounded_once(dtype: torch.dtype, tables: str) -> None:
    x, positions, angles = sample(8, 3)
    x = x.to(dtype)
    cos, sin = (t if tables == "float32" else t.to(dtype) for t in (angles.cos(), angles.sin()))
    got = ops.rotary(x, positions, cos, sin, False)
    assert got.dtype == dtype
    wide = ops.rotary(x.float(), positions, cos.float(), sin.float(), False)
    assert wide.dtype == torch.float32
    assert torch.equal(got, wide.to(dtype))
    step_by_step = rotate(x.double(), *(t.double()[positions].unsqueeze(1) for t in (cos, sin)), False)
    assert_close(wide.double(), step_by_step, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(interleaved: bool) -> None:
    x, positions, angles = sample(7, 2, heads=2, tokens=3)
    tables = (angles.cos().double(), angles.sin().double())

    def turned(x: Tensor) -> Tensor:
        return ops.rotary(x, positions, *tables, interleaved)

    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(turned, x)
    assert torch.autograd.gradgradcheck(turned, x)


def test_the_gradient_is_turned_back_and_not_on() -> None:
    x, positions, angles = sample(8, 3)
    cos, sin = angles.cos().requires_grad_(), angles.sin()
    x, upstream = x.to(torch.bfloat16).requires_grad_(), torch.randn_like(x).to(torch.bfloat16)
    ops.rotary(x, positions, cos, sin, True).backward(upstream)
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and cos.grad is None
    assert torch.equal(x.grad, ops.rotary(upstream, positions, cos, -sin, True))
    assert not torch.equal(x.grad, ops.rotary(upstream, positions, cos, sin, True))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 3, 5, 8),
        torch.randn(2, 5, 3, 8).transpose(1, 2),
        torch.randn(2, 5, 8, 3).permute(0, 3, 1, 2),
        torch.randn(2, 5, 1, 8).transpose(1, 2),
        torch.randn(2, 1, 5, 8).expand(2, 3, 5, 8),
    ],
    ids=["contiguous", "heads last", "channels outside", "one head", "expanded"],
)
def test_opcheck(x: Tensor, interleaved: bool) -> None:
    positions, angles = torch.randint(POSITIONS, (2, 5)), torch.rand(POSITIONS, 3)
    opcheck(ops.rotary, (x, positions, angles.cos(), angles.sin(), interleaved))
    opcheck(ops.rotary, (x, positions[:1].expand(2, 5), angles.cos(), angles.sin(), interleaved))
    opcheck(ops.rotary, (x.clone().requires_grad_(), positions, angles.cos(), angles.sin(), interleaved))
    opcheck(ops.rotary, (x.to(torch.bfloat16), positions, angles.cos(), angles.sin(), interleaved))
