"""Lookups in tables of codes: the one model-local function that computes them, in standard operators.

It gathers the rows of codes that are asked for and decodes those alone. Codes that fill bytes are decoded a byte at a
time, by a table of what each byte stands for: for 4 and 2 bits about four and six times as fast as shifting every code
into place, which is left for codes that lie across bytes.

The body is written against ``Maker``, so that what recognizes such a function (``structure``) builds it, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.backends.onnxruntime.emit import Emitter

FLOAT, INT32, INT64, UINT32 = 1, 6, 7, 12  # type numbers
BYTE_VALUES = 256
Value = TypeVar("Value")


class Maker(Protocol[Value]):
    """What a body needs of an ``Emitter``."""

    def op(self, op_type: str, *inputs: Value | None, **attributes: Any) -> Value: ...
    def constant(self, value: Any, dtype: type = ...) -> Value: ...
    def ints(self, *values: int) -> Value: ...


@dataclass(frozen=True)
class Lookup:
    """Rows of ``width`` weights as a ``CodebookTensor`` stores them, and which of its tensors are there.

    ``group`` weights share a scale; 0: the whole row, -1: there are no scales. ``kept`` rows come with their slots.
    """

    width: int
    bits: int
    dim: int
    stages: int
    group: int
    gain: bool
    offset: bool
    kept: bool

    @property
    def codes(self) -> int:
        """Of one stage in a row."""
        return self.width // self.dim

    @property
    def row_bytes(self) -> int:
        return -(-self.stages * self.codes * self.bits // 8)

    @property
    def by_bytes(self) -> bool:
        """No code lies across two bytes, and no byte across two stages."""
        return 8 % self.bits == 0 and (self.stages == 1 or self.codes * self.bits % 8 == 0)

    @property
    def least_bytes(self) -> int:
        """Of the body: where each code lies is a constant in it, of eight bytes, unless codes fill bytes."""
        return 0 if self.by_bytes else 8 * self.stages * self.codes

    @property
    def arity(self) -> int:
        """Inputs of the function."""
        return 3 + (self.group >= 0) + self.gain + self.offset + 2 * self.kept

    def body(self, e: Maker[Value], ids: Value, codes: Value, codebook: Value, *given: Value) -> tuple[Value]:
        """``ids`` (...), then the table's tensors in the order of ``ryzen::codebook_embedding``: (..., width) float32.

        Every step is a node of its own, in the order of the reference, so results are equal to the bit. Where the
        reference raises, ONNX Runtime raises, too, but for ids from -V to -1: Gather counts them from the end.
        """
        rest = iter(given)
        flat = e.op("Reshape", ids, e.ints(-1))
        stored = e.op("Gather", codes, flat)
        stages = [self._entries(e, stored, codebook, stage) for stage in range(self.stages)]
        rows = stages[0] if self.stages == 1 else e.op("Add", *stages)
        if self.group >= 0:
            rows = self._scaled(e, rows, e.op("Cast", e.op("Gather", next(rest), flat), to=FLOAT))
        if self.gain:
            rows = e.op("Mul", rows, next(rest))
        if self.offset:
            rows = e.op("Add", rows, next(rest))
        if self.kept:
            slots = e.op("Cast", e.op("Gather", next(rest), flat), to=INT64)
            rows = _replaced(e, rows, slots, next(rest))
        shape = e.op("Concat", e.op("Shape", ids), e.ints(self.width), axis=0)
        return (e.op("Reshape", rows, shape, allowzero=1),)

    def _entries(self, e: Maker[Value], stored: Value, codebook: Value, stage: int) -> Value:
        """One stage's entries side by side: ``stored`` (n, row_bytes) uint8 -> (n, width) float32."""
        entries = e.op("Gather", codebook, e.constant(stage, np.int64))
        if not self.by_bytes:
            picked = e.op("Gather", entries, self._shifted(e, stored, stage))
            return e.op("Reshape", picked, e.ints(0, self.width))
        each = 8 // self.bits  # codes in a byte
        size = -(-self.codes // each)  # bytes of a stage; with two, they fill theirs
        if self.stages == 2:
            stored = e.op("Slice", stored, e.ints(stage * size), e.ints((stage + 1) * size), e.ints(1))
        if each > 1:
            inside = np.arange(BYTE_VALUES)[:, None] >> (np.arange(each) * self.bits) & ((1 << self.bits) - 1)
            of_bytes = e.op("Gather", entries, e.constant(inside, np.int32))
            entries = e.op("Reshape", of_bytes, e.ints(BYTE_VALUES, each * self.dim))
        rows = e.op("Gather", entries, e.op("Cast", stored, to=INT32))
        rows = e.op("Reshape", rows, e.ints(0, size * each * self.dim))
        if size * each == self.codes:
            return rows
        return e.op("Slice", rows, e.ints(0), e.ints(self.width), e.ints(1))

    def _shifted(self, e: Maker[Value], stored: Value, stage: int) -> Value:
        """One stage's codes, (n, codes) int32, out of the two bytes in which each begins and ends."""
        first = np.arange(stage * self.codes, (stage + 1) * self.codes) * self.bits  # bits of the row
        wide = e.op("Cast", stored, to=UINT32)
        one, axis = e.ints(1), e.ints(1)
        ahead = e.op("Slice", wide, one, e.ints(self.row_bytes), axis)
        ahead = e.op("Concat", ahead, e.op("Slice", wide, e.ints(0), one, axis), axis=1)  # nothing ends behind the row
        pairs = e.op("BitwiseOr", wide, e.op("BitShift", ahead, e.constant(8, np.uint32), direction="LEFT"))
        codes = e.op("Gather", pairs, e.constant(first // 8, np.int32), axis=1)
        codes = e.op("BitShift", codes, e.constant(first % 8, np.uint32), direction="RIGHT")
        codes = e.op("BitwiseAnd", codes, e.constant((1 << self.bits) - 1, np.uint32))
        return e.op("Cast", codes, to=INT32)

    def _scaled(self, e: Maker[Value], rows: Value, scales: Value) -> Value:
        """``scales`` (n, groups)."""
        if self.group in (0, self.width):
            return e.op("Mul", rows, scales)
        groups = e.op("Reshape", rows, e.ints(0, self.width // self.group, self.group))
        scaled = e.op("Mul", groups, e.op("Unsqueeze", scales, e.ints(2)))
        return e.op("Reshape", scaled, e.ints(0, self.width))


def codebook_embedding(
    e: Emitter,
    ids: ir.Value,
    codes: ir.Value,
    codebook: ir.Value,
    scales: ir.Value | None,
    gain: ir.Value | None,
    offset: ir.Value | None,
    slots: ir.Value | None,
    kept: ir.Value | None,
    *,
    width: int,
    bits: int,
    group: int,
) -> tuple[ir.Value, ...]:
    """The rule of ``ryzen::codebook_embedding``: a call of the function for tables of this form.

    Raises ``ValueError`` when the codebook's shape is not known: what the body computes depends on it.
    """
    if codebook.shape is None or len(codebook.shape) != 3 or not codebook.shape.is_static():
        raise ValueError(f"the shape of {codebook.name} must be static, (stages, entries, dim), it is {codebook.shape}")
    stages, _, dim = codebook.shape.numpy()
    form = Lookup(width, bits, dim, stages, group, gain is not None, offset is not None, kept is not None)
    tensors = (ids, codes, codebook, scales, gain, offset, slots, kept)
    return e.call("CodebookLookup", (form,), form.body, tuple(tensor for tensor in tensors if tensor is not None))


def _replaced(e: Maker[Value], rows: Value, slots: Value, kept: Value) -> Value:
    """``rows`` (n, width) with those of ``kept`` where ``slots`` (n,) int64 are not negative."""
    none = e.constant(0, np.int64)
    whole = e.op("Unsqueeze", e.op("GreaterOrEqual", slots, none), e.ints(1))
    return e.op("Where", whole, e.op("Cast", e.op("Gather", kept, e.op("Max", slots, none)), to=FLOAT), rows)
