from __future__ import annotations

import numpy as np
import pytest

from ryzen_compile.validate import memory

MIB = 1 << 20


def touch(mib: int) -> None:
    """Make ``mib`` MiB resident and give them back."""
    np.full(mib * MIB, 1, np.uint8)


def test_peak_is_at_least_the_present():
    assert memory.peak_rss_bytes() >= 0.9 * memory.current_rss_bytes() > 0


def test_block_sees_its_own_allocation():
    with memory.peak_rss() as peak:
        touch(128)
    assert peak.peak_bytes >= peak.start_bytes
    if peak.exact:
        # The kernel counts pages in batches per thread: a few MiB either way.
        assert 120 * MIB < peak.growth_bytes < 192 * MIB


def test_a_later_block_does_not_see_an_earlier_peak():
    with memory.peak_rss() as first:
        touch(128)
    with memory.peak_rss() as second:
        touch(8)
    if not second.exact:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert second.growth_bytes < 64 * MIB < first.growth_bytes


def test_an_inner_block_does_not_take_the_peak_from_the_outer_one():
    with memory.peak_rss() as outer:
        touch(128)
        with memory.peak_rss() as inner:
            touch(8)
    assert outer.peak_bytes >= inner.peak_bytes
    if outer.exact:
        assert outer.growth_bytes > 120 * MIB


def test_an_error_inside_still_measures():
    with pytest.raises(KeyError), memory.peak_rss() as peak:
        raise KeyError
    assert peak.peak_bytes > 0
    assert memory._open == []


def test_resident_memory_by_kind(tmp_path):
    here = memory.resident_set()
    if here.anonymous is None:
        pytest.skip("this system does not tell kinds of memory apart")
    assert here.total == here.anonymous + here.mapped
    kept = np.full(64 * MIB, 1, np.uint8)
    more = memory.resident_set()
    assert 60 * MIB < more.anonymous - here.anonymous < 96 * MIB  # what the interpreter takes or gives back meanwhile
    assert kept[-1] == 1


def test_resident_pages_of_a_mapped_file_are_not_its_own(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(64 * MIB))
    before = memory.resident_set()
    if before.anonymous is None:
        pytest.skip("this system does not tell kinds of memory apart")
    mapped = np.memmap(tmp_path / "weights", np.uint8, "r")
    assert int(mapped[:: 1 << 12].sum()) == 0
    after = memory.resident_set()
    assert after.mapped - before.mapped > 60 * MIB
    assert after.anonymous - before.anonymous < 32 * MIB


def test_resident_memory_from_the_kernels_words(tmp_path):
    (tmp_path / "rollup").write_text("00400000 ---p [rollup]\nRss:   3072 kB\nPss: 9 kB\nAnonymous:   1024 kB\n")
    found = memory.resident_set(tmp_path / "rollup")
    assert (found.total, found.anonymous, found.mapped) == (3 * MIB, MIB, 2 * MIB)
    assert str(found) == "3 MiB (1 MiB of its own, 2 MiB of mapped files)"
    (tmp_path / "rollup").write_text("Rss: 1 kB\n")
    for path in (tmp_path / "rollup", tmp_path / "absent"):
        found = memory.resident_set(path)
        assert found.total > 0 and found.anonymous is None and "(" not in str(found)


def test_a_system_without_reset_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    with memory.peak_rss() as peak:
        pass
    assert not peak.exact
