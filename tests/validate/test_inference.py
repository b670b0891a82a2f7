"""Requests in turns: what is timed, whose turn it is, what follows from the times, and what the memory figures are.

Engines that only wait stand in for models where times and turns are the subject. Their clock is a virtual one, which
moves when they compute and stands still otherwise, so that every figure is known exactly.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ryzen_compile.errors import UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.storage import HOST
from ryzen_compile.spec import CacheSlot, ModelSpec
from ryzen_compile.validate import inference
from ryzen_compile.validate.footprint import Footprint
from ryzen_compile.validate.inference import InferenceReport, InferenceValidator, timed_request

VOCAB, CONTEXT = 53, 64
SLOT = CacheSlot(layer=0, kv_heads=3, head_dim=5, value_dim=7)
EXACT = 1e-9  # relative: sums of milliseconds as floats


def spec(vocab: int = VOCAB, context: int = CONTEXT) -> ModelSpec:
    return ModelSpec(
        layers=1, heads=3, kv_heads=3, head_dim=5, hidden=15, vocab=vocab, context=context, tied=True, parameters=100,
        architecture="Waiting",
    )  # fmt: skip


class Clock:
    """Seconds that pass when somebody waits; ``pace`` makes the machine slower."""

    def __init__(self) -> None:
        self.now, self.pace, self.paused = 1000.0, 1.0, 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.paused += seconds

    def compute(self, seconds: float) -> None:
        self.now += seconds * self.pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(inference, "time", found)
    return found


class Waiting:
    """An engine whose next token is one more, after ``prompt`` seconds for several tokens and ``token`` for one."""

    all_logits, verifies, prompt_from, storage = False, False, 1, HOST
    weights_bytes = 4321

    def __init__(
        self, name: str = "waiting", prompt: float = 0.3, token: float = 0.01, *, wait: Any = lambda seconds: None,
        log: list[str] | None = None, described: ModelSpec | None = None, slots: tuple[CacheSlot, ...] = (SLOT,),
    ) -> None:  # fmt: skip
        self.name, self.prompt, self.token, self.wait = name, prompt, token, wait
        self.log = log if log is not None else []
        self.spec, self.slots = described or spec(), slots
        self.fed: list[tuple[int, list[int]]] = []

    def step(self, tokens: np.ndarray, cache: KVCache, last: int = 1) -> np.ndarray:
        assert tokens.dtype == np.int64 and tokens.shape[0] == 1 and tokens.flags.c_contiguous
        assert int(cache.lengths[0]) + tokens.shape[1] <= cache.capacity
        if tokens.shape[1] > 1:
            self.log.append(self.name)
        self.fed.append((int(cache.lengths[0]), tokens[0].tolist()))
        self.wait(self.prompt if tokens.shape[1] > 1 else self.token)
        return np.eye(VOCAB, dtype=np.float32)[(tokens[:, -1:] + 1) % VOCAB]

    def close(self) -> None: ...


class Scripted(Waiting):
    """It takes the seconds of ``script``, one after the other, for its steps."""

    def __init__(self, script: list[float], clock: Clock) -> None:
        super().__init__("scripted", wait=lambda _: clock.compute(next(self.script)))
        self.script: Iterator[float] = iter(script)


def prompts(count: int = 1, length: int = 7) -> np.ndarray:
    return np.arange(count * length, dtype=np.int64).reshape(count, length)


def pair(clock: Clock, **changes: Any) -> tuple[Waiting, Waiting]:
    """A baseline of 300 and 10 ms, and a model that reads twice and writes five times as fast."""
    log: list[str] = []
    return (
        Waiting("b", 0.3, 0.01, wait=clock.compute, log=log, **changes),
        Waiting("o", 0.15, 0.002, wait=clock.compute, log=log, **changes),
    )


# --- one request ------------------------------------------------------------------------------------------------------
def test_a_request_is_its_prompt_and_then_its_own_tokens(clock: Clock) -> None:
    engine = Waiting(wait=clock.compute)
    cache = KVCache(engine.slots, 1, 7 + 4 - 1)
    cache.advance(5)  # of an earlier request
    seconds = timed_request(engine, cache, np.array([3, 1, 4, 1, 5, 9, 50]), 4)
    assert engine.fed == [(0, [3, 1, 4, 1, 5, 9, 50]), (7, [51]), (8, [52]), (9, [0])], "drawn and fed back"
    assert int(cache.lengths[0]) == 10, "the last token drawn is not stepped"
    assert seconds == pytest.approx((0.3, 0.01, 0.01, 0.01), rel=EXACT)


def test_an_engine_with_all_logits_draws_from_the_last_ones(clock: Clock) -> None:
    class Talkative(Waiting):
        all_logits = True

        def step(self, tokens: np.ndarray, cache: KVCache, last: int = 1) -> np.ndarray:
            super().step(tokens, cache)
            return np.eye(VOCAB, dtype=np.float32)[(tokens + 1) % VOCAB]

    engine = Talkative()
    timed_request(engine, KVCache(engine.slots, 1, 4), np.array([8, 20, 11]), 2)
    assert engine.fed[1] == (3, [12])


# --- turns ------------------------------------------------------------------------------------------------------------
def test_engines_take_turns_and_the_order_alternates(clock: Clock) -> None:
    baseline, optimized = pair(clock)
    InferenceValidator(baseline, optimized, prompts(), new_tokens=2, rounds=3, warmup=2).measure()
    assert "".join(baseline.log) == "bo" + "ob" + "bo" + "ob" + "bo"


def test_the_order_alternates_from_prompt_to_prompt_too(clock: Clock) -> None:
    baseline, optimized = pair(clock)
    InferenceValidator(baseline, optimized, prompts(3), new_tokens=2, rounds=2).measure()
    assert "".join(baseline.log) == "ob" + "boobbo" + "obboob", "one warm-up, on the first prompt"
    asked = [tokens for held, tokens in baseline.fed if held == 0]
    assert asked == [tokens for held, tokens in optimized.fed if held == 0], "the same prompts"
    assert asked == prompts(3)[[0, 0, 1, 2, 0, 1, 2]].tolist()


def test_progress_counts_requests(clock: Clock) -> None:
    heard: list[tuple[int, int]] = []
    validator = InferenceValidator(*pair(clock), prompts(3), new_tokens=2, rounds=2, warmup=1)
    validator.measure(lambda *at: heard.append(at))
    assert heard == [(done, 14) for done in range(1, 15)]


# --- figures ----------------------------------------------------------------------------------------------------------
def test_every_figure_of_engines_that_never_vary(clock: Clock) -> None:
    report = InferenceValidator(*pair(clock), prompts(2), new_tokens=11, rounds=5).measure()
    assert (report.rounds, report.prompts, report.prompt_tokens, report.new_tokens) == (5, 2, 7, 11)
    for role, name, ttft, tpot in (("baseline", "b", 300, 10), ("optimized", "o", 150, 2)):
        found = report.engines[role]
        request = ttft + 10 * tpot
        assert (found.name, found.weights_bytes) == (name, 4321)
        for spread, unit, value, count in (
            (found.ttft_ms, "ms", ttft, 5),
            (found.tpot_ms, "ms", tpot, 5),
            (found.itl_ms, "ms", tpot, 5 * 2 * 10),
            (found.request_ms, "ms", request, 5),
            (found.tokens_per_second, "tok/s", 11e3 / request, 5),
        ):
            assert (spread.unit, spread.count) == (unit, count)
            assert (spread.mean, spread.median, spread.p95) == pytest.approx((value,) * 3, rel=1e-8)
            assert spread.stdev == pytest.approx(0, abs=1e-6 * value)
        assert found.samples == {
            "ttft_ms": pytest.approx((ttft,) * 5, rel=1e-8), "tpot_ms": pytest.approx((tpot,) * 5, rel=1e-8),
        }  # fmt: skip
        assert found.peak_memory_bytes is found.mean_memory_bytes is found.start_memory_bytes is None
    expected = {"ttft": 2, "decode": 5, "end_to_end": 400 / 170, "throughput": 400 / 170}
    assert report.speed_ups.keys() == expected.keys() and report.memory_ratio is None
    for name, value in expected.items():
        measured = report.speed_ups[name]
        assert (measured.value, measured.low, measured.high) == pytest.approx((value,) * 3, rel=1e-8), name
        assert (measured.unit, measured.samples) == ("x", 5)
    assert clock.paused == pytest.approx(inference.PAUSE_SECONDS * 2 * (1 + 2 * 5)), "before each request, in no figure"


def test_a_round_is_the_mean_of_its_prompts_and_each_token_is_kept(clock: Clock) -> None:
    warm, one, two = [9.0, 9.0, 9.0], [0.1, 0.01, 0.03], [0.3, 0.02, 0.06]  # requests of three tokens
    three, four = [0.2, 0.05, 0.05], [0.4, 0.01, 0.01]
    engine = Scripted([*warm, *one, *two, *three, *four], clock)
    report = InferenceValidator(engine, Waiting(wait=clock.compute), prompts(2), new_tokens=3, rounds=2).measure()
    found = report.engines["baseline"]
    assert found.samples["ttft_ms"] == pytest.approx((200, 300), rel=1e-8)
    assert found.samples["tpot_ms"] == pytest.approx((30, 30), rel=1e-8)
    assert found.itl_ms.count == 8
    assert (found.itl_ms.minimum, found.itl_ms.maximum) == pytest.approx((10, 60), rel=1e-8)
    assert found.itl_ms.median == pytest.approx(25, rel=1e-8)  # of 10, 10, 10, 20, 30, 50, 50, 60
    assert found.request_ms.mean == pytest.approx((140 + 380 + 300 + 420) / 4, rel=1e-8)
    # Of a round: the tokens of its requests over their time, not a mean of rates.
    rates = (found.tokens_per_second.maximum, found.tokens_per_second.minimum)
    assert rates == pytest.approx((6e3 / 520, 6e3 / 720), rel=1e-8)
    assert report.speed_ups["ttft"].low is None, "two rounds bound nothing"


def test_a_slow_minute_that_meets_both_changes_no_ratio(clock: Clock) -> None:
    baseline, optimized = pair(clock)
    validator = InferenceValidator(baseline, optimized, prompts(), new_tokens=3, rounds=9)

    def weather(done: int, total: int) -> None:
        clock.pace = 5.0 if 8 <= done < 14 else 1.0  # whole rounds: one warm-up, then two requests each

    report = validator.measure(weather)
    spread = report.engines["baseline"].ttft_ms
    assert (spread.minimum, spread.maximum) == pytest.approx((300, 1500), rel=1e-8), "it was slow"
    decode = report.speed_ups["decode"]
    assert (decode.value, decode.low, decode.high) == pytest.approx((5, 5, 5), rel=1e-8)


def test_measuring_again_begins_anew(clock: Clock) -> None:
    validator = InferenceValidator(*pair(clock), prompts(), new_tokens=3, rounds=2, warmup=0)
    first, second = validator.measure(), validator.measure()
    assert first.engines["optimized"].itl_ms.count == second.engines["optimized"].itl_ms.count == 4


def test_a_ratio_in_the_clock_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "PAUSE_SECONDS", 0.0)
    slow, fast = Waiting("slow", 0.006, 0.006, wait=time.sleep), Waiting("fast", 0.002, 0.002, wait=time.sleep)
    report = InferenceValidator(slow, fast, prompts(), new_tokens=5, rounds=7).measure()
    # A sleep is longer than asked for, by the same on both sides: the ratio of 3 shrinks, and may not turn around.
    for name, measured in report.speed_ups.items():
        assert 2 < measured.value < 4, name
        assert measured.low is not None and measured.low <= measured.value <= measured.high
    turned = InferenceValidator(fast, slow, prompts(), new_tokens=5, rounds=7).measure()
    assert all(1 / 4 < measured.value < 1 / 2 for measured in turned.speed_ups.values())


# --- bytes ------------------------------------------------------------------------------------------------------------
def test_the_cache_holds_the_prompt_and_all_tokens_but_the_last(clock: Clock) -> None:
    baseline, optimized = pair(clock)
    optimized.slots = (SLOT, CacheSlot(layer=1, kv_heads=2, head_dim=4, value_dim=4, key_format="int8-g4"))
    report = InferenceValidator(baseline, optimized, prompts(), new_tokens=5, rounds=1).measure()
    rows, floats = 7 + 5 - 1, 3 * (5 + 7) * 4
    assert report.engines["baseline"].cache_bytes == rows * floats
    assert report.engines["optimized"].cache_bytes == rows * (floats + 2 * (4 + 2) + 2 * 4 * 4)


def test_rows_that_a_window_has_dropped_are_not_held(clock: Clock) -> None:
    slot = CacheSlot(layer=0, kv_heads=1, head_dim=4, value_dim=4, window=4)
    baseline, optimized = pair(clock, slots=(slot,))
    report = InferenceValidator(baseline, optimized, prompts(length=23), new_tokens=7, rounds=1).measure()
    held = slot.resident(23 + 7 - 1)
    assert held < slot.rows < 29
    assert report.engines["optimized"].cache_bytes == held * 2 * 4 * 4


def test_an_engine_that_keeps_its_cache_itself_says_what_it_holds(clock: Clock) -> None:
    baseline, optimized = pair(clock, slots=())
    baseline.cache_bytes = 777  # type: ignore[attr-defined]
    report = InferenceValidator(baseline, optimized, prompts(), new_tokens=2, rounds=1).measure()
    assert (report.engines["baseline"].cache_bytes, report.engines["optimized"].cache_bytes) == (777, 0)


def footprint(start: int, peak: int, mean: int) -> Footprint:
    return Footprint(
        kind="artifact", start_bytes=start, peak_total_bytes=peak, mean_total_bytes=mean, peak_is_exact=True, seconds=1
    )


def test_memory_is_that_above_the_imports(clock: Clock) -> None:
    report = InferenceValidator(*pair(clock), prompts(), new_tokens=2, rounds=4).measure()
    full = report.with_memory(footprint(1000, 1600, 1300), footprint(100, 300, 250))
    baseline, optimized = full.engines["baseline"], full.engines["optimized"]
    assert (baseline.peak_memory_bytes, baseline.mean_memory_bytes, baseline.start_memory_bytes) == (600, 300, 1000)
    assert (optimized.peak_memory_bytes, optimized.mean_memory_bytes, optimized.start_memory_bytes) == (200, 150, 100)
    assert full.memory_ratio is not None and (full.memory_ratio.value, full.memory_ratio.unit) == (3, "x")
    assert report.memory_ratio is None and report.engines["baseline"].peak_memory_bytes is None, "it is another report"
    assert full.speed_ups == report.speed_ups and baseline.ttft_ms == report.engines["baseline"].ttft_ms
    assert report.with_memory(footprint(0, 5, 1), footprint(9, 9, 9)).memory_ratio is None


def test_a_report_comes_back_from_json(clock: Clock) -> None:
    report = InferenceValidator(*pair(clock), prompts(), new_tokens=3, rounds=4).measure()
    for one in (report, report.with_memory(footprint(1, 9, 5), footprint(1, 3, 2))):
        assert InferenceReport.model_validate_json(one.model_dump_json()) == one


# --- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rounds": 0}, "at least 1 round, 0 warm-ups and 2 new tokens, got 0, 1 and 2"),
        ({"new_tokens": 1}, "got 1, 1 and 1; with a single token"),
        ({"warmup": -1}, "got 1, -1 and 2"),
        ({"new_tokens": 58}, "take 65 positions, the baseline engine has a context of 64"),
        ({"prompts": np.zeros((1, 63), np.int64)}, "take 65 positions"),
        ({"prompts": np.zeros((0, 3), np.int64)}, r"at least one prompt.*got \(0, 3\) int64"),
        ({"prompts": np.zeros((2, 0), np.int64)}, r"got \(2, 0\) int64"),
        ({"prompts": np.zeros(5, np.int64)}, r"got \(5,\) int64"),
        ({"prompts": np.zeros((1, 5), np.int32)}, r"got \(1, 5\) int32"),
        ({"prompts": np.array([[1, 53]])}, "tokens from 1 to 53, the model knows 0 to 52"),
        ({"prompts": np.array([[0, -1]])}, "tokens from -1 to 0"),
        ({"optimized": Waiting(described=spec(vocab=52))}, "the baseline knows 53 tokens, the optimized model 52"),
        (
            {"optimized": Waiting(described=spec(context=9)), "new_tokens": 3},
            "take 10 positions, the optimized engine has a context of 9",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_anything_runs(given: dict[str, Any], said: str) -> None:
    baseline = Waiting()
    asked = {"baseline": baseline, "optimized": Waiting(), "prompts": prompts(), "new_tokens": 2, "rounds": 1, **given}
    with pytest.raises(UsageError, match=said):
        InferenceValidator(asked.pop("baseline"), asked.pop("optimized"), asked.pop("prompts"), **asked)
    assert not baseline.fed


def test_what_just_fits_is_measured(clock: Clock) -> None:
    report = InferenceValidator(*pair(clock), prompts(), new_tokens=57, rounds=1, warmup=0).measure()
    assert report.engines["optimized"].itl_ms.count == 56


def test_an_engine_of_unknown_weight_is_refused() -> None:
    unknown = SimpleNamespace(name="unknown", spec=spec(), slots=(), storage=HOST)
    with pytest.raises(UsageError, match="nothing says how many bytes the weights of engine 'unknown' take"):
        InferenceValidator(Waiting(), unknown, prompts(), new_tokens=2, rounds=1)  # type: ignore[arg-type]


# --- the real thing ---------------------------------------------------------------------------------------------------
class Recorded:
    """Another engine, and what it was fed."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.fed = engine, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def step(self, tokens: np.ndarray, cache: KVCache, last: int = 1) -> np.ndarray:
        self.fed.append(tokens.tolist())
        return self.engine.step(tokens, cache, last)


def test_an_artifact_against_the_model_that_it_was_made_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import ryzen_compile
    from ryzen_compile.source import load_model
    from ryzen_compile.validate.huggingface import HuggingFaceEager
    from tests.model_directory import TOKENS, shared_artifact, shared_model

    monkeypatch.setattr(inference, "PAUSE_SECONDS", 0.0)
    model = load_model(shared_model(tmp_path_factory))[0]
    artifact = shared_artifact(tmp_path_factory)
    ids = np.random.default_rng(5).integers(0, TOKENS, (2, 13), dtype=np.int64)
    with ryzen_compile.load(artifact, threads=1) as compiled:
        baseline, optimized = Recorded(HuggingFaceEager(model)), Recorded(compiled.engine)
        report = InferenceValidator(baseline, optimized, ids, new_tokens=6, rounds=4).measure()
    # Warm-ups are on the first prompt, and turns alternate: sorted, what both were fed is alike, exact float32 against
    # exact float32 over weights that leave no near ties.
    assert sorted(baseline.fed) == sorted(optimized.fed) and len(optimized.fed) == (1 + 2 * 4) * 6
    theirs, own = report.engines["baseline"], report.engines["optimized"]
    assert (theirs.name, own.name) == ("huggingface", "onnxruntime")
    unique = {parameter.data_ptr(): parameter.numel() * 4 for parameter in model.parameters()}
    assert theirs.weights_bytes == sum(unique.values())
    # Float32, too: the same weights, tables of angles, and gaps up to the next page.
    assert own.weights_bytes == (artifact / "model.onnx.data").stat().st_size > 0.9 * theirs.weights_bytes
    layers, rows, floats = 2, 13 + 6 - 1, 2 * (16 + 16)
    assert theirs.cache_bytes == own.cache_bytes == layers * rows * floats * 4
    for found in (theirs, own):
        assert found.ttft_ms.count == 4 and found.itl_ms.count == 4 * 2 * 5
        assert found.ttft_ms.minimum > 0 and found.itl_ms.minimum > 0
        assert found.request_ms.mean == pytest.approx(found.ttft_ms.mean + 5 * found.tpot_ms.mean, rel=EXACT)
    assert all(one.value > 0 and one.low <= one.value <= one.high for one in report.speed_ups.values())


def test_transformers_cache_is_measured_by_its_tensors() -> None:
    from ryzen_compile.validate.huggingface import HuggingFaceEager
    from tests.zoo import WINDOW, Case, build

    full, windowed = (
        HuggingFaceEager(build(Case("mistral", {"sliding_window": window, "num_hidden_layers": 1})))
        for window in (None, WINDOW)
    )
    row = 2 * (16 + 16) * 4  # kv heads, channels of key and value, float32
    for engine in (full, windowed):
        assert engine.cache_bytes == 0
        timed_request(engine, KVCache(engine.slots, 1, 23), np.arange(19), 5)
    assert full.cache_bytes == 23 * row
    # It keeps the window with the next token in it or without, by release.
    assert windowed.cache_bytes in (WINDOW * row, (WINDOW - 1) * row)
    timed_request(full, KVCache(full.slots, 1, 23), np.arange(3), 2)
    assert full.cache_bytes == 4 * row, "of the last request alone"
    full.close()
    assert full.cache_bytes == 0


def test_a_weight_that_is_tied_counts_once() -> None:
    from ryzen_compile.validate.huggingface import HuggingFaceEager
    from tests.zoo import CASES, build

    model = build(next(case for case in CASES if case.name == "gpt2"))
    named = dict(model.named_parameters(remove_duplicate=False))
    unique = {parameter.data_ptr(): parameter.numel() * 4 for parameter in named.values()}
    assert len(unique) < len(named), "its head is its table of tokens"
    assert HuggingFaceEager(model).weights_bytes == sum(unique.values())
