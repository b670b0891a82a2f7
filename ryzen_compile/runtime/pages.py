"""Rows of a buffer copied, repeated ones by sharing their pages until somebody writes.

Sequences that continue one prompt differ in their last few tokens only. On Linux a row that is wanted several times is
therefore written once, into a memory file that has no name, and every copy is a private mapping of that file: the
system hands out the same physical pages, and copies a page when a row first writes to it. Elsewhere, and wherever the
system declines, rows are copied.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from math import gcd, lcm

import numpy as np

# Below it a row is copied sooner than it is mapped, and the mappings would cost what they save.
SMALLEST_SHARED = 16 * mmap.PAGESIZE
_MAP_FIXED = 0x10  # <asm-generic/mman-common.h>; the mmap module does not have it


def copy_rows(buffer: np.ndarray, rows: np.ndarray, held: int, capacity: int) -> np.ndarray:
    """Row i is row ``rows[i]`` of ``buffer`` ``(B, K, S, W)``: its first ``held`` positions, and zeros after them.

    The result, ``(len(rows), K, capacity, W)``, is writable and C-contiguous, and its rows are independent of each
    other and of ``buffer``. Rows that occur several times in ``rows`` share their pages, on Linux, where a row is a
    whole number of them and ``held`` positions are worth it (``SMALLEST_SHARED``); the mappings live as long as the
    array or a view of it. A page behind ``held`` that is written takes one page more than in a plain copy, once for
    all copies: the file has to have it before it can be copied.
    """
    shape = (len(rows), buffer.shape[1], capacity, buffer.shape[3])
    copies = _mapped(buffer, rows, held, shape) if len(np.unique(rows)) < len(rows) else None
    if copies is None:
        copies = np.zeros(shape, buffer.dtype)
        for index, row in enumerate(rows):
            copies[index, :, :held] = buffer[row, :, :held]
    return copies


def whole_pages(position_bytes: Iterable[int]) -> int:
    """The smallest number of positions whose multiples fill whole pages in rows of every given size of a position."""
    return lcm(*(mmap.PAGESIZE // gcd(mmap.PAGESIZE, size) for size in position_bytes))


def is_mapped(buffer: np.ndarray) -> bool:
    """Whether ``buffer`` was made by mapping, so that some of its rows share pages."""
    base: object = buffer
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)


def _mapped(buffer: np.ndarray, rows: np.ndarray, held: int, shape: tuple[int, ...]) -> np.ndarray | None:
    """``copy_rows`` by mapping; None where that cannot be done."""
    copies, heads, capacity, width = shape
    position_bytes = heads * width * buffer.itemsize
    row_bytes = capacity * position_bytes
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):  # Python may be built for an older system
        return None
    if row_bytes % mmap.PAGESIZE or held * position_bytes < SMALLEST_SHARED:
        return None
    try:
        # Private: this module's default is memory shared with child processes.
        region = mmap.mmap(-1, copies * row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapped = np.frombuffer(region, buffer.dtype).reshape(shape)
        for row in np.unique(rows):
            places = np.flatnonzero(rows == row)
            if len(places) == 1:
                mapped[places[0], :, :held] = buffer[row, :, :held]
            else:
                _map(_address(mapped) + places * row_bytes, buffer[row, :, :held], row_bytes)
    except OSError:
        return None
    # The array holds the region; collecting it unmaps all of it, whatever is mapped there by now.
    return mapped


def _map(addresses: np.ndarray, row: np.ndarray, row_bytes: int) -> None:
    """Put a private mapping of one file over each address: ``row`` ``(K, held, W)``, with room in ``row_bytes``."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    file = os.memfd_create("kv-cache-row")
    try:
        os.ftruncate(file, row_bytes)  # what is not written stays a hole, and reads as zeros
        for head, positions in enumerate(row):
            _write(file, positions, head * row_bytes // len(row))
        for address in addresses:
            protection, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
            if libc.mmap(int(address), row_bytes, protection, kind, file, 0) != int(address):
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error))
    finally:
        os.close(file)  # the mappings keep the pages


def _write(file: int, positions: np.ndarray, offset: int) -> None:
    """All of ``positions`` ``(held, W)``; one call takes two GiB at most."""
    data = np.ascontiguousarray(positions).data.cast("B")
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
