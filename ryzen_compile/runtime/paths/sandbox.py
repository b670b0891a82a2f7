"""Programs that nobody has read, run apart: in processes of their own, within limits, and ended with all they started.

What every POSIX system gives: a clean environment, an empty temporary working directory, no core files, and limits on
seconds, processor seconds, address space and the size of files. What Linux adds where the system lets users make
namespaces (``Outcome.isolated`` says what it was): no network, no signals to other processes and mostly no sight of
them, and no file written but in the working directory, which lies in memory and is bounded. What is never kept away:
files that the user may read can be read, and time and processors are shared. It holds off the mistakes of generated
code, not an attacker.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ryzen_compile.errors import UnsupportedError, UsageError

CONFINE = Path(__file__).with_name("confine.py")
GRACE = 5.0  # seconds that the keeper may take beyond the program's own
# One thread a program: a pool of them in each of several would only wait for each other.
ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Limits:
    """What one program may take: ``seconds`` on the clock and ``cpu_seconds`` on a processor, ``memory_bytes`` of
    address space in each process, ``file_bytes`` in each file and in its output, ``processes`` at a time."""

    seconds: float = 5.0
    cpu_seconds: int = 5
    memory_bytes: int = 512 << 20
    file_bytes: int = 4 << 20
    processes: int = 16

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int | (float if name == "seconds" else int)):
                raise UsageError(f"{name} must be a number, got {value!r}")
            if not 0 < value < 1 << 62:
                raise UsageError(f"{name} must be above 0, got {value}")


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Outcome:
    """How a program ended: ``status`` 0 where it ended well, else why not in ``reason``, which is empty otherwise.

    ``output`` and ``errors`` are what it wrote, at most ``Limits.file_bytes`` each. ``isolated`` names what it was kept
    away from beyond its limits: of "network", "processes", "files" those that the system could do. Without "network"
    there are no namespaces; with them other processes cannot be signalled, also where "processes" is missing because
    they can still be listed.
    """

    status: int | None
    reason: str
    output: bytes
    errors: bytes
    seconds: float
    isolated: tuple[str, ...]


def run(
    command: Sequence[str], *, stdin: bytes = b"", limits: Limits = DEFAULT_LIMITS, namespaces: bool = True
) -> Outcome:
    """Run ``command`` until it ends or is ended, with ``stdin`` to read.

    ``namespaces`` False does without them even where there are some. Raises ``UnsupportedError`` on Windows.
    """
    if os.name != "posix":
        raise UnsupportedError("programs are confined by the limits of POSIX systems, which this one does not have")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ryzen-path-", ignore_cleanup_errors=True) as directory:
        place = Path(directory)
        (place / "work").mkdir()
        if os.geteuid() == 0:  # whose programs run as somebody else
            place.chmod(0o711)
            (place / "work").chmod(0o777)
        (place / "stdin").write_bytes(stdin)
        report = _run(list(command), place, limits, namespaces)
        output, errors = ((place / name).read_bytes() for name in ("output", "errors"))
    status = report.get("status")
    reason = str(report.get("reason", "")) or _reason(status, limits)
    if status and len(output) >= limits.file_bytes:
        reason = f"printed more than {limits.file_bytes} bytes"
    isolated = tuple(report.get("isolated", ()))
    return Outcome(status, reason, output, errors, time.perf_counter() - began, isolated)


def _run(command: list[str], place: Path, limits: Limits, namespaces: bool) -> dict[str, Any]:
    """What ``confine`` reported; empty if it could not."""
    read_end, write_end = os.pipe()
    asked = {"command": command, "limits": asdict(limits), "status": write_end, "namespaces": namespaces}
    try:
        with (
            (place / "stdin").open("rb") as stdin,
            (place / "output").open("wb") as output,
            (place / "errors").open("wb") as errors,
        ):
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", str(CONFINE), json.dumps(asked)],
                stdin=stdin,
                stdout=output,
                stderr=errors,
                cwd=place / "work",
                env=ENVIRONMENT,
                pass_fds=(write_end,),
                start_new_session=True,
            )
        os.close(write_end)
        write_end = -1
        try:
            child.wait(limits.seconds + GRACE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        os.set_blocking(read_end, False)
        try:
            written = os.read(read_end, 1 << 16)
        except BlockingIOError:
            written = b""
        found: dict[str, Any] = json.loads(written) if written else {"reason": "ended its keeper"}
        return found
    finally:
        os.close(read_end)
        if write_end >= 0:
            os.close(write_end)


def _reason(status: object, limits: Limits) -> str:
    if status == 0:
        return ""
    if not isinstance(status, int) or status > 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    if name in ("SIGXCPU", "SIGKILL"):
        return f"{name}: used more than {limits.cpu_seconds} s of a processor, or was killed for memory"
    return f"{name}: wrote more than {limits.file_bytes} bytes to a file" if name == "SIGXFSZ" else f"died of {name}"
