"""Search among stored embeddings: a collection in float32, int8 or one bit a dimension, and float queries.

Up to ``exact_rows`` vectors a query looks at every one of them, in NumPy; beyond, at what a graph of near neighbours
leads to (HNSW, Malkov and Yashunin, 2018, by the library usearch). Signs are compared as bits first (Hamming distance);
then the best ``rescore * k`` are ranked by the product of the float query with what their stored codes stand for
(Yamada, Asai and Hajishirzi, Binary Passage Retriever, 2021), for which nothing else is kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np

from ryzen_compile.errors import ConfigError, UsageError
from ryzen_compile.numerics.embedding_codec import EmbeddingCodec, Precision
from ryzen_compile.numerics.embedding_codes import as_rows, blocks, pack_signs
from ryzen_compile.numerics.embedding_projection import Projection
from ryzen_compile.runtime.embedding_index_file import read_index, write_index

RESCORE = 4
EXACT_ROWS = 50_000  # a query of 384 bits looks at as many in a few milliseconds


class EmbeddingIndex:
    """Stored vectors, numbered from 0 in the order in which they were added, under one ``codec``.

    ``rescore`` times as many candidates as are asked for are ranked again wherever the first ranking was a rougher one.
    The graph is made by the first search that needs it and never saved: it follows from the codes.
    """

    def __init__(self, codec: EmbeddingCodec, *, rescore: int = RESCORE, exact_rows: int = EXACT_ROWS) -> None:
        if rescore < 1:
            raise UsageError(f"rescore is how many candidates are ranked for each result, 1 or more, got {rescore}")
        if exact_rows < 0:
            raise UsageError(f"exact_rows must be 0 or more, got {exact_rows}")
        self.codec = codec
        self.rescore = rescore
        self.exact_rows = exact_rows
        self._parts = [np.empty((0, codec.width), codec.dtype)]
        self._graph: Any = None

    @classmethod
    def build(
        cls,
        vectors: np.ndarray,
        precision: Precision = "float32",
        *,
        dims: int | None = None,
        projection: Projection | None = None,
        rescore: int = RESCORE,
        exact_rows: int = EXACT_ROWS,
    ) -> Self:
        """An index of ``vectors`` (N, C), N >= 1, under a codec fitted to them.

        ``dims`` keeps a prefix (of vectors trained for it), ``projection`` what it makes of them. To add to a
        collection that is yet to come, fit an ``EmbeddingCodec`` on a sample and start from that. Raises UsageError for
        int8 and vectors that do not differ, as a single one does not: nothing tells their ranges.
        """
        codec = EmbeddingCodec.fit(vectors, precision, dims=dims, projection=projection)
        index = cls(codec, rescore=rescore, exact_rows=exact_rows)
        index.add(vectors)
        return index

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @property
    def bytes_per_vector(self) -> int:
        """What is stored of one vector. The codec is shared by all; the graph, where there is one, is extra."""
        return self.codec.bytes_per_vector

    @property
    def codes(self) -> np.ndarray:
        """(N, W) as stored."""
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        return self._parts[0]

    def add(self, vectors: np.ndarray) -> np.ndarray:
        """Stores ``vectors`` (n, C) and returns their numbers, int64 (n,). Those before keep theirs."""
        codes = self.codec.encode(vectors)
        first = len(self)
        self._parts.append(codes)
        return np.arange(first, first + len(codes))

    def search(self, queries: np.ndarray, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """The ``min(k, N)`` best for each of ``queries`` (Q, C), best first: numbers int64 and scores float32 (Q, k).

        A score is the cosine with what is stored. Of equal scores the lower number comes first, and is the one that is
        kept (where candidates are ranked, among these). Raises UsageError for k < 1, an empty index and queries of
        another width, NumericalError for queries that are not finite or zero, ConfigError when more than ``exact_rows``
        vectors need usearch and it is not installed.
        """
        if k < 1:
            raise UsageError(f"k must be 1 or more, got {k}")
        if not len(self):
            raise UsageError("the index holds no vectors", hint="add some first")
        queries = as_rows(queries, "queries", self.codec.source_dims)
        k = min(k, len(self))
        count = min(self.rescore * k, len(self))
        if len(self) > self.exact_rows:
            return self._ranked(queries, self._led_to(queries, count), k)
        if self.codec.precision == "binary" and count < len(self):
            return self._ranked(queries, _nearest_bits(self.codes, self._bits(queries), count), k)
        parts = blocks(len(queries), len(self))  # whose scores are held at a time
        found = [_best_of_all(self.codec.scores(queries[part], self.codes), k) for part in parts]
        ids, best = zip(*found, strict=True)
        return np.concatenate(ids), np.concatenate(best)

    def save(self, out: str | Path, *, force: bool = False) -> Path:
        """Writes the directory ``out`` (codes, codec and a manifest with their digests), all at once. Raises what
        ``publish.Staging`` raises; ``force`` replaces an earlier one."""
        return write_index(out, self.codec, self.codes, {"rescore": self.rescore}, force=force)

    @classmethod
    def load(cls, directory: str | Path, *, exact_rows: int = EXACT_ROWS) -> Self:
        """What ``save`` wrote. Raises ArtifactError for a directory that is no index, TamperedError for one that was
        changed, UnsafeError for links in it."""
        codec, codes, settings = read_index(directory)
        index = cls(codec, rescore=settings["rescore"], exact_rows=exact_rows)
        index._parts = [codes]
        return index

    def _bits(self, queries: np.ndarray) -> np.ndarray:
        return pack_signs(self.codec.reduce(queries))

    def _ranked(self, queries: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best ``k`` of ``candidates`` (Q, M) by the float query and the stored codes."""
        directions, offset = self.codec.directions(queries)
        scores = np.empty(candidates.shape, np.float32)
        for part in blocks(len(scores), candidates.shape[1] * self.codec.dims):
            decoded = self.codec.decode(self.codes[candidates[part]])
            products = (decoded @ directions[part, :, None])[..., 0] + offset[part, None]
            scores[part] = products / self.codec.lengths(decoded)
        return _best(candidates, scores, k)

    def _led_to(self, queries: np.ndarray, count: int) -> np.ndarray:
        """(Q, count) candidates that the graph leads to."""
        graph = self._graph_of_all()
        if self.codec.precision == "binary":
            targets = self._bits(queries)
        else:
            targets, _ = self.codec.directions(queries)
            if self.codec.ranges is not None:  # int8 as well: an order of products knows no scale
                targets = targets * self.codec.ranges.step
                largest = np.abs(targets).max(axis=1, keepdims=True)
                targets = np.rint(targets / largest * 127).astype(np.int8)
        matches = graph.search(targets, count)
        full = np.reshape(getattr(matches, "counts", len(matches)), -1) >= count  # one query's matches have no counts
        found = np.empty((len(targets), count), np.int64)
        found[full] = np.reshape(matches.keys, (len(targets), -1))[full]
        if not full.all():  # parts of a graph that nothing leads to
            found[~full] = graph.search(targets[~full], count, exact=True).keys
        return found

    def _graph_of_all(self) -> Any:
        if self._graph is None:
            self._graph = _new_graph(self.codec)
        known = len(self._graph)
        if known < len(self):
            self._graph.add(np.arange(known, len(self), dtype=np.uint64), self.codes[known:])
        return self._graph


def _new_graph(codec: EmbeddingCodec) -> Any:
    try:
        from usearch.index import Index, MetricKind, ScalarKind
    except ImportError as error:
        raise ConfigError(
            f"a search among this many vectors needs the package usearch: {error}",
            hint="pip install 'ryzen-compile[search]', or set exact_rows to look at every vector",
        ) from error
    if codec.precision == "binary":
        return Index(ndim=8 * codec.width, metric=MetricKind.Hamming, dtype=ScalarKind.B1)
    kind = ScalarKind.I8 if codec.precision == "int8" else ScalarKind.F32
    return Index(ndim=codec.dims, metric=MetricKind.IP, dtype=kind)


def _nearest_bits(codes: np.ndarray, bits: np.ndarray, count: int) -> np.ndarray:
    """(Q, count) numbers of the codes (N, W) that differ from ``bits`` (Q, W) in the fewest places, in no order.

    Of equally distant ones the lower numbers are taken.
    """
    word = next(kind for kind in (np.uint64, np.uint32, np.uint16, np.uint8) if not codes.shape[1] % kind().itemsize)
    stored, asked = codes.view(word), bits.view(word)
    numbers = np.arange(len(codes))
    found = np.empty((len(bits), count), np.int64)
    for row, one in enumerate(asked):
        distance = np.bitwise_count(stored ^ one).sum(axis=1, dtype=np.int64)
        found[row] = np.argpartition(distance * len(codes) + numbers, count - 1)[:count]
    return found


def _best_of_all(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """``_best`` of all numbers, of which few are sorted: those whose scores (Q, N) are no less than the k-th."""
    ids = np.empty((len(scores), k), np.int64)
    least = np.partition(scores, -k, axis=1)[:, -k]
    for row, one in enumerate(scores):
        kept = np.flatnonzero(one >= least[row])  # more than k where scores are equal, lower numbers first
        ids[row] = kept[np.argsort(-one[kept], kind="stable")[:k]]
    return ids, np.take_along_axis(scores, ids, axis=1)


def _best(ids: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` best of ``ids`` (Q, M) by their ``scores`` (Q, M), best first."""
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
