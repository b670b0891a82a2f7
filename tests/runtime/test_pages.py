"""Rows copied by sharing pages: equal to plain copies, independent, and as cheap as promised."""

from __future__ import annotations

import gc
import mmap
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from ryzen_compile.runtime import pages
from ryzen_compile.runtime.pages import copy_rows, is_mapped, whole_pages

MIB = 2**20
on_linux = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(os, "memfd_create"), reason="pages are shared on Linux only"
)


def buffer_of(batch: int, heads: int, capacity: int, width: int, held: int, dtype: type = np.float32) -> np.ndarray:
    """Random rows in the first ``held`` positions, and something that must not be copied behind them."""
    rng = np.random.default_rng(0)
    buffer = np.full((batch, heads, capacity, width), 9, dtype)
    buffer[:, :, :held] = rng.integers(0, 100, (batch, heads, held, width))
    return buffer


def shared_memory() -> int:
    """Bytes this process holds, a page that is mapped n times counted 1/n each time."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:kv-cache-row")


@on_linux
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int8])
@pytest.mark.parametrize("rows", [[0, 0], [2, 0, 2, 2], [1, 1, 0, 2, 0]])
def test_mapped_rows_are_what_plain_copies_are(rows: list[int], dtype: type) -> None:
    buffer = buffer_of(3, 3, 700, 128, 600, dtype)
    copies = copy_rows(buffer, np.array(rows), 600, 1024)
    assert is_mapped(copies) and copies.shape == (len(rows), 3, 1024, 128)
    assert copies.dtype == dtype and copies.flags.c_contiguous and copies.flags.writeable
    np.testing.assert_array_equal(copies[:, :, :600], buffer[rows][:, :, :600])
    assert not copies[:, :, 600:].any(), "only what is held is copied"


@on_linux
def test_a_row_of_a_view_is_mapped_too() -> None:
    buffer = buffer_of(4, 2, 512, 64, 512)
    copies = copy_rows(buffer[2:3], np.zeros(2, np.int64), 512, 512)
    assert is_mapped(copies)
    np.testing.assert_array_equal(copies, buffer[[2, 2]])


@on_linux
def test_writing_one_copy_changes_neither_the_others_nor_the_origin() -> None:
    buffer = buffer_of(1, 2, 1024, 64, 1000)
    origin = buffer.copy()
    copies = copy_rows(buffer, np.zeros(3, np.int64), 1000, 1024)
    copies[1, :, 5] = -1
    copies[1, :, 1000:] = -2
    buffer[0, :, 7] = -3
    expected = np.zeros_like(copies)
    expected[:, :, :1000] = origin[:, :, :1000]
    expected[1, :, 5], expected[1, :, 1000:] = -1, -2
    np.testing.assert_array_equal(copies, expected)
    np.testing.assert_array_equal(np.delete(buffer, 7, axis=2), np.delete(origin, 7, axis=2))


@on_linux
def test_eight_copies_of_a_large_row_take_the_memory_of_one_and_what_is_written() -> None:
    buffer = np.zeros((1, 8, 2048, 256), np.float32)
    buffer[:, :, :1536] = 1  # 12 MiB of 16
    gc.collect()
    before = shared_memory()
    copies = copy_rows(buffer, np.zeros(8, np.int64), 1536, 2048)
    # A page counts once it was looked at, so all are.
    assert copies[:, :, :1536].sum(dtype=np.float64) == 8 * 8 * 1536 * 256
    assert 12 * MIB <= shared_memory() - before <= 17 * MIB
    copies[:, :, 1536:1664] = 2  # 1 MiB in each, which the file takes once more without mapping it
    assert 20 * MIB <= shared_memory() - before <= 26 * MIB
    copies[3] = 3
    assert 35 * MIB <= shared_memory() - before <= 41 * MIB, "one copy written in full is its own, 16 MiB"


@on_linux
def test_views_keep_the_pages_and_the_last_one_gives_them_back() -> None:
    gc.collect()
    mapped, files = mappings(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208  (a Path would be opened as well)
    copies = copy_rows(buffer_of(1, 1, 1024, 64, 1024), np.zeros(3, np.int64), 1024, 1024)
    assert mappings() == mapped + 3
    assert len(os.listdir("/proc/self/fd")) == files, "no file stays open"  # noqa: PTH208
    view = copies[1:2, :, 10:20]
    wanted = view.copy()
    del copies
    gc.collect()
    assert mappings() == mapped + 3 and is_mapped(view)
    np.testing.assert_array_equal(view, wanted)
    del view
    gc.collect()
    assert mappings() == mapped


@pytest.mark.parametrize(
    ("capacity", "held", "rows"),
    [
        (1024, 1024, [0, 1]),  # nothing repeated
        (1000, 1000, [0, 0]),  # rows that end within a page
        (1024, 100, [0, 0]),  # too little to be worth it
        (1024, 0, [0, 0]),
        (0, 0, [1, 1]),
    ],
)
def test_the_rest_is_copied_plainly(capacity: int, held: int, rows: list[int]) -> None:
    buffer = buffer_of(2, 1, capacity, 36, held)
    copies = copy_rows(buffer, np.array(rows), held, capacity)
    assert not is_mapped(copies) and copies.flags.c_contiguous
    np.testing.assert_array_equal(copies[:, :, :held], buffer[rows][:, :, :held])
    assert not copies[:, :, held:].any()


@on_linux
@pytest.mark.parametrize("broken", ["memfd_create", "ftruncate", "pwrite"])
def test_a_system_that_declines_gets_plain_copies(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def declines(*arguments: object) -> int:
        raise OSError(12, "no memory")

    buffer = buffer_of(1, 2, 1024, 64, 1024)
    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    monkeypatch.setattr(pages.os, broken, declines)
    copies = copy_rows(buffer, np.zeros(2, np.int64), 1024, 1024)
    assert not is_mapped(copies)
    np.testing.assert_array_equal(copies, buffer[[0, 0]])
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == files  # noqa: PTH208


@on_linux
def test_a_mapping_that_fails_half_way_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    mapped, map_one = mappings(), pages._map

    def one_and_no_more(addresses: np.ndarray, row: np.ndarray, row_bytes: int) -> None:
        map_one(addresses[:1], row, row_bytes)
        assert mappings() == mapped + 1
        map_one(addresses[1:] + 1, row, row_bytes)  # not a page's address: the system refuses it

    buffer = buffer_of(1, 2, 1024, 64, 1024)
    monkeypatch.setattr(pages, "_map", one_and_no_more)
    copies = copy_rows(buffer, np.zeros(2, np.int64), 1024, 1024)
    assert not is_mapped(copies)
    np.testing.assert_array_equal(copies, buffer[[0, 0]])
    assert mappings() == mapped


def test_without_memory_files_rows_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pages.os, "memfd_create", raising=False)
    buffer = buffer_of(1, 2, 1024, 64, 1024)
    copies = copy_rows(buffer, np.zeros(2, np.int64), 1024, 1024)
    assert not is_mapped(copies)
    np.testing.assert_array_equal(copies, buffer[[0, 0]])


def test_whole_pages() -> None:
    page = mmap.PAGESIZE
    assert whole_pages([]) == whole_pages([page]) == whole_pages([3 * page]) == 1
    assert whole_pages([page // 4]) == 4 and whole_pages([3]) == page
    assert whole_pages([page // 2, 136]) == page // 8
    for sizes in ([272, 512], [24, 36]):
        assert all(whole_pages(sizes) * size % page == 0 for size in sizes)
