"""``generate --paths``: what its options ask for, and how the paths are shown."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ryzen_compile.cli import output
from ryzen_compile.cli.failure import printable

if TYPE_CHECKING:
    from ryzen_compile.runtime.compiled import CompiledModel
    from ryzen_compile.runtime.paths.result import PathsResult

OPTIONS = {"stop": "until", "step_tokens": "step-tokens"}  # called otherwise than ``generate_paths``'s arguments
KINDS = "regex:PATTERN, json:SCHEMA.json, tests:FILE.py or program:COMMAND"


@dataclass(frozen=True)
class PathSearch:
    """``n`` paths with ``generate_paths``'s ``arguments``, judged by what ``verify`` says (None: by nobody)."""

    n: int
    arguments: dict[str, Any]
    verify: tuple[str, str] | None

    def verifier(self, prompt: str) -> Any:
        """Of what follows ``prompt``; None for nobody. Raises ``UsageError`` for a file that is none of its kind."""
        return None if self.verify is None else _verifier(*self.verify, prompt)

    def run(self, model: CompiledModel, prompt: str, verifier: Any, **given: Any) -> PathsResult:
        """The paths that follow ``prompt``."""
        result: PathsResult = model.generate_paths(prompt, self.n, verifier=verifier, **self.arguments, **given)
        return result


def path_options(
    n: int | None, arguments: Mapping[str, Any], verify: str | None, *, apart: Mapping[str, object]
) -> PathSearch | None:
    """What ``--paths`` and its companions ask for; None without them.

    Raises ``UsageError`` for companions alone, for one of the options ``apart`` beside it, for a verifier of no known
    kind.
    """
    from ryzen_compile.errors import UsageError

    given = {name: value for name, value in arguments.items() if value is not None}
    if n is None:
        alone = ["verify"] * (verify is not None) + [OPTIONS.get(name, name) for name in given]
        if alone:
            raise UsageError(f"--{alone[0]} belongs to several paths", hint="give --paths N as well")
        return None
    for option, value in apart.items():
        if value is not None:
            raise UsageError(f"{option} does not go with --paths", hint="give one of the two")
    if verify is None:
        return PathSearch(n, given, None)
    kind, _, what = verify.partition(":")
    if kind not in ("regex", "json", "tests", "program") or not what:
        raise UsageError(f"--verify {verify!r} is no verifier", hint=f"give {KINDS}")
    return PathSearch(n, given, (kind, what))


def _verifier(kind: str, what: str, prompt: str) -> Any:
    from ryzen_compile.errors import UsageError
    from ryzen_compile.runtime.paths.program import Program, UnitTests
    from ryzen_compile.runtime.paths.verdict import JsonSchema, Regex

    if kind == "regex":
        return Regex(what)
    if kind == "program":
        return Program(shlex.split(what))
    try:
        text = Path(what).read_text(encoding="utf-8")
        return UnitTests(text, before=prompt) if kind == "tests" else JsonSchema(json.loads(text))
    except OSError as error:
        raise UsageError(f"--verify: {what!r} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"--verify: {what!r} is not JSON: {error}") from error


def say_paths(result: PathsResult, *, as_json: bool) -> None:
    """The winner's text on stdout and a line for each path on stderr, or all of it as JSON."""
    if as_json:
        output.print_json(result.to_json())
        return
    typer.echo(result.text)
    for line in result.to_text().splitlines():
        typer.echo(printable(line), err=True)
