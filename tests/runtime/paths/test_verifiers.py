"""What each verifier says of good texts and of bad ones; tests that nobody can pass by leaving."""

from __future__ import annotations

import sys

import pytest

from ryzen_compile.errors import UsageError
from ryzen_compile.runtime.paths.program import Program, UnitTests
from ryzen_compile.runtime.paths.sandbox import Limits
from ryzen_compile.runtime.paths.verdict import Call, JsonSchema, Regex, Verdict, as_verifier, judged

posix = pytest.mark.skipif(sys.platform == "win32", reason="programs are confined by POSIX limits")
LIMITS = Limits(seconds=30, cpu_seconds=1)
TESTS = "assert add(1, 2) == 3\nassert add(0, 0) == 0\n\ndef test_negative():\n    assert add(-1, 0) == -1\n"


@pytest.fixture(scope="module")
def unit_tests() -> UnitTests:
    return UnitTests(TESTS, before="def add(a, b):\n    return", limits=LIMITS)


@posix
@pytest.mark.parametrize(
    ("text", "score", "detail"),
    [
        (" a + b\n", 1, ""),
        (" a + b\nprint('x' * 10000)\n", 1, ""),
        (" a + b\nimport threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n", 1, ""),
        (" a - b\n", 2 / 3, "assert add(1, 2) == 3: AssertionError"),
        (" 0\n", 1 / 3, "assert add(1, 2) == 3: AssertionError"),
        (" (", 0, "SyntaxError"),
        ("\x00", 0, "SyntaxError"),
        (" nothing\n", 0, "NameError"),
        (" a + b\nraise SystemExit(0)\n", 0, "SystemExit"),
        (" exit(0)\n", 0, "SystemExit"),
        (" a + b\nimport os; os._exit(0)\n", 0, "exited before its tests had ended"),
        (" __import__('os')._exit(0)\n", 0, "exited before its tests had ended"),
        (' a + b\nprint(\'0\' * 32 + \'{"passed": 3, "problem": ""}\'); import os; os._exit(0)\n', 0, "exited before"),
        (" a + b\nwhile True: pass\n", 0, "SIGXCPU"),
        (" a + b\nimport ctypes; ctypes.string_at(0)\n", 0, "died of SIGSEGV"),
        (" a + b\nheld = []\nwhile True: held.append(bytearray(1 << 20))\n", 0, "MemoryError"),
        (" add(b, a)\n", 0, "RecursionError"),
        (" \ud800\n", 0, "Unicode"),
    ],
    ids=lambda value: repr(value)[:30] if isinstance(value, str) else "",
)
def test_unit_tests(unit_tests: UnitTests, text: str, score: float, detail: str) -> None:
    verdict = judged(unit_tests, text)
    assert verdict.score == pytest.approx(score) and verdict.passed == (score == 1)
    assert detail in verdict.detail and bool(detail) == bool(verdict.detail)


@posix
def test_preparation_that_fails_fails_the_text() -> None:
    verdict = UnitTests("import no_such_module\nassert True", limits=LIMITS).verify("")
    assert verdict.score == 1 and not verdict.passed and "ModuleNotFoundError" in verdict.detail


@pytest.mark.parametrize(
    ("tests", "said"), [("x = (", "are no Python"), ("print(1)", "neither an assert"), ("", "neither an assert")]
)
def test_tests_are_checked_at_once(tests: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        UnitTests(tests)


@posix
def test_programs() -> None:
    grep = Program([sys.executable, "-c", "import sys; sys.exit('none' if 'x' not in sys.stdin.read() else 0)"])
    assert grep.verify("axe") == Verdict(1, True)
    assert grep.verify("saw") == Verdict(0, False, "ended with status 1: none")
    assert "No such file" in Program(["no-such-program"]).verify("").detail
    for command in ([], "ls", [1]):
        with pytest.raises(UsageError, match="a command is a list of strings"):
            Program(command)  # type: ignore[arg-type]


def test_patterns() -> None:
    assert Regex(r"\d+").verify("a 12") == Verdict(1, True)
    assert not Regex(r"\d+", whole=True).verify("a 12").passed and Regex(r"\d+", whole=True).verify("12").passed
    assert Regex(r"\d+").verify("") == Verdict(0, False, "no match of '\\\\d+'")
    with pytest.raises(UsageError, match="is not a regular expression"):
        Regex("(")


def test_schemas() -> None:
    pytest.importorskip("jsonschema")
    schema = JsonSchema({"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}})
    assert schema.verify(' {"a": 1}\n') == Verdict(1, True)
    assert schema.verify('{"a": "1"}') == Verdict(0.5, False, "$.a: '1' is not of type 'integer'")
    assert schema.verify('{"b": 1}').score == 0.5 and not JsonSchema(False).verify("1").passed
    for text in ("", "{", "[" * 100_000, '{"a": 1} more'):
        verdict = judged(schema, text)
        assert (verdict.score, verdict.passed) == (0, False) and "not JSON" in verdict.detail
    with pytest.raises(UsageError, match="this is no JSON Schema"):
        JsonSchema({"type": "thing"})


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(UsageError, match=r"pip install 'ryzen-compile\[verify\]'"):
        JsonSchema({})


@pytest.mark.parametrize(
    ("returned", "expected"),
    [(True, Verdict(1, True)), (False, Verdict(0, False)), (0.5, Verdict(0.5, False)), (1, Verdict(1, True))],
)
def test_callables(returned: object, expected: Verdict) -> None:
    assert as_verifier(lambda text: returned).verify("") == expected
    given = Verdict(0.3, True, "odd")
    assert Call(lambda text: given).verify("") is given


@pytest.mark.parametrize("returned", [None, "yes", [], object()])
def test_a_callable_that_returns_nothing_usable_fails_the_text(returned: object) -> None:
    verdict = judged(as_verifier(lambda text: returned), "")
    assert not verdict.passed and "the verifier raised" in verdict.detail


def test_scores_and_verdicts_are_checked() -> None:
    for score in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="a verdict's score must be"):
            judged(as_verifier(lambda text, score=score: score), "")

    class Odd:
        def verify(self, text: str) -> bool:
            return True

    with pytest.raises(UsageError, match=r"Odd.verify must return a Verdict, got True"):
        judged(Odd(), "")  # type: ignore[arg-type]
