"""Native operators from the command line: insisted on, done without, exported, explained and tuned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile import cli
from ryzen_compile.backends.onnxruntime import LIBRARY_NAME, NATIVE_NAME, native
from ryzen_compile.backends.onnxruntime.claim_report import KINDS, ClaimReport
from ryzen_compile.backends.onnxruntime.tuning import Tuning
from ryzen_compile.cli.eval import _reference
from ryzen_compile.manifest import read_manifest, tuned
from ryzen_compile.validate.machine import cpu_key, read_machine
from tests.model_directory import listing, shared_artifact, shared_model

Run = Callable[..., tuple[int, str, str]]
MISSING = "there are no native operators: they were not built; install g++"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_artifact(tmp_path_factory)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from ryzen_compile.kernels import cpu

    monkeypatch.setattr(cpu, "library", lambda: None)
    monkeypatch.setattr(cpu, "reason", lambda: "they were not built")


@pytest.fixture
def library() -> None:
    if native.unusable():
        pytest.skip(native.unusable())


COMMANDS = {
    "generate": ("generate", "ARTIFACT", "def add", "-n", 2),
    "bench": ("bench", "ARTIFACT", "-p", 4, "-n", 2, "-r", 1),
    "eval": ("eval", "ARTIFACT", "--tokens", 40, "--length", 20, "-q"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_insisting_without_a_library_is_refused(run: Run, artifact: Path, missing: None, command: str) -> None:
    arguments = [artifact if word == "ARTIFACT" else word for word in COMMANDS[command]]
    status, out, err = run(*arguments, "--native")
    assert status == 3 and out == "" and f"error[unsupported]: {MISSING}" in err
    for flags in ((), ("--no-native",)):
        status, out, err = run(*arguments, *flags)
        assert status == 0 and "native operators: none: they" in err + "native operators: none: they" * (
            command != "bench"
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_with_a_library_both_ways_work(run: Run, artifact: Path, library: None, command: str) -> None:
    arguments = [artifact if word == "ARTIFACT" else word for word in COMMANDS[command]]
    for flag, line in (("--native", "2 GroupQueryAttention"), ("--no-native", "none: they are switched off")):
        status, _, err = run(*arguments, flag)
        assert status == 0 and (command != "bench" or f"native operators: {line}" in err)


def test_names_in_a_model_are_shown_as_text(
    monkeypatch: pytest.MonkeyPatch, run: Run, artifact: Path, library: None
) -> None:
    def renamed(*arguments: Any) -> tuple[Any, ClaimReport]:
        session, report = original(*arguments)
        return session, replace(report, left=(("a\x1b[2J", "odd\x1b]0;"),))

    original = native.open_claimed
    monkeypatch.setattr(native, "open_claimed", renamed)
    err = run(*(artifact if word == "ARTIFACT" else word for word in COMMANDS["bench"]))[2]
    assert "1 left (a" in err and "\x1b" not in err


def test_a_native_export(run: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, library: None) -> None:
    out = tmp_path / "out"
    status, _, err = run("export", shared_model(tmp_path_factory), out, "--recipe", "fp32", "--no-verify", "--native")
    assert status == 0, err
    assert {NATIVE_NAME, LIBRARY_NAME} <= set(listing(out))
    assert json.loads((out / "genai_config.json").read_text())["model"]["decoder"]["filename"] == NATIVE_NAME


def test_a_native_export_without_a_library_is_refused_before_the_model_is_read(
    run: Run, tmp_path: Path, missing: None
) -> None:
    status, _, err = run("export", "no such model", tmp_path / "out", "--native")
    assert status == 3 and MISSING in err and not list(tmp_path.iterdir())


def test_explain_says_what_is_claimed_here(run: Run, artifact: Path, library: None) -> None:
    status, out, _ = run("explain", artifact)
    lines = out.split("## Native operators on this machine\n\n- ")[1].splitlines()
    assert status == 0 and lines[0].startswith("2 GroupQueryAttention, 5 SkipRMSNorm")
    found = json.loads(run("explain", artifact, "--json")[1])["native"]
    assert found["claimed"] == {"GroupQueryAttention": 2, "SkipRMSNorm": 5} and found["left"] == []


def test_explain_says_why_nothing_is(run: Run, artifact: Path, missing: None) -> None:
    assert run("explain", artifact)[1].endswith("## Native operators on this machine\n\n- none: they were not built\n")


def test_tune_compares_them(run: Run, artifact: Path, tmp_path: Path, library: None) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    status, out, err = run("tune", copy, "--threads", "1", "--seconds", 0.3)
    assert status == 0, err
    table = out.split("\noperators  ", 1)[1].splitlines()
    ways = ["native attention, norm", "native norm", "native attention", "stock operators"]
    assert [line[:32].strip() for line in table[1:5]] == ways
    assert sum(line.endswith("  chosen") for line in table[1:5]) == 1
    assert all(f"round 1, {way}: " in err for way in ways)
    key = cpu_key(read_machine())
    record = Tuning.from_json(key, tuned(read_manifest(copy))[key])
    assert record.native is not None and record.native.kinds <= KINDS and table[5] == record.native.reason
    found = json.loads(run("tune", copy, "--threads", "1", "--seconds", 0.3, "--json", "--dry-run")[1])
    assert all(entry["median"] > 0 for entry in found["native"]["candidates"])


def test_tune_says_when_there_is_nothing_to_compare(run: Run, artifact: Path, missing: None) -> None:
    status, out, _ = run("tune", artifact, "--threads", "1", "--seconds", 0.1, "--dry-run")
    assert status == 0 and "native operators were not measured: ryzen-compile doctor says whether" in out


def test_a_reference_is_scored_on_stock_operators(artifact: Path, library: None) -> None:
    """``eval OUT --reference OUT`` then measures what native operators change."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        assert _reference(stack, str(artifact), 1)._engine.claims.reason == "they are switched off"  # type: ignore[attr-defined]
