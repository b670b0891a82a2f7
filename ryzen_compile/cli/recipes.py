"""``ryzen-compile recipes``: what ``--recipe`` takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from ryzen_compile.cli import output

if TYPE_CHECKING:
    from ryzen_compile.config import Recipe


def recipes(as_json: output.JsonFlag = False) -> None:
    """List the recipes."""
    from ryzen_compile.config import RECIPES

    if as_json:
        output.print_json([recipe.model_dump() for recipe in RECIPES])
        return
    for recipe in RECIPES:
        typer.echo(f"{recipe.name:<15}{_bits(recipe):>6.2f} bits  {recipe.description}")


def _bits(recipe: Recipe) -> float:
    """Stored per weight, scales included; a head of other bits is not counted."""
    from ryzen_compile.numerics.blockwise import BlockFormat

    weights = recipe.weights
    if weights is None:
        return 32.0
    return weights.target_bits or BlockFormat(weights.bits, weights.block, weights.symmetric).bits_per_weight
