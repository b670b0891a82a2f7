"""Learning from a teacher: what is switched, that it helps, what agreement is, and how many tokens to draft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ryzen_compile.errors import ConfigError, ModelError, UsageError
from ryzen_compile.train.config import DistillSettings
from ryzen_compile.train.distill import MOST_DRAFTED, UNMEASURED_LENGTH, DistillComponent
from ryzen_compile.train.objective import Levers, Objective
from tests.train.tiny_trainer import VOCAB, Run, llama, make_run, patterned

pytest.importorskip("accelerate")


def settings(**changes: Any) -> DistillSettings:
    return DistillSettings(teacher="in memory", **changes)


def component(student: nn.Module, teacher: nn.Module, levers: Levers | None = None, **changes: Any) -> DistillComponent:
    made = DistillComponent(Objective(student, levers or Levers()), teacher, settings(**changes))
    assert made.prepare(student) == []
    return made


def sharp_teacher() -> nn.Module:
    """Its predictions are far from uniform, and nothing that the text would teach."""
    teacher = llama(seed=7, hidden_size=40)
    with torch.no_grad():
        teacher.get_output_embeddings().weight.mul_(20)
    return teacher


def divergence(student: nn.Module, teacher: nn.Module, ids: Tensor) -> float:
    """KL(teacher || student), nats per token."""
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits.double().log_softmax(-1) for model in (student, teacher))
    return float(functional.kl_div(ours, theirs, log_target=True, reduction="sum")) / ids.numel()


# --- on and off -------------------------------------------------------------------------------------------------------
def test_it_sets_and_clears_the_teacher() -> None:
    student, teacher = llama(), llama(seed=1).train()
    made = component(student, teacher, weight=0.3, temperature=2.0)
    objective = made._objective
    assert objective.teacher is None and not made.active
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    made.activate()
    found = objective.teacher
    assert found is not None and (found.model, found.weight, found.temperature) == (teacher, 0.3, 2.0)
    assert len(list(objective.parameters())) == len(list(student.parameters()))
    made.deactivate()
    assert objective.teacher is None and not made.active
    made.activate()
    made.detach(student)
    assert objective.teacher is None
    assert made.recipe_changes() == {} and not made.tighten() and not made.relax()


def test_its_state() -> None:
    first, second = (component(llama(), llama(seed=1)) for _ in range(2))
    first.activate()
    first.observe(0.75)
    second.restore(*first.state())
    assert second.active and second._objective.teacher is not None and second.acceptance == 0.75
    second.restore({}, {"active": False, "acceptance": None})
    assert not second.active and second._objective.teacher is None
    for values in ({}, {"active": 1, "acceptance": None}, {"active": True}):
        with pytest.raises(ModelError, match="expected active and acceptance"):
            second.restore({}, values)


def test_teachers_that_do_not_fit() -> None:
    small = llama(seed=1)
    small.resize_token_embeddings(VOCAB - 1)
    with pytest.raises(ConfigError, match="the teacher predicts 63 tokens, the model 64"):
        component(llama(), small)
    headless = llama(seed=1)
    headless.lm_head = None
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no output head"):
        component(llama(), headless)


def test_a_teacher_whose_logits_are_more_than_a_product_needs_all_logits() -> None:
    """Its head has a bias, which the loss without logits would leave out."""
    biased = llama(seed=1)
    biased.lm_head = nn.Linear(32, VOCAB, bias=True)
    with pytest.raises(ConfigError, match=r"more than its head's product.*linear_cross_entropy=false"):
        component(llama(), biased, Levers(linear_cross_entropy=True))
    component(llama(), biased, Levers())
    component(llama(), llama(seed=1), Levers(linear_cross_entropy=True))


# --- training ---------------------------------------------------------------------------------------------------------
def distilled(directory: Path, teacher: nn.Module, weight: float | None, **options: Any) -> Run:
    """30 steps; with ``weight`` None without a teacher."""
    chosen = settings(weight=weight or 0.0)
    run = make_run(
        directory,
        lambda objective: [] if weight is None else [DistillComponent(objective, teacher, chosen)],
        steps=30,
        **options,
    )
    run.fit()
    return run


@pytest.mark.parametrize("fast", [False, True])
def test_it_brings_predictions_nearer_to_the_teachers(tmp_path: Path, fast: bool) -> None:
    """At least a fifth nearer than the text alone brings them, on other text; the teacher stays what it was."""
    teacher = sharp_teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    levers = Levers(linear_cross_entropy=fast)
    ids = patterned(16, seed=9)
    plain, half, whole = (
        divergence(
            distilled(tmp_path / str(weight), teacher, weight, levers=levers).trainer.objective.model, teacher, ids
        )
        for weight in (None, 0.5, 1.0)
    )
    assert half < 0.8 * plain and whole < half
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_weight_of_zero_trains_as_without_a_teacher(tmp_path: Path) -> None:
    teacher = sharp_teacher()
    plain, zero = (distilled(tmp_path / str(w), teacher, w, levers=Levers()) for w in (None, 0.0))
    for name, value in plain.weights().items():
        torch.testing.assert_close(zero.weights()[name], value, rtol=1e-4, atol=1e-5)


def test_agreement_is_how_often_both_guess_the_same(tmp_path: Path) -> None:
    """Counted token by token; text loss and accuracy do not know of the teacher, measuring it does not lose it."""
    teacher = sharp_teacher()
    run = distilled(tmp_path, teacher, 0.9, settings={"ablate": True})
    trainer = run.trainer
    rows = trainer.rows.validation
    with torch.no_grad():
        ours, theirs = (model(input_ids=rows[:, :-1]).logits for model in (trainer.objective.model, teacher))
    expected = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    scores = trainer.validate()
    assert 0.05 < expected < 0.95
    assert scores.agreement == pytest.approx(expected, abs=2 / rows.numel())  # a tie may fall the other way
    assert scores.accuracy == pytest.approx(
        float((ours.argmax(-1) == rows[:, 1:]).double().mean()), abs=2 / rows.numel()
    )
    text = functional.cross_entropy(ours.flatten(0, 1), rows[:, 1:].flatten())
    assert scores.loss == pytest.approx(float(text), rel=1e-5)
    (made,) = run.controller.components
    assert isinstance(made, DistillComponent) and made.active
    assert made.acceptance == scores.agreement
    made.deactivate()
    assert trainer.validate() == (*scores[:2], 0.0)
    assert run.records("epoch")[-1]["quality"] == {"distill": 0.0}


# --- drafting ---------------------------------------------------------------------------------------------------------
def expected_speedup(acceptance: float, cost: float, length: int) -> float:
    """Leviathan et al., 2023, theorem 3.8, with the sum written out."""
    return sum(acceptance**i for i in range(length + 1)) / (1 + cost * length)


@pytest.mark.parametrize("cost", [0.01, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 0.99, 1.0])
def test_the_length_of_drafts_is_the_one_that_pays_best(acceptance: float, cost: float) -> None:
    made = component(llama(), llama(seed=1), draft_cost=cost)
    made.observe(acceptance)
    by_length = {k: expected_speedup(acceptance, cost, k) for k in range(1, MOST_DRAFTED + 1)}
    length, facts = made.draft_length(), made.facts().settings
    assert by_length[length] == pytest.approx(max(by_length.values()), rel=1e-12)
    assert facts["draft_length"] == length and facts["speedup"] == pytest.approx(by_length[length])
    assert facts["acceptance"] == acceptance and facts["draft_cost"] == cost


def test_lengths_at_the_ends() -> None:
    made = component(llama(), llama(seed=1), draft_cost=0.1)
    assert made.draft_length() == UNMEASURED_LENGTH
    assert made.facts().settings["acceptance"] is None and made.facts().settings["speedup"] is None
    lengths = []
    for acceptance in (0.0, 0.5, 0.7, 0.9, 1.0):
        made.observe(acceptance)
        lengths.append(made.draft_length())
    assert lengths[0] == 1 and lengths[-1] == MOST_DRAFTED and lengths == sorted(lengths)
    for bad in (-0.01, 1.01, float("nan")):
        with pytest.raises(UsageError, match="expected a share"):
            made.observe(bad)


def test_the_cost_of_a_draft_is_the_share_of_parameters_unless_it_is_known() -> None:
    student, teacher = llama(), llama(seed=1, num_hidden_layers=5)
    share = sum(p.numel() for p in student.parameters()) / sum(p.numel() for p in teacher.parameters())
    assert component(student, teacher).facts().settings["draft_cost"] == share < 1
    assert component(student, teacher, draft_cost=0.25).facts().settings["draft_cost"] == 0.25


@pytest.mark.parametrize("adapt", [True, False])
def test_the_controller_adapts_the_length_and_says_so(tmp_path: Path, adapt: bool) -> None:
    """Of a teacher that is the student's twin: at first they agree, drafts may be long, then they part."""
    run = make_run(
        tmp_path,
        lambda objective: [DistillComponent(objective, llama(), settings(weight=0.1, draft_cost=0.1))],
        steps=20,
        settings={"adapt": adapt},
    )
    run.fit()
    (made,) = run.controller.components
    assert isinstance(made, DistillComponent)
    events = [event["facts"] for event in run.records("event") if event["event"] == "adapt"]
    if not adapt:
        assert events == [] and made.acceptance is None and made.draft_length() == UNMEASURED_LENGTH
        return
    assert events and events[0]["before"] == UNMEASURED_LENGTH
    assert [event["before"] for event in events[1:]] == [event["draft_length"] for event in events[:-1]]
    assert made.draft_length() == events[-1]["draft_length"]
    assert run.records("epoch")[-1]["settings"]["distill"]["draft_length"] == made.draft_length()
