"""The recipe beside a model's weights: what is used where nobody names one, and what is no recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ryzen_compile.api import recipe_for
from ryzen_compile.config import DEFAULT_RECIPE, Recipe, WeightQuantization
from ryzen_compile.errors import ConfigError
from ryzen_compile.recipe_file import DIMS_NAME, MAX_BYTES, RECIPE_NAME, dims_text, read_dims, read_recipe, recipe_text

TRAINED = Recipe(name="trained", weights=WeightQuantization(bits=3, block=64, method="rtn", head_bits=8))


def write(directory: Path, text: str) -> Path:
    (directory / RECIPE_NAME).write_text(text, encoding="utf-8")
    return directory


def test_a_recipe_survives_its_file(tmp_path: Path) -> None:
    assert read_recipe(write(tmp_path, recipe_text(TRAINED))) == TRAINED


def test_a_models_own_recipe_comes_before_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_python_lm: Path
) -> None:
    assert recipe_for(write(tmp_path, recipe_text(TRAINED))) == TRAINED
    assert recipe_for(tiny_python_lm) == DEFAULT_RECIPE and read_recipe(tiny_python_lm) is None
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert recipe_for(f"~/{tmp_path.name}") == TRAINED
    assert recipe_for(tmp_path / "none") == DEFAULT_RECIPE  # that it is not there is said by whoever reads it


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no recipe"),
        ("[]", "no recipe of schema 1"),
        (json.dumps({"schema_version": 2, "recipe": {}}), "no recipe of schema 1"),
        (json.dumps({"schema_version": 1}), "is no recipe: KeyError"),
        (
            json.dumps({"schema_version": 1, "recipe": {"weights": {"bits": 5}}}),
            "is no recipe: Input should be 2, 3, 4",
        ),
        (json.dumps({"schema_version": 1, "recipe": {"strange": 1}}), "is no recipe: Extra inputs"),
        (json.dumps({"schema_version": 1, "recipe": [1]}), "is no recipe"),
        (" " * (MAX_BYTES + 1), "no recipe of schema 1"),
        ("[" * 60_000, "is no recipe"),
    ],
    ids=["torn", "list", "schema", "empty", "bits", "field", "kind", "large", "deep"],
)
def test_what_is_no_recipe_is_refused_with_what_to_do(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_recipe(write(tmp_path, text))
    assert "name a recipe, or delete the file" in str(caught.value)


def test_dims_survive_their_file(tmp_path: Path) -> None:
    assert read_dims(tmp_path) is None
    (tmp_path / DIMS_NAME).write_text(dims_text((384, 64, 7)), encoding="utf-8")
    assert read_dims(tmp_path) == (384, 64, 7)


@pytest.mark.parametrize(
    "found",
    [
        "{",
        "[384]",
        '{"schema_version": 2, "dims": [8]}',
        '{"schema_version": 1, "dims": null}',
        '{"schema_version": 1, "dims": []}',
        '{"schema_version": 1, "dims": [8, 8]}',
        '{"schema_version": 1, "dims": [8, 16]}',
        '{"schema_version": 1, "dims": [8, 0]}',
        '{"schema_version": 1, "dims": [8.0]}',
        '{"schema_version": 1, "dims": [true]}',
        '{"schema_version": 1, "dims": "8"}',
    ],
)
def test_what_is_no_list_of_dims_is_refused(tmp_path: Path, found: str) -> None:
    (tmp_path / DIMS_NAME).write_text(found, encoding="utf-8")
    with pytest.raises(ConfigError, match="is no list of dims") as caught:
        read_dims(tmp_path)
    assert "delete the file" in str(caught.value)
