"""How fast parts are beside each other, as ratios within one run.

Each pair is measured in turns, and medians are compared, so that a slower minute of the machine meets both. A bound
lies between what nine runs on two busy cores gave when it was chosen and what was measured with the thing that it
watches taken away; each test says both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

from ryzen_compile.backends.onnxruntime import native
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import Engine
from ryzen_compile.validate.huggingface import HuggingFaceEager
from ryzen_compile.validate.latency import Workload, measure
from ryzen_compile.validate.measured import speed_up

Record = Callable[[str, object], None]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As many as the artifacts run on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_decoding_is_faster_than_in_hugging_face(artifacts: Any, float_model: Any, record_property: Record) -> None:
    """4.0 to 5.6 times faster; 0.8 without a cache, where the keys of all tokens are computed anew at every step."""
    with artifacts.open("fp32") as model:
        theirs, ours = measure([HuggingFaceEager(float_model), model.engine], [Workload("tg", 24, 64)], repeats=7)
    found = speed_up(theirs.seconds, ours.seconds)
    record_property("times_faster", found.value)
    record_property("low", found.low)
    record_property("high", found.high)
    assert found.value >= 2


def test_integer_weights_read_prompts_as_fast_as_floats(artifacts: Any, record_property: Record) -> None:
    """1.6 to 2.1 times as fast on native products. 0.96 to 1.3 on ONNX Runtime's own, which those would fall back to,
    and 0.3 there if these prompts were read token by token."""
    least = 0.6 if native.unusable() else 1.1
    with artifacts.open("fp32") as floats, artifacts.open("int4") as integers:
        theirs, ours = measure([floats.engine, integers.engine], [Workload("pp", 256)], repeats=15)
    found = speed_up(theirs.seconds, ours.seconds)
    record_property("times_faster", found.value)
    record_property("low", found.low)
    record_property("high", found.high)
    assert found.value >= least


def test_four_tokens_cost_less_than_three_steps(artifacts: Any, record_property: Record) -> None:
    """1.2 to 1.3 steps of one token on native operators, 1.6 to 1.9 on ONNX Runtime's own; four if tokens were computed
    one by one. Drafts cannot pay then."""
    with artifacts.open("int4") as model:
        four, one = step_seconds(model.engine, (4, 1))
    record_property("cost_of_four", four / one)
    assert four < 3 * one


def step_seconds(engine: Engine, sizes: tuple[int, ...], *, held: int = 128, rounds: int = 60) -> list[float]:
    """Median seconds of a step of so many tokens, with the logits of all, behind ``held`` others; sizes in turns."""
    random = np.random.default_rng(0)
    cache = KVCache(engine.slots, 1, held + max(sizes), limit=engine.spec.context)
    engine.step(random.integers(0, engine.spec.vocab, (1, held)), cache)
    cache.advance(held)
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(rounds + 2):
        for size in sizes:
            tokens = random.integers(0, engine.spec.vocab, (1, size))
            began = time.perf_counter()
            engine.step(tokens, cache, last=size)
            took = time.perf_counter() - began
            if turn >= 2:  # the first ones bind their buffers
                seconds[size].append(took)
    return [median(seconds[size]) for size in sizes]
