"""One loss by two ways: through all logits, and through the hidden states alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ryzen_compile.train.objective import Levers, Objective, Teacher, compiler_works, fast_half
from ryzen_compile.train.token_loss import TokenLoss
from tests.model_directory import case_named
from tests.zoo import VOCAB, build

SMALL = {"hidden_size": 32, "intermediate_size": 48}
LLAMA = case_named("llama", **SMALL, tie_word_embeddings=True)
GPT2 = case_named("gpt2", n_embd=32, n_inner=48)
# Whose logits are their head's product, and whose are more.
PRODUCTS = {
    "llama, tied": LLAMA,
    "llama, untied": case_named("llama", **SMALL, tie_word_embeddings=False),
    "gpt2": GPT2,
    "gemma2, no cap": case_named("gemma2", **SMALL, final_logit_softcapping=None),
    "cohere2, scale 1": case_named("cohere2", **SMALL, logit_scale=1.0),
}
OTHERS = {
    "gemma2, capped": case_named("gemma2", **SMALL, final_logit_softcapping=1.0),
    "cohere2, scaled": case_named("cohere2", **SMALL, logit_scale=0.5),
    "granite, scaled": case_named("granite", **SMALL, logits_scaling=4.0),
    "phi, biased head": case_named("phi", **SMALL),
}
ROWS = torch.randint(3, VOCAB, (3, 14), generator=torch.Generator().manual_seed(7))
WAYS = (Levers(), Levers(linear_cross_entropy=True))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def nmse(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).double().square().sum() / expected.double().square().sum())


def same(found: TokenLoss, expected: TokenLoss, rel: float = 1e-5) -> None:
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=rel)
    assert found.text.item() == pytest.approx(expected.text.item(), rel=rel)
    assert int(found.correct) == int(expected.correct) and int(found.agreed) == int(expected.agreed)


def both_ways(model: nn.Module, teacher: Teacher | None = None) -> list[tuple[TokenLoss, dict[str, Tensor]]]:
    found = []
    for levers in WAYS:
        scores = Objective(model, levers, teacher)(ROWS)
        found.append((scores, gradients(model, scores.loss)))
    return found


@pytest.mark.parametrize("name", PRODUCTS)
def test_both_ways_are_equal(name: str) -> None:
    """Losses to 1e-5, each parameter's gradient to 1e-9 in normalised squared error."""
    model = build(PRODUCTS[name])
    assert Objective(model, WAYS[1]).logits_are_a_product(ROWS)
    (plain, wanted), (found, grads) = both_ways(model)
    same(found, plain)
    assert set(grads) == set(wanted) == {name for name, _ in model.named_parameters()}
    assert all(nmse(grads[name], wanted[name]) < 1e-9 for name in wanted)


def test_the_loss_is_the_next_tokens() -> None:
    model: Any = build(LLAMA)
    found = Objective(model, WAYS[0])(ROWS)
    logits = model(ROWS[:, :-1]).logits.flatten(0, 1)
    assert found.loss.item() == pytest.approx(functional.cross_entropy(logits, ROWS[:, 1:].flatten()).item(), rel=1e-6)
    assert int(found.correct) == int((logits.argmax(-1) == ROWS[:, 1:].flatten()).sum())
    assert int(found.agreed) == 0


@pytest.mark.parametrize("name", OTHERS)
def test_models_whose_logits_are_more_are_found_out(name: str) -> None:
    model = build(OTHERS[name])
    objective = Objective(model, WAYS[1])
    assert not objective.logits_are_a_product(ROWS)
    plain = Objective(model, WAYS[0])(ROWS)
    if not name.startswith("phi"):
        assert plain.loss.item() != pytest.approx(objective(ROWS).loss.item(), rel=1e-3)


def test_dropout_does_not_look_like_other_logits() -> None:
    """The question is asked of a model in training, whose two passes differ; it is left as it was."""
    model = build(case_named("gpt2", n_embd=32, n_inner=48, resid_pdrop=0.5, embd_pdrop=0.5)).train()
    objective = Objective(model, WAYS[1])
    before = torch.get_rng_state()
    assert objective.logits_are_a_product(ROWS)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


# --- teachers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("weight", "heat"), [(0.5, 1.0), (0.9, 2.0), (1.0, 0.7), (0.0, 3.0)])
def test_a_teacher_teaches_the_same_both_ways(weight: float, heat: float) -> None:
    model, taught = build(LLAMA), build(GPT2, seed=1)
    (plain, wanted), (found, grads) = both_ways(model, Teacher(taught, weight, heat))
    same(found, plain)
    assert all(nmse(grads[name], wanted[name]) < 1e-8 for name in wanted)
    assert all(p.grad is None for p in taught.parameters())
    alone = Objective(model, WAYS[0])(ROWS)
    assert plain.text.item() == pytest.approx(alone.text.item(), rel=1e-6)
    if weight:
        assert plain.loss.item() != pytest.approx(alone.loss.item(), rel=1e-3)
    else:
        assert plain.loss.item() == pytest.approx(alone.loss.item(), rel=1e-6)


def test_a_teacher_can_be_switched_off_and_on() -> None:
    teacher = Teacher(build(GPT2, seed=1), 0.5, 1.0)
    objective = Objective(build(LLAMA), WAYS[1], teacher)
    with_it = objective(ROWS).loss.item()
    objective.teacher = None
    assert objective.teacher is None
    assert objective(ROWS).loss.item() == pytest.approx(Objective(objective.model, WAYS[1])(ROWS).loss.item())
    objective.teacher = teacher
    assert objective(ROWS).loss.item() == with_it


def test_a_teacher_equal_to_the_student_always_agrees() -> None:
    model = build(LLAMA)
    for levers in WAYS:
        found = Objective(model, levers, Teacher(copy.deepcopy(model), 1.0, 2.0))(ROWS)
        assert int(found.agreed) == ROWS[:, 1:].numel() and abs(found.loss.item()) < 1e-5


def test_a_teacher_whose_logits_are_more_is_found_out() -> None:
    capped = Teacher(build(OTHERS["gemma2, capped"]), 0.5, 1.0)
    assert not Objective(build(LLAMA), WAYS[1], capped).logits_are_a_product(ROWS)
    assert Objective(build(LLAMA), WAYS[1], Teacher(build(GPT2), 0.5, 1.0)).logits_are_a_product(ROWS)


def test_the_teacher_is_no_part_of_what_is_trained() -> None:
    """Nor is anything compiled: parameters and state are the model's."""
    model = build(LLAMA)
    objective = Objective(model, Levers(compiled=True), Teacher(build(GPT2), 0.5, 1.0))
    objective._hidden["model"] = nn.Linear(2, 2)
    assert {f"model.{name}" for name, _ in model.named_parameters()} == {n for n, _ in objective.named_parameters()}
    assert set(objective.state_dict()) == {f"model.{name}" for name in model.state_dict()}


# --- levers -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden"])
def test_half_precision_is_near_and_masters_stay(linear: bool) -> None:
    """bfloat16 products: losses to 2 %, gradients to 2 % in normalised squared error, in float32."""
    model = build(LLAMA)
    teacher = Teacher(build(GPT2, seed=1), 0.3, 2.0)
    objective = Objective(model, Levers(torch.bfloat16, linear), teacher)
    found, exact = objective(ROWS), Objective(model, WAYS[0], teacher)(ROWS)
    wanted, grads = gradients(model, exact.loss), gradients(model, found.loss)
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(exact.loss.item(), rel=0.02) and found.loss.item() != exact.loss.item()
    assert {p.dtype for p in (*model.parameters(), *grads.values())} == {torch.float32}
    assert all(nmse(grads[name], wanted[name]) < 0.02 for name in wanted)


@pytest.mark.parametrize("linear", [False, True])
def test_exact_levers_are_float32_by_the_same_way(linear: bool) -> None:
    fast = Levers(torch.bfloat16, linear, compiled=True)
    objective = Objective(build(LLAMA), fast)
    assert objective.exact_levers == Levers(torch.float32, linear, compiled=False)
    assert objective.levers == fast
    objective.levers = objective.exact_levers
    plain = Objective(objective.model, Levers(linear_cross_entropy=linear))
    assert objective(ROWS).loss.item() == plain(ROWS).loss.item()


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden"])
def test_traced_code_computes_the_same(linear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile makes of the model, run eagerly: the loss to 1e-5, gradients of every parameter, one module
    compiled and kept; switched off, the plain model runs."""
    compiled: list[nn.Module] = []
    real = torch.compile

    def eager(module: nn.Module) -> Any:
        compiled.append(module)
        return real(module, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    model = build(LLAMA)
    levers = Levers(linear_cross_entropy=linear, compiled=True)
    objective = Objective(model, levers)
    found = objective(ROWS)
    grads = gradients(model, found.loss)
    expected = Objective(model, replace(levers, compiled=False))(ROWS)
    same(found, expected)
    assert set(grads) == {name for name, _ in model.named_parameters()}
    objective(ROWS)
    assert compiled == [model.base_model if linear else model]
    objective.levers = replace(levers, compiled=False)
    assert objective(ROWS).loss.item() == expected.loss.item()


@pytest.mark.slow
def test_compiled_code_computes_the_same() -> None:
    if reason := compiler_works():
        pytest.skip(reason)
    model = build(LLAMA)
    found = Objective(model, Levers(linear_cross_entropy=True, compiled=True))(ROWS)
    grads = gradients(model, found.loss)
    expected = Objective(model, WAYS[1])(ROWS)
    wanted = gradients(model, expected.loss)
    same(found, expected)
    assert all(nmse(grads[name], wanted[name]) < 1e-8 for name in wanted)


def test_why_a_compiler_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any) -> Any:
        raise RuntimeError("no\n  compiler " + "x" * 500)

    monkeypatch.setattr(torch, "compile", broken)
    reason = compiler_works()
    assert reason.startswith("no compiler xxx") and len(reason) == 200
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert compiler_works() == ""


def test_fast_half_is_told_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name in ("avx512_bf16", "amx_bf16", "avx2"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        found[name] = fast_half(torch.device("cpu"))
    assert found == {"avx512_bf16": True, "amx_bf16": True, "avx2": False}
