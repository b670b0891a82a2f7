"""A plugin for pytest that writes down what becomes of each test as it happens: one JSON object a line.

``workflow.suite`` reads the lines while pytest runs. pytest's own reports are written when it ends, so that a run that
has to be killed leaves none; these lines have told everything that came before, and what was still to come.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

OPTION = "--suite-events"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, default=None, metavar="FILE", help="append what becomes of each test to FILE, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption(OPTION)
    if path is not None and not hasattr(config, "workerinput"):  # of several processes, the one that hears of all
        config.pluginmanager.register(Events(Path(path), config.rootpath))


class Events:
    """Hooks that append to ``path``. Names of tests begin with a file below ``root``."""

    def __init__(self, path: Path, root: Path) -> None:
        # Line by line: what was told must be in the file when this process is killed, and not twice when it forks.
        self._stream = path.open("a", encoding="ascii", buffering=1)
        self._write(kind="begin", root=str(root))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Files and classes that were looked through: those that hold tests say no more of themselves."""
        if report.outcome != "passed":
            self._write(kind="collection", test=report.nodeid, outcome=report.outcome, message=_message(report))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write(kind="collected", tests=[item.nodeid for item in session.items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(kind="start", test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Once for the set-up of a test, its body and what is done behind it."""
        self._write(
            kind="phase",
            test=report.nodeid,
            when=report.when,
            outcome=report.outcome,
            seconds=report.duration,
            message=_message(report),
            properties={str(name): _as_json(value) for name, value in report.user_properties},
        )

    def pytest_unconfigure(self) -> None:
        self._stream.close()

    def _write(self, **event: Any) -> None:
        self._stream.write(json.dumps(event) + "\n")


def _message(report: pytest.CollectReport | pytest.TestReport) -> str:
    """The error's own words without the code around it, or why a test was skipped."""
    expected = getattr(report, "wasxfail", None)
    if expected is not None and report.outcome == "skipped":
        return f"expected to fail: {str(expected).removeprefix('reason: ')}"
    found = report.longrepr
    if found is None or report.outcome == "passed":
        return ""
    if isinstance(found, tuple):
        return str(found[2]).removeprefix("Skipped: ")
    crash = getattr(found, "reprcrash", None)
    if crash is not None:
        return str(crash.message)
    lines = report.longreprtext.splitlines()
    marked = [line.removeprefix("E ").strip() for line in lines if line.startswith("E ")]
    return "\n".join(marked or lines)


def _as_json(value: object) -> Any:
    """``value`` as JSON has it: numbers of NumPy and torch stay numbers, what JSON has no word for becomes text."""
    try:
        return json.loads(json.dumps(value, default=_number_or_text))
    except (TypeError, ValueError, RecursionError):
        return str(value)


def _number_or_text(value: Any) -> Any:
    try:
        return value.item()
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return str(value)
