"""Masks are named by what they compute: the functions are the ones that transformers builds, and some it does not."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import masking_utils

from ryzen_compile.errors import UnsupportedError
from ryzen_compile.mask_spec import REACH, MaskSpec, read_mask


def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def full(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key >= 0


def window(size: int) -> Callable:
    return lambda b, h, q, k: (k <= q) & (k > q - size)


def chunk(size: int) -> Callable:
    return lambda b, h, q, k: (k <= q) & (k // size == q // size)


def test_causal_and_full() -> None:
    assert read_mask(causal) == MaskSpec(causal=True, window=0) == MaskSpec()
    assert read_mask(full) == MaskSpec(causal=False, window=0)


@pytest.mark.parametrize("size", [1, 2, 3, 127, 4096, REACH - 1])
def test_window(size: int) -> None:
    assert read_mask(window(size)) == MaskSpec(causal=True, window=size)


def test_masks_of_transformers() -> None:
    assert read_mask(masking_utils.causal_mask_function) == MaskSpec()
    for size in (1, 3, 4096):
        assert read_mask(masking_utils.sliding_window_causal_mask_function(size), size) == MaskSpec(True, size)
    chunked = masking_utils.and_masks(
        masking_utils.causal_mask_function, masking_utils.chunked_overlay(512, torch.zeros(1, dtype=torch.long))
    )
    with pytest.raises(UnsupportedError, match="neither causal, windowed nor full"):
        read_mask(chunked, 512)


@pytest.mark.parametrize("size", [2, 3, 64, 4097])
def test_a_window_to_both_sides(size: int) -> None:
    assert read_mask(lambda b, h, q, k: (k - q).abs() < size) == MaskSpec(causal=False, window=size)
    function = masking_utils.sliding_window_bidirectional_mask_function(
        size - 1
    )  # counts the key it reaches, not itself
    assert read_mask(function, size - 1) == MaskSpec(causal=False, window=size)


def test_a_hint_makes_the_rows_long_enough() -> None:
    assert read_mask(window(REACH + 7), REACH + 7) == MaskSpec(True, REACH + 7)
    assert read_mask(window(REACH + 7)) == MaskSpec()  # no row is long enough: as good as none
    with pytest.raises(UnsupportedError):
        read_mask(chunk(REACH + 7), REACH + 7)


@pytest.mark.parametrize("length", [1, 2, 7, 31])
def test_a_bounded_function_is_read_within_its_bounds(length: int) -> None:
    rows = torch.ones(length, length).tril().bool()
    assert read_mask(lambda b, h, q, k: rows[q, k], length=length) == MaskSpec()
    assert read_mask(lambda b, h, q, k: torch.ones(()).bool(), length=length).causal is (length == 1)


def prefix(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) | (k < 5)


NEITHER = {
    "chunked": chunk(8192),
    "chunked by 3": chunk(3),
    "two documents": lambda b, h, q, k: (k <= q) & ((k < 20_000) == (q < 20_000)),
    "prefix seen by all": prefix,
    "window further to one side": lambda b, h, q, k: ((k - q) < 5) & ((q - k) < 4),
    "window, and all later keys": lambda b, h, q, k: k > q - 4,
    "dilated": lambda b, h, q, k: (k <= q) & ((q - k) % 2 == 0),
    "itself hidden": lambda b, h, q, k: k < q,
    "one key too far": lambda b, h, q, k: k <= q + 1,
    "sink and window": lambda b, h, q, k: (k <= q) & ((k > q - 4) | (k == 0)),
    "nothing": lambda b, h, q, k: k < 0,
}


@pytest.mark.parametrize("name", NEITHER)
def test_anything_else_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"query \d+ sees \d+ keys, expected \d+ for MaskSpec\(") as caught:
        read_mask(NEITHER[name])
    assert "chunked, block-wise and packed" in caught.value.hint


def test_the_refusal_counts_the_keys() -> None:
    with pytest.raises(UnsupportedError) as caught:
        read_mask(chunk(8192))
    seen, expected = map(int, re.search(r"sees (\d+) keys, expected (\d+)", caught.value.message).groups())
    assert seen != expected
