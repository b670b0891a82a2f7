"""Lookups through softly clustered rows: what trains, what an export would store, a model that is plain when off."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ryzen_compile.errors import ConfigError, ModelError, UsageError
from ryzen_compile.numerics.codebook import CodebookFormat
from ryzen_compile.numerics.search.codebook_fit import FitSettings, fit_codebook
from ryzen_compile.train.config import DkmSettings
from ryzen_compile.train.dkm_table import CHILD, DkmComponent
from ryzen_compile.train.soft_table import SoftTable
from tests.model_directory import case_named
from tests.zoo import VOCAB, NanoDecoder, build

IDS = torch.randint(3, VOCAB, (3, 21), generator=torch.Generator().manual_seed(3))
COLD = 1e-6
SETTINGS = DkmSettings(bits=(4,), cluster_dim=4)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "scaled lookups": ("gemma2", {}),  # times the square root of the width, in the module itself
    "reshaped ids": ("gpt2", {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}),
}


def model_named(name: str = "tied") -> Any:
    kind, changes = MODELS[name]
    return build(case_named(kind, **changes)).train()


def attached(model: nn.Module, settings: DkmSettings = SETTINGS, *, active: bool = True) -> DkmComponent:
    component = DkmComponent(settings)
    component.prepare(model)
    if active:
        component.activate()
    return component


def weight(model: Any) -> Tensor:
    return model.get_input_embeddings().weight


def soft(model: Any) -> SoftTable:
    return getattr(model.get_input_embeddings(), CHILD)


def loss(model: Any, ids: Tensor = IDS) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def score(model: Any) -> float:
    """The loss with stored rows."""
    training = model.training
    found = float(loss(model.eval()))
    model.train(training)
    return found


# --- rows -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_cold_rows_are_the_stored_ones(name: str) -> None:
    """In evaluation to the bit; in training to the rounding of scales to float16, 2 ** -11 of a row's largest weight.

    A vector half-way between two entries may take the other one where distances are summed in another order: seen for
    none of these.
    """
    model = model_named(name)
    component = attached(model, DkmSettings(bits=(4,), cluster_dim=4, temperatures=(1.0, COLD)))
    table, stored = soft(model), component.table()
    warm = table.lookup(weight(model), IDS).detach()
    component.advance(1.0)
    cold = table.lookup(weight(model), IDS).detach()
    wanted = stored.rows(IDS)
    near = 2**-11 * stored.decode().abs().max()
    assert (cold - wanted).abs().max() <= 1.01 * near
    assert (warm - wanted).abs().max() > 10 * near
    model.eval()
    assert torch.equal(table.lookup(weight(model), IDS), wanted)


@pytest.mark.parametrize("training", [True, False])
def test_rows_of_the_batch_are_those_of_the_whole_table(training: bool) -> None:
    """Repeated ids, an empty batch, one token: to float32 rounding of products of other shapes, 1e-6."""
    model = model_named()
    attached(model)
    table = soft(model).train(training)
    whole = table.lookup(weight(model), torch.arange(VOCAB))
    for ids in (IDS, IDS[:1, :1], torch.tensor([[7, 7, 7, 2]]), torch.tensor([98, 0])):
        rows = table.lookup(weight(model), ids)
        assert rows.shape == (*ids.shape, 64)
        assert torch.allclose(rows, whole[ids], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_what_the_module_does_to_its_rows_it_goes_on_doing(name: str) -> None:
    """The forward pass is that of a plain model whose table (of lookups alone) holds the stored rows, to the bit."""
    model = model_named(name).eval()
    plain = copy.deepcopy(model)
    component = attached(model)
    embedding = plain.get_input_embeddings()
    embedding.weight = nn.Parameter(component.table().decode())  # a tied head keeps the old one
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_autocast_does_not_choose_other_codes() -> None:
    model = model_named().eval()
    component = attached(model, DkmSettings(bits=(6,), cluster_dim=2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = model.get_input_embeddings()(IDS)
    assert torch.equal(rows, component.table().rows(IDS))


def test_rows_of_a_half_precision_model_have_its_type() -> None:
    model = model_named().bfloat16().eval()
    component = attached(model)
    assert torch.equal(model.get_input_embeddings()(IDS), component.table().rows(IDS).bfloat16())


# --- clusters ---------------------------------------------------------------------------------------------------------
FORMS = [CodebookFormat(6, 2), CodebookFormat(1, 8), CodebookFormat(3, 1)]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.bits} bits, {form.dim} weights")
def test_clusters_begin_with_what_k_means_found(form: CodebookFormat) -> None:
    """Channels of unequal size and mean, a row of zeros: hardened at once, no more than 1 % is lost to the nearest code
    for a scale that was fitted last."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(301, 24, generator=generator) * torch.logspace(-2, 0, 24) + torch.linspace(-1, 1, 24)
    table[7] = 0
    found = SoftTable(*table.shape, form)
    found.cluster(table, form)
    before = fit_codebook(table, form, FitSettings(channel_gain=False))
    errors = [float((t.decode() - table).square().sum()) for t in (before, found.hardened(table))]
    assert errors[1] <= 1.01 * errors[0]


@pytest.mark.parametrize("factor", [1e-4, 1.0, 300.0])
def test_the_size_of_a_table_does_not_matter(factor: float) -> None:
    """Rows and the parameters' gradients are those of the table times a power of two, in its unit: 1e-3, for scales
    that float16 rounds when they are fitted. Weights that grew after clustering still lie among the entries."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(200, 16, generator=generator)
    found = SoftTable(200, 16, CodebookFormat(4, 2))
    found.cluster(table, found.form)
    grown = factor * (table - found.start_offset) + found.start_offset
    rows = found.lookup(grown, torch.arange(200)) - found.start_offset
    plain = found.lookup(table, torch.arange(200)) - found.start_offset
    assert torch.allclose(rows / factor, plain, rtol=1e-3, atol=1e-3)


def test_a_table_that_entries_hold_exactly() -> None:
    model = model_named()
    with torch.no_grad():
        weight(model).copy_(weight(model).sign())
    component = attached(model, DkmSettings(bits=(2,), cluster_dim=1))
    component.advance(1.0)
    assert component.facts().error < 1e-6
    assert torch.isfinite(loss(model))


def test_weights_that_are_not_finite_are_named() -> None:
    model = model_named()
    with torch.no_grad():
        weight(model)[5, 1] = torch.nan
    with pytest.raises(UsageError, match="1 of 6336 weights are NaN"):
        attached(model)


# --- training ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_weights_entries_scales_and_offset(name: str) -> None:
    """Of the batch's rows and of no others; those of a warm table are the derivatives, by differences of the loss."""
    model = model_named(name)
    component = DkmComponent(SETTINGS)
    own = component.prepare(model)
    component.activate()
    with torch.no_grad():
        for parameter in own:
            parameter.normal_(std=0.02)
    value = loss(model)
    value.backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in (*own, weight(model)))
    seen = torch.zeros(VOCAB, dtype=torch.bool)
    seen[IDS.unique()] = True
    assert not soft(model).scales.grad[~seen].any()
    for parameter in own:
        step = parameter.grad / parameter.grad.norm() * 1e-3
        with torch.no_grad():
            parameter += step
            above = float(loss(model))
            parameter -= 2 * step
            below = float(loss(model))
            parameter += step
        assert (above - below) / 2e-3 == pytest.approx(float(parameter.grad.norm()), rel=0.05)


def test_a_padding_row_is_not_trained_by_its_lookups() -> None:
    model = model_named("untied")
    attached(model)
    assert model.get_input_embeddings().padding_idx == 0
    ids = IDS.clone()
    ids[:, 5] = 0
    loss(model, ids).backward()
    assert not weight(model).grad[0].any() and not soft(model).scales.grad[0].any()
    assert weight(model).grad[ids[0, 0]].any()


def test_training_lowers_the_loss_of_the_stored_rows() -> None:
    """Only the table and its codes move: 40 steps of a coarse code, the loss in evaluation (hard rows) falls by more
    than a tenth, and more than that of the codes that k-means finds for the weights afterwards."""
    model = model_named("untied").requires_grad_(requires_grad=False)
    component = DkmComponent(DkmSettings(bits=(3,), cluster_dim=4))
    parameters = [weight(model).requires_grad_(), *component.prepare(model)]
    component.activate()
    before = score(model)
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    for step in range(40):
        component.advance(step / 40)
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    component.advance(1.0)
    after = score(model)
    component.detach(model)
    attached(model, component.settings)  # k-means of the weights as they are now
    assert after < 0.9 * before
    assert after < score(model)


def test_micro_batches_add_up() -> None:
    """Two halves of a batch give the gradients of the whole: 1e-4 of the largest, for sums in another order."""
    model = model_named()
    own = (component := DkmComponent(SETTINGS)).prepare(model)
    component.activate()
    ids = torch.cat([IDS, IDS.flip(0)[:1]])
    grads = []
    for parts in ([ids], ids.split(2)):
        model.zero_grad()
        for part in parts:
            (loss(model, part) / len(parts)).backward()
        grads.append([p.grad.clone() for p in (*own, weight(model))])
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-4 * float(one.abs().max()))


# --- on and off -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_off_and_detached_it_is_the_plain_model(name: str) -> None:
    model = model_named(name).eval()
    names, state = [n for n, _ in model.named_parameters()], copy.deepcopy(model.state_dict())
    with torch.no_grad():
        plain = model(IDS).logits
        component = attached(model, active=False)
        assert component.table_name in names and weight(model) is dict(model.named_parameters())[component.table_name]
        assert torch.equal(model(IDS).logits, plain)
        component.activate()
        assert not torch.allclose(model(IDS).logits, plain, atol=1e-2)
        component.deactivate()
        assert not component.active and torch.equal(model(IDS).logits, plain)
        component.activate()
        component.detach(model)
        assert torch.equal(model(IDS).logits, plain)
    assert [n for n, _ in model.named_parameters()] == names
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()
    component = attached(model)  # and again
    component.detach(model)


def test_a_tied_head_reads_the_weights() -> None:
    """The head of one model has codes in its lookups only; to the bit the product of its hidden states and weights."""
    model = model_named("tied").eval()
    attached(model)
    assert model.lm_head.weight is weight(model)
    with torch.no_grad():
        hidden = model.model(IDS, use_cache=False).last_hidden_state
        assert torch.equal(model(IDS, use_cache=False).logits, hidden @ weight(model).T)


def test_switched_off_for_a_measurement_it_goes_on_where_it_was() -> None:
    model = model_named()
    component = attached(model)
    component.advance(0.25)
    with torch.no_grad():
        soft(model).codebook.normal_(std=0.1)
    before = component.table()
    component.activate()  # it is on
    component.deactivate()
    component.advance(0.3)
    component.activate()
    assert torch.equal(component.table().codebook, before.codebook)
    component.deactivate()
    with torch.no_grad():
        weight(model).mul_(1.001)
    component.activate()
    assert not soft(model).codebook.any()  # clusters of what the weights are now


def test_the_temperature_falls_from_the_start_to_the_end() -> None:
    """By the same factor for the same share of what was left of the run when clusters began."""
    model = model_named()
    component = attached(model, DkmSettings(bits=(4, 2), cluster_dim=4, temperatures=(1.0, 0.01)), active=False)
    component.advance(0.5)
    component.activate()
    seen = []
    for progress in (0.5, 0.75, 1.0):
        component.advance(progress)
        seen.append(soft(model).temperature)
    assert seen == pytest.approx([1.0, 0.1, 0.01])
    component.advance(0.8)
    component.tighten()
    assert soft(model).temperature == 1.0
    component.advance(0.9)
    assert soft(model).temperature == pytest.approx(0.1)


def test_stages() -> None:
    model = model_named()
    component = attached(model, DkmSettings(bits=(6, 4, 2), cluster_dim=2))
    parameters = list(soft(model).parameters())
    sizes, errors = [], []
    for _ in range(3):
        facts = component.facts()
        sizes.append(facts.settings["bits"])
        errors.append(facts.error)
        assert component.table().format == CodebookFormat(sizes[-1], 2)
        assert component.recipe_changes()["embedding"].bits == sizes[-1]
        loss(model).backward()
        moved = component.tighten()
    assert sizes == [6, 4, 2] and not moved and errors == sorted(errors)
    assert component.relax() and component.facts().settings["bits"] == 4
    assert component.relax() and not component.relax()
    assert all(a is b for a, b in zip(parameters, soft(model).parameters(), strict=True))


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_facts_count_everything(name: str) -> None:
    """A head that is tied keeps its weights, so the model becomes larger; the error is that of the stored rows."""
    model = model_named(name)
    total = 4 * sum(p.numel() for p in model.parameters())
    component = attached(model, active=False)
    assert component.facts().ratio == 1.0 and component.facts().error == 0.0
    component.activate()
    facts, stored = component.facts(), component.table()
    left = total if name == "tied" else total - 4 * weight(model).numel()
    assert facts.ratio == pytest.approx(total / (left + stored.nbytes))
    assert (facts.ratio < 1) == (name == "tied") == facts.settings["tied"]
    table = weight(model).detach()
    expected = (stored.decode() - table).square().sum() / table.square().sum()
    assert facts.error == pytest.approx(float(expected), rel=1e-4)
    assert facts.settings["table_ratio"] == pytest.approx(4 * weight(model).numel() / stored.nbytes)


# --- state ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("active", [True, False])
def test_a_restored_component_goes_on_exactly(active: bool) -> None:
    """State in the midst of a stage, into a new model with the same weights and parameters: the same rows, warm and
    hard, now and later, to the bit."""
    settings = DkmSettings(bits=(5, 3), cluster_dim=2)
    model = model_named()
    component = attached(model, settings)
    component.advance(0.2)
    component.tighten()
    component.advance(0.4)
    with torch.no_grad():
        for parameter in soft(model).parameters():
            parameter.normal_(std=0.05)
    if not active:
        component.deactivate()
    tensors, values = component.state()
    other = model_named()
    second = attached(other, settings, active=False)
    other.load_state_dict(model.state_dict())
    second.restore(tensors, values)
    assert second.active == active and second.state()[1] == values
    for progress in (0.4, 0.7):
        for one in (component, second):
            one.advance(progress)
            one.activate()
        assert soft(other).codebook.any()  # not clustered anew
        rows = [soft(m).lookup(weight(m), IDS) for m in (model, other)]
        assert torch.equal(*rows)
        assert torch.equal(loss(model), loss(other))
    tables = [one.table() for one in (component, second)]
    assert all(torch.equal(value, tables[1].tensors[key]) for key, value in tables[0].tensors.items())


@pytest.mark.parametrize(
    ("tensors", "values"),
    [
        ({"start_offset": torch.zeros(3)}, {}),
        ({"start_other": torch.zeros(64)}, {}),
        ({}, {"stage": 1}),
        ({}, {"stage": True}),
        ({}, {"unit": "1.0"}),
        ({}, {"error": float("nan")}),
        ({}, {"progress": None}),
    ],
)
def test_a_state_that_does_not_fit_is_refused(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    model = model_named()
    component = attached(model)
    own, facts = component.state()
    component.restore(own, facts)
    with pytest.raises(ModelError, match="does not fit"):
        component.restore({**own, **tensors}, {**facts, **values})


def test_a_copy_of_the_model_has_codes_of_its_own() -> None:
    model = model_named().eval()
    attached(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        weight(other).zero_()
        soft(other).active = False
        assert not other.get_input_embeddings()(IDS).any()
        assert model.get_input_embeddings()(IDS).any()


# --- compilers, processes, others that change the table ---------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler's own looking around
def test_compiled_code_follows_the_switch() -> None:
    """The model as compiled (graphs only, no code is made) gives what the model gives: on, off, on again; gradients."""
    model = model_named()
    component = attached(model, active=False)
    compiled = torch.compile(model, backend="eager")
    seen = []
    for active in (False, True, False, True):
        (component.activate if active else component.deactivate)()
        model.zero_grad()
        value = loss(compiled)
        assert value.item() == pytest.approx(loss(model).item(), rel=1e-6)
        value.backward()
        assert (soft(model).codebook.grad is not None) == active
        seen.append(value.item())
    assert seen[0] == seen[2] != seen[1] == seen[3]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_under_ddp_every_parameter_has_a_gradient() -> None:
    """DDP refuses a second step in which one has none: on, off and in micro-batches."""
    model = model_named()
    component = attached(model, active=False)
    parallel = nn.parallel.DistributedDataParallel(model)
    for active in (False, False, True, True, False):
        (component.activate if active else component.deactivate)()
        with parallel.no_sync():
            loss(parallel).backward()
        loss(parallel).backward()
        assert all(p.grad is not None for p in model.parameters())
        assert bool(soft(model).codebook.grad.any()) == active
        model.zero_grad()


def test_clusters_are_of_the_weights_behind_a_rounding() -> None:
    """A table that something else stands in for: lookups are ours, a head tied to it reads what stands in."""

    class Rounded(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return (4 * w).round() / 4

    model = model_named("tied").eval()
    for module in (model.get_input_embeddings(), model.lm_head):
        parametrize.register_parametrization(module, "weight", Rounded())
    latent = model.get_input_embeddings().parametrizations.weight.original
    component = attached(model)
    expected = fit_codebook(latent.detach(), CodebookFormat(4, 4), FitSettings(channel_gain=False))
    near = component.table().decode() - expected.decode()
    assert near.square().mean() < 0.02 * latent.var()
    assert torch.equal(model.get_input_embeddings()(IDS), component.table().rows(IDS))
    for module in (model.get_input_embeddings(), model.lm_head):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    assert torch.equal(model.get_input_embeddings()(IDS), component.table().rows(IDS))
    component.detach(model)
    assert weight(model) is latent and model.lm_head.weight is latent


# --- refusals ---------------------------------------------------------------------------------------------------------
def test_models_that_it_cannot_train() -> None:
    with pytest.raises(ConfigError, match="NanoDecoder has none"):
        DkmComponent(SETTINGS).prepare(NanoDecoder(width=32))
    model = model_named()
    model.get_input_embeddings().max_norm = 1.0
    with pytest.raises(ConfigError, match="changes its table"):
        DkmComponent(SETTINGS).prepare(model)
    model = model_named()
    attached(model)
    with pytest.raises(ConfigError, match="is stood in for"):
        DkmComponent(SETTINGS).prepare(model)
    narrow = build(case_named("llama", hidden_size=20, head_dim=16))
    with pytest.raises(ConfigError, match="rows of 20 weights are not a multiple of dim, which is 8"):
        DkmComponent(DkmSettings(cluster_dim=8)).prepare(narrow)


def test_a_module_that_looks_up_twice() -> None:
    class Twice(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + super().forward(ids)

    model = model_named("untied")
    twice = Twice(VOCAB, 64)
    model.set_input_embeddings(twice)
    attached(model)
    with pytest.raises(UsageError, match="looks its tokens up 2 times"):
        model(IDS)


def test_before_and_after() -> None:
    component = DkmComponent(SETTINGS)
    with pytest.raises(UsageError, match="attached to no model"):
        component.activate()
    model = model_named()
    component.prepare(model)
    with pytest.raises(UsageError, match="no clusters yet"):
        component.table()
    component.detach(model)
    with pytest.raises(UsageError, match="attached to no model"):
        component.table()


@pytest.mark.parametrize(
    "settings", [{"bits": ()}, {"bits": (4, 6)}, {"bits": (9,)}, {"temperatures": (0.1, 1.0)}, {"temperatures": (1, 0)}]
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"bits|temperatures"):
        DkmSettings(**settings)
