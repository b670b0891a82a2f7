"""What a run remembers: gathered, put into a run that begins anew, and going on is exact."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ryzen_compile.errors import ModelError
from ryzen_compile.train.config import OptimizationSettings
from ryzen_compile.train.distributed import fill, gathered
from ryzen_compile.train.optimizer import hidden_matrices, make_optimizers
from ryzen_compile.train.run_state import (
    RNG,
    component_states,
    model_tensors,
    optimizer_tensors,
    parameter_names,
    random_state,
    restore_components,
    restore_model,
    restore_optimizers,
    restore_random_state,
)
from tests.zoo import VOCAB, NanoDecoder

ROWS = torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(2))


class Part:
    """A component as far as a snapshot is concerned: it is on or off, has a parameter, a buffer and a fact."""

    def __init__(self, name: str) -> None:
        self.name, self.active, self.fact = name, False, 0
        self.own, self.buffer = nn.Parameter(torch.ones(3)), torch.zeros(2)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"buffer": self.buffer}, {"fact": self.fact}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.buffer, self.fact = tensors["buffer"].clone(), values["fact"]


class Run:
    """A tied decoder of 8 channels, its optimizers over model and component, and a step of them."""

    def __init__(self, optimizer: str = "muon", seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model: Any = NanoDecoder(width=8, heads=2)
        self.part = Part("dkm")
        settings = OptimizationSettings(optimizer=optimizer, lr=0.01, steps=1)  # type: ignore[arg-type]
        self.optimizers = make_optimizers(
            self.model, hidden_matrices(self.model), [self.part.own], settings, fused=False
        )
        self.names = parameter_names(self.model, [("dkm", [self.part.own])])
        self.extra = {"dkm.0": self.part.own}

    def step(self) -> None:
        logits = self.model(ROWS[:, :-1]) * self.part.own.sum() + torch.rand(())
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), ROWS[:, 1:].flatten()).backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        return {**model_tensors(self.model, self.extra), **optimizer_tensors(self.optimizers, self.names)[0]}


def snapshot(run: Run) -> dict[str, Any]:
    """A deep copy, as a file would be."""
    tensors, values = optimizer_tensors(run.optimizers, run.names)
    return copy.deepcopy(
        {"model": model_tensors(run.model, run.extra), "tensors": tensors, "values": values, "random": random_state()}
    )


def put_back(run: Run, kept: dict[str, Any]) -> None:
    restore_model(run.model, run.extra, kept["model"])
    restore_optimizers(run.optimizers, run.names, kept["tensors"], kept["values"])
    restore_random_state(kept["random"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_going_on_is_exact(optimizer: str) -> None:
    """Three steps, a snapshot, three more: bit for bit those of a fresh run into which the snapshot is put."""
    run = Run(optimizer)
    for _ in range(3):
        run.step()
    kept = snapshot(run)
    for _ in range(3):
        run.step()
    again = Run(optimizer, seed=1)
    again_before = again.tensors()
    put_back(again, kept)
    for _ in range(3):
        again.step()
    wanted, found = run.tensors(), again.tensors()
    assert set(found) == set(wanted) > set(again_before)
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_parts_that_are_not_put_back_make_another_run() -> None:
    """Negative controls: without the optimizers' state, and without the generator's, the weights differ."""
    run = Run()
    run.step()
    kept = snapshot(run)
    run.step()
    run.step()
    wanted = run.tensors()["model.head.weight"]
    without_optimizers = Run(seed=1)
    restore_model(without_optimizers.model, without_optimizers.extra, kept["model"])
    restore_random_state(kept["random"])
    without_random = Run(seed=1)
    put_back(without_random, kept)
    torch.manual_seed(77)
    for each in (without_random, without_optimizers):
        each.step()
        each.step()
    assert not torch.equal(without_optimizers.tensors()["model.head.weight"], wanted)
    assert kept["random"][RNG].dtype == torch.uint8


def test_names_are_the_models_and_the_components() -> None:
    run = Run()
    assert run.names[id(run.model.wte.weight)] == "model.wte.weight"  # tied to the head: its first name
    assert run.names[id(run.part.own)] == "dkm.0"
    assert len(run.names) == len(list(run.model.parameters())) + 1
    again = parameter_names(run.model, [("qat", [run.model.wte.weight]), ("dkm", [run.part.own, nn.Parameter()])])
    assert set(again.values()) - set(run.names.values()) == {"dkm.1"}


def test_states_are_named_after_their_parameters() -> None:
    run = Run("muon")
    run.step()
    tensors, values = optimizer_tensors(run.optimizers, run.names)
    assert "0/model.blocks.0.qkv.weight/momentum_buffer" in tensors
    assert {"1/model.norm.weight/exp_avg", "1/model.norm.weight/exp_avg_sq", "1/dkm.0/step"} <= set(tensors)
    assert all(not isinstance(value, Tensor) for value in values.values())
    assert not any(value.requires_grad for value in tensors.values())


def test_the_order_of_groups_does_not_matter() -> None:
    """Parameters listed in reverse take the same states."""
    run = Run("adamw")
    run.step()
    kept = snapshot(run)
    again = Run("adamw", seed=1)
    for group in again.optimizers[0].param_groups:
        group["params"].reverse()
    put_back(again, kept)
    found = again.tensors()
    assert all(torch.equal(value, found[name]) for name, value in run.tensors().items())


def test_putting_back_copies() -> None:
    """A snapshot can be used twice: training on does not write into it."""
    run = Run()
    run.step()
    kept = snapshot(run)
    first = copy.deepcopy(kept)
    put_back(run, kept)
    run.step()
    for part in ("model", "tensors"):
        assert all(torch.equal(value, first[part][name]) for name, value in kept[part].items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"1 tensor\(s\) missing \('model.norm.weight'\), 0 unknown$"),
        (lambda t: t.update({"model.lora": torch.ones(1)}), r"0 tensor\(s\) missing, 1 unknown \('model.lora'\)"),
        (lambda t: t.pop("dkm.0"), r"missing \('dkm.0'\)"),
        (lambda t: t.update({"model.norm.weight": torch.ones(9)}), r"'model.norm.weight' .* expected \(8,\)"),
    ],
    ids=["missing", "unknown", "the component's", "shape"],
)
def test_snapshots_of_another_model(change: Any, message: str) -> None:
    run = Run()
    kept = snapshot(run)
    change(kept["model"])
    with pytest.raises(ModelError, match=message.removesuffix("$")):
        restore_model(run.model, run.extra, kept["model"])


@pytest.mark.parametrize("name", ["0/model.other.weight/exp_avg", "7/model.wte.weight/exp_avg", "nonsense"])
def test_states_of_what_is_not_trained(name: str) -> None:
    run = Run("adamw")
    with pytest.raises(ModelError, match="which is not trained here"):
        restore_optimizers(run.optimizers, run.names, {name: torch.ones(1)}, {})
    with pytest.raises(ModelError, match="which is not trained here"):
        restore_optimizers(run.optimizers, run.names, {}, {name: 3})


def test_a_state_of_another_shape() -> None:
    """It would be broadcast, or fail in the next step without a name."""
    run = Run("adamw")
    run.step()
    kept = snapshot(run)
    kept["tensors"]["0/model.wte.weight/exp_avg"] = torch.ones(VOCAB, 9)
    with pytest.raises(ModelError, match=r"'0/model.wte.weight/exp_avg' .* is \(99, 9\), expected \(99, 8\)"):
        put_back(run, kept)


def test_components() -> None:
    first, second = Part("qat"), Part("dkm")
    second.active, second.fact, second.buffer = True, 5, torch.tensor([1.0, 2.0])
    tensors, values = copy.deepcopy(component_states([first, second]))
    assert set(tensors) == {"qat/buffer", "dkm/buffer"}
    assert values["dkm"] == {"active": True, "values": {"fact": 5}} and not values["qat"]["active"]
    fresh = [Part("qat"), Part("dkm")]
    restore_components(fresh, tensors, values)
    assert fresh[1].fact == 5 and torch.equal(fresh[1].buffer, second.buffer) and fresh[0].fact == 0
    with pytest.raises(ModelError, match="knows nothing of the component 'lora'"):
        restore_components([Part("lora")], tensors, values)


def test_plain_tensors_need_no_gathering() -> None:
    leaf = nn.Parameter(torch.arange(3.0))
    whole = gathered(leaf)
    assert whole.data_ptr() == leaf.data_ptr() and not whole.requires_grad
    fill(leaf, torch.tensor([5.0, 6.0, 7.0]))
    assert leaf.tolist() == [5, 6, 7] and leaf.requires_grad
    half = torch.zeros(2, dtype=torch.bfloat16)
    fill(half, torch.tensor([1.0, 3.0]))
    assert half.tolist() == [1, 3] and half.dtype == torch.bfloat16


def test_sharded_tensors_go_whole_and_come_back() -> None:
    """A mesh of one process, which DTensor handles as it does one of many."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        values = torch.arange(12.0).reshape(4, 3)
        target = distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)])
        fill(target, values)
        assert isinstance(target, DTensor)
        found = gathered(target)
        assert not isinstance(found, DTensor) and torch.equal(found, values)
    finally:
        distributed.destroy_process_group()
