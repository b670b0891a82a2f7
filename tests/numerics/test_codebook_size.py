"""Sizes before coding are the sizes after it."""

from __future__ import annotations

import pytest
import torch

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.codebook import MOST_KEPT, CodebookFormat
from ryzen_compile.numerics.codebook_size import format_for_ratio, stored_bytes
from ryzen_compile.numerics.search.codebook_fit import FitSettings, fit_codebook


@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize(
    "form", [CodebookFormat(3, 1), CodebookFormat(8, 2), CodebookFormat(5, 4, 2, 8), CodebookFormat(4, 8, group=None)]
)
def test_it_is_what_is_stored(form: CodebookFormat, kept: int) -> None:
    """Up to gain and offset, which are counted and left out where they do not help."""
    table = torch.randn(150, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 40) + 1
    tensor = fit_codebook(table, form, FitSettings(keep=torch.arange(kept) if kept else None))
    absent = sum(4 * 40 for part in (tensor.gain, tensor.offset) if part is None)
    assert tensor.nbytes + absent == stored_bytes(form, 150, 40, kept)


@pytest.mark.parametrize(("ratio", "bits", "dim"), [(3.95, 8, 1), (7.1, 8, 2), (10, 6, 2), (15, 8, 4), (28, 8, 8)])
def test_the_format_for_a_large_table(ratio: float, bits: int, dim: int) -> None:
    form, kept = format_for_ratio(ratio, 152_000, 896)
    assert (form.bits, form.dim, form.stages, form.group) == (bits, dim, 1, 0)
    assert 1 <= kept <= MOST_KEPT
    assert stored_bytes(form, 152_000, 896, kept) <= 4 * 152_000 * 896 / ratio


def test_widths_that_no_long_vector_fits() -> None:
    """7 is odd: single weights only."""
    form, _ = format_for_ratio(4, 5000, 7)
    assert form.dim == 1


def test_what_cannot_be_reached_is_refused_with_what_can() -> None:
    with pytest.raises(UsageError, match=r"cannot be made 300 times smaller, \d"):
        format_for_ratio(300, 1000, 64)
