"""The main promise: many architectures, no code for any of them, and the same greedy tokens as Hugging Face in float32.

Every model is captured once, rewritten once, and runs on both backends: one prompt longer and one shorter than any
sliding window, and a left-padded batch of three. The numbers of rewritten places and the cache's bytes are exact.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from ryzen_compile.api import rewrite
from ryzen_compile.backends.eager import EagerBackend
from ryzen_compile.backends.onnxruntime import OnnxRuntimeBackend
from ryzen_compile.config import find_recipe
from ryzen_compile.program import Program
from ryzen_compile.report import Report
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.compiled import CompiledModel
from tests.zoo import CASES, CONTEXT, LAYERS, VOCAB, WINDOW, Case, NanoDecoder, build, randomize

NEW = 64
NANO = {
    "bind_positions": 1,
    "fuse_attention": LAYERS,
    "fuse_norm": 5,
    "fuse_add_norm": 5,
    "fuse_linear": 2,
    "insert_kv_cache": 2,
}
NANO_CASES = (
    Case("nano", {"spelled_out": False}, NANO, kv_heads=4),
    Case("nano_spelled_out", {"spelled_out": True}, NANO, kv_heads=4),
)


class Subject:
    """A model with its reference tokens and its rewritten Program."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(7)
        if case.name.startswith("nano"):
            torch.manual_seed(0)
            self.model: torch.nn.Module = NanoDecoder(**case.settings).eval()
            randomize(self.model)
        else:
            self.model = build(case)
        draw = lambda n: torch.randint(3, VOCAB, (1, n), generator=generator)
        self.prompts = [draw(23), draw(5)]
        assert self.prompts[1].shape[1] < WINDOW < self.prompts[0].shape[1]
        self.padded, self.mask = left_padded([draw(3), draw(11), draw(23)])
        self.program, self.report = self._rewrite()

    def _rewrite(self) -> tuple[Program, Report]:
        recipe = find_recipe("fp32", context=None if hasattr(self.model, "config") else CONTEXT)
        return rewrite(self.model, recipe)

    def reference(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[list[int]]:
        """New tokens of every row, by Hugging Face's own eager generation (or by full recomputation)."""
        if hasattr(self.model, "generate"):
            mask = torch.ones_like(ids) if mask is None else mask
            out = self.model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
            return out[:, ids.shape[1] :].tolist()
        rows = []
        for row, keep in zip(ids, torch.ones_like(ids) if mask is None else mask, strict=True):
            text = row[keep.bool()][None]
            for _ in range(NEW):
                text = torch.cat([text, self.model(text)[:, -1].argmax(-1, keepdim=True)], dim=1)
            rows.append(text[0, -NEW:].tolist())
        return rows


def left_padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(p.shape[1] for p in prompts)
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, p in enumerate(prompts):
        ids[i, width - p.shape[1] :] = p[0]
        mask[i, width - p.shape[1] :] = 1
    return ids, mask


@pytest.fixture(scope="module", params=(*CASES, *NANO_CASES), ids=lambda case: case.name)
def subject(request: pytest.FixtureRequest) -> Subject:
    with torch.no_grad():
        return Subject(request.param)


@pytest.fixture(scope="module")
def reference(subject: Subject) -> tuple[list[list[list[int]]], list[list[int]]]:
    with torch.no_grad():
        singles = [subject.reference(prompt) for prompt in subject.prompts]
        return singles, subject.reference(subject.padded, subject.mask)


def test_every_fusion_fires_as_often_as_expected(subject: Subject) -> None:
    hits = subject.report.hits()
    assert {name: hits[name] for name in subject.case.hits} == subject.case.hits
    assert [r.name for r in subject.report.records if r.status in ("rolled back", "unsupported")] == []


def test_no_pass_moves_the_logits_beyond_rounding(subject: Subject) -> None:
    assert subject.report.reference_rmse is not None
    for record in subject.report.records:
        if record.rmse is not None:
            assert record.rmse <= 2 * subject.report.reference_rmse + 1e-5 * max(1, 10), record.name


def test_cache_bytes(subject: Subject) -> None:
    cache = KVCache(subject.program.slots, batch=3, capacity=32, limit=CONTEXT)
    per_token = 2 * subject.case.kv_heads * subject.case.head_dim * 4  # a key and a value, float32
    rows = [slot.rows or 32 for slot in subject.program.slots]  # layers with a window keep no more than it
    assert cache.bytes_by_layer() == [per_token * 3 * kept for kept in rows]
    assert all(slot.window in (0, WINDOW) for slot in subject.program.slots)


@pytest.fixture(scope="module")
def artifact(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(subject.case.name)
    OnnxRuntimeBackend().write(subject.program, directory)
    return directory


def test_one_graph_with_every_attention_in_one_operator(subject: Subject, artifact: Path) -> None:
    graph = onnx.load(str(artifact / "model.onnx"), load_external_data=False).graph
    counts = Counter(node.op_type for node in graph.node)
    assert counts["GroupQueryAttention"] == LAYERS
    assert not {"Attention", "MultiHeadAttention", "If", "Loop", "SplitToSequence"} & set(counts)
    cached = [value.name for value in graph.input if value.name.startswith("past_key_values.")]
    assert len(cached) == 2 * LAYERS


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_greedy_tokens_equal_hugging_face(subject: Subject, artifact: Path, reference, backend: str) -> None:
    compiled = EagerBackend() if backend == "eager" else OnnxRuntimeBackend()
    singles, batch = reference
    with CompiledModel(compiled.compile(subject.program), generation_config={"pad_token_id": 0}) as model:
        for prompt, expected in zip(subject.prompts, singles, strict=True):
            out = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
            assert out[:, prompt.shape[1] :].tolist() == expected
        out = model.generate(subject.padded, subject.mask, max_new_tokens=NEW, do_sample=False)
        assert np.asarray(out)[:, subject.padded.shape[1] :].tolist() == batch
