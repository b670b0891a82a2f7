"""Moved keys against keys that were rotated to the new position in the first place."""

from __future__ import annotations

import numpy as np
import pytest

from ryzen_compile.numerics.row_shift import RowShift, widened
from ryzen_compile.numerics.rows import RowFormat, decode, encode, hadamard

DIM, HEADS = 32, 3


def rotated(x: np.ndarray, position: int, frequencies: np.ndarray, interleaved: bool) -> np.ndarray:
    """One pair after another, in float64."""
    out = x.astype(np.float64).copy()
    for j, w in enumerate(frequencies):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + len(frequencies))
        turn = np.exp(1j * w * position) * (x[..., a] + 1j * x[..., b].astype(np.float64))
        out[..., a], out[..., b] = turn.real, turn.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [16, 5])
def test_a_moved_key_is_the_key_at_the_new_position(pairs: int, interleaved: bool) -> None:
    x = np.random.default_rng(0).standard_normal((2, HEADS, 7, DIM)).astype(np.float32)
    frequencies = 10000.0 ** (-np.arange(pairs) / pairs)
    shift = RowShift(RowFormat(), DIM, frequencies, interleaved)
    stored = rotated(x, 900, frequencies, interleaved).astype(np.float32)
    np.testing.assert_allclose(shift.shift(stored, -137), rotated(x, 763, frequencies, interleaved), atol=1e-4)
    np.testing.assert_array_equal(shift.shift(stored, 0), stored)


@pytest.mark.parametrize(
    ("form", "step"), [("int8", 0.02), ("int4", 0.3), ("int8-g16", 0.02), ("int4-g16", 0.3)], ids=str
)
@pytest.mark.parametrize("turned", [False, True])
def test_integers_move_within_a_step_and_stay_put_when_nothing_moves(form: str, step: float, turned: bool) -> None:
    x = np.random.default_rng(1).uniform(-1, 1, (1, HEADS, 5, DIM)).astype(np.float32)
    parsed = RowFormat.parse(form)
    scale = None if parsed.group else np.full((1, HEADS, 1, DIM), 2.2 / parsed.limit, np.float32)
    shift = RowShift(parsed, DIM, 0.5 ** np.arange(16), scale=scale, turned=turned)
    spread = hadamard(DIM).astype(np.float32) if turned else np.eye(DIM, dtype=np.float32)
    stored = encode(x @ spread, parsed, scale)
    moved = decode(shift.shift(stored, 11), parsed, DIM, scale) @ spread
    expected = rotated(decode(stored, parsed, DIM, scale) @ spread, 11, shift.frequencies, False)
    assert np.sqrt(np.square(moved - expected).mean()) < step
    if not parsed.group:
        np.testing.assert_array_equal(shift.shift(stored, 0), stored)


def test_keys_without_positions_are_left_alone() -> None:
    rows = np.arange(12, dtype=np.int8).reshape(1, 1, 3, 4)
    assert RowShift(RowFormat(8), 4, np.empty(0)).shift(rows, 5) is rows


def test_added_channels_stay_zero() -> None:
    scale = np.full((1, 1, 1, 6), 0.1, np.float32)
    shift = widened(RowShift(RowFormat(8), 6, np.array([0.3, 0.1]), scale=scale), 8)
    assert shift.dim == 8 and shift.scale is not None and shift.scale.shape == (1, 1, 1, 8)
    rows = np.zeros((1, 1, 2, 8), np.int8)
    rows[..., :6] = 40
    moved = shift.shift(rows, 3)
    assert not moved[..., 6:].any()
    np.testing.assert_array_equal(moved[..., 4:6], rows[..., 4:6])  # past the rotated pairs
    plain = widened(RowShift(RowFormat(), 6, np.array([0.3])), 8)
    assert plain.dim == 8 and plain.scale is None
