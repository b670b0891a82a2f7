"""Where output goes: results on stdout, progress and logs on stderr, JSON when asked for. Options of several commands.

Colour appears on a terminal only, and never with ``NO_COLOR`` (rich looks at both).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ryzen_compile.api import Native
    from ryzen_compile.spec import Pooling

NativeFlag = Annotated[
    bool | None,
    typer.Option("--native/--no-native", help="Insist on our own operators, or do without; default: where they are."),
]
ChangesFlag = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Replace one setting; may be repeated.")
]
SchemaFlag = Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of configurations, and stop.")]
PoolingOption = Annotated[
    str | None, typer.Option(help="Of an encoder that does not say: mean, cls, max or last; default: mean.")
]
NoNormalizeFlag = Annotated[
    bool, typer.Option("--no-normalize", help="With --pooling: leave the vectors their length.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]


def native_choice(flag: bool | None) -> Native:
    """``load``'s word for what ``NativeFlag`` says."""
    return "auto" if flag is None else flag


def pooling_choice(mode: str | None, no_normalize: bool) -> Pooling | None:
    """``optimize``'s pooling for what ``PoolingOption`` and ``NoNormalizeFlag`` say; raises ``UsageError``."""
    from ryzen_compile.errors import UsageError
    from ryzen_compile.spec import POOLING_MODES, Pooling

    if mode is None:
        if no_normalize:
            raise UsageError("--no-normalize is about a pooling that is given", hint="give --pooling as well")
        return None
    known = next((name for name in POOLING_MODES if name == mode), None)
    if known is None:
        raise UsageError(f"--pooling: there is no {mode!r}", hint=f"use one of {', '.join(POOLING_MODES)}")
    return Pooling(known, normalize=not no_normalize)


def stdout() -> Console:
    """For results. Lines are never folded: they are for pipes as much as for people."""
    return Console(soft_wrap=True, highlight=False)


def stderr() -> Console:
    """For progress and logs."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
