"""Linears trained with weights of -1, 0 and +1: the operator's values, straight gradients, and an exact export."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ryzen_compile import ops
from ryzen_compile.api import optimize
from ryzen_compile.backends.onnxruntime import native as operators
from ryzen_compile.config import Recipe
from ryzen_compile.errors import ConfigError, ModelError
from ryzen_compile.numerics import ternary as packing
from ryzen_compile.train.config import TernarySettings
from ryzen_compile.train.ternary import TernaryComponent, round_activations, ternarize
from tests.model_directory import case_named
from tests.zoo import VOCAB, NanoDecoder, build

IDS = torch.randint(3, VOCAB, (3, 21), generator=torch.Generator().manual_seed(3))


def decoder() -> nn.Module:
    torch.manual_seed(0)
    return NanoDecoder(width=32, layers=1)


def conv_decoder() -> nn.Module:
    return build(case_named("gpt2", n_layer=1, num_hidden_layers=1))


def prepared(model: nn.Module) -> TernaryComponent:
    component = TernaryComponent(TernarySettings())
    assert component.prepare(model) == []
    return component


@pytest.fixture(scope="module")
def attached() -> tuple[nn.Module, TernaryComponent]:
    model = decoder()
    return model, prepared(model)


@pytest.fixture
def nano(attached: tuple[nn.Module, TernaryComponent]) -> Iterator[tuple[nn.Module, TernaryComponent]]:
    """A small decoder with its component, off; afterwards as it was."""
    model, component = attached
    before = copy.deepcopy(model.state_dict())
    yield model, component
    model.load_state_dict(before)
    model.zero_grad()
    component.deactivate()


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    result = model(ids)
    return getattr(result, "logits", result)


def nmse(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).square().sum() / want.double().square().sum())


def test_codes_and_scale() -> None:
    w = torch.tensor([[2.0, -0.4, 0.6], [-1.0, 0.0, 2.0]])  # mean |w| = 1
    codes, scale = ternarize(w)
    assert float(scale) == 1 and codes.tolist() == [[1, 0, 1], [-1, 0, 1]]
    codes, scale = ternarize(torch.zeros(2, 3))
    assert float(scale) > 0 and not codes.any()
    x = torch.tensor([[127.0, 0.4, -63.6], [0.0, 0.0, 0.0]])
    assert round_activations(x).tolist() == [[127, 0, -64], [0, 0, 0]]
    assert round_activations(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [decoder, conv_decoder], ids=["linears", "transposed weights"])
def test_a_layer_computes_what_the_operator_does(make: Callable[[], nn.Module]) -> None:
    """NMSE 1e-12, and 1e-28 where both compute in float64; without rounding it is 1e-3 and more away."""
    model = make()
    component = prepared(model)
    component.activate()
    for layer, dtype in itertools.product((layer for layer, _ in component._ternary), (torch.float32, torch.float64)):
        module = copy.deepcopy(layer.module).to(dtype)
        codes, scale = ternarize(layer.weight.rows.to(dtype))
        width = codes.shape[1]
        x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(width), dtype=dtype)
        x[0, 0] = 0
        want = ops.linear_ternary(x, packing.pack(codes), scale)
        want = want if module.bias is None else want + module.bias.to(dtype)
        with torch.no_grad():
            assert nmse(module(x), want) < (1e-12 if dtype == torch.float32 else 1e-28), layer.name
            plain = functional.linear(x, layer.weight.rows.to(dtype), module.bias)
            assert nmse(plain, want) > 1e-3


def test_head_and_table_stay_as_they_are(nano: tuple[nn.Module, TernaryComponent]) -> None:
    model, component = nano
    component.activate()
    names = {layer.name for layer, _ in component._ternary}
    assert names == {f"blocks.0.{name}" for name in ("qkv", "out", "up", "down")}
    assert model.head.weight is model.wte.weight and isinstance(model.wte.weight, nn.Parameter)
    for name in names:
        assert len(model.get_submodule(name).weight.unique()) == 3


def test_gradients_go_straight_through(nano: tuple[nn.Module, TernaryComponent]) -> None:
    """Of weight and input: those of a plain product of the rounded ones."""
    model, component = nano
    component.activate()
    module = model.blocks[0].up
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    module(x).sin().sum().backward()
    latent = module.parametrizations.weight.original
    codes, scale = ternarize(latent.detach())
    rounded = [(codes * scale).requires_grad_(), round_activations(x.detach()).requires_grad_()]
    functional.linear(rounded[1], rounded[0], module.bias).sin().sum().backward()
    assert torch.equal(latent.grad, rounded[0].grad) and torch.equal(x.grad, rounded[1].grad)


def test_off_on_off_and_detached() -> None:
    """Names, classes, parameters and hooks as before, what is on baked; a copy can be detached alone, and while off it
    keeps its weights."""
    model = decoder()
    names = dict(model.named_parameters(remove_duplicate=False))
    classes = [type(module) for module in model.modules()]
    before = {name: p.detach().clone() for name, p in names.items()}
    with torch.no_grad():
        plain = logits(model)
        component = prepared(model)
        layers = {f"{layer.name}.weight" for layer, _ in component._ternary}
        assert torch.equal(logits(model), plain)
        assert {id(p) for p in model.parameters()} == {id(p) for p in names.values()}
        component.activate()
        assert nmse(logits(model), plain) > 1e-3
        component.deactivate()
        assert torch.equal(logits(model), plain)
        twin = copy.deepcopy(model)
        component.detach(twin)
        assert torch.equal(logits(twin), plain)
        component.activate()
        assert nmse(logits(model), plain) > 1e-3
    assert {name for name, _ in twin.named_parameters(remove_duplicate=False)} == set(names)
    component.detach(model)
    for each in (model, twin):
        assert [type(module) for module in each.modules()] == classes
        assert not any(module._forward_pre_hooks for module in each.modules())
    after = dict(model.named_parameters(remove_duplicate=False))
    assert set(after) == set(names) and all(after[name] is names[name] for name in names)
    for name, value in after.items():
        codes, scale = ternarize(before[name])
        assert torch.equal(value, codes * scale if name in layers else before[name]), name


@pytest.mark.parametrize("make", [decoder, conv_decoder], ids=["linears", "transposed weights"])
def test_the_codes_are_found_in_baked_weights(make: Callable[[], nn.Module]) -> None:
    """Scale times code is the baked weight to the bit; the weights before baking are no such product."""
    model = make()
    component = prepared(model)
    assert all(packing.recover(layer.weight.rows) is None for layer, _ in component._ternary)
    component.activate()
    component.detach(model)
    for layer, _ in component._ternary:
        found = packing.recover(layer.weight.rows)
        assert found is not None and found[1].shape == ()
        width = layer.weight.rows.shape[1]
        assert torch.equal(packing.unpack(found[0], width) * found[1], layer.weight.rows)


@pytest.mark.parametrize("native", [False, True], ids=["stock operators", "native operators"])
@pytest.mark.parametrize("make", [decoder, conv_decoder], ids=["linears", "transposed weights"])
def test_the_exported_model_is_the_trained_one(make: Callable[[], nn.Module], native: bool) -> None:
    """Its logits are those of the model in training, by the rule of the gate: no further from float64 than twice what
    float32 costs the model itself, plus 1e-5 of the logits' size.

    Held for the median of many short sequences: an activation that lies between two codes may fall to either side in
    float32, which moves its own sequence, by about a 1/127 of one channel. Without rounding activations all move.
    """
    if native and operators.library() is None:
        pytest.skip(operators.missing()[0])
    model = make()
    component = prepared(model)
    component.activate()
    trained(model, 25)
    ids = torch.randint(3, VOCAB, (32, 3), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        single = logits(model, ids)
        exact = logits(copy.deepcopy(model).double(), ids)
    component.detach(model)
    with torch.no_grad():
        plain = logits(model.eval(), ids)  # baked weights alone, as any other recipe would have them
    recipe = Recipe(name="trained", logits="all", **component.recipe_changes())
    with optimize(model, recipe, native=native) as compiled:
        found = torch.stack([torch.from_numpy(compiled(row[None].numpy()))[0] for row in ids])

    def apart(got: Tensor) -> Tensor:
        return (got.double() - exact).square().mean((1, 2)).sqrt()

    allowed = 2 * float(apart(single).median()) + 1e-5 * float(exact.square().mean().sqrt())
    assert float(apart(found).median()) <= allowed
    assert float(apart(plain).min()) > 10 * allowed
    assert nmse(found, exact) < 0.05 * nmse(plain, exact)


def trained(model: nn.Module, steps: int) -> list[float]:
    """The loss of each step on ``IDS``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = functional.cross_entropy(logits(model)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_compiled_without_a_break(nano: tuple[nn.Module, TernaryComponent]) -> None:
    model, component = nano
    component.activate()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for each in (model, compiled):
        model.zero_grad()
        out = each(IDS)
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, mine)
    torch._dynamo.reset()


def test_training_lowers_the_ternary_loss(nano: tuple[nn.Module, TernaryComponent]) -> None:
    model, component = nano
    component.activate()
    losses = trained(model, 30)
    assert losses[-1] < 0.2 * losses[0]


def test_facts_and_state(nano: tuple[nn.Module, TernaryComponent]) -> None:
    model, component = nano
    total = 4 * sum(p.numel() for p in model.parameters())
    stored, error, square = total, 0.0, 0.0
    for layer, _ in component._ternary:
        codes, scale = ternarize(layer.weight.rows)
        stored += packing.pack(codes).nbytes + scale.nbytes - 4 * codes.numel()
        error += float((codes * scale - layer.weight.rows).double().square().sum())
        square += float(layer.weight.rows.double().square().sum())
    facts = component.facts()
    assert facts.ratio == pytest.approx(total / stored) and facts.ratio > 2
    assert facts.error == pytest.approx(error / square) and 0 < facts.error < 1
    assert not component.tighten() and not component.relax()
    component.activate()
    again = prepared(decoder())
    again.restore(*component.state())
    assert again.active and all(ternary.active for _, ternary in again._ternary)
    with pytest.raises(ModelError, match="expected whether it is active"):
        again.restore({}, {})


def test_a_model_without_linears_is_refused() -> None:
    class Lookups(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block_size = 32
            self.wte = nn.Embedding(VOCAB, 16)
            self.head = nn.Linear(16, VOCAB)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.wte(ids).sin())

    with pytest.raises(ConfigError, match="Lookups has no linear layers beside its head"):
        prepared(Lookups())
