"""What is prepared for the pass: every lookup that it will rewrite, whatever stands before it in the captured graph."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ryzen_compile.api import rewrite
from ryzen_compile.calibration import Calibration
from ryzen_compile.capture import capture
from ryzen_compile.config import EmbeddingCompression, find_recipe
from ryzen_compile.errors import ConfigError, UsageError
from ryzen_compile.pipeline import default_passes
from ryzen_compile.train.embedding import prepare_compressor
from tests.model_directory import case_named
from tests.zoo import VOCAB, NanoDecoder, build

IDS = torch.randint(VOCAB, (44, 32), generator=torch.Generator().manual_seed(1))
TEXT = Calibration(IDS[:20], IDS[20:24], "random", "0", IDS, (0, 1))


@cache
def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NanoDecoder(width=32).eval() if name == "nano" else build(case_named(name))


def notes(report: Any) -> str:
    return next(record for record in report.records if record.name == "compress_embedding").hits[0].note


@pytest.mark.parametrize("name", ["nano", "llama", "gpt2"])  # gpt2 reshapes its ids before it looks them up
def test_dkm_trains_the_table_that_the_pass_stores(name: str) -> None:
    recipe = find_recipe("fp32", embedding={"method": "dkm", "bits": 4, "steps": 4, "keep": 0.05, "max_kl": 50.0})
    program, report = rewrite(model(name), recipe, backend="eager", calibration=TEXT, verify=False)
    assert "trained for 4 steps" in notes(report) and "5 rows kept" in notes(report)
    (slots,) = [value for key, value in program.weights.items() if key.endswith("slots")]
    assert slots[0] >= 0 and slots[1] >= 0  # the tokenizer's own


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fisher_information_decides_what_is_kept(name: str) -> None:
    """Another choice of rows than that of counts."""
    kept = []
    for weighting in ("frequency", "fisher"):
        settings = {"method": "kmeans", "weighting": weighting, "keep": 0.2, "max_kl": 50.0}
        program, _ = rewrite(
            model(name), find_recipe("fp32", embedding=settings), backend="eager", calibration=TEXT, verify=False
        )
        (slots,) = [value for key, value in program.weights.items() if key.endswith("slots")]
        kept.append((slots >= 0).nonzero()[:, 0].tolist())
    assert kept[0] != kept[1] and len(kept[0]) == len(kept[1])


class Computed(nn.Module):
    """Looks up in something that it computes from a parameter, or in a buffer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = NanoDecoder(width=32), how
        self.register_buffer("table", torch.randn(VOCAB, 32))

    def forward(self, ids: Tensor) -> Tensor:
        table = self.table if self.how == "buffer" else self.inner.wte.weight * 4.0
        x = torch.nn.functional.embedding(ids, table)
        for block in self.inner.blocks:
            x = block(x)
        return self.inner.head(self.inner.norm(x))


@pytest.mark.parametrize("how", ["buffer", "expression"])
def test_a_table_that_is_no_parameter_is_named(how: str) -> None:
    torch.manual_seed(0)
    module = Computed(how).eval()
    program = capture(module, context=64)
    with pytest.raises(UsageError, match="is no parameter of the model"):
        prepare_compressor(module, program, EmbeddingCompression(method="dkm"), TEXT)
    assert prepare_compressor(module, program, EmbeddingCompression(), TEXT).settings.method == "kmeans"


def test_each_table_has_its_own_weights() -> None:
    """Two tables of different lengths, both looked up by the tokens."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Embedding(VOCAB, 16), nn.Embedding(VOCAB + 21, 16)
            self.head = nn.Linear(16, VOCAB)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.first(ids) + self.second(ids)))

    torch.manual_seed(0)
    module = Two().eval()
    settings = EmbeddingCompression(method="dkm", weighting="fisher", steps=2, keep=0.0)
    compressor = prepare_compressor(module, capture(module, context=64), settings, TEXT)
    assert {len(w) for w in compressor._row_weights.values()} == {VOCAB, VOCAB + 21}
    assert set(compressor._given) == {"first.weight", "second.weight"}


def test_without_text() -> None:
    program = capture(model("llama"))
    with pytest.raises(ConfigError, match="reads text, got none"):
        prepare_compressor(model("llama"), program, EmbeddingCompression(method="dkm"), None)


@pytest.mark.parametrize("settings", [{"method": "dkm"}, {"weighting": "fisher"}])
def test_the_pass_does_not_pass_for_prepared(settings: dict[str, str]) -> None:
    """``default_passes`` alone has no model at hand."""
    step = next(s for s in default_passes(find_recipe("fp32", embedding=settings)) if s.name == "compress_embedding")
    with pytest.raises(ConfigError, match="has to be prepared"):
        step.run(capture(model("llama")))
