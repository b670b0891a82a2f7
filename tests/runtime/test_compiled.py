"""CompiledModel: logits, one call at a time, saving, closing."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from ryzen_compile.errors import MemoryLimitError, PromptError, UnsupportedError, UsageError
from ryzen_compile.numerics.row_shift import RowShift
from ryzen_compile.numerics.rows import RowFormat
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.runtime.generate import GenerationStats, generate
from ryzen_compile.runtime.speculative.settings import Speculation
from ryzen_compile.runtime.speculative.suffix import Corpus
from ryzen_compile.runtime.stream import Stream
from tests.runtime.torch_engine import BOS, CONTEXT, EOS, VOCAB, TorchEngine, tiny_llama, tiny_tokenizer

PROMPT = [BOS, 11, 40, 7]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def model(llama: LlamaForCausalLM) -> CompiledModel:
    config = GenerationConfig(max_new_tokens=6, eos_token_id=EOS, bos_token_id=BOS)
    return CompiledModel(TorchEngine(llama), generation_config=config, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("all_logits", [True, False])
def test_call_gives_the_logits_of_whole_prompts(llama: LlamaForCausalLM, all_logits: bool) -> None:
    model = CompiledModel(TorchEngine(llama, all_logits=all_logits))
    ids = np.array([PROMPT, PROMPT[::-1]])
    with torch.no_grad():
        expected = llama(torch.from_numpy(ids)).logits.numpy()
    logits = model(ids)
    assert logits.shape == (2, 4 if all_logits else 1, VOCAB) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected if all_logits else expected[:, -1:], atol=1e-4)
    model(ids[:, ::-1].copy())  # does not overwrite the logits of the first call
    np.testing.assert_allclose(logits, expected if all_logits else expected[:, -1:], atol=1e-4)


def test_call_speaks_the_callers_arrays_and_checks_them(model: CompiledModel) -> None:
    assert isinstance(model(torch.tensor([PROMPT])), torch.Tensor)
    assert model(PROMPT).shape == (1, 4, VOCAB) and model([]).shape == (0, 0, VOCAB)
    for ids, message in (
        ([[VOCAB]], r"input_ids\[0, 0\] is 97"),
        ([[1.5]], "must be integers"),
        ([[]], "the prompt is empty"),
        ([[1] * 65], "prompt of 65 tokens exceeds the model's context of 64 tokens"),
    ):
        with pytest.raises(PromptError, match=message):
            model(ids)


def test_generate_takes_the_models_config_and_tokenizer(model: CompiledModel) -> None:
    assert model.generate([PROMPT]).shape == (1, 10)
    assert model.generate([PROMPT], max_new_tokens=3).shape == (1, 7)
    laid_over = model.generate([PROMPT], generation_config=GenerationConfig(repetition_penalty=1.5))
    np.testing.assert_array_equal(laid_over, model.generate([PROMPT], repetition_penalty=1.5))
    assert laid_over.shape == (1, 10)
    assert model.generate([PROMPT], generation_config={"max_new_tokens": 2}).shape == (1, 6)
    assert model.generate().tolist() == model.generate([[BOS]]).tolist()
    assert model.generate([PROMPT], stop_strings="q").shape[1] <= 10


def test_what_it_was_made_of_can_be_read(llama: LlamaForCausalLM) -> None:
    engine = TorchEngine(llama)
    model = CompiledModel(engine, report={"passes": []}, config={"model_type": "llama"})
    assert model.report == {"passes": []} and model.config == {"model_type": "llama"}
    assert model.spec.context == CONTEXT and model.engine is engine
    assert model.generation_config is None and model.tokenizer is None
    assert model.generate([PROMPT]).shape == (1, 24)


def test_threads_get_what_they_would_get_alone(model: CompiledModel) -> None:
    prompts = [[BOS, 5 + 7 * index, 40, index + 3] for index in range(6)]
    expected = [model.generate([prompt], do_sample=True, seed=index) for index, prompt in enumerate(prompts)]
    results: dict[int, np.ndarray] = {}
    barrier = threading.Barrier(len(prompts))

    def work(index: int) -> None:
        barrier.wait()
        results[index] = model.generate([prompts[index]], do_sample=True, seed=index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    for index, result in enumerate(expected):
        np.testing.assert_array_equal(results[index], result)


UNTURNED = (RowShift(RowFormat(), 1, np.empty(0)),)


def test_a_window_is_a_stream_of_this_model(llama: LlamaForCausalLM) -> None:
    engine = TorchEngine(llama)
    model = CompiledModel(engine, motion=UNTURNED)
    plain, long = [PROMPT], 2 * CONTEXT
    for arguments, sinks in (({"window": 16}, 4), ({"window": 16, "sinks": 0}, 0), ({"window": 16, "sinks": None}, 4)):
        expected = generate(engine, plain, stream=Stream(16, sinks, UNTURNED), max_new_tokens=long)
        np.testing.assert_array_equal(model.generate(plain, max_new_tokens=long, **arguments), expected)
    with pytest.raises(PromptError, match="context"):
        model.generate(plain, max_new_tokens=long, window=None)
    streaming = CompiledModel(engine, motion=UNTURNED, stream=(16, 0))
    assert model.stream is None and streaming.stream == Stream(16, 0, UNTURNED)
    np.testing.assert_array_equal(
        streaming.generate(plain, max_new_tokens=long),
        generate(engine, plain, stream=Stream(16, 0, UNTURNED), max_new_tokens=long),
    )
    with pytest.raises(UnsupportedError, match="cannot generate with a window: nothing says how its keys are moved"):
        CompiledModel(engine).generate(plain, window=16)
    with pytest.raises(UnsupportedError, match="cannot generate with a window: for a reason"):
        CompiledModel(engine, motion="for a reason", stream=(16, 0))
    with pytest.raises(UsageError, match=f"takes a cache of 84 tokens, the model's context is {CONTEXT}"):
        CompiledModel(engine, motion=UNTURNED, stream=(64, 4))


def test_calls_share_one_budget_and_what_they_leave(llama: LlamaForCausalLM) -> None:
    model = CompiledModel(TorchEngine(llama), cache_budget_bytes=CONTEXT * 8)
    assert model.generate([PROMPT], max_new_tokens=9).shape == (1, 13)
    memory = model.pool.memory()
    assert memory.live == 0 and memory.budget == CONTEXT * 8
    with pytest.raises(MemoryLimitError, match="2 rows x 40 tokens needs 640 bytes, the budget is 512"):
        model.generate([PROMPT, PROMPT], max_new_tokens=37)
    assert model.generate([PROMPT], max_new_tokens=CONTEXT - 4).shape == (1, CONTEXT)
    # A call's own budget can only be narrower.
    with pytest.raises(MemoryLimitError, match="640 bytes, the budget is 512"):
        model.generate([PROMPT, PROMPT], max_new_tokens=37, cache_budget_bytes=1 << 20)
    with pytest.raises(MemoryLimitError, match="needs 320 bytes, the budget is 319"):
        model.generate([PROMPT], max_new_tokens=37, cache_budget_bytes=319)
    with pytest.raises(MemoryLimitError, match="3 rows x 40 tokens"):
        model(np.ones((3, 40), np.int64))


def test_closing_gives_memory_back(llama: LlamaForCausalLM) -> None:
    model = CompiledModel(TorchEngine(llama), prefix_bytes=1 << 16)
    model.generate([PROMPT * 10], max_new_tokens=9)
    memory = model.pool.memory()
    assert memory.idle and memory.held
    model.close()
    assert model.pool.memory().idle == model.pool.memory().held == 0


def test_more_copies_than_a_large_idle_cache_could_be_copied_to(llama: LlamaForCausalLM) -> None:
    settings: dict[str, Any] = {"do_sample": True, "num_return_sequences": 6, "max_new_tokens": 4, "seed": 0}
    fresh = CompiledModel(TorchEngine(llama), cache_budget_bytes=CONTEXT * 8 * 2)
    used = CompiledModel(TorchEngine(llama), cache_budget_bytes=CONTEXT * 8 * 2)
    used.generate([PROMPT], max_new_tokens=CONTEXT - 4)
    np.testing.assert_array_equal(used.generate([PROMPT], **settings), fresh.generate([PROMPT], **settings))


CALLS = ["generate", "the model", "save_pretrained", "close", "read_prompt", "load_prompt_cache"]


@pytest.mark.parametrize("what", CALLS)
def test_calls_from_inside_a_callback_are_refused(llama: LlamaForCausalLM, tmp_path: Path, what: str) -> None:
    model = CompiledModel(TorchEngine(llama), saver=lambda directory, force: None, identity="one")
    calls: dict[str, Any] = {
        "generate": lambda: model.generate([PROMPT]),
        "the model": lambda: model([PROMPT]),
        "save_pretrained": lambda: model.save_pretrained(tmp_path),
        "close": model.close,
        "read_prompt": lambda: model.read_prompt(PROMPT),
        "load_prompt_cache": lambda: model.load_prompt_cache(tmp_path / "a"),
    }

    class Meddling:
        def put(self, value: Any) -> None:
            calls[what]()

        def end(self) -> None: ...

    with pytest.raises(UsageError, match=f"{what} was called from inside a running call of the same model"):
        model.generate([PROMPT], streamer=Meddling())
    assert model.generate([PROMPT]).shape == (1, 24), "the model is usable afterwards"


def test_saving_goes_to_the_saver(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    seen = []
    model = CompiledModel(TorchEngine(llama), saver=lambda directory, force: seen.append((directory, force)))
    model.save_pretrained(str(tmp_path / "a"))
    model.save_pretrained(tmp_path / "b", force=True)
    assert seen == [(tmp_path / "a", False), (tmp_path / "b", True)]
    with pytest.raises(UsageError, match="on the 'torch' engine, has nothing to save; compile it with the onnxruntime"):
        CompiledModel(TorchEngine(llama)).save_pretrained(tmp_path)


def test_a_closed_model_says_so(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    engine = TorchEngine(llama)
    with CompiledModel(engine, saver=lambda directory, force: None, identity="one") as model:
        assert not model.closed
        model.generate([PROMPT])
    assert model.closed and engine.closed == 1
    model.close()
    assert engine.closed == 1
    for what, call in (
        ("generate", lambda: model.generate([PROMPT])),
        ("the model", lambda: model([PROMPT])),
        ("save_pretrained", lambda: model.save_pretrained(tmp_path)),
        ("read_prompt", lambda: model.read_prompt(PROMPT)),
        ("load_prompt_cache", lambda: model.load_prompt_cache(tmp_path / "a")),
    ):
        with pytest.raises(UsageError, match=f"{what} was called on a closed model; load it again"):
            call()


def test_a_with_block_closes_when_it_fails(llama: LlamaForCausalLM) -> None:
    engine = TorchEngine(llama)
    with pytest.raises(PromptError), CompiledModel(engine) as model:
        model.generate([[VOCAB]])
    assert engine.closed == 1


def test_a_forked_child_is_told_to_load_the_model_itself(model: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    with pytest.raises(UsageError, match="generate was called in a forked process; load the model after the fork"):
        model.generate([PROMPT])


# Speculation


class Exiting(TorchEngine):
    """Leaves early, after as many layers as it has: a draft that is always right."""

    exits = (2,)

    def early_exit(self, layers: int) -> TorchEngine:
        if layers not in self.exits:
            raise UnsupportedError(f"no exit after {layers} layers")
        self.exit = TorchEngine(self.model)
        return self.exit


def drafting(llama: LlamaForCausalLM, **settings: Any) -> CompiledModel:
    return CompiledModel(Exiting(llama), tokenizer=tiny_tokenizer(), **settings)


@pytest.mark.parametrize(
    "arguments",
    [
        {"speculation": "auto"},
        {"speculation": True},
        {"speculation": Speculation(drafters=("lookup", "suffix"), fixed=True, ngram=1)},
        {"speculation": "auto", "assistant_early_exit": 2},
        {"assistant_early_exit": 2},
        {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1},
        {"generation_config": {"prompt_lookup_num_tokens": 4}},
        {"speculation": Speculation(corpus=Corpus([[11, 40, 7, 3]]))},
    ],
    ids=" ".join,  # the arguments' names
)
def test_every_way_to_ask_for_speculation_gives_the_models_text(
    llama: LlamaForCausalLM, arguments: dict[str, Any]
) -> None:
    model = drafting(llama)
    wanted = model.generate([PROMPT], max_new_tokens=40)
    stats = GenerationStats()
    np.testing.assert_array_equal(model.generate([PROMPT], max_new_tokens=40, stats=stats, **arguments), wanted)
    assert stats.speculation is not None and stats.speculation.tokens == 39 and not stats.speculation.idle
    assert model.speculation.tokens == 39
    model.generate([PROMPT], max_new_tokens=5, **arguments)
    assert model.speculation.tokens == 43
    assert stats.speculation.tokens == 39


def test_without_speculation_nothing_is_counted(model: CompiledModel) -> None:
    stats = GenerationStats()
    model.generate([PROMPT], stats=stats, speculation=None)
    assert stats.speculation is None and not model.speculation.tokens


def test_a_draft_model_leaves_text_and_its_own_caches_as_they_were(llama: LlamaForCausalLM) -> None:
    model, draft = drafting(llama), CompiledModel(TorchEngine(tiny_llama(seed=1)), tokenizer=tiny_tokenizer())
    wanted = model.generate([PROMPT], max_new_tokens=40)
    for _ in range(2):
        found = model.generate([PROMPT], max_new_tokens=40, assistant_model=draft, num_assistant_tokens=3)
        np.testing.assert_array_equal(found, wanted)
    assert draft.pool.memory().live == 0 and model.speculation.of("draft_model").asked
    # The same weights draft what the model says.
    twin = CompiledModel(TorchEngine(llama), tokenizer=tiny_tokenizer())
    stats = GenerationStats()
    fixed = Speculation(drafters=("draft_model",), tokens=3, fixed=True, threshold=0)
    model.generate([PROMPT], max_new_tokens=40, assistant_model=twin, speculation=fixed, stats=stats)
    assert stats.speculation is not None and stats.speculation.acceptance_rate == 1 and stats.decode_steps == 10


def test_an_early_exit_drafts_on_the_models_own_rows(llama: LlamaForCausalLM) -> None:
    model = drafting(llama, exit_layers=2)
    stats = GenerationStats()
    fixed = Speculation(drafters=("early_exit",), tokens=4, fixed=True, threshold=0)
    wanted = model.generate([PROMPT], max_new_tokens=41)
    np.testing.assert_array_equal(model.generate([PROMPT], max_new_tokens=41, speculation=fixed, stats=stats), wanted)
    assert stats.decode_steps == 8 and stats.speculation is not None and stats.speculation.acceptance_rate == 1
    exits = model.engine.exit  # type: ignore[attr-defined]
    model.generate([PROMPT], max_new_tokens=5, speculation="auto")
    assert model.engine.exit is exits  # type: ignore[attr-defined]  # opened once
    model.close()
    assert exits.closed == 1


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"assistant_model": "tiny"}, PromptError, "assistant_model must be a CompiledModel, got str"),
        ({"speculation": Speculation(drafters=("draft_model",))}, PromptError, "must be a CompiledModel, got NoneType"),
        ({"speculation": Speculation(drafters=("early_exit",))}, PromptError, "needs the number of layers"),
        ({"assistant_early_exit": 9}, UnsupportedError, "no exit after 9 layers"),
        ({"speculation": "always"}, PromptError, "speculation must be"),
        ({"prompt_lookup_num_tokens": 0}, PromptError, "tokens of a draft must be an integer from 1 to 64, got 0"),
    ],
    ids=str,
)
def test_speculation_that_cannot_be_is_refused_before_the_first_step(
    llama: LlamaForCausalLM, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    model = drafting(llama)
    with pytest.raises(kind, match=message):
        model.generate([PROMPT], max_new_tokens=4, **arguments)
    assert not model.engine.steps  # type: ignore[attr-defined]
    model.generate([PROMPT], max_new_tokens=4)


def test_a_draft_model_of_other_tokens_is_refused_before_the_first_step(llama: LlamaForCausalLM) -> None:
    model = drafting(llama)

    class Other:
        bos_token_id, eos_token_id = BOS, EOS

        def get_vocab(self) -> dict[str, int]:
            return {**tiny_tokenizer().get_vocab(), "a": 5, "c": 3}

    for tokenizer, message in ((Other(), "another tokenizer: '[ac]' is token"), (None, "has no tokenizer")):
        draft = CompiledModel(TorchEngine(llama), tokenizer=tokenizer)  # type: ignore[arg-type]
        with pytest.raises(PromptError, match=message):
            model.generate([PROMPT], assistant_model=draft)
        assert not draft.engine.steps  # type: ignore[attr-defined]
    with pytest.raises(PromptError, match="assistant_model is the model itself"):
        model.generate([PROMPT], assistant_model=model)
    assert not model.engine.steps  # type: ignore[attr-defined]


def test_an_engine_without_exits_says_so(model: CompiledModel) -> None:
    with pytest.raises(UnsupportedError, match="the 'torch' engine has no early exits"):
        model.generate([PROMPT], assistant_early_exit=1)


def test_a_closed_draft_model_is_refused_and_the_model_goes_on(llama: LlamaForCausalLM) -> None:
    model, draft = drafting(llama), CompiledModel(TorchEngine(llama), tokenizer=tiny_tokenizer())
    draft.close()
    with pytest.raises(UsageError, match="drafting was called on a closed model"):
        model.generate([PROMPT], assistant_model=draft)
    model.generate([PROMPT], max_new_tokens=2)


def test_two_models_that_draft_for_each_other_do_not_wait_for_ever(llama: LlamaForCausalLM) -> None:
    one, other = drafting(llama), drafting(tiny_llama(seed=1))
    wanted = {id(m): m.generate([PROMPT], max_new_tokens=12).tolist() for m in (one, other)}
    found: dict[int, list[Any]] = {id(one): [], id(other): []}

    def run(model: CompiledModel, assistant: CompiledModel) -> None:
        for _ in range(4):
            found[id(model)].append(model.generate([PROMPT], max_new_tokens=12, assistant_model=assistant).tolist())

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in ((one, other), (other, one))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert found == {key: [text] * 4 for key, text in wanted.items()}
