"""ryzen::SparseMatMulNBits is ryzen::MatMulNBits over the activations that its threshold leaves, to the bit.

What MatMulNBits computes is held to float64 in its own tests. Skipped channels, their order, and how many rows are
multiplied at a time must not change a single bit: all comparisons here are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

FLOAT = TensorProto.FLOAT
REFUSALS = (Fail, InvalidArgument, RuntimeException)
ROWS = (1, 2, 3, 4, 5, 9)  # with active channels alone up to 4
Array = np.ndarray[Any, Any]
Sessions = Callable[..., onnxruntime.InferenceSession]


def weights(rows: int, depth: int, bits: int, block: int, zeros: bool, bias: bool) -> dict[str, Array]:
    random = np.random.default_rng(rows * depth + bits)
    blocks = -(-depth // block)
    found = {
        "B": random.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8),
        "scales": random.normal(0, 0.02, (rows, blocks)).astype(np.float32),
    }
    if zeros:
        found["zeros"] = random.integers(0, 256, (rows, -(-blocks * bits // 8)), np.uint8)
    if bias:
        found["bias"] = random.standard_normal(rows).astype(np.float32)
    return found


def activations(rows: int, depth: int) -> Array:
    x = np.random.default_rng(rows + depth).standard_normal((rows, depth)).astype(np.float32)
    x[:, ::7] *= 9  # what rounds to 0 beside these is skipped, too
    return x


def kept(x: Array, threshold: float) -> Array:
    return np.where(np.abs(x) < np.float32(threshold), np.float32(0), x)


@pytest.fixture(scope="module")
def session(open_session: Sessions, one_node: Callable[..., ModelProto]) -> Callable[..., onnxruntime.InferenceSession]:
    """``session(operator, constants, N, K, bits, block, residual=, threads=, **attributes)``: x -> y."""

    def made(
        operator: str,
        constants: dict[str, Array],
        shape: tuple[int, int, int, int],
        residual: bool = False,
        threads: int = 1,
        **attributes: Any,
    ) -> onnxruntime.InferenceSession:
        settings = dict(zip(("N", "K", "bits", "block_size"), shape, strict=True)) | attributes
        names = ["x", "B", "scales", "zeros" if "zeros" in constants else "", ""]
        names += ["bias" if "bias" in constants else "", *(["residual"] if residual else [])]
        node = helper.make_node(operator, names, ["y"], domain="ryzen", **settings)
        inputs = {"x": FLOAT} | ({"residual": FLOAT} if residual else {})
        return open_session(one_node(node, inputs, {"y": FLOAT}, constants), threads)

    return made


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("rows", "depth", "block"), [(1, 1, 32), (33, 97, 32), (130, 515, 256), (64, 192, 96), (1030, 300, 128)]
)
def test_is_the_dense_product_of_what_is_kept(
    session: Sessions, isa: str, bits: int, zeros: bool, rows: int, depth: int, block: int
) -> None:
    constants, shape = weights(rows, depth, bits, block, zeros, bias=zeros), (rows, depth, bits, block)
    dense = session("MatMulNBits", constants, shape, isa=isa, accuracy_level=4)
    for threshold in (0.0, 0.7, 3.0):
        sparse = session("SparseMatMulNBits", constants, shape, isa=isa, accuracy_level=4, threshold=threshold)
        for count in ROWS:
            x = activations(count, depth)
            y = sparse.run(None, {"x": x})[0]
            wanted = dense.run(None, {"x": kept(x, threshold)})[0]
            assert y.tobytes() == wanted.tobytes(), (threshold, count)


@pytest.mark.parametrize("columns", [1, 15, 17, 100, 513])
def test_gates_and_residuals(session: Sessions, isa: str, columns: int) -> None:
    for gated in (0, 1):
        rows, depth = columns * (1 + gated), 160
        constants, shape = weights(rows, depth, 4, 32, False, bias=True), (rows, depth, 4, 32)
        facts = {"isa": isa, "gated": gated, "activation": "silu", "residual": True}
        dense = session("MatMulNBits", constants, shape, **facts)
        sparse = session("SparseMatMulNBits", constants, shape, threshold=1.0, **facts)
        for count in ROWS:
            x, residual = activations(count, depth), activations(count, columns)
            y = sparse.run(None, {"x": x, "residual": residual})[0]
            wanted = dense.run(None, {"x": kept(x, 1.0), "residual": residual})[0]
            assert y.tobytes() == wanted.tobytes(), (gated, count)


def test_blocks_and_rows_of_nothing(session: Sessions, isa: str) -> None:
    """A block without active channels, one with a single one, and a row that is not a number."""
    constants, shape = weights(40, 256, 4, 64, False, bias=False), (40, 256, 4, 64)
    dense, sparse = (session(name, constants, shape, isa=isa) for name in ("MatMulNBits", "SparseMatMulNBits"))
    x = np.zeros((3, 256), np.float32)
    x[0, 100] = 2.5
    x[1, 70] = np.nan
    for rows in (x[:1], x[2:], x):
        y, wanted = sparse.run(None, {"x": rows})[0], dense.run(None, {"x": rows})[0]
        assert np.array_equal(y, wanted, equal_nan=True)
    assert not sparse.run(None, {"x": x[2:]})[0].any()
    assert np.isnan(sparse.run(None, {"x": x})[0][1]).all()


def test_what_is_at_the_threshold_is_kept(session: Sessions, isa: str) -> None:
    constants, shape = weights(33, 32, 8, 32, False, bias=False), (33, 32, 8, 32)
    x = np.full((1, 32), 0.5, np.float32)
    assert session("SparseMatMulNBits", constants, shape, isa=isa, threshold=0.5).run(None, {"x": x})[0].any()
    above = float(np.nextafter(np.float32(0.5), np.float32(1)))
    assert not session("SparseMatMulNBits", constants, shape, isa=isa, threshold=above).run(None, {"x": x})[0].any()


def test_threads_change_nothing(session: Sessions) -> None:
    constants, shape = weights(3000, 515, 4, 128, True, bias=True), (3000, 515, 4, 128)
    alone = session("SparseMatMulNBits", constants, shape, threshold=0.9)
    together = session("SparseMatMulNBits", constants, shape, threshold=0.9, threads=3)
    for count in (1, 3, 130):
        x = activations(count, 515)
        assert alone.run(None, {"x": x})[0].tobytes() == together.run(None, {"x": x})[0].tobytes()


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf"), 1])
def test_a_threshold_that_is_none_is_refused(session: Sessions, threshold: float) -> None:
    constants, shape = weights(4, 32, 4, 32, False, bias=False), (4, 32, 4, 32)
    with pytest.raises(REFUSALS, match="threshold"):
        session("SparseMatMulNBits", constants, shape, threshold=threshold)


def test_activations_of_another_width_are_refused(session: Sessions) -> None:
    sparse = session("SparseMatMulNBits", weights(4, 33, 4, 32, False, bias=False), (4, 33, 4, 32))
    with pytest.raises(REFUSALS, match="A has the shape"):
        sparse.run(None, {"x": activations(1, 64)})
