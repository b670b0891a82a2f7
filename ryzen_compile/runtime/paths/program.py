"""Verifiers that run something: the text as Python code under tests, or any program that reads it.

Both run in a ``sandbox``: they are ended with all they started when they take too long or too much, and that is a
failed verdict which says so. They need a POSIX system; what is isolated beyond limits depends on it.
"""

from __future__ import annotations

import ast
import json
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from ryzen_compile.errors import UsageError
from ryzen_compile.runtime.paths.sandbox import DEFAULT_LIMITS, Limits, run
from ryzen_compile.runtime.paths.unit_tests import is_test
from ryzen_compile.runtime.paths.verdict import Verdict

HARNESS = Path(__file__).with_name("unit_tests.py")


class Program:
    """Passes where ``command``, which gets the text as its input, ends with status 0."""

    waits = True

    def __init__(self, command: Sequence[str], *, limits: Limits = DEFAULT_LIMITS) -> None:
        if isinstance(command, str) or not command or not all(isinstance(part, str) for part in command):
            raise UsageError(f"a command is a list of strings, the program first, got {command!r}")
        self._command = list(command)
        self._limits = limits

    def verify(self, text: str) -> Verdict:
        outcome = run(self._command, stdin=text.encode("utf-8", "replace"), limits=self._limits)
        if not outcome.reason:
            return Verdict(1, True)
        said = (outcome.errors or outcome.output).decode("utf-8", "replace").strip().splitlines()
        return Verdict(0, False, ": ".join((outcome.reason, *said[-1:]))[:400])


class UnitTests:
    """Runs the text, behind the code ``before`` it (a prompt that it continues), and then ``tests``, Python as well.

    Every ``assert`` at the top of ``tests`` is a test, and every function ``test_...``, which is called; other
    statements prepare. The score is the share of tests that pass, and the text passes with all of them. A text that
    exits, with whatever status, has not passed. One that sets out to forge the report could: code under test and tests
    share a process. Raises ``UsageError`` for ``tests`` that are no Python or hold no test.
    """

    waits = True

    def __init__(self, tests: str, *, before: str = "", limits: Limits = DEFAULT_LIMITS) -> None:
        try:
            self._count = sum(map(is_test, ast.parse(tests).body))
        except (SyntaxError, ValueError) as error:
            raise UsageError(f"the tests are no Python: {error}") from error
        if not self._count:
            raise UsageError("the tests hold neither an assert nor a function test_... at their top level")
        self._tests = tests
        self._before = before
        self._limits = limits

    def verify(self, text: str) -> Verdict:
        mark = secrets.token_hex(16)
        asked = {"mark": mark, "source": self._before + text, "tests": self._tests}
        outcome = run([sys.executable, "-I", str(HARNESS)], stdin=json.dumps(asked).encode(), limits=self._limits)
        output = outcome.output.decode("utf-8", "replace")
        if outcome.reason or not output.startswith(mark):
            return Verdict(0, False, outcome.reason or "exited before its tests had ended")
        report = json.loads(output.removeprefix(mark))
        passed, problem = int(report["passed"]), str(report["problem"])
        return Verdict(passed / self._count, passed == self._count and not problem, problem)
