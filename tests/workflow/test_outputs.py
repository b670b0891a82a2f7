"""Where a workflow may write: an output of its own, alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ryzen_compile import publish
from ryzen_compile.errors import ArtifactError, BusyError, ResourceError, UsageError
from ryzen_compile.workflow.journal import JOURNAL_NAME
from ryzen_compile.workflow.phase import ARTIFACT_NAME, SETUP_NAME
from ryzen_compile.workflow.phases.report import HTML_NAME
from ryzen_compile.workflow.run import run_workflow
from tests.workflow.tiny_workflow import (
    COMMAND,
    WORKING,
    config,
    copied,
    finished_workflow,
    nothing_runs,
    replayed,
    times,
)

SECONDS = 300  # that a child may take on a busy machine; none is meant to


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_workflow(tmp_path_factory)


@pytest.mark.parametrize("names", [("thesis.txt",), (SETUP_NAME, "thesis.txt"), (ARTIFACT_NAME,), (HTML_NAME,)])
def test_foreign_files_are_refused_and_stay(tmp_path: Path, names: Sequence[str]) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for name in names:
        (output / name).write_text("mine")
    with pytest.raises(ArtifactError, match=f"holds '{min(names)}' and no workflow; choose another output"):
        run_workflow(config(output), command=COMMAND)
    assert {path.name: path.read_text() for path in output.iterdir()} == dict.fromkeys(names, "mine")


def test_a_foreign_journal_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_text('{"jobs": []}')
    with pytest.raises(ArtifactError, match="is no journal of a workflow"):
        run_workflow(config(tmp_path), command=COMMAND)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {JOURNAL_NAME: '{"jobs": []}'}


def test_a_foreign_artifact_is_refused_and_stays(finished: Path, tmp_path: Path) -> None:
    """Somebody put files of theirs where the artifact goes."""
    output = copied(finished, tmp_path / "out")
    shutil.rmtree(output / ARTIFACT_NAME)
    (output / ARTIFACT_NAME).mkdir()
    (output / ARTIFACT_NAME / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is not empty"):
        run_workflow(config(output), command=COMMAND)
    assert (output / ARTIFACT_NAME / "thesis.txt").read_text() == "mine"


def test_hidden_files_and_empty_directories_are_nobodys(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / f".{JOURNAL_NAME}.new").write_text("left by a run that was killed in its first moment")
    ran = replayed(monkeypatch, finished)
    run_workflow(config(output), command=COMMAND)
    assert ran == list(WORKING)


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match=r"out' is a file, expected a directory"):
        run_workflow(config(tmp_path / "out"), command=COMMAND)
    with pytest.raises(ResourceError, match=r"out' cannot be made"):
        run_workflow(config(tmp_path / "out" / "below"), command=COMMAND)
    assert (tmp_path / "out").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["out"]


HOLDER = f"""
import sys, types
package = types.ModuleType("ryzen_compile")
package.__path__ = [{str(Path(publish.__file__).parent)!r}]
sys.modules["ryzen_compile"] = package
from ryzen_compile.publish import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_another_process_works_there(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Refused before anything is read or written; when it is gone, whichever way, the output is free."""
    output = copied(finished, tmp_path / "out")
    before = times(output)
    nothing_runs(monkeypatch)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(BusyError, match=rf"process '{holder.pid}' .* is writing .*out'"):
            run_workflow(config(output), command=COMMAND)
        assert times(output) == before
        run_workflow(config(copied(finished, tmp_path / "other")), command=COMMAND)  # which nobody holds
        if killed:
            holder.kill()
    finally:
        holder.communicate(timeout=SECONDS)
    run_workflow(config(output), command=COMMAND)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_what_locked_refuses(tmp_path: Path) -> None:
    """The lock of an output is that of an artifact of this name: one writer, whatever it writes."""
    with publish.locked(tmp_path / "out"):
        for second in (publish.locked(tmp_path / "out"), publish.Staging(tmp_path / "out")):
            with pytest.raises(BusyError, match="is writing"), second:
                pytest.fail("entered")
        with publish.locked(tmp_path / "other"):
            assert not (tmp_path / "out").exists()  # nor is it made
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="does not exist"), publish.locked(tmp_path / "absent" / "out"):
        pytest.fail("entered")
    with publish.Staging(tmp_path / "out") as stage:
        stage.commit()
    with publish.locked(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()


def test_the_lock_goes_with_a_run_that_fails(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_runs(monkeypatch)
    for _ in range(2):
        with pytest.raises(AssertionError, match="setup ran"):
            run_workflow(config(tmp_path / "out"), command=COMMAND)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
