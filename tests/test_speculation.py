"""Speculation over real artifacts: the text of the shipped model, of windows, of quantized caches, drafted by everyone.

On native operators a row of a step does not depend on the rows beside it, so that greedy text is the same to the last
token. ONNX Runtime's own products sum a lone row in another order than several; what this does to a text with integer
weights is measured in the benchmarks, and here float32 artifacts, where it is far below the margins, stand for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ryzen_compile.api import export, load, optimize
from ryzen_compile.backends.onnxruntime import native
from ryzen_compile.config import find_recipe
from ryzen_compile.errors import UnsupportedError
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.runtime.generate import GenerationStats
from ryzen_compile.runtime.speculative.drafter import Drafter
from ryzen_compile.runtime.speculative.lookup import PromptLookup
from ryzen_compile.runtime.speculative.model_drafter import ModelDrafter
from ryzen_compile.runtime.speculative.settings import Speculation
from ryzen_compile.runtime.speculative.suffix import Corpus, SuffixDrafter
from tests.model_directory import case_named
from tests.runtime.speculative.scripted import Random, Replay, drafted
from tests.zoo import VOCAB, build

NEW = 64
LENGTHS = (1, 2, 4, 8, 16)
PROMPTS = 8  # of 5 to 180 tokens; benchmarks/speculation.py exact takes 200
DRAFTERS = ("lookup", "suffix", "corpus", "early exit", "draft model", "right", "wrong", "random", "three of four")
needs_native = pytest.mark.skipif(native.unusable() != "", reason="native operators are not built here")


@pytest.fixture(scope="module")
def artifacts(tiny_python_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with int4 weights, as users export it, and one of 2-bit weights to draft for it."""
    directory = tmp_path_factory.mktemp("artifacts")
    for name, recipe, settings in (
        ("int4", "int4", {}),
        ("int2", "int2", {}),
        ("fp32", "fp32", {}),
        ("int8 cache", "int4", {"kv": "int8"}),
        ("stream", "int4", {"window": 64}),
    ):
        plain = {} if recipe == "fp32" else {"method": "rtn"}  # nothing here depends on how well it is rounded
        chosen = find_recipe(recipe, **plain, **settings)
        export(tiny_python_lm, directory / name, chosen, verify=False)
    return directory


class Subject:
    """An artifact with prompts and what follows them without drafts."""

    def __init__(self, artifacts: Path, name: str, native: bool) -> None:
        self.model = load(artifacts / name, native=native, threads=1, digests=False)
        self.engine = self.model.engine
        tokenizer: Any = self.model.tokenizer
        text = tokenizer.encode(inspect.getsource(inspect))
        self.prompts = [text[900 * i : 900 * i + 5 + 25 * i] for i in range(PROMPTS)]
        self.plain = [self.text(prompt) for prompt in self.prompts]
        self.corpus = Corpus([text[: 900 * PROMPTS]])

    def text(self, prompt: list[int], **arguments: Any) -> np.ndarray:
        settings = {"max_new_tokens": NEW, "eos_token_id": None, **arguments}
        return np.asarray(self.model.generate([prompt], **settings)[0])


@pytest.fixture(scope="module")
def subject(artifacts: Path) -> Callable[[str, bool], Subject]:
    return cache(lambda name, native: Subject(artifacts, name, native))


@pytest.fixture(scope="module")
def draft(artifacts: Path) -> Iterator[CompiledModel]:
    with load(artifacts / "int2", threads=1, digests=False) as model:
        yield model


def made(name: str, subject: Subject, draft: CompiledModel, truth: np.ndarray) -> Drafter:
    vocab = subject.engine.spec.vocab
    if name == "early exit":
        return ModelDrafter.early_exit(subject.model._early_exit(2))
    if name == "draft model":
        return ModelDrafter.draft_model(draft.engine, draft.pool)
    if name in ("right", "wrong", "three of four"):
        return Replay(truth, vocab, right={"right": 1.0, "wrong": 0.0, "three of four": 0.75}[name])
    plain: dict[str, Drafter] = {
        "lookup": PromptLookup(),
        "suffix": SuffixDrafter(None),
        "corpus": SuffixDrafter(subject.corpus),
        "random": Random(vocab),
    }
    return plain[name]


def differing(subject: Subject, draft: CompiledModel, name: str, tokens: int) -> list[int]:
    """The prompts whose text is another one with drafts of ``tokens`` tokens by the drafter ``name``."""
    found = []
    for number, (prompt, wanted) in enumerate(zip(subject.prompts, subject.plain, strict=True)):
        drafter = made(name, subject, draft, wanted)
        ids, stats = drafted(subject.engine, prompt, [drafter], tokens, max_new_tokens=NEW, pool=subject.model.pool)
        assert stats.speculation is not None and not stats.speculation.dropped
        if not np.array_equal(ids, wanted):
            found.append(number)
    return found


@needs_native
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_text_on_native_operators_is_the_same(
    subject: Any, draft: CompiledModel, name: str, tokens: int
) -> None:
    assert not differing(subject("int4", True), draft, name, tokens)


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_text_on_stock_operators_is_the_same_in_float32(subject: Any, draft: CompiledModel, name: str) -> None:
    assert not differing(subject("fp32", False), draft, name, 6)


@needs_native
@pytest.mark.parametrize("name", ["lookup", "early exit", "three of four"])
def test_quantized_caches_roll_back(subject: Any, draft: CompiledModel, name: str) -> None:
    assert not differing(subject("int8 cache", True), draft, name, 5)


@needs_native
def test_streams_go_on_alike(subject: Any) -> None:
    streamed = subject("stream", True)
    wanted = streamed.text(streamed.prompts[3], max_new_tokens=400)
    for speculation in ("auto", Speculation(fixed=True), Speculation(drafters=("early_exit",), exit_layers=2)):
        stats = GenerationStats()
        ids = streamed.text(streamed.prompts[3], max_new_tokens=400, speculation=speculation, stats=stats)
        assert np.array_equal(ids, wanted) and stats.speculation is not None and stats.speculation.drafts


@needs_native
def test_a_seeds_text_is_the_same_with_drafts_that_are_not_drawn(subject: Any) -> None:
    model = subject("int4", True)
    sampling = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "seed": 11}
    for prompt in model.prompts[:4]:
        wanted = model.text(prompt, **sampling)
        assert np.array_equal(model.text(prompt, speculation=Speculation(fixed=True, tokens=5), **sampling), wanted)


def test_a_draft_model_and_auto_through_the_model(subject: Any, draft: CompiledModel) -> None:
    model = subject("fp32", False)
    for arguments in (
        {"assistant_model": draft},
        {"speculation": "auto"},
        {"speculation": "auto", "assistant_model": draft},
    ):
        for prompt, wanted in zip(model.prompts, model.plain, strict=True):
            assert np.array_equal(model.text(prompt, **arguments), wanted)
    assert model.model.speculation.accepted > 0


# Windows inside the model, whose layers forget by themselves


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_layers_with_a_window_give_the_same_text(name: str, tokens: int) -> None:
    model, prompt = windowed(name), [3, 17, 5, 9, 41, 7, 17, 5]
    wanted = model.generate([prompt], max_new_tokens=90, eos_token_id=None)[0]
    for right in (1.0, 0.7, 0.0):
        drafter = Replay(wanted, VOCAB, right=right)
        ids, stats = drafted(model.engine, prompt, [drafter], tokens, max_new_tokens=90)
        assert np.array_equal(ids, wanted)
        assert stats.decode_steps < 89 or right == 0


@cache
def windowed(name: str) -> CompiledModel:
    return optimize(build(case_named(name)), "fp32", threads=1, verify=False)


def test_an_early_exit_of_a_model_with_windows_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="window"):
        windowed("mistral").generate([[3, 4]], max_new_tokens=3, assistant_early_exit=1)
