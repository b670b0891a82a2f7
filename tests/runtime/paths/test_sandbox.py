"""Programs that hang, crash, eat memory, fork, print or write without end: ended, named, and nothing of them left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ryzen_compile.errors import UsageError
from ryzen_compile.runtime.paths.sandbox import Limits, Outcome, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is watched and isolated here is Linux's")
# Where the clock is not what ends a program, a busy machine must not make it so.
LIMITS = Limits(seconds=30, cpu_seconds=1, memory_bytes=256 << 20, file_bytes=1 << 20, processes=8)
SHORT = replace(LIMITS, seconds=1.5)
SLACK = 10.0  # seconds that starting and ending may take on a busy machine


@pytest.fixture(params=[True, False], ids=["namespaces", "limits alone"])
def namespaces(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every program below has MARK in its command line; none is running afterwards."""
    yield
    for _ in range(20):
        if not (left := running()):
            return
        time.sleep(0.05)
    assert not left


MARK = "# of-a-sandbox-test"


def running() -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
        if MARK in line and file.parent.name != str(os.getpid()):
            found.append(line)
    return found


def python(source: str, namespaces: bool = True, limits: Limits = LIMITS, stdin: bytes = b"") -> Outcome:
    command = [sys.executable, "-I", "-S", "-c", f"{source}\n{MARK}"]
    return run(command, stdin=stdin, limits=limits, namespaces=namespaces)


def test_a_good_program(namespaces: bool) -> None:
    outcome = python("import sys; print(sys.stdin.read() + '!'); print('oh', file=sys.stderr)", namespaces, stdin=b"hi")
    assert (outcome.status, outcome.reason) == (0, "")
    assert (outcome.output, outcome.errors) == (b"hi!\n", b"oh\n")


@pytest.mark.parametrize(
    ("source", "reason", "errors"),
    [
        ("import time; time.sleep(60)", "ran longer than 1.5 s", ""),
        ("import signal; signal.signal(15, 1); signal.signal(2, 1)\nsignal.pause()", "ran longer than 1.5 s", ""),
        ("while True: pass", "SIGXCPU: used more than 1 s of a processor", ""),
        ("import ctypes; ctypes.string_at(0)", "died of SIGSEGV", ""),
        ("import os; os.abort()", "died of SIGABRT", ""),
        ("raise SystemExit(3)", "ended with status 3", ""),
        ("held = []\nwhile True: held.append(bytearray(1 << 20))", "ended with status 1", "MemoryError"),
        ("while True: print('x' * 1000)", "printed more than 1048576 bytes", "File too large"),
        ("file = open('big', 'wb')\nwhile True: file.write(bytes(1 << 16))", "ended with status 1", "File too large"),
        ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", "", ""),
        ("import threading\nwhile True: threading.Thread(target=threading.Event().wait).start()", "", ""),
    ],
    ids=[
        "hangs",
        "ignores signals",
        "spins",
        "segfaults",
        "aborts",
        "exits",
        "eats memory",
        "prints",
        "writes",
        "forks",
        "threads",
    ],
)
def test_a_bad_program(source: str, reason: str, errors: str, namespaces: bool) -> None:
    limits = LIMITS if reason and "longer" not in reason else SHORT
    began = time.perf_counter()
    outcome = python(source, namespaces, limits)
    assert time.perf_counter() - began < limits.seconds + SLACK
    assert outcome.status != 0 and outcome.reason and outcome.reason.startswith(reason)
    assert errors in outcome.errors.decode()
    assert len(outcome.output) <= LIMITS.file_bytes


def test_no_more_processes_than_allowed(namespaces: bool) -> None:
    # 40 at most even where the limit fails: a bomb must not be what finds that out.
    source = """
import os, time
started = 0
for _ in range(40):
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        started += 1
    except OSError:
        pass
print(started)
"""
    assert 0 < int(python(source, namespaces).output) <= LIMITS.processes


def test_what_leaves_its_group_is_ended_too(namespaces: bool) -> None:
    source = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
time.sleep(0.2)
"""
    assert python(source, namespaces).status == 0
    # nothing_left looks for them


def test_environment_and_directory_are_clean(namespaces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    outcome = python(
        "import os; print(os.listdir('.'), 'SECRET' in os.environ); print(os.getcwd()); open('new', 'w').close()",
        namespaces,
    )
    seen, directory = outcome.output.decode().splitlines()
    assert seen == "[] False" and not Path(directory).exists()
    assert outcome.status == 0, "it may write there"


def test_descriptors_are_not_inherited(namespaces: bool, tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        outcome = python("import os; print(sorted(map(int, os.listdir('/proc/self/fd')))[:4])", namespaces)
    assert outcome.output == b"[0, 1, 2, 3]\n", "3 reads the directory"


def test_what_namespaces_keep_away(tmp_path: Path) -> None:
    outcome = python("print('')")
    if "network" not in outcome.isolated:
        pytest.skip("this system lets nobody make namespaces")
    tmp_path.chmod(0o777)
    source = f"""
import os, socket
for attempt in (lambda: socket.create_connection(("127.0.0.1", 9), 1), lambda: open({str(tmp_path / "new")!r}, "w"),
                lambda: os.kill({os.getpid()}, 0)):
    try:
        attempt()
        print("done")
    except OSError as error:
        print(error.errno)
"""
    expected = [b"101", b"30" if "files" in outcome.isolated else b"done", b"3"]  # unreachable, read-only, no process
    assert python(source).output.split() == expected


def test_other_processes_are_out_of_sight() -> None:
    outcome = python("import os; print(*filter(str.isdigit, os.listdir('/proc')), os.getpid())")
    if "processes" not in outcome.isolated:
        pytest.skip("this system lets nobody mount a /proc of their own")
    *seen, own = map(int, outcome.output.split())
    assert sorted(seen) == [1, own], "the keeper and the program"
    assert {"network", "files"} <= set(outcome.isolated)
    for file in ("/proc/sys/kernel/hostname", "/proc/self/oom_score_adj"):
        assert b"Read-only file system" in python(f"open({file!r}, 'w')").errors


def test_a_program_that_is_not_there() -> None:
    outcome = run(["no-such-program"], limits=LIMITS)
    assert outcome.status == 127 and b"no-such-program: No such file" in outcome.errors


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"processes": -1}, {"memory_bytes": 1.5}, {"cpu_seconds": True}])
def test_limits_are_above_nothing(limits: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(limits))):
        Limits(**limits)  # type: ignore[arg-type]
