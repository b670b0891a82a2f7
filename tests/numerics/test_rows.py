"""Stored rows against arithmetic done one number at a time."""

from __future__ import annotations

import numpy as np
import pytest

from ryzen_compile.errors import ConfigError
from ryzen_compile.numerics.rows import SMALLEST_SCALE, RowFormat, decode, encode, hadamard

FORMATS = [RowFormat(), RowFormat(16), RowFormat(8), RowFormat(4), RowFormat(8, 16), RowFormat(4, 16), RowFormat(4, 48)]
SHAPE = (2, 3, 5, 48)
BORDERS = (1, 5, 6, 7, 8, 9)  # seeds


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def fixed(form: RowFormat, x: np.ndarray) -> np.ndarray | None:
    if form.floats or form.group:
        return None
    return np.abs(x).max(axis=(0, 2), keepdims=True) / form.limit


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_names_round_trip(form: RowFormat) -> None:
    assert RowFormat.parse(str(form)) == form


@pytest.mark.parametrize(
    "name",
    [
        "",
        "fp64",
        "int16",
        "fp16-g32",
        "fp8",
        "int3",
        "int8-g",
        "int8-g0",
        "int8-g07",
        "fp32-g32",
        "int4-g-2",
        "INT8",
        "int8-g15",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        RowFormat.parse(name)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_width_and_dtype_are_those_of_encoded_rows(form: RowFormat, x: np.ndarray) -> None:
    rows = encode(x, form, fixed(form, x))
    assert rows.shape == (*SHAPE[:-1], form.width(SHAPE[-1])) and rows.dtype == form.dtype


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_decoded_rows_are_within_half_a_step(form: RowFormat, x: np.ndarray) -> None:
    scale = fixed(form, x)
    back = decode(encode(x, form, scale), form, SHAPE[-1], scale)
    assert back.dtype == np.float32
    if form.floats:
        np.testing.assert_array_equal(back, x if form.bits == 32 else x.astype(np.float16))
        return
    if scale is None:
        step = np.abs(x.reshape(*SHAPE[:-1], -1, form.group)).max(-1, keepdims=True) / form.limit
        step = np.broadcast_to(step, (*SHAPE[:-1], SHAPE[-1] // form.group, form.group)).reshape(SHAPE)
        if form.bits == 4:
            step = step * 2.5  # the scale may clip the largest values, by a quarter of them at most
    else:
        step = np.broadcast_to(scale, SHAPE)
    assert (np.abs(back - x) <= 0.51 * step).all()


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dim", [48, 96])
def test_channels_are_the_inverse_of_width(form: RowFormat, dim: int) -> None:
    assert form.channels(form.width(dim)) == dim
    assert form.floats is (str(form) in ("fp32", "fp16"))


def test_half_precision_is_clamped_to_its_largest_number() -> None:
    x = np.array([65504.0, 65519.0, 65520.0, 3e38, -np.inf, np.nan, 1e-8], np.float32)
    stored = encode(x, RowFormat(16))
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, np.array([65504, 65504, 65504, 65504, -65504, np.nan, 0], np.float16))


@pytest.mark.parametrize("form", [RowFormat(8, 4), RowFormat(4, 4)], ids=str)
def test_a_group_of_zeros_is_stored_in_one_way(form: RowFormat) -> None:
    zeros = np.zeros((4, 4), np.float32)
    zeros[1], zeros[2, 1], zeros[3, 0] = -0.0, -0.0, -0.0
    stored = encode(zeros, form)
    np.testing.assert_array_equal(stored, stored[:1].repeat(4, 0))


def on_the_border(form: RowFormat, seed: int) -> np.ndarray:
    """Two groups next to each other, as far as float32 tells, of which one scale fits one and another the other."""
    ends = np.random.default_rng(seed).standard_normal((2, form.group)).astype(np.float32)
    ends[:, 0] = 4.0  # which decides what scales are tried
    for _ in range(40):
        middle = ends.mean(0, dtype=np.float64).astype(np.float32)
        first, second, between = encode(np.stack((*ends, middle)), form)[:, -2:]
        assert (first != second).any()
        ends[int((between == second).all())] = middle
    return ends


@pytest.mark.parametrize("seed", BORDERS)
def test_the_best_scale_does_not_depend_on_the_order_of_channels(seed: int) -> None:
    """A sum in float32 decides these groups by how it happens to be rounded."""
    form = RowFormat(4, 32)
    ends = on_the_border(form, seed)
    stored = encode(ends, form)[:, -2:]
    for by in range(1, form.group):
        np.testing.assert_array_equal(encode(np.roll(ends, by, axis=1), form)[:, -2:], stored)


@pytest.mark.parametrize("form", [f for f in FORMATS if f.group], ids=str)
def test_a_row_with_its_own_scales_depends_on_no_other(form: RowFormat, x: np.ndarray) -> None:
    alone = encode(x[1:, 2:, 3:4], form)
    np.testing.assert_array_equal(encode(x, form)[1:, 2:, 3:4], alone)
    louder = x.copy()
    louder[0] *= 100
    np.testing.assert_array_equal(encode(louder, form)[1], encode(x, form)[1])


def test_two_codes_in_a_byte_even_channel_low_eight_added() -> None:
    x = np.array([[-8, 7, 0, -1]], np.float32)
    np.testing.assert_array_equal(encode(x, RowFormat(4), np.ones(1)), [[0xF0, 0x78]])


def test_codes_round_half_to_even_and_are_clamped() -> None:
    x = np.array([[0.5, 1.5, -0.5, 126.5, 127.6, 500, -128.5, -500]], np.float32)
    np.testing.assert_array_equal(encode(x, RowFormat(8), np.ones(1)), [[0, 2, 0, 126, 127, 127, -128, -128]])


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_and_huge_values_keep_finite_scales(bits: int) -> None:
    form = RowFormat(bits, 16)
    x = np.zeros((1, 32), np.float32)
    np.testing.assert_array_equal(decode(encode(x, form), form, 32), x)
    x[0, 3], x[0, 20] = 1e-9, 3e38
    back = decode(encode(x, form), form, 32)
    assert np.isfinite(back).all() and abs(back[0, 3]) <= SMALLEST_SCALE * form.limit


def test_clipping_beats_the_largest_magnitude_where_one_value_stands_out() -> None:
    x = np.full((1, 16), 1.0, np.float32)
    x[0, 0] = 9.0
    form = RowFormat(4, 16)
    plain = np.abs(np.rint(x / (9 / 7)) * (9 / 7) - x)
    assert np.square(decode(encode(x, form), form, 16) - x).sum() < np.square(plain).sum()


def test_fixed_scales_are_asked_for() -> None:
    with pytest.raises(ConfigError, match="needs scales"):
        encode(np.zeros((1, 8), np.float32), RowFormat(8))


@pytest.mark.parametrize(("form", "dim"), [(RowFormat(4), 7), (RowFormat(8, 16), 24), (RowFormat(4, 32), 48)], ids=str)
def test_heads_that_do_not_divide_are_refused(form: RowFormat, dim: int) -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        form.width(dim)


@pytest.mark.parametrize(("bits", "group"), [(64, 0), (2, 0), (32, 16), (16, 2), (8, -2), (4, 3)])
def test_formats_that_do_not_exist_are_refused(bits: int, group: int) -> None:
    with pytest.raises(ConfigError):
        RowFormat(bits, group)


@pytest.mark.parametrize("dim", [1, 2, 64])
def test_hadamard_is_orthogonal_symmetric_and_flat(dim: int) -> None:
    h = hadamard(dim)
    np.testing.assert_allclose(h @ h, np.eye(dim), atol=1e-12)
    np.testing.assert_array_equal(h, h.T)
    np.testing.assert_allclose(np.abs(h), dim**-0.5)


@pytest.mark.parametrize("dim", [0, 3, 48])
def test_no_hadamard_matrix_of_other_sizes(dim: int) -> None:
    with pytest.raises(ConfigError):
        hadamard(dim)
