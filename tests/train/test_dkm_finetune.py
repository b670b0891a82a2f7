"""Training a table of codes: what moves, what must not, and that predictions come nearer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ryzen_compile.errors import NumericalError, UsageError
from ryzen_compile.numerics.codebook import CodebookFormat, CodebookTensor
from ryzen_compile.numerics.search.codebook_fit import FitSettings, fit_codebook
from ryzen_compile.train import dkm_finetune as module
from ryzen_compile.train.dkm_finetune import FEWEST_WINDOWS, FinetuneSettings, _Trained, dkm_finetune
from tests.zoo import VOCAB, NanoDecoder

WINDOWS = torch.randint(VOCAB, (40, 24), generator=torch.Generator().manual_seed(1))
NAME = "wte.weight"


def decoder() -> nn.Module:
    torch.manual_seed(0)
    return NanoDecoder(width=32)


def start(model: nn.Module, form: CodebookFormat, keep: Tensor | None = None) -> CodebookTensor:
    return fit_codebook(dict(model.named_parameters())[NAME].detach(), form, FitSettings(channel_gain=False, keep=keep))


FORMS = {
    "vectors, a scale a row": CodebookFormat(4, 4),
    "single weights, groups": CodebookFormat(1, 1, group=16),
    "eight weights": CodebookFormat(6, 8),
    "no scales": CodebookFormat(4, 4, group=None),
}


@pytest.mark.parametrize("form", FORMS)
def test_training_brings_predictions_nearer_on_other_text(form: str) -> None:
    """A coarse table, 60 steps: at least a tenth nearer, where the divergence is measured on windows not trained on."""
    model = decoder()
    before = start(model, FORMS[form], keep=torch.tensor([5, 17]))
    result = dkm_finetune(model, NAME, before, WINDOWS, FinetuneSettings(60))
    assert result.kl_after < 0.9 * result.kl_before
    assert result.table is not before
    assert result.table.shape == before.shape and result.table.nbytes == before.nbytes
    assert set(result.table.tensors) == set(before.tensors)
    assert all(result.table.tensors[n].dtype == t.dtype for n, t in before.tensors.items())
    assert torch.equal(result.table.slots, before.slots)


def test_the_model_is_left_as_it_was() -> None:
    model = decoder()
    model.train()
    model.blocks[0].eval()
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    dkm_finetune(model, NAME, start(model, CodebookFormat(4, 4)), WINDOWS, FinetuneSettings(2))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_the_same_arguments_give_the_same_table() -> None:
    model = decoder()
    first, second = (
        dkm_finetune(model, NAME, start(model, CodebookFormat(3, 2)), WINDOWS, FinetuneSettings(6)) for _ in range(2)
    )
    assert first.kl_after == second.kl_after
    assert all(torch.equal(t, second.table.tensors[n]) for n, t in first.table.tensors.items())


def test_what_training_made_worse_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates a thousand times too high: the table that it started from comes back."""
    monkeypatch.setattr(module, "RATES", {name: 1000 * rate for name, rate in module.RATES.items()})
    model = decoder()
    before = start(model, CodebookFormat(8, 2))
    result = dkm_finetune(model, NAME, before, WINDOWS, FinetuneSettings(3))
    assert result.kl_after >= result.kl_before and result.table is before


def test_progress_rises_to_one() -> None:
    heard: list[float] = []
    model = decoder()
    dkm_finetune(model, NAME, start(model, CodebookFormat(4, 4)), WINDOWS, FinetuneSettings(3), heard.append)
    assert heard == sorted(heard) and heard[-1] == 1 and len(heard) == 4


def test_refusals() -> None:
    model = decoder()
    table = start(model, CodebookFormat(4, 4))
    with pytest.raises(UsageError, match="'table' is no parameter"):
        dkm_finetune(model, "table", table, WINDOWS)
    with pytest.raises(UsageError, match=r"is \(160, 32\), the compressed table \(99, 32\)"):
        dkm_finetune(model, "wpe.weight", table, WINDOWS)
    with pytest.raises(UsageError, match="too few to train on"):
        dkm_finetune(model, NAME, table, WINDOWS[: FEWEST_WINDOWS - 1])
    two = fit_codebook(model.wte.weight.detach(), CodebookFormat(2, 4, 2), FitSettings(channel_gain=False))
    with pytest.raises(UsageError, match="of 2 stage"):
        dkm_finetune(model, NAME, two, WINDOWS)


@pytest.mark.parametrize("form", [CodebookFormat(8, 2), CodebookFormat(1, 8), CodebookFormat(1, 4, group=4)])
def test_training_starts_from_the_table_it_was_given(form: CodebookFormat) -> None:
    """Channels of unequal size and mean, scales of both signs, scales of 0: before any step, hardening loses no more
    than codes that are not the nearest for a scale that was fitted last (1 %), and rows drawn at a low temperature are
    the hard ones."""
    g = torch.Generator().manual_seed(0)
    table = torch.randn(4000, 16, generator=g) * torch.logspace(-2, 0, 16) + torch.linspace(-1, 1, 16)
    table[:, 5] = 0
    table[7] = 0
    before = fit_codebook(table, form, FitSettings(channel_gain=False, keep=torch.tensor([3])))
    if form.group == 4:
        assert (before.scales < 0).any()
    trained = _Trained(before, table, torch.arange(0, 4000, 3))
    after = trained.hardened()
    errors = [float((t.decode() - table).square().sum()) for t in (before, after)]
    assert errors[1] <= 1.01 * errors[0]
    trained.layer.temperature = 1e-6 * trained.error
    ids = torch.tensor([[0, 3, 6], [9, 3, 0]])
    near = (trained.rows(ids).detach() - after.rows(ids)).abs() < 1e-4
    assert near.float().mean() > 0.95  # a few weights lie between two entries


def test_the_size_of_a_table_does_not_matter() -> None:
    """The same model with its table a power of two smaller and what it looks up as many times larger: to rounding of
    the kept rows and scales in float16, the same divergences."""

    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.inner = decoder()
            self.inner.head.weight = nn.Parameter(self.inner.head.weight.detach().clone())  # untied
            self.factor = factor
            with torch.no_grad():
                self.inner.wte.weight /= factor

        def forward(self, ids: Tensor) -> Tensor:
            handle = self.inner.wte.register_forward_hook(lambda _, __, out: out * self.factor)
            try:
                return self.inner(ids)
            finally:
                handle.remove()

    found = []
    for factor in (1.0, 1024.0):
        model = Scaled(factor)
        table = model.inner.wte.weight.detach()
        before = fit_codebook(table, CodebookFormat(4, 4), FitSettings(channel_gain=False))
        found.append(dkm_finetune(model, f"inner.{NAME}", before, WINDOWS, FinetuneSettings(10)))
    assert found[0].kl_before == pytest.approx(found[1].kl_before, rel=1e-3)
    assert found[0].kl_after == pytest.approx(found[1].kl_after, rel=1e-2)


def test_a_table_that_codes_hold_exactly_comes_back() -> None:
    model = decoder()
    with torch.no_grad():
        model.wte.weight.copy_(model.wte.weight.sign())
    before = start(model, CodebookFormat(1, 1))
    result = dkm_finetune(model, NAME, before, WINDOWS, FinetuneSettings(3))
    assert result.table is before and result.kl_before == result.kl_after < 1e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_switched_on(mode: type) -> None:
    model = decoder()
    with mode():
        result = dkm_finetune(model, NAME, start(model, CodebookFormat(4, 4)), WINDOWS, FinetuneSettings(2))
    assert result.kl_after != result.kl_before


def test_a_model_in_half_precision_is_trained() -> None:
    model = decoder().bfloat16()
    result = dkm_finetune(model, NAME, start(model, CodebookFormat(4, 4)), WINDOWS, FinetuneSettings(2))
    assert result.kl_after != result.kl_before


def test_parts_of_a_batch_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch at once and window by window: the same divergence to float32 rounding of three steps, 1e-3."""
    model = decoder()
    found = []
    for most in (1 << 30, 1):
        monkeypatch.setattr(module, "LOGITS", most)
        found.append(dkm_finetune(model, NAME, start(model, CodebookFormat(4, 4)), WINDOWS, FinetuneSettings(3)))
    assert found[0].kl_after == pytest.approx(found[1].kl_after, rel=1e-3)


def test_a_model_that_overflows_is_named() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = decoder()
            self.calls = 0

        def forward(self, ids: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(ids) * (float("nan") if self.calls > 20 else 1)

    model = Broken()
    table = start(model.inner, CodebookFormat(4, 4))
    with pytest.raises(NumericalError, match="the loss is nan at step"):
        dkm_finetune(model, f"inner.{NAME}", table, WINDOWS, FinetuneSettings(30))
