"""What is known of a prompt is not computed again, changes no token, and stays within the budget."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import ryzen_compile
from ryzen_compile.errors import ArtifactError, MemoryLimitError, PromptError, UsageError
from ryzen_compile.manifest import MANIFEST_NAME, write_manifest
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.runtime.generate import GenerationStats, generate
from ryzen_compile.runtime.layout import token_bytes
from ryzen_compile.runtime.prefix import PrefixStore
from ryzen_compile.runtime.prompt_cache import PromptCache
from ryzen_compile.runtime.reuse import Reuse
from ryzen_compile.spec import CacheSlot
from tests.model_directory import TOKENS, shared_artifact
from tests.runtime.torch_engine import BOS, CONTEXT, PAD, SLOT, VOCAB, TorchEngine, tiny_llama

BLOCK = 8
PROMPT = np.random.default_rng(0).integers(3, VOCAB, 40).tolist()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def engine(llama: LlamaForCausalLM) -> TorchEngine:
    return TorchEngine(llama)


@pytest.fixture
def store() -> PrefixStore:
    return PrefixStore([SLOT], block=BLOCK, budget_bytes=1 << 20)


def generated(engine: TorchEngine, ids: Any, **options: Any) -> tuple[list[list[int]], int, int]:
    """Tokens, how many of the prompts' were reused, and how many the engine was given before it decoded."""
    stats, before = GenerationStats(), len(engine.steps)
    result = generate(engine, ids, max_new_tokens=12, stats=stats, **options)
    steps = engine.steps[before:]
    stepped = sum(batch * count for batch, count in steps) - len(result) * stats.decode_steps
    assert stepped == stats.prompt_tokens - stats.reused_tokens
    return result.tolist(), stats.reused_tokens, stepped


# The sources


class Known:
    """Holds so many tokens of any prompt."""

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, 0

    def match(self, tokens: np.ndarray) -> int:
        return self.count

    def fill(self, row: KVCache, tokens: np.ndarray) -> int:
        self.asked += 1
        row.lengths[0] = self.count
        return self.count


def test_the_source_that_knows_most_is_asked(store: PrefixStore) -> None:
    row, tokens = KVCache([SLOT], 1, 20), np.arange(20)
    assert Reuse().fill(row, tokens) == 0
    sources = [Known(0), Known(7), Known(5), Known(7)]
    assert Reuse(sources).fill(row, tokens) == 7 and row.lengths.tolist() == [7]
    assert [source.asked for source in sources] == [0, 1, 0, 0]  # the first of equals
    row.lengths[:] = 20
    Reuse(sources).learn(row, tokens)
    assert store.stats.blocks == 0
    Reuse(sources, store).learn(row, tokens)
    assert store.stats.blocks == 2 and store.match(tokens) == 16


# Prefixes


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_a_known_prompt_gives_the_same_tokens_and_only_its_end_is_stepped(
    engine: TorchEngine, store: PrefixStore, chunk: int
) -> None:
    plain, reused, _ = generated(engine, [PROMPT])
    assert reused == 0
    cold, reused, _ = generated(engine, [PROMPT], prefixes=store, prefill_chunk_size=chunk)
    assert reused == 0 and cold == plain
    warm, reused, stepped = generated(engine, [PROMPT], prefixes=store, prefill_chunk_size=chunk)
    assert (reused, stepped) == (32, 8), "whole blocks, and the last block is left: one token must be stepped"
    assert warm == plain


@pytest.mark.parametrize("common", [0, 7, 8, 9, 31, 32, 39])
def test_prompts_share_whole_blocks_of_what_they_have_in_common(
    engine: TorchEngine, store: PrefixStore, common: int
) -> None:
    other = [*PROMPT[:common], *((token % 90) + 4 for token in PROMPT[common:])]
    assert other[common] != PROMPT[common]
    plain, _, _ = generated(engine, [other])
    generated(engine, [PROMPT], prefixes=store)
    found, reused, _ = generated(engine, [other], prefixes=store)
    assert reused == common // BLOCK * BLOCK and found == plain


def test_rows_of_one_batch_reuse_each_other(engine: TorchEngine, store: PrefixStore) -> None:
    rows = [PROMPT, [*PROMPT[:20], 5, 6, 7], PROMPT[:9], PROMPT, [4] * 11]
    ids = [[PAD] * (40 - len(row)) + row for row in rows]
    mask = [[0] * (40 - len(row)) + [1] * len(row) for row in rows]
    plain, _, _ = generated(engine, ids, attention_mask=mask)
    found, reused, _ = generated(engine, ids, attention_mask=mask, prefixes=store)
    assert found == plain
    assert reused == 16 + 8 + 32
    # Copies of a prompt are read once anyway.
    sampled: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "seed": 3, "num_return_sequences": 3}
    plain, _, _ = generated(engine, [PROMPT], **sampled)
    assert generated(engine, [PROMPT], prefixes=store, **sampled)[:2] == (plain, 32)


def test_what_was_generated_is_known_when_it_comes_back_as_a_prompt_only_as_far_as_it_was_read(
    engine: TorchEngine, store: PrefixStore
) -> None:
    """A conversation: each turn's prompt is the last one, its answer, and something new."""
    first, _, _ = generated(engine, [PROMPT[:20]], prefixes=store)
    turn = [*first[0], 9, 9, 9]
    plain, _, _ = generated(engine, [turn])
    found, reused, _ = generated(engine, [turn], prefixes=store)
    assert found == plain and reused == 16


class Watch:
    """A streamer that looks at the memory whenever a token comes."""

    def __init__(self, model: CompiledModel) -> None:
        self.model = model
        self.most = 0

    def put(self, value: Any) -> None:
        memory = self.model.pool.memory()
        self.most = max(self.most, memory.live + memory.idle + memory.held)

    def end(self) -> None: ...


def test_what_is_kept_stays_within_its_share_and_gives_way_to_what_runs(llama: LlamaForCausalLM) -> None:
    token = token_bytes([SLOT])
    budget = (CONTEXT + 40) * token
    model = CompiledModel(TorchEngine(llama), cache_budget_bytes=budget, prefix_bytes=32 * token)
    store = model.prefixes
    assert store is not None and store.block == 32
    watch = Watch(model)
    prompts = [[*PROMPT[:seed], seed + 3, *PROMPT[seed + 1 :]] for seed in range(5)]
    plain = CompiledModel(TorchEngine(llama))
    for prompt in (*prompts, *prompts[::-1], PROMPT, PROMPT):
        found = model.generate([prompt], max_new_tokens=9, streamer=watch)
        np.testing.assert_array_equal(found, plain.generate([prompt], max_new_tokens=9))
        memory = model.pool.memory()
        assert store.bytes <= 32 * token and memory.held == store.bytes
        assert memory.live == 0 and memory.idle + memory.held <= budget
    assert 0 < watch.most <= budget
    assert store.stats.hits >= 2 and store.stats.evicted_blocks > 5
    # The whole budget for one run: what was kept goes.
    model.generate(np.repeat([PROMPT[:12]], 2, axis=0), max_new_tokens=40, streamer=None)
    assert model.pool.memory().held == 0
    with pytest.raises(MemoryLimitError, match="budget"):
        model.generate(np.repeat([PROMPT], 3, axis=0), max_new_tokens=20)
    np.testing.assert_array_equal(model.generate([PROMPT], max_new_tokens=9), found)


# Prompt caches


def test_a_prompt_cache_gives_the_same_tokens(llama: LlamaForCausalLM) -> None:
    model = CompiledModel(TorchEngine(llama))
    prompt = model.read_prompt(PROMPT)
    assert prompt.tokens.tolist() == PROMPT and prompt.row.lengths.tolist() == [40]
    assert model.pool.memory().live == prompt.row.bytes
    keys = prompt.row.keys[0].copy()
    for ids, reused in (
        ([PROMPT], 39),
        ([[*PROMPT, 5, 6]], 40),
        ([[*PROMPT[:23], 4, *PROMPT[24:]]], 23),
        ([PROMPT[:1]], 0),
        ([[PROMPT[0] + 1, *PROMPT[1:]]], 0),
        ([PROMPT, PROMPT[::-1], PROMPT], 39 + 0 + 39),
    ):
        stats = GenerationStats()
        found = model.generate(ids, max_new_tokens=10, prompt_cache=prompt, stats=stats)
        assert stats.reused_tokens == reused
        np.testing.assert_array_equal(found, model.generate(ids, max_new_tokens=10))
    np.testing.assert_array_equal(prompt.row.keys[0], keys)
    assert prompt.row.lengths.tolist() == [40]


def test_a_prompt_cache_is_asked_before_the_prefixes_and_teaches_them(engine: TorchEngine, store: PrefixStore) -> None:
    row = KVCache([SLOT], 1, 20)
    engine.step(np.array([PROMPT[:20]]), row)
    row.advance(20)
    prompt = PromptCache(row, np.array(PROMPT[:20]), "any")
    plain, _, _ = generated(engine, [PROMPT])
    assert generated(engine, [PROMPT], prefixes=store, prompt_cache=prompt)[:2] == (plain, 20)
    assert generated(engine, [PROMPT], prefixes=store)[:2] == (plain, 32)
    far = [PROMPT[0] + 1, *PROMPT[1:]]
    generated(engine, [far], prefixes=store)
    assert generated(engine, [far], prefixes=store, prompt_cache=prompt)[1] == 32, "it had nothing, the prefixes do"


def test_read_prompt_takes_one_prompt_that_fits(llama: LlamaForCausalLM) -> None:
    model = CompiledModel(TorchEngine(llama), cache_budget_bytes=50 * token_bytes([SLOT]))
    assert model.read_prompt(torch.tensor([PROMPT])).tokens.dtype == np.int64
    with pytest.raises(PromptError, match="a prompt cache holds one prompt, got 2"):
        model.read_prompt([PROMPT, PROMPT])
    with pytest.raises(PromptError, match="a prompt cache holds one prompt, got 0"):
        model.read_prompt([])
    with pytest.raises(PromptError, match=f"{CONTEXT + 1} tokens per row do not fit"):
        model.read_prompt([BOS] * (CONTEXT + 1))
    with pytest.raises(MemoryLimitError, match="51 tokens needs"):
        model.read_prompt([BOS] * 51)
    kept = model.read_prompt(PROMPT)
    with pytest.raises(MemoryLimitError):
        model.generate([PROMPT[:9]], max_new_tokens=9)  # what is kept in hand counts
    del kept
    model.generate([PROMPT[:9]], max_new_tokens=9)


def test_a_prompt_cache_of_other_slots_is_refused(llama: LlamaForCausalLM) -> None:
    row = KVCache([CacheSlot(0, 1, 2, 1)], 1, 4)
    row.advance(4)
    prompt = PromptCache(row, np.array(PROMPT[:4]), "another")
    with pytest.raises(UsageError, match="slots are not those of the prefix"):
        generate(TorchEngine(llama), [PROMPT], prompt_cache=prompt)


def test_another_models_prompt_cache_is_refused(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """Rows of the same shape mean nothing to other weights."""
    one, other = CompiledModel(TorchEngine(llama)), CompiledModel(TorchEngine(llama), identity="other")
    prompt = one.read_prompt(PROMPT)
    for call in (
        lambda: other.generate([PROMPT], prompt_cache=prompt),
        lambda: other.read_prompt([*PROMPT, 3], prompt_cache=prompt),
        lambda: other.save_prompt_cache(tmp_path / "a", prompt),
        lambda: other.generate([PROMPT], prompt_cache="a"),
    ):
        with pytest.raises(PromptError, match="this model is 'other'; read the prompt with this model"):
            call()
    assert one.generate([[*PROMPT, 9]], max_new_tokens=2, prompt_cache=prompt).shape == (1, len(PROMPT) + 3)


def test_a_prompt_is_read_on_from_a_prompt_cache(llama: LlamaForCausalLM) -> None:
    engine = TorchEngine(llama)
    model = CompiledModel(engine)
    half = model.read_prompt(PROMPT[:20])
    engine.steps.clear()
    whole = model.read_prompt(PROMPT, prompt_cache=half)
    assert sum(tokens for _, tokens in engine.steps) == len(PROMPT) - 20
    expected = model.read_prompt(PROMPT)
    for mine, theirs in zip(whole.row.keys, expected.row.keys, strict=True):
        np.testing.assert_array_equal(mine[:, :, : len(PROMPT)], theirs[:, :, : len(PROMPT)])


def test_files_belong_to_an_artifact(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    nameless = CompiledModel(TorchEngine(llama))
    prompt = nameless.read_prompt(PROMPT)
    for call in (
        lambda: nameless.save_prompt_cache(tmp_path / "a", prompt),
        lambda: nameless.load_prompt_cache(tmp_path / "a"),
    ):
        with pytest.raises(UsageError, match="prompt_cache needs a model that was loaded from an artifact; save it"):
            call()
    assert not list(tmp_path.iterdir())
    one, same, other = (CompiledModel(TorchEngine(llama), identity=name) for name in ("one", "one", "other"))
    one.save_prompt_cache(str(tmp_path / "a"), one.read_prompt(PROMPT))
    loaded = same.load_prompt_cache(tmp_path / "a")
    stats = GenerationStats()
    found = same.generate([[*PROMPT, 9]], max_new_tokens=5, prompt_cache=loaded, stats=stats)
    assert stats.reused_tokens == 40
    np.testing.assert_array_equal(found, one.generate([[*PROMPT, 9]], max_new_tokens=5))
    with pytest.raises(ArtifactError, match=r"saved by the artifact 'one', this is 'other'"):
        other.load_prompt_cache(tmp_path / "a")


def test_a_loaded_prompt_cache_shares_the_budget(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    token = token_bytes([SLOT])
    one = CompiledModel(TorchEngine(llama), identity="one")
    one.save_prompt_cache(tmp_path / "a", one.read_prompt(PROMPT))
    small = CompiledModel(TorchEngine(llama), identity="one", cache_budget_bytes=39 * token)
    with pytest.raises(MemoryLimitError, match="budget"):
        small.load_prompt_cache(tmp_path / "a")
    model = CompiledModel(TorchEngine(llama), identity="one", cache_budget_bytes=70 * token)
    kept = model.load_prompt_cache(tmp_path / "a")
    assert model.pool.memory().live == kept.row.bytes == 40 * token
    with pytest.raises(MemoryLimitError, match="what other caches leave of it"):
        model.generate([PROMPT], max_new_tokens=9)
    del kept
    assert model.generate([PROMPT], max_new_tokens=9).shape == (1, 49)


# Artifacts


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_an_artifacts_prompts_are_its_copies_too_and_no_other_artifacts(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    original = shared_artifact(tmp_path_factory)
    copied, altered = (Path(shutil.copytree(original, tmp_path / name)) for name in ("copied", "altered"))
    weights = bytearray((altered / "model.onnx.data").read_bytes())
    weights[len(weights) // 2] ^= 1
    (altered / "model.onnx.data").write_bytes(weights)
    facts = json.loads((altered / MANIFEST_NAME).read_text())
    write_manifest(altered, {k: v for k, v in facts.items() if k not in ("schema_version", "made_by", "files")})
    ids = np.random.default_rng(3).integers(3, TOKENS, (1, 70))
    path = tmp_path / "prompt.safetensors"
    with ryzen_compile.load(original, threads=1) as model:
        model.save_prompt_cache(path, model.read_prompt(ids[:, :60]))
        expected = model.generate(ids, max_new_tokens=20)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    with ryzen_compile.load(copied, threads=1, prefix_bytes=1 << 20) as model:
        prompt, stats = model.load_prompt_cache(path), GenerationStats()
        for reused in (60, 64):  # then the store knows more
            found = model.generate(ids, max_new_tokens=20, prompt_cache=prompt, stats=stats)
            assert stats.reused_tokens == reused
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(model.generate(ids, max_new_tokens=20, stats=stats), expected)
        assert stats.reused_tokens == 64
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    with (
        ryzen_compile.load(altered, threads=1) as model,
        pytest.raises(ArtifactError, match=r"prompt\.safetensors' was saved by the artifact"),
    ):
        model.load_prompt_cache(path)
