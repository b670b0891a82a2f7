"""Pages of a mapped file are given back, unless somebody wrote to them."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from ryzen_compile.backends.onnxruntime import resident

SIZE = 8 << 20
pytestmark = pytest.mark.skipif(not resident.SMAPS.exists(), reason="the system does not list mappings")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights data"  # with a space, as a path may have
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


def held(path: Path) -> int:
    lines = resident.SMAPS.read_text().splitlines()
    return sum(kib["Rss"] << 10 for _, _, name, kib in resident.mappings(lines) if name == str(path.resolve()))


def test_what_was_read_is_given_back_and_can_be_read_again(file: Path) -> None:
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
        whole = bytes(mapped)
        assert held(file) == SIZE
        assert resident.release([file]) == SIZE
        assert held(file) == 0
        assert bytes(mapped) == whole


def test_a_page_that_was_written_to_stays(file: Path) -> None:
    access = mmap.PROT_READ | mmap.PROT_WRITE
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), SIZE, mmap.MAP_PRIVATE, access) as mapped:
        mapped[5] = 77
        assert resident.release([file]) == 0
        assert mapped[5] == 77


def test_other_files_are_left_alone(file: Path, tmp_path: Path) -> None:
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
        assert len(bytes(mapped)) == SIZE
        assert resident.release([tmp_path / "weights", tmp_path / "another"]) == 0
        assert held(file) == SIZE
