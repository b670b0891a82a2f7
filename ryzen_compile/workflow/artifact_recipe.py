"""With which recipe an artifact was made, as its manifest has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ryzen_compile.config import Recipe
from ryzen_compile.errors import ArtifactError
from ryzen_compile.manifest import read_manifest, shown_path


def recipe_of(artifact: Path) -> Recipe:
    """With which the artifact was made. Raises ``ArtifactError`` where it does not say."""
    stored: Any = read_manifest(artifact).get("recipe")
    try:
        return Recipe(**stored)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"the manifest of {shown_path(artifact)} holds no recipe that this version knows"
        ) from error
