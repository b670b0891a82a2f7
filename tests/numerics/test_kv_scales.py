"""Scales of channels: what they must hold, and that choosing them pays."""

from __future__ import annotations

import pytest
import torch

from ryzen_compile.numerics.kv_scales import SMALLEST, channel_scales


def squared_error(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    limit = 2 ** (bits - 1) - 1
    return ((x / scale).round().clamp(-limit - 1, limit) * scale - x).square().sum((0, 2))


@pytest.mark.parametrize("bits", [8, 4])
def test_every_channel_of_every_head_has_its_own(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 11, 6)
    x[:, 1, :, 4] *= 50
    scale = channel_scales(x, bits)
    assert scale.shape == (1, 2, 1, 6)
    alone = channel_scales(x[:, 1:, :, 4:5], bits)
    torch.testing.assert_close(scale[:, 1:, :, 4:5], alone)
    others = [c for c in range(6) if c != 4]
    assert float(scale[0, 1, 0, 4]) > 10 * float(scale[0, 1, 0, others].max())


def test_eight_bits_reach_the_largest_magnitude() -> None:
    x = torch.tensor([-2.54, 1.0]).view(1, 1, 2, 1)
    torch.testing.assert_close(channel_scales(x, 8), torch.full((1, 1, 1, 1), 0.02))


def test_four_bits_clip_where_that_errs_less() -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 1, 500, 5)
    x[0, 0, 0] = 20.0  # one token far out in every channel
    scale = channel_scales(x, 4)
    largest = x.abs().amax((0, 2), keepdim=True) / 7
    assert (squared_error(x, scale, 4) < 0.5 * squared_error(x, largest, 4)).all()


def test_four_bits_do_not_clip_where_nothing_is_gained() -> None:
    x = torch.tensor([-7.0, 7.0]).repeat(40).view(1, 1, 80, 1)
    torch.testing.assert_close(channel_scales(x, 4), torch.ones(1, 1, 1, 1))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_channel_that_is_always_zero_has_a_scale(bits: int) -> None:
    scale = channel_scales(torch.zeros(1, 1, 3, 2), bits)
    assert (scale > 0).all() and (scale <= SMALLEST).all()
