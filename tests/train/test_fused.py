"""The model's body as fused operators: hidden states, losses and gradients are the model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ryzen_compile.errors import UnsupportedError
from ryzen_compile.train.fused import FusedBackbone
from ryzen_compile.train.objective import Levers, Objective
from ryzen_compile.workflow.training import train
from tests.kernels.oracle import nmse
from tests.train.tiny_run import GPT2_WITH_DROPOUT, tiny_config
from tests.zoo import CASES, build

CASE = {case.name: case for case in CASES}
ROWS = torch.tensor([[5, 17, 42, 8, 91, 3, 7, 11], [60, 5, 17, 1, 2, 88, 9, 4]])


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3"])
def test_losses_and_gradients_are_the_models_own(name: str) -> None:
    """NMSE of each gradient below 1e-8: float32, through wide random layers."""
    model = build(CASE[name])
    objective = Objective(model, Levers(linear_cross_entropy=True))
    objective.fuse(torch.device("cpu"))
    objective.train()
    expected = objective(ROWS)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    objective.levers = Levers(linear_cross_entropy=True, operators=True)
    found = objective(ROWS)
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == gradients.keys()
    for name_, parameter in model.named_parameters():
        if name_ in gradients:
            assert nmse(parameter.grad, gradients[name_]) < 1e-8, name_


def test_half_precision_reaches_everything_between_the_parameters() -> None:
    """In bfloat16 the loss stays within 2 % and the master weights' gradients are float32."""
    model = build(CASE["llama"])
    backbone = FusedBackbone(model)
    hidden = backbone(ROWS[:, :-1], torch.bfloat16)
    assert hidden.dtype == torch.bfloat16
    exact = backbone(ROWS[:, :-1], torch.float32)
    assert nmse(hidden.float(), exact) < 1e-3
    hidden.float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_run_with_fused_operators_is_the_run_without(tmp_path: Path) -> None:
    """Losses of six steps agree, relative 1e-4."""
    results = []
    for operators in (False, True):
        directory = tmp_path / str(operators)
        directory.mkdir()
        run = train(tiny_config(directory, precision={"operators": operators}))
        results.append((run.result.train_loss, run.result.validation.loss))
    assert results[1] == pytest.approx(results[0], rel=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "dropout"])
def test_what_a_graph_cannot_hold_is_refused(name: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {key: value for key, value in GPT2_WITH_DROPOUT.items() if key != "model_type"}
    model = build(CASE["gemma2"]) if name == "gemma2" else GPT2LMHeadModel(GPT2Config(vocab_size=99, **settings))
    with pytest.raises(UnsupportedError, match="drops out" if name == "dropout" else "more than a product"):
        FusedBackbone(model)
