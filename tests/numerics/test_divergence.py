"""Divergence against its definition, and that chunks do not show."""

from __future__ import annotations

import math

import pytest
import torch

from ryzen_compile.numerics.divergence import CHUNK_TOKENS, mean_divergence


def test_two_tokens_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    kl, same = mean_divergence(p.log(), q.log() + 3.0)  # a constant changes no distribution
    assert kl == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2, abs=1e-7)
    assert same == 0.5  # of equal logits the first counts as the most likely


def test_equal_logits_do_not_diverge() -> None:
    x = torch.randn(2, CHUNK_TOKENS + 3, 7)
    assert mean_divergence(x, x) == (0.0, 1.0)


def test_chunks_do_not_show() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, CHUNK_TOKENS, 11, generator=generator) for _ in range(2))
    p, q = torch.log_softmax(x.double(), -1), torch.log_softmax(y.double(), -1)
    kl, same = mean_divergence(x, y)
    assert kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-12)
    assert same == pytest.approx(float((x.argmax(-1) == y.argmax(-1)).double().mean()), rel=1e-12)


def test_nan_shows() -> None:
    x = torch.zeros(2, 5)
    assert math.isnan(mean_divergence(x, x * math.nan)[0])
