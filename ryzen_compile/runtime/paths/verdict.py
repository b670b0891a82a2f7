"""What is said of a text: how good it is, whether it passes, and why. Verifiers that need no process of their own.

A verifier is anything with ``verify(text) -> Verdict``, or a callable that returns a ``Verdict``, a bool, or a score
from 0 to 1. The text is what a path made, without its prompt.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ryzen_compile.errors import RyzenCompileError, UsageError


@dataclass(frozen=True)
class Verdict:
    """``score`` from 0 to 1, whether the text ``passed``, and in ``detail`` why it did not."""

    score: float
    passed: bool
    detail: str = ""

    def __post_init__(self) -> None:
        if not (isinstance(self.score, int | float) and math.isfinite(self.score) and 0 <= self.score <= 1):
            raise UsageError(f"a verdict's score must be a number from 0 to 1, got {self.score!r}")
        if not isinstance(self.passed, bool):
            raise UsageError(f"a verdict's passed must be True or False, got {self.passed!r}")


@runtime_checkable
class Verifier(Protocol):
    """Judges texts. One whose attribute ``waits`` is true only waits meanwhile, for a process, so that it is given a
    thread and decoding goes on; any other is called from the loop itself, as a callback. Neither may call the model
    whose texts it judges, which is busy until the verdicts are there: that raises ``UsageError``."""

    def verify(self, text: str) -> Verdict:
        """The verdict on ``text``. An exception is a failed verdict."""
        ...


class Call:
    """A callable as a verifier: a score of 1 passes."""

    def __init__(self, judge: Callable[[str], Any]) -> None:
        self._judge = judge

    def verify(self, text: str) -> Verdict:
        found = self._judge(text)
        if isinstance(found, Verdict):
            return found
        # numpy's bool and floats come along, too
        return Verdict(float(found), bool(float(found) == 1))


class Regex:
    """Passes where ``pattern`` is found: anywhere, or with ``whole`` from the first character to the last."""

    def __init__(self, pattern: str, *, whole: bool = False) -> None:
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise UsageError(f"{pattern!r} is not a regular expression: {error}") from error
        self._whole = whole

    def verify(self, text: str) -> Verdict:
        found = self._pattern.fullmatch(text) if self._whole else self._pattern.search(text)
        return Verdict(1, True) if found else Verdict(0, False, f"no match of {self._pattern.pattern!r}")


class JsonSchema:
    """Passes where the text is one JSON document that ``schema`` allows; half of the score is for being JSON.

    Raises ``UsageError`` where ``schema`` is none, or jsonschema is not installed.
    """

    def __init__(self, schema: Mapping[str, Any] | bool) -> None:
        try:
            import jsonschema
        except ImportError as error:
            raise UsageError(
                "checking against a JSON Schema needs the package jsonschema",
                hint="pip install 'ryzen-compile[verify]'",
            ) from error
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise UsageError(f"this is no JSON Schema: {error.message} at {error.json_path}") from error
        self._validator = kind(schema)

    def verify(self, text: str) -> Verdict:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return Verdict(0, False, f"not JSON: {error}")
        errors = sorted(self._validator.iter_errors(value), key=lambda error: error.json_path)
        if not errors:
            return Verdict(1, True)
        return Verdict(0.5, False, "; ".join(f"{error.json_path}: {error.message}" for error in errors[:3]))


def as_verifier(given: Verifier | Callable[[str], Any]) -> Verifier:
    """``given`` itself, or a ``Call`` of it; raises ``UsageError`` for what is neither."""
    if isinstance(given, Verifier):
        return given
    if not callable(given):
        raise UsageError(f"a verifier has a method verify(text), or is callable, got {given!r}")
    return Call(given)


def judged(verifier: Verifier, text: str) -> Verdict:
    """What ``verifier`` says of ``text``; where it raises, a failed verdict that says what. The package's own errors
    pass: they are about the call, not about the text."""
    try:
        verdict = verifier.verify(text)
    except RyzenCompileError:
        raise
    except Exception as error:  # noqa: BLE001 - anybody's verifier, on a text that nobody has seen
        return Verdict(0, False, f"the verifier raised {type(error).__name__}: {error}")
    if not isinstance(verdict, Verdict):
        raise UsageError(f"{type(verifier).__name__}.verify must return a Verdict, got {verdict!r}")
    return verdict
