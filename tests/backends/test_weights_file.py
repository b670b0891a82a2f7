"""The data file: equal bytes once, aligned, reproducible, and the model in memory is left as it was."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from ryzen_compile.backends.onnxruntime.weights_file import ALIGNMENT, WeightsFiles

TABLE = np.arange(4096, dtype=np.uint8).reshape(64, 64)


def model_of(**arrays: np.ndarray) -> ir.Model:
    """A model that returns each array through an Identity."""
    nodes, values = [], []
    for name, array in arrays.items():
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        values.append(value)
        node = ir.node("Identity", [value])
        node.outputs[0].name = f"{name}_out"
        node.outputs[0].shape, node.outputs[0].dtype = value.shape, value.dtype
        nodes.append(node)
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def places(path) -> dict[str, dict[str, str]]:
    tensors = onnx.load(str(path), load_external_data=False).graph.initializer
    return {t.name: {e.key: e.value for e in t.external_data} for t in tensors}


def run(path) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {})


def test_equal_bytes_are_stored_once_whatever_their_shape(tmp_path):
    path = WeightsFiles(tmp_path).write(model_of(a=TABLE, b=TABLE.reshape(16, 256), c=TABLE + 1), "model.onnx")
    found = places(path)
    assert found["a"] == found["b"] != found["c"]
    assert (tmp_path / "model.onnx.data").stat().st_size == 2 * TABLE.nbytes
    for got, want in zip(run(path), (TABLE, TABLE.reshape(16, 256), TABLE + 1), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_second_model_reads_what_the_first_has_stored(tmp_path):
    files = WeightsFiles(tmp_path)
    files.write(model_of(a=TABLE), "model.onnx")
    path = files.write(model_of(x=TABLE, y=TABLE[:8] + 3), "prefill.onnx")
    found = places(path)
    assert found["x"]["location"] == "model.onnx.data" and found["y"]["location"] == "prefill.onnx.data"
    np.testing.assert_array_equal(run(path)[0], TABLE)


def test_a_second_model_with_nothing_of_its_own_has_no_data_file(tmp_path):
    files = WeightsFiles(tmp_path)
    files.write(model_of(a=TABLE), "model.onnx")
    files.write(model_of(x=TABLE), "prefill.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data", "prefill.onnx"]


def test_offsets_are_aligned_and_files_reproducible(tmp_path):
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = WeightsFiles(tmp_path / name).write(model_of(a=TABLE[:5], b=TABLE[:7]), "model.onnx")
        assert all(int(place["offset"]) % ALIGNMENT == 0 for place in places(path).values())
        written.append((path.read_bytes(), path.with_name("model.onnx.data").read_bytes()))
    assert written[0] == written[1]


def test_small_tensors_stay_inside_the_model(tmp_path):
    path = WeightsFiles(tmp_path).write(model_of(a=TABLE[:1]), "model.onnx")
    assert places(path) == {"a": {}} and not (tmp_path / "model.onnx.data").exists()


def test_the_model_in_memory_keeps_its_tensors_even_after_a_failure(tmp_path):
    class Broken(ir.LazyTensor):
        def numpy(self):
            raise RuntimeError("no such weight")

    model = model_of(a=TABLE, b=TABLE + 1)
    kept = model.graph.initializers["a"].const_value
    model.graph.initializers["b"].const_value = Broken(lambda: None, ir.DataType.UINT8, ir.Shape([64, 64]))
    with pytest.raises(RuntimeError, match="no such weight"):
        WeightsFiles(tmp_path).write(model, "model.onnx")
    assert model.graph.initializers["a"].const_value is kept
