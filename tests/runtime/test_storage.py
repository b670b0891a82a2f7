"""The machine's own storage: what caches ask of any."""

from __future__ import annotations

import os

import numpy as np
import pytest

from ryzen_compile.runtime.storage import HOST


def test_memory_is_unknown_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (HOST.memory_bytes() or 0) > 0
    monkeypatch.delattr(os, "sysconf")
    assert HOST.memory_bytes() is None


def test_rows_are_copied_reordered_and_followed_by_zeros() -> None:
    buffer = np.arange(24, dtype=np.float32).reshape(2, 2, 3, 2)
    copied = HOST.copy_rows(buffer, np.array([1, 0, 1]), 2, 4)
    assert copied.shape == (3, 2, 4, 2) and not copied[:, :, 2:].any()
    np.testing.assert_array_equal(copied[0, :, :2], buffer[1, :, :2])
    copied[0] = -1
    assert buffer.min() == 0 and copied[2].min() == 0, "rows are independent"


def test_what_is_written_is_read() -> None:
    buffer = HOST.zeros((2, 3, 4), np.dtype(np.int8))
    HOST.write(buffer[1, :, 1:3], np.full((3, 2), 7, np.int8))
    assert HOST.read(buffer[1, :, :3]).tolist() == [[0, 7, 7]] * 3 and not buffer[0].any()
