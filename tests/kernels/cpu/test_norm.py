"""SkipRMSNorm and SkipLayerNorm against float64, and their codes against a rounding of their own y."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper

FLOAT, INT8 = TensorProto.FLOAT, TensorProto.INT8
EPSILON = 1e-5
ULP = 2.0**-24  # what rounding a number to float32 costs, relative to it
OUTPUTS = {"y": FLOAT, "sum": FLOAT, "codes": INT8, "steps": FLOAT}
SIZES = (1, 2, 15, 16, 17, 31, 33, 64, 65, 97, 128, 255, 257, 1000, 4099)

Feeds = dict[str, np.ndarray[Any, Any]]


def norm_model(
    one_node: Callable[..., ModelProto],
    op: str,
    feeds: Feeds,
    outputs: tuple[str, ...] = tuple(OUTPUTS),
    **attributes: Any,
) -> ModelProto:
    """Operands that ``feeds`` lacks are left out, as are outputs that are not named."""
    operands = (
        ("x", "skip", "weight", "skip_bias") if op == "SkipRMSNorm" else ("x", "skip", "weight", "beta", "skip_bias")
    )
    node = helper.make_node(
        op,
        [name if name in feeds else "" for name in operands],
        [name if name in outputs else "" for name in OUTPUTS],
        domain="ryzen",
        **{"epsilon": EPSILON, **attributes},
    )
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    return one_node(node, kinds, {name: OUTPUTS[name] for name in outputs}, {})


def operands(op: str, shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> Feeds:
    rng = np.random.default_rng(seed)
    names = {"x": shape, "skip": shape, "weight": shape[-1:], "skip_bias": shape[-1:]}
    if op == "SkipLayerNorm":
        names["beta"] = shape[-1:]
    return {name: (rng.standard_normal(dims) * scale).astype(np.float32) for name, dims in names.items()}


def reference(op: str, feeds: Feeds) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y and the sum in float64, and how far y may be off.

    The sum is rounded twice. A total over a row is off by at most (C / 64 + 10) roundings of the total of magnitudes,
    as norm.h says; y has that of the mean square by half, that of the mean in full, and six roundings of its own.
    """
    x = feeds["x"].astype(np.float64)
    total = x + feeds.get("skip", 0.0) + feeds.get("skip_bias", 0.0)
    roundings = x.shape[-1] / 64 + 10
    size = np.abs(x) + np.abs(feeds.get("skip", 0.0)) + np.abs(feeds.get("skip_bias", 0.0))
    mean = total.mean(-1, keepdims=True) if op == "SkipLayerNorm" else 0.0
    centred = total - mean
    square = np.square(centred).mean(-1, keepdims=True) + EPSILON
    factor = 1 / np.sqrt(square)
    weight = feeds["weight"].astype(np.float64)
    y = centred * factor * weight
    # What the difference from the mean is off by, everywhere and at its worst: it also enters the mean square.
    off = (2 * size + (roundings * size.mean(-1, keepdims=True) if op == "SkipLayerNorm" else 0.0)) * ULP
    worst = off.max(-1, keepdims=True)
    square_off = 2 * worst * np.sqrt(square) + square * roundings * ULP
    bound = np.abs(factor * weight) * off + np.abs(y) * (square_off / square / 2 + 6 * ULP)
    if "beta" in feeds:
        y = y + feeds["beta"]
        bound = bound + np.abs(y) * ULP
    return y, total, bound


def rounded(y: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and steps of finite y as round_activations.h says, in float32."""
    width = -(-y.shape[-1] // block) * block
    filled = np.zeros((*y.shape[:-1], width), np.float32)
    filled[..., : y.shape[-1]] = y
    blocks = filled.reshape(*y.shape[:-1], -1, block)
    most = np.abs(blocks).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), most, where=most > 0, out=np.zeros_like(most))
    return np.rint(blocks * inverse).astype(np.int8).reshape(filled.shape), (most / np.float32(127))[..., 0]


OPS = pytest.mark.parametrize("op", ["SkipRMSNorm", "SkipLayerNorm"])


@OPS
@pytest.mark.parametrize("C", SIZES)
def test_against_float64(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
    op: str,
    C: int,
) -> None:
    block = (32, 64, 128, 256)[C % 4]
    full = operands(op, (2, 3, C), seed=C)
    few = {name: full[name] for name in ("x", "weight")}
    for feeds in (full, few, {**few, "skip": full["skip"]}, {**few, "skip_bias": full["skip_bias"]}):
        session = open_session(norm_model(one_node, op, feeds, block_size=block, isa=isa))
        y, total, codes, steps = session.run(None, feeds)
        wanted, wanted_total, bound = reference(op, feeds)
        assert (np.abs(y - wanted) <= bound).all()
        np.testing.assert_allclose(total, wanted_total, rtol=0, atol=2 * ULP * 16)
        wanted_codes, wanted_steps = rounded(y, block)
        np.testing.assert_array_equal(codes, wanted_codes)
        np.testing.assert_array_equal(steps, wanted_steps)


@OPS
@pytest.mark.parametrize("outputs", [("y",), ("sum",), ("y", "sum"), ("codes", "steps"), ("sum", "codes", "steps")])
def test_any_choice_of_outputs_has_the_same_bits(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
    op: str,
    outputs: tuple[str, ...],
) -> None:
    feeds = operands(op, (3, 77))
    settings = {"block_size": 32, "isa": isa}
    everything = open_session(norm_model(one_node, op, feeds, **settings)).run(None, feeds)
    some = open_session(norm_model(one_node, op, feeds, outputs, **settings)).run(outputs, feeds)
    for name, array in zip(outputs, some, strict=True):
        np.testing.assert_array_equal(array, everything[list(OUTPUTS).index(name)])


@OPS
@pytest.mark.parametrize("shape", [(83,), (4, 83), (2, 2, 83), (2, 1, 2, 83)])
def test_ranks(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    op: str,
    shape: tuple[int, ...],
) -> None:
    feeds = operands(op, shape)
    y, total, codes, steps = open_session(norm_model(one_node, op, feeds, block_size=64)).run(None, feeds)
    assert y.shape == total.shape == shape
    assert codes.shape == (*shape[:-1], 128) and steps.shape == (*shape[:-1], 2)


@OPS
def test_rows_depend_neither_on_threads_nor_on_each_other(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
    op: str,
) -> None:
    feeds = operands(op, (301, 517))
    model = norm_model(one_node, op, feeds, block_size=128, isa=isa)
    one, two = (open_session(model, threads).run(None, feeds) for threads in (1, 2))
    alone = open_session(model).run(None, {n: a[200:201] if a.ndim == 2 else a for n, a in feeds.items()})
    for a, b, c in zip(one, two, alone, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a[200:201], c)


@OPS
def test_nothing_is_written_beyond_the_outputs(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
    op: str,
) -> None:
    band = 64
    for C in (1, 31, 33, 130):
        feeds = operands(op, (3, C))
        session = open_session(norm_model(one_node, op, feeds, block_size=32, isa=isa))
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        blocks = -(-C // 32)
        held = {}
        for name, width in {"y": C, "sum": C, "codes": blocks * 32, "steps": blocks}.items():
            kind = np.int8 if name == "codes" else np.float32
            held[name] = np.full(3 * width + 2 * band, 77, kind)
            inner = held[name][band : band + 3 * width]
            binding.bind_output(name, "cpu", 0, kind, [3, width], inner.ctypes.data)
        session.run_with_iobinding(binding)
        for name, wanted in zip(OUTPUTS, session.run(None, feeds), strict=True):
            np.testing.assert_array_equal(held[name][band:-band], wanted.ravel())
            assert (held[name][:band] == 77).all() and (held[name][-band:] == 77).all()


def test_blocks_that_have_no_step(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
) -> None:
    """Zeros and what is too small for a step have a step of 0, what is not finite has NaN; codes are 0 either way."""
    x = np.ones((1, 160), np.float32)
    weight = np.ones(160, np.float32)
    weight[:32] = 0
    weight[32:64] = 1e-37  # y is below 2^-119 there
    weight[70] = np.inf
    weight[97] = np.nan
    feeds = {"x": x, "weight": weight}
    session = open_session(norm_model(one_node, "SkipRMSNorm", feeds, ("codes", "steps"), block_size=32, isa=isa))
    codes, steps = session.run(None, feeds)
    assert not codes[:, :128].any() and (codes[:, 128:] == 127).all()
    assert (steps[0, :2] == 0).all() and np.isnan(steps[0, 2:4]).all() and steps[0, 4] > 0


@OPS
def test_no_rows(
    one_node: Callable[..., ModelProto], open_session: Callable[..., onnxruntime.InferenceSession], op: str
) -> None:
    feeds = operands(op, (0, 40))
    y, total, codes, steps = open_session(norm_model(one_node, op, feeds, block_size=32)).run(None, feeds)
    assert (y.shape, total.shape, codes.shape, steps.shape) == ((0, 40), (0, 40), (0, 64), (0, 2))


@OPS
@pytest.mark.parametrize(
    ("attributes", "part"),
    [
        ({"block_size": 48}, "block_size is 48"),
        ({"block_size": -32}, "block_size is -32"),
        ({"block_size": 2**62}, "block_size is"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"isa": "mmx"}, "isa is 'mmx'"),
    ],
)
def test_refused_when_the_session_is_made(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    op: str,
    attributes: dict[str, Any],
    part: str,
) -> None:
    with pytest.raises(Exception, match=part):
        open_session(norm_model(one_node, op, operands(op, (2, 40)), **attributes))


@OPS
@pytest.mark.parametrize(
    ("changes", "outputs", "part"),
    [
        ({"weight": (39,)}, ("y",), "weight has the shape"),
        ({"skip": (1, 40)}, ("y",), "skip has the shape"),
        ({"skip_bias": (1,)}, ("y",), "skip_bias has the shape"),
        ({"x": (1, 1, 1, 2, 40)}, ("y",), "dimensions"),
        ({"x": (2, 0)}, ("y",), "channels"),
        ({}, ("y", "codes", "steps"), "block_size is 0"),
        ({}, ("y", "codes"), "codes and steps"),
    ],
)
def test_refused_when_it_runs(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    op: str,
    changes: dict[str, tuple[int, ...]],
    outputs: tuple[str, ...],
    part: str,
) -> None:
    feeds = operands(op, (2, 40))
    feeds |= {name: np.zeros(shape, np.float32) for name, shape in changes.items()}
    session = open_session(norm_model(one_node, op, feeds, outputs))
    with pytest.raises(Exception, match=part):
        session.run(None, feeds)
