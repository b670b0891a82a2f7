"""How a collection stores its vectors: what was learnt from some of them, and the codes that each of them becomes.

Queries stay floats, so a score loses what the stored side lost and no more (asymmetric distance, Jégou, Douze and
Schmid, 2011). Everything works on directions: vectors are scaled to length 1 on the way in, and a score is the cosine
between a query and the vector that a code stands for (with a prefix of the dimensions: between prefixes). That vector's
length follows from the code. Without the division by it, vectors of which the code happens to keep less would always
rank lower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from ryzen_compile.errors import NumericalError, UsageError
from ryzen_compile.numerics.embedding_codes import (
    DTYPES,
    PRECISIONS,
    Int8Range,
    Precision,
    as_rows,
    blocks,
    normalize,
    pack_signs,
    sign_bytes,
    truncate,
    unpack_signs,
)
from ryzen_compile.numerics.embedding_projection import Projection


@dataclass(frozen=True, eq=False)
class EmbeddingCodec:
    """``source_dims`` C come in, ``dims`` d are stored: a prefix, or what ``projection`` makes of them.

    ``ranges`` belong to int8, ``sizes`` (d,) to binary: the mean magnitude of each stored dimension, which is what its
    sign stands for.
    """

    precision: Precision
    source_dims: int
    dims: int
    projection: Projection | None = None
    ranges: Int8Range | None = None
    sizes: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision is {self.precision!r}, expected {', '.join(PRECISIONS)}")
        if not 1 <= self.dims <= self.source_dims:
            raise UsageError(f"cannot store {self.dims} dimensions of vectors of {self.source_dims}")
        if self.projection is not None and self.projection.matrix.shape != (self.source_dims, self.dims):
            rows, columns = self.projection.matrix.shape
            raise UsageError(
                f"the projection makes {columns} dimensions of {rows}, expected {self.dims} of {self.source_dims}",
                hint="fit it on such vectors and to as many dimensions as are stored",
            )
        if (self.precision == "int8") != (self.ranges is not None) or (
            self.ranges is not None and len(self.ranges.step) != self.dims
        ):
            raise UsageError(
                f"precision {self.precision} with {self.dims} dimensions does not go with these int8 ranges"
            )
        if (self.precision == "binary") != (self.sizes is not None):
            raise UsageError("sizes belong to precision binary, and to it alone")
        if self.sizes is not None:
            sizes = as_rows(np.asarray(self.sizes)[None], "sizes of signs", self.dims)[0]
            if not ((sizes >= 0).all() and sizes.any()):
                raise NumericalError("sizes of signs are magnitudes, of which at least one is positive")
            object.__setattr__(self, "sizes", sizes)

    @classmethod
    def fit(
        cls, x: np.ndarray, precision: Precision, *, dims: int | None = None, projection: Projection | None = None
    ) -> Self:
        """A codec for vectors like ``x`` (N, C). ``dims`` are the projection's, or all, where it is not given.

        The projection is taken as it is: fit it before, on these vectors or others. Raises ``UsageError`` for int8 and
        vectors that do not differ, as ``Int8Range.fit`` does.
        """
        source_dims = as_rows(x, "vectors to fit a codec on").shape[1]
        if dims is None:
            dims = source_dims if projection is None else projection.dims
        plain = cls("float32", source_dims, dims, projection)
        if precision == "float32":
            return plain
        reduced = plain.reduce(x)
        ranges = Int8Range.fit(reduced) if precision == "int8" else None
        sizes = np.abs(reduced).mean(axis=0) if precision == "binary" else None
        return cls(precision, source_dims, dims, projection, ranges, sizes)

    @property
    def dtype(self) -> np.dtype:
        """Of a stored element."""
        return np.dtype(DTYPES[self.precision])

    @property
    def width(self) -> int:
        """Stored elements of a vector."""
        return sign_bytes(self.dims) if self.precision == "binary" else self.dims

    @property
    def bytes_per_vector(self) -> int:
        return self.width * self.dtype.itemsize

    def reduce(self, x: np.ndarray) -> np.ndarray:
        """Vectors (N, C) -> the float32 (N, d) that codes stand for."""
        as_rows(x, "vectors", self.source_dims)
        return truncate(x, self.dims) if self.projection is None else self.projection.apply(normalize(x))

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Vectors (N, C) -> codes (N, ``width``) of ``dtype``."""
        reduced = self.reduce(x)
        if self.ranges is not None:
            return self.ranges.encode(reduced)
        return pack_signs(reduced) if self.precision == "binary" else reduced

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes (..., ``width``) -> float32 (..., d)."""
        if self.ranges is not None:
            return self.ranges.decode(codes)
        return codes if self.sizes is None else unpack_signs(codes, self.dims) * self.sizes

    def directions(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Queries (Q, C) -> (Q, d) and (Q,): the product of the first with what a code decodes to, plus the second, is
        the product of the query, scaled to length 1, with the vector that it stands for.

        The second is what all stored vectors have in common, their mean's part.
        """
        as_rows(queries, "queries", self.source_dims)
        if self.projection is None:
            return truncate(queries, self.dims), np.zeros(len(queries), np.float32)
        unit = normalize(queries)
        return self.projection.direction(unit), unit @ self.projection.mean

    def lengths(self, decoded: np.ndarray) -> np.ndarray:
        """``decoded`` (..., d) -> the lengths (...) of the vectors that it stands for, mean + matrix . decoded."""
        squares = np.square(decoded).sum(axis=-1)
        if self.projection is not None:
            mean = self.projection.mean
            squares += 2 * (decoded @ (mean @ self.projection.matrix)) + mean @ mean
        smallest = np.finfo(np.float32).tiny  # of a vector that decodes to nothing, whose scores are 0
        lengths: np.ndarray = np.sqrt(np.maximum(squares, smallest))
        return lengths

    def scores(self, queries: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Cosines of ``queries`` (Q, C) with what all ``codes`` (N, ``width``) stand for: float32 (Q, N)."""
        directions, offset = self.directions(queries)
        found = np.empty((len(directions), len(codes)), np.float32)
        for part in blocks(len(codes), self.dims):
            decoded = self.decode(codes[part])
            found[:, part] = (directions @ decoded.T + offset[:, None]) / self.lengths(decoded)
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything but precision and dimensions, by name: what ``from_arrays`` takes, all float32."""
        found: dict[str, np.ndarray] = {}
        if self.projection is not None:
            found |= {"projection.mean": self.projection.mean, "projection.matrix": self.projection.matrix}
        if self.ranges is not None:
            found |= {"ranges.middle": self.ranges.middle, "ranges.step": self.ranges.step}
        if self.sizes is not None:
            found["sizes"] = self.sizes
        return found

    @classmethod
    def from_arrays(cls, precision: Precision, source_dims: int, dims: int, arrays: Mapping[str, np.ndarray]) -> Self:
        """The inverse of ``arrays``. Raises UsageError for arrays that do not belong together."""
        left = dict(arrays)

        def pair(kind: type, *names: str) -> object:
            found = [left.pop(name) for name in names if name in left]
            if found and len(found) < len(names):
                raise UsageError(f"a codec needs all of {', '.join(names)}, or none")
            return kind(*found) if found else None

        projection = pair(Projection, "projection.mean", "projection.matrix")
        ranges = pair(Int8Range, "ranges.middle", "ranges.step")
        sizes = left.pop("sizes", None)
        if left:
            raise UsageError(f"a codec knows no {', '.join(sorted(left))}")
        return cls(precision, source_dims, dims, projection, ranges, sizes)  # type: ignore[arg-type]
