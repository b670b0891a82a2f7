"""The child's side of ``program.UnitTests``: runs a source, then tests one by one, and reports how many passed.

A script for ``python -I``. It reads JSON from its input: ``source``, ``tests`` and ``mark``. The report begins with the
mark, which is in no file, argument or global name: a source that prints, exits or kills this process has not passed.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from typing import Any


def main() -> None:
    asked = json.load(sys.stdin)
    report, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in range(3):  # what is printed is nobody's business
        os.dup2(nothing, standard)
    result = tried(asked["source"], asked["tests"])
    os.write(report, f"{asked['mark']}{json.dumps(result)}".encode())
    os._exit(0)  # threads that are left are not waited for


def tried(source: str, tests: str) -> dict[str, Any]:
    """How many tests ``passed``, and the first ``problem``."""
    names: dict[str, Any] = {"__name__": "path"}
    problem = error_of(compiled(source), names) if source.strip() else None
    if problem:
        return {"passed": 0, "problem": problem}
    passed = 0
    for statement in ast.parse(tests).body:
        found = error_of(lambda: compile(ast.Module([statement], []), "<test>", "exec"), names)  # noqa: B023 - called at once
        if found is None and is_test_function(statement):
            found = error_of(lambda: compile(f"{statement.name}()", "<test>", "exec"), names)  # type: ignore[attr-defined]  # noqa: B023
        passed += found is None and is_test(statement)
        problem = problem or (found and f"{ast.unparse(statement).splitlines()[0]}: {found}")
    return {"passed": passed, "problem": problem or ""}


def compiled(source: str) -> Any:
    return lambda: compile(source, "<path>", "exec")


def error_of(code: Any, names: dict[str, Any]) -> str | None:
    """What ``code()`` raises when it is run, in a line; SystemExit and KeyboardInterrupt are as wrong as the rest."""
    try:
        exec(code(), names)  # noqa: S102 - what this process is for
    except BaseException as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def is_test(statement: ast.stmt) -> bool:
    """Asserts are tests, and functions called test_...; what else stands between them prepares."""
    return isinstance(statement, ast.Assert) or is_test_function(statement)


def is_test_function(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.FunctionDef) and statement.name.startswith("test_")


if __name__ == "__main__":
    main()
