"""``ryzen-compile recipes``: what ``--recipe`` takes."""

from __future__ import annotations

import typer

from ryzen_compile.cli import output


def recipes(as_json: output.JsonFlag = False) -> None:
    """List the recipes."""
    from ryzen_compile.config import RECIPES

    if as_json:
        output.print_json([recipe.model_dump() for recipe in RECIPES])
        return
    for recipe in RECIPES:
        typer.echo(f"{recipe.name:<10}{recipe.description}")
