"""The command line: parses, calls, prints. One file per command; this one lists them and turns errors into exit codes.

Nothing heavy is imported here or at the top of a command's file: ``ryzen-compile --help`` must not wait for torch.
"""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Annotated

import typer

from ryzen_compile.cli import (
    bench,
    diff,
    doctor,
    embed,
    env,
    explain,
    export,
    generate,
    passes,
    recipes,
    run,
    train,
    tune,
    validate,
)
from ryzen_compile.cli import eval as evaluation
from ryzen_compile.cli.failure import INTERRUPTED, PIPE_CLOSED, TERMINATED, Failure, describe, show_warning

PROGRAM = "ryzen-compile"

# In the order in which --help shows them.
COMMANDS = (
    export.export,
    generate.generate,
    embed.embed,
    bench.bench,
    evaluation.eval,
    tune.tune,
    train.train,
    validate.validate,
    run.run,
    explain.explain,
    diff.diff,
    passes.passes,
    recipes.recipes,
    doctor.doctor,
    env.env,
)

app = typer.Typer(
    name=PROGRAM,
    help="Rewrite a transformer with checked graph passes and run it fast on a CPU.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in COMMANDS:
    app.command()(_command)


# --debug stands here for --help only: main() takes it off the line before typer sees it.
@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; accepted anywhere.")] = False,
) -> None:
    if version:
        typer.echo(f"{PROGRAM} {_version()}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's) and return its exit status; never raises."""
    arguments, debug = _take_debug(list(sys.argv[1:] if argv is None else argv))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings are about calls that the user did not make
    try:
        with _sigterm_raises(), warnings.catch_warnings():
            if not debug:
                warnings.showwarning = show_warning  # type: ignore[assignment]
            status = app(arguments, prog_name=PROGRAM, standalone_mode=False)
            # Here, where a closed pipe can still be reported; at interpreter exit it would only be printed.
            sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - the process's boundary: whatever arrives becomes one line and a code
        return _report(describe(error), error, debug)
    return _report(INTERRUPTED, None, debug) if status == INTERRUPTED.exit_code else int(status or 0)


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """``--debug`` may stand before or after the command, but what follows ``--`` is nobody's option."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    return kept + arguments[end:], len(kept) < end


def _report(failure: Failure, error: BaseException | None, debug: bool) -> int:
    if failure == PIPE_CLOSED:
        # Nobody reads: what is still buffered goes nowhere, or the interpreter complains about it while exiting.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return failure.exit_code
    if failure.message:
        if debug and error is not None:
            traceback.print_exception(error)
        with suppress(OSError):
            sys.stderr.write(f"{PROGRAM}: error[{failure.code}]: {failure.message}\n")
            sys.stderr.flush()
    return failure.exit_code


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C does, so that half-written directories are removed on the way out."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED.exit_code)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _version() -> str:
    try:
        return importlib.metadata.version("ryzen-compile")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
