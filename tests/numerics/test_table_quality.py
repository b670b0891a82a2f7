"""Distances between tables, and what codes use of what they have."""

from __future__ import annotations

import math

import pytest
import torch

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.codebook import CodebookFormat, CodebookTensor
from ryzen_compile.numerics.table_quality import table_quality, table_stats


def test_against_the_definitions() -> None:
    g = torch.Generator().manual_seed(0)
    table, noise, hidden = torch.randn(300, 17, generator=g), torch.randn(300, 17, generator=g), torch.randn(5, 17)
    table[3] = 0
    found = table_quality(table, table + 0.1 * noise, hidden)
    relative = float((0.1 * noise).double().norm() / table.double().norm())
    assert found.relative_error == pytest.approx(relative, rel=1e-6)
    assert found.sqnr == pytest.approx(-20 * math.log10(relative))
    cosines = torch.nn.functional.cosine_similarity(table, table + 0.1 * noise, dim=1)
    assert found.cosine == pytest.approx(float(cosines[cosines != 0].mean()), rel=1e-5)
    p, q = ((hidden @ t.T).double().log_softmax(-1) for t in (table, table + 0.1 * noise))
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_the_ends() -> None:
    table = torch.randn(4, 4)
    same = table_quality(table, table)
    assert (same.relative_error, same.sqnr, same.kl) == (0.0, math.inf, None) and same.cosine == pytest.approx(1)
    zero = torch.zeros(4, 4)
    assert table_quality(zero, zero).relative_error == 0 and table_quality(zero, table).sqnr == -math.inf
    with pytest.raises(UsageError, match="cannot be compared"):
        table_quality(table, table[:3])


def test_stats_count_what_is_coded_only() -> None:
    """Rows 0 and 1 use entries 0 and 1 of four equally often: one bit of entropy; row 2 is kept, its codes are not."""
    codes = torch.tensor([[[0, 1, 0, 1]], [[1, 0, 1, 0]], [[3, 3, 3, 2]]])
    book, kept = torch.randn(1, 4, 1), torch.randn(1, 4).half()
    form = CodebookFormat(2, 1, group=None)
    tensor = CodebookTensor.from_codes(codes, book, form, 4, kept_ids=torch.tensor([2]), kept=kept)
    stats = table_stats(tensor)
    assert (stats.kept, stats.entries_used, stats.entropy) == (1, 0.5, 1.0)
    assert stats.nbytes == tensor.nbytes and stats.bits == 8 * tensor.nbytes / 12
    assert stats.bound == pytest.approx(6.0206 * stats.bits, rel=1e-5)
