"""The recipe that a model was trained for, beside its weights: what an export uses unless it is told otherwise.

A model whose training rounded its weights computes what it learned only where they are rounded the same way.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import ValidationError

from ryzen_compile.config import Recipe
from ryzen_compile.errors import ConfigError, ResourceError
from ryzen_compile.manifest import shown_path

RECIPE_NAME = "ryzen_recipe.json"
CODES_NAME = "embedding_codes.safetensors"  # a table of tokens that was trained as codes
SCHEMA = 1
MAX_BYTES = 1 << 16


def recipe_text(recipe: Recipe) -> str:
    """What ``read_recipe`` reads."""
    return json.dumps({"schema_version": SCHEMA, "recipe": recipe.model_dump(mode="json")}, indent=1) + "\n"


def read_recipe(directory: str | os.PathLike[str]) -> Recipe | None:
    """Of a model directory; None where there is none.

    Raises ``ConfigError`` for a file that is no recipe or of another schema, ``ResourceError`` when it cannot be read.
    """
    path = Path(directory) / RECIPE_NAME
    if not path.is_file():
        return None
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ResourceError(f"{shown_path(path)} cannot be read: {error.strerror}") from error
    try:
        found = json.loads(text) if len(text) <= MAX_BYTES else None
        if not isinstance(found, dict) or found.get("schema_version") != SCHEMA:
            raise ConfigError(
                f"{shown_path(path)} is no recipe of schema {SCHEMA}", hint="name a recipe, or delete the file"
            )
        return Recipe(**found["recipe"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else type(error).__name__
        raise ConfigError(
            f"{shown_path(path)} is no recipe: {reason}", hint="name a recipe, or delete the file"
        ) from error
