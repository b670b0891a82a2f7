"""Recipes beside each other: the same cache, the same text, sizes as they lie on the disk, and one that is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ryzen_compile.api import export, load, read_source
from ryzen_compile.config import Recipe, find_recipe
from ryzen_compile.errors import ConfigError
from ryzen_compile.manifest import read_manifest
from ryzen_compile.text import BUILTIN, BUILTIN_CHARACTERS, read_text, token_windows
from ryzen_compile.validate.quality import EngineScorer, ModelScorer, score
from ryzen_compile.workflow import pareto
from ryzen_compile.workflow.pareto import measure_recipes
from ryzen_compile.workflow.report_schema import Point
from tests.workflow.tiny_workflow import MODEL, two_layers

CONTEXT = 41  # less than decoding is usually timed behind


@pytest.fixture(scope="module")
def model() -> Any:
    return two_layers()


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    """(3, 19) tokens of text."""
    tokenizer = read_source(MODEL).tokenizer
    return token_windows(read_text(BUILTIN)[BUILTIN_CHARACTERS // 2 :], tokenizer.encode, 19, 57)


@pytest.fixture(scope="module")
def chosen() -> Recipe:
    return find_recipe("int4", method="rtn", kv="int8", context=CONTEXT)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, model: Any, chosen: Recipe) -> Path:
    out = tmp_path_factory.mktemp("chosen") / "artifact"
    export(model, out, chosen, verify=False)
    return out


class Found:
    """The points, with what was exported for them while it was there."""

    def __init__(self, names: list[str], model: Any, chosen: Recipe, artifact: Path, windows: np.ndarray) -> None:
        self.recipes: dict[str, Recipe] = {}
        self.sizes: dict[str, int] = {}
        self.formats: dict[str, set[str]] = {}
        self.places: list[Path] = []
        self.said: list[str] = []

        def exported(source: Any, out: Path, recipe: Recipe, *, calibration: str) -> None:
            assert calibration == "some.txt"
            export(source, out, recipe, verify=False)  # which takes a third of the time
            self.places.append(out)
            self.recipes[out.name] = Recipe(**read_manifest(out)["recipe"])
            self.sizes[out.name] = sum(file.stat().st_size for file in out.iterdir() if file.name.endswith(".data"))
            self.formats[out.name] = {slot["key_format"] for slot in read_manifest(out)["slots"]}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pareto, "export", exported)
            patch.setattr(pareto, "ROUNDS", 4)
            self.points: tuple[Point, ...] = measure_recipes(
                names,
                model,
                model,
                chosen,
                artifact,
                windows,
                threads=1,
                calibration="some.txt",
                scratch=artifact.parent,
                say=self.said.append,
            )
        assert all(place.is_relative_to(artifact.parent) for place in self.places)
        assert list(artifact.parent.iterdir()) == [artifact]  # the others were made to be measured


@pytest.fixture(scope="module")
def found(model: Any, chosen: Recipe, artifact: Path, windows: np.ndarray) -> Found:
    """The chosen recipe is named once more, and is not made once more."""
    return Found(["fp32", "int4", "fp32"], model, chosen, artifact, windows)


def test_the_workflows_own_is_the_first_and_flagged(found: Found) -> None:
    assert [(point.recipe, point.chosen) for point in found.points] == [("int4", True), ("fp32", False)]
    assert found.said == ["recipe fp32", "decoding with each recipe, in turns"]
    assert list(found.recipes) == ["fp32"]


def test_all_have_the_same_cache(found: Found, chosen: Recipe) -> None:
    """Or what is compared would be caches; the context, too, is the chosen one's."""
    assert found.recipes["fp32"].kv == chosen.kv and found.recipes["fp32"].context == CONTEXT
    assert found.formats["fp32"] == {"int8"}
    assert found.recipes["fp32"].weights is None


def test_bytes_are_those_of_the_files(found: Found, artifact: Path) -> None:
    own, other = found.points
    assert own.bytes == (artifact / "model.onnx.data").stat().st_size
    assert other.bytes == found.sizes["fp32"] and other.bytes > 3 * own.bytes


def test_quality_is_to_the_same_model_on_the_same_text(
    found: Found, model: Any, artifact: Path, windows: np.ndarray
) -> None:
    """An integer cache alone loses less than integer weights on top of it; the figures are those of ``score``."""
    own, other = found.points
    with load(artifact, threads=1) as opened:
        quality = score(EngineScorer(opened.engine), ModelScorer(model), windows)
    # Threads share the sums of float32 products out differently.
    assert own.kl.value == pytest.approx(quality.kl.value, rel=1e-3)
    assert own.accuracy_loss.value == pytest.approx(quality.accuracy_loss.value, abs=2 / windows.size)
    assert 0 < other.kl.value < own.kl.value / 4
    assert own.kl.unit == "nats" and own.accuracy_loss.unit == "share" and own.kl.samples == len(windows)


def test_speed_is_measured_in_rounds(found: Found) -> None:
    for point in found.points:
        rate = point.tokens_per_second
        assert rate.unit == "tok/s" and rate.samples == 4 and rate.value > 0
        assert rate.low is not None and rate.high is not None and rate.low <= rate.value <= rate.high


def test_only_the_chosen_one(model: Any, chosen: Recipe, artifact: Path, windows: np.ndarray) -> None:
    alone = Found([], model, chosen, artifact, windows)
    assert [point.recipe for point in alone.points] == ["int4"] and alone.places == []


def test_an_unknown_recipe_is_refused_before_any_is_made(
    model: Any, chosen: Recipe, artifact: Path, windows: np.ndarray
) -> None:
    with pytest.raises(ConfigError, match="there is no recipe 'int5'; did you mean 'int"):
        Found(["fp32", "int5"], model, chosen, artifact, windows)


def test_a_context_as_short_as_a_few_tokens(model: Any, windows: np.ndarray, tmp_path: Path) -> None:
    """Decoding is then timed over what fits."""
    recipe = find_recipe("fp32", context=7)
    export(model, tmp_path / "artifact", recipe, verify=False)
    (point,) = Found([], model, recipe, tmp_path / "artifact", np.ascontiguousarray(windows[:, :7])).points
    assert point.tokens_per_second.value > 0 and point.kl.value < 1e-6  # float32 beside float32
