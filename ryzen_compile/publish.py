"""How a directory of files appears all at once.

Everything is written into a hidden sibling of the target, made durable, then renamed into place: a reader sees the
old directory, the new one or none, and ``kill -9`` leaves at worst a hidden sibling that the next run sweeps. A lock
file beside it (``flock``, freed by the kernel when its holder dies) keeps two writers of one target apart.

It knows nothing of what the files mean, except the one name that marks a directory as replaceable.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from ryzen_compile.errors import (
    ArtifactError,
    BusyError,
    ResourceError,
    RyzenCompileError,
    UnsafeError,
    UnsupportedError,
    UsageError,
)
from ryzen_compile.manifest import MANIFEST_NAME, shown, shown_path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# What the machine, not the program, did wrong: these become ResourceError even when the caller's own writes raise them.
_MACHINE_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)


class Staging:
    """``with Staging(out) as stage: write into stage.path; stage.commit()``.

    ``stage.path`` is a fresh directory (mode 0700) on the target's file system. ``commit`` publishes it as ``out``;
    leaving the block without a commit, by an exception, Ctrl-C or SIGTERM, removes it and leaves ``out`` as it was.

    Raises, before anything is written: UsageError (``out`` is a file or link, or its parent is missing), ArtifactError
    (``out`` is not empty and ``force`` is off, or it lacks ``owner_marker``), BusyError (another process has the lock).
    """

    def __init__(self, out: str | Path, force: bool = False, owner_marker: str = MANIFEST_NAME) -> None:
        self.out = Path(os.path.abspath(Path(out).expanduser()))  # noqa: PTH100 - resolve() would follow a link
        self.force = force
        self.owner_marker = owner_marker
        self.committed = False
        parent, name = self.out.parent, self.out.name
        owner = f"{os.getpid()}-{secrets.token_hex(4)}"
        self.path = parent / f".{name}.tmp-{owner}"
        self._aside = parent / f".{name}.old-{owner}"
        self._lock_path = parent / f".{name}.lock"
        self._lock: int | None = None
        self._caught_sigterm = False

    def __enter__(self) -> Self:
        _check_parent(self.out)
        with _machine_errors(f"prepare {shown_path(self.out)}"):
            self._lock = _take_lock(self._lock_path, self.out)
            try:
                self._sweep()
                self._check_target()
                self._catch_sigterm()
                self.path.mkdir(0o700)
            except BaseException:  # the lock must not outlive a failed entry
                self._release()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # Unpublished files, or what an exchange put in their place. What resists, the next run sweeps.
            shutil.rmtree(self.path, ignore_errors=True)
            if self._aside.exists() and self.out.exists():
                shutil.rmtree(self._aside, ignore_errors=True)
        finally:
            self._release()
        if isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS:
            raise _resource_error(f"write {shown_path(self.out)}", error) from error

    def commit(self, finalize: Callable[[Path], object] | None = None) -> Path:
        """Publishes the directory and returns ``out``.

        ``finalize(path)`` runs first and may still add files (the manifest) or refuse by raising. When this returns,
        the files and their names have been fsynced: a power cut afterwards loses nothing. A replaced directory is
        deleted at the end of the block.
        """
        if finalize is not None:
            finalize(self.path)
        with _machine_errors(f"publish {shown_path(self.out)}"):
            _make_durable(self.path)
            self._check_target()
            self._swap_in()
            self.committed = True
            _fsync(self.out.parent)
        return self.out

    def _check_target(self) -> None:
        """Refuses an ``out`` that may not be replaced. Asked on entry, and again before the rename."""
        try:
            mode = os.lstat(self.out).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "a file"
            raise UsageError(f"output {shown_path(self.out)} is {kind}, expected a directory")
        if not any(self.out.iterdir()):
            return
        if not self.force:
            raise ArtifactError(
                f"output directory {shown_path(self.out)} is not empty",
                hint="choose another, or replace it with --force",
            )
        marker = self.out / self.owner_marker
        if marker.is_symlink() or not marker.is_file():
            raise ArtifactError(
                f"output directory {shown_path(self.out)} holds no {self.owner_marker}, so it is not ours to replace",
                hint="choose another directory",
            )

    def _swap_in(self) -> None:
        """Renames ``path`` to ``out``. A directory that was there then lies under ``path`` or ``_aside``."""
        if not self.out.exists() or not any(self.out.iterdir()):
            self.path.rename(self.out)  # rename(2) replaces an empty directory in one step
            return
        if _exchange(self.path, self.out):
            return
        # No RENAME_EXCHANGE on this file system: for an instant neither name exists. A kill there leaves the old
        # directory under `.old-`, from where the next run puts it back (_sweep).
        self.out.rename(self._aside)
        moved = False
        try:
            self.path.rename(self.out)
            moved = True
        finally:
            if not moved:
                self._aside.rename(self.out)

    def _sweep(self) -> None:
        """Removes what dead runs left. Holding the lock proves that no live run owns any of it."""
        pattern = re.compile(re.escape(f".{self.out.name}.") + r"(tmp|old)-\d+-[0-9a-f]{8}")
        for stale in list(self.out.parent.iterdir()):
            if not (match := pattern.fullmatch(stale.name)):
                continue
            if stale.is_symlink() or not stale.is_dir():
                stale.unlink()
            elif match[1] == "old" and not self.out.exists():
                stale.rename(self.out)
            else:
                shutil.rmtree(stale)

    def _catch_sigterm(self) -> None:
        """SIGTERM becomes SystemExit(143) inside the block, so that it unwinds; a handler of the caller's is kept."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _exit_on_signal)
            self._caught_sigterm = True

    def _release(self) -> None:
        if self._caught_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._caught_sigterm = False
        if self._lock is not None:
            # Unlinked while still held: whoever opened the old file notices that the name is gone (_take_lock).
            try:
                self._lock_path.unlink(missing_ok=True)
            finally:
                os.close(self._lock)
                self._lock = None


def require_free(out: str | Path) -> None:
    """Asked before minutes of work, and holds nothing: raises BusyError when another process is writing ``out``, and
    ResourceError when nothing can be written there."""
    stage = Staging(out)
    with _machine_errors(f"prepare {shown_path(stage.out)}"):
        stage._lock = _take_lock(stage._lock_path, stage.out)
    stage._release()


@contextmanager
def locked(out: str | Path) -> Iterator[None]:
    """For the time of the block no other process may write ``out``, which need not exist. Raises BusyError when one
    does, UsageError when the parent is missing, and ResourceError when nothing can be written there."""
    stage = Staging(out)
    _check_parent(stage.out)
    with _machine_errors(f"prepare {shown_path(stage.out)}"):
        stage._lock = _take_lock(stage._lock_path, stage.out)
    try:
        yield
    finally:
        stage._release()


def require_space(path: str | Path, bytes_needed: int) -> None:
    """Raises ResourceError when the file system that holds (or will hold) ``path`` has fewer free bytes."""
    place = Path(path).expanduser().resolve()
    while not place.exists() and place != place.parent:
        place = place.parent
    with _machine_errors(f"read the free space of {shown_path(place)}"):
        free = shutil.disk_usage(place).free
    if free < bytes_needed:
        raise ResourceError(
            f"{shown_path(path)} needs {bytes_needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free",
            hint="free some space or choose another directory",
        )


def _check_parent(out: Path) -> None:
    if not out.name:
        raise UsageError(f"output {shown_path(out)} is the root directory")
    if not out.parent.is_dir():
        raise UsageError(f"output directory's parent {shown_path(out.parent)} does not exist", hint="create it first")


def _take_lock(path: Path, out: Path) -> int:
    """An open descriptor that holds the exclusive lock, with ``pid host`` written into the file."""
    try:
        import fcntl  # POSIX only, and the rest of the package runs without
    except ImportError as error:
        raise UnsupportedError("writing an artifact needs POSIX file locks, which this system lacks") from error
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        locked = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A holder unlinks the file on release; locking that dead file would exclude nobody, so the name must match.
            locked = path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))
            if locked:
                with suppress(OSError):  # who holds it is said to others, and a full disk does not hinder holding it
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return descriptor
        except BlockingIOError as error:
            pid, _, host = os.pread(descriptor, 300, 0).decode(errors="replace").strip().partition(" ")
            holder = f"process {shown(pid)} on {shown(host)}" if pid else "another process"
            raise BusyError(f"{holder} is writing {shown_path(out)}", hint="wait for it, or choose another") from error
        finally:
            if not locked:
                os.close(descriptor)


def _make_durable(directory: Path) -> None:
    """Gives files and folders the modes that plain creation would have, and fsyncs them, innermost first.

    Refuses links and special files: ONNX Runtime would not load external data through them, nor would a copy keep them.
    """
    mask = os.umask(0o077)  # the only way to read it; the strict value meanwhile errs on the safe side
    os.umask(mask)
    for folder, subfolders, names in os.walk(directory, topdown=False):
        for name in [*subfolders, *names]:
            path = Path(folder, name)
            status = os.lstat(path)
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise UnsafeError(f"{shown_path(path)} is a link or a special file, expected a plain file")
            path.chmod(0o666 & ~mask)
            _fsync(path)
        Path(folder).chmod(0o777 & ~mask)
        _fsync(Path(folder))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step (Linux ``renameat2``); False where the kernel or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@contextmanager
def _machine_errors(action: str) -> Iterator[None]:
    """Turns an OSError of the block into ResourceError; the package's own errors pass."""
    try:
        yield
    except RyzenCompileError:  # some are OSErrors too, and already worded
        raise
    except OSError as error:
        raise _resource_error(action, error) from error


def _resource_error(action: str, error: OSError) -> ResourceError:
    where = f" ({shown_path(os.fsdecode(error.filename))})" if isinstance(error.filename, (str, bytes)) else ""
    return ResourceError(f"cannot {action}: {error.strerror}{where}")


def _exit_on_signal(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
