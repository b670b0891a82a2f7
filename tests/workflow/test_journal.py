"""What a workflow remembers: whole phases, in a file that is whole, and only as long as what they left is there."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile import errors
from ryzen_compile.errors import ArtifactError, ResourceError
from ryzen_compile.workflow.journal import JOURNAL_NAME, MAX_BYTES, Entry, Journal, make_directory, write_file


def filled(directory: Path) -> Journal:
    """A journal of two phases: one that left a file and a directory, one that had nothing to do."""
    (directory / "artifact").mkdir()
    (directory / "artifact" / "model").write_text("weights")
    (directory / "changes.json").write_text("[]")
    journal = Journal(directory)
    journal.finish("optimize", "inputs", ("artifact", "changes.json"), 1.5)
    journal.finish("test", "none", (), 0.0, "the workflow has no tests")
    return journal


def content(directory: Path) -> dict[str, Any]:
    """What the file holds; fails unless it is whole, and the only thing that was written beside the outputs."""
    assert {path.name for path in directory.iterdir()} <= {JOURNAL_NAME, "artifact", "changes.json"}
    found: dict[str, Any] = json.loads((directory / JOURNAL_NAME).read_text(encoding="utf-8"))
    return found


# --- entries ----------------------------------------------------------------------------------------------------------
def test_entries_survive(tmp_path: Path) -> None:
    first = filled(tmp_path)
    for journal in (first, Journal(tmp_path), Journal(tmp_path)):
        entry = journal.finished("optimize", "inputs")
        assert entry is not None and (entry.inputs, entry.seconds, entry.skipped) == ("inputs", 1.5, "")
        assert set(entry.outputs) == {"artifact", "changes.json"}
        skipped = journal.finished("test", "none")
        assert skipped is not None and skipped.skipped == "the workflow has no tests" and skipped.outputs == {}
    assert list(content(tmp_path)["phases"]) == ["optimize", "test"]


def test_other_inputs_are_another_run(tmp_path: Path) -> None:
    journal = filled(tmp_path)
    assert journal.finished("optimize", "others") is None
    assert journal.finished("optimize", "") is None
    assert journal.finished("optimize") is not None  # whatever its inputs were
    assert journal.finished("setup") is None and journal.finished("setup", "inputs") is None


def change_a_file(directory: Path) -> None:
    (directory / "artifact" / "model").write_text("weightS")


def remove_a_file(directory: Path) -> None:
    (directory / "changes.json").unlink()


def add_a_file(directory: Path) -> None:
    (directory / "artifact" / "another").touch()


def remove_a_directory(directory: Path) -> None:
    (directory / "artifact" / "model").unlink()
    (directory / "artifact").rmdir()


def make_it_a_file(directory: Path) -> None:
    remove_a_directory(directory)
    (directory / "artifact").write_text("weights")


@pytest.mark.parametrize("damage", [change_a_file, remove_a_file, add_a_file, remove_a_directory, make_it_a_file])
def test_outputs_that_changed_make_a_phase_unfinished(tmp_path: Path, damage: Any) -> None:
    journal = filled(tmp_path)
    damage(tmp_path)
    for one in (journal, Journal(tmp_path)):
        assert one.finished("optimize", "inputs") is None and one.finished("optimize") is None
        assert one.finished("test") is not None


def test_a_phase_whose_output_is_not_there_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"setup\.json' is gone; run setup again"):
        Journal(tmp_path).finish("setup", "inputs", ("setup.json",), 0.1)
    assert Journal(tmp_path).finished("setup") is None


def test_a_phase_that_is_finished_again_replaces_its_entry(tmp_path: Path) -> None:
    journal = filled(tmp_path)
    change_a_file(tmp_path)
    entry = journal.finish("optimize", "others", ("artifact",), 2.5)
    assert Journal(tmp_path).finished("optimize", "others") == entry
    assert Journal(tmp_path).finished("optimize", "inputs") is None


def test_forgetting_is_written_down(tmp_path: Path) -> None:
    journal = filled(tmp_path)
    journal.forget("optimize")
    assert journal.finished("optimize") is None
    assert list(content(tmp_path)["phases"]) == ["test"]
    before = (tmp_path / JOURNAL_NAME).stat().st_mtime_ns
    journal.forget("optimize")
    journal.forget("report")
    assert (tmp_path / JOURNAL_NAME).stat().st_mtime_ns == before  # there was nothing to write


def test_beginning_marks_the_directory_once(tmp_path: Path) -> None:
    Journal(tmp_path).begin()
    assert content(tmp_path) == {"schema_version": 1, "phases": {}}
    journal = filled(tmp_path)
    before = (tmp_path / JOURNAL_NAME).read_bytes()
    journal.begin()
    Journal(tmp_path).begin()
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before


# --- files that are none ----------------------------------------------------------------------------------------------
ENTRY = '{"inputs": "a", "outputs": {}, "seconds": 1, "skipped": ""}'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "Invalid JSON"),
        (b"{", "Invalid JSON"),
        (b"\xff\xfe\x00", "Invalid JSON"),
        (b"[]", "object"),
        (b"{}", "schema_version: Field required"),
        (b'{"schema_version": 2, "phases": {}}', "schema_version: Input should be 1"),
        (b'{"schema_version": "1", "phases": {}}', "schema_version: Input should be 1"),
        (b'{"schema_version": 1, "phases": {}, "more": 1}', "more: Extra inputs are not permitted"),
        (f'{{"schema_version": 1, "phases": {{"paint": {ENTRY}}}}}'.encode(), r"phases\.paint"),
        (b'{"schema_version": 1, "phases": {"setup": {}}}', r"phases\.setup\.inputs: Field required"),
        (f'{{"schema_version": 1, "phases": {{"setup": {ENTRY.replace("1", "-1")}}}}}'.encode(), "seconds"),
        (b'{"schema_version": 1, "phases": {}}' + b" " * MAX_BYTES, "it is larger than 1048576 bytes"),
        (b'{"schema_version": 1, "phases": ' + b"[" * 5000, "Invalid JSON"),
    ],
    ids=["empty", "cut", "bytes", "list", "none", "newer", "text", "more", "phase", "entry", "value", "huge", "deep"],
)
def test_what_is_no_journal_is_refused_and_kept(tmp_path: Path, text: bytes, why: str) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(text)
    with pytest.raises(ArtifactError, match=rf"workflow\.json' is no journal of a workflow: .*{why}") as caught:
        Journal(tmp_path)
    assert "choose another output" in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / JOURNAL_NAME).read_bytes() == text


def test_the_entry_of_those_is_one(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_text(f'{{"schema_version": 1, "phases": {{"setup": {ENTRY}}}}}')
    assert Journal(tmp_path).finished("setup", "a") == Entry(inputs="a", outputs={}, seconds=1)


def test_a_journal_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).mkdir()
    with pytest.raises(ResourceError, match="cannot be read: Is a directory"):
        Journal(tmp_path)


# --- writing ----------------------------------------------------------------------------------------------------------
def failing(number: int) -> Any:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fails


@pytest.mark.parametrize(("owner", "call"), [(os, "fsync"), (Path, "replace")])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_torn_write_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, call: str, number: int
) -> None:
    journal = filled(tmp_path)
    before = (tmp_path / JOURNAL_NAME).read_bytes()
    monkeypatch.setattr(owner, call, failing(number))
    with pytest.raises(ResourceError, match=rf"workflow\.json' cannot be written: {os.strerror(number)}") as caught:
        journal.finish("validate", "inputs", (), 1.0)
    assert ("free some space" in str(caught.value)) == (number == errno.ENOSPC)
    monkeypatch.undo()
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before
    assert list(content(tmp_path)["phases"]) == ["optimize", "test"]
    assert Journal(tmp_path).finished("validate") is None


def test_the_first_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(ResourceError):
        Journal(tmp_path).begin()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interrupted_write_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "a.json"
    write_file(path, "old")
    monkeypatch.setattr(os if call == "fsync" else Path, call, stop)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_names_are_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before it is renamed, its directory behind."""
    seen, real = [], os.fsync

    def fsync(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        seen.append((target.name, (tmp_path / "a").exists()))
        real(descriptor)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("nothing says here what a descriptor is of")
    monkeypatch.setattr(os, "fsync", fsync)
    write_file(tmp_path / "a", "text")
    assert seen == [(".a.new", False), (tmp_path.name, True)]


def test_what_a_killed_writer_left_does_not_hinder(tmp_path: Path) -> None:
    (tmp_path / f".{JOURNAL_NAME}.new").write_text("half of a li")
    journal = filled(tmp_path)
    assert journal.finished("optimize") is not None
    content(tmp_path)


@pytest.mark.parametrize("place", ["absent/a", "file/a", "directory"])
def test_places_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "directory").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ResourceError, match="cannot be written"):
        write_file(tmp_path / place, "text")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "kept"


def test_directories_that_cannot_be_made(tmp_path: Path) -> None:
    make_directory(tmp_path / "a" / "b")
    make_directory(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises(ResourceError, match="cannot be made"):
            make_directory(tmp_path / place)


WRITER = f"""
import sys, types
package = types.ModuleType("ryzen_compile")
package.__path__ = [{str(Path(errors.__file__).parent)!r}]
sys.modules["ryzen_compile"] = package
from pathlib import Path
from ryzen_compile.workflow.journal import Journal
journal, number = Journal(Path(sys.argv[1])), 0
while True:
    number += 1
    journal.finish("setup", f"{{number}} " * (number % 997), (), number)
    if number == 3:
        print("writing", flush=True)
"""


@pytest.mark.parametrize("after", [0.0, 0.013, 0.041])
def test_a_writer_that_is_killed_leaves_a_whole_journal(tmp_path: Path, after: float) -> None:
    """Children get the package without its front door: what else they import would take most of the time."""
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "writing\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(after)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    entry = Journal(tmp_path).finished("setup")
    assert entry is not None and entry.inputs == f"{int(entry.seconds)} " * (int(entry.seconds) % 997)
    Journal(tmp_path).finish("train", "", (), 0)
    assert set(content(tmp_path)["phases"]) == {"setup", "train"}
