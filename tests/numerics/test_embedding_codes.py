"""Codes of vectors against what they stand for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ryzen_compile.errors import NumericalError, UsageError
from ryzen_compile.numerics.embedding_codes import (
    Int8Range,
    normalize,
    pack_signs,
    sign_bytes,
    truncate,
    unpack_signs,
)

SHAPES = [(1, 1), (3, 7), (5, 8), (17, 31), (4, 384)]
VECTORS = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=13),
    elements=st.floats(-1e3, 1e3, width=32),
)


def vectors(count: int, dims: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, dims)) * rng.uniform(0.1, 3, dims) + rng.standard_normal(dims)).astype(
        np.float32
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_truncated_vectors_are_prefixes_of_length_one(shape: tuple[int, int]) -> None:
    x = vectors(*shape)
    for dims in {1, shape[1] // 2 + 1, shape[1]}:
        found = truncate(x, dims)
        assert found.shape == (shape[0], dims) and found.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(found.astype(np.float64), axis=1), 1, atol=1e-6)  # float32 rounding
        cosine = (found * x[:, :dims]).sum(1) / np.linalg.norm(x[:, :dims], axis=1)
        np.testing.assert_allclose(cosine, 1, atol=1e-5)


def test_lengths_that_float32_cannot_square() -> None:
    np.testing.assert_allclose(normalize(np.array([[3e30, 4e30], [3e-30, 4e-30]])), [[0.6, 0.8]] * 2, atol=1e-6)


@pytest.mark.parametrize("dims", [0, -1, 8])
def test_dimensions_that_are_not_there_are_refused(dims: int) -> None:
    with pytest.raises(UsageError, match=f"7 dimensions to {dims}"):
        truncate(vectors(3, 7), dims)


def test_a_prefix_without_length_is_named() -> None:
    x = vectors(3, 4)
    x[2, :2] = 0
    assert truncate(x, 3).shape == (3, 3)
    with pytest.raises(NumericalError, match="vector 2 is zero"):
        truncate(x, 2)


@pytest.mark.parametrize("encode", [normalize, pack_signs, Int8Range.fit], ids=["normalize", "signs", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_values_that_are_not_finite_are_named(encode, value: float) -> None:
    x = vectors(5, 3).astype(np.float64)
    x[3, 1] = value
    with pytest.raises(NumericalError, match="row 3"):
        encode(x)


@pytest.mark.parametrize("encode", [normalize, pack_signs, Int8Range.fit], ids=["normalize", "signs", "int8"])
@pytest.mark.parametrize(
    "x", [np.zeros(3), np.zeros((0, 3)), np.zeros((3, 0)), np.array([["a"]]), np.zeros((2, 2), bool)]
)
def test_what_is_no_matrix_of_numbers_is_refused(encode, x: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"\(N, C\)"):
        encode(x)


@pytest.mark.parametrize("shape", [(2, 1), *SHAPES[1:]])
def test_int8_is_within_half_a_step_of_what_it_was_calibrated_on(shape: tuple[int, int]) -> None:
    x = vectors(*shape)
    ranges = Int8Range.fit(x)
    codes = ranges.encode(x)
    assert codes.dtype == np.int8 and codes.shape == shape
    assert (
        np.abs(ranges.decode(codes) - x) <= 0.501 * ranges.step + 1e-6 * np.abs(x)
    ).all()  # half a step, and float32


def test_the_extremes_take_the_outermost_codes_and_what_lies_beyond_is_clamped() -> None:
    x = np.array([[-1.0, 0.0], [3.0, 0.5], [1.0, 0.25]])
    ranges = Int8Range.fit(x)
    np.testing.assert_array_equal(ranges.encode(x), [[-127, -127], [127, 127], [0, 0]])
    np.testing.assert_array_equal(ranges.encode(x * 100), [[-127, -127], [127, 127], [127, 127]])


def test_a_constant_dimension_keeps_its_value_and_takes_others() -> None:
    ranges = Int8Range.fit(np.array([[0.5, 1.0, 0.0], [0.5, -1.0, 0.1]]))
    decoded = ranges.decode(ranges.encode(np.array([[0.5, 0, 0], [1.0, 0, 0]])))
    np.testing.assert_allclose(decoded[:, 0], [0.5, 1.0], atol=0.5 * 2 / 254)  # half a step of the widest dimension


@pytest.mark.parametrize("x", [np.zeros((3, 2)), np.full((2, 3), 0.5), np.ones((1, 1)), vectors(1, 7)])
def test_vectors_that_do_not_differ_have_no_ranges(x: np.ndarray) -> None:
    with pytest.raises(UsageError, match=f"need vectors that differ, got {len(x)} .*calibrate on more"):
        Int8Range.fit(x)


@pytest.mark.parametrize(
    ("middle", "step", "error"),
    [
        (np.zeros(3), np.ones(2), UsageError),
        (np.zeros((1, 2)), np.ones((1, 2)), UsageError),
        (np.zeros(0), np.ones(0), UsageError),
        (np.zeros(2), np.array([1.0, 0.0]), NumericalError),
        (np.zeros(2), np.array([1.0, -1.0]), NumericalError),
        (np.array([np.nan, 0.0]), np.ones(2), NumericalError),
    ],
)
def test_ranges_that_mean_nothing_are_refused(middle: np.ndarray, step: np.ndarray, error: type[Exception]) -> None:
    with pytest.raises(error):
        Int8Range(middle, step)


@settings(max_examples=100, deadline=None)
@given(VECTORS)
def test_signs_come_back(x: np.ndarray) -> None:
    packed = pack_signs(x)
    assert packed.shape == (len(x), sign_bytes(x.shape[1])) and packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack_signs(packed, x.shape[1]), np.where(x > 0, 1, -1))
    np.testing.assert_array_equal(pack_signs(unpack_signs(packed, x.shape[1])), packed)


def test_the_first_dimension_is_the_highest_bit_and_bits_behind_the_last_are_zero() -> None:
    np.testing.assert_array_equal(pack_signs(np.array([[1, -1, -1, -1, -1, -1, -1, -1, 1, 1.0]])), [[0x80, 0xC0]])


def test_codes_of_another_kind_are_refused() -> None:
    x = vectors(3, 9)
    ranges, packed = Int8Range.fit(x), pack_signs(x)
    for wrong in (
        lambda: ranges.decode(np.zeros((3, 9), np.uint8)),
        lambda: ranges.decode(np.zeros((3, 8), np.int8)),
        lambda: ranges.encode(x[:, :8]),
        lambda: unpack_signs(packed, 17),
        lambda: unpack_signs(packed, 8),
        lambda: unpack_signs(packed.view(np.int8), 9),
        lambda: unpack_signs(packed, 0),
    ):
        with pytest.raises(UsageError):
            wrong()
