"""Runs a suite of tests in a process of its own, and reports what became of each of them.

A test may hang, crash its process or never be reached: the report names every test that was found, and one that did not
come to its end is an error in it, not a gap.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import psutil

from ryzen_compile.errors import UsageError
from ryzen_compile.workflow.report_schema import TestCase, TestReport
from ryzen_compile.workflow.suite_events import OPTION

Status = Literal["passed", "failed", "error", "skipped"]
Progress = Callable[[str, str], None]

STATUSES: tuple[Status, ...] = ("passed", "failed", "error", "skipped")
_WEIGHT: dict[Status, int] = {"passed": 0, "skipped": 1, "error": 2, "failed": 3}  # the heaviest of a test's phases
_EVERY = 0.1  # seconds between two looks at what was told
_GRACE = 10.0  # seconds that pytest has to end its fixtures when it is stopped
_MESSAGE = 2000  # characters of a test's message
_PLUGIN = "ryzen_compile.workflow.suite_events"
_NO_TESTS, _NO_TESTS_STATUS = "no test was collected", 5


def run_suite(
    paths: Sequence[Path], *, arguments: Sequence[str] = (), timeout: float = 1200, progress: Progress | None = None
) -> TestReport:
    """Runs pytest over ``paths``, files or directories, in a child process, and reports every test.

    ``arguments`` are more of pytest's own. ``progress`` hears a test's name and status as it ends. After ``timeout``
    seconds, or when this process is interrupted, pytest is stopped with all that it started; tests that did not end are
    errors in the report. So is a file that cannot be imported; the tests of the others still run. Without pytest, where
    a path is not there, or where no test ran, ``pass_rate`` is none and ``reason`` says why. Files are named as seen
    from the directory around the path that they were found below; messages name no places of this machine.

    Raises ``UsageError`` for no paths and for a ``timeout`` that is not positive.
    """
    if not paths or not timeout > 0:
        raise UsageError(f"a suite needs a path and a timeout above 0 s, got {len(paths)} path(s) and {timeout} s")
    command = shlex.join(["python", "-m", "pytest", *(_shown_path(path) for path in paths), *arguments])
    began = time.monotonic()
    absent = [path.name for path in paths if not path.exists()]
    if absent or find_spec("pytest") is None:
        missing = (
            f"there is no {absent[0]!r} to run" if absent else "pytest is not installed: ryzen-compile[test] has it"
        )
        return _report(command, began, [], missing)
    with tempfile.TemporaryDirectory() as directory:
        places = _Places([path.resolve() for path in paths])
        log = _Log(Path(directory, "events.jsonl"), places, progress)
        output = Path(directory, "output.txt")
        end = _run([*(str(path.resolve()) for path in paths), *arguments], log, output, timeout)
        cases, said = log.cases(end), _last_lines(output)
    if cases:
        return _report(command, began, cases, "")
    return _report(command, began, [], _NO_TESTS if end in ("", _NO_TESTS) else places.cleared(f"{end}: {said}"))


def _report(command: str, began: float, cases: Sequence[TestCase], reason: str) -> TestReport:
    counts: dict[str, int] = {status: sum(case.status == status for case in cases) for status in STATUSES}
    ran = len(cases) - counts["skipped"]
    return TestReport(
        command=command,
        written=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.monotonic() - began,
        counts=counts,
        pass_rate=counts["passed"] / ran if ran else None,
        reason=reason if ran or reason else f"all {len(cases)} tests were skipped",
        tests=tuple(cases),
    )


# --- the child process ------------------------------------------------------------------------------------------------
def _run(given: Sequence[str], log: _Log, output: Path, timeout: float) -> str:
    """Runs pytest until it ends or has to be stopped; how that was, in words, empty where nothing is wrong with it."""
    own = ["-p", _PLUGIN, f"{OPTION}={log.path}", "-p", "no:cacheprovider", "--color=no"]
    command = [sys.executable, "-m", "pytest", *own, "--continue-on-collection-errors", *given]
    deadline = time.monotonic() + timeout
    with _started(command, output) as child:
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(_EVERY)
            log.read()
        stopped = child.returncode is None
    log.read()  # what was told in the last moments, and while it was stopped
    if stopped:
        return f"stopped after {timeout:g} s"
    status = child.returncode
    if status < 0:
        return f"pytest was ended by {signal.Signals(-status).name}"
    if status == _NO_TESTS_STATUS:
        return _NO_TESTS
    return f"pytest ended with exit status {status}" if status else ""


@contextmanager
def _started(command: Sequence[str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a group of its own; on leaving, whichever way, nothing of the group is left running."""
    with output.open("wb") as stream:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield child
    finally:
        _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Asks pytest to end, which cleans up behind its tests, then kills what is left: its group, and what left that."""
    below: list[psutil.Process] = []
    try:
        with suppress(psutil.Error):
            below = psutil.Process(child.pid).children(recursive=True)
        if child.poll() is None:
            child.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE)
    finally:  # a second interruption does not wait
        if sys.platform != "win32":
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
        for process in below:
            with suppress(psutil.Error):
                process.kill()
        child.kill()
        child.wait()


def _last_lines(output: Path) -> str:
    """The end of what pytest printed, for a run that it could not begin."""
    lines = [line for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-5:])


# --- what it tells ----------------------------------------------------------------------------------------------------
@dataclass
class _Test:
    """What was told of one test so far; no ``status`` before anything was."""

    status: Status | None = None
    seconds: float = 0.0
    message: str = ""
    properties: dict[str, Any] = field(default_factory=dict)
    has_started: bool = False
    has_ended: bool = False

    def add(self, status: Status, message: str) -> None:
        """Counts the outcome of a phase; of several that went wrong the first says why."""
        self.message = self.message or message
        if self.status is None or _WEIGHT[status] > _WEIGHT[self.status]:
            self.status = status


class _Log:
    """The lines that pytest writes at ``path`` while it runs, by test in the order in which they were found."""

    def __init__(self, path: Path, places: _Places, progress: Progress | None) -> None:
        self.path = path
        self._places = places
        self._progress = progress
        self._root = Path()
        self._tests: dict[str, _Test] = {}
        self._taken = 0  # bytes

    def read(self) -> None:
        """Takes the whole lines that are new."""
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            stream.seek(self._taken)
            new = stream.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._taken += len(whole)
        for line in whole.splitlines():
            self._take(json.loads(line, parse_constant=str))  # NaN and infinities become words, as in every report

    def _take(self, event: dict[str, Any]) -> None:
        kind, name = event["kind"], event.get("test", "")
        if kind == "begin":
            self._root = Path(event["root"])
        elif kind == "collected":
            self._tests |= {test: _Test() for test in event["tests"]}
        elif kind == "start":
            self._tests.setdefault(name, _Test()).has_started = True
        elif event["outcome"] in ("passed", "failed", "skipped"):  # plugins know others, of a test that is run again
            test = self._tests.setdefault(name, _Test())
            is_failed, is_body = event["outcome"] == "failed", event.get("when") == "call"
            test.add("error" if is_failed and not is_body else event["outcome"], event["message"])
            if kind == "collection":
                test.has_ended = True
                return
            test.seconds += event["seconds"]
            test.properties |= event["properties"]
            if event["when"] == "teardown":
                test.has_ended = True
                if self._progress is not None and test.status is not None:
                    self._progress(_printable(name.partition("::")[2] or name), test.status)

    def cases(self, end: str) -> list[TestCase]:
        """Every test; one that did not come to its end is an error.

        ``end`` is how pytest ended, where that is not as it should: an error of its own if no test's shows it.
        """
        found = [self._case(name, test, end) for name, test in self._tests.items()]
        is_shown = end in ("", _NO_TESTS) or any(case.status in ("failed", "error") for case in found)
        if found and not is_shown:
            found.append(TestCase(name="pytest", file="", status="error", seconds=0, message=end))
        return found

    def _case(self, name: str, test: _Test, end: str) -> TestCase:
        file, _, own = name.partition("::")
        status, message = test.status or "error", test.message
        if not test.has_ended:
            status = "failed" if test.status == "failed" else "error"
            note = f"not {'finished' if test.has_started else 'started'} when stopped"
            message = ": ".join(part for part in (note, end, message) if part)
        return TestCase(
            name=_printable(own or "collection"),
            file=_printable(self._places.file(self._root / file)),
            status=status,
            seconds=test.seconds,
            message=self._places.cleared(message),
            properties=test.properties,
        )


# --- names that say nothing of this machine ---------------------------------------------------------------------------
class _Places:
    """Directories of this machine that a report is not to name; ``paths`` are those of the tests."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        words = {str(Path(prefix)): "<python>" for prefix in (sys.prefix, sys.base_prefix)}
        with suppress(RuntimeError):  # whoever runs this has no home
            words[str(Path.home())] = "~"
        words[tempfile.gettempdir()] = "<temporary>"
        words |= {str(place): "" for place in (*(path.parent for path in paths), Path.cwd())}
        # The longest first, or what lies inside another would be found as that.
        places = sorted((place for place in words if len(place) > 1), key=len, reverse=True)
        self._words = words
        self._pattern = re.compile(rf"(?<![\w.-])({'|'.join(map(re.escape, places))})([/\\]|(?![\w.-]))")

    def file(self, path: Path) -> str:
        """As seen from the directory around the path that it was found below."""
        whole = path.resolve()
        below = [given for given in self._paths if whole.is_relative_to(given)]
        return whole.relative_to(below[0].parent).as_posix() if below else path.name

    def cleared(self, message: str) -> str:
        """``message`` without these directories, printable, and of a length to be read."""
        cleared = self._pattern.sub(self._word, message)
        text = "\n".join(map(_printable, cleared.splitlines()))
        return text if len(text) <= _MESSAGE else text[: _MESSAGE - 4] + " ..."

    def _word(self, found: re.Match[str]) -> str:
        word, separator = self._words[found[1]], found[2]
        return word + separator if word else "" if separator else "."


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _shown_path(path: Path) -> str:
    """As it would be typed here, or its name alone where it lies elsewhere."""
    whole, here = path.resolve(), Path.cwd()
    return whole.relative_to(here).as_posix() if whole.is_relative_to(here) else whole.name
