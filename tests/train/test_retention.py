"""What is left when vectors are cut: figures that can be counted by hand, and that measuring changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ryzen_compile.spec import Pooling
from ryzen_compile.train.contrastive import ContrastiveObjective
from ryzen_compile.train.objective import Levers, Objective
from ryzen_compile.train.retention import (
    AXES_ROWS,
    _cosines,
    make_retention,
    principal_axes,
    retrieval_figures,
    retrieval_ranks,
)
from tests.train.test_contrastive import COLUMNS, rows
from tests.train.tiny_pairs import encoder
from tests.train.tiny_trainer import llama, patterned


def test_ranks_counted_by_hand() -> None:
    """Ranks 1, 2 (one is nearer), 3 (one as near, one nearer), and 1, because the nearer one is the same."""
    cosines = torch.tensor(
        [[0.9, 0.1, 0.1, 0.1], [0.5, 0.4, 0.3, 0.3], [0.2, 0.2, 0.2, 0.1], [0.1, 0.1, 0.8, 0.7]], dtype=torch.float64
    )
    same = torch.eye(4, dtype=torch.bool)
    same[3, 2] = same[2, 3] = True
    ranks = retrieval_ranks(cosines, same, torch.arange(4))
    assert ranks.tolist() == [1, 2, 3, 1]
    assert retrieval_ranks(cosines[2:], same[2:], torch.tensor([2, 3])).tolist() == [3, 1]
    assert retrieval_figures(ranks) == {"recall@10": 1.0, "mrr": pytest.approx((1 + 1 / 2 + 1 / 3 + 1) / 4)}
    twelve = torch.arange(12.0).repeat(12, 1)  # the last column is nearest to all: ranks 12, 11, ..., 1
    ranks = retrieval_ranks(twelve, torch.eye(12, dtype=torch.bool), torch.arange(12))
    assert retrieval_figures(ranks)["recall@10"] == pytest.approx(10 / 12)


def test_axes_find_the_plane_that_vectors_lie_in() -> None:
    """Of 7 channels two matter; turned, the first two hold everything, to rounding in float64."""
    g = torch.Generator().manual_seed(1)
    vectors = torch.randn(50, 2, generator=g, dtype=torch.float64) @ torch.randn(2, 7, generator=g, dtype=torch.float64)
    axes = principal_axes(vectors)
    torch.testing.assert_close(axes.t() @ axes, torch.eye(7, dtype=torch.float64))
    turned = vectors @ axes
    assert float(turned[:, 2:].abs().max()) < 1e-7
    assert turned[:, 0].square().sum() > turned[:, 1].square().sum()
    torch.testing.assert_close(turned @ turned.t(), vectors @ vectors.t())


@pytest.mark.parametrize("queries", [1, 7, 23])
def test_figures_of_an_encoder(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against texts encoded one by one and all cosines at once, however many queries of the 23 are taken at a time;
    measuring leaves mode, levers and generator as they were."""
    monkeypatch.setattr("ryzen_compile.train.retention.CELLS", queries * 23 + 22)
    made = ContrastiveObjective(
        encoder().train(), Levers(torch.bfloat16), Pooling(), COLUMNS, scale=20.0, symmetric=False
    )
    pairs = rows(23, seed=4)
    retention = make_retention(made, (32, 8), rows(9, seed=5), pairs, batch=5)
    drawn = torch.get_rng_state()
    figures, turned = retention.figures(), retention.figures(retention.axes())
    assert torch.equal(torch.get_rng_state(), drawn) and made.training and made.levers == Levers(torch.bfloat16)
    made.eval()
    made.levers = Levers()
    with torch.no_grad():
        sides = [
            torch.cat([made.vectors(side[side >= 0][None]) for side in part])
            for part in (pairs[:, :COLUMNS], pairs[:, COLUMNS:])
        ]
    for dim in (32, 8):
        cosines, whole = (_cosines(*(side[:, :cut] for side in sides)) for cut in (dim, 32))
        ranks = retrieval_ranks(cosines, made.same(pairs), torch.arange(23))
        correlation = torch.corrcoef(torch.stack([cosines.flatten(), whole.flatten()]).double())[0, 1]
        expected = retrieval_figures(ranks) | {"cosine_correlation": float(correlation)}
        # Texts in batches are encoded to other last bits of float32.
        assert figures[dim] == pytest.approx(expected, rel=1e-5)
    assert turned[32]["mrr"] == pytest.approx(figures[32]["mrr"], abs=0.03)  # a near tie may fall the other way
    assert turned[8]["cosine_correlation"] > figures[8]["cosine_correlation"]


def test_figures_of_a_language_model() -> None:
    model = llama()
    objective = Objective(model.train(), Levers(linear_cross_entropy=True))
    retention = make_retention(objective, (32, 5), patterned(AXES_ROWS + 3, seed=0), held := patterned(7, seed=2), 3)
    figures, turned = retention.figures(), retention.figures(retention.axes())
    assert model.training
    model.eval()
    with torch.no_grad():
        hidden = model.base_model(input_ids=held[:, :-1]).last_hidden_state.double()
        head = model.get_output_embeddings().weight.double()
        for dim in (32, 5):
            logits = (hidden[..., :dim] @ head[:, :dim].t()).flatten(0, 1)
            expected = functional.cross_entropy(logits, held[:, 1:].flatten()).item()
            assert figures[dim] == {"loss": pytest.approx(expected, rel=1e-5)}
    assert turned[32]["loss"] == pytest.approx(figures[32]["loss"], rel=1e-5)
