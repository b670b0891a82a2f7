"""ModelDrafter: drafts are the drafting model's own tokens, and no cache is ever out of step with the text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from ryzen_compile.errors import MemoryLimitError, NumericalError, UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.layout import droppable
from ryzen_compile.runtime.pool import CachePool
from ryzen_compile.runtime.sampling import SamplingParams, distribution
from ryzen_compile.runtime.speculative.drafter import Drafter
from ryzen_compile.runtime.speculative.model_drafter import ModelDrafter
from ryzen_compile.spec import CacheSlot
from tests.runtime.torch_engine import BOS, CONTEXT, SLOT, VOCAB, TableEngine, TorchEngine, spec, tiny_llama

GREEDY = SamplingParams()
PROMPT = [BOS, 11, 40, 7, 63, 22, 9]
UNUSED = KVCache([SLOT], 1, 1)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def engine(model: LlamaForCausalLM) -> TorchEngine:
    return TorchEngine(model, all_logits=False)


@pytest.fixture
def pool() -> CachePool:
    return CachePool([SLOT], limit=CONTEXT)


def own(
    engine: Any, pool: CachePool, sampling: SamplingParams = GREEDY, seed: int = 0, **settings: Any
) -> ModelDrafter:
    """A draft model that has begun and never stops on its own."""
    drafter = ModelDrafter("draft_model", engine, pool, **({"threshold": 0.0} | settings))
    drafter.begin(sampling, None if sampling.greedy else np.random.default_rng(seed), UNUSED)
    return drafter


def array(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, dtype=np.int64)


def continued(model: LlamaForCausalLM, text: list[int], count: int, **arguments: Any) -> list[int]:
    """What follows ``text``, from transformers."""
    ids = torch.tensor([text])
    result = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **arguments)
    return result[0, len(text) :].tolist()


def stepped(engine: TorchEngine) -> int:
    return sum(count for _, count in engine.steps)


def table_of(rows: dict[int, dict[int, float]], vocab: int = 8) -> TableEngine:
    """Behind a token come others with these probabilities; the rest is shared alike."""
    table = np.zeros((vocab, vocab))
    for token in range(vocab):
        given = rows.get(token, {})
        table[token] = (1 - sum(given.values())) / (vocab - len(given))
        for following, probability in given.items():
            table[token, following] = probability
    return TableEngine(np.log(table + 1e-30))


# A model of its own


@pytest.mark.parametrize("most", [1, 2, 5, 16])
@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_greedy_drafts_equal_transformers(
    model: LlamaForCausalLM, engine: TorchEngine, pool: CachePool, most: int, chunk: int
) -> None:
    draft = own(engine, pool, chunk=chunk).draft(array(PROMPT), most)
    assert draft is not None and draft.proposals is None
    assert draft.tokens == continued(model, PROMPT, most)
    assert max(count for _, count in engine.steps) <= chunk


def test_the_row_follows_the_text_whatever_was_accepted(
    model: LlamaForCausalLM, engine: TorchEngine, pool: CachePool
) -> None:
    drafter, text = own(engine, pool), list(PROMPT)
    generator = np.random.default_rng(3)
    while len(text) < 48:
        draft = drafter.draft(array(text), 5)
        assert draft is not None and draft.tokens == continued(model, text, 5)
        accepted = int(generator.integers(0, 6))
        drafter.observe(accepted)
        # The target's own token behind what was accepted, and, as drafting is skipped at times, some more.
        more = generator.integers(3, VOCAB, int(generator.choice([1, 1, 4]))).tolist()
        text += [*draft.tokens[:accepted], *more]


def test_what_was_accepted_is_not_stepped_again(engine: TorchEngine, pool: CachePool) -> None:
    drafter = own(engine, pool)
    first = drafter.draft(array(PROMPT), 4)
    assert first is not None and stepped(engine) == len(PROMPT) + 3
    engine.steps.clear()
    # All four were accepted: the last of them was never stepped, nor was the target's token behind it.
    second = drafter.draft(array([*PROMPT, *first.tokens, 50]), 4)
    assert second is not None and engine.steps == [(1, 2), *[(1, 1)] * 3]
    engine.steps.clear()
    # One of four was accepted.
    text = [*PROMPT, *first.tokens, 50, second.tokens[0], 96 if second.tokens[1] != 96 else 95]
    assert drafter.draft(array(text), 1) is not None and engine.steps == [(1, 1)]
    engine.steps.clear()
    # Asked again with the same text: the last token's logits were not kept.
    assert drafter.draft(array(text), 1) is not None and engine.steps == [(1, 1)]


def test_skipped_tokens_are_caught_up_in_one_step(
    model: LlamaForCausalLM, engine: TorchEngine, pool: CachePool
) -> None:
    drafter = own(engine, pool)
    drafter.draft(array(PROMPT), 2)
    engine.steps.clear()
    text = [*PROMPT, *range(20, 50)]
    draft = drafter.draft(array(text), 1)
    assert draft is not None and draft.tokens == continued(model, text, 1)
    assert engine.steps == [(1, 30)]


def test_a_repetition_penalty_acts_on_text_and_draft(
    model: LlamaForCausalLM, engine: TorchEngine, pool: CachePool
) -> None:
    for penalty in (1.7, 0.6):
        params = SamplingParams(repetition_penalty=penalty)
        draft = own(engine, pool, params).draft(array(PROMPT), 20)
        assert draft is not None and draft.tokens == continued(model, PROMPT, 20, repetition_penalty=penalty)


def test_the_context_bounds_a_draft(model: LlamaForCausalLM, engine: TorchEngine, pool: CachePool) -> None:
    text = [BOS, *np.random.default_rng(0).integers(3, VOCAB, CONTEXT).tolist()]
    drafter = own(engine, pool)
    for held, count in ((CONTEXT - 2, 3), (CONTEXT - 1, 2), (CONTEXT, 1)):
        draft = drafter.draft(array(text[:held]), 8)
        assert draft is not None and len(draft.tokens) == count
        assert draft.tokens[0] == model(torch.tensor([text[:held]])).logits[0, -1].argmax()
    assert drafter.draft(array(text[: CONTEXT + 1]), 8) is None
    assert own(engine, pool).draft(array(text[: CONTEXT + 1]), 8) is None


def test_the_row_is_borrowed_once_grows_and_is_given_back(engine: TorchEngine) -> None:
    pool = CachePool([SLOT], limit=CONTEXT, chunk=1)
    drafter = own(engine, pool)
    assert pool.memory().live == 0
    sizes = set()
    for held in range(2, 40):
        drafter.draft(array([BOS] * held), 2)
        sizes.add(pool.memory().live)
        assert len(pool._live) == 1
    assert 1 < len(sizes) < 12, "it grows, and not with every token"
    drafter.end()
    assert pool.memory().live == 0 and pool.memory().idle > 0
    drafter.end()
    # The next sequence takes what was given back, and nothing of its tokens.
    drafter.begin(GREEDY, None, UNUSED)
    engine.steps.clear()
    drafter.draft(array([BOS] * 5), 1)
    assert engine.steps == [(1, 5)] and pool.memory().idle == 0


def test_begin_gives_back_what_a_sequence_without_end_held(engine: TorchEngine, pool: CachePool) -> None:
    drafter = own(engine, pool)
    drafter.draft(array(PROMPT), 2)
    drafter.begin(GREEDY, None, UNUSED)
    assert pool.memory().live == 0
    drafter.draft(array(PROMPT[:3]), 1)
    assert engine.steps[-1] == (1, 3)


def test_a_budget_that_is_too_small_is_refused(engine: TorchEngine) -> None:
    drafter = own(engine, CachePool([SLOT], limit=CONTEXT, budget_bytes=8))
    with pytest.raises(MemoryLimitError):
        drafter.draft(array(PROMPT), 2)


# When it stops, how sure it is


def test_ends_behind_a_token_that_is_improbable(pool: CachePool) -> None:
    engine = table_of({1: {2: 0.9}, 2: {3: 0.5}, 3: {4: 0.39}, 4: {5: 0.9}})
    draft = own(engine, pool, threshold=0.4).draft(array([1]), 8)
    assert draft is not None and draft.tokens == [2, 3, 4]
    draft = own(engine, pool, threshold=0.38).draft(array([1]), 4)
    assert draft is not None and draft.tokens == [2, 3, 4, 5]
    draft = own(engine, pool, threshold=0.4).draft(array([3]), 8)
    assert draft is not None and draft.tokens == [4]
    draft = ModelDrafter.draft_model(engine, pool).draft(array([3]), 8)
    assert draft is not None and draft.tokens == [4], "0.4 unless said otherwise"


def test_the_probability_is_that_of_plain_logits(pool: CachePool) -> None:
    engine = table_of({1: {2: 0.6}, 2: {1: 0.6}})
    cold = SamplingParams(do_sample=True, temperature=0.01)
    draft = own(engine, pool, cold, threshold=0.61).draft(array([1]), 8)
    assert draft is not None and draft.tokens == [2]
    draft = own(engine, pool, cold, threshold=0.59).draft(array([1]), 4)
    assert draft is not None and draft.tokens == [2, 1, 2, 1]


@pytest.mark.parametrize(
    ("probability", "confidence"),
    [(0.13, 0), (0.2, 1), (0.4, 2), (0.5, 3), (0.7, 4), (0.8, 5), (0.95, 6), (0.98, 7)],
)
def test_confidence_is_the_highest_probability_of_the_first_token(
    pool: CachePool, probability: float, confidence: int
) -> None:
    engine = table_of({1: {2: probability}, 2: {3: 0.99}}, vocab=11)
    draft = own(engine, pool).draft(array([1]), 3)
    assert draft is not None and draft.confidence == confidence
    # It says nothing of the token that was drawn, or dropping unsure drafts would change what is drawn.
    params = SamplingParams(do_sample=True)
    drafts = [own(engine, pool, params, seed).draft(array([1]), 1) for seed in range(40)]
    assert {draft.confidence for draft in drafts if draft} == {confidence}
    assert len({draft.tokens[0] for draft in drafts if draft}) > 1 or probability > 0.9


# Drawn tokens


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(do_sample=True),
        SamplingParams(do_sample=True, temperature=0.5, top_k=20, top_p=0.9, min_p=0.01),
        SamplingParams(do_sample=True, temperature=2.0, repetition_penalty=1.4),
    ],
    ids=str,
)
def test_proposals_are_what_tokens_were_drawn_from(
    model: LlamaForCausalLM, engine: TorchEngine, pool: CachePool, params: SamplingParams
) -> None:
    draft = own(engine, pool, params).draft(array(PROMPT), 6)
    assert draft is not None and draft.proposals is not None and len(draft.proposals) == len(draft.tokens) == 6
    text = list(PROMPT)
    for token, (ids, probabilities) in zip(draft.tokens, draft.proposals, strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([text])).logits[0, -1].numpy().copy()
        seen = sorted(set(text))
        if params.repetition_penalty != 1:
            penalised = np.where(scores < 0, scores * params.repetition_penalty, scores / params.repetition_penalty)
            scores[seen] = penalised[seen]
        expected_ids, expected = distribution(scores.astype(np.float32), params)
        np.testing.assert_array_equal(ids, expected_ids)
        # Steps of one token and of several sum in another order.
        np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-7)
        assert token in ids and probabilities.dtype == np.float64
        text.append(token)


def test_tokens_are_drawn_by_their_proposals(pool: CachePool) -> None:
    expected = np.array([0.05, 0.3, 0.15, 0.5])
    engine = TableEngine(np.log(np.tile(expected, (4, 1))))
    drafter = own(engine, pool, SamplingParams(do_sample=True), seed=1)
    drawn = np.zeros(4)
    for _ in range(1000):
        draft = drafter.draft(array([1]), 4)
        assert draft is not None
        drawn += np.bincount(draft.tokens, minlength=4)
    # 4000 draws; 16.3 is the 0.999 quantile of chi-square with 3 degrees of freedom.
    assert ((drawn - 4000 * expected) ** 2 / (4000 * expected)).sum() < 16.3


def test_drawing_needs_a_generator(engine: TorchEngine, pool: CachePool) -> None:
    with pytest.raises(UsageError, match="'draft_model' has to draw tokens and got no generator"):
        ModelDrafter.draft_model(engine, pool).begin(SamplingParams(do_sample=True), None, UNUSED)
    ModelDrafter.draft_model(engine, pool).begin(SamplingParams(do_sample=True, temperature=0.0), None, UNUSED)


# On the target's row


def held_row(engine: TorchEngine, text: list[int], capacity: int = CONTEXT) -> KVCache:
    """The target's row when a draft is asked for: all of the text but its last token."""
    row = KVCache([SLOT], 1, capacity, limit=CONTEXT)
    engine.step(array(text[:-1])[None], row)
    row.advance(len(text) - 1)
    return row


def exiting(engine: Any, row: KVCache, sampling: SamplingParams = GREEDY) -> ModelDrafter:
    drafter = ModelDrafter.early_exit(engine, threshold=0.0)
    drafter.begin(sampling, None if sampling.greedy else np.random.default_rng(0), row)
    return drafter


@pytest.mark.parametrize("most", [1, 2, 7])
def test_early_exit_steps_on_the_row_and_leaves_it_as_it_was(
    model: LlamaForCausalLM, engine: TorchEngine, most: int
) -> None:
    row = held_row(engine, PROMPT)
    before = row.keys[0][:, :, : len(PROMPT) - 1].copy()
    drafter = exiting(engine, row)
    engine.steps.clear()
    for _ in range(2):
        draft = drafter.draft(array(PROMPT), most)
        assert draft is not None and draft.tokens == continued(model, PROMPT, most)
        assert row.lengths[0] == len(PROMPT) - 1
        np.testing.assert_array_equal(row.keys[0][:, :, : len(PROMPT) - 1], before)
    assert engine.steps == [(1, 1)] * most * 2, "the target has stepped the text"
    drafter.end()
    with pytest.raises(UsageError, match="outside of a sequence"):
        drafter.draft(array(PROMPT), 1)


def test_early_exit_drafts_no_more_than_the_row_has_room_for(engine: TorchEngine) -> None:
    for spare in (0, 1, 3):
        row = held_row(engine, PROMPT, capacity=len(PROMPT) - 1 + spare)
        draft = exiting(engine, row).draft(array(PROMPT), 8)
        assert (0 if draft is None else len(draft.tokens)) == spare


@pytest.mark.parametrize("form", ["own", "target"])
@pytest.mark.parametrize("failure", ["raises", "nan", "inf"])
def test_after_an_error_no_row_is_out_of_step(
    engine: TorchEngine, pool: CachePool, form: str, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = held_row(engine, PROMPT)
    drafter = own(engine, pool) if form == "own" else exiting(engine, row)
    good = drafter.draft(array(PROMPT), 4)
    step, steps = engine.step, []

    def broken(tokens: np.ndarray, cache: KVCache, last: int = 1) -> np.ndarray:
        steps.append(tokens)
        logits = step(tokens, cache, last).copy()
        if len(steps) == 3:
            if failure == "raises":
                raise OSError("gone")
            logits[0, -1, 5] = float(failure)
        return logits

    monkeypatch.setattr(engine, "step", broken)
    with pytest.raises(OSError if failure == "raises" else NumericalError):
        drafter.draft(array(PROMPT), 4)
    monkeypatch.undo()
    assert row.lengths[0] == len(PROMPT) - 1
    assert drafter.draft(array(PROMPT), 4) == good
    drafter.end()
    assert pool.memory().live == 0


# Layers that forget


@pytest.mark.parametrize("form", ["own", "target"])
def test_a_window_is_never_asked_for_what_it_dropped(form: str) -> None:
    window = CacheSlot(layer=0, kv_heads=1, head_dim=1, value_dim=1, window=9)
    engine = TableEngine(np.eye(8))
    engine.spec = spec(vocab=8, context=400)
    pool, row = CachePool([window], limit=400), KVCache([window], 1, 400)
    drafter = own(engine, pool) if form == "own" else exiting(engine, row)
    lengths = []
    for held in range(1, 120):
        row.lengths[0] = held - 1
        draft = drafter.draft(array([3] * held), 6)
        count = 0 if draft is None else len(draft.tokens)
        lengths.append(count)
        assert row.lengths[0] == held - 1
        # Not cut short without a reason: one token more could not be taken back.
        assert count == 6 or droppable(window, held + count) < count + 1
    assert lengths.count(6) > 60 and 0 in lengths


@pytest.mark.parametrize("settings", [{"threshold": -0.1}, {"threshold": 1.5}, {"chunk": 0}])
def test_settings_out_of_range_are_refused(engine: TorchEngine, pool: CachePool, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="a threshold from 0 to 1 and a chunk >= 1, got"):
        ModelDrafter("draft_model", engine, pool, **settings)


def test_is_a_drafter(engine: TorchEngine, pool: CachePool) -> None:
    drafters: list[Drafter] = [ModelDrafter.draft_model(engine, pool), ModelDrafter.early_exit(engine)]
    assert [(drafter.name, drafter.cost) for drafter in drafters] == [("draft_model", "steps"), ("early_exit", "steps")]
