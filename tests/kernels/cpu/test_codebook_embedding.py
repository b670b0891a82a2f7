"""CodebookEmbedding against a lookup in NumPy: every instruction set must give exactly its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper

V = 23


@dataclass(frozen=True)
class Table:
    """Random codes and codebooks; ``rows`` is what they stand for."""

    bits: int
    dim: int
    stages: int
    width: int
    scale_group: int | None = None  # None: no scales; 0: one for a row

    @property
    def attributes(self) -> dict[str, int]:
        names = ("bits", "dim", "stages", "width")
        return {name: getattr(self, name) for name in names} | {"scale_group": self.scale_group or 0}

    def stored(self) -> tuple[dict[str, np.ndarray[Any, Any]], np.ndarray]:
        """The operator's constants, and the decoded table."""
        rng = np.random.default_rng(self.bits * 1000 + self.width)
        groups = self.width // self.dim
        codes = rng.integers(0, 1 << self.bits, (V, self.stages, groups))
        bits = (codes.reshape(V, -1, 1) >> np.arange(self.bits)) & 1
        packed = np.packbits(bits.reshape(V, -1).astype(np.uint8), axis=1, bitorder="little")
        codebook = rng.standard_normal((self.stages, 1 << self.bits, self.dim)).astype(np.float32)
        rows = codebook[0][codes[:, 0]]
        if self.stages == 2:
            rows = rows + codebook[1][codes[:, 1]]
        rows = rows.reshape(V, self.width)
        constants = {"codes": packed, "codebook": codebook}
        if self.scale_group is not None:
            shape = (V, -(-self.width // self.scale_group)) if self.scale_group else (V,)
            scales = constants["scales"] = rng.standard_normal(shape).astype(np.float32)
            each = np.repeat(scales, self.scale_group, axis=1)[:, : self.width] if self.scale_group else scales[:, None]
            rows = rows * each
        return constants, rows


def model_of(
    one_node: Callable[..., ModelProto],
    constants: dict[str, np.ndarray[Any, Any]],
    ids: int = TensorProto.INT64,
    fed: tuple[str, ...] = (),
    **attributes: Any,
) -> ModelProto:
    """What is in ``fed`` is an input of the graph, not an initializer."""
    node = helper.make_node("CodebookEmbedding", ["ids", *constants], ["out"], domain="ryzen", **attributes)
    kinds = {name: helper.np_dtype_to_tensor_dtype(constants[name].dtype) for name in fed}
    kept = {name: array for name, array in constants.items() if name not in fed}
    return one_node(node, {"ids": ids, **kinds}, {"out": TensorProto.FLOAT}, kept)


TABLES = [
    *(Table(bits, dim, stages, 37 * dim) for bits in range(1, 9) for dim in (1, 2, 4, 8) for stages in (1, 2)),
    *(Table(4, 1, 2, width, 32) for width in (1, 2, 7, 15, 16, 17, 64, 511, 512, 513, 1031)),
    Table(8, 8, 1, 896, 0),
    Table(8, 4, 2, 896, 128),
    Table(3, 1, 1, 100, 7),
    Table(5, 2, 2, 2, 1),
]


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_equals_a_lookup(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
    table: Table,
) -> None:
    constants, rows = table.stored()
    ids = np.random.default_rng(0).integers(0, V, (2, 9))
    ids[0, :2] = (0, V - 1)
    session = open_session(model_of(one_node, constants, **table.attributes, isa=isa))
    np.testing.assert_array_equal(session.run(None, {"ids": ids})[0], rows[ids])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 1, 3, 1, 2)])
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_ids_of_any_shape(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    shape: tuple[int, ...],
    kind: type,
) -> None:
    table = Table(4, 2, 1, 18, 0)
    constants, rows = table.stored()
    ids = np.random.default_rng(0).integers(0, V, shape).astype(kind)
    element = helper.np_dtype_to_tensor_dtype(ids.dtype)
    session = open_session(model_of(one_node, constants, element, ("codebook", "scales"), **table.attributes))
    fed = {name: constants[name] for name in ("codebook", "scales")}
    out = session.run(None, {"ids": ids, **fed})[0]
    assert out.shape == (*shape, 18)
    np.testing.assert_array_equal(out, rows[ids])


def test_threads_and_guard_bands(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
) -> None:
    for table in (Table(3, 1, 2, 517, 48), Table(8, 8, 1, 8, 0)):
        constants, rows = table.stored()
        ids = np.random.default_rng(0).integers(0, V, 403)
        model = model_of(one_node, constants, **table.attributes, isa=isa)
        for threads in (1, 2):
            session = open_session(model, threads)
            held = np.full(ids.size * table.width + 128, 77, np.float32)
            binding = session.io_binding()
            binding.bind_cpu_input("ids", ids)
            binding.bind_output("out", "cpu", 0, np.float32, [ids.size, table.width], held[64:].ctypes.data)
            session.run_with_iobinding(binding)
            np.testing.assert_array_equal(held[64:-64].reshape(rows[ids].shape), rows[ids])
            assert (held[:64] == 77).all() and (held[-64:] == 77).all()


@pytest.mark.parametrize("bad", [-1, V, 2**31 - 1, -(2**31), 2**62])
def test_ids_outside_of_the_table_are_an_error(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
    bad: int,
) -> None:
    table = Table(4, 1, 1, 20)
    constants, rows = table.stored()
    session = open_session(model_of(one_node, constants, **table.attributes, isa=isa))
    with pytest.raises(Exception, match=f"id {bad} at place 1 is outside"):
        session.run(None, {"ids": np.array([0, bad, 1])})
    np.testing.assert_array_equal(session.run(None, {"ids": np.array([2])})[0], rows[[2]])


@pytest.mark.parametrize(
    ("attributes", "part"),
    [
        ({"bits": 0}, "bits"),
        ({"bits": 9}, "bits"),
        ({"bits": 5}, "codes has the shape"),
        ({"dim": 3}, "dim is 3"),
        ({"dim": 0}, "dim is 0"),
        ({"dim": 4}, "codes has the shape"),
        ({"stages": 3}, "stages is 3"),
        ({"stages": 1}, "codes has the shape"),
        ({"width": 21}, "multiple of dim"),
        ({"width": -20}, "width is -20"),
        ({"width": 2**62}, "width is"),
        ({"width": 24}, "codes has the shape"),
        ({"scale_group": -1}, "scale_group"),
        ({"scale_group": 5}, "scales has the shape"),
        ({"scale_group": 0}, "scales has the shape"),
        ({"isa": "neon"}, "isa is 'neon'"),
    ],
)
def test_refused_when_the_session_is_made(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    attributes: dict[str, Any],
    part: str,
) -> None:
    table = Table(4, 2, 2, 20, 8)
    constants, _ = table.stored()
    open_session(model_of(one_node, constants, **table.attributes))
    with pytest.raises(Exception, match=part):
        open_session(model_of(one_node, constants, **{**table.attributes, **attributes}))


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("codes", np.zeros((V, 9), np.uint8)),
        ("codes", np.zeros(V * 10, np.uint8)),
        ("codebook", np.zeros((2, 15, 2), np.float32)),
        ("codebook", np.zeros((1, 16, 2), np.float32)),
        ("scales", np.zeros((V - 1, 3), np.float32)),
        ("scales", np.zeros((V, 2), np.float32)),
    ],
)
@pytest.mark.parametrize("fed", [False, True])
def test_tensors_that_lie_are_refused(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    name: str,
    array: np.ndarray,
    fed: bool,
) -> None:
    """Initializers when the session is made, what the graph computes when it runs."""
    table = Table(4, 2, 2, 20, 8)
    constants = {**table.stored()[0], name: array}
    model = model_of(one_node, constants, fed=(name,) if fed else (), **table.attributes)
    with pytest.raises(Exception, match=f"{name} has the shape"):
        open_session(model).run(None, {"ids": np.array([0]), name: array})


def test_ids_of_another_type(
    one_node: Callable[..., ModelProto], open_session: Callable[..., onnxruntime.InferenceSession]
) -> None:
    table = Table(4, 1, 1, 20)
    session = open_session(model_of(one_node, table.stored()[0], TensorProto.FLOAT, **table.attributes))
    with pytest.raises(Exception, match="ids has elements"):
        session.run(None, {"ids": np.zeros(2, np.float32)})
