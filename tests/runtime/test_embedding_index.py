"""The index against a plain ranking of all vectors; its directory against damage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file, save_file

from ryzen_compile.errors import (
    ArtifactError,
    ConfigError,
    NumericalError,
    RyzenCompileError,
    TamperedError,
    UsageError,
)
from ryzen_compile.manifest import MANIFEST_NAME, write_manifest
from ryzen_compile.numerics.embedding_codec import PRECISIONS, EmbeddingCodec, Precision
from ryzen_compile.numerics.embedding_codes import normalize
from ryzen_compile.numerics.embedding_projection import Projection
from ryzen_compile.runtime.embedding_index import EmbeddingIndex
from ryzen_compile.runtime.embedding_index_file import KEY, TENSORS

DIMS = 53


def vectors(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((20, DIMS))
    return (centers[rng.integers(20, size=count)] + 0.7 * rng.standard_normal((count, DIMS)) + 0.2).astype(np.float32)


def projection() -> Projection:
    return Projection.itq(normalize(vectors(300)), 40)


def best(index: EmbeddingIndex, queries: np.ndarray, k: int) -> np.ndarray:
    """By the scores of all codes, ties to the lower number."""
    scores = index.codec.scores(queries, index.codes)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("k", [1, 7, 101, 500])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_search_is_the_order_of_all_scores(precision: Precision, k: int) -> None:
    index = EmbeddingIndex.build(vectors(101), precision)
    queries = vectors(5, 1)
    ids, scores = index.search(queries, k)
    assert ids.shape == scores.shape == (5, min(k, 101)) and ids.dtype == np.int64 and scores.dtype == np.float32
    np.testing.assert_array_equal(ids, best(index, queries, k))
    np.testing.assert_array_equal(scores, np.take_along_axis(index.codec.scores(queries, index.codes), ids, axis=1))


@pytest.mark.parametrize("dims", [53, 8, 32, 1])
def test_bits_are_ranked_by_the_float_query_among_the_nearest_by_hamming_distance(dims: int) -> None:
    x, queries = vectors(301), vectors(9, 1)
    index = EmbeddingIndex.build(x, "binary", dims=dims, rescore=3)
    ids, scores = index.search(queries, 5)
    signs, asked = normalize(x[:, :dims]) > 0, normalize(queries[:, :dims]) > 0
    for row in range(9):
        distance = (signs != asked[row]).sum(axis=1)
        candidates = np.lexsort((np.arange(301), distance))[:15]
        products = index.codec.scores(queries[row : row + 1], index.codes[candidates])[0]
        expected = candidates[np.lexsort((candidates, -np.round(products, 5)))][:5]
        np.testing.assert_array_equal(np.round(products.max(), 4), np.round(scores[row, 0], 4))
        assert set(ids[row].tolist()) <= set(candidates.tolist())
        if dims > 8:  # few bits tie, and sums in another order break ties differently
            np.testing.assert_array_equal(ids[row], expected)


def test_enough_candidates_are_all_of_them() -> None:
    index = EmbeddingIndex.build(vectors(200), "binary", projection=projection(), rescore=100)
    queries = vectors(6, 1)
    scores = index.search(queries, 10)[1]
    everything = np.sort(index.codec.scores(queries, index.codes), axis=1)[:, ::-1][:, :10]
    np.testing.assert_allclose(scores, everything, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
def test_a_graph_finds_almost_what_looking_at_all_finds(precision: Precision, projected: bool) -> None:
    pytest.importorskip("usearch", reason="the extra 'search' is not installed")
    x, queries = vectors(2000), vectors(50, 1)
    made = projection() if projected else None
    exact = EmbeddingIndex.build(x, precision, projection=made)
    graph = EmbeddingIndex(exact.codec, exact_rows=100)
    graph.add(x[:1500])
    graph.search(queries[:1], 1)  # the graph grows by what is added later
    graph.add(x[1500:])
    (expected, scores), (found, others) = exact.search(queries, 10), graph.search(queries, 10)
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(expected.tolist(), found.tolist(), strict=True)])
    assert shared > 0.8, shared
    same = expected[:, 0] == found[:, 0]
    assert same.mean() > 0.8
    np.testing.assert_allclose(scores[same, 0], others[same, 0], atol=1e-5)


def test_a_graph_returns_all_there_is() -> None:
    pytest.importorskip("usearch", reason="the extra 'search' is not installed")
    for precision in PRECISIONS:
        index = EmbeddingIndex.build(np.repeat(vectors(3), 4, axis=0), precision, exact_rows=0)
        ids, _ = index.search(vectors(2, 1), 50)
        np.testing.assert_array_equal(np.sort(ids, axis=1), [range(12)] * 2)


def test_a_stored_vector_finds_itself_whatever_its_length() -> None:
    x = vectors(150)
    for precision in PRECISIONS:
        index = EmbeddingIndex.build(x, precision, projection=Projection.random(normalize(x), DIMS))
        np.testing.assert_array_equal(index.search(7 * x, 1)[0][:, 0], np.arange(150))


def test_numbers_go_on_where_they_were() -> None:
    x = vectors(30)
    index = EmbeddingIndex(EmbeddingCodec.fit(x, "int8"))
    np.testing.assert_array_equal(index.add(x[:20]), np.arange(20))
    np.testing.assert_array_equal(index.add(x[20:]), np.arange(20, 30))
    assert len(index) == 30 and index.bytes_per_vector == DIMS
    np.testing.assert_array_equal(index.codes, index.codec.encode(x))
    np.testing.assert_array_equal(index.search(x, 1)[0][:, 0], np.arange(30))


def test_equal_vectors_come_in_their_order() -> None:
    x = np.repeat(vectors(4), 5, axis=0)
    for precision in PRECISIONS:
        ids, scores = EmbeddingIndex.build(x, precision).search(x[:1], 5)
        np.testing.assert_array_equal(ids, [[0, 1, 2, 3, 4]])
        assert np.ptp(scores) == 0


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_of_equal_scores_those_of_the_lower_numbers_are_kept(precision: Precision) -> None:
    x = np.zeros((23, DIMS))
    x[:, 5] = 1  # one product each, so that no order of summing tells equal vectors apart
    x[[0, 7, 22], 5] = -1
    index = EmbeddingIndex.build(x, precision)
    equal = [number for number in range(23) if number not in (0, 7, 22)]
    np.testing.assert_array_equal(index.search(x[:3], 3)[0], [[0, 7, 22], [1, 2, 3], [1, 2, 3]])
    for k in range(1, 24):
        np.testing.assert_array_equal(index.search(x[1:3], k)[0], [[*equal, 0, 7, 22][:k]] * 2)


def test_a_single_vector_has_no_int8_ranges() -> None:
    x = vectors(1)
    for same in (x, np.repeat(x, 20, axis=0)):
        with pytest.raises(UsageError, match="int8 ranges need vectors that differ"):
            EmbeddingIndex.build(same, "int8")
    for precision in ("float32", "binary"):
        assert EmbeddingIndex.build(x, precision).search(x)[0].tolist() == [[0]]


@pytest.mark.parametrize("queries", [np.zeros((1, DIMS)), np.full((1, DIMS), np.nan)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_queries_without_a_direction_are_refused(precision: Precision, queries: np.ndarray) -> None:
    with pytest.raises(NumericalError):
        EmbeddingIndex.build(vectors(5), precision).search(queries)


def test_what_cannot_be_searched_is_refused() -> None:
    x = vectors(5)
    index = EmbeddingIndex.build(x)
    for wrong in (
        lambda: index.search(x, 0),
        lambda: index.search(x[:, :7]),
        lambda: index.search(x[0]),
        lambda: index.search(x[:0]),
        lambda: index.add(x[:, :7]),
        lambda: index.add(x[:0]),
        lambda: EmbeddingIndex.build(x, rescore=0),
        lambda: EmbeddingIndex.build(x, exact_rows=-1),
        lambda: EmbeddingIndex.build(x[:0]),
        lambda: EmbeddingIndex(index.codec).search(x),
    ):
        with pytest.raises(UsageError):
            wrong()
    assert len(index) == 5


def test_without_usearch_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    index = EmbeddingIndex.build(vectors(5), exact_rows=4)
    with pytest.raises(ConfigError, match=r"pip install 'ryzen-compile\[search\]'"):
        index.search(vectors(1))


def test_neither_torch_nor_usearch_is_imported_for_an_exact_search() -> None:
    code = """
import sys, numpy as np
from ryzen_compile.runtime.embedding_index import EmbeddingIndex
EmbeddingIndex.build(np.eye(3), "binary").search(np.eye(3), 2)
print(sorted({"torch", "usearch", "transformers", "onnxruntime"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- its directory ----------------------------------------------------------------------------------------------------
def saved(tmp_path: Path, precision: Precision = "int8") -> Path:
    return EmbeddingIndex.build(vectors(40), precision, projection=projection(), rescore=6).save(tmp_path / "index")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
def test_a_saved_index_is_the_same(tmp_path: Path, precision: Precision, projected: bool) -> None:
    made = projection() if projected else None
    index = EmbeddingIndex.build(vectors(40), precision, projection=made, rescore=6)
    index.add(vectors(3, 5))
    again = EmbeddingIndex.load(index.save(tmp_path / "index"))
    assert again.rescore == 6 and len(again) == 43 and again.bytes_per_vector == index.bytes_per_vector
    for one, other in zip(index.search(vectors(4, 1), 9), again.search(vectors(4, 1), 9), strict=True):
        np.testing.assert_array_equal(one, other)
    again.add(vectors(2, 6))
    assert len(again) == 45


def test_an_empty_index_is_saved(tmp_path: Path) -> None:
    index = EmbeddingIndex(EmbeddingCodec.fit(vectors(9), "binary"))
    assert len(EmbeddingIndex.load(index.save(tmp_path / "index"))) == 0


def test_another_index_is_replaced_only_by_force(tmp_path: Path) -> None:
    out = saved(tmp_path)
    index = EmbeddingIndex.build(vectors(3))
    with pytest.raises(ArtifactError, match="not empty"):
        index.save(out)
    index.save(out, force=True)
    assert len(EmbeddingIndex.load(out)) == 3


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    out = saved(tmp_path)
    data = bytearray((out / TENSORS).read_bytes())
    data[-1] ^= 1
    (out / TENSORS).write_bytes(data)
    with pytest.raises(TamperedError, match="SHA-256"):
        EmbeddingIndex.load(out)


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    out = saved(tmp_path)
    (out / TENSORS).unlink()
    with pytest.raises(TamperedError, match="missing"):
        EmbeddingIndex.load(out)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("version", 2), ("version", True), ("precision", "int4"), ("precision", 8), ("dims", 41), ("dims", 0)),
        *(("dims", 40.0), ("source_dims", 39), ("source_dims", 54), ("vectors", 41), ("vectors", -1), ("rescore", 0)),
        *(("rescore", None), ("dims", 1 << 70), ("precision", "float32"), ("precision", "binary")),
    ],
)
def test_facts_that_do_not_fit_the_tensors_are_refused(tmp_path: Path, name: str, value: object) -> None:
    out = saved(tmp_path)
    facts = json.loads((out / MANIFEST_NAME).read_text())[KEY]
    (out / MANIFEST_NAME).unlink()
    write_manifest(out, {KEY: {**facts, name: value}})  # with right digests, as whoever changes one would write them
    with pytest.raises(ArtifactError):
        EmbeddingIndex.load(out)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("codes", np.zeros((40, 40), np.uint8)),
        ("codes", np.zeros((40, 41), np.int8)),
        ("codes", None),
        ("ranges.step", np.zeros(40, np.float32)),
        ("ranges.step", None),
        ("ranges.middle", np.full(40, np.nan, np.float32)),
        ("projection.matrix", np.ones((DIMS, 40), np.float32)),
        ("projection.mean", None),
        ("surplus", np.zeros(1, np.float32)),
    ],
)
def test_tensors_that_are_no_codec_are_refused(tmp_path: Path, name: str, value: np.ndarray | None) -> None:
    out = saved(tmp_path)
    tensors = load_file(out / TENSORS)
    tensors.pop(name, None)
    save_file(tensors if value is None else {**tensors, name: value}, out / TENSORS)
    seal(out)
    with pytest.raises(ArtifactError):
        EmbeddingIndex.load(out)


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        *(("codes", torch.bfloat16, "BF16"), ("codes", torch.float8_e4m3fn, "F8_E4M3"), ("codes", torch.int64, "I64")),
        *(("ranges.step", torch.float16, "F16"), ("surplus", torch.bfloat16, "BF16")),
    ],
)
def test_other_dtypes_are_refused_before_they_are_read(
    tmp_path: Path, name: str, dtype: torch.dtype, said: str
) -> None:
    out = saved(tmp_path)
    tensors = {key: torch.tensor(array) for key, array in load_file(out / TENSORS).items()}
    tensors[name] = tensors.get(name, torch.ones(1)).float().to(dtype)
    safetensors.torch.save_file(tensors, out / TENSORS)
    seal(out)
    with pytest.raises(ArtifactError, match=f"tensor '{name}' is of {said}, expected F32, I8, U8"):
        EmbeddingIndex.load(out)


def test_a_header_that_is_none_is_refused(tmp_path: Path) -> None:
    out = saved(tmp_path)
    (out / TENSORS).write_bytes((out / TENSORS).read_bytes()[:-1])
    seal(out)
    with pytest.raises(ArtifactError, match="outside the file"):
        EmbeddingIndex.load(out)


def seal(out: Path) -> None:
    """Writes the manifest over whatever is there now, as a hostile writer would."""
    facts = json.loads((out / MANIFEST_NAME).read_text())[KEY]
    (out / MANIFEST_NAME).unlink()
    write_manifest(out, {KEY: facts})


def test_vectors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    out = saved(tmp_path, "float32")
    tensors = load_file(out / TENSORS)
    tensors["codes"][3, 1] = np.inf
    save_file(tensors, out / TENSORS)
    facts = json.loads((out / MANIFEST_NAME).read_text())[KEY]
    write_manifest(out, {KEY: facts})
    with pytest.raises(ArtifactError, match="not finite"):
        EmbeddingIndex.load(out)


def test_other_directories_are_no_index(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        EmbeddingIndex.load(tmp_path)
    write_manifest(tmp_path, {"recipe": {}})
    with pytest.raises(ArtifactError, match="no embedding index"):
        EmbeddingIndex.load(tmp_path)
    write_manifest(tmp_path, {KEY: {"version": 1}})
    with pytest.raises(RyzenCompileError):
        EmbeddingIndex.load(tmp_path)
