"""From an exception to what the user and the calling script get: a code word, one line, an exit status."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import typer

from ryzen_compile.errors import RyzenCompileError

_PACKAGE = Path(__file__).resolve().parent.parent
# Control characters could rewrite the terminal's line or forge a second one; the Unicode ones reorder or break lines.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
# Allocators that report through RuntimeError: torch on the CPU and on CUDA, ONNX Runtime's arena.
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|CUDA out of memory|[Ff]ailed to allocate memory|bad_alloc")


@dataclass(frozen=True)
class Failure:
    """``message`` is one printable line; empty means that there is nothing to say."""

    code: str
    message: str
    exit_code: int


INTERRUPTED = Failure("interrupted", "stopped from the keyboard", 130)
TERMINATED = Failure("terminated", "stopped by SIGTERM", 143)
PIPE_CLOSED = Failure("pipe", "", 141)


def describe(error: BaseException) -> Failure:
    """Any exception as a ``Failure``: the family's own classes say their code, the rest is sorted here."""
    if isinstance(error, RyzenCompileError):
        return Failure(error.code, printable(str(error)), error.exit_code)
    if isinstance(error, typer.TyperException):
        return _usage(error)
    # typer turns a closed pipe into SystemExit(1) before we see it.
    if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
        return PIPE_CLOSED
    if isinstance(error, SystemExit):
        if error.code == TERMINATED.exit_code:
            return TERMINATED
        if isinstance(error.code, str):
            return Failure("exit", printable(error.code), 1)
        return Failure("exit", "", error.code or 0)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))):
        return Failure("memory", printable(f"out of memory: {_first_line(error)}"), 5)
    if isinstance(error, OSError):
        return Failure("resource", printable(_first_line(error)), 5)
    return Failure(
        "internal",
        printable(f"{type(error).__name__}: {_first_line(error)}; this is a bug, --debug shows where"),
        70,
    )


def printable(text: str) -> str:
    """``text`` with control and direction-changing characters as escapes, on one line."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def show_warning(message: Warning | str, category: type[Warning], filename: str, *_: object) -> None:
    """In place of ``warnings.showwarning``: ours as one line; those of other libraries concern their developers."""
    if Path(filename).is_relative_to(_PACKAGE):
        sys.stderr.write(f"ryzen-compile: warning: {printable(str(message))}\n")


def _usage(error: typer.TyperException) -> Failure:
    """typer's own complaints. It names the options and commands that look alike; where it finds none, we do."""
    message = " ".join(error.format_message().split())
    if "ossible option" not in message and "id you mean" not in message:
        nearest = _nearest_option(error)
        message = (
            message.rstrip(".") + (f" (nearest: {nearest})" if nearest else "") + "; --help lists what is accepted"
        )
    return Failure("usage", printable(message), 2)


def _nearest_option(error: typer.TyperException) -> str:
    """For an unknown option, the one of its command that is spelled most like it, however little that is."""
    # Read by name: the exception's class is not among the names that typer exports.
    name, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if name is None or context is None:
        return ""
    known = [option for parameter in context.command.params for option in parameter.opts if option.startswith("--")]
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.0)), "")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
