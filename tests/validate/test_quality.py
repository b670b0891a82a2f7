from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from ryzen_compile.api import optimize
from ryzen_compile.capture import capture
from ryzen_compile.errors import NumericalError, UsageError
from ryzen_compile.runtime.storage import HOST
from ryzen_compile.spec import CacheSlot, ModelSpec
from ryzen_compile.validate import quality
from ryzen_compile.validate.quality import (
    EngineScorer,
    ModelScorer,
    ProgramScorer,
    confidence_factor,
    fitting_batch,
    perplexity,
    score,
)
from tests.zoo import CASES, CONTEXT, VOCAB, WINDOW, Case, NanoDecoder, build

CASE = {case.name: case for case in CASES}


class Written:
    """A scorer that gives written logits (n, L, V), one after the other, and writes down how many at a time."""

    def __init__(self, logits: np.ndarray) -> None:
        self.table, self.given, self.batches = np.asarray(logits, np.float32), 0, []

    def logits(self, ids: np.ndarray) -> np.ndarray:
        self.given += len(ids)
        self.batches.append(len(ids))
        return self.table[self.given - len(ids) : self.given].copy()


def distributions(*rows: tuple[float, ...]) -> np.ndarray:
    """Logits (1, L, V) of the given probabilities, each row moved by a constant that must not matter."""
    return np.log(np.array([rows])) + np.arange(len(rows))[:, None] * 3 - 5


def windows(n: int, length: int, vocab: int = VOCAB, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (n, length), dtype=np.int64)


def random_logits(n: int, length: int, vocab: int, seed: int, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, (n, length, vocab)).astype(np.float32)


# --- closed forms -----------------------------------------------------------------------------------------------------
def test_three_tokens_by_hand():
    ids = np.array([[2, 0, 1]])
    # The last rows predict nothing that is known: however different, they do not count.
    p = distributions((1 / 2, 1 / 4, 1 / 4), (1 / 3, 1 / 3, 1 / 3), (0.98, 0.01, 0.01))
    q = distributions((1 / 4, 1 / 2, 1 / 4), (1 / 2, 1 / 4, 1 / 4), (0.01, 0.01, 0.98))
    found = score(Written(q), Written(p), ids)
    first = 1 / 4 * math.log(2)  # 1/2 ln(2) + 1/4 ln(1/2)
    second = 1 / 3 * (math.log(2 / 3) + 2 * math.log(4 / 3))
    assert (found.tokens, found.windows, found.worst_window) == (2, 1, 0)
    # float32 logits of size 5
    assert found.kl.value == pytest.approx((first + second) / 2, abs=1e-6)
    assert found.worst_kl == found.kl.value
    assert found.top1.value == 0.5  # the second row of p is a tie, won by the first of them
    assert found.perplexity.value == pytest.approx(math.sqrt(4 * 4), rel=1e-6)
    assert found.reference_perplexity.value == pytest.approx(math.sqrt(2 * 3), rel=1e-6)
    assert found.ratio.value == pytest.approx(4 / math.sqrt(6), rel=1e-6)
    assert (found.accuracy.value, found.reference_accuracy.value) == (0, 0.5)  # p's first row alone is right
    assert found.accuracy_loss.value == 1
    single = (found.kl, found.top1, found.perplexity, found.ratio, found.accuracy, found.accuracy_loss)
    assert all(math.isnan(estimate.error) for estimate in single)


def test_kl_is_from_the_reference_to_the_candidate():
    ids = np.array([[0, 0]])
    p, q = distributions((0.9, 0.1), (0.5, 0.5)), distributions((0.5, 0.5), (0.5, 0.5))
    forward = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    backward = 0.5 * math.log(1 / 1.8) + 0.5 * math.log(1 / 0.2)
    assert score(Written(q), Written(p), ids).kl.value == pytest.approx(forward, abs=1e-6)
    assert score(Written(p), Written(q), ids).kl.value == pytest.approx(backward, abs=1e-6)


def test_identical_logits_are_exactly_identical():
    logits = random_logits(5, 7, 11, seed=1, spread=30)
    found = score(Written(logits), Written(logits), windows(5, 7, 11))
    assert (found.kl.value, found.kl.error, found.worst_kl) == (0, 0, 0)
    assert (found.ratio.value, found.ratio.error, found.ratio_bound) == (1, 0, 1)
    assert (found.top1.value, found.top1.error, found.top1_bound) == (1, 0, 1)
    assert found.perplexity == found.reference_perplexity and found.accuracy == found.reference_accuracy


def test_a_uniform_prediction_has_the_vocabulary_as_perplexity():
    found = perplexity(Written(np.full((3, 5, 13), 7.0)), windows(3, 5, 13))
    assert found.perplexity.value == pytest.approx(13, rel=1e-12)
    assert found.perplexity.error == pytest.approx(0, abs=1e-12)
    assert (found.tokens, found.windows) == (12, 3)


def direct(ours: np.ndarray, theirs: np.ndarray, ids: np.ndarray) -> dict[str, tuple[float, float]]:
    """The same figures by other means: whole arrays, probabilities instead of logarithms, np.cov instead of std."""
    q, p = (np.exp(a[:, :-1].astype(np.float64)) for a in (ours, theirs))
    q, p = q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True)
    hits = np.take_along_axis(np.stack([q, p]), ids[None, :, 1:, None], -1)[..., 0]
    own, other = -np.log(hits).mean(-1)
    right, reference = (hits == np.stack([q, p]).max(-1)).mean(-1)

    def mean(x: np.ndarray) -> tuple[float, float]:
        return x.mean(), float(np.sqrt(np.cov(x) / len(x)))

    def power(x: np.ndarray) -> tuple[float, float]:
        value, error = mean(x)
        return np.exp(value), np.exp(value) * error

    def lost(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
        """The error from variances and covariance: of a ratio, relative ones add up, less what both have in common."""
        ratio, ((v_a, v_ab), (_, v_b)) = a.mean() / b.mean(), np.cov(a, b) / len(a)
        relative = v_a / a.mean() ** 2 + v_b / b.mean() ** 2 - 2 * v_ab / (a.mean() * b.mean())
        return 1 - ratio, ratio * np.sqrt(relative)

    return {
        "kl": mean((p * np.log(p / q)).sum(-1).mean(-1)),
        "top1": mean((q.argmax(-1) == p.argmax(-1)).mean(-1)),
        "perplexity": power(own),
        "reference_perplexity": power(other),
        "ratio": power(own - other),
        "accuracy": mean(right),
        "reference_accuracy": mean(reference),
        "accuracy_loss": lost(right, reference),
    }


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("chunk", [1, 50, 1 << 17])
def test_values_and_standard_errors_against_numpy(monkeypatch, batch, chunk):
    monkeypatch.setattr(quality, "CHUNK", chunk)
    ids = windows(7, 9, 17)
    theirs = random_logits(7, 9, 17, seed=2)
    theirs[:, :-1] += 3 * np.eye(17, dtype=np.float32)[ids[:, 1:]]  # right about half of the time
    ours = theirs + random_logits(7, 9, 17, seed=3, spread=0.7)
    candidate, reference = Written(ours), Written(theirs)
    found = score(candidate, reference, ids, batch=batch)
    for name, (value, error) in direct(ours, theirs, ids).items():
        estimate = getattr(found, name)
        assert estimate.value == pytest.approx(value, rel=1e-12), name
        # The loss's is a difference of larger numbers here.
        assert estimate.error == pytest.approx(error, rel=1e-10 if name == "accuracy_loss" else 1e-12), name
    assert (found.tokens, found.windows) == (56, 7)
    assert candidate.batches == reference.batches and max(candidate.batches) == min(batch, 7)
    alone = perplexity(Written(ours), ids, batch=batch)
    assert alone.perplexity.value == pytest.approx(found.perplexity.value, rel=1e-12)
    assert alone.perplexity.error == pytest.approx(found.perplexity.error, rel=1e-12)


def predicting(ids: np.ndarray, right: list[int]) -> Written:
    """A scorer that foresees the first ``right[i]`` tokens of window i and takes the others for their successors."""
    guesses = np.roll(ids, -1, axis=1)
    for window, count in enumerate(right):
        guesses[window, count:] = (guesses[window, count:] + 1) % 5
    return Written(4 * np.eye(5)[guesses])


def test_accuracy_and_its_loss_by_hand():
    ids = windows(2, 5, 5)
    found = score(predicting(ids, [2, 4]), predicting(ids, [4, 4]), ids)
    assert (found.accuracy.value, found.reference_accuracy.value) == (0.75, 1)
    assert found.accuracy.error == pytest.approx(0.25) and found.reference_accuracy.error == 0
    # r = 3/4; what it leaves of the candidate's 1/2 and 1 is -1/4 and 1/4: sd 1/sqrt(8), over sqrt(2).
    assert found.accuracy_loss.value == 0.25 and found.accuracy_loss.error == pytest.approx(0.25)


def test_what_is_hard_for_both_is_no_uncertainty_of_the_loss():
    ids = windows(6, 5, 5)
    found = score(predicting(ids, [1, 2, 1, 1, 2, 2]), predicting(ids, [2, 4, 2, 2, 4, 4]), ids)
    assert found.accuracy.error > 0.05 and found.reference_accuracy.error > 0.1
    assert (found.accuracy_loss.value, found.accuracy_loss.error, found.accuracy_loss_bound) == (0.5, 0, 0.5)
    # The same accuracies in other windows: the loss is as large, and far less is known of it.
    other = score(predicting(ids, [2, 1, 2, 2, 1, 1]), predicting(ids, [2, 4, 2, 2, 4, 4]), ids)
    assert other.accuracy_loss.value == 0.5 and other.accuracy_loss_bound > 0.7


def test_a_candidate_may_predict_more_than_its_reference():
    ids = windows(4, 5, 5)
    found = score(predicting(ids, [4, 3, 3, 4]), predicting(ids, [4, 2, 3, 3]), ids)
    assert found.accuracy_loss.value == pytest.approx(1 - 14 / 12)
    assert found.accuracy_loss_bound > found.accuracy_loss.value


def test_nothing_can_be_lost_of_nothing():
    ids = windows(4, 5, 5)
    for right in ([0, 0, 0, 0], [1, 0, 0, 2]):
        found = score(predicting(ids, right), predicting(ids, [0] * 4), ids)
        assert found.reference_accuracy.value == 0 and found.accuracy.value == sum(right) / 16
        assert math.isnan(found.accuracy_loss.value) and not math.isfinite(found.accuracy_loss_bound)


def test_the_worst_window_is_named():
    theirs = random_logits(6, 5, 9, seed=4)
    ours = theirs.copy()
    ours[1] += random_logits(1, 5, 9, seed=5, spread=0.1)[0]
    ours[4] += random_logits(1, 5, 9, seed=5, spread=1.0)[0]
    found = score(Written(ours), Written(theirs), windows(6, 5, 9), batch=4)
    assert found.worst_window == 4
    assert found.worst_kl > found.kl.value * 5
    flat = np.zeros((3, 4, 5), np.float32)
    ids = windows(3, 4, 5)
    flat[2, np.arange(3), ids[2, 1:]] = -9  # the window whose tokens come least expected
    assert perplexity(Written(flat), ids).worst_window == 2


def test_an_overflowing_perplexity_is_infinite_and_nothing_else():
    logits = np.zeros((2, 3, 2), np.float32)
    logits[..., 0] = 1e5
    ids = np.ones((2, 3), np.int64)
    found = score(Written(logits), Written(np.zeros((2, 3, 2))), ids)
    assert found.perplexity.value == found.ratio.value == math.inf
    assert found.kl.value == pytest.approx(0.5 * (1e5 + 2 * math.log(0.5)), rel=1e-9)


# --- confidence -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("count", "factor"), [(4, 3.182), (5, 2.776), (6, 2.571), (10, 2.262), (16, 2.131), (30, 2.045), (10**6, 1.960)]
)
def test_the_factor_is_students(count, factor):
    assert confidence_factor(count) == pytest.approx(factor, rel=0.01)
    assert confidence_factor(count) > confidence_factor(count + 1)


def test_too_few_windows_bound_nothing():
    assert confidence_factor(3) == math.inf
    theirs, ours = random_logits(3, 4, 5, seed=0), random_logits(3, 4, 5, seed=1)
    found = score(Written(ours), Written(theirs), windows(3, 4, 5))
    assert found.ratio_bound == math.inf and found.top1_bound == -math.inf
    assert not math.isfinite(found.accuracy_loss_bound)


def test_bounds_are_on_the_side_that_hurts():
    theirs = random_logits(12, 6, 7, seed=2)
    ours = theirs + random_logits(12, 6, 7, seed=3)
    found = score(Written(ours), Written(theirs), windows(12, 6, 7))
    t = 2.201  # Student's 97.5 % quantile at 11 degrees of freedom
    assert found.ratio_bound == pytest.approx(found.ratio.value + t * found.ratio.error, rel=1e-3)
    assert found.top1_bound == pytest.approx(found.top1.value - t * found.top1.error, rel=1e-3)
    loss = found.accuracy_loss
    assert loss.error > 0 and found.accuracy_loss_bound == pytest.approx(loss.value + t * loss.error, rel=1e-3)


@pytest.mark.parametrize(
    ("batch", "budget", "fits"), [(8, 10**9, 8), (8, 2 * 4 * 512 * 1000 * 3 + 5, 3), (8, 0, 1), (1, 10**12, 1)]
)
def test_a_batch_fits_the_budget(batch, budget, fits):
    assert fitting_batch(batch, 512, 1000, budget) == fits


# --- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_logits_that_are_no_numbers(value, side):
    logits = [random_logits(3, 4, 5, seed=0) for _ in range(2)]
    logits[side][2, 1, 3] = value
    ids = windows(3, 4, 5)
    with pytest.raises(NumericalError, match="logits of window 2 are NaN or infinite"):
        score(Written(logits[0]), Written(logits[1]), ids, batch=2)
    with pytest.raises(NumericalError, match="window 2"):
        perplexity(Written(logits[side]), ids, batch=2)


@pytest.mark.parametrize(
    "ids",
    [np.zeros((0, 4), np.int64), np.zeros((2, 1), np.int64), np.zeros(4, np.int64), np.zeros((2, 4), np.int32)],
    ids=["none", "one token", "flat", "int32"],
)
def test_windows_that_predict_nothing(ids):
    scorer = Written(np.zeros((2, 4, 3)))
    for call in (lambda: score(scorer, scorer, ids), lambda: perplexity(scorer, ids)):
        with pytest.raises(UsageError, match="at least one window of at least 2 tokens"):
            call()
    assert scorer.batches == []


def test_scorers_that_do_not_fit_each_other():
    ids = windows(2, 4, 5)
    with pytest.raises(UsageError, match="the candidate predicts 5 tokens, the reference 6"):
        score(Written(np.zeros((2, 4, 5))), Written(np.zeros((2, 4, 6))), ids)
    with pytest.raises(UsageError, match=r"Written gave logits \(2, 1, 5\) for tokens \(2, 4\)"):
        score(Written(np.zeros((2, 1, 5))), Written(np.zeros((2, 4, 5))), ids)
    with pytest.raises(UsageError, match="batch must be at least 1, got 0"):
        perplexity(Written(np.zeros((2, 4, 5))), ids, batch=0)


def test_progress_counts_windows():
    heard: list[tuple[int, int]] = []
    logits = np.zeros((5, 3, 4))
    score(Written(logits), Written(logits), windows(5, 3, 4), batch=2, progress=lambda *at: heard.append(at))
    assert heard == [(2, 5), (4, 5), (5, 5)]


# --- scorers over real models -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_float_reference_has_the_loss_of_transformers(name):
    model = build(CASE[name])
    ids = windows(3, 23)
    for row in ids:
        with torch.inference_mode():
            loss = float(model(torch.from_numpy(row[None]), labels=torch.from_numpy(row[None])).loss)
        found = perplexity(ModelScorer(model), row[None])
        # transformers' mean is float32, over logits of size 10
        assert math.log(found.perplexity.value) == pytest.approx(loss, rel=1e-5)


def test_the_float_reference_runs_in_eval_mode_and_takes_plain_models():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(VOCAB, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, VOCAB)).train()
    ids = windows(2, 6)
    first, second = (ModelScorer(model).logits(ids) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (2, 6, VOCAB) and first.dtype == np.float32
    assert ModelScorer(NanoDecoder()).logits(ids).shape == (2, 6, VOCAB)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    # float32 sums in another order; logits of size 10
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * max(1.0, float(np.abs(expected).max()) / 10))


def refuses_what_does_not_fit(scorer: quality.Scorer, vocab: int = VOCAB, context: int | None = CONTEXT) -> None:
    over, below = windows(2, 5, vocab), windows(2, 5, vocab)
    over[1, 3], below[0, 0] = vocab, -1
    for ids in (over, below):
        with pytest.raises(UsageError, match=f"the model knows 0 to {vocab - 1}"):
            perplexity(scorer, ids)
    if context is not None:
        with pytest.raises(UsageError, match=f"windows of {context + 1} tokens exceed the model's context of"):
            perplexity(scorer, windows(1, context + 1, vocab))


def check_all_ways(model: torch.nn.Module) -> None:
    ids = windows(3, 29)
    expected = ModelScorer(model).logits(ids)
    program = capture(model)
    close(ProgramScorer(program).logits(ids), expected)
    refuses_what_does_not_fit(ProgramScorer(program))
    refuses_what_does_not_fit(ModelScorer(model), context=None)  # a model may read on beyond what it was made for
    slot = CacheSlot(layer=0, kv_heads=2, head_dim=16, value_dim=16)
    with pytest.raises(UsageError, match="has a cache of 1 slots, scoring it needs one without"):
        ProgramScorer(dataclasses.replace(program, slots=(slot,)))
    found = {}
    for logits in ("all", "last"):
        with optimize(model, "fp32", logits=logits, verify=False, threads=1) as compiled:
            assert compiled.engine.all_logits == (logits == "all")
            scorer = EngineScorer(compiled.engine)
            found[logits] = scorer.logits(ids)
            close(found[logits], expected)
            # Another shape, then the same again: nothing of the windows before is left in the cache.
            close(scorer.logits(ids[:1, :5]), expected[:1, :5])
            close(scorer.logits(ids), found[logits])
            whole = score(scorer, ModelScorer(model), ids, batch=2)
            assert 0 <= whole.kl.value < 1e-8 and whole.top1.value == 1
            assert whole.ratio.value == pytest.approx(1, abs=1e-5)
            assert perplexity(scorer, windows(1, CONTEXT)).tokens == CONTEXT - 1
            refuses_what_does_not_fit(scorer)
    close(found["all"], found["last"])


def test_whole_windows_and_single_tokens_agree_with_the_model():
    # One layer, for speed, that forgets what is more than 8 tokens back.
    check_all_ways(build(Case("mistral", {"sliding_window": WINDOW, "num_hidden_layers": 1})))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "falcon", "gemma3_text"])
def test_other_architectures_agree_too(name):
    """gpt2 reads positions outside attention, falcon has one kv head, gemma3 both kinds of attention."""
    check_all_ways(build(CASE[name]))


def test_an_altered_weight_shows():
    """The negative control: what scores as equal above would not if a single projection were off by 5 %."""
    model, altered = build(CASE["llama"]), build(CASE["llama"])
    with torch.no_grad():
        altered.model.layers[1].mlp.down_proj.weight.mul_(1.05)
    ids = windows(6, 23)
    found = score(ModelScorer(altered), ModelScorer(model), ids)
    assert found.kl.value > 1e-4 and found.kl.value > 5 * found.kl.error
    assert found.ratio.value != 1


class Echo:
    """An engine that keeps its output buffer, as ONNX Runtime's does, and predicts the token it was fed."""

    name, slots, all_logits, storage = "echo", (), False, HOST
    spec = ModelSpec(
        layers=1, heads=1, kv_heads=1, head_dim=4, hidden=4, vocab=6, context=9, tied=True, parameters=1,
        architecture="Echo",
    )  # fmt: skip

    def __init__(self) -> None:
        self.buffer = np.zeros((0, 1, 6), np.float32)

    def step(self, tokens: np.ndarray, cache) -> np.ndarray:
        if len(self.buffer) != len(tokens):
            self.buffer = np.zeros((len(tokens), 1, 6), np.float32)
        self.buffer[:] = np.eye(6, dtype=np.float32)[tokens]
        return self.buffer

    def close(self) -> None: ...


def test_an_engine_may_reuse_its_buffer():
    ids = windows(3, 9, 6)
    logits = EngineScorer(Echo()).logits(ids)
    np.testing.assert_array_equal(logits.argmax(-1), ids)
    found = score(EngineScorer(engine := Echo()), EngineScorer(engine), ids)
    assert found.kl.value == 0
