"""Learning from pairs: the loss against one that is spelled out, what is no negative, and whole runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ryzen_compile.errors import ConfigError
from ryzen_compile.recipe_file import read_dims
from ryzen_compile.spec import Pooling
from ryzen_compile.train.config import TrainConfig
from ryzen_compile.train.contrastive import PAD, ContrastiveObjective
from ryzen_compile.train.depths import Depths
from ryzen_compile.train.objective import Levers
from ryzen_compile.train.pairs import PairRows
from ryzen_compile.workflow.training import FinishedRun, prepare_text, train
from tests.train.test_loop import Stops
from tests.train.tiny_pairs import DIMS, WORDS, encoder, pair_config

pytest.importorskip("accelerate")

COLUMNS, SCALE = 5, 20.0


def rows(count: int, seed: int = 0) -> Tensor:
    """(count, 12): queries of 1 to 5 tokens, positives of 1 to 7."""
    g = torch.Generator().manual_seed(seed)
    found = torch.full((count, 12), PAD)
    for row in found:
        for start, most in ((0, COLUMNS), (COLUMNS, 7)):
            length = int(torch.randint(1, most + 1, (1,), generator=g))
            row[start : start + length] = torch.randint(3, len(WORDS), (length,), generator=g)
    return found


def objective(model: nn.Module, *, symmetric: bool = False, mode: Any = "mean") -> ContrastiveObjective:
    return ContrastiveObjective(model, Levers(), Pooling(mode), COLUMNS, scale=SCALE, symmetric=symmetric)


def spelled_out(model: nn.Module, pairs: Tensor, depths: Depths, *, symmetric: bool) -> Tensor:
    """One pair, one depth, one score at a time, each text alone and without padding."""

    def vector(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens[tokens != PAD][None]).last_hidden_state[0].mean(0)

    queries = [vector(row[:COLUMNS]) for row in pairs]
    positives = [vector(row[COLUMNS:]) for row in pairs]
    equal = [
        [i != j and (a[:COLUMNS].equal(b[:COLUMNS]) or a[COLUMNS:].equal(b[COLUMNS:])) for j, b in enumerate(pairs)]
        for i, a in enumerate(pairs)
    ]
    total = torch.zeros((), dtype=torch.float64)
    sides = ((queries, positives), (positives, queries)) if symmetric else ((queries, positives),)
    for dim, weight in zip(depths.dims, depths.weights, strict=True):
        for left, right in sides:
            for i, one in enumerate(left):
                scores = [
                    math.inf if equal[i][j] else SCALE * functional.cosine_similarity(one[:dim], other[:dim], dim=0)
                    for j, other in enumerate(right)
                ]
                kept = torch.stack([score for score in scores if isinstance(score, Tensor)])
                total = total + weight * (kept.logsumexp(0) - scores[i]) / len(left) / len(sides)
    return total


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- the loss ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_loss_and_gradients_are_the_spelled_out_ones(count: int, symmetric: bool) -> None:
    """In float64, with two pairs of one positive and two of one query among the seven: 1e-10 is rounding."""
    pairs = rows(count)
    if count == 7:
        pairs[4, COLUMNS:], pairs[6, :COLUMNS] = pairs[1, COLUMNS:], pairs[2, :COLUMNS]
    model = encoder().double().eval()
    depths = Depths((32, 24, 7, 1), (0.4, 0.3, 0.2, 0.1))
    made = objective(model, symmetric=symmetric)
    made.depths = depths
    found, expected = made(pairs), spelled_out(model, pairs, depths, symmetric=symmetric)
    assert found.loss.dtype == torch.float64
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-12)
    ours, theirs = gradients(model, found.loss), gradients(model, expected)
    assert set(ours) == set(theirs) and (count == 1 or len(ours) > 20)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-8, atol=1e-12)
    whole = spelled_out(model, pairs, Depths((32,), (1.0,)), symmetric=symmetric)
    assert found.text.item() == pytest.approx(whole.item(), rel=1e-10, abs=1e-12)


def test_a_duplicate_is_no_negative() -> None:
    """Of three equal pairs none can be confused with another; of two that differ they can."""
    made = objective(encoder().double().eval(), symmetric=True)
    pairs = rows(2, seed=3)
    assert made(pairs[:1].repeat(3, 1)).loss.item() == 0
    assert made(pairs).loss.item() > 0.01
    one_query = torch.cat([pairs[:, :COLUMNS][:1].repeat(2, 1), pairs[:, COLUMNS:]], dim=1)
    one_positive = torch.cat([pairs[:, :COLUMNS], pairs[:, COLUMNS:][:1].repeat(2, 1)], dim=1)
    for alike in (one_query, one_positive):
        assert made.same(alike).all() and made(alike).loss.item() == 0
    assert made.same(pairs).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "last"])
def test_a_vector_does_not_depend_on_padding(mode: Any) -> None:
    """To 1e-12 in float64, for lengths 1 to 7 side by side."""
    made = objective(encoder().double().eval(), mode=mode)
    tokens = rows(9, seed=1)[:, COLUMNS:]
    together = made.vectors(tokens)
    for row, vector in zip(tokens, together, strict=True):
        torch.testing.assert_close(made.vectors(row[row != PAD][None])[0], vector, rtol=0, atol=1e-12)


def test_a_mean_is_of_full_precision_where_the_model_is_not() -> None:
    """To 1e-6, of values up to 3; as a product in bfloat16 it would have three digits."""
    made = objective(encoder().eval())
    tokens = rows(9, seed=1)[:, COLUMNS:]
    mask = tokens != PAD
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = made.vectors(tokens)
        hidden = made.model(input_ids=tokens.clamp(min=0), attention_mask=mask.long()).last_hidden_state.float()
    expected = torch.stack([states[kept].mean(0) for states, kept in zip(hidden, mask, strict=True)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_levers_that_it_lacks_stay_off() -> None:
    made = ContrastiveObjective(
        encoder(), Levers(torch.bfloat16, True, True, True), Pooling(), COLUMNS, scale=SCALE, symmetric=False
    )
    assert made.levers == Levers(torch.bfloat16)
    loss = made.eval()(rows(6)).loss
    exact = objective(made.model)(rows(6)).loss
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.1) and loss != exact


# --- runs -------------------------------------------------------------------------------------------------------------
def weights(run: FinishedRun) -> dict[str, Tensor]:
    return load_file(run.directory / "model" / "model.safetensors")


def records(run: FinishedRun, kind: str) -> list[dict[str, Any]]:
    lines = (run.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


LEARN: dict[str, Any] = {
    "optimization": {"steps": 60, "accumulate": 1, "batch": 16},
    "validation": {"every": 0},
    "controller": {"ablate": False},
}


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return train(pair_config(tmp_path_factory.mktemp("nested"), **LEARN))


def test_it_learns_at_every_depth(nested: FinishedRun) -> None:
    """Held-out pairs are found at each depth, at a reciprocal rank that is half as high again as it was, or higher."""
    run = nested
    curve = [record["loss"] for record in records(run, "batch")]
    assert sum(curve[-5:]) < 0.5 * sum(curve[:5])
    before, after = run.depths["untrained"], run.depths["trained"]
    assert set(run.depths) == {"untrained", "untrained_principal_axes", "trained"}
    for dim in DIMS:
        assert after[dim]["mrr"] > 1.5 * before[dim]["mrr"], dim
    assert after[DIMS[0]]["cosine_correlation"] == pytest.approx(1)
    last = records(run, "validation")[-1]["depths"]
    assert {int(dim): figures for dim, figures in last.items()} == after
    report = json.loads((run.directory / "training_metrics_report.json").read_text(encoding="utf-8"))
    assert report["validations"][-1]["depths"] == last
    assert report["summary"]["depths"]["trained"] == last
    assert f"| {DIMS[-1]} | trained |" in (run.directory / "model" / "README.md").read_text(encoding="utf-8")


def test_depths_are_what_makes_it_so(tmp_path: Path, nested: FinishedRun) -> None:
    """Negative control, of one seed: after the same steps without them, the loss of 8 of 32 channels is the higher one,
    and there are figures of whole vectors only."""
    config = pair_config(tmp_path, **LEARN, passes={"matryoshka": None})
    run = train(config)
    assert held_out_loss(nested, config, DIMS[-1]) < held_out_loss(run, config, DIMS[-1])
    assert set(run.depths["trained"]) == {DIMS[0]} and read_dims(run.directory / "model") is None


def held_out_loss(run: FinishedRun, config: TrainConfig, dim: int) -> float:
    """Of vectors of ``dim`` channels, by the model that a run saved."""
    from transformers import AutoModel

    held = prepare_text(config).rows
    assert isinstance(held, PairRows)
    model = AutoModel.from_pretrained(run.directory / "model").eval()
    made = ContrastiveObjective(model, Levers(), Pooling(), held.columns, scale=SCALE, symmetric=False)
    made.depths = Depths((DIMS[0], dim), (0.0, 1.0))
    with torch.no_grad():
        return float(made(held.validation.long()).loss)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Dropout, two depths that begin later, batches that lie across the end of an epoch."""
    changes: dict[str, Any] = {"passes": {"matryoshka": {"dims": list(DIMS), "start": 0.5}}}
    changes |= {"optimization": {"steps": 10}}
    (tmp_path / "whole").mkdir()
    whole = train(pair_config(tmp_path / "whole", **changes))
    (tmp_path / "stopped").mkdir()
    config = pair_config(tmp_path / "stopped", **changes)
    for step in (1, 5):  # before the first checkpoint, and between two
        with pytest.raises(KeyboardInterrupt):
            train(config, resume=step > 1, watcher=Stops(step))
    again = train(config, resume=True)
    assert again.result.validation == whole.result.validation
    assert again.depths == whole.depths
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(again)[name]), name
    steps = [[(r["step"], r["loss"]) for r in records(run, "batch")] for run in (whole, again)]
    assert steps[0] == steps[1]


def test_what_is_saved_is_a_whole_sentence_encoder(tmp_path: Path) -> None:
    """Read by sentence-transformers, its vectors are the run's, to 1e-5; frozen parameters are as they came."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    config = pair_config(tmp_path, model={"freeze": ["embeddings.*"]})
    run = train(config)
    directory = run.directory / "model"
    assert read_dims(directory) == DIMS
    model = sentence_transformers.SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    found = torch.from_numpy(model.encode(["ask1 of ask2", "the is2 of is1"]))
    from transformers import AutoModel, AutoTokenizer

    plain, tokenizer = AutoModel.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    for text, vector in zip(["ask1 of ask2", "the is2 of is1"], found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            expected = functional.normalize(plain(input_ids=ids).last_hidden_state[0].mean(0), dim=0)
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)
    before = load_file(tmp_path / "encoder" / "model.safetensors")
    same = {name: torch.equal(value, before[name]) for name, value in weights(run).items()}
    assert all(same[name] for name in same if name.startswith(("embeddings.", "pooler.")))
    assert not any(same[name] for name in same if name.startswith("encoder.") and name.endswith("query.weight"))


# --- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimization": {"batch": 1}}, "optimization.batch of at least 2"),
        ({"passes": {"qat": {}, "distill": {"teacher": "x"}}}, "without passes.qat, passes.distill"),
        ({"model": {"tokenizer": "elsewhere"}}, "without model.tokenizer"),
        ({"metrics": {"samples": ["Once"]}}, "without metrics.samples"),
        ({"precision": {"compile": True}}, "without precision.compile true"),
        ({"contrastive": {"scale": 0}}, "contrastive.scale: .*greater than 0"),
        ({"contrastive": {"temperature": 0.05}}, "contrastive.temperature"),
        ({"data": {"hold_out_groups": 2, "hold_out": ["x"]}}, "hold_out and hold_out_groups both say"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pair_config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"length": 17}}, "reads 16 tokens at most, and texts are cut at 17"),
        ({"contrastive": {"query_length": 20}}, "texts are cut at 20"),
        ({"contrastive": {"columns": ["query", "answer"]}}, "has no 'answer', only 'query', 'positive'"),
        ({"model": {"freeze": ["embedings.*"]}}, "model.freeze: 'embedings.*' matches none of"),
        ({"passes": {"matryoshka": {"dims": [24, 8]}}}, r"expected the model's 32 channels first, got \[24, 8\]"),
    ],
)
def test_what_does_not_fit_the_model_or_the_data_is_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(pair_config(tmp_path, **changes))
