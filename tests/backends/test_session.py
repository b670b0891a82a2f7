"""OrtEngine: the cache in place, rows and batches, refusals, and what a step costs outside the runtime."""

from __future__ import annotations

import gc
import json
import shutil
import time
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import pytest

from ryzen_compile.backends import Capability, get_backend
from ryzen_compile.backends.eager import EagerEngine
from ryzen_compile.backends.onnxruntime import OnnxRuntimeBackend
from ryzen_compile.backends.onnxruntime.session import OrtEngine, SessionOptions
from ryzen_compile.errors import ArtifactError, TamperedError, UnsupportedError, UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.storage import HOST

ONE = SessionOptions(threads=1, native=frozenset())  # what native operators add has tests of its own
RTOL, ATOL = 1e-5, 2e-5  # logits of order 10, two float32 implementations
IDS = np.random.default_rng(1).integers(0, 61, (3, 12))


@pytest.fixture(scope="module")
def written(decoder, tmp_path_factory) -> Path:
    return OnnxRuntimeBackend().write(decoder, tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def engine(decoder, written):
    opened = OrtEngine(written, decoder.spec, decoder.slots, ONE)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def full_logits(decoder) -> np.ndarray:
    """Every row's logits, (3, 12, V), from the references in one step."""
    eager = EagerEngine(decoder)
    return eager.step(IDS, KVCache(eager.slots, 3, 12))


def close_to(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("chunks", [(12,), (1,) * 12, (7, 1, 3, 1)])
def test_any_chunks_give_the_full_logits(engine, full_logits, chunks):
    cache, at = KVCache(engine.slots, 1, 12), 0
    for new in chunks:
        logits = engine.step(IDS[:1, at : at + new], cache)
        assert logits.shape == (1, new, 61)
        assert logits.dtype == np.float32
        close_to(logits, full_logits[:1, at : at + new])
        cache.advance(new)
        at += new


def test_a_step_writes_the_caches_buffers_and_not_its_lengths(engine, decoder):
    eager = EagerEngine(decoder)
    ours, theirs = KVCache(engine.slots, 1, 16), KVCache(eager.slots, 1, 16)
    before = [buffer.__array_interface__["data"][0] for buffer in ours.keys]
    engine.step(IDS[:1, :5], ours)
    eager.step(IDS[:1, :5], theirs)
    assert ours.lengths.tolist() == [0]
    assert before == [buffer.__array_interface__["data"][0] for buffer in ours.keys]
    for mine, reference in zip((*ours.keys, *ours.values), (*theirs.keys, *theirs.values), strict=True):
        close_to(mine[:, :, :5], reference[:, :, :5])
        assert not mine[:, :, 5:].any()


def test_rows_of_unequal_length_are_prefilled_alone_and_decoded_together(engine, full_logits):
    cache = KVCache(engine.slots, 3, 14)
    lengths = (4, 7, 1)
    for index, length in enumerate(lengths):
        row = cache.row(index)
        engine.step(IDS[index : index + 1, :length], row)
        row.advance(length)
    assert cache.lengths.tolist() == list(lengths)
    for offset in range(3):
        columns = np.array(lengths) + offset
        logits = engine.step(IDS[np.arange(3), columns][:, None], cache)
        close_to(logits[:, 0], full_logits[np.arange(3), columns])
        cache.advance(1)


def test_equal_rows_are_prefilled_together(engine, full_logits):
    cache = KVCache(engine.slots, 3, 12)
    close_to(engine.step(IDS[:, :6], cache), full_logits[:, :6])
    cache.advance(6)
    close_to(engine.step(IDS[:, 6:7], cache), full_logits[:, 6:7])


@pytest.fixture(scope="module")
def mixed(decoder_program, heads):
    """Two layers, one that keeps a window of 5 in 21 rows and one of integers: (eager engine, engine)."""
    program = decoder_program(heads(window=5, rolling=True), heads(form="int8", packed=False))
    opened = OnnxRuntimeBackend().compile(program, options=ONE)
    yield EagerEngine(program), opened
    opened.close()


def test_buffers_of_every_kind_are_bound_in_place(mixed):
    eager, engine = mixed
    ids = np.random.default_rng(7).integers(0, 61, (2, 50))
    ours, theirs = KVCache(engine.slots, 2, 50), KVCache(eager.slots, 2, 50)
    before = [(b.ctypes.data, b.dtype, b.shape) for b in (*ours.keys, *ours.values)]
    assert [(str(dtype), shape[2]) for _, dtype, shape in before] == [("float32", 21), ("int8", 50)] * 2
    for index, length in enumerate((40, 3)):  # the one beyond its window from the beginning, the other not for long
        for cache, one in ((ours, engine), (theirs, eager)):
            row = cache.row(index)
            one.step(ids[index : index + 1, :length], row)
            row.advance(length)
    for offset in range(8):
        tokens = ids[np.arange(2), np.array([40, 3]) + offset][:, None]
        close_to(engine.step(tokens, ours), eager.step(tokens, theirs))
        ours.advance(1)
        theirs.advance(1)
    assert before == [(b.ctypes.data, b.dtype, b.shape) for b in (*ours.keys, *ours.values)]
    for row in range(2):
        held = engine.slots[0].resident(int(ours.lengths[row]))
        close_to(ours.keys[0][row, :, :held], theirs.keys[0][row, :, :held])
        np.testing.assert_array_equal(ours.values[1][row], theirs.values[1][row])


def test_a_cache_whose_first_layer_never_grows_is_bound_anew_when_it_grows(mixed):
    eager, engine = mixed
    ids = np.random.default_rng(8).integers(0, 61, (1, 50))
    want = eager.step(ids, KVCache(eager.slots, 1, 50))
    cache = KVCache(engine.slots, 1, 10, chunk=10)
    for at in range(50):
        cache.reserve(at + 1)
        close_to(engine.step(ids[:, at : at + 1], cache), want[:, at : at + 1])
        cache.advance(1)
    assert cache.capacity == 50


def test_growing_truncating_selecting_and_forking_are_noticed(engine, full_logits):
    cache = KVCache(engine.slots, 1, 5, chunk=5)
    engine.step(IDS[:1, :5], cache)
    cache.advance(5)
    cache.reserve(6)
    close_to(engine.step(IDS[:1, 5:6], cache), full_logits[:1, 5:6])
    cache.advance(1)
    cache.truncate(3)
    close_to(engine.step(IDS[:1, 3:6], cache), full_logits[:1, 3:6])
    forked = cache.fork(2)
    del cache
    gc.collect()
    close_to(engine.step(IDS[[0, 0], 3:4], forked), full_logits[[0, 0], 3:4])


def test_last_row_only_returns_one_row(decoder_program, heads):
    program = decoder_program(heads(), last_only=True)
    with_closing = OnnxRuntimeBackend().compile(program, options=ONE)
    eager = EagerEngine(program)
    assert (with_closing.all_logits, eager.all_logits) == (False, False)
    want = eager.step(IDS[:1, :5], KVCache(eager.slots, 1, 8))
    got = with_closing.step(IDS[:1, :5], KVCache(with_closing.slots, 1, 8))
    assert got.shape == (1, 1, 61)
    close_to(got, want)
    directory = Path(with_closing._directory.name)
    assert (directory / "model.onnx.data").exists()
    with_closing.close()
    assert not directory.exists()
    with_closing.close()


def test_a_full_cache_is_refused_before_the_runtime_writes_past_it(engine):
    cache = KVCache(engine.slots, 1, 4)
    with pytest.raises(UsageError, match="5 tokens for 1 rows do not fit a cache of 1 rows that holds 0 of 4"):
        engine.step(IDS[:1, :5], cache)
    with pytest.raises(UsageError, match="1 tokens for 2 rows do not fit a cache of 1 rows"):
        engine.step(IDS[:2, :1], cache)


def test_several_tokens_in_several_started_rows_are_refused(engine):
    cache = KVCache(engine.slots, 2, 8)
    engine.step(IDS[:2, :2], cache)
    cache.advance(2)
    with pytest.raises(UsageError, match="2 new tokens in 2 rows that hold 2 already; step row by row"):
        engine.step(IDS[:2, 2:4], cache)


def test_files_that_cannot_be_loaded_are_artifact_errors(decoder, written, tmp_path):
    with pytest.raises(TamperedError, match=r"'absent\.onnx' is missing"):
        OrtEngine(tmp_path / "absent.onnx", decoder.spec, decoder.slots, ONE)
    (tmp_path / "model.onnx").write_bytes(written.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="is not an ONNX model"):
        OrtEngine(tmp_path / "model.onnx", decoder.spec, decoder.slots, ONE)
    model = onnx.load(written, load_external_data=False)
    model.graph.node[0].op_type = "Absent"
    onnx.save(model, tmp_path / "model.onnx")
    shutil.copy(written.with_suffix(".onnx.data"), tmp_path)
    with pytest.raises(ArtifactError, match=r"cannot load .*Absent"):
        OrtEngine(tmp_path / "model.onnx", decoder.spec, decoder.slots, ONE)
    with pytest.raises(UnsupportedError, match=r"has no past_key_values\.2\.key"):
        OrtEngine(written, decoder.spec, (*decoder.slots, decoder.slots[0]), ONE)


def test_options_are_checked_and_profiles_are_written(decoder, written):
    with pytest.raises(UsageError, match="threads must be at least 1, got 0"):
        SessionOptions(threads=0)
    profiled = OrtEngine(written, decoder.spec, decoder.slots, SessionOptions(threads=1, spinning=False, profile=True))
    profiled.step(IDS[:1, :2], KVCache(profiled.slots, 1, 4))
    trace = profiled.end_profile()
    assert any("GroupQueryAttention" in str(event.get("args")) for event in json.loads(trace.read_text()))
    trace.unlink()
    profiled.close()


def test_a_decode_step_costs_little_outside_the_runtime(engine, monkeypatch):
    cache, token = KVCache(engine.slots, 1, 512), IDS[:1, :1]
    inside = []

    class Timed:
        def run_with_iobinding(self, binding, session=engine._main._session):
            start = time.perf_counter()
            session.run_with_iobinding(binding)
            inside.append(time.perf_counter() - start)

    monkeypatch.setattr(engine._main, "_session", Timed())
    outside = []
    for _ in range(300):
        start = time.perf_counter()
        engine.step(token, cache)
        outside.append(time.perf_counter() - start - inside[-1])
        cache.advance(1)
        cache.truncate(int(cache.lengths[0]) % 60)  # within the rotation table
    assert median(outside) < 100e-6


def test_backends_are_found_by_name():
    assert get_backend("onnxruntime").probe().available
    assert get_backend("eager").probe() == Capability(True, get_backend("eager").probe().reason)
    with pytest.raises(UsageError, match="there is no backend 'tensorrt'; use one of eager, onnxruntime"):
        get_backend("tensorrt")


def test_a_missing_library_is_said_with_its_remedy(monkeypatch):
    monkeypatch.setattr("ryzen_compile.backends.onnxruntime.REQUIRED", ("onnx_absent",))
    capability = OnnxRuntimeBackend().probe()
    assert not capability.available
    assert capability.hint == "pip install onnx-absent"


def test_a_program_without_a_cache_is_refused(plain_program, tmp_path):
    import torch

    program = plain_program(torch.nn.Linear(3, 3), torch.randn(2, 3))
    with pytest.raises(UsageError, match="no key/value cache; run insert_kv_cache first"):
        OnnxRuntimeBackend().write(program, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cache_whose_growth_failed_halfway_is_bound_anew(decoder, engine, monkeypatch) -> None:
    """Buffers that were replaced before the failure are no longer the bound ones, whatever the first slot's are."""
    cache = KVCache(engine.slots, 1, 12, chunk=4)
    engine.step(IDS[:1, :5], cache)
    cache.advance(5)
    expected = engine.step(IDS[:1, 5:6], cache).copy()
    before = [*cache.keys, *cache.values]
    grown = HOST.copy_rows
    calls = iter(range(100))

    def failing(*arguments):
        if next(calls) == 1:
            raise MemoryError
        return grown(*arguments)

    monkeypatch.setattr(HOST, "copy_rows", failing)
    with pytest.raises(MemoryError):
        cache.reserve(20)
    assert cache.capacity == 12 and any(a is not b for a, b in zip([*cache.keys, *cache.values], before, strict=True))
    monkeypatch.undo()
    cache.reserve(20)
    for old in before:
        old[:] = 1e9  # nothing reads or writes these any more
    np.testing.assert_array_equal(engine.step(IDS[:1, 5:6], cache), expected)
    assert all((old == 1e9).all() for old in before)
