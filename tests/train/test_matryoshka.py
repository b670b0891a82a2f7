"""Depths of a language model: the nested loss against one that is spelled out, what is recorded, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ryzen_compile.errors import ConfigError, ModelError
from ryzen_compile.recipe_file import read_dims
from ryzen_compile.train import token_loss
from ryzen_compile.train.config import MatryoshkaSettings
from ryzen_compile.train.depths import Depths, halvings, make_depths
from ryzen_compile.train.matryoshka import MatryoshkaComponent
from ryzen_compile.train.objective import Levers, Objective, Teacher
from ryzen_compile.workflow.training import train
from tests.model_directory import case_named
from tests.train.test_loop import Stops, records
from tests.train.tiny_run import tiny_config
from tests.train.tiny_trainer import llama, make_run, patterned
from tests.zoo import VOCAB, build

pytest.importorskip("accelerate")

ROWS = torch.randint(3, VOCAB, (3, 14), generator=torch.Generator().manual_seed(7))
TIED = case_named("llama", hidden_size=32, intermediate_size=48, tie_word_embeddings=True)
UNTIED = case_named("llama", hidden_size=32, intermediate_size=48, tie_word_embeddings=False)
DEPTHS = Depths((32, 24, 7, 1), (0.4, 0.3, 0.2, 0.1))
WAYS = (Levers(), Levers(linear_cross_entropy=True))


def spelled_out(model: nn.Module, rows: Tensor, depths: Depths) -> Tensor:
    """In float64, all logits of each depth at once."""
    hidden = model.base_model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state.double()
    head = model.get_output_embeddings().weight.double()
    labels = rows[:, 1:].reshape(-1)
    losses = [
        functional.cross_entropy((hidden[..., :dim] @ head[:, :dim].t()).flatten(0, 1), labels) for dim in depths.dims
    ]
    return sum(weight * loss for weight, loss in zip(depths.weights, losses, strict=True))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}


# --- the loss ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("levers", WAYS, ids=["logits", "hidden"])
@pytest.mark.parametrize("case", [TIED, UNTIED], ids=["tied", "untied"])
def test_loss_and_gradients_are_the_spelled_out_ones(
    case: Any, levers: Levers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64: 1e-5 of the loss and, squared, 1e-10 of a gradient are roundings of float32. Chunks of logits
    are so small that there are several, the last one not full."""
    monkeypatch.setattr(token_loss, "CHUNK_LOGITS", 5 * VOCAB)
    model = build(case)
    expected = spelled_out(model, ROWS, DEPTHS)
    wanted = gradients(model, expected)
    objective = Objective(model, levers)
    plain = objective(ROWS)
    objective.depths = DEPTHS
    found = objective(ROWS)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.loss.item() != pytest.approx(plain.loss.item(), rel=1e-3)
    assert (found.text.item(), found.correct.item()) == pytest.approx((plain.text.item(), plain.correct.item()))
    grads = gradients(model, found.loss)
    assert set(grads) == set(wanted)
    for name, grad in wanted.items():
        assert float((grads[name] - grad).square().sum() / grad.square().sum()) < 1e-10, name


def test_a_teacher_teaches_whole_vectors_only() -> None:
    """The same by both ways, to 1e-5: the weight of the whole loss times what the teacher changes about it."""
    model, teacher = build(TIED), Teacher(build(UNTIED, seed=1), 0.5, 2.0)
    found = []
    for levers in WAYS:
        objective = Objective(model, levers)
        objective.depths = DEPTHS
        text, _, _, _ = objective(ROWS)
        objective.teacher = teacher
        taught = objective(ROWS).loss
        objective.depths, objective.teacher = None, None
        alone = objective(ROWS).loss
        objective.teacher = teacher
        assert (taught - text).item() == pytest.approx(0.4 * (objective(ROWS).loss - alone).item(), rel=1e-4)
        found.append(taught.item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# --- depths -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("channels", "depth", "dims"),
    [
        (384, 6, (384, 192, 96, 48, 24, 16)),
        (768, 6, (768, 384, 192, 96, 48, 24)),
        (768, 2, (768, 384)),
        (100, 4, (100, 48, 24, 16)),
        (31, 6, (31, 16, 8)),
        (24, 3, (24, 16, 8)),
        (8, 6, (8,)),
        (1, 6, (1,)),
    ],
)
def test_halvings(channels: int, depth: int, dims: tuple[int, ...]) -> None:
    assert halvings(channels, depth) == dims


def test_weights_sum_to_one() -> None:
    equal = make_depths(MatryoshkaSettings(), 384)
    assert equal.dims == (384, 192, 96, 48, 24, 16) and equal.weights == pytest.approx([1 / 6] * 6)
    own = make_depths(MatryoshkaSettings(dims=(24, 9), weights=(1.0, 3.0)), 24)
    assert own == Depths((24, 9), (0.25, 0.75))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dims": [24]}, "passes.matryoshka.*two or more, widest first"),
        ({"dims": [24, 24]}, "two or more, widest first"),
        ({"dims": [8, 24]}, "two or more, widest first"),
        ({"dims": [24, 0]}, "greater than or equal to 1"),
        ({"dims": [24, 8], "weights": [1.0]}, "one for each of 2 dims, got 1"),
        ({"depth": 3, "weights": [1.0, 1.0]}, "one for each of 3 dims, got 2"),
        ({"dims": [24, 8], "weights": [1.0, 0.0]}, "greater than 0"),
        ({"depth": 1}, "greater than or equal to 2"),
        ({"dim": [24, 8]}, "passes.matryoshka.dim.*dims"),
    ],
)
def test_settings_that_say_nothing_sensible_are_refused(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, passes={"matryoshka": settings})


@pytest.mark.parametrize(
    ("settings", "channels", "message"),
    [
        ({"dims": (16, 8)}, 24, r"expected the model's 24 channels first, got \[16, 8\]"),
        ({"depth": 5, "weights": (1.0,) * 5}, 24, r"one for each of \[24, 16, 8\], got 5"),
        ({}, 7, "7 channels have no half that is a multiple of 8"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(settings: Any, channels: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_depths(MatryoshkaSettings(**settings), channels)


def test_logits_that_are_more_than_a_product_are_refused() -> None:
    capped = build(case_named("gemma2", hidden_size=32, intermediate_size=48, final_logit_softcapping=1.0))
    made = MatryoshkaComponent(Objective(capped, Levers()), MatryoshkaSettings(dims=(32, 8)))
    with pytest.raises(ConfigError, match="more than its head's product"):
        made.prepare(capped)


# --- the component ----------------------------------------------------------------------------------------------------
def test_it_sets_and_clears_the_depths() -> None:
    model = llama()
    objective = Objective(model, Levers())
    made = MatryoshkaComponent(objective, MatryoshkaSettings(dims=(32, 8), start=0.5))
    assert made.prepare(model) == [] and objective.depths is None and made.start == 0.5
    made.activate()
    assert objective.depths == made.depths and made.facts().settings["dims"] == [32, 8]
    other = MatryoshkaComponent(Objective(llama(), Levers()), MatryoshkaSettings(dims=(32, 8)))
    other.restore(*made.state())
    assert other.active and other._objective.depths == made.depths
    made.detach(llama())
    assert made.active, "a copy was made plain, not the model in training"
    made.detach(model)
    assert objective.depths is None and not made.active
    assert made.recipe_changes() == {} and not made.tighten() and not made.relax()
    with pytest.raises(ModelError, match="expected whether it is active"):
        made.restore({}, {"active": 1})


def test_the_first_channels_learn_to_do_without_the_rest(tmp_path: Path) -> None:
    """After 60 steps on rows most of which can be foreseen, 8 of 32 channels of the nested model predict better by 0.2
    nats than those of the plain one, the negative control; its whole vectors are 0.3 nats behind at most."""
    losses = []
    for name, nested in (("nested", True), ("plain", False)):
        settings = MatryoshkaSettings(dims=(32, 16, 8))
        run = make_run(
            tmp_path / name,
            lambda objective, settings=settings, nested=nested: (
                [MatryoshkaComponent(objective, settings)] if nested else []
            ),
            steps=60,
            every=60,
        )
        run.fit()
        model = run.trainer.objective.model.eval()
        with torch.no_grad():
            rows = patterned(32, seed=5)
            losses.append([spelled_out(model, rows, Depths((dim,), (1.0,))).item() for dim in (32, 8)])
    (whole, cut), (plain_whole, plain_cut) = losses
    assert cut < plain_cut - 0.2
    assert whole < plain_whole + 0.3


# --- runs -------------------------------------------------------------------------------------------------------------
def test_a_run_says_what_each_depth_loses_and_leaves_its_dims(tmp_path: Path) -> None:
    run = train(tiny_config(tmp_path, passes={"matryoshka": {"dims": [24, 8]}}))
    assert read_dims(run.directory / "model") == (24, 8)
    validations = records(run.directory, "validation")
    assert [list(record["depths"]) for record in validations] == [["24", "8"]] * 2
    # Of the whole text in float32, as the run's own last figure, but summed in another order.
    assert run.depths["trained"][24]["loss"] == pytest.approx(run.result.validation.loss, rel=1e-5)
    untrained, turned = run.depths["untrained"], run.depths["untrained_principal_axes"]
    assert turned[24]["loss"] == pytest.approx(untrained[24]["loss"], rel=1e-4)  # whole vectors do not notice
    assert untrained[8]["loss"] != pytest.approx(turned[8]["loss"], rel=1e-4)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"passes": {"matryoshka": {"dims": [24, 8], "start": 0.4}}}
    (tmp_path / "whole").mkdir()
    whole = train(tiny_config(tmp_path / "whole", **changes))
    (tmp_path / "stopped").mkdir()
    config = tiny_config(tmp_path / "stopped", **changes)
    with pytest.raises(KeyboardInterrupt):
        train(config, watcher=Stops(3))
    again = train(config, resume=True)
    assert again.depths == whole.depths
    one, other = (load_file(run.directory / "model" / "model.safetensors") for run in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_without_depths_records_none(tmp_path: Path) -> None:
    run = train(tiny_config(tmp_path, model={"freeze": ["*.self_attn.*"]}))
    assert run.depths == {} and "depths" not in run.summary() and read_dims(run.directory / "model") is None
    assert all(record["depths"] == {} for record in records(run.directory, "validation"))
