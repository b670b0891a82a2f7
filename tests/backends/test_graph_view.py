"""The view of an artifact's graph: from the model file alone, checked first, without a value in it."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ryzen_compile.backends.onnxruntime.graph_view import artifact_facts, view_onnx
from ryzen_compile.errors import ArtifactError, TamperedError
from ryzen_compile.graphs.text import canonical_text
from ryzen_compile.graphs.view import plain
from ryzen_compile.manifest import MANIFEST_NAME, read_manifest
from tests.model_directory import shared_artifact

HOSTILE = "a\nb/<script>\u202e"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_artifact(tmp_path_factory)


def test_an_artifact_s_graph(artifact: Path) -> None:
    view = view_onnx(artifact / "model.onnx")
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    assert [n.name for n in view.nodes] == [n.name for n in model.graph.node]
    wanted = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph.node)
    assert Counter(n.op for n in view.nodes) == wanted and wanted["com.microsoft::GroupQueryAttention"] == 2
    assert [value.name for value in view.inputs] == [v.name for v in model.graph.input]
    assert len(view.weights) == len(model.graph.initializer)
    labels = {w.label for w in view.weights}
    assert "model.embed_tokens.weight" in labels
    attention = next(n for n in view.nodes if n.op.endswith("GroupQueryAttention"))
    assert attention.module == "model.layers.0.self_attn" and dict(attention.attributes)["num_heads"] == "4"
    lines = canonical_text(view)
    assert any(line.startswith("%0.self_attn.GroupQueryAttention = ") for line in lines)
    assert len(set(lines)) == len(lines) and all(line.isprintable() for line in lines)


def test_weights_are_not_read(artifact: Path, tmp_path: Path) -> None:
    before = canonical_text(view_onnx(artifact / "model.onnx"))
    shutil.copytree(artifact, tmp_path / "out")
    data = tmp_path / "out" / "model.onnx.data"
    size = data.stat().st_size
    data.write_bytes(bytes(size))
    assert canonical_text(view_onnx(tmp_path / "out" / "model.onnx")) == before
    data.write_bytes(bytes(size - 4096))  # checked all the same
    with pytest.raises(TamperedError):
        view_onnx(tmp_path / "out" / "model.onnx")


def test_the_facts_of_an_artifact(artifact: Path, tmp_path: Path) -> None:
    facts = artifact_facts(artifact)
    assert facts.name == str(artifact) and facts.manifest == read_manifest(artifact)
    assert (
        facts.token_bytes == 2 * 2 * 2 * 16 * 4 and facts.sequence_bytes == 0
    )  # layers, halves, heads, width, float32
    shutil.copytree(artifact, tmp_path / "out")
    with (tmp_path / "out" / "config.json").open("a") as stream:
        stream.write("\n")
    with pytest.raises(TamperedError, match=r"config\.json"):
        artifact_facts(tmp_path / "out")
    (tmp_path / "out" / MANIFEST_NAME).unlink()
    with pytest.raises(ArtifactError, match="holds no"):
        artifact_facts(tmp_path / "out")


def save(path: Path, constant: list[int] | None = None, *, hostile: bool = False) -> Path:
    """A small model with a function, a constant beside its nodes and one inside of them."""
    inside = numpy_helper.from_array(np.array([0.25], np.float32))
    nodes = [
        helper.make_node("Constant", [], ["scale"], name="model.layers.0.mlp/Constant", value=inside),
        helper.make_node("Mul", ["x", "scale"], ["y"], name="model.layers.0.mlp/Mul"),
        helper.make_node("twice", ["y"], ["z"], name="model.layers.0.mlp/twice", domain="local"),
        helper.make_node("Reshape", ["z", "shape"], ["flat"], name=HOSTILE if hostile else "model/Reshape"),
        helper.make_node(
            "LayerNormalization", ["flat", "flat", ""], ["out", "", "root"], "norm/Norm", axis=-1, epsilon=0.1
        ),
        helper.make_node("Neg", ["root"], ["unused"]),
    ]
    shape = numpy_helper.from_array(np.array(constant or [0, -1], np.int64), "shape")
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [HOSTILE if hostile else "batch", None, 3])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [shape],
    )
    body = helper.make_function("local", "twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])],
                                [helper.make_opsetid("", 21)])  # fmt: skip
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    onnx.save(helper.make_model(graph, functions=[body], opset_imports=imports, ir_version=10), path)
    return path


def test_functions_constants_and_parts_left_out(tmp_path: Path) -> None:
    view = view_onnx(save(tmp_path / "m.onnx"))
    lines = canonical_text(view)
    constant = next(w for w in view.weights).label
    assert constant.startswith("i64[2]~") and len(constant) == len("i64[2]~123456")
    norm = "%norm.LayerNormalization"
    inside = dict(view.nodes[0].attributes)["value"]
    assert inside.startswith("f32[1]~") and "0.25" not in "\n".join(lines)
    assert lines == [
        "input %x : f32[batch,?,3]",
        f"%0.mlp.Constant = Constant(value={inside})  : ?  # model.layers.0.mlp",
        "%0.mlp.Mul = Mul(%x, %0.mlp.Constant)  : ?  # model.layers.0.mlp",
        "%0.mlp.twice = local::twice(%0.mlp.Mul)  : ?  # model.layers.0.mlp",
        f"weight @{constant} : i64[2]",
        f"%model.Reshape = Reshape(%0.mlp.twice, @{constant})  : ?  # model",
        f"{norm} = LayerNormalization(%model.Reshape, %model.Reshape, -, axis=-1, epsilon=0.1)  : f32, ?  # norm",
        f"%Neg = Neg({norm}.2)  : ?",
        f"output {norm}.0",
        "function local::twice:",
        "  input %a : ?",
        "  %Add = Add(%a, %a)  : ?",
        "  output %Add",
    ]


def test_a_constant_is_called_by_its_content(tmp_path: Path) -> None:
    texts = [
        canonical_text(view_onnx(save(tmp_path / f"{i}.onnx", c))) for i, c in enumerate(([0, -1], [0, -1], [-1, 3]))
    ]
    assert texts[0] == texts[1]
    assert sum(a != b for a, b in zip(texts[0], texts[2], strict=True)) == 2  # it, and its reader


def test_a_hostile_model_stays_on_its_lines(tmp_path: Path) -> None:
    lines = canonical_text(view_onnx(save(tmp_path / "m.onnx", hostile=True)))
    assert all(line.isprintable() for line in lines)
    assert lines[0] == f"input %x : f32[{plain(HOSTILE)},?,3]"
    assert sum("a\\nb" in line for line in lines) == 3  # the size, the node by its module, and its reader


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(ArtifactError, match="is empty"):
        view_onnx(tmp_path / "m.onnx")
