"""Several paths from the command line: who wins on stdout, the table on stderr, all of it as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.model_directory import shared_artifact

SAMPLED = ("-n", 8, "--seed", 3, "--temperature", 1.0, "-t", 1)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_artifact(tmp_path_factory)


@pytest.fixture
def found(run: Any, artifact: Path) -> Any:
    """What ``generate --json`` says with some options."""

    def call(*options: object) -> dict[str, Any]:
        status, out, err = run("generate", artifact, "def add(", *SAMPLED, "--json", *options)
        assert status == 0 and not err, err
        return dict(json.loads(out))

    return call


def test_paths_are_those_of_the_library(run: Any, artifact: Path, found: Any) -> None:
    result = found("--paths", 4, "--vote", "best")
    assert [path["index"] for path in result["paths"]] == [0, 1, 2, 3] and result["seed"] == 3
    assert result["totals"]["paths"] == 4 and all(len(path["tokens"]) == 8 for path in result["paths"])
    likeliest = max(result["paths"], key=lambda path: path["log_probability"])
    assert result["winner"] == likeliest["index"] and result["text"] == likeliest["text"]
    status, out, err = run("generate", artifact, "def add(", *SAMPLED, "--paths", 4, "--vote", "best")
    assert status == 0 and out == likeliest["text"] + "\n"
    lines = err.splitlines()
    assert len(lines) == 5 and lines[likeliest["index"]].startswith(f"* {likeliest['index']}: 8 tokens, length, log p")
    assert lines[4] == f"4 paths, 32 tokens in {result['totals']['steps']} steps"
    # A path alone, by its seed.
    seed, text = likeliest["seed"], likeliest["text"]
    status, out, _ = run("generate", artifact, "def add(", *SAMPLED[:2], "--seed", seed, "--temperature", 1.0, "-t", 1)
    assert status == 0 and out == text + "\n"


def test_temperature_is_one_unless_given(run: Any, artifact: Path, found: Any) -> None:
    def texts(*options: object) -> list[str]:
        status, out, err = run("generate", artifact, "def add(", *SAMPLED[:4], "-t", 1, "--json", *options)
        assert status == 0, err
        return [path["text"] for path in json.loads(out)["paths"]]

    assert texts("--paths", 3) == [path["text"] for path in found("--paths", 3)["paths"]]
    _, out, _ = run("generate", artifact, "def add(", "-n", 8, "-t", 1)
    assert texts("--paths", 1, "--temperature", 0) == [out.removesuffix("\n")] != texts("--paths", 1)


def test_a_verifier_is_read_before_the_model(run: Any, tmp_path: Path) -> None:
    status, out, err = run("generate", tmp_path / "no-artifact", "p", "--paths", 2, "--verify", "tests:no.py")
    assert (status, out) == (2, "") and "--verify: 'no.py' cannot be read" in err


def test_steps_fork(found: Any) -> None:
    result = found("--paths", 4, "--step-tokens", 3)
    assert any(path["parent"] is not None and path["branched_at"] == 3 for path in result["paths"])


def test_verifiers(found: Any, tmp_path: Path) -> None:
    first = found("--paths", 6, "--vote", "best")["paths"][2]["text"]
    pattern = "^" + "".join(f"\\u{ord(character):04x}" for character in first if ord(character) < 1 << 16)
    result = found("--paths", 6, "--vote", "best", "--verify", f"regex:{pattern}", "--until", "first")
    assert result["text"] == first and result["paths"][result["winner"]]["verdict"]["passed"]
    assert result["confidence"] == 1
    (tmp_path / "any.json").write_text("true")
    pytest.importorskip("jsonschema")
    result = found("--paths", 2, "--verify", f"json:{tmp_path / 'any.json'}")
    assert all("not JSON" in path["verdict"]["detail"] for path in result["paths"])


@pytest.mark.skipif(sys.platform == "win32", reason="programs are confined by POSIX limits")
def test_verifiers_that_run_something(found: Any, tmp_path: Path) -> None:
    (tmp_path / "tests.py").write_text("assert add(1, 2) == 3\n")
    result = found("--paths", 2, "--verify", f"tests:{tmp_path / 'tests.py'}", "--until", "first")
    assert not any(path["verdict"]["passed"] for path in result["paths"]), "random weights write no code"
    result = found("--paths", 2, "--verify", f"program:{sys.executable} -c 'print()'", "--until", "first")
    assert any(path["verdict"] == {"score": 1, "passed": True, "detail": ""} for path in result["paths"])


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--vote", "best"], 2, "error[usage]: --vote belongs to several paths; give --paths N as well"),
        (["--until", "first"], 2, "error[usage]: --until belongs to several paths"),
        (["--step-tokens", "3"], 2, "error[usage]: --step-tokens belongs to several paths"),
        (["--verify", "regex:a"], 2, "error[usage]: --verify belongs to several paths"),
        (["--paths", "0"], 2, "'--paths'"),
        (["--paths", "2", "--window", "9"], 2, "error[usage]: --window does not go with --paths"),
        (["--paths", "2", "--speculate", "auto"], 2, "error[usage]: --speculate does not go with --paths"),
        (["--paths", "2", "--verify", "a"], 2, "error[usage]: --verify 'a' is no verifier; give regex:PATTERN"),
        (["--paths", "2", "--verify", "json:"], 2, "error[usage]: --verify 'json:' is no verifier"),
        (
            ["--paths", "2", "--verify", "tests:no.py"],
            2,
            "error[usage]: --verify: 'no.py' cannot be read: No such file",
        ),
        (["--paths", "2", "--verify", "regex:("], 2, "error[usage]: '(' is not a regular expression"),
        (["--paths", "4", "--temperature", "0"], 3, "error[prompt]: 4 paths need sampling"),
        (["--paths", "2", "--vote", "x"], 3, "error[prompt]: vote must be 'majority', 'best' or a callable, got 'x'"),
        (["--paths", "2", "--until", "first"], 3, "error[prompt]: stop='first' waits for a path that passes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(run: Any, artifact: Path, options: list[str], status: int, said: str) -> None:
    got, out, err = run("generate", artifact, "p", *options)
    assert (got, out) == (status, "") and said in err
