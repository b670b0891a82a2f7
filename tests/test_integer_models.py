"""The default recipe on whole models: ONNX Runtime gives the tokens of the references over the same integer weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from ryzen_compile.api import rewrite
from ryzen_compile.backends.eager import EagerBackend
from ryzen_compile.backends.onnxruntime import OnnxRuntimeBackend
from ryzen_compile.backends.onnxruntime.emit import LoweringOptions
from ryzen_compile.backends.onnxruntime.session import SessionOptions
from ryzen_compile.calibration import Calibration
from ryzen_compile.config import find_recipe
from ryzen_compile.program import Program
from ryzen_compile.report import Report
from ryzen_compile.runtime.compiled import CompiledModel
from tests.model_directory import case_named
from tests.zoo import LAYERS, VOCAB, build

NEW = 20
PROMPTS = {length: np.random.default_rng([8, length]).integers(3, VOCAB, (1, length)) for length in (1, 7, 29)}
IDS = torch.randint(3, VOCAB, (10, 48), generator=torch.Generator().manual_seed(2))
TEXT = Calibration(IDS[:8], IDS[8:], "random", "0")
# Rotary positions and a tied head; biases, gelu and a table of positions; soft caps, windows and norms of 1 + w.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "gpt2": {"tie_word_embeddings": False},
    "gemma2": {"tie_word_embeddings": False},
}


@dataclass(frozen=True)
class Subject:
    program: Program
    report: Report
    eager: CompiledModel


@pytest.fixture(scope="module", params=MODELS)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # so small, a second thread only waits
    model = build(case_named(request.param, **MODELS[request.param]))
    program, report = rewrite(model, find_recipe("int4", max_kl=20.0), calibration=TEXT)
    with CompiledModel(EagerBackend().compile(program)) as eager:
        yield Subject(program, report, eager)
    torch.set_num_threads(before)


def tokens(model: CompiledModel, ids: np.ndarray) -> list[int]:
    return model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()


def opened(program: Program, options: LoweringOptions) -> CompiledModel:
    engine = OnnxRuntimeBackend().compile(program, options=SessionOptions(threads=1), lowering=options)
    return CompiledModel(engine)


def test_everything_is_quantized_and_nothing_is_rolled_back(subject: Subject) -> None:
    records = {record.name: record for record in subject.report.records}
    assert not {"rolled back", "unsupported"} & {record.status for record in records.values()}
    ops = records["eliminate_dead"].ops
    assert ops["ryzen.linear_nbits"] == 4 * LAYERS + 1 and ops["ryzen.embedding_nbits"] == 1
    assert not {"aten.linear", "ryzen.linear_act", "ryzen.gated_linear"} & set(ops)
    quantized = records["quantize_weights"]
    assert quantized.kl is not None and quantized.kl > 0 and quantized.promise == "lossy"
    floats = sum(t.numel() for t in subject.program.weights.values() if t.ndim == 2 and t.is_floating_point())
    matrices = sum(t.numel() for t in subject.program.weights.values() if t.dtype == torch.uint8)
    assert floats < 2 * matrices  # scales, rotary tables and positions; no float matrix is kept beside its codes


def test_exact_activations_give_the_tokens_of_the_references(subject: Subject) -> None:
    with opened(subject.program, LoweringOptions(accuracy_level=0)) as model:
        for length, ids in PROMPTS.items():
            want = tokens(subject.eager, ids)
            assert tokens(model, ids) == want, length
            np.testing.assert_allclose(model(ids), subject.eager(ids), rtol=1e-4, atol=1e-4)
    assert len({tuple(tokens(subject.eager, ids)) for ids in PROMPTS.values()}) == len(PROMPTS)


@pytest.mark.parametrize("wide", [False, True], ids=["blocks", "rows"])
def test_rounded_activations_stay_near(subject: Subject, wide: bool) -> None:
    """20 dB of the logits after two layers whose products each keep about 40."""
    with opened(subject.program, LoweringOptions(4, wide_prompts=wide)) as model:
        ids = PROMPTS[29]
        got, want = (m(ids).astype(np.float64) for m in (model, subject.eager))
        assert 10 * np.log10(np.square(want).sum() / np.square(got - want).sum()) >= 20
        assert len(tokens(model, ids)) == NEW
