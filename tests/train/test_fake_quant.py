"""Weights that the forward pass reads rounded: the export's values to the bit, and the plain model when off."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from ryzen_compile.api import rewrite
from ryzen_compile.backends.eager import EagerBackend
from ryzen_compile.config import Recipe
from ryzen_compile.errors import ConfigError, ModelError, UnsupportedError, UsageError
from ryzen_compile.numerics.blockwise import BITS, BLOCKS, BlockFormat, BlockTensor
from ryzen_compile.numerics.search.rtn import round_to_nearest
from ryzen_compile.program import Program
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.train.config import QatSettings
from ryzen_compile.train.fake_quant import QatComponent, fake_quantize, stored_bytes
from tests.model_directory import case_named
from tests.zoo import VOCAB, NanoDecoder, build

IDS = torch.randint(3, VOCAB, (3, 21), generator=torch.Generator().manual_seed(3))
# The models, and the settings that each is exported with.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama tied": ("llama", {"num_hidden_layers": 1, "tie_word_embeddings": True}, "2 bits"),
    "llama": ("llama", {"num_hidden_layers": 1, "tie_word_embeddings": False}, "4 bits"),
    "transposed weights": ("gpt2", {"n_layer": 1, "num_hidden_layers": 1}, "zero points"),
    "router without a linear": ("mixtral", {"num_hidden_layers": 1, "num_local_experts": 2}, "wide blocks"),
}
SETTINGS = {
    "4 bits": QatSettings(bits=(4,), block=32),
    "zero points": QatSettings(bits=(3,), block=16, symmetric=False, head_bits=None),
    "wide blocks": QatSettings(bits=(8,), block=256, head_bits=4),
    "2 bits": QatSettings(bits=(2,), block=64, symmetric=False, head_bits=8),
}


def model_named(name: str) -> nn.Module:
    kind, changes, _ = MODELS[name]
    return build(case_named(kind, **changes))


def prepared(model: nn.Module, given: QatSettings | None = None) -> QatComponent:
    component = QatComponent(given or SETTINGS["4 bits"])
    assert component.prepare(model) == []
    return component


NANO = QatSettings(bits=(8, 4, 2), block=16, symmetric=False)


@pytest.fixture(scope="module")
def attached() -> tuple[nn.Module, QatComponent]:
    torch.manual_seed(0)
    model = NanoDecoder(width=32, layers=1)
    return model, prepared(model, NANO)


@pytest.fixture
def nano(attached: tuple[nn.Module, QatComponent]) -> Iterator[tuple[nn.Module, QatComponent]]:
    """A small decoder with its component, off; afterwards as it was."""
    model, component = attached
    before = copy.deepcopy(model.state_dict())
    yield model, component
    model.load_state_dict(before)
    model.zero_grad()
    component.restore({}, {"stage": 0, "active": False})


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    result = model(ids)
    return getattr(result, "logits", result)


def recipe_of(component: QatComponent) -> Recipe:
    return Recipe(name="qat", logits="all", **component.recipe_changes())


def stored_values(program: Program) -> dict[str, Tensor]:
    """Name of the codes -> the float32 values that they stand for."""
    found = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and "nbits" in str(node.target):
            codes, scales, zeros = (None if a is None else program.weights[a.name] for a in node.args[1:4])
            lookup = "embedding" in str(node.target)
            width, bits, block = node.args[4:7] if lookup else (node.args[0].meta["val"].shape[-1], *node.args[5:7])
            name = program.weight_names[node.args[1].name]
            found[name] = BlockTensor.stored(codes, scales, zeros, bits, block, width).dequantize()
    return found


def row_bytes(row: Tensor) -> bytes:
    """Zeros of either sign are one value."""
    return (row + 0.0).numpy().tobytes()


def nmse(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).square().sum() / want.double().square().sum())


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    block=st.sampled_from(BLOCKS),
    symmetric=st.booleans(),
    rows=st.integers(1, 5),
    width=st.integers(1, 300),
    kind=st.sampled_from(["normal", "zeros", "one value", "coarse", "tiny", "huge", "positive"]),
    seed=st.integers(0, 99),
)
def test_rounds_as_the_export_to_the_bit(bits, block, symmetric, rows, width, kind, seed) -> None:
    w = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    w = {
        "normal": w,
        "zeros": torch.zeros_like(w),
        "one value": torch.where(w > 0, 0.3, 0.0),
        "coarse": (2 * w).round() / 2,  # ties, and blocks whose ends are equally far from zero
        "tiny": w * 1e-38,
        "huge": w.clamp(-3, 3) * 1e38,
        "positive": w.abs() + 1,
    }[kind]
    form = BlockFormat(bits, block, symmetric)
    tensor = round_to_nearest(w, form)
    assert torch.equal(fake_quantize(w, form), tensor.dequantize())
    assert stored_bytes(rows, width, form) == tensor.nbytes


def test_rounding_many_rows_part_by_part_and_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    w, form = torch.randn(70, 33, generator=torch.Generator().manual_seed(0)), BlockFormat(4, 16, False)
    want = round_to_nearest(w, form).dequantize()
    monkeypatch.setattr("ryzen_compile.numerics.blockwise.CHUNK_ELEMENTS", 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fake_quantize(w, form)
    assert got.dtype == torch.float32 and torch.equal(got, want)
    assert fake_quantize(w[:0], form).shape == (0, 33)
    w[3, 20] = torch.nan
    assert torch.equal(fake_quantize(w, form).isnan().nonzero(), torch.tensor([[3, c] for c in range(16, 32)]))


@pytest.mark.parametrize("name", MODELS)
def test_the_export_is_what_was_trained(name: str) -> None:
    """Every matrix of the export, merged ones too, consists of what the model's modules read, whole and to the bit, and
    none is left over. Its predictions are those of the model in training to float32 rounding, NMSE 1e-10, where the
    unrounded model is at 1e-6 or more; with the gate on, nothing is rolled back."""
    model = model_named(name)
    component = prepared(model, SETTINGS[MODELS[name][2]])
    component.activate()
    rounded = []
    for matrix, _ in component._rounded:
        read = [getattr(place.module, place.attribute).detach() for place in matrix.places]
        assert all(torch.equal(values, read[0]) for values in read)
        rounded.append(read[0].t() if matrix.transposed else read[0])
    with torch.no_grad():
        want = logits(model)
    component.detach(model)
    with torch.no_grad():
        assert nmse(logits(model), want) > 1e-6
    program, report = rewrite(model, recipe_of(component), backend="eager")
    assert not {"rolled back", "unsupported"} & {record.status for record in report.records}
    where = {row_bytes(row): (i, k) for i, values in enumerate(rounded) for k, row in enumerate(values)}
    seen: list[int] = []
    for key, values in stored_values(program).items():
        found = [where.get(row_bytes(row)) for row in values]
        assert None not in found, key
        parts = list(dict.fromkeys(i for i, _ in found))
        assert found == [(i, k) for i in parts for k in range(len(rounded[i]))], key
        seen += parts
    assert sorted(seen) == list(range(len(rounded)))
    with CompiledModel(EagerBackend().compile(program)) as compiled:
        assert nmse(torch.from_numpy(compiled(IDS.numpy())), want) < 1e-10


def test_attached_and_off_the_model_is_exported_as_ever(nano: tuple[nn.Module, QatComponent]) -> None:
    model, component = nano
    twin = copy.deepcopy(model)
    component.detach(twin)
    found = [stored_values(rewrite(m, recipe_of(component), backend="eager", verify=False)[0]) for m in (model, twin)]
    assert len(found[0]) == len(found[1]) == 5
    for got, want in zip(*(each.values() for each in found), strict=True):
        assert torch.equal(got, want)


def test_the_gradient_is_that_of_the_rounded_weight(nano: tuple[nn.Module, QatComponent]) -> None:
    """Of a tied table, both of its readers': the same as of the model whose weights were replaced by rounded ones."""
    model, component = nano
    plain = copy.deepcopy(model)
    component.detach(plain)
    component.activate()
    with torch.no_grad():
        for matrix, rounding in component._rounded:
            plain.get_parameter(matrix.name).copy_(rounding.rounded(matrix.tensor))
    for each in (model, plain):
        loss_of(each).backward()
    want = {name: parameter.grad for name, parameter in plain.named_parameters()}
    got = {name.replace("parametrizations.weight.original", "weight"): p.grad for name, p in model.named_parameters()}
    assert set(got) == set(want)
    for name, gradient in got.items():
        assert gradient is not None and torch.equal(gradient, want[name]), name


def test_off_on_and_off_again() -> None:
    """Detaching leaves names, classes, the tie, the very parameters; of a copy as well, while the model goes on."""
    model = model_named("llama tied")
    names = dict(model.named_parameters(remove_duplicate=False))
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        before = logits(model)
        component = prepared(model)
        assert not component.active and torch.equal(logits(model), before)
        assert {id(p) for p in model.parameters()} == {id(p) for p in names.values()}
        component.activate()
        rounded = logits(model)
        assert component.active and nmse(rounded, before) > 1e-4
        component.deactivate()
        assert torch.equal(logits(model), before)
        component.activate()
        twin = copy.deepcopy(model)
        component.detach(twin)
        assert torch.equal(logits(model), rounded) and torch.equal(logits(twin), before)
    assert set(twin.state_dict()) == set(names)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight is not model.lm_head.weight
    component.detach(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert set(after) == set(names) and all(after[name] is names[name] for name in names)
    assert [type(module) for module in model.modules()] == classes
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_without_a_break(nano: tuple[nn.Module, QatComponent], backend: str) -> None:
    """Off, on, at another stage: the same logits to the bit, gradients to float32 rounding."""
    model, component = nano
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    seen = []
    for change in (lambda: None, component.activate, component.tighten, component.deactivate):
        change()
        found = []
        for each in (model, compiled):
            model.zero_grad()
            out = each(IDS)
            out.square().mean().backward()
            found.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
        assert torch.equal(found[0][0], found[1][0])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(theirs, mine)
        seen.append(found[1][0])
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    torch._dynamo.reset()


def test_under_autocast_the_float32_weight_is_rounded(nano: tuple[nn.Module, QatComponent]) -> None:
    model, component = nano
    component.activate()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = model.blocks[0].up.weight
        model(IDS).float().square().mean().backward()
    (form,) = [r.form for m, r in component._rounded if m.name == "blocks.0.up.weight"]
    latent = model.blocks[0].up.parametrizations.weight.original
    assert torch.equal(weight, fake_quantize(latent, form)) and latent.grad.dtype == torch.float32


def loss_of(model: nn.Module) -> Tensor:
    return functional.cross_entropy(logits(model, IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())


def test_training_with_rounding_beats_rounding_afterwards(nano: tuple[nn.Module, QatComponent]) -> None:
    """One text by heart in 2 bits, the same steps: with rounding in the loop less than two thirds of the loss."""
    model, component = nano
    before = copy.deepcopy(model.state_dict())
    losses = []
    for aware in (False, True):
        model.load_state_dict(before)
        component.restore({}, {"stage": 2, "active": aware})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
        component.activate()
        with torch.no_grad():
            losses.append(float(loss_of(model)))
    assert losses[1] < losses[0] * 2 / 3 and losses[0] < 1


def test_stages_and_facts(nano: tuple[nn.Module, QatComponent]) -> None:
    """The ratio is that of the export's own tensors; the error grows as bits get fewer."""
    model, component = nano
    total = 4 * sum(p.numel() for p in model.parameters())
    found = []
    for bits in NANO.bits:
        facts = component.facts()
        stored, square, error = total, 0.0, 0.0
        for matrix, rounding in component._rounded:
            tensor = round_to_nearest(matrix.rows, rounding.form)
            stored += tensor.nbytes - 4 * matrix.rows.numel()
            error += float((tensor.dequantize() - matrix.rows).double().square().sum())
            square += float(matrix.rows.double().square().sum())
            assert rounding.form.bits == (8 if matrix.target.is_head else bits)
        assert facts.ratio == pytest.approx(total / stored) and facts.error == pytest.approx(error / square)
        assert facts.settings == {"bits": bits, "block": 16, "symmetric": False, "head_bits": 8}
        weights = component.recipe_changes()["weights"]
        assert (weights.bits, weights.block, weights.symmetric, weights.method) == (bits, 16, False, "rtn")
        found.append(facts)
        assert component.tighten() == (bits > 2)
    assert found[0].error < found[1].error < found[2].error < 1 and found[0].ratio < found[2].ratio
    assert component.relax() and component.facts() == found[1]
    assert component.relax() and not component.relax()
    assert component.facts() == found[0]


def test_state_comes_back(nano: tuple[nn.Module, QatComponent]) -> None:
    model, component = nano
    component.activate()
    component.tighten()
    other = NanoDecoder(width=32, layers=1)
    again = prepared(other, NANO)
    other.load_state_dict(model.state_dict())
    again.restore(*component.state())
    assert again.active and again.state() == component.state() == ({}, {"stage": 1, "active": True})
    with torch.no_grad():
        assert torch.equal(logits(other), logits(model))


def test_a_state_of_other_settings_is_refused(nano: tuple[nn.Module, QatComponent]) -> None:
    _, component = nano
    before = component.state()
    for stage in (None, 3, -1, True, "0"):
        with pytest.raises(ModelError, match="the settings have 3"):
            component.restore({}, {"stage": stage, "active": True})
    assert component.state() == before


class Sliced(nn.Module):
    """One parameter, of which two products read a part each."""

    def __init__(self) -> None:
        super().__init__()
        self.block_size = 32
        self.wte = nn.Embedding(VOCAB, 16)
        self.both = nn.Parameter(torch.randn(16 + VOCAB, 16))

    def forward(self, ids: Tensor) -> Tensor:
        x = functional.linear(self.wte(ids), self.both[:16]).relu()
        return functional.linear(x, self.both[16:])


class Summed(nn.Module):
    """A table that something else reads as well: the export leaves it as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.block_size = 32
        self.wte = nn.Embedding(VOCAB, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.wte(ids) * self.wte.weight.sum()


def test_models_that_cannot_be_trained_so(nano: tuple[nn.Module, QatComponent]) -> None:
    with pytest.raises(UnsupportedError, match=r"computed from both; expected a parameter"):
        QatComponent(QatSettings()).prepare(Sliced())
    with pytest.raises(ConfigError, match="Summed has no weights"):
        QatComponent(QatSettings()).prepare(Summed())
    with pytest.raises(UsageError, match="already"):
        prepared(nano[0])
