"""Publication: all at once or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from ryzen_compile import errors, publish
from ryzen_compile.errors import ArtifactError, BusyError, ResourceError, UnsafeError, UsageError
from ryzen_compile.manifest import MANIFEST_NAME, read_manifest, verify_files, write_manifest
from ryzen_compile.publish import Staging, require_space

# Children get the package without its front door: importing torch would take most of the time.
CHILD = f"""
import os, signal, sys, types
package = types.ModuleType("ryzen_compile")
package.__path__ = [{str(Path(errors.__file__).parent)!r}]
sys.modules["ryzen_compile"] = package
from pathlib import Path
from ryzen_compile import publish
from ryzen_compile.manifest import write_manifest
out = Path(sys.argv[1])
"""


def export(out: Path, text: str, *, force: bool = True) -> None:
    with Staging(out, force=force) as stage:
        (stage.path / "model.onnx").write_text(text)
        (stage.path / "sub").mkdir()
        (stage.path / "sub" / "chat.jinja").write_text(text)
        stage.commit(lambda path: write_manifest(path, {"text": text}))


def content(out: Path) -> str | None:
    """What a reader sees; fails if it sees half of anything."""
    if not out.exists():
        return None
    verify_files(out, read_manifest(out))
    return (out / "model.onnx").read_text()


def hidden(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


def child(code: str, out: Path, *args: str) -> subprocess.Popen[str]:
    script = CHILD + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", script, str(out), *args], stdout=subprocess.PIPE, text=True)


@pytest.fixture(params=["exchange", "two renames"])
def renaming(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(publish, "_exchange", lambda one, other: False)


def test_publishes_with_ordinary_modes(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with Staging(tmp_path / "out") as stage:
            assert stat.S_IMODE(stage.path.stat().st_mode) == 0o700
            assert stage.path.parent == tmp_path
            (stage.path / "sub").mkdir(0o700)
            (stage.path / "sub" / "a").touch(0o600)
            assert stage.commit() == tmp_path / "out"
            assert stage.committed
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out" / "sub").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out" / "sub" / "a").stat().st_mode) == 0o644
    assert hidden(tmp_path) == []


@pytest.mark.usefixtures("renaming")
def test_replaces_an_artifact_and_an_empty_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export(out, "one", force=False)
    export(out, "two")
    assert content(out) == "two"
    assert hidden(tmp_path) == []


@pytest.mark.usefixtures("renaming")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_keeps_the_old(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    export(out, "one")

    def fail(path: Path) -> None:
        (path / "model.onnx").write_text("half")
        raise error

    with pytest.raises(error), Staging(out, force=True) as stage:
        stage.commit(fail)
    assert content(out) == "one"
    assert hidden(tmp_path) == []


def test_leaving_without_commit_publishes_nothing(tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as stage:
        (stage.path / "a").touch()
    assert list(tmp_path.iterdir()) == []


def test_a_refusing_finalize_publishes_nothing(tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise ArtifactError("no")

    with pytest.raises(ArtifactError, match="no"), Staging(tmp_path / "out") as stage:
        stage.commit(refuse)
    assert list(tmp_path.iterdir()) == []


def a_file(out: Path) -> None:
    out.write_text("x")


def a_link(out: Path) -> None:
    out.symlink_to(out.parent)


def a_full_directory(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("x")


def a_linked_marker(out: Path) -> None:
    out.mkdir()
    (out / MANIFEST_NAME).symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("prepare", "force", "error", "message"),
    [
        (a_file, True, UsageError, "is a file, expected a directory"),
        (a_link, True, UsageError, "is a symbolic link"),
        (a_full_directory, False, ArtifactError, "is not empty.*--force"),
        (a_full_directory, True, ArtifactError, "holds no ryzen_compile.json"),
        (a_linked_marker, True, ArtifactError, "holds no ryzen_compile.json"),
    ],
)
def test_targets_that_may_not_be_replaced(
    tmp_path: Path, prepare: Callable[[Path], None], force: bool, error: type[Exception], message: str
) -> None:
    out = tmp_path / "out"
    prepare(out)
    before = sorted(os.walk(tmp_path))
    with pytest.raises(error, match=message), Staging(out, force=force):
        pytest.fail("entered")
    assert sorted(os.walk(tmp_path)) == before


def test_an_artifact_needs_force(tmp_path: Path) -> None:
    export(tmp_path / "out", "one")
    with pytest.raises(ArtifactError, match="is not empty"):
        export(tmp_path / "out", "two", force=False)
    assert content(tmp_path / "out") == "one"


def test_a_missing_parent_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"parent .*absent' does not exist"), Staging(tmp_path / "absent" / "out"):
        pytest.fail("entered")
    assert list(tmp_path.iterdir()) == []


def test_a_target_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not empty"), Staging(tmp_path / "out") as stage:
        stage.commit(lambda path: a_full_directory(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/etc/hostname"), os.mkfifo])
def test_links_and_special_files_are_not_published(tmp_path: Path, make: Callable[[Path], None]) -> None:
    with pytest.raises(UnsafeError, match="is a link or a special file"), Staging(tmp_path / "out") as stage:
        stage.commit(lambda path: make(path / "odd"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("renaming")
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "chmod"])
def test_every_failing_system_call_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Fails the first call, then the second, ... until a run survives."""
    out, real = tmp_path / "out", getattr(os, call)
    export(out, "one")
    for failing in range(100):
        count = iter(range(1000))

        def fails(*args: object, **kwargs: object) -> object:
            if next(count) == failing:  # noqa: B023 - called only within this round
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        error = None
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            try:
                export(out, "two")
            except ResourceError as raised:
                error = raised
        if error is None:
            break
        assert "No space left" in str(error)
        assert content(out) in ("one", "two")
        assert hidden(tmp_path) == []
    assert content(out) == "two"
    assert failing > 0 or call == "rename"  # an exchange needs no rename


def test_a_full_disk_inside_the_block_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"cannot write .*out': No space"), Staging(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), Staging(tmp_path / "out"):
        Path(tmp_path / "absent").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_is_busy_and_names_the_first(tmp_path: Path) -> None:
    holder = child(
        """
        with publish.Staging(out) as stage:
            print("ready", flush=True)
            signal.pause()
        """,
        tmp_path / "out",
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    before = hidden(tmp_path)
    with pytest.raises(BusyError, match=f"process '{holder.pid}' on '.+' is writing .*out'") as caught:
        export(tmp_path / "out", "two")
    assert caught.value.exit_code == 6
    assert hidden(tmp_path) == before  # the holder's temporary directory is not swept
    export(tmp_path / "other", "another target is free")
    holder.terminate()
    assert holder.wait(10) == 143
    holder.stdout.close()
    assert hidden(tmp_path) == []  # SIGTERM unwinds
    export(tmp_path / "out", "two")
    assert content(tmp_path / "out") == "two"


def test_one_process_cannot_stage_twice(tmp_path: Path) -> None:
    with Staging(tmp_path / "out"), pytest.raises(BusyError, match=f"process '{os.getpid()}'"):
        export(tmp_path / "out", "two")


# Each run dies by SIGKILL at the n-th of these calls; the numbers cover every step of the export below.
KILLED = """
mode, step = sys.argv[2], int(sys.argv[3])
calls = 0
def dying(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
for name in ("mkdir", "rename", "rmdir", "chmod"):
    setattr(os, name, dying(getattr(os, name)))
publish._fsync = dying(publish._fsync)
publish._exchange = dying(publish._exchange) if mode == "exchange" else dying(lambda one, other: False)
with publish.Staging(out, force=True) as stage:
    (stage.path / "model.onnx").write_text("two")
    stage.commit(lambda path: write_manifest(path, {}))
print("done", calls)
"""


@pytest.mark.parametrize("mode", ["exchange", "two renames"])
def test_kill_at_every_step(tmp_path: Path, mode: str) -> None:
    running = []
    for step in range(1, 16):
        folder = tmp_path / str(step)
        folder.mkdir()
        export(folder / "out", "one")
        running.append((folder, child(KILLED, folder / "out", mode, str(step))))
        if len(running) % 3 == 0:
            running[-1][1].wait(20)
    seen = set()
    for folder, process in running:
        output, _ = process.communicate(timeout=20)
        if process.returncode == 0:
            assert output.startswith("done")
        else:
            assert process.returncode == -signal.SIGKILL
        found = content(folder / "out")
        seen.add((process.returncode, found))
        assert found is not None or mode == "two renames"
        # The next run, even one that publishes nothing, sweeps what the dead one left and restores what it set aside.
        with Staging(folder / "out", force=True) as stage:
            assert content(folder / "out") in ("one", "two")
            assert hidden(folder) == sorted([".out.lock", stage.path.name])
        assert hidden(folder) == []
    assert (-signal.SIGKILL, "one") in seen
    assert (-signal.SIGKILL, "two") in seen
    assert ((-signal.SIGKILL, None) in seen) == (mode == "two renames")
    assert (0, "two") in seen


def test_the_sweep_leaves_neighbours_alone(tmp_path: Path) -> None:
    keep = [".out.tmp-1-notes", ".out.tmp-12345-0123456g", ".other.tmp-1-01234567", "out.tmp-1-01234567"]
    for name in [*keep, ".out.tmp-1-01234567"]:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.tmp-2-01234567").symlink_to(tmp_path / "out.tmp-1-01234567")
    export(tmp_path / "out", "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*keep, "out"])


def test_a_stale_lock_file_does_not_block(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_text("1 elsewhere\n")
    export(tmp_path / "out", "one")
    assert content(tmp_path / "out") == "one"


def test_a_linked_lock_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ResourceError):
        export(tmp_path / "out", "one")
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_lock_that_vanished_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder unlinks its lock file on release; a waiter that locks the dead file must notice."""
    real, rounds = fcntl.flock, []

    def vanishing(descriptor: int, flags: int) -> None:
        real(descriptor, flags)
        rounds.append(descriptor)
        if len(rounds) == 1:
            (tmp_path / ".out.lock").unlink()

    monkeypatch.setattr(fcntl, "flock", vanishing)
    export(tmp_path / "out", "one")
    assert len(rounds) == 2
    assert content(tmp_path / "out") == "one"


def test_callers_signal_handlers_are_kept(tmp_path: Path) -> None:
    def mine(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with Staging(tmp_path / "out"):
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    with Staging(tmp_path / "out"):
        pass
    assert signal.getsignal(signal.SIGTERM) == before


def test_require_space(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(ResourceError, match=r"needs 1099511627776\.0 MiB, [\d.]+ MiB are free"):
        require_space(tmp_path / "out", 2**60)
