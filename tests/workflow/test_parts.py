"""The whole against its parts: which parts there are, and that what they give together is recomputed from the figures.

Nothing is held to a speed: what is tested is what was measured against what.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ryzen_compile.api import export, load
from ryzen_compile.backends.onnxruntime.native import unusable
from ryzen_compile.config import EmbeddingCompression, KVCacheConfig, Recipe, find_recipe
from ryzen_compile.validate.huggingface import HuggingFaceEager
from ryzen_compile.validate.inference import InferenceReport, InferenceValidator
from ryzen_compile.workflow import parts
from ryzen_compile.workflow.parts import PASSES, measure_parts
from ryzen_compile.workflow.report_schema import EndToEnd
from tests.workflow.tiny_workflow import two_layers

NEW = 3  # tokens behind each prompt
PLAIN = find_recipe("fp32")
NATIVE = [] if unusable("auto") else ["native operators"]


@pytest.fixture(scope="module")
def model() -> Any:
    return two_layers()


@pytest.fixture(scope="module")
def prompts() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4096, (2, 5), dtype=np.int64)


class Watched:
    """What ``measure_parts`` compared with what, with the recipes of the artifacts that it made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pairs: list[tuple[Any, Any]] = []
        self.recipes: list[Recipe] = []
        self.places: list[Path] = []
        self.said: list[str] = []
        self.reports: list[InferenceReport] = []
        watched = self

        class Validator(InferenceValidator):
            def __init__(self, baseline: Any, other: Any, *arguments: Any, **settings: Any) -> None:
                watched.pairs.append((baseline, other))
                super().__init__(baseline, other, *arguments, **settings)

            def measure(self, progress: Any = None) -> InferenceReport:
                watched.reports.append(super().measure(progress))
                return watched.reports[-1]

        def exported(source: Any, out: Path, recipe: Recipe, **settings: Any) -> Any:
            watched.recipes.append(recipe)
            watched.places.append(out)
            return export(source, out, recipe, **settings)

        monkeypatch.setattr(parts, "ROUNDS", 1)
        monkeypatch.setattr(parts, "InferenceValidator", Validator)
        monkeypatch.setattr(parts, "export", exported)


def whole_of(model: Any, artifact: Path, prompts: np.ndarray) -> InferenceReport:
    with load(artifact, threads=1) as optimized:
        return InferenceValidator(
            HuggingFaceEager(model), optimized.engine, prompts, new_tokens=NEW, rounds=1
        ).measure()


def measured(
    model: Any, recipe: Recipe, prompts: np.ndarray, artifact: Path, watched: Watched
) -> tuple[InferenceReport, EndToEnd]:
    export(model, artifact, recipe, verify=False)
    whole = whole_of(model, artifact, prompts)
    scratch = artifact.parent / "scratch"
    scratch.mkdir()
    found = measure_parts(
        whole, model, recipe, prompts, new_tokens=NEW, threads=1, scratch=scratch, say=watched.said.append
    )
    assert watched.places and all(place.is_relative_to(scratch) for place in watched.places)
    assert list(scratch.iterdir()) == []  # they were made to be timed
    return whole, found


def check_interaction(whole: InferenceReport, found: EndToEnd, watched: Watched) -> None:
    """The whole over the product of the parts, from the numbers that were returned and from each report of a part."""
    assert found.speed_up == whole.speed_ups["end_to_end"]
    assert found.prefill == whole.speed_ups["ttft"] and found.decode == whole.speed_ups["decode"]
    assert [part.value for part in found.parts.values()] == [
        report.speed_ups["end_to_end"].value for report in watched.reports
    ]
    product = math.prod(part.value for part in found.parts.values())
    # Three to five factors, each rounded once: far below 1e-9.
    assert found.interaction["end_to_end"] == pytest.approx(found.speed_up.value / product, rel=1e-9)
    assert set(found.interaction) == {"end_to_end", "ttft", "decode"}
    for time in ("ttft", "decode"):
        product = math.prod(report.speed_ups[time].value for report in watched.reports)
        assert found.interaction[time] == pytest.approx(whole.speed_ups[time].value / product, rel=1e-9)


def test_each_part_alone_against_the_plain_artifact(
    model: Any, prompts: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integer weights beside an integer cache, in a shortened context: each is one change to one artifact."""
    watched = Watched(monkeypatch)
    recipe = find_recipe("int8", method="rtn", kv="int8", context=61)
    whole, found = measured(model, recipe, prompts, tmp_path / "artifact", watched)
    assert list(found.parts) == [PASSES, "integer weights", "integer cache", *NATIVE]
    assert watched.said == [f"{name} alone" for name in found.parts]
    check_interaction(whole, found, watched)

    plain, weights, cache = watched.recipes
    assert plain == find_recipe("fp32", context=61)
    assert weights.weights == recipe.weights and weights.kv == plain.kv and weights.context == 61
    assert cache.weights is None and cache.kv == recipe.kv and cache.context == 61

    baselines = [pair[0] for pair in watched.pairs]
    stock = watched.pairs[0][1]
    assert isinstance(baselines[0], HuggingFaceEager) and all(one is stock for one in baselines[1:])
    assert len({id(pair[1]) for pair in watched.pairs}) == len(watched.pairs)
    sizes = [report.engines["optimized"].weights_bytes for report in watched.reports]
    caches = [report.engines["optimized"].cache_bytes for report in watched.reports]
    assert sizes[1] < sizes[0] / 3
    assert sizes[0] < sizes[2] < 1.01 * sizes[0]  # the cache's scales are stored with the weights
    assert caches[2] < caches[0] / 3 and caches[1] == caches[0]


def test_a_recipe_that_changes_nothing_else(
    model: Any, prompts: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No integer weights, no such part: what is left are the passes, and our own operators where they are."""
    watched = Watched(monkeypatch)
    whole, found = measured(model, find_recipe("fp32", context=61), prompts, tmp_path / "artifact", watched)
    assert list(found.parts) == [PASSES, *NATIVE] and len(watched.recipes) == 1
    check_interaction(whole, found, watched)


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        (PLAIN, []),
        (find_recipe("int4"), ["integer weights"]),
        (find_recipe("int4", prefill="int8"), ["integer weights"]),
        (find_recipe("fp32", kv="int4"), ["integer cache"]),
        (find_recipe("fp32", kv="k8v4"), ["integer cache"]),
        (find_recipe("fp32", kv="auto"), ["integer cache"]),
        (find_recipe("fp32", window=64), ["bounded cache"]),
        (find_recipe("fp32", kv="int8", window=64), ["integer cache"]),
        (find_recipe("fp32", embedding={}), ["table as codes"]),
        (find_recipe("int3-mixed", kv="int8", embedding={}), ["integer weights", "integer cache", "table as codes"]),
    ],
)
def test_parts_are_named_by_what_the_recipe_changes(recipe: Recipe, names: list[str]) -> None:
    """One change each, the same context in all."""
    changes = parts._changes(PLAIN, recipe)
    assert list(changes) == names
    for name, changed in changes.items():
        different = {field for field in Recipe.model_fields if getattr(changed, field) != getattr(PLAIN, field)}
        allowed = {
            "integer weights": {"weights", "prefill"},
            "integer cache": {"kv"},
            "bounded cache": {"kv"},
            "table as codes": {"embedding"},
        }[name]
        assert different and different <= allowed
    if recipe.weights is not None:
        weights = changes["integer weights"].weights
        assert weights is not None and weights.method == "rtn" and weights.bits == recipe.weights.bits
        assert changes["integer weights"].prefill == recipe.prefill


def test_the_names_of_those_are_defaults() -> None:
    """Negative control: what the cases above call plain is what a recipe without changes has."""
    assert PLAIN.kv == KVCacheConfig() and PLAIN.embedding is None and PLAIN.weights is None
    assert find_recipe("fp32", embedding={}).embedding == EmbeddingCompression()
