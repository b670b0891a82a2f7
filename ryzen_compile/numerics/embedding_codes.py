"""Embedding vectors in fewer bytes: fewer dimensions, 8-bit integers, one bit.

A stored vector is a row of codes and nothing else: ranges belong to the whole collection. Shape letters: N vectors,
C dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self, get_args

import numpy as np

from ryzen_compile.errors import NumericalError, UsageError

Precision = Literal["float32", "int8", "binary"]  # of what is stored: the values, codes of an Int8Range, packed signs
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DTYPES = {"float32": np.float32, "int8": np.int8, "binary": np.uint8}
LIMIT = 127  # the largest int8 code and, negated, the smallest: ranges lie evenly around their middle
BLOCK_BYTES = 1 << 24  # of float32 that are decoded at a time


@dataclass(frozen=True, eq=False)
class Int8Range:
    """What int8 codes stand for in each dimension: ``middle + step * code``, both (C,) float32, every step positive."""

    middle: np.ndarray
    step: np.ndarray

    def __post_init__(self) -> None:
        middle, step = np.asarray(self.middle, np.float32), np.asarray(self.step, np.float32)
        if middle.ndim != 1 or not middle.size or middle.shape != step.shape:
            raise UsageError(f"int8 ranges need middle and step of one shape (C,), got {middle.shape} and {step.shape}")
        if not (np.isfinite(middle).all() and np.isfinite(step).all() and (step > 0).all()):
            raise NumericalError("int8 ranges need finite middles and positive, finite steps")
        object.__setattr__(self, "middle", middle)
        object.__setattr__(self, "step", step)

    @classmethod
    def fit(cls, x: np.ndarray) -> Self:
        """The ranges from the least to the largest value that each dimension takes in ``x`` (N, C).

        A dimension that is constant there gets the widest range among the others, since nothing is known of its spread.
        Raises ``UsageError`` where all are constant, as those of a single vector are.
        """
        rows = as_rows(x, "vectors to calibrate int8 ranges on").astype(np.float64)
        low, high = rows.min(axis=0), rows.max(axis=0)
        step = (high - low) / (2 * LIMIT)
        smallest = np.finfo(np.float32).tiny
        if step.max() < smallest:
            raise UsageError(
                f"int8 ranges need vectors that differ, got {len(rows)} without a difference", hint="calibrate on more"
            )
        step[step < smallest] = step.max()
        return cls(((low + high) / 2).astype(np.float32), step.astype(np.float32))

    def encode(self, x: np.ndarray) -> np.ndarray:
        """``x`` (N, C) -> int8 codes (N, C): rounded half to even, clamped to the range."""
        rows = as_rows(x, "vectors", len(self.step))
        return np.clip(np.rint((rows - self.middle) / self.step), -LIMIT, LIMIT).astype(np.int8)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """int8 ``codes`` (..., C) -> float32 (..., C)."""
        _check_codes(codes, np.int8, len(self.step))
        return codes * self.step + self.middle


def truncate(x: np.ndarray, dims: int) -> np.ndarray:
    """The first ``dims`` dimensions of ``x`` (N, C), scaled to length 1: float32 (N, dims).

    For models trained so that prefixes of their vectors serve by themselves (Matryoshka, Kusupati et al., 2022); of
    other models' vectors a prefix keeps what chance put there. Raises UsageError for ``dims`` outside 1..C and
    NumericalError for a row that is not finite or whose prefix has no length.
    """
    rows = as_rows(x, "vectors")
    if not 1 <= dims <= rows.shape[1]:
        raise UsageError(f"cannot truncate vectors of {rows.shape[1]} dimensions to {dims}")
    return normalize(rows[:, :dims])


def normalize(x: np.ndarray) -> np.ndarray:
    """The rows of ``x`` (N, C) scaled to length 1: float32. Raises NumericalError for one that has no length."""
    rows = as_rows(x, "vectors").astype(np.float64)  # in which no square of a float32 over- or underflows
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise NumericalError(f"vector {int(np.argmin(lengths))} is zero: it has no direction")
    return (rows / lengths).astype(np.float32)


def pack_signs(x: np.ndarray) -> np.ndarray:
    """One bit for each value of ``x`` (N, C): uint8 (N, ceil(C / 8)).

    The bit is 1 where the value is positive; the first dimension is the highest bit of the first byte, and the bits
    behind the last dimension are 0, so that they add nothing to a Hamming distance.
    """
    return np.packbits(as_rows(x, "vectors") > 0, axis=1)


def unpack_signs(packed: np.ndarray, dims: int) -> np.ndarray:
    """``packed`` (..., ceil(dims / 8)) -> float32 (..., dims) of 1 and -1: what ``pack_signs`` kept."""
    if dims < 1:
        raise UsageError(f"signs of {dims} dimensions are not known, expected 1 or more")
    _check_codes(packed, np.uint8, sign_bytes(dims))
    bits = np.unpackbits(packed, axis=-1, count=dims)
    return bits.astype(np.float32) * 2 - 1


def sign_bytes(dims: int) -> int:
    """Bytes of one vector's signs."""
    return (dims + 7) // 8


def blocks(rows: int, dims: int) -> list[slice]:
    """``rows`` cut so that ``dims`` float32 values of each in a part take ``BLOCK_BYTES`` at most, or one row."""
    size = max(1, BLOCK_BYTES // (4 * dims))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def as_rows(x: np.ndarray, what: str, dims: int | None = None) -> np.ndarray:
    """``x`` as float32 (N, C), N and C at least 1 and C ``dims`` where given; named ``what`` in an error.

    Raises UsageError for another shape or dtype and NumericalError for values that are not finite in float32.
    """
    x = np.asarray(x)
    if x.ndim != 2 or 0 in x.shape or x.dtype.kind not in "fiu":
        raise UsageError(f"{what}: expected numbers of shape (N, C), got {x.dtype} {x.shape}")
    if dims is not None and x.shape[1] != dims:
        raise UsageError(f"{what}: expected {dims} dimensions, got {x.shape[1]}")
    with np.errstate(over="ignore"):  # what overflows is reported as any other infinity
        rows = x.astype(np.float32, copy=False)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise NumericalError(f"{what}: row {int(np.argmin(finite))} holds values that are not finite")
    return rows


def _check_codes(codes: np.ndarray, dtype: type, width: int) -> None:
    if codes.dtype != dtype or codes.ndim < 1 or codes.shape[-1] != width:
        expected = f"{np.dtype(dtype)} (..., {width})"
        raise UsageError(f"expected codes {expected}, got {codes.dtype} {codes.shape}")
