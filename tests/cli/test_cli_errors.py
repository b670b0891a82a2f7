"""Every way out of the command line: one line on stderr, the documented exit status, nothing else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import typer

from ryzen_compile import cli, errors
from ryzen_compile.cli.failure import describe, printable

ROOT_COMMAND = "import sys; from ryzen_compile.cli import main; sys.exit(main())"


def family(base: type = errors.RyzenCompileError) -> list[type]:
    return [base, *(each for child in base.__subclasses__() for each in family(child))]


@pytest.fixture
def raising(monkeypatch):
    """A command line whose only command, ``fail``, raises what it is given."""

    def install(error: BaseException) -> None:
        app = typer.Typer(pretty_exceptions_enable=False)

        @app.callback()
        def root() -> None: ...

        @app.command()
        def fail() -> None:
            raise error

        monkeypatch.setattr(cli, "app", app)

    return install


@pytest.mark.parametrize("kind", family(), ids=lambda kind: kind.__name__)
def test_the_family_maps_to_its_own_codes(raising, capsys, kind):
    raising(kind("layer 3 is odd", hint="make it even"))
    assert cli.main(["fail"]) == kind.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"ryzen-compile: error[{kind.code}]: layer 3 is odd; make it even\n"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (MemoryError(), 5, "error[memory]: out of memory: MemoryError"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 5, "error[memory]"),
        (
            OSError(28, "No space left on device", "out/x"),
            5,
            "error[resource]: [Errno 28] No space left on device: 'out/x'",
        ),
        (KeyboardInterrupt(), 130, "error[interrupted]"),
        (typer.Abort(), 130, "error[interrupted]"),
        (SystemExit(143), 143, "error[terminated]"),
        (ZeroDivisionError("by zero\nsecond line"), 70, "error[internal]: ZeroDivisionError: by zero; this is a bug"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_other_exceptions(raising, capsys, error, status, line):
    raising(error)
    assert cli.main(["fail"]) == status
    err = capsys.readouterr().err
    assert err.startswith(f"ryzen-compile: {line}") and err.count("\n") == 1


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), typer.Exit(0), SystemExit(0)], ids=repr)
def test_silent_ends(raising, capsys, error):
    raising(error)
    assert cli.main(["fail"]) == (141 if isinstance(error, BrokenPipeError) else 0)
    assert capsys.readouterr().err == ""


def test_exit_statuses_pass_through(raising, capsys):
    raising(typer.Exit(7))
    assert cli.main(["fail"]) == 7
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", [["--debug", "fail"], ["fail", "--debug"]])
def test_traceback_only_with_debug(raising, capsys, arguments):
    raising(ZeroDivisionError("by zero"))
    assert cli.main(["fail"]) == 70
    assert "Traceback" not in capsys.readouterr().err
    assert cli.main(arguments) == 70
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("ryzen-compile: error[internal]")


def test_debug_after_a_double_dash_is_an_argument():
    assert cli._take_debug(["a", "--debug", "--", "--debug"]) == (["a", "--", "--debug"], True)
    assert cli._take_debug(["a", "--", "--debug"]) == (["a", "--", "--debug"], False)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["doctor", "--jsn"], "--json"),
        (["env", "--frobnicate"], "nearest: --"),
        (["--versoin"], "--version"),
        (["docter"], "doctor"),
        (["env", "surplus"], "surplus"),
    ],
)
def test_usage_errors_name_the_nearest(capsys, arguments, named):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ryzen-compile: error[usage]: ") and err.count("\n") == 1
    assert named in err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Kb", "a\\x1b[2Kb"),
        ("a\nryzen-compile: ok", "a\\nryzen-compile: ok"),
        ("a\u202eb\u2028c\x9bd\x7f", "a\\u202eb\\u2028c\\x9bd\\x7f"),
        ("größer 模型 ± →", "größer 模型 ± →"),
    ],
)
def test_control_characters_are_escaped(text, shown):
    assert printable(text) == shown
    assert describe(errors.ModelError(text)).message == shown


def test_a_usage_error_cannot_forge_a_line(capsys):
    assert cli.main(["doctor", "--x\x1b[31m\nryzen-compile: done"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "\x1b" not in err


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command.__name__ in shown for command in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ryzen-compile ")
    assert cli.main([]) == 0
    assert "doctor" in capsys.readouterr().out


def test_env_prints_markdown_and_json(capsys):
    import json

    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert all(re.match(r"- [\w -]+: .+", line) for line in out.splitlines()) and "- torch: 2" in out
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"].startswith("2.")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and pipes")
def test_a_closed_pipe_ends_quietly(repository):
    read, write = os.pipe()
    os.close(read)
    child = subprocess.run(
        [sys.executable, "-c", ROOT_COMMAND, "env"],
        stdout=write, stderr=subprocess.PIPE, cwd=repository, text=True, timeout=60, check=False,
    )  # fmt: skip
    os.close(write)
    assert child.returncode == 141
    assert "rror" not in child.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and pipes")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_unwind_and_say_so(repository, tmp_path, number, status):
    code = f"""
import pathlib, signal, sys, time, typer
from ryzen_compile import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a job in the background starts without
app = typer.Typer()
@app.callback()
def root(): ...
@app.command()
def wait():
    half_written = pathlib.Path({str(tmp_path)!r}) / "half"
    try:
        half_written.touch()
        time.sleep(60)
    finally:
        half_written.unlink(missing_ok=True)
cli.app = app
sys.exit(cli.main(["wait"]))
"""
    child = subprocess.Popen([sys.executable, "-c", code], cwd=repository, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "half").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(number)
    _, err = child.communicate(timeout=30)
    assert child.returncode == status
    assert err.startswith("ryzen-compile: error[") and err.count("\n") == 1
    assert not (tmp_path / "half").exists()
