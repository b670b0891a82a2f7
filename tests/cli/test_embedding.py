"""The table of tokens as codes, from the command line to generated tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import ryzen_compile
from ryzen_compile.kernels.cpu import library
from tests.model_directory import shared_model

IDS = np.array([[5, 17, 80, 33, 5]])
TEXT = "".join(f"def f{i}(x):\n    return x * {i * 7919 % 1009}\n" for i in range(2500))


def table_bytes(out: Path) -> dict[str, int]:
    """Bytes of the initializers that belong to the table, by name."""
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    sizes = {t.name: int(np.prod(t.dims)) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize
             for t in graph.initializer}  # fmt: skip
    return {name: size for name, size in sizes.items() if "embed" in name or "lm_head" in name}


@pytest.mark.parametrize("recipe", ["fp32", "int4"])
def test_export_with_kmeans_stores_codes_and_generates(
    run: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, recipe: str
) -> None:
    """Nothing of the table is stored but codes: below a quarter of its float32 bytes, codebook included."""
    out = tmp_path / "out"
    source = shared_model(tmp_path_factory, "llama")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    status, shown, err = run(
        *("export", source, out, "--recipe", recipe, "--embedding", "kmeans", "--embedding-bits", 4),
        *("--cluster-dim", 2, "--calibration", text, "--no-verify"),
    )
    assert status == 0, err
    assert "compress_embedding" in shown
    manifest = json.loads((out / "ryzen_compile.json").read_text())
    assert manifest["recipe"]["embedding"] | {"method": "kmeans", "bits": 4} == manifest["recipe"]["embedding"]
    config = json.loads((out / "config.json").read_text())
    sizes = {name: size for name, size in table_bytes(out).items() if "lm_head" not in name}
    assert 0 < sum(sizes.values()) < config["vocab_size"] * config["hidden_size"]
    with ryzen_compile.load(out) as native, ryzen_compile.load(out, native=False) as stock:
        if recipe == "fp32":
            tokens = [m.generate(IDS, max_new_tokens=12).tolist() for m in (native, stock)]
            assert tokens[0] == tokens[1]
        claims = native.engine.claims
    assert claims.claimed.get("CodebookEmbedding") == (1 if library() else None)


def test_export_with_dkm_trains_and_says_what_that_brought(
    run: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    status, _, err = run(
        *("export", shared_model(tmp_path_factory, "llama"), out, "--recipe", "fp32", "--embedding", "dkm"),
        *("--embedding-ratio", 6, "--embedding-steps", 3, "--calibration", text, "--no-verify"),
    )
    assert status == 0, err
    assert "training" in err and "trained for 3 steps" in (out / "report.json").read_text()
    with ryzen_compile.load(out) as model:
        assert model.generate(IDS, max_new_tokens=4).shape == (1, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--embedding", "pq"], "embedding.method"),
        (["--embedding", "kmeans", "--embedding-bits", "9"], "embedding.bits"),
        (["--embedding", "kmeans", "--cluster-dim", "3"], "embedding.cluster_dim"),
        (["--embedding", "kmeans", "--embedding-ratio", "0.5"], "embedding.ratio"),
        (["--embedding-bits", "4"], "expected a method"),
        (
            ["--embedding", "dkm", "--embedding-bits", "4", "--embedding-ratio", "8"],
            "a ratio of the embedding chooses bits by itself",
        ),
    ],
)
def test_settings_that_cannot_be(
    run: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, options: list[str], message: str
) -> None:
    status, _, err = run("export", shared_model(tmp_path_factory, "llama"), tmp_path / "out", *options)
    assert status == 3 and message in err
    assert not (tmp_path / "out").exists()


def test_a_ratio_beyond_what_a_small_table_can_be(
    run: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = shared_model(tmp_path_factory, "llama")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ["--embedding", "kmeans", "--embedding-ratio", "60", "--calibration", text, "--recipe", "fp32"]
    status, _, err = run("export", source, tmp_path / "out", *options)
    assert status != 0 and "is the most" in err
    assert not (tmp_path / "out").exists()
