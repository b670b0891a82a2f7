"""Relations between runs that need no reference: whatever the weights, two ways to one result must meet.

Three models that differ in what could break: rotary positions, soft caps with windows, and a position table. Prompts
are shorter and longer than the window. Each relation holds on both backends.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ryzen_compile
from ryzen_compile.api import rewrite
from ryzen_compile.backends.eager import EagerBackend
from ryzen_compile.backends.onnxruntime import OnnxRuntimeBackend
from ryzen_compile.backends.onnxruntime.session import SessionOptions
from ryzen_compile.config import find_recipe
from ryzen_compile.manifest import MANIFEST_NAME, read_manifest
from ryzen_compile.program import Program
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.runtime.engine import Engine
from tests.model_directory import case_named, listing, shared_artifact
from tests.zoo import VOCAB, WINDOW, build

NEW = 19
LENGTHS = (1, 7, 13, 31)  # 13 and 31 lie beyond the window of 8
# Untied, because wide tied weights make a model repeat its last token, whatever the cache holds.
MODELS: dict[str, dict[str, Any]] = {"llama": {}, "gemma2": {"tie_word_embeddings": False}, "gpt2": {}}
ATOL = 5e-5  # float32 logits of order ten, summed in another order; wide weights amplify the rounding


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(3, VOCAB, (1, length))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """So small, a second thread only waits; and engines that share two cores wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=MODELS)
def program(request: pytest.FixtureRequest) -> Program:
    return rewritten(request.param)


@cache
def rewritten(name: str) -> Program:
    return rewrite(build(case_named(name, **MODELS[name])), find_recipe("fp32", logits="all"), verify=False)[0]


@pytest.fixture(scope="module", params=["onnxruntime", "eager"])
def model(request: pytest.FixtureRequest, program: Program) -> Iterator[CompiledModel]:
    with CompiledModel(compiled(program, request.param)) as found:
        yield found


def compiled(program: Program, backend: str, threads: int = 1) -> Engine:
    if backend == "eager":
        return EagerBackend().compile(program)
    return OnnxRuntimeBackend().compile(program, options=SessionOptions(threads=threads))


def new_tokens(model: CompiledModel, ids: np.ndarray, new: int = NEW, **options: Any) -> list[list[int]]:
    return model.generate(ids, max_new_tokens=new, **options)[:, ids.shape[1] :].tolist()


def stepped(model: CompiledModel, ids: np.ndarray, chunk: int) -> np.ndarray:
    """Logits (T, V) of all tokens, ``chunk`` at a time through one cache."""
    cache = KVCache(model.engine.slots, 1, ids.shape[1], limit=model.spec.context)
    parts = []
    for begin in range(0, ids.shape[1], chunk):
        tokens = np.ascontiguousarray(ids[:, begin : begin + chunk])
        parts.append(model.engine.step(tokens, cache)[0].copy())
        cache.advance(tokens.shape[1])
    return np.concatenate(parts)


def test_the_models_say_something(model: CompiledModel) -> None:
    """Without this the rest could hold for models that repeat one token."""
    assert LENGTHS[1] < WINDOW < LENGTHS[2]
    assert len(set(new_tokens(model, prompt(31))[0])) > 5
    assert new_tokens(model, prompt(31)) != new_tokens(model, prompt(31, seed=1))


@pytest.mark.parametrize("length", LENGTHS)
def test_the_cache_gives_what_recomputing_everything_gives(model: CompiledModel, length: int) -> None:
    text = prompt(length)
    for token in new_tokens(model, text)[0]:
        logits = model(text)
        assert logits.shape == (1, text.shape[1], VOCAB)
        assert int(logits[0, -1].argmax()) == token
        text = np.concatenate([text, [[token]]], axis=1)


@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_in_chunks_is_the_prompt_at_once(model: CompiledModel, length: int, chunk: int) -> None:
    ids = prompt(length)
    np.testing.assert_allclose(stepped(model, ids, chunk), model(ids)[0], rtol=1e-5, atol=ATOL)
    assert new_tokens(model, ids, prefill_chunk_size=chunk) == new_tokens(model, ids, prefill_chunk_size=length)


def left_padded(prompts: list[np.ndarray], extra: int = 0) -> tuple[np.ndarray, np.ndarray]:
    width = max(p.shape[1] for p in prompts) + extra
    ids = np.concatenate([np.pad(p, ((0, 0), (width - p.shape[1], 0))) for p in prompts])
    mask = np.stack([(np.arange(width) >= width - p.shape[1]).astype(np.int64) for p in prompts])
    return ids, mask


def test_a_batch_is_its_rows_in_any_order(model: CompiledModel) -> None:
    prompts = [prompt(length) for length in LENGTHS]
    singles = [new_tokens(model, p)[0] for p in prompts]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 2, 0], [1]):
        ids, mask = left_padded([prompts[i] for i in order])
        assert new_tokens(model, ids, attention_mask=mask) == [singles[i] for i in order], order


@pytest.mark.parametrize("extra", [0, 1, 7, 63])
def test_left_padding_of_any_length_and_content_changes_nothing(model: CompiledModel, extra: int) -> None:
    prompts = [prompt(13), prompt(7)]
    ids, mask = left_padded(prompts, extra)
    expected = [new_tokens(model, p)[0] for p in prompts]
    assert new_tokens(model, ids, attention_mask=mask) == expected
    junk = np.where(mask == 1, ids, np.random.default_rng(3).integers(0, VOCAB, ids.shape))
    assert new_tokens(model, junk, attention_mask=mask) == expected


@pytest.mark.parametrize("kept", [1, 7, 12, 30])
def test_later_tokens_do_not_reach_back(model: CompiledModel, kept: int) -> None:
    one, other = prompt(31), prompt(31)
    other[:, kept:] = prompt(31, seed=1)[:, kept:]
    assert (one[:, kept:] != other[:, kept:]).any()
    before, after = model(one)[0], model(other)[0]
    np.testing.assert_allclose(after[:kept], before[:kept], rtol=1e-5, atol=ATOL)
    assert np.abs(after[kept:] - before[kept:]).max() > 0.1
    np.testing.assert_allclose(model(one[:, :kept])[0], before[:kept], rtol=1e-5, atol=ATOL)


@pytest.mark.parametrize(("first", "second"), [(1, 18), (11, 8), (18, 1)])
def test_generation_can_be_continued(model: CompiledModel, first: int, second: int) -> None:
    whole = model.generate(prompt(13), max_new_tokens=first + second)
    half = model.generate(prompt(13), max_new_tokens=first)
    assert (model.generate(half, max_new_tokens=second) == whole).all()


def test_sampling_with_a_seed_does_not_depend_on_chunks(model: CompiledModel) -> None:
    options = {"do_sample": True, "temperature": 1.5, "seed": 11}
    assert new_tokens(model, prompt(13), prefill_chunk_size=3, **options) == new_tokens(model, prompt(13), **options)
    assert new_tokens(model, prompt(13), **options) != new_tokens(model, prompt(13), **{**options, "seed": 12})


def test_the_number_of_threads_does_not_change_the_tokens(program: Program) -> None:
    found = []
    for threads in (1, 2):
        with CompiledModel(compiled(program, "onnxruntime", threads)) as model:
            found.append([new_tokens(model, prompt(length)) for length in LENGTHS])
    assert found[0] == found[1]


def test_both_backends_agree(program: Program) -> None:
    one, other = (CompiledModel(compiled(program, name)) for name in ("onnxruntime", "eager"))
    with one, other:
        for length in LENGTHS:
            ids = prompt(length)
            np.testing.assert_allclose(one(ids), other(ids), rtol=1e-4, atol=1e-4)  # other kernels, other sums
            assert new_tokens(one, ids) == new_tokens(other, ids)


@pytest.mark.parametrize("name", MODELS)
def test_load_and_save_round_trips_keep_every_digest(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    source = shared_artifact(tmp_path_factory, name, **MODELS[name])
    for target in (tmp_path / "one", tmp_path / "two"):
        with ryzen_compile.load(source) as model:
            model.save_pretrained(target)
        source = target
    first, second = (read_manifest(tmp_path / name) for name in ("one", "two"))
    assert first == second == read_manifest(shared_artifact(tmp_path_factory, name))
    assert listing(tmp_path / "one") == listing(tmp_path / "two")
    assert set(first["files"]) | {MANIFEST_NAME} == set(listing(tmp_path / "one"))
