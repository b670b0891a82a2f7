"""Row weights against the gradient of the likelihood, taken another way."""

from __future__ import annotations

import pytest
import torch

from ryzen_compile.errors import UsageError
from ryzen_compile.train.row_fisher import SMOOTHING, row_fisher
from tests.zoo import VOCAB, NanoDecoder

TEXT = torch.randint(40, (5, 12), generator=torch.Generator().manual_seed(0))


def model() -> NanoDecoder:
    torch.manual_seed(0)
    return NanoDecoder(width=32).eval()


def test_rows_that_the_text_does_not_reach_count_little() -> None:
    decoder = model()
    weights = row_fisher(decoder, "wte.weight", TEXT)
    seen = torch.zeros(VOCAB, dtype=torch.bool)
    seen[TEXT.flatten()] = True
    assert weights.shape == (VOCAB,) and weights.mean() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(weights[~seen], torch.full((int((~seen).sum()),), SMOOTHING))
    assert weights[seen].mean() > 1 > weights[~seen].max()  # a last token of a window may matter as little
    assert all(p.grad is None for p in decoder.parameters())


def test_a_row_twice_as_effective_counts_four_times() -> None:
    """The logits read the table through a gain for each token: Fisher information goes with its square."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(2, 8)
            self.head = torch.nn.Linear(8, 5)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(1e-3 * self.table(ids) * (1.0 + ids[..., None]))

    torch.manual_seed(0)
    ids = torch.arange(2).repeat(4, 500)
    weights = (row_fisher(Scaled(), "table.weight", ids) - SMOOTHING) / (1 - SMOOTHING)
    assert weights[1] / weights[0] == pytest.approx(4, rel=0.15)  # 2,000 draws each


def test_a_table_that_is_not_looked_up_is_refused() -> None:
    with pytest.raises(UsageError, match=r"in head\.weight 0 times"):
        row_fisher(NoLookup(), "head.weight", TEXT)


class NoLookup(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(8, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.nn.functional.one_hot(ids % 8, 8).float())
