"""How one token's key or value lies in a cache: as floats, as integers with fixed scales, or with scales of their own.

A stored row never refers to another token's: it can be moved, copied, dropped and saved alone, and no scale ever spans
tokens written at different times. Three kinds, by their names:

    fp32, fp16       D floats
    int8, int4       D signed integers; the scale of every channel is fixed when the model is made (``k_scale`` of
                     ONNX Runtime's GroupQueryAttention, whose layout this is: two 4-bit codes in a byte, the even
                     channel low, 8 added)
    int8-g32 ...     the same codes in bytes, then one float16 scale for every group of 32 channels of this very row
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ryzen_compile.errors import ConfigError

SCALE_BYTES = 2  # of a float16
REACHES = (1.1, 1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's largest magnitude, what code -8 stands for
LARGEST_HALF = float(np.finfo(np.float16).max)
SMALLEST_SCALE = float(np.finfo(np.float16).tiny)


@dataclass(frozen=True)
class RowFormat:
    """``bits`` 32 or 16 (floats), 8 or 4 (integers) a channel; ``group`` channels share a scale in the row, 0: scales
    are fixed."""

    bits: int = 32
    group: int = 0

    def __post_init__(self) -> None:
        if self.bits not in (32, 16, 8, 4) or self.group < 0 or (self.group and (self.floats or self.group % 2)):
            raise ConfigError(
                f"a cache row of {self.bits} bits in groups of {self.group} is not known",
                hint="bits are 32, 16, 8 or 4, groups even, and floats have none",
            )

    def __str__(self) -> str:
        name = f"{'fp' if self.floats else 'int'}{self.bits}"
        return f"{name}-g{self.group}" if self.group else name

    @classmethod
    def parse(cls, text: str) -> RowFormat:
        """The inverse of ``str``; raises ``ConfigError``."""
        name, _, group = text.partition("-g")
        bits = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}.get(name)
        if bits is None or str(cls(bits, int(group) if group.isdecimal() else 0)) != text:
            raise ConfigError(f"{text!r} is no cache format", hint="for example fp32, fp16, int8, int4 or int8-g32")
        return cls(bits, int(group or 0))

    @property
    def floats(self) -> bool:
        """Whether channels are stored as they are, neither coded nor scaled."""
        return self.bits >= 16

    @property
    def dtype(self) -> np.dtype:
        """Of a stored element."""
        if self.floats:
            return np.dtype(np.float32 if self.bits == 32 else np.float16)
        return np.dtype(np.int8 if self.bits == 8 and not self.group else np.uint8)

    @property
    def limit(self) -> int:
        """The largest code; the smallest is ``-limit - 1``."""
        return int(2 ** (self.bits - 1)) - 1

    def width(self, dim: int) -> int:
        """Stored elements of a row of ``dim`` channels; raises ``ConfigError`` when they do not divide."""
        if self.floats:
            return dim
        if dim % (self.group or 1) or (self.bits == 4 and dim % 2):
            raise ConfigError(f"cache format {self} does not divide a head of {dim} channels")
        return dim * self.bits // 8 + (dim // self.group * SCALE_BYTES if self.group else 0)

    def channels(self, width: int) -> int:
        """The inverse of ``width``."""
        if self.floats:
            return width
        row = self.bits * self.group + 8 * SCALE_BYTES  # bits of a group and its scale
        return width * 8 * self.group // row if self.group else width * 8 // self.bits


def encode(x: np.ndarray, form: RowFormat, scale: np.ndarray | None = None) -> np.ndarray:
    """Rows ``(..., D)`` of floats as they are stored, ``(..., form.width(D))``.

    ``scale``, broadcastable to ``x``, is what fixed scales are; codes round half to even and are clamped, as are values
    beyond float16. A row that carries its scales chooses them itself: at 4 bits, of ``REACHES`` the one with the least
    squared error, with the sign that gives the value of largest magnitude the code that the other side lacks.
    """
    if form.bits == 16:
        x = np.clip(x, -LARGEST_HALF, LARGEST_HALF)
    if form.floats:
        return x.astype(form.dtype)
    if not form.group:
        if scale is None:
            raise ConfigError(f"cache format {form} needs scales", hint="calibrate, or use a grouped format")
        codes = np.clip(np.rint(x / scale), -form.limit - 1, form.limit).astype(np.int8)
        return codes if form.bits == 8 else _packed(codes)
    groups = x.reshape(*x.shape[:-1], -1, form.group)
    scales = _group_scales(groups, form)
    codes = np.clip(np.rint(groups / scales), -form.limit - 1, form.limit).astype(np.int8).reshape(x.shape)
    stored = codes.view(np.uint8) if form.bits == 8 else _packed(codes)
    carried = np.ascontiguousarray(scales[..., 0].astype(np.float16)).view(np.uint8)
    return np.concatenate((stored, carried), axis=-1)


def decode(rows: np.ndarray, form: RowFormat, dim: int, scale: np.ndarray | None = None) -> np.ndarray:
    """What stored rows stand for: float32 ``(..., dim)``."""
    if form.floats:
        return rows if form.bits == 32 else rows.astype(np.float32)
    if not form.group:
        codes = rows if form.bits == 8 else _unpacked(rows)
        decoded: np.ndarray = (codes * scale).astype(np.float32)
        return decoded
    split = dim * form.bits // 8
    stored = np.ascontiguousarray(rows[..., :split])
    codes = stored.view(np.int8) if form.bits == 8 else _unpacked(stored)
    scales = np.ascontiguousarray(rows[..., split:]).view(np.float16).astype(np.float32)
    grouped: np.ndarray = codes.reshape(*codes.shape[:-1], -1, form.group) * scales[..., None]
    return grouped.reshape(codes.shape)


def hadamard(dim: int) -> np.ndarray:
    """Sylvester's orthogonal matrix of ``dim``, a power of two: float64, symmetric, its own inverse.

    It spreads one channel's outlier over all of them (QuaRot, Ashkboos et al., 2024).
    """
    if dim < 1 or dim & (dim - 1):
        raise ConfigError(f"a Hadamard matrix of {dim} is not known", hint="head sizes that are powers of two have one")
    matrix = np.ones((1, 1))
    while len(matrix) < dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(dim)


def _group_scales(groups: np.ndarray, form: RowFormat) -> np.ndarray:
    """``groups`` (..., G) -> their scales (..., 1), exact in float16."""
    reach = LARGEST_HALF * form.limit
    groups = np.clip(groups, -reach, reach)  # no scale reaches further, and squares of such values would overflow
    highest, lowest = groups.max(axis=-1, keepdims=True), groups.min(axis=-1, keepdims=True)
    if form.bits == 8:
        return _half((np.maximum(highest, -lowest) + 0.0) / form.limit)  # zeros, too, have one sign in all engines
    outermost = (np.where(highest > -lowest, highest, lowest) + 0.0) / (-form.limit - 1)
    best = _half(outermost)
    least = _squared_error(groups, best, form)
    for share in REACHES:
        scale = _half(outermost * share)
        error = _squared_error(groups, scale, form)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    return best


def _half(scale: np.ndarray) -> np.ndarray:
    """As float16 holds it, never zero and never infinite."""
    size = np.clip(np.abs(scale), SMALLEST_SCALE, LARGEST_HALF)
    return np.copysign(size, scale).astype(np.float16).astype(np.float32)


def _squared_error(groups: np.ndarray, scale: np.ndarray, form: RowFormat) -> np.ndarray:
    """Summed in float64: which scale is best must not depend on the order of the sum, and other engines have theirs."""
    rounded = np.clip(np.rint(groups / scale), -form.limit - 1, form.limit) * scale
    error: np.ndarray = np.square(rounded - groups).sum(axis=-1, keepdims=True, dtype=np.float64)
    return error


def _packed(codes: np.ndarray) -> np.ndarray:
    """int8 codes (..., D) in -8..7 -> bytes (..., D / 2)."""
    raised = (codes + 8).astype(np.uint8)
    return raised[..., ::2] | (raised[..., 1::2] << 4)


def _unpacked(packed: np.ndarray) -> np.ndarray:
    """The inverse of ``_packed``."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.int8)
    codes[..., ::2] = (packed & 15).astype(np.int8) - 8
    codes[..., 1::2] = (packed >> 4).astype(np.int8) - 8
    return codes
