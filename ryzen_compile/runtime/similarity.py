"""How alike vectors are, by the four measures that sentence-transformers names; the larger, the more alike."""

from __future__ import annotations

import numpy as np

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.embedding_codes import as_rows, blocks
from ryzen_compile.spec import Similarity


def similarity(measure: Similarity, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a`` (N, C) against ``b`` (M, C): float32 (N, M); distances are negative. A zero vector has cosine 0 to all.

    Raises ``UsageError`` for vectors of different dimensions and ``NumericalError`` for values that are not finite.
    """
    rows = as_rows(a, "the first vectors")
    columns = as_rows(b, "the second vectors", rows.shape[1])
    if measure == "dot":
        return rows @ columns.T
    if measure == "cosine":
        return _unit(rows) @ _unit(columns).T
    order = {"euclidean": 2, "manhattan": 1}.get(measure)
    if order is None:
        raise UsageError(f"there is no similarity {measure!r}", hint="use cosine, dot, euclidean or manhattan")
    found = np.empty((len(rows), len(columns)), np.float32)
    for number, row in enumerate(rows):  # differences, whose squares lose nothing of two vectors that are almost equal
        for part in blocks(len(columns), rows.shape[1]):
            found[number, part] = -np.linalg.norm(columns[part] - row, ord=order, axis=1)
    return found


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)
