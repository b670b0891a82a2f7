from __future__ import annotations

import numpy as np
import pytest

from ryzen_compile.errors import UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.storage import HOST
from ryzen_compile.spec import CacheSlot, ModelSpec
from ryzen_compile.validate.latency import Timing, Workload, decode_seconds, measure, prefill_seconds

SPEC = ModelSpec(
    layers=1, heads=2, kv_heads=1, head_dim=4, hidden=8, vocab=50, context=64, tied=True, parameters=100,
    architecture="Recorded",
)  # fmt: skip


class Recorder:
    """An engine that writes down what it is asked: (tokens held, tokens fed)."""

    spec = SPEC
    slots = (CacheSlot(layer=0, kv_heads=1, head_dim=4, value_dim=4),)
    all_logits = False
    prompt_from = 1
    storage = HOST

    def __init__(self, name: str = "recorder", log: list | None = None) -> None:
        self.name, self.calls, self.fed = name, [], []
        self.log = log if log is not None else []

    def step(self, tokens: np.ndarray, cache: KVCache) -> np.ndarray:
        assert tokens.dtype == np.int64 and tokens.shape[0] == 1
        assert int(cache.lengths[0]) + tokens.shape[1] <= cache.capacity
        self.calls.append((int(cache.lengths[0]), tokens.shape[1]))
        self.fed.append(tokens.copy())
        self.log.append(self.name)
        return np.zeros((1, 1, SPEC.vocab), np.float32)

    def close(self) -> None: ...


def test_prefill_feeds_all_at_once_after_one_warm_up():
    engine = Recorder()
    assert len(prefill_seconds(engine, 7, 3)) == 3
    assert engine.calls == [(0, 7)] * 4


def test_decode_feeds_one_by_one():
    engine = Recorder()
    assert len(decode_seconds(engine, 0, 3, 2)) == 2
    assert engine.calls == [(0, 1), (1, 1), (2, 1)] * 3


def test_depth_is_filled_once_and_its_last_token_run_again_untimed():
    engine = Recorder()
    decode_seconds(engine, 5, 2, 1)
    assert engine.calls == [(0, 5), (5, 1), (6, 1), (4, 1), (5, 1), (6, 1)]


def test_prefill_at_depth():
    engine = Recorder()
    prefill_seconds(engine, 3, 1, depth=4)
    assert engine.calls == [(0, 4), (4, 3), (3, 1), (4, 3)]


def test_ids_are_in_the_vocabulary_and_the_same_for_every_engine():
    first, second = Recorder("a"), Recorder("b")
    measure([first, second], [Workload("pp", 40)], 1, seed=3)
    ids = np.concatenate(first.fed)
    assert ids.min() >= 0 and ids.max() < SPEC.vocab and len(np.unique(ids)) > 10
    np.testing.assert_array_equal(ids, np.concatenate(second.fed))


def test_engines_take_turns_and_the_order_alternates():
    log: list[str] = []
    timings = measure([Recorder("a", log), Recorder("b", log)], [Workload("pp", 2)], 3)
    assert "".join(log) == "ab" + "ab" + "ba" + "ab"
    assert [timing.engine for timing in timings] == ["a", "b"]
    assert all(len(timing.seconds) == 3 for timing in timings)


@pytest.mark.parametrize("workload", [Workload("pp", 65), Workload("tg", 5, 60)])
def test_beyond_the_context_is_refused_before_anything_runs(workload):
    engine = Recorder()
    with pytest.raises(UsageError, match=r"needs 65 positions.*context of 64"):
        measure([engine], [Workload("pp", 2), workload], 1)
    assert engine.calls == []


def test_no_repeats_is_refused():
    with pytest.raises(UsageError, match="at least 1"):
        prefill_seconds(Recorder(), 4, 0)


@pytest.mark.parametrize(
    ("text", "workload"),
    [
        ("pp512", Workload("pp", 512)),
        ("tg128 @ d512", Workload("tg", 128, 512)),
        (" pp16@d4 ", Workload("pp", 16, 4)),
    ],
)
def test_names_are_parsed(text, workload):
    assert Workload.parse(text) == workload
    assert Workload.parse(workload.name) == workload


@pytest.mark.parametrize("text", ["", "pp", "xx512", "pp-4", "pp512 @ 4", "tg0", "pp1e3"])
def test_other_names_are_refused(text):
    with pytest.raises(UsageError):
        Workload.parse(text)


def test_statistics_are_of_the_rates():
    timing = Timing("x", Workload("tg", 10), (1.0, 2.0))
    assert timing.rates == (10.0, 5.0)
    assert timing.mean == 7.5
    assert timing.sd == pytest.approx(3.5355339)
    assert Timing("x", Workload("tg", 10), (1.0,)).sd == 0.0


def tiny_llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_mistral():
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=64, sliding_window=4,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("build", [tiny_llama, tiny_mistral])
def test_hugging_face_baseline_computes_what_the_model_does(build):
    import torch

    from ryzen_compile.validate.huggingface import HuggingFaceEager

    model = build()
    engine = HuggingFaceEager(model)
    ids = np.random.default_rng(0).integers(0, 50, (1, 12), dtype=np.int64)
    with torch.inference_mode():
        whole = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
    cache = KVCache(engine.slots, 1, 12)
    assert cache.bytes == 0
    # In steps, then again from the middle: past a window of 4 the cache cannot be cut back and is built again.
    for start, width in ((0, 8), (8, 1), (9, 3), (6, 2), (8, 1), (0, 5)):
        cache.truncate(start)
        logits = engine.step(ids[:, start : start + width], cache)
        cache.advance(width)
        assert logits.shape == (1, 1, 50) and logits.dtype == np.float32
        # fp32 sums in another order at another length
        np.testing.assert_allclose(logits[0, 0], whole[0, start + width - 1], rtol=1e-4, atol=1e-5)


def test_hugging_face_baseline_is_timed_like_any_engine():
    from ryzen_compile.validate.huggingface import HuggingFaceEager

    engine = HuggingFaceEager(tiny_llama())
    workloads = [Workload("pp", 8), Workload("tg", 4, 8)]
    timings = measure([engine, Recorder()], workloads, 2)
    assert [(timing.engine, timing.workload.name) for timing in timings] == [
        ("huggingface", "pp8"), ("recorder", "pp8"), ("huggingface", "tg4 @ d8"), ("recorder", "tg4 @ d8"),
    ]  # fmt: skip
    assert all(seconds > 0 for timing in timings for seconds in timing.seconds)
    assert engine.spec.parameters == sum(parameter.numel() for parameter in engine.model.parameters())


def test_a_context_that_a_window_has_dropped_is_read_again_untimed():
    class Windowed(Recorder):
        slots = (CacheSlot(layer=0, kv_heads=1, head_dim=4, value_dim=4, window=4),)

    engine = Windowed()
    decode_seconds(engine, 36, 3, 1)  # of 20 rows, 17 were dropped with the 38th token
    assert engine.calls == [(0, 36), (36, 1), (37, 1), (38, 1)] * 2
