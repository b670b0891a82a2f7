"""What a model was trained for, beside its weights: the recipe that an export uses unless it is told otherwise, and the
depths at which its vectors can be cut.

A model whose training rounded its weights computes what it learned only where they are rounded the same way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ryzen_compile.config import Recipe
from ryzen_compile.errors import ConfigError, ResourceError
from ryzen_compile.manifest import shown_path

RECIPE_NAME = "ryzen_recipe.json"
DIMS_NAME = "ryzen_matryoshka.json"
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
    found = _read(path, "recipe", "name a recipe, or delete the file")
    if found is None:
        return None
    try:
        return Recipe(**found["recipe"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else type(error).__name__
        raise ConfigError(
            f"{shown_path(path)} is no recipe: {reason}", hint="name a recipe, or delete the file"
        ) from error


def dims_text(dims: Sequence[int]) -> str:
    """What ``read_dims`` reads."""
    return json.dumps({"schema_version": SCHEMA, "dims": list(dims)}) + "\n"


def read_dims(directory: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """The numbers of first channels that a model directory's vectors were trained to be cut to, all of them first; None
    where there is nothing of the kind.

    Raises ``ConfigError`` for a file that does not list falling numbers or is of another schema, ``ResourceError`` when
    it cannot be read.
    """
    path = Path(directory) / DIMS_NAME
    found = _read(path, "list of dims", "delete the file")
    if found is None:
        return None
    dims: Any = found.get("dims")
    numbers = isinstance(dims, list) and len(dims) > 0 and all(type(dim) is int and dim > 0 for dim in dims)
    if not numbers or dims != sorted(set(dims), reverse=True):
        raise ConfigError(f"{shown_path(path)} is no list of dims, widest first", hint="delete the file")
    return tuple(dims)


def _read(path: Path, what: str, hint: str) -> dict[str, Any] | None:
    """The object that a file of this schema holds, None where there is no file."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ResourceError(f"{shown_path(path)} cannot be read: {error.strerror}") from error
    try:
        found = json.loads(text) if len(text) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("schema_version") != SCHEMA:
        raise ConfigError(f"{shown_path(path)} is no {what} of schema {SCHEMA}", hint=hint)
    return found
