"""Where keys and values lie: in the machine's memory as NumPy arrays, or wherever an engine keeps them.

A buffer can be sliced, assigned to from another slice of the same storage, and asked for its ``nbytes``; the rest goes
by way of its storage. So a cache moves rows on a GPU as it does on a CPU, without reading them, and what looks into
rows (prompt files, prefixes, streams) asks for a copy in the machine's memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ryzen_compile.runtime import pages

Buffer = Any  # what a storage makes: sliced, assigned, and never read but through it


class Storage(Protocol):
    """Makes buffers and moves rows of them. ``shares_pages`` says whether copies of one row may share memory."""

    shares_pages: bool

    def zeros(self, shape: Sequence[int], dtype: np.dtype) -> Buffer:
        """A new C-contiguous buffer."""
        ...

    def copy_rows(self, buffer: Buffer, rows: np.ndarray, held: int, capacity: int) -> Buffer:
        """Row i is row ``rows[i]`` of ``buffer`` ``(B, K, S, W)``: its first ``held`` positions, and zeros behind them.

        The result is ``(len(rows), K, capacity, W)``, contiguous, and its rows are independent of all others.
        """
        ...

    def read(self, part: Buffer) -> np.ndarray:
        """A slice's elements in the machine's memory, to be read at once: it may be a view."""
        ...

    def write(self, part: Buffer, rows: np.ndarray) -> None:
        """Makes ``rows``, of the same shape and element, the slice's."""
        ...

    def memory_bytes(self) -> int | None:
        """All the memory that buffers could take; None where that is not known."""
        ...


class HostStorage:
    """NumPy arrays."""

    shares_pages = True

    def zeros(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        return np.zeros(tuple(shape), dtype)

    def copy_rows(self, buffer: np.ndarray, rows: np.ndarray, held: int, capacity: int) -> np.ndarray:
        return pages.copy_rows(buffer, rows, held, capacity)

    def read(self, part: np.ndarray) -> np.ndarray:
        return part

    def write(self, part: np.ndarray, rows: np.ndarray) -> None:
        part[...] = rows

    def memory_bytes(self) -> int | None:
        """The machine's memory, or None where the system does not say (no ``sysconf`` on Windows)."""
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None


HOST: Storage = HostStorage()
