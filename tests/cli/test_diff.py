"""``diff`` from the command line, on real artifacts; and the graphs that ``export`` writes after each pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from ryzen_compile import cli
from ryzen_compile.api import export
from ryzen_compile.config import Recipe
from ryzen_compile.manifest import MANIFEST_NAME
from ryzen_compile.pipeline import default_passes
from tests.model_directory import listing, shared_artifact, shared_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_model(tmp_path_factory)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_artifact(tmp_path_factory)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The same model for scoring text: every token's logits, and half of the positions."""
    out = tmp_path_factory.mktemp("other") / "out"
    export(model, out, "fp32", context=80, logits="all", verify=False)
    return out


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The first artifact once more, with the graphs after each pass beside it."""
    out = tmp_path_factory.mktemp("again") / "out"
    options = ("--recipe", "fp32", "--no-verify", "-q", "--dump-passes", out.parent / "graphs")
    assert cli.main([str(word) for word in ("export", model, out, *options)]) == 0
    return out


def test_an_artifact_and_its_copy(run: Any, artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    status, out, err = run("diff", artifact, tmp_path / "copy", "--exit-code")
    assert (status, out, err) == (0, f"--- {artifact}\n+++ {tmp_path / 'copy'}\nno difference\n", "")


def test_a_second_export_does_not_differ(run: Any, again: Path, artifact: Path) -> None:
    status, out, _ = run("diff", artifact, again, "--exit-code")
    assert status == 0 and out.splitlines()[-1] == "no difference but in the records of the export", out


def test_what_differs_is_listed_and_is_no_failure(run: Any, artifact: Path, other: Path) -> None:
    before = listing(artifact), listing(other)
    status, out, err = run("diff", artifact, other)
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert {"recipe", "passes", "spec", "files", "graph"} <= set(lines) and "source" not in lines
    assert '  logits: "last" -> "all"' in lines and "  context: null -> 80" in lines and "  context: 160 -> 80" in lines
    assert "  prune_logits: 1 -> (none)" in lines
    start = lines.index("graph") + 1
    assert lines[start : start + 2] == [f"--- {artifact}", f"+++ {other}"]
    changed = [line for line in lines[start + 2 :] if line[0] in "+-"]
    assert changed and all("lm_head" in line or "output" in line or "norm" in line for line in changed[-3:])
    assert (listing(artifact), listing(other)) == before


def test_exit_code_and_context(run: Any, artifact: Path, other: Path) -> None:
    assert run("diff", artifact, other, "--exit-code")[0] == 7
    status, out, _ = run("diff", artifact, other, "--context", 0)
    graph = out.splitlines()[out.splitlines().index("graph") + 1 :]
    assert status == 0 and all(line[0] in "+-@" for line in graph)
    status, _, err = run("diff", artifact, other, "--context", -1)
    assert status == 2 and "error[usage]" in err


def test_as_json(run: Any, artifact: Path, other: Path) -> None:
    status, out, err = run("diff", artifact, other, "--json", "--exit-code")
    found = json.loads(out)
    assert (status, err) == (7, "") and found["differs"] is True
    assert {"what": "logits", "a": "last", "b": "all", "only": ""} in found["recipe"]
    files = {file["name"]: file for file in found["files"]}
    assert files["tokenizer.json"]["same"] and not files["model.onnx"]["same"]
    assert files["model.onnx.data"]["a"] == (artifact / "model.onnx.data").stat().st_size
    assert found["cache"] == [] and sum(found["operators"].values()) < 0  # the slice before the head is gone
    assert any(line.startswith("@@") for line in found["graph"])
    again = json.loads(run("diff", artifact, artifact, "--json")[1])
    assert again["differs"] is False and again["graph"] == []


def test_what_is_no_artifact_is_refused(run: Any, artifact: Path, tmp_path: Path) -> None:
    status, out, err = run("diff", artifact, tmp_path)
    assert (status, out) == (3, "") and MANIFEST_NAME in err
    shutil.copytree(artifact, tmp_path / "bad")
    (tmp_path / "bad" / "model.onnx").write_bytes(b"short")
    status, out, err = run("diff", tmp_path / "bad", artifact)
    assert (status, out) == (4, "") and "model.onnx" in err


# --- the graphs that export writes ------------------------------------------------------------------------------------
def test_export_draws_the_graph_after_each_pass(again: Path) -> None:
    graphs = again.parent / "graphs"
    names = ["captured", *(pass_.name for pass_ in default_passes(Recipe()))]
    files = sorted(path.name for path in graphs.iterdir())
    assert files == [f"{number:02d}_{name}.onnx" for number, name in enumerate(names)]
    last = onnx.load(graphs / files[-1])
    assert sum(node.op_type == "cached_attention" for node in last.graph.node) == 2
    assert {path.name for path in again.parent.iterdir()} == {"out", "graphs"}


def test_where_the_graphs_cannot_go(run: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    out = tmp_path / "out"
    for directory, why in ((tmp_path / "full", "not empty"), (out, "inside the output"), (out / "graphs", "inside")):
        status, _, err = run("export", model, out, "--dump-passes", directory)
        assert status == 2 and why in err, err
        assert not out.exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
