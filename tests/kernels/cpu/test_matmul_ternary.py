"""MatMulTernary against float64: exactly the product of the rounded activations, and near that of the activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper


def packed(weights: np.ndarray) -> np.ndarray:
    """Four codes of -1, 0, +1 in a byte; the last byte is filled up with the code that stands for nothing."""
    N, K = weights.shape
    codes = np.full((N, -(-K // 4) * 4), 3, np.uint8)
    codes[:, :K] = weights + 1
    return (codes.reshape(N, -1, 4) << np.array([0, 2, 4, 6], np.uint8)).sum(-1).astype(np.uint8)


def anchored(weights: np.ndarray) -> np.ndarray:
    """Codes one higher, and behind every 127 of them one that stands for 0; so does what fills up the last block."""
    N, K = weights.shape
    blocks = -(-K // 127)
    codes = np.full((N, blocks * 127), 2, np.uint8)
    codes[:, :K] = weights + 2
    codes = np.concatenate((codes.reshape(N, blocks, 127), np.full((N, blocks, 1), 2, np.uint8)), -1)
    return (codes.reshape(N, blocks, 32, 4) << np.array([0, 2, 4, 6], np.uint8)).sum(-1).astype(np.uint8)


def ternary(N: int, K: int, scales: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(-1, 2, (N, K)), rng.standard_normal(scales).astype(np.float32)


def model_of(
    one_node: Callable[..., ModelProto],
    codes: np.ndarray,
    scale: np.ndarray,
    K: int,
    N: int,
    fed: tuple[str, ...] = (),
    **attributes: Any,
) -> ModelProto:
    """What is in ``fed`` is an input of the graph, not an initializer."""
    node = helper.make_node("MatMulTernary", ["A", "packed", "scale"], ["y"], domain="ryzen", K=K, N=N, **attributes)
    constants = {"packed": codes, "scale": scale}
    kinds = {name: helper.np_dtype_to_tensor_dtype(constants[name].dtype) for name in fed}
    kept = {name: array for name, array in constants.items() if name not in fed}
    return one_node(node, {"A": TensorProto.FLOAT, **kinds}, {"y": TensorProto.FLOAT}, kept)


SHAPES = [
    *((m, 33, 17) for m in (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 31, 65, 130)),
    *((3, k, 19) for k in (1, 2, 3, 4, 5, 15, 16, 17, 31, 63, 64, 65, 257, 2053)),
    *((2, 70, n) for n in (1, 2, 15, 16, 31, 32, 33, 101, 1030)),
]


@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
def test_against_float64(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
    M: int,
    K: int,
    N: int,
) -> None:
    weights, scale = ternary(N, K, N if M % 2 else 1)
    x = np.random.default_rng(1).standard_normal((M, K)).astype(np.float32)
    (y,) = open_session(model_of(one_node, packed(weights), scale, K, N, isa=isa)).run(None, {"A": x})

    most = np.abs(x).max(-1, keepdims=True)
    codes = np.rint(x * (np.float32(127) / most)).astype(np.float64)
    step = (most / np.float32(127)).astype(np.float64)
    # The sum is an integer below 2^24, so what is rounded is the two products behind it, three roundings in all.
    exact = codes @ weights.T * step * scale
    assert (np.abs(y - exact) <= 3 * 2.0**-24 * np.abs(exact)).all()
    # An activation is off by half a step, and by the roundings of its division and product.
    bound = (0.5 + 127 * 3 * 2.0**-24) * step * np.abs(weights).sum(-1) * np.abs(scale)
    assert (np.abs(y - x.astype(np.float64) @ weights.T * scale) <= bound + 3 * 2.0**-24 * np.abs(exact)).all()


def test_instruction_sets_threads_and_neighbours_change_no_bit(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
) -> None:
    K, N = 1037, 533
    weights, scale = ternary(N, K, N)
    x = np.random.default_rng(1).standard_normal((3, 29, K)).astype(np.float32)
    x[1, 3] = 0
    models = {name: model_of(one_node, packed(weights), scale, K, N, isa=name) for name in ("scalar", isa)}
    (scalar,) = open_session(models["scalar"]).run(None, {"A": x})
    assert scalar.shape == (3, 29, N) and not scalar[1, 3].any()
    for threads in (1, 2):
        session = open_session(models[isa], threads)
        np.testing.assert_array_equal(session.run(None, {"A": x})[0], scalar)
        for row in (0, 3, 28):
            np.testing.assert_array_equal(session.run(None, {"A": x[1, row]})[0], scalar[1, row])


def test_nothing_is_written_beyond_the_output(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
) -> None:
    for M, K, N in ((1, 5, 1), (3, 40, 17), (9, 33, 47)):
        weights, scale = ternary(N, K, 1)
        x = np.random.default_rng(1).standard_normal((M, K)).astype(np.float32)
        session = open_session(model_of(one_node, packed(weights), scale, K, N, isa=isa))
        held = np.full(M * N + 128, 77, np.float32)
        binding = session.io_binding()
        binding.bind_cpu_input("A", x)
        binding.bind_output("y", "cpu", 0, np.float32, [M, N], held[64:].ctypes.data)
        session.run_with_iobinding(binding)
        np.testing.assert_array_equal(held[64:-64].reshape(M, N), session.run(None, {"A": x})[0])
        assert (held[:64] == 77).all() and (held[-64:] == 77).all()


def test_rows_that_cannot_be_rounded(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
) -> None:
    """A row with a NaN or an infinity is NaN throughout, one of numbers too small for a step is zero."""
    weights, scale = ternary(20, 40, 1)
    x = np.ones((4, 40), np.float32)
    x[0, 7], x[1, 33], x[2] = np.nan, -np.inf, 1e-37
    (y,) = open_session(model_of(one_node, packed(weights), scale, 40, 20, isa=isa)).run(None, {"A": x})
    assert np.isnan(y[:2]).all() and not y[2].any()
    np.testing.assert_allclose(y[3], weights.sum(-1) * scale, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40)])
def test_no_rows(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    shape: tuple[int, ...],
) -> None:
    weights, scale = ternary(20, 40, 1)
    session = open_session(model_of(one_node, packed(weights), scale, 40, 20))
    assert session.run(None, {"A": np.zeros(shape, np.float32)})[0].shape == (*shape[:-1], 20)


GOOD = {"K": 42, "N": 20}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"K": 0}, "K is 0"),
        ({"K": -42}, "K is -42"),
        ({"K": 2**62}, "K is"),
        ({"K": 46}, "packed has the shape"),
        ({"K": 2**20, "N": 2**24}, "packed has the shape"),
        ({"N": 0}, "N is 0"),
        ({"N": -1}, "N is -1"),
        ({"N": 2**40}, "N is"),
        ({"N": 21}, "packed has the shape"),
        ({"K": 44}, "packed has code 3 in row 0, expected 0 to 2"),
        ({"isa": "sse"}, "isa is 'sse'"),
        ({"scale": np.zeros(19, np.float32)}, "scale has the shape"),
        ({"codes": np.zeros((20, 12), np.uint8)}, "packed has the shape"),
        ({"codes": np.zeros(220, np.uint8)}, "packed has the shape"),
        ({"fed": ("packed",)}, "expected an initializer"),
        ({"fed": ("scale",)}, "expected an initializer"),
        ({"scale": np.zeros((20, 2), np.float32)}, "scale has the shape"),
        ({"scale": np.arange(20, dtype=np.float32).reshape(20, 1), "codes": np.zeros((20, 1, 32), np.uint8)}, "code 0"),
        ({"codes": np.full((20, 1, 32), 0b01101010, np.uint8)}, "packed has code 1 in row 0, expected 2 to 2"),
        ({"codes": np.zeros((20, 2, 32), np.uint8)}, "packed has the shape"),
        ({"gated": 2}, "gated is 2"),
        ({"activation": "mish"}, "activation is 'mish'"),
    ],
)
def test_refused_when_the_session_is_made(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    changes: dict[str, Any],
    part: str,
) -> None:
    weights, scale = ternary(20, 42, 1)
    arguments = {"codes": packed(weights), "scale": scale, **GOOD}
    open_session(model_of(one_node, **arguments))
    with pytest.raises(Exception, match=part):
        open_session(model_of(one_node, **{**arguments, **changes}))


def test_scales_that_differ_in_a_row_are_refused(
    one_node: Callable[..., ModelProto], open_session: Callable[..., onnxruntime.InferenceSession]
) -> None:
    weights, _ = ternary(3, 200, 1)
    scale = np.ones((3, 2), np.float32)
    open_session(model_of(one_node, anchored(weights), scale, 200, 3))
    scale[1, 1] = 2
    with pytest.raises(Exception, match="scale has different numbers in row 1"):
        open_session(model_of(one_node, anchored(weights), scale, 200, 3))
    with pytest.raises(Exception, match="N is 3, which gated does not split"):
        open_session(model_of(one_node, anchored(weights), scale[:, :1].copy(), 200, 3, gated=1))


@pytest.mark.parametrize("K", [1, 126, 127, 128, 254, 300])
def test_codes_in_blocks_are_the_same_codes(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
    K: int,
) -> None:
    """As ``MatMulNBits`` stores them, with a scale for every block: to the bit what the dense codes give."""
    N = 37
    weights, scale = ternary(N, K, N)
    x = np.random.default_rng(1).standard_normal((3, K)).astype(np.float32)
    (dense,) = open_session(model_of(one_node, packed(weights), scale, K, N, isa=isa)).run(None, {"A": x})
    scales = np.repeat(scale[:, None], -(-K // 127), axis=1)
    (blocks,) = open_session(model_of(one_node, anchored(weights), scales, K, N, isa=isa)).run(None, {"A": x})
    np.testing.assert_array_equal(blocks, dense)


@pytest.mark.parametrize(("M", "K", "N"), [(1, 33, 2), (3, 40, 38), (9, 70, 64), (5, 257, 66)])
@pytest.mark.parametrize("act", ["none", "relu2", "silu", "gelu_tanh"])
def test_what_happens_behind_the_product(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
    M: int,
    K: int,
    N: int,
    act: str,
) -> None:
    """An activation, and a gate: within 1e-6 of the largest result of what float64 makes of the plain product."""
    weights, scale = ternary(N, K, N)
    x = np.random.default_rng(1).standard_normal((M, K)).astype(np.float32)
    (plain,) = open_session(model_of(one_node, packed(weights), scale, K, N, isa=isa)).run(None, {"A": x})
    for gated in (0, 1):
        facts = {"activation": act, "gated": gated, "isa": isa}
        (y,) = open_session(model_of(one_node, packed(weights), scale, K, N, **facts)).run(None, {"A": x})
        gate, up = (plain[:, : N // 2], plain[:, N // 2 :]) if gated else (plain, 1.0)
        want = activated(gate.astype(np.float64), act) * up
        assert y.shape == want.shape
        np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


def activated(x: np.ndarray, act: str) -> np.ndarray:
    if act == "relu2":
        return np.maximum(x, 0) ** 2
    if act == "silu":
        return x / (1 + np.exp(-x))
    if act == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x


@pytest.mark.parametrize(
    ("feeds", "part"),
    [
        ({"A": np.zeros((2, 41), np.float32)}, "A has the shape"),
        ({"A": np.zeros((1, 1, 1, 2, 42), np.float32)}, "A has 5 dimensions"),
        ({"A": np.zeros((), np.float32)}, "A has 0 dimensions"),
    ],
)
def test_refused_when_it_runs(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    feeds: dict[str, np.ndarray],
    part: str,
) -> None:
    weights, scale = ternary(20, 42, 1)
    session = open_session(model_of(one_node, packed(weights), scale, **GOOD))
    with pytest.raises(Exception, match=part):
        session.run(None, feeds)
