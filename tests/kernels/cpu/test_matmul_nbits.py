"""ryzen::MatMulNBits against products in float64.

Two references. One multiplies the dequantized weights with the activations as they are: the operator may differ by what
rounding them to 8 bits costs, which has a bound. The other, ``rounded``, multiplies with the activations rounded as the
operator says it rounds them: what is left is float32 sums, so it holds to 4e-6 of the largest output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

FLOAT, UINT8, INT8 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8
REFUSALS = (Fail, InvalidArgument, RuntimeException)
SUMS = 4e-6  # of the largest output: float32 sums of some tens of blocks
GUARD = 64  # elements around a bound output
Array = np.ndarray[Any, Any]
Open = Callable[..., onnxruntime.InferenceSession]
OneNode = Callable[..., ModelProto]


@dataclass(frozen=True)
class Weights:
    """(N, K) weights as the operator stores them."""

    codes: Array
    scales: Array
    zeros: Array | None
    bits: int
    depth: int

    @property
    def rows(self) -> int:
        return len(self.codes)

    @property
    def block(self) -> int:
        return self.codes.shape[2] * 8 // self.bits

    def dequantized(self) -> Array:
        """(N, K) float64."""
        points = np.full(self.scales.shape, 1 << (self.bits - 1))
        if self.zeros is not None:
            points = unpack(self.zeros, self.bits)[:, : self.scales.shape[1]]
        table = (unpack(self.codes, self.bits).astype(np.float64) - points[..., None]) * self.scales[..., None]
        return table.reshape(self.rows, -1)[:, : self.depth]

    def constants(self) -> dict[str, Array]:
        found = {"B": self.codes, "scales": self.scales}
        return found if self.zeros is None else found | {"zeros": self.zeros}


def unpack(codes: Array, bits: int) -> Array:
    """The last axis, several codes a byte, as one code each."""
    parts = np.stack([codes >> place & (1 << bits) - 1 for place in range(0, 8, bits)], axis=-1)
    return parts.reshape(*codes.shape[:-1], -1)


def make_weights(
    rows: int, depth: int, bits: int = 4, block: int = 32, *, zeros: bool = False, seed: int = 0
) -> Weights:
    random = np.random.default_rng(seed)
    blocks = -(-depth // block)
    return Weights(
        random.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8),
        random.uniform(0.005, 0.02, (rows, blocks)).astype(np.float32),
        random.integers(0, 256, (rows, -(-blocks * bits // 8)), np.uint8) if zeros else None,
        bits,
        depth,
    )


def make_rows(count: int, depth: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((count, depth)).astype(np.float32)


def round_rows(x: Array, block: int) -> tuple[Array, Array]:
    """Codes (M, blocks * block) int8 and steps (M, blocks) float32, as a norm hands them on."""
    padded = np.zeros((len(x), -(-x.shape[1] // block) * block), np.float32)
    padded[:, : x.shape[1]] = x
    blocks = padded.reshape(len(x), -1, block)
    most = np.abs(blocks).max(axis=2)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    codes = np.rint(blocks * inverse[..., None]).astype(np.int8)
    return codes.reshape(len(x), -1), most / np.float32(127)


def rounded(x: Array, block: int) -> Array:
    """(M, K) float64: the activations that the operator multiplies with."""
    codes, steps = round_rows(x, block)
    wide = codes.reshape(len(x), -1, block) * steps.astype(np.float64)[..., None]
    return wide.reshape(len(x), -1)[:, : x.shape[1]]


@pytest.fixture(scope="module")
def product(open_session: Open, one_node: OneNode) -> Callable[..., onnxruntime.InferenceSession]:
    """``product(weights, bias=, residual=, threads=, **attributes)``: a session of one node, from x to y."""

    def made(
        w: Weights,
        *,
        bias: Array | None = None,
        residual: bool = False,
        codes: bool = False,
        threads: int = 1,
        **attributes: Any,
    ) -> onnxruntime.InferenceSession:
        settings = {"K": w.depth, "N": w.rows, "bits": w.bits, "block_size": w.block, "accuracy_level": 4} | attributes
        names = ["x", "B", "scales", "zeros" if w.zeros is not None else "", "", "bias" if bias is not None else ""]
        names += ["residual" if residual else "", "steps" if codes else ""]
        inputs = {"x": INT8 if codes else FLOAT} | ({"residual": FLOAT} if residual else {})
        inputs |= {"steps": FLOAT} if codes else {}
        node = helper.make_node("MatMulNBits", names, ["y"], domain="ryzen", **settings)
        constants = w.constants() | ({} if bias is None else {"bias": bias})
        return open_session(one_node(node, inputs, {"y": FLOAT}, constants), threads)

    return made


Product = Callable[..., onnxruntime.InferenceSession]


def close(y: Array, wanted: Array) -> bool:
    return bool(np.abs(y - wanted).max() <= SUMS * np.abs(wanted).max())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("rows", "depth", "block"), [(1, 1, 32), (16, 32, 32), (33, 97, 32), (77, 300, 128), (130, 515, 256), (64, 192, 96)]
)
def test_product(product: Product, isa: str, bits: int, zeros: bool, rows: int, depth: int, block: int) -> None:
    w = make_weights(rows, depth, bits, block, zeros=zeros)
    session = product(w, isa=isa)
    for count in (1, 2, 3, 5, 8, 13, 17):
        x = make_rows(count, depth, seed=count)
        y = session.run(None, {"x": x})[0]
        assert close(y, rounded(x, block) @ w.dequantized().T)


def test_stays_within_the_bound_of_its_rounding(product: Product, isa: str) -> None:
    """Each activation is off by at most half a step, so an output by half a step times its weights' magnitudes."""
    w = make_weights(48, 640, 4, 128)
    x = make_rows(9, 640) * np.logspace(-3, 3, 640, dtype=np.float32)
    y = product(w, isa=isa).run(None, {"x": x})[0]
    table = w.dequantized()
    steps = np.repeat(round_rows(x, 128)[1].astype(np.float64), 128, axis=1)
    bound = (steps / 2) @ np.abs(table).T
    exact = x.astype(np.float64) @ table.T
    assert np.all(np.abs(y - exact) <= bound * (1 + 1e-5) + SUMS * np.abs(exact).max())
    assert np.abs(y - exact).max() > 0.001 * bound.max()  # the bound is one that rounding comes near


def test_is_bitwise_the_same_on_every_path(product: Product, isa: str) -> None:
    for bits, zeros in ((2, True), (4, False), (8, True)):
        w = make_weights(70, 450, bits, 64, zeros=zeros)
        x = make_rows(11, 450)
        mine, reference = (product(w, isa=name).run(None, {"x": x})[0] for name in (isa, "scalar"))
        assert np.array_equal(mine, reference)


def test_a_row_does_not_depend_on_the_rows_beside_it(product: Product, isa: str) -> None:
    w = make_weights(50, 384, 4, 128)
    session = product(w, isa=isa)
    x = make_rows(31, 384)
    together = session.run(None, {"x": x})[0]
    for start, stop in ((0, 1), (3, 5), (4, 11), (15, 31)):
        assert np.array_equal(session.run(None, {"x": x[start:stop]})[0], together[start:stop])


@pytest.mark.parametrize("count", [1, 7, 40])
def test_threads_change_nothing(product: Product, isa: str, count: int) -> None:
    w = make_weights(600, 512, 4, 128)
    x = make_rows(count, 512)
    one, two = (product(w, isa=isa, threads=threads).run(None, {"x": x})[0] for threads in (1, 2))
    assert np.array_equal(one, two)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(("rows", "gated"), [(37, False), (2 * 37, True), (2 * 16, True), (2, True)])
def test_epilogue(product: Product, isa: str, activation: str, rows: int, gated: bool) -> None:
    """Bias, activation, gate and residual in that order; 3e-6 of the largest value for the activations' polynomials."""
    w = make_weights(rows, 130, 4, 64)
    random = np.random.default_rng(5)
    bias = random.standard_normal(rows).astype(np.float32)
    columns = rows // 2 if gated else rows
    session = product(w, bias=bias, residual=True, isa=isa, activation=activation, gated=int(gated))
    for count in (1, 6):
        x = make_rows(count, 130, seed=count) * np.float32(2)
        residual = random.standard_normal((count, columns)).astype(np.float32)
        whole = rounded(x, 64) @ w.dequantized().T + bias
        wanted = ACTIVATIONS[activation](whole[:, :columns])
        if gated:
            wanted = wanted * whole[:, columns:]
        wanted = wanted + residual
        y = session.run(None, {"x": x, "residual": residual})[0]
        assert y.shape == (count, columns)
        assert np.abs(y - wanted).max() <= (SUMS + 3e-6) * np.abs(wanted).max()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "sigmoid", "tanh"])
def test_activations_hold_far_out(product: Product, isa: str, activation: str) -> None:
    w = make_weights(16, 32, 8, 32)
    session = product(w, isa=isa, activation=activation)
    x = np.sign(make_rows(6, 32)) * np.float32(3e4)
    y = session.run(None, {"x": x})[0]
    with np.errstate(over="ignore"):
        wanted = ACTIVATIONS[activation](rounded(x, 32) @ w.dequantized().T)
    assert np.all(np.isfinite(y))
    assert np.abs(y - wanted).max() <= SUMS * np.abs(wanted).max() + 1e-30


@pytest.mark.parametrize("count", [1, 4, 19])
def test_takes_rows_that_are_rounded_already(product: Product, isa: str, count: int) -> None:
    w = make_weights(40, 200, 4, 64)
    x = make_rows(count, 200)
    codes, steps = round_rows(x, 64)
    y = product(w, codes=True, isa=isa).run(None, {"x": codes, "steps": steps})[0]
    assert np.array_equal(y, product(w, isa=isa).run(None, {"x": x})[0])


def test_zeros_and_numbers_that_are_none(product: Product, isa: str) -> None:
    w = make_weights(20, 64, 4, 32)
    session = product(w, isa=isa)
    x = make_rows(3, 64)
    x[0] = 0
    x[1, 40] = np.nan
    y = session.run(None, {"x": x})[0]
    assert np.all(y[0] == 0)
    assert np.all(np.isnan(y[1]))
    assert close(y[2:], rounded(x[2:], 32) @ w.dequantized().T)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_no_activation_hides_a_nan(product: Product, isa: str, activation: str) -> None:
    x = make_rows(2, 64)
    x[1, 40] = np.nan
    y = product(make_weights(20, 64, 4, 32), isa=isa, activation=activation).run(None, {"x": x})[0]
    assert np.all(np.isfinite(y[0]))
    assert np.all(np.isnan(y[1]))


def test_shapes_of_any_rank_and_no_rows(product: Product) -> None:
    w = make_weights(24, 96, 4, 32)
    session = product(w)
    x = make_rows(6, 96)
    flat = session.run(None, {"x": x})[0]
    assert np.array_equal(session.run(None, {"x": x.reshape(2, 3, 96)})[0], flat.reshape(2, 3, 24))
    assert np.array_equal(session.run(None, {"x": x[0]})[0], flat[0])
    assert session.run(None, {"x": x[:0]})[0].shape == (0, 24)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_writes_nothing_but_its_output(product: Product, isa: str, rows: int) -> None:
    w = make_weights(rows, 64, 4, 32)
    session = product(w, isa=isa)
    for count in (1, 3, 9):
        x = make_rows(count, 64)
        buffer = np.full(count * rows + 2 * GUARD, 7, np.float32)
        inside = buffer[GUARD:-GUARD]
        binding = session.io_binding()
        binding.bind_cpu_input("x", x)
        address = inside.__array_interface__["data"][0]
        binding.bind_output("y", "cpu", 0, np.float32, (count, rows), address)
        session.run_with_iobinding(binding)
        assert np.array_equal(inside.reshape(count, rows), session.run(None, {"x": x})[0])
        assert np.all(buffer[:GUARD] == 7) and np.all(buffer[-GUARD:] == 7)


def test_agrees_with_the_runtimes_own(product: Product, one_node: OneNode, open_session: Open) -> None:
    """Both round activations to 8 bits by blocks: 2 % of the outputs' deviation, which is those roundings' size."""
    w = make_weights(64, 512, 4, 128)
    node = helper.make_node(
        "MatMulNBits", ["x", "B", "scales"], ["y"], domain="com.microsoft",
        K=512, N=64, bits=4, block_size=128, accuracy_level=4,
    )  # fmt: skip
    stock = open_session(one_node(node, {"x": FLOAT}, {"y": FLOAT}, w.constants()))
    x = make_rows(5, 512)
    theirs = stock.run(None, {"x": x})[0]
    assert np.abs(product(w).run(None, {"x": x})[0] - theirs).max() <= 0.02 * theirs.std()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"bits": 3}, "bits is 3"),
    ({"K": 0}, "K is 0"),
    ({"K": -64}, "K is -64"),
    ({"K": 1 << 40}, "K is"),
    ({"N": 1 << 62}, "N is"),
    ({"K": 65}, "B has the shape"),
    ({"K": 128}, "B has the shape"),
    ({"N": 21}, "B has the shape"),
    ({"N": 1 << 27, "K": 1 << 27}, "B has the shape"),
    ({"block_size": 16}, "block_size is 16"),
    ({"block_size": 512}, "block_size is 512"),
    ({"block_size": 48}, "block_size is 48"),
    ({"block_size": -32}, "block_size is -32"),
    ({"bits": 8}, "B has the shape"),
    ({"activation": "mish"}, "activation is 'mish'"),
    ({"gated": 2}, "gated is 2"),
    ({"gated": 1.0}, "gated is of another type, expected an integer"),
    ({"activation": 1}, "activation is of another type, expected a string"),
    ({"isa": "avx9"}, "isa is 'avx9'"),
]


@pytest.mark.parametrize(("wrong", "says"), WRONG)
def test_attributes_that_lie_are_refused_when_the_session_opens(
    product: Product, wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises(REFUSALS, match=f"ryzen::MatMulNBits: .*{says}"):
        product(make_weights(20, 64, 4, 32), **wrong)


def test_halves_that_are_none_are_refused(product: Product) -> None:
    with pytest.raises(REFUSALS, match="N is 21, which gated does not split"):
        product(make_weights(21, 64, 4, 32), gated=1)


@pytest.mark.parametrize(("name", "shape"), [("scales", (20, 3)), ("zeros", (20, 2)), ("B", (20, 2, 15))])
def test_constants_of_another_size_are_refused(product: Product, name: str, shape: tuple[int, ...]) -> None:
    w = make_weights(20, 64, 4, 32, zeros=True)
    field = {"B": "codes"}.get(name, name)
    kind = np.float32 if name == "scales" else np.uint8
    parts = {"codes": w.codes, "scales": w.scales, "zeros": w.zeros} | {field: np.ones(shape, kind)}
    wrong = Weights(parts["codes"], parts["scales"], parts["zeros"], 4, 64)
    with pytest.raises(REFUSALS, match=f"(zero_points|{name}) has the shape"):
        product(wrong, block_size=32)


def test_weights_must_be_constants(open_session: Open, one_node: OneNode) -> None:
    w = make_weights(20, 64, 4, 32)
    node = helper.make_node(
        "MatMulNBits", ["x", "B", "scales"], ["y"], domain="ryzen", K=64, N=20, bits=4, block_size=32
    )
    with pytest.raises(REFUSALS, match="B must be a constant"):
        open_session(one_node(node, {"x": FLOAT, "B": UINT8}, {"y": FLOAT}, {"scales": w.scales}))


def test_inputs_of_another_shape_or_type_are_refused(product: Product) -> None:
    w = make_weights(20, 64, 4, 32)
    session = product(w)
    for x in (make_rows(2, 63), make_rows(2, 128), np.zeros((), np.float32)):
        with pytest.raises(REFUSALS, match="A has the shape"):
            session.run(None, {"x": x})
    with_residual = product(w, residual=True)
    with pytest.raises(REFUSALS, match="residual has the shape"):
        with_residual.run(None, {"x": make_rows(2, 64), "residual": make_rows(1, 20)})
    taking = product(w, codes=True)
    codes, steps = round_rows(make_rows(2, 64), 32)
    with pytest.raises(REFUSALS, match="steps has the shape"):
        taking.run(None, {"x": codes, "steps": steps[:, :1]})
    with pytest.raises(REFUSALS, match="A has the shape"):
        taking.run(None, {"x": codes[:, :32], "steps": steps})
