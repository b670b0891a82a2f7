"""When two inputs count as the same: their names and bytes, nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ryzen_compile.errors import ResourceError
from ryzen_compile.workflow import digests
from ryzen_compile.workflow.digests import CHUNK, digest_of, digest_package, digest_path


def tree(directory: Path) -> Path:
    """Three files, one of them below another directory, and one that is larger than what is read at once."""
    (directory / "inner").mkdir(parents=True)
    (directory / "config.json").write_bytes(b"{}\n")
    (directory / "inner" / "weights").write_bytes(bytes(CHUNK + 7))
    (directory / "empty").touch()
    return directory


def rename(directory: Path) -> None:
    (directory / "config.json").rename(directory / "config.jsom")


def move(directory: Path) -> None:
    (directory / "config.json").rename(directory / "inner" / "config.json")


def one_bit_of_the_last_byte(directory: Path) -> None:
    content = bytearray((directory / "inner" / "weights").read_bytes())
    content[-1] ^= 1
    (directory / "inner" / "weights").write_bytes(content)


def a_byte_from_one_file_to_the_next(directory: Path) -> None:
    (directory / "config.json").write_bytes(b"{}")
    (directory / "empty").write_bytes(b"\n")


def swap_names(directory: Path) -> None:
    (directory / "config.json").rename(directory / "x")
    (directory / "empty").rename(directory / "config.json")
    (directory / "x").rename(directory / "empty")


def add_an_empty_file(directory: Path) -> None:
    (directory / "another").touch()


def remove_an_empty_file(directory: Path) -> None:
    (directory / "empty").unlink()


@pytest.mark.parametrize(
    "change",
    [
        rename,
        move,
        one_bit_of_the_last_byte,
        a_byte_from_one_file_to_the_next,
        swap_names,
        add_an_empty_file,
        remove_an_empty_file,
    ],
)
def test_names_and_bytes_count(tmp_path: Path, change: Callable[[Path], None]) -> None:
    before = digest_path(tree(tmp_path / "a"))
    change(tmp_path / "a")
    assert digest_path(tmp_path / "a") != before


def test_nothing_else_counts(tmp_path: Path) -> None:
    """Neither the directory's own name, nor times and modes, nor the order in which files were made, nor what is
    hidden or was only kept by Python."""
    before = digest_path(tree(tmp_path / "a"))
    other = tmp_path / "b"
    (other / "inner").mkdir(parents=True)
    for name in ("inner/weights", "empty", "config.json"):
        (other / name).write_bytes((tmp_path / "a" / name).read_bytes())
        os.utime(other / name, (1, 1))
        (other / name).chmod(0o600)
    for hidden in (".lock", "inner/.cache/blob", ".git/config", "__pycache__/a.pyc", "inner/__pycache__/b.pyc"):
        (other / hidden).parent.mkdir(exist_ok=True)
        (other / hidden).write_bytes(b"secret")
    (other / "no files in it").mkdir()
    assert digest_path(other) == before


def test_a_hidden_directory_that_is_asked_for_counts(tmp_path: Path) -> None:
    """Hidden is what is so below it: a hub's cache lies in ``~/.cache``."""
    assert digest_path(tree(tmp_path / ".cache" / "a")) == digest_path(tree(tmp_path / "a"))


def test_links_count_as_what_they_point_to(tmp_path: Path) -> None:
    """As in a hub's cache, in which every file of a snapshot is a link."""
    tree(tmp_path / "a")
    (tmp_path / "b" / "inner").mkdir(parents=True)
    for name in ("inner/weights", "empty", "config.json"):
        (tmp_path / "b" / name).symlink_to(tmp_path / "a" / name)
    assert digest_path(tmp_path / "b") == digest_path(tmp_path / "a")
    (tmp_path / "b" / "empty").unlink()
    (tmp_path / "b" / "empty").symlink_to(tmp_path / "nowhere")
    assert digest_path(tmp_path / "b") != digest_path(tmp_path / "a")


def test_no_name_passes_for_other_files(tmp_path: Path) -> None:
    """A name with a line end, which would look like the end of an empty file and the name of a second."""
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a").touch()
    (tmp_path / "two" / "b").write_bytes(b"xyz")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a 0\nb").write_bytes(b"xyz")
    assert digest_path(tmp_path / "one") != digest_path(tmp_path / "two")


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")).write_bytes(b"x")
    assert digest_path(tmp_path) is not None


def test_a_file_and_its_absence(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    before = digest_path(file)
    assert before is not None and digest_path(file) == before
    file.rename(tmp_path / "b")
    assert digest_path(tmp_path / "b") == before  # a file's own name is its directory's business
    assert digest_path(file) is None and digest_path(tmp_path / "b" / "below") is None
    (tmp_path / "b").write_bytes(b"two")
    assert digest_path(tmp_path / "b") != before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert digest_path(tmp_path / "pipe") is None
    empty = tmp_path / "empty"
    empty.mkdir()
    assert digest_path(tmp_path) == digest_path(empty)


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").touch()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ResourceError, match=r"a' cannot be read: Permission denied"):
        digest_path(tmp_path / "a")


def test_facts_count_by_value_and_not_by_order() -> None:
    facts = {"a": 1, "b": {"c": [1, 2], "d": None}}
    assert digest_of(facts) == digest_of({"b": {"d": None, "c": [1, 2]}, "a": 1})
    for other in ({"a": 1, "b": {"c": [2, 1], "d": None}}, {"a": "1", "b": facts["b"]}, {**facts, "e": None}, {}):
        assert digest_of(other) != digest_of(facts)


def test_the_package_counts_by_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code and templates do; what Python keeps of them does not."""
    assert (digests.PACKAGE / "workflow" / "digests.py").is_file()
    found = []
    for number, (name, text) in enumerate([("a.py", "x"), ("a.py", "y"), ("a.j2", "y"), ("a.pyc", "z"), ("b.md", "")]):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(digests, "PACKAGE", tmp_path)
        digest_package.cache_clear()
        found.append(digest_package())
        assert number == 0 or (found[-1] != found[-2]) == (number < 3)
    digest_package.cache_clear()
