"""What a user may ask for: recipes and their settings. Frozen, and unknown keys are refused by name."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ryzen_compile.errors import ConfigError

DEFAULT_RECIPE = "fp32"


class Recipe(BaseModel):
    """One way of optimizing a model.

    ``logits`` decides whether a step returns logits for its last token only (all that generation reads) or for every
    token (scoring text, verifying drafts). ``context`` shortens the number of positions the artifact is made for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = DEFAULT_RECIPE
    description: str = ""
    logits: Literal["last", "all"] = "last"
    context: int | None = Field(default=None, ge=1)


RECIPES: tuple[Recipe, ...] = (
    Recipe(name="fp32", description="32-bit weights and cache, every fusion; the same greedy tokens as the model"),
)


def find_recipe(recipe: str | Recipe, **changes: object) -> Recipe:
    """A recipe by name, or the given one, with ``changes`` applied; raises ``ConfigError`` naming the nearest."""
    if isinstance(recipe, str):
        found = next((r for r in RECIPES if r.name == recipe), None)
        if found is None:
            names = [r.name for r in RECIPES]
            near = get_close_matches(recipe, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"recipes are {', '.join(names)}"
            raise ConfigError(f"there is no recipe {recipe!r}", hint=hint)
        recipe = found
    try:
        return Recipe(**{**recipe.model_dump(), **{k: v for k, v in changes.items() if v is not None}})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"recipe {recipe.name!r}: {where}: {first['msg']}, got {first['input']!r}") from error
