"""Move stored keys to other positions: what a cache needs that drops old tokens and closes the gap.

A rotary embedding turns channel pair j of a key at position p by the angle p w_j (RoFormer, Su et al., 2021), so a key
that moves by n positions is turned by n w_j more, whatever its position was. Values know no positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ryzen_compile.numerics.rows import RowFormat, decode, encode, hadamard


@dataclass(frozen=True, eq=False)
class RowShift:
    """One layer's keys: how they are stored and how they turn.

    ``dim`` channels a head. ``frequencies`` (R,) float64, radians per position, for channel pairs (j, j + R), or
    (2j, 2j + 1) where ``interleaved``; R = 0 for keys that know no positions. ``scale`` (1, K, 1, dim) where the format
    has fixed scales. After their rotation keys lost ``mean`` (1, K, 1, dim), and ``turned`` ones were then multiplied
    by a Hadamard matrix.
    """

    form: RowFormat
    dim: int
    frequencies: np.ndarray
    interleaved: bool = False
    scale: np.ndarray | None = None
    turned: bool = False
    mean: np.ndarray | None = None

    def shift(self, rows: np.ndarray, by: int) -> np.ndarray:
        """Stored rows (B, K, n, W) as if each key stood ``by`` positions later (earlier where negative).

        Integers are rounded anew, once per call.
        """
        count = len(self.frequencies)
        if not count:
            return rows
        keys = decode(rows, self.form, self.dim, self.scale)
        spread = hadamard(self.dim).astype(np.float32) if self.turned else None
        if spread is not None:
            keys = keys @ spread
        if self.mean is not None:
            keys = keys + self.mean
        first, second = self._pairs(count)
        angles = self.frequencies * by
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        moved = keys.copy()
        moved[..., first] = keys[..., first] * cos - keys[..., second] * sin
        moved[..., second] = keys[..., second] * cos + keys[..., first] * sin
        if self.mean is not None:
            moved -= self.mean
        return encode(moved if spread is None else moved @ spread, self.form, self.scale)

    def _pairs(self, count: int) -> tuple[slice, slice]:
        if self.interleaved:
            return slice(0, 2 * count, 2), slice(1, 2 * count, 2)
        return slice(0, count), slice(count, 2 * count)


def widened(shift: RowShift, dim: int) -> RowShift:
    """The same for heads of ``dim`` channels, of which those added are always zero."""
    if shift.scale is None or shift.dim == dim:
        return replace(shift, dim=dim)
    added = ((0, 0), (0, 0), (0, 0), (0, dim - shift.dim))
    return replace(shift, dim=dim, scale=np.pad(shift.scale, added, constant_values=1.0))
