"""A table is stood in for while a model runs, and only then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ryzen_compile.errors import UsageError
from ryzen_compile.train.lookup import SubstitutedLookup, evaluating, find_table, logits
from tests.model_directory import case_named
from tests.zoo import NanoDecoder, build

IDS = torch.tensor([[3, 1, 4, 1, 5]])


def test_only_the_lookup_of_that_table_is_replaced() -> None:
    """A tied head goes on multiplying by the parameter, and the positions' table is another one."""
    model = NanoDecoder(width=32).eval()
    seen = []
    with torch.no_grad():
        before = model(IDS)
        with SubstitutedLookup(model.wte.weight, IDS, lambda ids: seen.append(ids) or model.wte.weight[ids]) as lookup:
            same = model(IDS)
        with SubstitutedLookup(model.wte.weight, IDS, lambda ids: torch.zeros(*ids.shape, 32)):
            other = model(IDS)
        after = model(IDS)
    assert lookup.calls == 1 and torch.equal(seen[0], IDS)
    assert torch.equal(same, before) and torch.equal(after, before)
    assert not torch.allclose(other, before) and other.abs().max() > 0


def test_a_scaled_lookup_stays_scaled() -> None:
    """Gemma multiplies what it looks up by the square root of the width, in a module of its own."""
    model = build(case_named("gemma2"))
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        before = logits(model, IDS)
        with SubstitutedLookup(table, IDS, lambda ids: table[ids]):
            same = logits(model, IDS)
    assert torch.equal(same, before)


def test_other_ids_get_their_rows_from_the_table() -> None:
    """A model that also looks up the row 0 at every place: only its tokens' rows are ours."""
    table = nn.Embedding(9, 4)
    with torch.no_grad(), SubstitutedLookup(table.weight, IDS, lambda ids: torch.zeros(*ids.shape, 4)) as lookup:
        mine, others = table(IDS), table(torch.zeros_like(IDS))
    assert lookup.calls == 1 and not mine.any() and torch.equal(others[0, 0], table.weight[0])


def test_rows_come_in_the_tables_type() -> None:
    table = nn.Embedding(9, 4, dtype=torch.bfloat16)
    with SubstitutedLookup(table.weight, IDS, lambda ids: torch.zeros(*ids.shape, 4)):
        assert table(IDS).dtype == torch.bfloat16


def test_modes_come_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    seen = []

    def fail() -> None:
        with evaluating(model):
            seen.extend(m.training for m in model.modules())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert not any(seen) and len(seen) == 4
    assert [m.training for m in model.modules()] == [True, True, False, False]


def test_a_parameter_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="'wte' is no parameter"):
        find_table(NanoDecoder(width=32), "wte")
