"""A rewritten Program trains: the loss and every gradient are the model's own, and so are the parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from ryzen_compile.capture import capture
from ryzen_compile.config import find_recipe
from ryzen_compile.errors import UsageError
from ryzen_compile.pipeline import default_passes, run_passes
from ryzen_compile.program import Program
from ryzen_compile.train.module import training_module
from tests.kernels.oracle import nmse
from tests.zoo import CASES, NanoDecoder, build, randomize

IDS = torch.tensor([[5, 17, 42, 8, 91, 3, 7], [60, 5, 17, 1, 2, 88, 9]])
CASE = {case.name: case for case in CASES}


def fused(model: nn.Module) -> Program:
    """All that stands before the cache."""
    passes = default_passes(find_recipe("fp32", logits="all"))
    names = [pass_.name for pass_ in passes]
    program, _ = run_passes(capture(model), passes[: names.index("insert_kv_cache")])
    return program


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "qwen3", "gpt_oss"])
def test_gradients_are_the_models_own(name):
    model = build(CASE[name])
    want = loss_of(model(IDS).logits)
    want.backward()
    expected = gradients(model)
    model.zero_grad()
    module = training_module(fused(model))
    assert any("ryzen" in str(node.target) for node in module.graph.nodes)
    got = loss_of(module(IDS, torch.arange(IDS.shape[1]).expand(IDS.shape)))
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    found = gradients(model)
    assert found.keys() == expected.keys()
    errors = {parameter: nmse(found[parameter], gradient) for parameter, gradient in expected.items()}
    assert max(errors.values()) < 1e-8, max(errors, key=errors.__getitem__)  # float32, through wide random layers


def test_a_step_of_an_optimizer_moves_the_users_model():
    torch.manual_seed(0)
    model = NanoDecoder()
    randomize(model)
    program = fused(model)
    module = training_module(program)
    assert {id(p) for p in module.parameters()} == {id(p) for p in model.parameters()}, "tied weights once"
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    positions = torch.arange(IDS.shape[1]).expand(IDS.shape)
    first = loss_of(module(IDS, positions))
    first.backward()
    optimizer.step()
    assert loss_of(model(IDS)) < first


def test_a_cache_is_refused():
    program, _ = run_passes(capture(build(CASE["llama"])), default_passes(find_recipe("fp32")))
    with pytest.raises(UsageError, match="the Program has a key/value cache; train what the passes before"):
        training_module(program)
