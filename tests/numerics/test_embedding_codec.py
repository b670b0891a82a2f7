"""Codecs: what comes back of a vector, and that scores are products with it."""

from __future__ import annotations

import numpy as np
import pytest

from ryzen_compile.errors import NumericalError, UsageError
from ryzen_compile.numerics import embedding_codes
from ryzen_compile.numerics.embedding_codec import PRECISIONS, EmbeddingCodec, Precision
from ryzen_compile.numerics.embedding_codes import Int8Range, normalize
from ryzen_compile.numerics.embedding_projection import Projection

DIMS = 37


def vectors(count: int = 200, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, DIMS)) * np.geomspace(2, 0.2, DIMS) + 0.3).astype(np.float32)


def codecs() -> list[EmbeddingCodec]:
    x = vectors()
    unit = normalize(x)
    found = []
    for precision in PRECISIONS:
        found += [
            EmbeddingCodec.fit(x, precision),
            EmbeddingCodec.fit(x, precision, dims=11),
            EmbeddingCodec.fit(x, precision, projection=Projection.centering(unit)),
            EmbeddingCodec.fit(x, precision, projection=Projection.itq(unit, 13)),
        ]
    return found


def name(codec: EmbeddingCodec) -> str:
    return f"{codec.precision}-{codec.dims}{'' if codec.projection is None else '-projected'}"


@pytest.mark.parametrize("codec", codecs(), ids=name)
def test_codes_have_the_stated_shape_and_size(codec: EmbeddingCodec) -> None:
    codes = codec.encode(vectors(7, 1))
    assert codes.shape == (7, codec.width) and codes.dtype == codec.dtype and codes.flags.c_contiguous
    assert codes.nbytes == 7 * codec.bytes_per_vector
    bits = {"float32": 32, "int8": 8, "binary": 1}[codec.precision]
    assert codec.bytes_per_vector == (codec.dims * bits + 7) // 8


@pytest.mark.parametrize("codec", codecs(), ids=name)
def test_scores_are_cosines_with_what_is_stored(codec: EmbeddingCodec) -> None:
    x, queries = vectors(50, 1), vectors(5, 2)
    codes = codec.encode(x)
    decoded = codec.decode(codes).astype(np.float64)
    if codec.projection is not None:  # back in the space of the vectors
        decoded = decoded @ codec.projection.matrix.T.astype(np.float64) + codec.projection.mean
        asked = normalize(queries)
    else:
        asked = normalize(queries[:, : codec.dims])
    decoded /= np.linalg.norm(decoded, axis=1, keepdims=True)
    np.testing.assert_allclose(codec.scores(queries, codes), asked @ decoded.T, atol=3e-6)  # float32 sums of 37


@pytest.mark.parametrize("rows", [0.1, 1, 7, 100])
@pytest.mark.parametrize("codec", codecs(), ids=name)
def test_scores_do_not_depend_on_the_size_of_a_block(
    codec: EmbeddingCodec, rows: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, codes = vectors(5, 2), codec.encode(vectors(50, 1))
    expected = codec.scores(queries, codes)
    monkeypatch.setattr(embedding_codes, "BLOCK_BYTES", int(4 * codec.dims * rows))
    np.testing.assert_allclose(codec.scores(queries, codes), expected, atol=3e-6)  # float32 sums of 37


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scores_estimate_the_cosine(precision: Precision) -> None:
    x, queries = vectors(300, 1), vectors(20, 2)
    codec = EmbeddingCodec.fit(x, precision, projection=Projection.itq(normalize(x), DIMS))
    cosines = normalize(queries) @ normalize(x).T
    error = float(np.abs(codec.scores(5 * queries, codec.encode(3 * x)) - cosines).mean())  # lengths do not matter
    assert (
        error < {"float32": 1e-6, "int8": 2e-3, "binary": 0.1}[precision]
    )  # a hundredth, and a third, of their spread
    assert cosines.std() > 0.2


@pytest.mark.parametrize("codec", codecs(), ids=name)
def test_a_codec_is_its_arrays(codec: EmbeddingCodec) -> None:
    arrays = codec.arrays()
    assert all(array.dtype == np.float32 for array in arrays.values())
    again = EmbeddingCodec.from_arrays(codec.precision, codec.source_dims, codec.dims, arrays)
    x = vectors(9, 3)
    np.testing.assert_array_equal(again.encode(x), codec.encode(x))
    np.testing.assert_array_equal(again.scores(x, again.encode(x)), codec.scores(x, codec.encode(x)))
    for missing in arrays:
        kept = {key: array for key, array in arrays.items() if key != missing}
        with pytest.raises(UsageError):
            EmbeddingCodec.from_arrays(codec.precision, codec.source_dims, codec.dims, kept)
    with pytest.raises(UsageError, match="knows no surplus"):
        EmbeddingCodec.from_arrays(codec.precision, codec.source_dims, codec.dims, {**arrays, "surplus": np.ones(3)})


def test_what_does_not_go_together_is_refused() -> None:
    x = vectors()
    projection = Projection.pca(x, 5)
    ranges = Int8Range.fit(x[:, :5])
    for wrong in (
        lambda: EmbeddingCodec.fit(x, "int4"),  # type: ignore[arg-type]
        lambda: EmbeddingCodec.fit(x, "float32", dims=DIMS + 1),
        lambda: EmbeddingCodec.fit(x, "float32", dims=0),
        lambda: EmbeddingCodec.fit(x, "float32", dims=6, projection=projection),
        lambda: EmbeddingCodec.fit(x[:, :9], "float32", projection=projection),
        lambda: EmbeddingCodec("int8", DIMS, 5),
        lambda: EmbeddingCodec("int8", DIMS, 6, ranges=ranges),
        lambda: EmbeddingCodec("float32", DIMS, 5, ranges=ranges),
        lambda: EmbeddingCodec("binary", DIMS, 5),
        lambda: EmbeddingCodec("binary", DIMS, 5, sizes=np.ones(6)),
        lambda: EmbeddingCodec("float32", DIMS, 5, sizes=np.ones(5)),
        lambda: EmbeddingCodec.fit(x, "binary").encode(x[:, :9]),
        lambda: EmbeddingCodec.fit(x, "binary").scores(x[:, :9], np.zeros((1, 5), np.uint8)),
    ):
        with pytest.raises(UsageError):
            wrong()
    for sizes in (np.zeros(5), np.full(5, -1.0), np.full(5, np.nan)):
        with pytest.raises(NumericalError):
            EmbeddingCodec("binary", DIMS, 5, sizes=sizes)


def test_vectors_without_a_direction_are_refused() -> None:
    x = vectors(4)
    x[2] = 0
    for projection in (None, Projection.centering(vectors())):
        codec = EmbeddingCodec.fit(vectors(), "binary", projection=projection)
        for use in (codec.encode, codec.directions):
            with pytest.raises(NumericalError, match="vector 2 is zero"):
                use(x)
