"""``ryzen-compile passes``: the passes of a recipe, in order."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated

import typer

from ryzen_compile.cli import output
from ryzen_compile.cli.defaults import DEFAULT_RECIPE


def passes(
    recipe: Annotated[str, typer.Option(help="Whose passes.")] = DEFAULT_RECIPE,
    as_json: output.JsonFlag = False,
) -> None:
    """List the passes in the order they run, with what each promises and does."""
    from ryzen_compile.config import find_recipe
    from ryzen_compile.pipeline import default_passes

    rows = []
    for number, pass_ in enumerate(default_passes(find_recipe(recipe)), 1):
        summary = (inspect.getdoc(sys.modules[type(pass_).__module__]) or "").splitlines()[0]
        rows.append({"order": number, "name": pass_.name, "promise": pass_.promise, "does": summary})
    if as_json:
        output.print_json(rows)
        return
    for row in rows:
        typer.echo(f"{row['order']:>2}  {row['name']:<22}{row['promise']:<7}{row['does']}")
