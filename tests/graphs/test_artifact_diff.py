"""Two artifacts compared by what their manifests and graphs say: each kind of difference, and none."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from ryzen_compile.graphs.artifact_diff import ArtifactDiff, ArtifactFacts, Difference, diff_artifacts
from ryzen_compile.graphs.view import GraphView
from tests.graphs.views import graph, node

DIGEST = "0" * 64
MANIFEST: dict[str, Any] = {
    "schema_version": 2,
    "made_by": "ryzen_compile 1",
    "source": {"name": "tiny", "class": "Decoder"},
    "recipe": {
        "name": "int4",
        "context": None,
        "weights": {"bits": 4, "overrides": {}, "target_bits": 4.5},
        "kv": {"dtype": "fp32"},
    },
    "versions": {"torch": "2.13.0"},
    "passes": {"fuse_norm": 5, "merge_linear": 0},
    "spec": {"layers": 2, "tied": True},
    "slots": [{"layer": 0, "key_format": "fp32"}, {"layer": 1, "key_format": "fp32"}],
    "files": {
        "model.onnx": {"size": 1_011, "sha256": DIGEST},
        "model.onnx.data": {"size": 2_003, "sha256": DIGEST},
        "report.json": {"size": 307, "sha256": DIGEST},
    },
}
VIEW = graph(node("a", "MatMul", "x", "w"), node("b", "Relu", "a"), weights=("w",))


def facts(
    name: str = "a", view: GraphView = VIEW, tokens: int = 1_024, windows: int = 0, **changes: Any
) -> ArtifactFacts:
    """An artifact with some of the manifest's sections replaced."""
    return ArtifactFacts(name, copy.deepcopy(MANIFEST) | changes, view, tokens, windows)


def changed(section: str, **settings: Any) -> dict[str, Any]:
    return {section: copy.deepcopy(MANIFEST[section]) | settings}


def test_an_artifact_and_its_copy() -> None:
    found = diff_artifacts(facts("a"), facts("b"))
    assert not found.differs and not found.graph and not found.operators
    assert [file.same for file in found.files] == [True] * 3
    assert found.to_text() == "--- a\n+++ b\nno difference\n"
    assert found == ArtifactDiff.model_validate_json(found.model_dump_json())


def test_settings_one_by_one() -> None:
    weights = {"bits": 8, "overrides": {"head": {"bits": 4}}, "target_bits": 4.5}
    found = diff_artifacts(facts(), facts("b", **changed("recipe", weights=weights, context=64)))
    assert found.differs
    assert found.recipe == (
        Difference(what="context", a=None, b=64),
        Difference(what="weights.bits", a=4, b=8),
        Difference(what="weights.overrides", a={}, only="a"),
        Difference(what="weights.overrides.head.bits", b=4, only="b"),
    )
    assert not (found.source or found.versions or found.passes or found.spec or found.cache)
    assert found.to_text().splitlines()[2:] == [
        "recipe",
        "  context: null -> 64",
        "  weights.bits: 4 -> 8",
        "  weights.overrides: {} -> (none)",
        "  weights.overrides.head.bits: (none) -> 4",
    ]


@pytest.mark.parametrize(
    ("section", "settings", "line"),
    [
        ("source", {"name": "large"}, 'name: "tiny" -> "large"'),
        ("versions", {"torch": "2.12.1"}, 'torch: "2.13.0" -> "2.12.1"'),
        ("passes", {"merge_linear": 4}, "merge_linear: 0 -> 4"),
        ("spec", {"tied": 1}, "tied: true -> 1"),  # equal in Python, not in a manifest
    ],
)
def test_each_section(section: str, settings: dict[str, Any], line: str) -> None:
    found = diff_artifacts(facts(), facts("b", **changed(section, **settings)))
    assert found.differs and len(getattr(found, section)) == 1
    assert found.to_text().splitlines()[2:] == [section, f"  {line}"]


def test_the_cache_by_bytes_and_formats() -> None:
    slots = [{"layer": 0, "key_format": "fp32"}, {"layer": 1, "key_format": "int8"}]
    found = diff_artifacts(facts(), facts("b", tokens=640, windows=17, slots=slots))
    assert found.differs
    assert [difference.to_text() for difference in found.cache] == [
        "bytes per token: 1024 -> 640",
        "bytes per sequence, for windows: 0 -> 17",
        'slot 1.key_format: "fp32" -> "int8"',
    ]
    assert 'slot 1: key_format: "fp32" -> "int8"' in found.to_text()
    both = diff_artifacts(facts(), facts("b", slots=[slot | {"key_format": "int8"} for slot in slots]))
    assert both.to_text().splitlines()[2:] == ["cache", '  slots 0, 1: key_format: "fp32" -> "int8"']
    shorter = diff_artifacts(facts(), facts("b", slots=slots[:1]))
    assert {difference.only for difference in shorter.cache} == {"a"}


def test_files_by_size_and_digest() -> None:
    other = {"size": 2_003, "sha256": "1" * 64}
    files = {"model.onnx": {"size": 1_013, "sha256": "2" * 64}, "model.onnx.data": other, "new": other}
    found = diff_artifacts(facts(), facts("b", files=files))
    assert found.differs
    assert [(file.name, file.a, file.b, file.same) for file in found.files] == [
        ("model.onnx", 1_011, 1_013, False),
        ("model.onnx.data", 2_003, 2_003, False),
        ("new", None, 2_003, False),
        ("report.json", 307, None, False),
    ]
    assert found.to_text().splitlines()[2:] == [
        "files",
        "  model.onnx: 1,011 bytes -> 1,013 bytes",
        "  model.onnx.data: 2,003 bytes, other content",
        "  new: (none) -> 2,003 bytes",
        "  report.json: 307 bytes -> (none)",
        "  0 more are the same",
    ]


def test_records_of_the_export_make_no_difference() -> None:
    files = MANIFEST["files"] | {"report.json": {"size": 311, "sha256": "1" * 64}}
    found = diff_artifacts(facts(), facts("b", files=files, made_by="ryzen_compile 2"))
    assert not found.differs and not found.files[2].same
    assert found.to_text().splitlines()[2:] == [
        "files",
        "  report.json: 307 bytes -> 311 bytes",
        "  2 more are the same",
        "no difference but in the records of the export",
    ]


def test_graphs_line_by_line_with_context() -> None:
    tail = [node(f"t{i}", "Neg", "b" if i == 0 else f"t{i - 1}") for i in range(7)]
    old = graph(node("a", "MatMul", "x", "w"), node("b", "Relu", "a"), *tail, weights=("w",))
    new = graph(node("a", "MatMul", "x", "w"), node("b", "Gelu", "a"), *tail, weights=("w",))
    found = diff_artifacts(facts("a", old), facts("b", new))
    assert found.operators == {"Gelu": 1, "Relu": -1} and found.differs
    assert found.graph[:2] == ("--- a", "+++ b")
    assert "-%Relu = Relu(%MatMul)  : f32[B,T,7]" in found.graph
    unchanged = [line for line in found.graph if line.startswith(" ")]
    assert len(unchanged) == 2 + 2
    bare = diff_artifacts(facts("a", old), facts("b", new), context=0)
    assert not [line for line in bare.graph if line.startswith(" ")]
    lines = found.to_text().splitlines()
    assert lines[lines.index("operators") :][:4] == ["operators", "  Gelu: +1", "  Relu: -1", "graph"]


def test_what_a_stranger_wrote_stays_on_its_line() -> None:
    name = "evil\n\x1b[2J<b>\ud800"
    hostile = changed("source", **{name: name}) | {"recipe": 7, "versions": [], "passes": None}
    found = diff_artifacts(
        facts(), facts(f"b{name}", **hostile, files=MANIFEST["files"] | {name: {"size": 1, "sha256": DIGEST}})
    )
    text = found.to_text()
    assert all(line.isprintable() for line in text.splitlines())
    assert text.count("<b>") == 4  # the artifact, the setting, its value and the file
    text.encode("utf-8")
    found.model_dump_json()
    assert Difference(what="", b=7, only="b") in found.recipe


def test_long_values_are_cut_in_text_only() -> None:
    found = diff_artifacts(facts(), facts("b", **changed("source", name="x" * 10_000)))
    assert len(found.source[0].b) == 10_000
    assert max(map(len, found.to_text().splitlines())) < 300


def test_settings_nested_without_end() -> None:
    deep: Any = 1
    for _ in range(900):
        deep = {"a": deep}
    found = diff_artifacts(facts(), facts("b", recipe=deep))
    assert found.differs and found.recipe[0].b == "1 entries"
