"""Which optimizer moves which parameter, and that each is moved once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from ryzen_compile.errors import ConfigError
from ryzen_compile.train.config import OptimizationSettings
from ryzen_compile.train.optimizer import hidden_matrices, make_optimizers
from tests.model_directory import case_named
from tests.zoo import NanoDecoder, build


def settings(optimizer: str, **changes: Any) -> OptimizationSettings:
    return OptimizationSettings(**{"optimizer": optimizer, "lr": 0.01, "weight_decay": 0.2, "steps": 1, **changes})


def llama(*, tied: bool = True) -> nn.Module:
    return build(case_named("llama", hidden_size=16, intermediate_size=24, tie_word_embeddings=tied))


def names(model: nn.Module, parameters: Iterable[nn.Parameter]) -> set[str]:
    known = {id(p): name for name, p in model.named_parameters()}
    return {known[id(p)] for p in parameters}


def groups(optimizers: Iterable[torch.optim.Optimizer]) -> list[list[nn.Parameter]]:
    return [group["params"] for optimizer in optimizers for group in optimizer.param_groups]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_hidden_matrices_are_neither_table_nor_head(tied: bool) -> None:
    """The rule by names that the shipped model was trained with, plus the head where it is one of its own."""
    model = llama(tied=tied)
    wanted = {name for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
    assert names(model, hidden_matrices(model)) == wanted - {"lm_head.weight"}
    assert ("lm_head.weight" in wanted) is not tied


def test_hidden_matrices_of_other_models() -> None:
    """GPT-2's table of positions is a matrix of the model's inside, by this rule; its Conv1D weights are matrices."""
    model = build(case_named("gpt2"))
    found = names(model, hidden_matrices(model))
    assert "transformer.wte.weight" not in found and "transformer.h.0.attn.c_attn.weight" in found
    plain = NanoDecoder(width=8)
    assert "blocks.1.up.weight" in names(plain, hidden_matrices(plain))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_moved_once(optimizer: str, tied: bool) -> None:
    model = llama(tied=tied)
    extra = [nn.Parameter(torch.ones(3, 3)), next(iter(model.parameters()))]  # one is the model's already
    made = make_optimizers(model, hidden_matrices(model), [*extra, extra[0]], settings(optimizer), fused=False)
    moved = [id(p) for group in groups(made) for p in group]
    assert len(moved) == len(set(moved))
    assert set(moved) == {id(p) for p in model.parameters()} | {id(extra[0])}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_adamw_decays_matrices_alone(tied: bool) -> None:
    model, extra = llama(tied=tied), nn.Parameter(torch.ones(4, 4))
    (adamw,) = make_optimizers(model, hidden_matrices(model), [extra], settings("adamw"), fused=False)
    assert type(adamw) is torch.optim.AdamW
    decayed, kept = adamw.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.2, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert names(model, decayed["params"]) == {name for name, p in model.named_parameters() if p.ndim == 2}
    assert kept["params"][-1] is extra and {p.ndim for p in kept["params"][:-1]} == {1}
    assert all(group["lr"] == 0.01 and group["betas"] == (0.9, 0.95) for group in adamw.param_groups)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_muon_takes_the_hidden_matrices_alone(tied: bool) -> None:
    model, extra = llama(tied=tied), nn.Parameter(torch.ones(4, 4))
    muon, adamw = make_optimizers(model, hidden_matrices(model), [extra], settings("muon"), fused=False)
    assert type(muon) is torch.optim.Muon and type(adamw) is torch.optim.AdamW
    (orthogonal,), (rest,) = muon.param_groups, adamw.param_groups
    assert names(model, orthogonal["params"]) == names(model, hidden_matrices(model))
    assert rest["params"][-1] is extra
    ends = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert {name for name in names(model, rest["params"][:-1]) if "norm" not in name} == ends
    assert orthogonal["weight_decay"] == 0.2 and rest["weight_decay"] == 0.0
    assert orthogonal["lr"] == rest["lr"] == 0.01


def test_an_update_of_muon_is_as_long_as_one_of_adamw() -> None:
    """Root mean square of the first step of a square and of an oblong matrix: Muon's 0.2 of the rate (matched to what
    AdamW's typically is), within a third, where unmatched it would be the matrix's own 1 / sqrt(width)."""
    for shape in ((32, 32), (96, 24)):
        model = nn.Linear(shape[1], shape[0], bias=False)
        before = model.weight.detach().clone()
        (muon,) = make_optimizers(model, [model.weight], [], settings("muon", weight_decay=0), fused=False)
        model.weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        muon.step()
        step = float((model.weight.detach() - before).square().mean().sqrt())
        assert 0.01 * 0.2 * 2 / 3 < step < 0.01 * 0.2 * 4 / 3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_parameters_are_left_out(optimizer: str) -> None:
    model = llama()
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name or "layers.0.mlp" in name)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    made = make_optimizers(model, hidden_matrices(model), [frozen], settings(optimizer), fused=False)
    assert names(model, [p for group in groups(made) for p in group]) == trained


def test_without_matrices_muon_is_not_made() -> None:
    model = llama()
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    (only,) = make_optimizers(model, hidden_matrices(model), [], settings("muon"), fused=False)
    assert type(only) is torch.optim.AdamW
    (only,) = make_optimizers(model, hidden_matrices(model), [], settings("adamw"), fused=False)
    assert [group["weight_decay"] for group in only.param_groups] == [0.0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parameters_beside_a_frozen_model_are_enough(optimizer: str) -> None:
    model, extra = llama().requires_grad_(False), nn.Parameter(torch.ones(3))
    (adamw,) = make_optimizers(model, hidden_matrices(model), [extra], settings(optimizer), fused=False)
    assert groups([adamw]) == [[extra]]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_nothing_to_train_is_refused(optimizer: str) -> None:
    model = llama().requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter of the model is trained"):
        make_optimizers(model, hidden_matrices(model), [], settings(optimizer), fused=False)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_moves_every_parameter(optimizer: str, fused: bool) -> None:
    model = llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = make_optimizers(model, hidden_matrices(model), [], settings(optimizer), fused=fused)
    ids = torch.arange(12)[None] + 3
    model(input_ids=ids, labels=ids).loss.backward()
    for each in made:
        each.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before)
    assert all(math.isfinite(float(p.detach().sum())) for p in model.parameters())
