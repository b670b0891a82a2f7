"""Low-rank updates: what is trained, what is not, and that the merged model is a plain one again."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ryzen_compile.errors import ConfigError, ModelError
from ryzen_compile.train.config import LoraSettings
from ryzen_compile.train.lora import LoraComponent, _chosen
from tests.model_directory import case_named
from tests.zoo import VOCAB, NanoDecoder, build

pytest.importorskip("peft")
IDS = torch.randint(3, VOCAB, (3, 21), generator=torch.Generator().manual_seed(3))


def decoder() -> nn.Module:
    torch.manual_seed(0)
    return NanoDecoder(width=32, layers=1)


def conv_decoder() -> nn.Module:
    return build(case_named("gpt2", n_layer=1, num_hidden_layers=1))


def prepared(model: nn.Module, settings: LoraSettings | None = None) -> tuple[LoraComponent, list[nn.Parameter]]:
    component = LoraComponent(settings or LoraSettings(rank=4, alpha=8))
    return component, component.prepare(model)


def logits(model: nn.Module) -> Tensor:
    result = model(IDS)
    return getattr(result, "logits", result)


def train(model: nn.Module, parameters: list[nn.Parameter], steps: int = 20) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = functional.cross_entropy(logits(model)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("make", [decoder, conv_decoder], ids=["linears", "transposed weights"])
def test_trained_and_merged(make: Callable[[], nn.Module]) -> None:
    """The loss falls while nothing but the updates moves; merged, names, classes and identities are those of before,
    and the logits the trained ones to float32 rounding (1e-4)."""
    model = make()
    names = dict(model.named_parameters(remove_duplicate=False))
    before = {name: p.detach().clone() for name, p in names.items()}
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        plain = logits(model)
    component, own = prepared(model)
    assert len(own) == 8 and {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in own}
    component.activate()
    with torch.no_grad():
        assert torch.equal(logits(model), plain)  # an update begins at zero
    losses = train(model, own)
    assert losses[-1] < 0.8 * losses[0]
    for p in names.values():
        assert p.grad is None
    with torch.no_grad():
        want = logits(model)
        component.deactivate()
        assert torch.equal(logits(model), plain)
        component.activate()
        assert torch.equal(logits(model), want)
    component.detach(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert set(after) == set(names) and all(after[name] is names[name] for name in names)
    assert [type(module) for module in model.modules()] == classes
    assert all(p.requires_grad for p in after.values()) and not hasattr(model, "peft_config")
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert len(moved) == 4 and all(name.endswith("weight") for name in moved)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)


def test_copies_compiled_and_off() -> None:
    """A copy is merged while training goes on. Off, nothing is trained and nothing merged, but a step can be made:
    gradients are there, and zero."""
    model = decoder()
    before = copy.deepcopy(model.state_dict())
    component, own = prepared(model)
    component.activate()
    train(model, own, 5)
    twin = copy.deepcopy(model)
    component.detach(twin)
    assert set(twin.state_dict()) == set(before)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        on = logits(model)
        torch.testing.assert_close(logits(twin), on, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled(IDS), on)
    component.deactivate()
    model.zero_grad()
    off = logits(model)
    off.square().mean().backward()
    assert all(p.grad is not None and not p.grad.any() for p in own)
    with torch.no_grad():
        assert not torch.equal(off, on)
        torch.testing.assert_close(compiled(IDS), off)
    component.detach(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch._dynamo.reset()


def test_targets_choose_layers() -> None:
    model = decoder()
    model.norm.weight.requires_grad_(False)
    component, own = prepared(model, LoraSettings(rank=3, targets=("qkv$", r"^blocks\.0\.up")))
    names = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"blocks.0.qkv", "blocks.0.up"}
    assert sorted(tuple(p.shape) for p in own) == sorted([(3, 32), (96, 3), (3, 32), (128, 3)])
    component.detach(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["norm.weight"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("qkv", "q_proj"), "target 'q_proj' matches none of 2 linear layers"),
        (("(",), "not a regular expression"),
        ((), "expected targets, got none"),
    ],
    ids=["unknown", "broken", "empty"],
)
def test_targets_that_choose_none(targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _chosen(["blocks.0.qkv", "blocks.0.up"], targets)


def test_the_head_is_no_target() -> None:
    model = decoder()
    with pytest.raises(ConfigError, match="target 'head' matches none of 4"):
        prepared(model, LoraSettings(targets=("head",)))
    assert set(model.state_dict()) == set(decoder().state_dict())


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs the package peft; pip install 'ryzen-compile\[train\]'"):
        prepared(decoder())


def test_facts_and_state() -> None:
    model = decoder()
    weights = sum(p.numel() for p in model.parameters())
    component, own = prepared(model)
    facts = component.facts()
    trained = sum(p.numel() for p in own) / weights
    assert (facts.ratio, facts.error) == (1.0, 0.0)
    assert facts.settings == {"rank": 4, "alpha": 8.0, "layers": 4, "trained": trained}
    assert not component.tighten() and not component.relax() and component.recipe_changes() == {}
    component.activate()
    state = copy.deepcopy(model.state_dict())
    again = decoder()
    other, _ = prepared(again)
    again.load_state_dict(state)
    other.restore(*component.state())
    assert other.active
    with torch.no_grad():
        assert torch.equal(logits(again), logits(model))
    with pytest.raises(ModelError, match="expected whether it is active"):
        other.restore({}, {"active": 1})
