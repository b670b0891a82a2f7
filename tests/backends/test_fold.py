"""Folding: right values, nothing computed before it is written, one tensor at a time, the same bytes every time."""

from __future__ import annotations

import hashlib
import tracemalloc

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from ryzen_compile.backends.onnxruntime import fold
from ryzen_compile.backends.onnxruntime.emit import Emitter
from ryzen_compile.backends.onnxruntime.weights_file import WeightsFiles

W = np.arange(24, dtype=np.float32).reshape(4, 6) / 7 + 1
V = np.linspace(-1, 2, 24, dtype=np.float32).reshape(4, 6)


class Weights:
    """A graph over initializers that counts how often they are read."""

    def __init__(self, **arrays: np.ndarray) -> None:
        self.reads = 0
        self.values = {name: self._value(name, array) for name, array in arrays.items()}

    def _value(self, name: str, array: np.ndarray) -> ir.Value:
        def read() -> ir.Tensor:
            self.reads += 1
            return ir.Tensor(array)

        dtype = ir.DataType.from_numpy(array.dtype)
        tensor = ir.LazyTensor(read, dtype, ir.Shape(array.shape), name=name)
        return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)

    def model(self, emitter: Emitter, *results: ir.Value) -> ir.Model:
        """Every result is added to an input ``x``, so that none of them is an output itself."""
        x = ir.Value(name="x", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT))
        outs = [emitter.op("Add", emitter.op("Cast", result, to=ir.DataType.FLOAT), x) for result in results]
        for index, out in enumerate(outs):
            out.name, out.type = f"out_{index}", ir.TensorType(ir.DataType.FLOAT)
        nodes = emitter.drain()
        constants = [node for node in nodes if node.op_type == "Constant"]
        initializers = list(self.values.values())
        for index, node in enumerate(constants):
            tensor = node.attributes["value"].as_tensor()
            value = ir.Value(
                name=f"c_{index}", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            node.outputs[0].replace_all_uses_with(value)
            initializers.append(value)
        kept = [node for node in nodes if node.op_type != "Constant"]
        imports = {"": 21, "com.microsoft": 1}
        graph = ir.Graph([x], outs, nodes=kept, initializers=initializers, opset_imports=imports, name="g")
        return ir.Model(graph, ir_version=10)


def expressions(e: Emitter, w: ir.Value, v: ir.Value) -> list[ir.Value]:
    """One of each kind of node that folds; the first of several results is the plainest."""
    ints, end = e.ints, np.iinfo(np.int64).max
    seven = e.op("Concat", w, e.op("Slice", v, ints(0), ints(1), ints(1)), axis=1)
    uneven = e.ops("Split", seven, outputs=3, axis=1, num_outputs=3)
    given = e.ops("Split", w, ints(1, 3), outputs=2, axis=0)
    return [
        e.op("Transpose", w, perm=[1, 0]),
        e.op("Transpose", e.op("Unsqueeze", w, ints(0))),
        e.op("Concat", w, v, w, axis=-1),
        e.op("Slice", w, ints(1, -4), ints(end, -1), ints(0, 1)),
        e.op("Slice", w, ints(-1), ints(-end), ints(1), ints(-2)),
        e.op("Slice", w, ints(0), ints(3)),
        e.op("Reshape", w, ints(2, -1, 3)),
        e.op("Reshape", w, ints(0, 2, -1)),
        e.op("Squeeze", e.op("Unsqueeze", w, ints(0, -1)), ints(0)),
        e.op("Squeeze", e.op("Unsqueeze", w, ints(1))),
        e.op("Expand", e.op("Slice", w, ints(0), ints(1), ints(0)), ints(3, 1, 6)),
        e.op("Gather", w, ints(3, 0, 0), axis=0),
        e.op("Gather", w, e.constant(2, np.int64), axis=1),
        e.op("Cast", w, to=ir.DataType.INT32),
        e.op("Identity", w),
        *(e.op(name, w) for name in ("Neg", "Abs", "Exp", "Sqrt", "Reciprocal")),
        *(e.op(name, w, v) for name in ("Add", "Sub", "Mul", "Div")),
        e.op("Pow", w, e.constant(2.0)),
        e.op("Add", w, e.constant(1.0)),
        e.op("Transpose", e.op("Concat", e.op("Mul", w, v), w, axis=0), perm=[1, 0]),
        *uneven,
        *given,
    ]


def run(path) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(path, options).run(None, {"x": np.zeros((), np.float32)})


def test_every_kind_of_node_folds_to_what_the_runtime_computes(tmp_path):
    results = {}
    for folding in (False, True):
        weights, emitter = Weights(w=W, v=V), Emitter()
        model = weights.model(emitter, *expressions(emitter, weights.values["w"], weights.values["v"]))
        if folding:
            assert fold.fold_constants(model.graph) > 30
            assert {node.op_type for node in model.graph} == {"Add"}
        directory = tmp_path / str(folding)
        directory.mkdir()
        WeightsFiles(directory).write(model, "model.onnx")
        results[folding] = run(directory / "model.onnx")
    for index, (plain, folded) in enumerate(zip(results[False], results[True], strict=True)):
        np.testing.assert_allclose(folded, plain, rtol=1e-6, atol=1e-7, err_msg=f"expression {index}")


def test_integer_division_is_left_to_the_runtime():
    weights, emitter = Weights(w=np.array([-3, 3])), Emitter()
    model = weights.model(emitter, emitter.op("Div", weights.values["w"], emitter.constant(2, np.int64)))
    fold.fold_constants(model.graph)
    assert next(node.op_type for node in model.graph) == "Div"


def test_what_reads_an_input_stays():
    weights, emitter = Weights(w=W), Emitter()
    model = weights.model(emitter, emitter.op("Relu", weights.values["w"]), weights.values["w"])
    fold.fold_constants(model.graph)
    assert sorted(node.op_type for node in model.graph) == ["Add", "Add", "Cast", "Relu"]


def merged(weights: Weights, layers: int) -> ir.Model:
    emitter = Emitter()
    named = weights.values
    results = [
        emitter.op("Transpose", emitter.op("Concat", named[f"q{i}"], named[f"k{i}"], axis=0), perm=[1, 0])
        for i in range(layers)
    ]
    return weights.model(emitter, *results)


def test_nothing_is_computed_until_written_and_sources_are_dropped(tmp_path):
    weights = Weights(q0=W, k0=V)
    model = merged(weights, 1)
    fold.fold_constants(model.graph)
    assert weights.reads == 0
    (name,) = model.graph.initializers
    assert model.graph.initializers[name].shape == ir.Shape([6, 8])
    WeightsFiles(tmp_path).write(model, "model.onnx")
    assert weights.reads == 2
    np.testing.assert_array_equal(run(tmp_path / "model.onnx")[0], np.concatenate((W, V)).T)


def test_writing_takes_memory_for_about_one_tensor(tmp_path):
    layers, half = 6, np.ones((256, 512), np.float32)
    weights = Weights(**{f"{half_name}{i}": (i + 1) * half for i in range(layers) for half_name in "qk"})
    model = merged(weights, layers)
    fold.fold_constants(model.graph)
    tracemalloc.start()
    WeightsFiles(tmp_path).write(model, "model.onnx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "model.onnx.data").stat().st_size == layers * 2 * half.nbytes
    assert peak < 2.5 * 2 * half.nbytes  # the joined tensor, its transpose, and the file's small change


def test_the_file_is_aligned_and_the_same_every_time(decoder, tmp_path):
    from ryzen_compile.backends.onnxruntime.lowering import lower

    digests = set()
    for attempt in ("a", "b"):
        (tmp_path / attempt).mkdir()
        WeightsFiles(tmp_path / attempt).write(lower(decoder), "model.onnx")
        files = sorted((tmp_path / attempt).iterdir())
        assert [file.name for file in files] == ["model.onnx", "model.onnx.data"]
        digests.add(tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))
    assert len(digests) == 1
    model = ir.load(tmp_path / "a" / "model.onnx")
    external = [
        v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)
    ]
    assert external
    assert all(tensor.offset % 4096 == 0 for tensor in external)


@pytest.mark.parametrize("parts", [("q0",), ("q0", "k0")])
def test_folding_twice_changes_nothing(parts):
    weights, emitter = Weights(**dict.fromkeys(parts, W)), Emitter()
    model = weights.model(emitter, *(emitter.op("Neg", weights.values[part]) for part in parts))
    assert fold.fold_constants(model.graph) == 2 * len(parts)  # the negation, and the cast after it
    assert fold.fold_constants(model.graph) == 0
