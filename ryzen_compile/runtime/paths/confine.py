"""The child's side of ``sandbox``: confines itself, starts a program, watches it, and says how it ended.

A script for ``python -I -S``: it knows the standard library only and is never imported by what it confines. Its
argument is JSON: ``limits``, ``command``, ``status`` (a descriptor for the report), ``namespaces`` (whether to try
them). The keeper, which runs none of the program, is the first process of a namespace where there is one, so that
its end ends whatever the program left; elsewhere orphans become its children, and it ends them one by one. Root's
programs run as a user that nobody is, whose number no other program has: the kernel counts processes by user, and
root's not at all.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

NEW_USER, NEW_PIDS, NEW_NETWORK, NEW_IPC, NEW_MOUNTS = 0x10000000, 0x20000000, 0x40000000, 0x08000000, 0x00020000
NO_SETUID, NO_DEVICES, NO_PROGRAMS = 2, 4, 8  # mount's, beside READ_ONLY
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY, PRIVATE = 442, -100, 0x8000, 1, 1 << 18
PARENT_DEATH, SUBREAPER, NO_NEW_PRIVILEGES = 1, 36, 38  # prctl's
NOBODY = 65534
FIRST_STRANGER = 1_000_000_000  # user numbers above which no accounts are
KEEP_CAPABILITIES, AMBIENT, AMBIENT_RAISE, READ_ANYTHING = 8, 47, 2, 2
libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    asked = json.loads(sys.argv[1])
    limits = asked["limits"]
    os.set_inheritable(asked["status"], False)
    isolated: list[str] = []
    if asked["namespaces"] and unshared():
        isolated = ["network"]
        if read_only(limits["file_bytes"]):
            isolated.append("files")
        keeper = os.fork()  # the first process of the new namespace
        if keeper:
            os.waitpid(keeper, 0)
            return
        libc.prctl(PARENT_DEATH, signal.SIGKILL)
        if "files" in isolated and own_processes():
            isolated.append("processes")
    else:
        libc.prctl(SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    program = os.fork()
    if not program:
        os.close(asked["status"])
        start(asked["command"], limits)
    report = watch(program, limits["seconds"]) | {"isolated": isolated}
    os.write(asked["status"], json.dumps(report).encode())
    os._exit(0)  # the end of a namespace's first process ends all others


def unshared() -> bool:
    """Whether this process and its children now have no network, and its children only each other."""
    user, group = os.geteuid(), os.getegid()
    spaces = NEW_PIDS | NEW_NETWORK | NEW_IPC | NEW_MOUNTS
    if not user:
        return not libc.unshare(spaces)
    if libc.unshare(spaces | NEW_USER):
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{NOBODY} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{NOBODY} {group} 1")
    return True


def read_only(file_bytes: int) -> bool:
    """Whether files can no longer be written but in the working directory, which is now one in memory."""
    here = str(Path.cwd()).encode()
    change = (ctypes.c_uint64 * 4)(READ_ONLY, 0, PRIVATE, 0)  # attributes set, cleared, propagation, user namespace
    if libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(change), ctypes.sizeof(change)):
        return False
    if libc.mount(b"tmpfs", here, b"tmpfs", 0, f"size={2 * file_bytes},nr_inodes=4096,mode=1777".encode()):
        return False
    os.chdir(here)  # into the new one
    return True


def own_processes() -> bool:
    """Whether /proc now shows the processes of this namespace alone. Not where parts of it are masked, as they are in
    containers: a new one would bare them, and is refused."""
    flags = READ_ONLY | NO_SETUID | NO_DEVICES | NO_PROGRAMS
    return not libc.mount(b"proc", b"/proc", b"proc", flags, None)


def start(command: list[str], limits: dict[str, Any]) -> None:
    """Become the program; never returns."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    cpu, processes = limits["cpu_seconds"], limits["processes"]
    if not os.geteuid():
        become_stranger(FIRST_STRANGER + int.from_bytes(os.urandom(3)))
    elif os.geteuid() == NOBODY:
        set_capabilities(0)  # none of the namespace's
    else:
        processes += tasks_of(os.getuid())  # which the kernel counts, too
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    bounds = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: (limits["memory_bytes"],) * 2,
        resource.RLIMIT_FSIZE: (limits["file_bytes"],) * 2,
        resource.RLIMIT_NPROC: (processes,) * 2,
        resource.RLIMIT_CORE: (0, 0),
    }
    for which, (soft, hard) in bounds.items():
        most = resource.getrlimit(which)[1]
        hard = hard if most == resource.RLIM_INFINITY else min(hard, most)
        resource.setrlimit(which, (min(soft, hard), hard))
    try:
        os.execvp(command[0], command)  # noqa: S606 - there is no shell, on purpose
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}".encode())
    os._exit(127)


def become_stranger(user: int) -> None:
    """Root becomes ``user``, who may still read what root may: Python itself may lie in root's home."""
    libc.prctl(KEEP_CAPABILITIES, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    if not set_capabilities(1 << READ_ANYTHING):
        libc.prctl(AMBIENT, AMBIENT_RAISE, READ_ANYTHING, 0, 0)


def set_capabilities(mask: int) -> int:
    """Keep those in ``mask`` and no others; 0 if that could be done."""
    return int(libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(mask, mask, mask)))


def tasks_of(user: int) -> int:
    """How many threads run as ``user``."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == user:
                found += sum(1 for _ in (process / "task").iterdir())
        except OSError:  # it has ended
            continue
    return found


def watch(program: int, seconds: float) -> dict[str, Any]:
    """How the program ended: ``status`` (an exit status, or minus a signal), or the ``reason`` why it was ended."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        signal.sigtimedwait({signal.SIGCHLD}, left)
        status = reaped(program)
        if status is not None:
            end_descendants()
            return {"status": os.waitstatus_to_exitcode(status)}
    end_descendants()
    return {"reason": f"ran longer than {seconds:g} s"}


def reaped(program: int) -> int | None:
    """The program's status if it has ended; other children that have are let go of."""
    while True:
        try:
            found, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if found in (0, program):
            return status if found else None


def descendants() -> list[int]:
    """The processes below this one, where there is no namespace."""
    found: list[int] = []
    waiting = ["self"]
    while waiting:
        for task in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            try:
                children = task.read_text().split()
            except OSError:  # it has ended
                continue
            waiting += children
            found += map(int, children)
    return found


def end_descendants() -> None:
    """Kill them all. Nothing to do in a namespace, where they end with its first process, which this one then is."""
    if os.getpid() == 1:
        return
    until = time.monotonic() + 2
    while (left := descendants()) and time.monotonic() < until:
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    main()
