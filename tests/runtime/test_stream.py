"""Endless sequences: what is kept, where it stands, that nothing grows, and what cannot be streamed.

Exactness is shown on one layer, whose keys and values depend on nothing but a token and its position: there a stream is
the same as a fresh cache into which the kept tokens were stepped. Deeper layers remember what was dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from ryzen_compile.api import optimize
from ryzen_compile.config import find_recipe
from ryzen_compile.errors import PromptError, UnsupportedError, UsageError
from ryzen_compile.numerics.row_shift import RowShift
from ryzen_compile.numerics.rows import RowFormat, decode
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.runtime.generate import GenerationStats
from ryzen_compile.runtime.prefix import PrefixStore
from ryzen_compile.runtime.stream import Stream
from ryzen_compile.spec import CacheSlot
from tests.model_directory import case_named
from tests.zoo import CONTEXT, VOCAB, build

SLOTS = (CacheSlot(0, 2, 4, 3), CacheSlot(3, 1, 2, 6, "int8", "int4"))
UNTURNED = (RowShift(RowFormat(), 4, np.empty(0)), RowShift(RowFormat(8), 2, np.empty(0)))
# Wide models amplify float32: keys turned several times against keys turned once, logits of order ten.
KEY_ATOL, LOGIT_ATOL = 2e-5, 2e-4
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 1}),
    "padded heads": ("llama", {"num_hidden_layers": 1, "hidden_size": 48}),
    "interleaved, partial": ("glm4", {"num_hidden_layers": 1}),
}
PAIRS = [
    ("llama", "onnxruntime"),
    ("llama", "eager"),
    ("padded heads", "onnxruntime"),
    ("interleaved, partial", "onnxruntime"),
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def one_layer(name: str, backend: str, kv: str = "fp32") -> CompiledModel:
    kind, settings = MODELS[name]
    model = build(case_named(kind, tie_word_embeddings=False, **settings))
    return optimize(model, "fp32", backend=backend, kv=kv, logits="last", verify=False, threads=1)


def tokens_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, count]).integers(3, VOCAB, (1, count))


def addresses(one: KVCache) -> list[tuple[int, tuple[int, ...]]]:
    return [(buffer.ctypes.data, buffer.shape) for buffer in (*one.keys, *one.values)]


# What is kept


def write(held: KVCache, row: int, tokens: list[int]) -> None:
    """An engine whose rows say which token they are of."""
    at = int(held.lengths[row])
    for buffer in (*held.keys, *held.values):
        buffer[row, :, at : at + len(tokens)] = np.array(tokens)[:, None] % 100
    held.lengths[row] += len(tokens)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 3), (5, 4), (15, 1), (16, 4), (40, 0), (64, 7), (100, 33)])
@pytest.mark.parametrize("step", [1, 2, 7, "slack", "random"])
def test_sinks_and_the_most_recent_tokens_are_kept(window: int, sinks: int, step: int | str) -> None:
    stream = Stream(window, sinks, UNTURNED)
    held = KVCache(SLOTS, 3, stream.capacity)
    before, random = addresses(held), np.random.default_rng(window)
    seen: list[list[int]] = [[], [], []]
    for row, length in enumerate((0, sinks // 2, min(stream.capacity, 11))):  # ragged from the beginning
        write(held, row, list(range(length)))
        seen[row] = list(range(length))
    while min(map(len, seen)) < 6 * stream.capacity:
        count = random.integers(1, stream.slack + 1) if step == "random" else stream.slack if step == "slack" else step
        for row in range(3):
            one = held.row(row)
            stream.make_room(one, int(count))
            kept = int(held.lengths[row])
            new = list(range(len(seen[row]), len(seen[row]) + int(count)))
            expected = [*seen[row][:sinks], *seen[row][max(sinks, len(seen[row]) - kept + sinks) :]]
            assert len(expected) == kept and kept - sinks >= min(window, len(seen[row]) - sinks)
            write(held, row, new)
            seen[row] += new
            for buffer in (*held.keys, *held.values):
                assert (buffer[row, :, :kept] == np.array(expected).reshape(-1, 1) % 100).all()
        assert held.lengths.max() <= stream.capacity
    assert addresses(held) == before


def test_rows_of_a_batch_are_cut_only_where_they_are_full() -> None:
    stream = Stream(16, 2, UNTURNED)
    held = KVCache(SLOTS, 3, stream.capacity)
    for row, length in enumerate((stream.capacity, 5, stream.capacity - 1)):
        write(held, row, list(range(length)))
    stream.make_room(held, 1)
    assert held.lengths.tolist() == [2 + 16, 5, stream.capacity - 1]
    stream.make_room(held, stream.slack)
    assert held.lengths.tolist() == [2 + 16, 5, 2 + 16]


def test_what_is_kept_does_not_depend_on_a_caches_spare_rows() -> None:
    stream = Stream(16, 2, UNTURNED)
    kept = []
    for spare in (0, 1, 300):
        held = KVCache(SLOTS, 1, stream.capacity + spare)
        for token in range(200):
            stream.make_room(held, 1)
            write(held, 0, [token])
        kept.append(held.keys[0][0, 0, : held.lengths[0], 0].tolist())
    assert kept[0] == kept[1] == kept[2]


# Positions


@pytest.mark.parametrize(("window", "sinks"), [(24, 4), (7, 0), (64, 1)])
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_a_stream_is_a_fresh_cache_of_the_kept_tokens(name: str, backend: str, window: int, sinks: int) -> None:
    model = one_layer(name, backend)
    engine = model.engine
    stream = model._streamed(window, sinks)
    text = tokens_of(4 * CONTEXT)
    held = KVCache(engine.slots, 1, stream.capacity)
    kept: list[int] = []
    random, dropped, at = np.random.default_rng(1), 0, 0
    while at < text.shape[1]:
        count = int(random.choice([1, 1, 3, stream.slack]))
        part = np.ascontiguousarray(text[:, at : at + count])
        stream.make_room(held, part.shape[1])
        if (gone := len(kept) - int(held.lengths[0])) > 0:
            del kept[sinks : sinks + gone]
            dropped += 1
        logits = engine.step(part, held)[0, -1].copy()
        held.advance(part.shape[1])
        kept += part[0].tolist()
        at += count
        if dropped % 3 == 2 or at >= text.shape[1]:
            dropped += 1
            fresh = KVCache(engine.slots, 1, stream.capacity)
            expected = engine.step(np.array([kept]), fresh)[0, -1]
            np.testing.assert_allclose(logits, expected, atol=LOGIT_ATOL)
            for ours, theirs in ((held.keys[0], fresh.keys[0]), (held.values[0], fresh.values[0])):
                np.testing.assert_allclose(ours[:, :, : len(kept)], theirs[:, :, : len(kept)], atol=KEY_ATOL)
    assert dropped > 8


@pytest.mark.parametrize(("kv", "share"), [("int8", 0.02), ("int4", 0.35)])
def test_integer_keys_stay_near_those_of_a_fresh_cache(kv: str, share: float) -> None:
    """Values are bit for bit the same; keys are rounded anew with each move, which costs less than ``share`` of them,
    root mean square: more than the one rounding of a fresh cache, and no more after ten times the context."""
    model = one_layer("llama", "onnxruntime", kv)
    engine, stream = model.engine, model._streamed(24, 4)
    (shift,) = stream.shifts
    held, kept, text = KVCache(engine.slots, 1, stream.capacity), [], tokens_of(10 * CONTEXT)
    for token in text[0].tolist():
        stream.make_room(held, 1)
        del kept[4 : 4 + len(kept) - int(held.lengths[0])]
        engine.step(np.array([[token]]), held)
        held.advance(1)
        kept.append(token)
    fresh = KVCache(engine.slots, 1, stream.capacity)
    engine.step(np.array([kept]), fresh)
    np.testing.assert_array_equal(held.values[0][:, :, : len(kept)], fresh.values[0][:, :, : len(kept)])
    ours, theirs = (decode(one.keys[0][:, :, : len(kept)], shift.form, shift.dim, shift.scale) for one in (held, fresh))
    np.testing.assert_array_equal(ours[:, :, :4], theirs[:, :, :4])  # sinks never move
    error = np.sqrt(np.square(ours - theirs).mean() / np.square(theirs).mean())
    assert 0 < error < share


# Generating


@pytest.mark.parametrize("backend", ["onnxruntime", "eager"])
def test_generation_goes_on_far_beyond_the_context(backend: str) -> None:
    model = one_layer("llama", backend)
    new = 3 * CONTEXT
    with pytest.raises(PromptError, match="context"):
        model.generate(tokens_of(20), max_new_tokens=new)
    result = model.generate(tokens_of(20), max_new_tokens=new, window=24, sinks=3)
    assert result.shape == (1, 20 + new) and len(set(result[0, -100:].tolist())) > 3
    stream = model._streamed(24, 3)
    held, expected = KVCache(model.engine.slots, 1, stream.capacity), tokens_of(20)
    parts = [expected[:, :16], expected[:, 16:]]  # as slack allows
    for _ in range(new):
        for part in parts:
            stream.make_room(held, part.shape[1])
            logits = model.engine.step(np.ascontiguousarray(part), held)
            held.advance(part.shape[1])
        parts = [logits[:, -1].argmax(axis=-1)[:, None]]
        expected = np.concatenate([expected, parts[0]], axis=1)
    np.testing.assert_array_equal(result, expected)


def test_both_backends_stream_alike() -> None:
    one, other = (
        one_layer("llama", name).generate(tokens_of(9), max_new_tokens=2 * CONTEXT, window=30)
        for name in ("onnxruntime", "eager")
    )
    np.testing.assert_array_equal(one, other)


def test_a_stream_that_drops_nothing_is_plain_generation() -> None:
    model = one_layer("llama", "onnxruntime")
    ids = tokens_of(10)
    plain = model.generate(ids, max_new_tokens=30)
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=30, window=40), plain)
    assert (model.generate(ids, max_new_tokens=30, window=8, sinks=0) != plain).any()


def test_a_prompt_may_be_longer_than_the_context() -> None:
    model = one_layer("llama", "onnxruntime")
    ids = tokens_of(2 * CONTEXT)
    result = model.generate(ids, max_new_tokens=5, window=32, sinks=0)
    for chunk in (1, 5, 1000):
        again = model.generate(ids, max_new_tokens=5, window=32, sinks=0, prefill_chunk_size=chunk)
        assert again.shape == result.shape == (1, 2 * CONTEXT + 5)
    # Whatever was long ago: one layer knows of nothing but what it holds.
    other = np.concatenate([tokens_of(CONTEXT, seed=1), ids[:, CONTEXT:]], axis=1)
    np.testing.assert_array_equal(model.generate(other, max_new_tokens=5, window=32, sinks=0)[:, -5:], result[:, -5:])


def test_ragged_rows_stream_as_they_would_alone() -> None:
    model = one_layer("llama", "onnxruntime")
    prompts = [tokens_of(count) for count in (1, 50, 17)]
    ids = np.concatenate([np.pad(p, ((0, 0), (50 - p.shape[1], 0))) for p in prompts])
    mask = np.stack([(np.arange(50) >= 50 - p.shape[1]).astype(np.int64) for p in prompts])
    arguments: dict[str, Any] = {"max_new_tokens": 130, "window": 20, "sinks": 2}
    together = model.generate(ids, attention_mask=mask, **arguments)
    for row, own in enumerate(prompts):
        np.testing.assert_array_equal(together[row, 50:], model.generate(own, **arguments)[0, own.shape[1] :])


def test_sequences_of_one_prompt_stream_as_a_batch_of_it() -> None:
    """Their rows share pages until a drop moves what follows the sinks."""
    model = one_layer("llama", "onnxruntime")
    arguments: dict[str, Any] = {"max_new_tokens": 100, "window": 20, "do_sample": True, "temperature": 2.0, "seed": 5}
    copies = model.generate(tokens_of(40), num_return_sequences=3, **arguments)
    np.testing.assert_array_equal(copies, model.generate(np.repeat(tokens_of(40), 3, axis=0), **arguments))
    assert len({tuple(row) for row in copies.tolist()}) == 3


def test_a_streams_memory_is_constant_and_its_tokens_do_not_depend_on_what_ran_before() -> None:
    engine = one_layer("llama", "onnxruntime").engine
    motion = one_layer("llama", "onnxruntime")._motion
    model = CompiledModel(engine, motion=motion)
    seen: set[tuple[int, int]] = set()

    class Watch:
        def put(self, value: Any) -> None:
            seen.add((model.pool.memory().live, len(model.pool._live)))
            (held,) = model.pool._live
            seen.add((id(held.keys[0]), held.keys[0].ctypes.data))

        def end(self) -> None: ...

    ids = tokens_of(9)
    first = model.generate(ids, max_new_tokens=4 * CONTEXT, window=24, sinks=2, streamer=Watch())
    assert len(seen) == 2, "neither the bytes nor the buffers changed"
    model.generate(ids, max_new_tokens=CONTEXT - 9)  # leaves a cache of the whole context behind
    assert model.pool.memory().idle
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=4 * CONTEXT, window=24, sinks=2), first)


def test_a_stream_reuses_no_prefixes_and_teaches_none() -> None:
    plain = one_layer("llama", "onnxruntime")
    model = CompiledModel(plain.engine, motion=plain._motion, prefix_bytes=1 << 20)
    store = model.prefixes
    assert isinstance(store, PrefixStore)
    ids = tokens_of(100)
    model.generate(ids, max_new_tokens=2, window=48)
    assert store.stats.lookups == store.stats.blocks == 0
    model.generate(ids, max_new_tokens=2)
    assert store.stats.blocks == 3
    stats = GenerationStats()
    again = model.generate(ids, max_new_tokens=9, window=48, stats=stats)
    assert stats.reused_tokens == 0 and store.stats.lookups == 1
    np.testing.assert_array_equal(again, plain.generate(ids, max_new_tokens=9, window=48))


def test_a_recipe_with_a_window_streams_by_itself() -> None:
    """Also a model whose layers look back over a window: for a stream they keep all rows that there are."""
    model = build(case_named("mistral", tie_word_embeddings=False, sliding_window=16))
    with optimize(model, "fp32", backend="onnxruntime", window=24, sinks=2, verify=False, threads=1) as streaming:
        assert not any(slot.window for slot in streaming.engine.slots)
        result = streaming.generate(tokens_of(9), max_new_tokens=2 * CONTEXT)
        np.testing.assert_array_equal(
            result, streaming.generate(tokens_of(9), max_new_tokens=2 * CONTEXT, window=24, sinks=2)
        )
        assert (result != streaming.generate(tokens_of(9), max_new_tokens=2 * CONTEXT, window=8, sinks=0)).any()


# Refusals


def test_what_a_stream_cannot_hold_is_refused() -> None:
    model = one_layer("llama", "onnxruntime")
    for arguments, error, message in (
        ({"sinks": 4}, PromptError, "sinks=4 belong to a window; give window as well"),
        ({"window": 0}, PromptError, "window"),
        ({"window": 2.5}, PromptError, "window"),
        ({"window": 16, "sinks": -1}, PromptError, "sinks"),
        (
            {"window": 150},
            UsageError,
            r"window 150 with 4 sinks takes a cache of 191 tokens, the model's context is 160",
        ),
    ):
        with pytest.raises(error, match=message):
            model.generate(tokens_of(5), max_new_tokens=2, **arguments)
    with pytest.raises(UsageError, match=r"17 tokens in one step of a stream, it takes 16"):
        Stream(64, 4, UNTURNED).make_room(KVCache(SLOTS, 1, 84), 17)
    for window, sinks in ((0, 4), (4, -1)):
        with pytest.raises(UsageError, match=f"window >= 1 and sinks >= 0, got {window} and {sinks}"):
            Stream(window, sinks, UNTURNED).check(SLOTS, 1000)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("context", [21, 40, 64, 84, 85, 100, 161, 1000])
def test_the_window_that_is_suggested_is_the_largest(context: int, sinks: int) -> None:
    with pytest.raises(UsageError, match=r"at most (\d+)") as caught:
        Stream(context, sinks, UNTURNED).check(SLOTS, context)
    window = int(caught.value.hint.split()[-1])
    Stream(window, sinks, UNTURNED).check(SLOTS, context)
    with pytest.raises(UsageError, match="takes a cache of"):
        Stream(window + 1, sinks, UNTURNED).check(SLOTS, context)


def test_slots_that_drop_rows_by_themselves_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"drop older rows by themselves; export it with a window of that kind"):
        Stream(16, 4, UNTURNED).check((*SLOTS, CacheSlot(5, 1, 2, 2, window=4)), 1000)


def test_learned_positions_are_refused_and_said() -> None:
    model = build(case_named("gpt2", n_layer=1))
    reason = r"this model cannot generate with a window: positions enter outside of the attention, in transformer\.wpe"
    with optimize(model, find_recipe("fp32"), backend="eager", verify=False) as compiled:
        with pytest.raises(UnsupportedError, match=reason):
            compiled.generate(tokens_of(5), max_new_tokens=2, window=16)
        assert compiled.generate(tokens_of(5), max_new_tokens=2).shape == (1, 7)
    with pytest.raises(UnsupportedError, match=reason):
        optimize(model, find_recipe("fp32"), backend="eager", window=16, verify=False)


def test_a_prompt_cache_with_a_window_is_refused() -> None:
    model = one_layer("llama", "eager")
    prompt = model.read_prompt([[3, 4, 5]])
    with pytest.raises(PromptError, match="prompt_cache cannot be used with a window"):
        model.generate([[3, 4, 5, 6]], max_new_tokens=2, window=20, sinks=1, prompt_cache=prompt)
