"""generate: token for token what transformers generates, and the same however the work is cut up."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM, TextStreamer
from transformers.generation.logits_process import SuppressTokensLogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria

from ryzen_compile.errors import MemoryLimitError, NumericalError, PromptError
from ryzen_compile.numerics.row_shift import RowShift
from ryzen_compile.numerics.rows import RowFormat
from ryzen_compile.runtime.arguments import ACCEPTED, config_values
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.generate import GenerationStats, _part, generate
from ryzen_compile.runtime.stream import Stream
from tests.runtime.torch_engine import (
    BOS,
    CONTEXT,
    EOS,
    PAD,
    VOCAB,
    TableEngine,
    TorchEngine,
    tiny_llama,
    tiny_tokenizer,
)

TOKENIZER = tiny_tokenizer()
PROMPT = [BOS, 11, 40, 7, 63, 22, 9]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def engine(model: LlamaForCausalLM) -> TorchEngine:
    return TorchEngine(model)


def reference(model: LlamaForCausalLM, ids: Any, mask: Any = None, **arguments: Any) -> np.ndarray:
    ids = torch.tensor(ids)
    mask = torch.ones_like(ids) if mask is None else torch.tensor(mask)
    return model.generate(ids, attention_mask=mask, **arguments).numpy()


def left_padded(*prompts: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    return (
        [[PAD] * count + prompt for count, prompt in zip(pads, prompts, strict=True)],
        [[0] * count + [1] * len(prompt) for count, prompt in zip(pads, prompts, strict=True)],
    )


BATCH, MASK = left_padded(PROMPT, [BOS, 33], [BOS, 5, 80, 41])


def greedy_tokens(model: LlamaForCausalLM, count: int = 24) -> list[int]:
    """What follows PROMPT, from transformers; tests take EOS ids and stop strings from it."""
    return reference(model, [PROMPT], max_new_tokens=count)[0, len(PROMPT) :].tolist()


# Identity with transformers


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 40},
        {"max_length": 30},
        {},
        {"max_new_tokens": 1},
        {"max_new_tokens": 30, "repetition_penalty": 1.7},
        {"max_new_tokens": 30, "repetition_penalty": 0.6},
        {"max_new_tokens": 12, "do_sample": True, "top_k": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("batched", [False, True], ids=["one", "padded batch"])
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")  # transformers', for the case without arguments
def test_tokens_equal_transformers(model: LlamaForCausalLM, engine: TorchEngine, arguments: Any, batched: bool) -> None:
    ids, mask = (BATCH, MASK) if batched else ([PROMPT], None)
    result = generate(engine, ids, mask, pad_token_id=PAD, **arguments)
    np.testing.assert_array_equal(result, reference(model, ids, mask, pad_token_id=PAD, **arguments))
    assert result.dtype == np.int64


@pytest.mark.parametrize("minimum", [0, 4, 11])
@pytest.mark.parametrize("pad", [PAD, None])
def test_eos_and_min_new_tokens_equal_transformers(
    model: LlamaForCausalLM, engine: TorchEngine, minimum: int, pad: int | None
) -> None:
    rows = reference(model, BATCH, MASK, max_new_tokens=20)[:, len(PROMPT) :]
    eos = [int(rows[0, 3]), int(rows[1, 6])]
    arguments = {"max_new_tokens": 20, "eos_token_id": eos, "min_new_tokens": minimum, "pad_token_id": pad}
    result = generate(engine, BATCH, MASK, **arguments)
    np.testing.assert_array_equal(result, reference(model, BATCH, MASK, **arguments))
    if pad is None and not minimum:
        assert (result[:, -1] == eos[0]).any(), "a row that ended early is filled with the first EOS"


def test_eos_ends_the_run_early(model: LlamaForCausalLM, engine: TorchEngine) -> None:
    tokens = greedy_tokens(model)
    end = tokens[5]
    expected = tokens[: tokens.index(end) + 1]
    assert generate(engine, [PROMPT], eos_token_id=end, max_new_tokens=24)[0, len(PROMPT) :].tolist() == expected
    config = GenerationConfig(eos_token_id=end, max_new_tokens=24)
    assert generate(engine, [PROMPT], generation_config=config)[0, len(PROMPT) :].tolist() == expected
    # None switches a config's EOS off.
    result = generate(engine, [PROMPT], generation_config=config, eos_token_id=None)
    assert result[0, len(PROMPT) :].tolist() == tokens


@pytest.mark.parametrize("eos", [None, EOS])
def test_stop_strings_equal_transformers(model: LlamaForCausalLM, engine: TorchEngine, eos: int | None) -> None:
    rows = reference(model, BATCH, MASK, max_new_tokens=20, pad_token_id=PAD)[:, len(PROMPT) :]
    # Strings that span two tokens of two of the rows.
    stops = [TOKENIZER.decode(rows[0, 4:6].tolist())[1:], TOKENIZER.decode(rows[2, 8:10].tolist())]
    # Without EOS, transformers does not fill finished rows, so there this loop is not given a pad token.
    arguments = {"max_new_tokens": 20, "stop_strings": stops, "eos_token_id": eos, "tokenizer": TOKENIZER}
    expected = reference(model, BATCH, MASK, pad_token_id=PAD, **arguments)
    assert expected.shape[1] > len(PROMPT) + 4
    result = generate(engine, BATCH, MASK, pad_token_id=None if eos is None else PAD, **arguments)
    np.testing.assert_array_equal(result, expected)
    single = generate(engine, [PROMPT], **arguments)
    np.testing.assert_array_equal(single, reference(model, [PROMPT], pad_token_id=PAD, **arguments))
    assert len(PROMPT) < single.shape[1] < len(PROMPT) + 20


def test_processors_and_criteria_equal_transformers(model: LlamaForCausalLM, engine: TorchEngine) -> None:
    tokens = greedy_tokens(model)
    processors: list[Callable[..., torch.Tensor]] = [SuppressTokensLogitsProcessor(tokens[:3])]
    free = reference(model, [PROMPT], max_new_tokens=20, logits_processor=processors)
    np.testing.assert_array_equal(generate(engine, PROMPT, max_new_tokens=20, logits_processor=processors), free)
    assert not set(free[0, len(PROMPT) :].tolist()) & set(tokens[:3])
    criteria = [EosTokenCriteria(int(free[0, len(PROMPT) + 7]))]
    arguments: dict[str, Any] = {
        "max_new_tokens": 20,
        "logits_processor": processors,
        "stopping_criteria": criteria,
        "eos_token_id": EOS,
    }
    expected = reference(model, [PROMPT], **arguments)
    assert expected.shape[1] <= len(PROMPT) + 8
    np.testing.assert_array_equal(generate(engine, PROMPT, **arguments), expected)


def test_without_a_mask_the_pad_token_marks_padding_as_in_transformers(
    model: LlamaForCausalLM, engine: TorchEngine
) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 9, "pad_token_id": PAD, "eos_token_id": EOS}
    expected = model.generate(torch.tensor(BATCH), **arguments).numpy()
    np.testing.assert_array_equal(generate(engine, BATCH, **arguments), expected)


def test_default_top_k_is_the_one_of_transformers(engine: TorchEngine) -> None:
    flat = TableEngine(np.tile(np.linspace(0, 0.1, VOCAB), (VOCAB, 1)))
    tokens = generate(flat, [[1]], do_sample=True, seed=0, max_new_tokens=63)[0, 1:]
    assert tokens.min() >= VOCAB - 50
    tokens = generate(flat, [[1]], do_sample=True, seed=0, max_new_tokens=63, top_k=None)[0, 1:]
    assert tokens.min() < VOCAB - 50


# Metamorphic relations


@pytest.mark.parametrize("chunk", [1, 3, 7, 512])
@pytest.mark.parametrize("all_logits", [True, False])
def test_chunked_prefill_changes_nothing(model: LlamaForCausalLM, chunk: int, all_logits: bool) -> None:
    engine = TorchEngine(model, all_logits=all_logits)
    result = generate(engine, BATCH, MASK, max_new_tokens=10, prefill_chunk_size=chunk)
    np.testing.assert_array_equal(result, reference(model, BATCH, MASK, max_new_tokens=10))
    prefills = [count for batch, count in engine.steps if batch == 1]
    assert max(prefills) == min(chunk, len(PROMPT)) and sum(prefills) == sum(map(sum, MASK))


@pytest.mark.parametrize("sampled", [False, True])
def test_a_batch_equals_its_rows(engine: TorchEngine, sampled: bool) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 15, "repetition_penalty": 1.2, "do_sample": sampled, "seed": 5}
    together = generate(engine, BATCH, MASK, **arguments)
    for order in ([0, 1, 2], [2, 0, 1]):
        result = generate(engine, [BATCH[row] for row in order], [MASK[row] for row in order], **arguments)
        if not sampled:
            np.testing.assert_array_equal(result, together[order])
    alone = [generate(engine, [row[row.index(BOS) :]], **arguments)[0, -15:] for row in BATCH]
    np.testing.assert_array_equal(alone[0], together[0, -15:])
    if not sampled:  # row b of a batch draws from the b-th stream of the seed
        np.testing.assert_array_equal(np.stack(alone), together[:, -15:])


def test_rows_that_finish_leave_the_others_alone(model: LlamaForCausalLM, engine: TorchEngine) -> None:
    free = generate(engine, BATCH, MASK, max_new_tokens=15)
    end = int(free[1, len(PROMPT) + 2])
    cut = generate(engine, BATCH, MASK, max_new_tokens=15, eos_token_id=end, pad_token_id=PAD)
    for before, after in zip(free, cut, strict=True):
        new = before[len(PROMPT) :].tolist()
        kept = new.index(end) + 1 if end in new else len(new)
        assert after[len(PROMPT) : len(PROMPT) + kept].tolist() == new[:kept]
        assert (after[len(PROMPT) + kept :] == PAD).all()


def test_more_padding_changes_nothing(engine: TorchEngine) -> None:
    expected = generate(engine, [PROMPT], max_new_tokens=8)[0]
    for count in (1, 5, 40):
        mask = [[0] * count + [1] * len(PROMPT)]
        result = generate(engine, [[PAD] * count + PROMPT], mask, max_new_tokens=8)
        assert result[0, count:].tolist() == expected.tolist()


def test_padding_is_not_repetition(model: LlamaForCausalLM, engine: TorchEngine) -> None:
    wanted = int(reference(model, [PROMPT], max_new_tokens=1, repetition_penalty=50.0)[0, -1])
    ids, mask = [[wanted] * 4 + PROMPT], [[0] * 4 + [1] * len(PROMPT)]
    result = generate(engine, ids, mask, max_new_tokens=8, repetition_penalty=50.0)
    assert result[0, -8] == wanted
    np.testing.assert_array_equal(result, reference(model, ids, mask, max_new_tokens=8, repetition_penalty=50.0))


def test_generation_can_be_continued(engine: TorchEngine) -> None:
    whole = generate(engine, [PROMPT], max_new_tokens=20)
    part = generate(engine, [PROMPT], max_new_tokens=9)
    np.testing.assert_array_equal(generate(engine, part, max_new_tokens=11), whole)


def test_growing_the_cache_in_the_middle_changes_nothing(
    model: LlamaForCausalLM, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ryzen_compile.runtime.generate.INITIAL_ROOM", 0)
    caches: list[KVCache] = []
    capacities: list[int] = []

    class Stingy(KVCache):
        def __init__(self, *layout: Any, **options: Any) -> None:
            super().__init__(*layout, **{**options, "chunk": 3})
            caches.append(self)

        def advance(self, tokens: int) -> None:
            super().advance(tokens)
            capacities.append(self.capacity)

    monkeypatch.setattr("ryzen_compile.runtime.pool.KVCache", Stingy)
    result = generate(engine, BATCH, MASK, max_new_tokens=30)
    np.testing.assert_array_equal(result, reference(model, BATCH, MASK, max_new_tokens=30))
    assert len(caches) == 1 and len(set(capacities)) > 2, "the cache grew more than once while it held tokens"
    assert max(capacities) <= len(PROMPT) + 29 + 2, "no more than a chunk beyond what the run needs"


# Sampling


def test_the_same_seed_gives_the_same_text(engine: TorchEngine) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 20, "do_sample": True, "temperature": 2.0}
    first = generate(engine, [PROMPT], seed=1, **arguments)
    np.testing.assert_array_equal(first, generate(engine, [PROMPT], seed=1, **arguments))
    assert (first != generate(engine, [PROMPT], seed=2, **arguments)).any()
    assert (generate(engine, [PROMPT], **arguments) != generate(engine, [PROMPT], **arguments)).any()


def test_sequences_of_one_prompt_are_prefilled_once_and_differ(engine: TorchEngine) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0, "seed": 3}
    result = generate(engine, BATCH, MASK, num_return_sequences=3, **arguments)
    assert result.shape == (9, len(PROMPT) + 12)
    np.testing.assert_array_equal(result[:, : len(PROMPT)], np.repeat(BATCH, 3, axis=0))
    assert len({tuple(row) for row in result[:3].tolist()}) == 3
    assert sum(count for batch, count in engine.steps if batch == 1) == sum(map(sum, MASK))
    np.testing.assert_array_equal(generate(engine, [PROMPT], **arguments), result[:1])


def test_first_tokens_follow_the_models_distribution() -> None:
    scores = np.random.default_rng(0).standard_normal((12, 12))
    engine = TableEngine(scores)
    rows = 4000
    tokens = generate(engine, np.full((rows, 1), 4), do_sample=True, seed=0, max_new_tokens=2, top_k=0)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    joint = weights[4][:, None] * weights * rows
    observed = np.zeros((12, 12))
    np.add.at(observed, (tokens[:, 1], tokens[:, 2]), 1)
    common = joint >= 5
    statistic = ((observed - joint)[common] ** 2 / joint[common]).sum()
    freedom = common.sum()
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("arguments", [{"do_sample": False}, {"do_sample": True, "temperature": 0}])
def test_temperature_zero_is_greedy(model: LlamaForCausalLM, engine: TorchEngine, arguments: dict[str, Any]) -> None:
    assert generate(engine, [PROMPT], max_new_tokens=24, **arguments)[0, 7:].tolist() == greedy_tokens(model)


# Streams (exactness with moved keys: test_stream.py)


@pytest.mark.parametrize(("window", "sinks"), [(8, 3), (20, 0), (1, 1)])
@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_a_stream_is_the_model_on_what_is_kept(
    model: LlamaForCausalLM, engine: TorchEngine, window: int, sinks: int, chunk: int
) -> None:
    """The engine's cache holds the kept tokens themselves and counts positions from its first row."""
    stream = Stream(window, sinks, (RowShift(RowFormat(), 1, np.empty(0)),))
    prompt = np.random.default_rng(5).integers(3, VOCAB, 2 * CONTEXT).tolist()
    kept: list[int] = []
    chunk = min(chunk, stream.slack)
    tokens, new = prompt, []
    while len(new) < 2 * CONTEXT:
        for begin in range(0, len(tokens), chunk):
            part = tokens[begin : begin + chunk]
            if len(kept) + len(part) > stream.capacity:
                kept = kept[:sinks] + kept[-window:]
            kept = kept + part
        with torch.no_grad():
            tokens = [int(model(torch.tensor([kept])).logits[0, -1].argmax())]
        new += tokens
    result = generate(engine, [prompt], stream=stream, prefill_chunk_size=chunk, max_new_tokens=2 * CONTEXT)
    assert result[0].tolist() == prompt + new
    assert len(set(new)) > 3


def test_rows_that_finish_early_stream_on_for_company(engine: TorchEngine) -> None:
    stream = Stream(16, 2, (RowShift(RowFormat(), 1, np.empty(0)),))
    arguments: dict[str, Any] = {"stream": stream, "max_new_tokens": CONTEXT, "pad_token_id": PAD}
    alone = [generate(engine, [row], **arguments)[0, len(row) :].tolist() for row in (PROMPT, [BOS, 33])]
    end = alone[0][9]
    expected = [row[: row.index(end) + 1] if end in row else row for row in alone]
    ids, mask = left_padded(PROMPT, [BOS, 33])
    result = generate(engine, ids, mask, eos_token_id=end, **arguments)[:, len(PROMPT) :].tolist()
    for row, own in zip(result, expected, strict=True):
        assert row == own + [PAD] * (len(row) - len(own))


# Inputs, outputs, callbacks


def test_you_get_what_you_gave(engine: TorchEngine) -> None:
    expected = generate(engine, np.array([PROMPT], dtype=np.uint8), max_new_tokens=5)
    for given in (PROMPT, [PROMPT], np.array(PROMPT), np.array([PROMPT], dtype=np.int32), np.asfortranarray([PROMPT])):
        result = generate(engine, given, max_new_tokens=5)
        assert isinstance(result, np.ndarray) and result.flags.c_contiguous
        np.testing.assert_array_equal(result, expected)
    tensor = generate(engine, torch.tensor([PROMPT]), torch.ones(1, len(PROMPT), dtype=torch.bool), max_new_tokens=5)
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int64
    assert tensor.tolist() == expected.tolist()


def test_prompts_are_not_written_to(engine: TorchEngine) -> None:
    given = np.array([PROMPT])
    result = generate(engine, given, max_new_tokens=5)
    result[:] = 0
    assert given.tolist() == [PROMPT]


def test_an_empty_prompt_is_bos_and_an_empty_batch_is_empty(engine: TorchEngine) -> None:
    expected = generate(engine, [[BOS]], max_new_tokens=5)
    for empty in ([[]], np.zeros((1, 0), dtype=np.int64), torch.zeros((1, 0), dtype=torch.long)):
        assert generate(engine, empty, bos_token_id=BOS, max_new_tokens=5).tolist() == expected.tolist()
    assert generate(engine, []).shape == (0, 0)
    assert generate(engine, torch.zeros((0, 4), dtype=torch.long)).shape == (0, 4)


@pytest.mark.parametrize("as_torch", [False, True])
def test_text_streamer(engine: TorchEngine, as_torch: bool) -> None:
    given = torch.tensor([PROMPT]) if as_torch else [PROMPT]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        result = generate(engine, given, max_new_tokens=10, streamer=TextStreamer(TOKENIZER))
    assert output.getvalue() == TOKENIZER.decode(result[0].tolist()) + "\n"


def test_streamers_get_the_prompt_then_each_token_then_the_end(engine: TorchEngine) -> None:
    seen: list[Any] = []

    class Recorder:
        def put(self, value: Any) -> None:
            seen.append(value)

        def end(self) -> None:
            seen.append("end")

    result = generate(engine, [PROMPT], max_new_tokens=4, streamer=Recorder())
    assert seen[0].tolist() == [PROMPT] and seen[-1] == "end"
    assert [value.shape for value in seen[1:-1]] == [(1,)] * 4
    assert [int(value[0]) for value in seen[1:-1]] == result[0, len(PROMPT) :].tolist()
    seen.clear()
    generate(engine, torch.tensor([PROMPT]), max_new_tokens=2, streamer=Recorder())
    assert all(isinstance(value, torch.Tensor) for value in seen[:-1])
    with pytest.raises(PromptError, match="a streamer takes one sequence, got 3"):
        generate(engine, BATCH, MASK, streamer=Recorder())


def test_a_callback_that_raises_leaves_the_engine_usable(engine: TorchEngine) -> None:
    expected = generate(engine, [PROMPT], max_new_tokens=6)

    def explode(*_: Any) -> Any:
        raise ZeroDivisionError("callback")

    class Exploding:
        put = end = explode

    for arguments in ({"streamer": Exploding()}, {"logits_processor": [explode]}, {"stopping_criteria": [explode]}):
        with pytest.raises(ZeroDivisionError, match="callback"):
            generate(engine, [PROMPT], max_new_tokens=6, **arguments)
        np.testing.assert_array_equal(generate(engine, [PROMPT], max_new_tokens=6), expected)


def test_stats(engine: TorchEngine) -> None:
    stats = GenerationStats()
    for _ in range(2):  # a record can be used again
        result = generate(engine, BATCH, MASK, max_new_tokens=6, stats=stats)
        assert (stats.prompt_tokens, stats.new_tokens) == (sum(map(sum, MASK)), 18)
        assert (stats.decode_tokens, stats.decode_steps) == (15, 5)
        assert 0 < stats.prefill_seconds < stats.time_to_first_token and stats.decode_seconds > 0
    end = int(result[1, len(PROMPT)])
    generate(engine, BATCH, MASK, max_new_tokens=6, eos_token_id=end, stats=stats)
    new = result[:, len(PROMPT) :].tolist()
    assert stats.new_tokens == sum(row.index(end) + 1 if end in row else 6 for row in new)


# Refusals


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        ([[1, 97]], {}, r"input_ids\[0, 1\] is 97, expected 0 <= id < 97"),
        ([[1, 2], [-1, 3]], {}, r"input_ids\[1, 0\] is -1, expected 0 <= id < 97"),
        (np.array([[2**63]], dtype=np.uint64), {}, r"input_ids\[0, 0\] is 9223372036854775808"),
        ([[2**70]], {}, "input_ids must be integers, got object"),
        ([[1.0]], {}, "input_ids must be integers, got float64"),
        (torch.ones(1, 2), {}, "input_ids must be integers, got torch.float32"),
        ([[True]], {}, "input_ids must be integers, got bool"),
        ("text", {}, "input_ids must be integers, got <U4"),
        (None, {}, "input_ids must be integers, got object"),
        (3, {}, r"input_ids must have rank 1 or 2, got shape \(\)"),
        ([[[1]]], {}, r"input_ids must have rank 1 or 2, got shape \(1, 1, 1\)"),
        ([[1, 2], [3]], {}, "input_ids must be rectangular: pad shorter rows at the left"),
        ([[]], {}, "the prompt is empty and no BOS token is defined"),
        ([[1, 2]], {"attention_mask": [[1]]}, r"attention_mask must hold 0 and 1 in the shape of input_ids \(1, 2\)"),
        ([[1, 2]], {"attention_mask": [[1, 2]]}, "attention_mask must hold 0 and 1"),
        ([[1, 2]], {"attention_mask": [[1.0, 1.0]]}, "attention_mask must be integers"),
        ([[1, 2]], {"attention_mask": [[1, 0]]}, "prompt row 0 is masked at column 1, after a token"),
        ([[1, 2, 3]] * 2, {"attention_mask": [[1, 1, 1], [1, 0, 1]]}, "prompt row 1 is masked at column 1"),
        ([[1, 2]], {"attention_mask": [[0, 0]]}, "prompt row 0 is masked from end to end"),
        ([[1, 0, 2]], {"pad_token_id": 0}, "prompt row 0 is masked at column 1"),
        ([[1] * 60], {"max_new_tokens": 5}, "prompt of 60 tokens plus 5 new tokens exceeds the model's context of 64"),
        ([[1] * 65], {}, "prompt of 65 tokens leaves no room"),
        ([[1]], {"prefill_chunk_size": 0}, "prefill_chunk_size must be an integer >= 1, got 0"),
        ([[1]], {"temperature": -1}, "temperature must be"),
        ([[1]], {"seed": -1}, "seed must be an integer >= 0"),
        ([[1]], {"max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens 4 is greater"),
        ([[1]], {"eos_token_id": 97}, "eos_token_id 97 is outside the vocabulary of 97.*eos_token_id=None"),
        ([[1]], {"pad_token_id": -1}, "pad_token_id -1 is outside the vocabulary"),
        ([[1]], {"pad_token_id": [1, 2]}, "pad_token_id must be one token id"),
        ([[1]], {"num_return_sequences": 0}, "num_return_sequences must be an integer >= 1"),
        ([[1]], {"num_return_sequences": 2}, "num_return_sequences 2 needs sampling"),
        (
            [[1]],
            {"num_return_sequences": 2, "do_sample": True, "temperature": 0},
            "num_return_sequences 2 needs sampling",
        ),
        ([[1]], {"stop_strings": "a"}, "stop_strings need the model's tokenizer"),
        ([[1]], {"use_cache": False}, "use_cache can only be True, got False"),
        ([[1]], {"return_dict_in_generate": True}, "return_dict_in_generate can only be False"),
        ([[1]], {"num_beams": 4}, "generation argument num_beams=4: not supported; accepted: bos_token_id, do_sample"),
        ([[1]], {"penalty_alpha": 0.6}, "penalty_alpha=0.6: not supported"),
        ([[1]], {"bad_words_ids": [[3]]}, "bad_words_ids.*not supported"),
        ([[1]], {"cache_implementation": "quantized"}, "cache_implementation='quantized': not supported"),
        ([[1]], {"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3 is for CompiledModel.generate"),
        ([[1]], {"assistant_modal": object()}, "unknown generation argument .*, did you mean 'assistant_model'"),
        ([[1]], {"max_tokens": 3}, "unknown generation argument 'max_tokens', did you mean 'max_new_tokens'"),
        ([[1]], {"topk": 3}, "unknown generation argument 'topk', did you mean 'top_k'"),
        ([[1]], {"inputs": 3}, "unknown generation argument 'inputs', did you mean 'input_ids'"),
        ([[1]], {"qqq": 3}, "unknown generation argument 'qqq'; accepted: "),
        ([[1]], {"generation_config": "greedy"}, "generation_config must be a GenerationConfig or a mapping"),
        ([[1]], {"generation_config": {"num_beams": 2}}, "num_beams=2: not supported"),
    ],
)
def test_bad_requests_are_refused_before_the_first_step(
    engine: TorchEngine, ids: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        generate(engine, ids, **arguments)
    assert not engine.steps


def test_a_cache_beyond_its_budget_is_refused_before_the_first_step(engine: TorchEngine) -> None:
    with pytest.raises(MemoryLimitError, match="3 rows x 26 tokens needs 624 bytes, the budget is 623"):
        generate(engine, BATCH, MASK, max_new_tokens=20, cache_budget_bytes=623)
    generate(engine, BATCH, MASK, max_new_tokens=2, cache_budget_bytes=624)
    assert engine.steps


def test_logits_that_turn_nan_name_step_and_row() -> None:
    table = np.eye(8)[(np.arange(8) + 1) % 8]
    table[5, 3] = np.nan
    engine = TableEngine(table)
    assert generate(engine, [[1], [2]], max_new_tokens=2)[:, 1:].tolist() == [[2, 3], [3, 4]]
    with pytest.raises(NumericalError, match="logits of row 1 at step 3 have nan at token 3"):
        generate(engine, [[1], [2]], max_new_tokens=9)
    # A row that is finished is stepped on for company only: what it computes concerns nobody.
    ended = generate(engine, [[1], [4]], max_new_tokens=3, eos_token_id=5)
    assert ended[:, 1:].tolist() == [[2, 3, 4], [5, 5, 5]]


# Configs


def test_a_config_supplies_defaults_that_arguments_override(engine: TorchEngine) -> None:
    config = GenerationConfig(max_new_tokens=3, do_sample=True, temperature=0.7, num_beams=1, length_penalty=2.0)
    assert generate(engine, [PROMPT], generation_config=config).shape == (1, 10)
    assert generate(engine, [PROMPT], generation_config=config, max_new_tokens=5).shape == (1, 12)
    assert generate(engine, [PROMPT], generation_config=config, max_length=9).shape == (1, 9)
    assert generate(engine, [PROMPT], generation_config={"max_length": 9, "max_new_tokens": 4}).shape == (1, 11)
    assert config_values(config)["temperature"] == 0.7 and "top_k" not in config_values(config)


def test_what_a_config_says_about_other_things_is_left_alone(engine: TorchEngine) -> None:
    config = GenerationConfig(cache_implementation="hybrid", max_new_tokens=3, eos_token_id=[EOS, 500], pad_token_id=-1)
    config.chat_format = "chatml"
    assert generate(engine, [PROMPT], generation_config=config).shape == (1, 10)
    assert generate(engine, [PROMPT], generation_config=GenerationConfig()).shape == (1, 27)


def test_neutral_values_of_what_is_not_supported_are_accepted(engine: TorchEngine) -> None:
    defaults = GenerationConfig._get_default_generation_params()
    # These steer an assistant model, which there is none of.
    defaults = {name: value for name, value in defaults.items() if "assistant" not in name and "lookbehind" not in name}
    del defaults["suppress_tokens"]
    result = generate(
        engine, [PROMPT], assistant_model=None, prompt_lookup_num_tokens=None, suppress_tokens=[], **defaults
    )
    assert result.shape == (1, 20)


def test_every_accepted_name_is_documented_by_its_test() -> None:
    assert set(ACCEPTED) == {
        "max_new_tokens",
        "max_length",
        "min_new_tokens",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "eos_token_id",
        "pad_token_id",
        "bos_token_id",
        "stop_strings",
        "num_return_sequences",
        "seed",
        "use_cache",
        "return_dict_in_generate",
    }


def test_the_whole_context_can_be_used(model: LlamaForCausalLM, engine: TorchEngine) -> None:
    result = generate(engine, [PROMPT], max_new_tokens=CONTEXT - len(PROMPT))
    assert result.shape == (1, CONTEXT)
    np.testing.assert_array_equal(result, reference(model, [PROMPT], max_new_tokens=CONTEXT - len(PROMPT)))


# Steps of a prompt


@pytest.mark.parametrize("least", [1, 2, 16])
@pytest.mark.parametrize("chunk", [1, 3, 16, 17, 20, 31, 32, 512])
def test_no_step_of_a_prompt_is_smaller_than_what_is_computed_alike(chunk: int, least: int) -> None:
    for tokens in range(1, 120):
        parts, left = [], tokens
        while left:
            parts.append(_part(left, chunk, least, 10**6))
            left -= parts[-1]
        assert sum(parts) == tokens and min(parts) >= 1
        assert min(parts) >= min(least, tokens, chunk), (tokens, parts)
        assert max(parts) < max(chunk + least, least + 1)
        bounded, left = [], tokens
        while left:
            bounded.append(_part(left, chunk, least, chunk))
            left -= bounded[-1]
        assert max(bounded) <= chunk
