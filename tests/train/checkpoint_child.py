"""Saves that die, run out of disk or meet another: each in a fork of this process, which imports torch only once.

One JSON object a line is read from standard input, one number a line is answered: how the last fork ended, as
``subprocess`` counts (-9: killed).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ryzen_compile import publish
from ryzen_compile.errors import BusyError, ResourceError
from ryzen_compile.train.checkpoint import Checkpoints, Snapshot

CALLS = ("mkdir", "rename", "rmdir", "unlink", "chmod", "fsync", "open", "close")
OK, SKIPPED = 0, 77
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000


def snapshot(step: int, size: int = 500) -> Snapshot:
    """Deterministic in ``step``: model 2 KB, optimizer 8 KB, state more than 24 KB, with the default ``size``."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(size, generator=generator)
    moments = torch.randn(4, size, generator=generator)
    state = {"step": step, "history": [step / (i + 1) for i in range(size)], "text": "=" * 48 * size}
    return Snapshot(step, {"w": weight, "tied": weight}, {"m": moments, "rng": generator.get_state()}, state)


def kill_at_step(directory: Path, step: int, name: str) -> None:
    def die(reached: str) -> None:
        if reached == name:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints(directory, keep=2, on_step=die).save(snapshot(step), metric=float(step))


def kill_at_call(directory: Path, step: int, number: int, exchange: bool) -> None:
    """Dies at the ``number``-th of the calls that change what is on the disk."""
    left = number

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))
    publish._exchange = dying(publish._exchange) if exchange else lambda one, other: False
    Checkpoints(directory, keep=2).save(snapshot(step), metric=float(step))


def save_for_ever(directory: Path) -> None:
    """A checkpoint of each step in turn: the parent kills it."""
    step = Checkpoints(directory).steps()[-1]
    while True:
        step += 1
        Checkpoints(directory, keep=2).save(snapshot(step), metric=float(step % 7))


def mount_small_disk(directory: Path) -> None:
    """1 MiB at ``directory``, which only this process sees; ends it by SKIPPED where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise SystemExit(SKIPPED)
    try:
        for name, text in (("uid_map", f"0 {user} 1"), ("setgroups", "deny"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
    except OSError:
        raise SystemExit(SKIPPED) from None
    if libc.mount(b"none", os.fsencode(directory), b"tmpfs", 0, b"size=1m"):
        raise SystemExit(SKIPPED)


def fill_disk(directory: Path, at: str) -> None:
    """On a disk of 1 MiB that something else fills while step ``at`` of a save begins. Dies by AssertionError."""
    mount_small_disk(directory)
    filler = directory / "filler"

    def fill(reached: str) -> None:
        if reached == at:
            with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
                while stream.write(bytes(4096)):
                    pass

    folder = directory / "checkpoints"
    Checkpoints(folder).save(snapshot(1), metric=1.0)
    renaming_only = at in ("publish", "prune")  # that takes no space
    with contextlib.nullcontext() if renaming_only else refused("No space left on device"):
        Checkpoints(folder, on_step=fill).save(snapshot(2))
    assert filler.exists()
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    assert newest_is(folder, 2 if renaming_only else 1)
    filler.unlink()
    Checkpoints(folder).save(snapshot(3))
    assert newest_is(folder, 3)


def limit_file_size(directory: Path, limit: int) -> None:
    """The kernel refuses to let a file grow beyond ``limit`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with refused("File too large"):
        Checkpoints(directory).save(snapshot(2))


@contextlib.contextmanager
def refused(reason: str) -> Iterator[None]:
    try:
        yield
    except ResourceError as error:
        if reason not in str(error):
            raise
    else:
        raise AssertionError(f"expected: {reason}")


def save_against_another(directory: Path) -> None:
    """Two processes save the same step, over and over; only BusyError may come of it, and not always."""
    other = os.fork()
    own = 1 if other else 2
    saved = 0
    for _ in range(40):
        with contextlib.suppress(BusyError):
            Checkpoints(directory).save(Snapshot(7, {"w": torch.full((5000,), own)}, {}, {"own": own}))
            saved += 1
        time.sleep(random.random() / 500)
    assert saved
    if other:
        _, status = os.waitpid(other, 0)
        assert status == 0, status


def newest_is(directory: Path, step: int) -> bool:
    found, expected = Checkpoints(directory).newest(), snapshot(step)
    assert found is not None
    return (
        found.step == step
        and all(torch.equal(found.model[name], tensor) for name, tensor in expected.model.items())
        and all(torch.equal(found.optimizer[name], tensor) for name, tensor in expected.optimizer.items())
        and found.state == expected.state
    )


def run(case: dict[str, Any]) -> int:
    """Forks, runs what ``case["do"]`` names with the other entries, kills it after ``case["seconds"]`` if there are
    some; returns how it ended."""
    do, seconds = globals()[case.pop("do")], case.pop("seconds", None)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            do(Path(case.pop("directory")), **case)
            status = OK
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:  # noqa: BLE001 - a fork must not go on as its parent would
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for line in sys.stdin:
        print(run(json.loads(line)), flush=True)  # noqa: T201
