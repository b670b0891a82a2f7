"""ryzen::GroupQueryAttention against attention in float64, and against ONNX Runtime's operator of that name.

Outputs are held to attention over the cache as it is stored: a normalised mean square error of 1e-11 where everything
is float, of 1e-8 where queries and weights are rounded to 15 and 16 bits beside an integer cache. What is stored is
held to ONNX Runtime's own bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
Open = Callable[..., onnxruntime.InferenceSession]

ELEMENT = {
    "fp32": (np.float32, TensorProto.FLOAT),
    "fp16": (np.float16, TensorProto.FLOAT16),
    "int8": (np.int8, TensorProto.INT8),
    "int4": (np.uint8, TensorProto.UINT8),
}
GUARD = 64  # elements around a bound buffer


@dataclass(frozen=True)
class Case:
    """One node and one call of it: row b has seen ``past[b]`` tokens, ``tokens`` more come, buffers hold ``rows``."""

    heads: int = 8
    kv_heads: int = 2
    dim: int = 16
    past: tuple[int, ...] = (0,)
    tokens: int = 1
    rows: int = 40
    form: str = "fp32"
    half: int = 0  # columns of the rotation's tables, 0: none
    interleaved: bool = False
    window: int = 0
    rolling: bool = False
    softcap: float = 0.0
    sinks: bool = False
    norms: bool = False
    packed: bool = False
    scale: float = 0.0
    kv_group: int = 0
    spread: float = 1.0  # of the queries: large ones make peaked weights

    @property
    def width(self) -> int:
        return self.dim // 2 if self.form == "int4" else self.dim

    @property
    def lengths(self) -> list[int]:
        return [p + self.tokens for p in self.past]


def build(case: Case, domain: str = "ryzen", **attributes: Any) -> ModelProto:
    kind = ELEMENT[case.form][1]
    inputs = {"query": 1, "key": 1, "value": 1, "past_key": kind, "past_value": kind, "seqlens_k": 6}
    inputs |= {"total_sequence_length": 6, "cos_cache": 1, "sin_cache": 1, "position_ids": 7, "attention_bias": 1}
    inputs |= {"head_sink": 1, "k_scale": 1, "v_scale": 1, "q_norm_weight": 1, "k_norm_weight": 1}
    outputs = {"output": 1, "present_key": kind, "present_value": kind}
    if case.kv_group:
        outputs |= {"present_k_scale": 1, "present_v_scale": 1}
    absent = {"position_ids", "attention_bias"}
    absent |= set() if case.half else {"cos_cache", "sin_cache"}
    absent |= set() if case.sinks else {"head_sink"}
    absent |= set() if case.norms else {"q_norm_weight", "k_norm_weight"}
    absent |= {"key", "value"} if case.packed else set()
    given: dict[str, Any] = {"num_heads": case.heads, "kv_num_heads": case.kv_heads}
    given |= {"do_rotary": int(case.half > 0), "rotary_interleaved": int(case.interleaved)}
    given |= {"softcap": case.softcap} if case.softcap else {}
    given |= {"scale": case.scale} if case.scale else {}
    given |= {"local_window_size": case.window} if case.window else {}
    given |= {"sliding_window_cache": 1} if case.rolling else {}
    given |= {"kv_group": case.kv_group} if case.kv_group else {}
    if case.form in ("int8", "int4"):
        given |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        given |= {"kv_cache_bit_width": 8 if case.form == "int8" else 4}
    else:
        absent |= {"k_scale", "v_scale"}
    extra = attributes.pop("extra_inputs", ())
    names = [name if name not in absent or name in extra else "" for name in inputs]
    while not names[-1]:
        names.pop()
    node = helper.make_node("GroupQueryAttention", names, list(outputs), domain=domain, **(given | attributes))
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(n, inputs[n], None) for n in names if n],
        [helper.make_tensor_value_info(n, t, None) for n, t in outputs.items()],
    )
    opsets = [helper.make_opsetid(name, version) for name, version in {"": 21, "com.microsoft": 1, "ryzen": 1}.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def feeds_of(case: Case, seed: int = 0) -> dict[str, Array]:
    """Everything random; what a buffer holds behind a row's past is garbage that must never matter."""
    rng = np.random.default_rng(seed)
    batch = len(case.past)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    heads = case.heads + 2 * case.kv_heads
    qkv = normal(batch, case.tokens, heads, case.dim)
    qkv[:, :, : case.heads] *= case.spread
    parts = np.split(qkv, [case.heads, case.heads + case.kv_heads], axis=2)
    flat = [part.reshape(batch, case.tokens, -1) for part in parts]
    feeds = dict(zip(("query", "key", "value"), flat, strict=True))
    if case.packed:
        feeds = {"query": np.concatenate(flat, axis=2)}
    shape = (batch, case.kv_heads, case.rows, case.width)
    for name in ("past_key", "past_value"):
        if case.form in ("fp32", "fp16"):
            feeds[name] = normal(*shape).astype(ELEMENT[case.form][0])
        elif case.form == "int8":
            feeds[name] = rng.integers(-128, 128, shape).astype(np.int8)
        else:
            feeds[name] = rng.integers(0, 256, shape).astype(np.uint8)
    last = np.array(case.lengths, np.int32) - 1
    feeds |= {"seqlens_k": last, "total_sequence_length": np.array(last.max() + 1, np.int32)}
    if case.half:
        angles = np.arange(max(case.lengths))[:, None] / 10000 ** (np.arange(case.half) / case.half)
        feeds |= {"cos_cache": np.cos(angles).astype(np.float32), "sin_cache": np.sin(angles).astype(np.float32)}
    if case.sinks:
        feeds["head_sink"] = normal(case.heads) * 2
    if case.form in ("int8", "int4"):
        largest = 127 if case.form == "int8" else 7
        for name in ("k_scale", "v_scale"):
            shape = (1, case.kv_heads, 1, case.dim)
            if case.kv_group:
                shape = (batch, case.kv_heads, case.rows, case.dim // case.kv_group)
            feeds[name] = (rng.uniform(2, 4, shape) / largest).astype(np.float32)
    if case.norms:
        feeds |= {"q_norm_weight": 1 + normal(case.dim) / 4, "k_norm_weight": 1 + normal(case.dim) / 4}
    return feeds


def run(session: onnxruntime.InferenceSession, feeds: dict[str, Array]) -> dict[str, Array]:
    """With buffers of present's own."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def run_bound(session: onnxruntime.InferenceSession, feeds: dict[str, Array]) -> dict[str, Array]:
    """With past and present in one buffer; fails when anything beside a buffer changes."""
    binding = session.io_binding()
    held: dict[str, Array] = {}

    def guarded(array: Array) -> Array:
        filler = np.frombuffer(b"\xa5" * (2 * GUARD * array.itemsize), array.dtype)
        whole = np.concatenate((filler[:GUARD], array.ravel(), filler[GUARD:]))
        held[name] = whole
        return whole[GUARD:-GUARD].reshape(array.shape)

    def bind(put: Any, name: str, view: Array) -> None:
        put(name, "cpu", 0, view.dtype, view.shape, view.ctypes.data)

    views = {}
    for name, array in feeds.items():
        views[name] = guarded(array)
        bind(binding.bind_input, name, views[name])
    outputs = {}
    for output in session.get_outputs():
        name = output.name
        if name == "output":
            batch, tokens = feeds["query"].shape[:2]
            dim = feeds["past_key"].shape[3] * (2 if feeds["past_key"].dtype == np.uint8 else 1)
            width = feeds["query"].shape[2]
            if "key" not in feeds:
                width -= 2 * feeds["past_key"].shape[1] * dim
            outputs[name] = guarded(np.zeros((batch, tokens, width), np.float32))
        else:
            past = {"present_key": "past_key", "present_value": "past_value"}.get(name, name.removeprefix("present_"))
            outputs[name] = views[past]
        bind(binding.bind_output, name, outputs[name])
    session.run_with_iobinding(binding)
    for name, whole in held.items():
        edges = np.concatenate((whole[:GUARD], whole[-GUARD:])).view(np.uint8)
        assert (edges == 0xA5).all(), f"something was written beside {name}"
    return outputs


def decoded(stored: Array, case: Case, scale: Array | None) -> Array:
    if case.form in ("fp32", "fp16"):
        return stored.astype(np.float64)
    codes = stored
    if case.form == "int4":
        codes = np.stack((stored & 15, stored >> 4), -1).reshape(*stored.shape[:-1], -1).astype(np.int8) - 8
    assert scale is not None
    if case.kv_group:
        scale = np.repeat(scale, case.kv_group, axis=-1)
    return codes.astype(np.float64) * scale


def rounded(x: Array, case: Case, scale: Array | None) -> Array:
    """Rows (K, M, D) as a cache with fixed scales keeps them."""
    if case.form not in ("int8", "int4") or case.kv_group:
        return x
    assert scale is not None
    limit = 127 if case.form == "int8" else 7
    return np.clip(np.rint(x / scale[0]), -limit - 1, limit) * scale[0]


def resident(case: Case, seen: int) -> int:
    if not case.rolling or seen <= case.rows:
        return seen
    dropped = case.rows - case.window + 1
    return seen - dropped * -(-(seen - case.rows) // dropped)


def rotated(x: Array, case: Case, feeds: dict[str, Array], position: int) -> Array:
    if not case.half:
        return x
    cos, sin = feeds["cos_cache"][position].astype(np.float64), feeds["sin_cache"][position].astype(np.float64)
    even, odd = (slice(0, 2 * case.half, 2), slice(1, 2 * case.half, 2))
    if not case.interleaved:
        even, odd = slice(0, case.half), slice(case.half, 2 * case.half)
    y = x.copy()
    y[..., even], y[..., odd] = x[..., even] * cos - x[..., odd] * sin, x[..., even] * sin + x[..., odd] * cos
    return y


def new_heads(case: Case, feeds: dict[str, Array]) -> tuple[Array, Array, Array]:
    """Queries, keys and values (B, M, heads, D) in float64, normalised and rotated."""
    batch, dim = len(case.past), case.dim
    whole = feeds["query"] if case.packed else np.concatenate([feeds[n] for n in ("query", "key", "value")], axis=2)
    whole = whole.reshape(batch, case.tokens, -1, dim).astype(np.float64)
    q, k, v = np.split(whole, [case.heads, case.heads + case.kv_heads], axis=2)
    if case.norms:
        q = q / np.sqrt((q**2).mean(-1, keepdims=True) + 1e-6) * feeds["q_norm_weight"]
        k = k / np.sqrt((k**2).mean(-1, keepdims=True) + 1e-6) * feeds["k_norm_weight"]
    for b, past in enumerate(case.past):
        for m in range(case.tokens):
            q[b, m], k[b, m] = rotated(q[b, m], case, feeds, past + m), rotated(k[b, m], case, feeds, past + m)
    return q, k, v


def expected(case: Case, feeds: dict[str, Array], got: dict[str, Array]) -> Array:
    """Attention in float64 over the old rows of ``feeds`` and the new ones as ``got`` has stored them, where it still
    has them; those that were evicted in the same call are rounded here."""
    q, k, v = new_heads(case, feeds)
    group, scale = case.heads // case.kv_heads, case.scale or case.dim**-0.5
    steps = [got.get(f"present_{n}_scale", feeds.get(f"{n}_scale")) for n in "kv"]
    out = np.zeros(q.shape)
    for b, past in enumerate(case.past):
        held, kept = resident(case, past), resident(case, past + case.tokens)
        caches = []
        for new, name, step in zip((k, v), ("key", "value"), steps, strict=True):
            old_step = feeds.get(f"{name[0]}_scale")
            row = slice(b, b + 1) if case.kv_group else slice(None)
            old = decoded(feeds[f"past_{name}"][b : b + 1], case, None if old_step is None else old_step[row])[0]
            now = decoded(got[f"present_{name}"][b : b + 1], case, None if step is None else step[row])[0]
            fresh = rounded(new[b].transpose(1, 0, 2), case, step)
            rows = np.concatenate((old[:, :held], fresh), axis=1)
            count = min(case.tokens, kept)
            rows[:, rows.shape[1] - count :] = now[:, kept - count : kept]
            caches.append(rows)
        first = past - held
        for m in range(case.tokens):
            position = past + m
            start = max(0, position - case.window + 1) if case.window else 0
            seen = slice(start - first, position + 1 - first)
            for h in range(case.heads):
                scores = caches[0][h // group, seen] @ q[b, m, h] * scale
                if case.softcap:
                    scores = case.softcap * np.tanh(scores / case.softcap)
                sink = feeds["head_sink"][h] if case.sinks else -np.inf
                most = max(scores.max(), sink)
                weights = np.exp(scores - most)
                out[b, m, h] = weights @ caches[1][h // group, seen] / (weights.sum() + np.exp(sink - most))
    return out.reshape(len(case.past), case.tokens, -1)


def error(got: Array, wanted: Array) -> float:
    return float(((got - wanted) ** 2).sum() / (wanted**2).sum())


def tolerance(case: Case) -> float:
    return 1e-8 if case.form in ("int8", "int4") and not case.kv_group else 1e-11


def check(open_session: Open, case: Case, isa: str = "auto") -> dict[str, Array]:
    """One call in place and one with buffers of its own: the same output and rows, and the right ones."""
    session, feeds = open_session(build(case, isa=isa)), feeds_of(case)
    got = run(session, feeds)
    assert error(got["output"], expected(case, feeds, got)) < tolerance(case), case
    bound = run_bound(session, feeds)
    np.testing.assert_array_equal(bound["output"], got["output"])
    for name in ("present_key", "present_value"):
        for b, length in enumerate(case.lengths):
            kept = resident(case, length)
            np.testing.assert_array_equal(bound[name][b, :, :kept], got[name][b, :, :kept])
            if not case.rolling:  # what was there before is there still
                past = name.replace("present", "past")
                np.testing.assert_array_equal(got[name][b, :, : case.past[b]], feeds[past][b, :, : case.past[b]])
                np.testing.assert_array_equal(bound[name][b, :, length:], feeds[past][b, :, length:])
    return got


SHAPES = [
    Case(heads=1, kv_heads=1, dim=8, past=(0,)),
    Case(heads=7, kv_heads=1, dim=40, past=(12,), tokens=2, rows=14),
    Case(heads=8, kv_heads=1, dim=64, past=(130,), tokens=1, rows=131, half=32),
    Case(heads=32, kv_heads=4, dim=64, past=(517,), tokens=1, rows=530, half=32, packed=True),
    Case(heads=3, kv_heads=3, dim=80, past=(5,), tokens=5, rows=10, half=16, interleaved=True),
    Case(heads=4, kv_heads=1, dim=96, past=(0,), tokens=16, rows=16, half=48),
    Case(heads=8, kv_heads=4, dim=128, past=(1030,), tokens=3, rows=1033, half=64, spread=4),
    Case(heads=2, kv_heads=1, dim=256, past=(40,), tokens=33, rows=97, half=128, interleaved=True),
    Case(heads=8, kv_heads=1, dim=24, past=(600,), tokens=130, rows=730),
    Case(heads=6, kv_heads=3, dim=64, past=(0, 0, 0), tokens=17, rows=17, packed=True, half=8),
    Case(heads=8, kv_heads=2, dim=16, past=(3, 700, 127), tokens=1, rows=701, half=8),
    Case(heads=8, kv_heads=2, dim=16, past=(3, 0, 127), tokens=4, rows=140, half=8, sinks=True),
]
MASKS: list[dict[str, Any]] = [
    {"window": 5},
    {"window": 100, "sinks": True},
    {"softcap": 5.0},
    {"sinks": True, "scale": 0.3},
    {"norms": True},
    {"window": 33, "softcap": 20.0, "sinks": True, "norms": True},
]
FORMS = list(ELEMENT)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_shapes(open_session: Open, isa: str, shape: int, form: str) -> None:
    check(open_session, replace(SHAPES[shape], form=form), isa)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", range(len(MASKS)))
@pytest.mark.parametrize("tokens", [1, 6])
def test_masks(open_session: Open, isa: str, mask: int, tokens: int, form: str) -> None:
    case = Case(past=(9, 301), tokens=tokens, rows=310, form=form, half=8, **MASKS[mask])
    check(open_session, case, isa)


@pytest.mark.parametrize("form", ["fp32", "int8", "int4"])
@pytest.mark.parametrize(("past", "tokens"), [((0,), 3), ((20,), 1), ((23,), 1), ((30,), 1), ((40,), 7), ((3,), 60)])
def test_a_buffer_the_size_of_a_window(
    open_session: Open, isa: str, past: tuple[int, ...], tokens: int, form: str
) -> None:
    """Rows are evicted as ONNX Runtime documents it, and what stays is the same bytes as there."""
    case = Case(dim=32, past=past, tokens=tokens, rows=24, window=18, rolling=True, form=form, half=8)
    got = check(open_session, case, isa)
    stock = run(open_session(build(case, "com.microsoft")), feeds_of(case))
    kept = resident(case, case.lengths[0])
    for name in ("present_key", "present_value"):
        mine, theirs = got[name][:, :, :kept], stock[name][:, :, :kept]
        if isa == "scalar" or form != "fp32":
            np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_allclose(mine.astype(np.float32), theirs.astype(np.float32), atol=1e-6)
    assert error(got["output"], stock["output"].astype(np.float64)) < 1e-4  # theirs rounds more


@pytest.mark.parametrize("form", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tokens", [1, 37])
def test_stored_rows_are_those_of_onnx_runtime(
    open_session: Open, isa: str, form: str, interleaved: bool, tokens: int
) -> None:
    """Bit for bit, rotation and rounding included. Keys are large enough for some codes to be clamped."""
    case = Case(heads=4, kv_heads=2, dim=64, past=(11,), tokens=tokens, rows=50, form=form, half=32)
    case = replace(case, interleaved=interleaved)
    feeds = feeds_of(case)
    feeds["key"] *= 3
    feeds["value"].ravel()[::7] = np.round(feeds["value"].ravel()[::7], 1)
    if "k_scale" in feeds:
        feeds["v_scale"][..., ::2] = 0.2  # ties
        feeds["v_scale"][..., 5] = 0.0
    mine = run(open_session(build(case, isa=isa)), feeds)
    theirs = run(open_session(build(case, "com.microsoft")), feeds)
    rows = case.lengths[0]
    for name in ("present_key", "present_value"):
        np.testing.assert_array_equal(mine[name][:, :, :rows], theirs[name][:, :, :rows])
    assert error(mine["output"], theirs["output"].astype(np.float64)) < (1e-11 if form == "fp32" else 1e-4)


def test_a_ragged_first_prompt(open_session: Open, isa: str) -> None:
    """Rows shorter than the longest are read from their beginning; what is behind their ends means nothing."""
    case = Case(past=(0, 0), tokens=9, rows=12, half=8)
    feeds = feeds_of(case)
    feeds["seqlens_k"] = np.array([8, 3], np.int32)
    mine = run(open_session(build(case, isa=isa)), feeds)
    theirs = run(open_session(build(case, "com.microsoft")), feeds)
    for b, length in enumerate((9, 4)):
        np.testing.assert_array_equal(mine["present_key"][b, :, :length], theirs["present_key"][b, :, :length])
        np.testing.assert_allclose(mine["output"][b, :length], theirs["output"][b, :length], atol=2e-6)


def test_a_cache_that_grows(open_session: Open, isa: str) -> None:
    """Past without spare rows: present has as many more as tokens come."""
    case = Case(past=(7,), tokens=3, rows=7, half=8)
    feeds = feeds_of(case)
    mine = run(open_session(build(case, isa=isa)), feeds)
    theirs = run(open_session(build(case, "com.microsoft")), feeds)
    assert mine["present_key"].shape == (1, 2, 10, 16)
    np.testing.assert_array_equal(mine["present_key"], theirs["present_key"])
    np.testing.assert_allclose(mine["output"], theirs["output"], atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_neither_threads_nor_other_rows_change_a_bit(open_session: Open, isa: str, form: str) -> None:
    """A prompt at once, in chunks and token by token, with one thread and two, alone and in a batch."""
    if isa == "scalar":
        pytest.skip("too slow to be worth it, and without tasks of its own")
    whole = Case(heads=8, kv_heads=2, dim=64, past=(0, 0), tokens=70, rows=900, form=form, half=32, window=400)
    whole = replace(whole, past=(700, 700))
    feeds = feeds_of(whole)
    sessions = [open_session(build(whole, isa=isa), threads) for threads in (1, 2)]
    reference = run(sessions[0], feeds)
    again = run(sessions[1], feeds)
    for name, array in reference.items():
        np.testing.assert_array_equal(array, again[name])
    for chunk in (1, 3, 33):
        cache = {n: feeds[n][:1] for n in ("past_key", "past_value")}
        outputs = []
        for begin in range(0, whole.tokens, chunk):
            part = slice(begin, min(begin + chunk, whole.tokens))
            step = feeds | cache | {n: feeds[n][:1, part] for n in ("query", "key", "value")}
            length = whole.past[0] + part.stop
            step["seqlens_k"] = np.array([length - 1], np.int32)
            step["total_sequence_length"] = np.array(length, np.int32)
            result = run(sessions[chunk % 2], step)
            cache = {"past_key": result["present_key"], "past_value": result["present_value"]}
            outputs.append(result["output"])
        np.testing.assert_array_equal(np.concatenate(outputs, axis=1), reference["output"][:1])
        np.testing.assert_array_equal(cache["past_key"][:, :, :770], reference["present_key"][:1, :, :770])


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("group", [8, 32])
@pytest.mark.parametrize("tokens", [1, 20])
def test_scales_of_every_token(open_session: Open, isa: str, form: str, group: int, tokens: int) -> None:
    case = Case(dim=64, past=(150, 3), tokens=tokens, rows=180, form=form, kv_group=group, half=32)
    got = check(open_session, case, isa)
    _, k, v = new_heads(case, feeds_of(case))
    for name, new in (("key", k), ("value", v)):
        stored = decoded(got[f"present_{name}"], case, got[f"present_{name[0]}_scale"])
        for b, past in enumerate(case.past):
            wanted = new[b].transpose(1, 0, 2)
            limit = 127 if form == "int8" else 7
            steps = np.abs(wanted).reshape(*wanted.shape[:2], -1, group).max(-1, keepdims=True) / limit
            off = np.abs(stored[b, :, past : past + tokens] - wanted).reshape(*wanted.shape[:2], -1, group)
            assert (off <= steps * 0.501).all()


def test_scales_beside_codes_that_stay_in_place(open_session: Open, isa: str) -> None:
    """Keys and values in past's buffers, their scales in new ones: the old tokens' scales are there as well."""
    case = Case(dim=64, past=(150,), rows=180, form="int8", kv_group=32)
    session, feeds = open_session(build(case, isa=isa)), feeds_of(case)
    wanted = run(session, feeds)
    held = {name: array.copy() for name, array in feeds.items()}
    binding = session.io_binding()
    for name, array in held.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for name, array in wanted.items():
        held[name] = held[name.replace("present", "past")] if name in ("present_key", "present_value") else array.copy()
        if name not in ("present_key", "present_value"):
            held[name].fill(7)
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, held[name].ctypes.data)
    session.run_with_iobinding(binding)
    for name in ("output", "present_k_scale", "present_v_scale"):
        np.testing.assert_array_equal(held[name], wanted[name])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("name", ["query", "past_key"])
def test_numbers_that_are_none(open_session: Open, isa: str, name: str, softcap: float, form: str) -> None:
    """A NaN in a query head reaches that head alone, one in a key every head that reads it."""
    if name == "past_key" and form in ("int8", "int4"):
        pytest.skip("codes are always numbers")
    case = Case(dim=64, past=(20,), rows=40, form=form, softcap=softcap)
    feeds = feeds_of(case)
    feeds[name][(0, 0, 64 + 5) if name == "query" else (0, 1, 3, 5)] = np.nan
    output = run(open_session(build(case, isa=isa)), feeds)["output"].reshape(8, 64)
    hit = np.arange(8) == 1 if name == "query" else np.arange(8) >= 4
    assert np.isnan(output[hit]).all() and np.isfinite(output[~hit]).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-33])
def test_queries_next_to_zero(open_session: Open, isa: str, form: str, size: float) -> None:
    check(open_session, Case(dim=64, past=(20,), rows=40, form=form, spread=size), isa)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_rolling_buffer_with_scales_of_every_token(open_session: Open, isa: str, form: str) -> None:
    for past, tokens in (((23,), 1), ((40,), 7)):
        case = Case(dim=32, past=past, tokens=tokens, rows=24, window=18, rolling=True, form=form, kv_group=16)
        check(open_session, case, isa)


GRAPH_REFUSALS = [
    ({"num_heads": 3}, "num_heads is 3, expected a multiple of kv_num_heads"),
    ({"local_window_size": 0}, "local_window_size is 0"),
    ({"sliding_window_cache": 1}, "no local_window_size"),
    ({"smooth_softmax": 1}, "smooth_softmax is not supported"),
    ({"qk_output": 1}, "qk_output is not supported"),
    ({"causal": 0}, "not causal"),
    ({"softcap": -1.0}, "softcap is -1"),
    ({"scale": float("inf")}, "scale is inf"),
    ({"k_quant_type": "PER_CHANNEL"}, "expected the same for both"),
    ({"k_quant_type": "ODD", "v_quant_type": "ODD"}, "k_quant_type is ODD"),
    ({"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}, "kv_cache_bit_width is 0"),
    ({"kv_group": 8}, "kv_group is 8, but"),
    ({"qk_norm_epsilon": -1.0}, "qk_norm_epsilon is -1"),
    ({"softcap": 5}, "softcap is of another type, expected a float"),
    ({"isa": "mmx"}, "isa is 'mmx'"),
]


@pytest.mark.parametrize(("attributes", "message"), GRAPH_REFUSALS)
def test_a_graph_is_refused(open_session: Open, attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        open_session(build(Case(), **attributes))


def changed(name: str, change: Callable[[Array], Array]) -> Callable[[dict[str, Array]], None]:
    def apply(feeds: dict[str, Array]) -> None:
        feeds[name] = np.ascontiguousarray(change(feeds[name]))

    return apply


REFUSALS = [
    (changed("seqlens_k", lambda x: x - 100), "seqlens_k"),
    (changed("seqlens_k", lambda x: x + 1), "seqlens_k"),
    (changed("seqlens_k", lambda x: x + 100_000), "seqlens_k"),
    (changed("seqlens_k", lambda x: np.full_like(x, 2**31 - 1)), "seqlens_k"),
    (changed("seqlens_k", lambda x: np.full_like(x, -(2**31))), "seqlens_k"),
    (changed("seqlens_k", lambda x: x[:1]), "seqlens_k has the shape"),
    (changed("total_sequence_length", lambda x: x - 1), "seqlens_k"),
    (changed("total_sequence_length", lambda x: x + 100), "total_sequence_length is"),
    (changed("total_sequence_length", lambda x: np.full_like(x, -5)), "total_sequence_length is -5"),
    (changed("total_sequence_length", lambda x: np.full_like(x, 2**31 - 1)), "total_sequence_length is"),
    (changed("total_sequence_length", lambda x: np.repeat(x, 2)), "total_sequence_length has the shape"),
    (changed("cos_cache", lambda x: x[:-1]), "sin_cache has the shape"),
    (changed("cos_cache", lambda x: np.repeat(x, 9, axis=1)), "cos_cache has the shape"),
    (changed("cos_cache", lambda x: x.ravel()), "cos_cache has the shape"),
    (changed("query", lambda x: x[..., :-1]), "query has the shape"),
    (changed("query", lambda x: x[0]), "query has the shape"),
    (changed("query", lambda x: x[..., ::2]), "key has the shape"),
    (changed("key", lambda x: np.repeat(x, 2, axis=1)), "key has the shape"),
    (changed("value", lambda x: x[..., :-8]), "value has the shape"),
    (changed("past_key", lambda x: x[:, :1]), "past_key has the shape"),
    (changed("past_key", lambda x: x[:1]), "past_key has the shape"),
    (changed("past_key", lambda x: x[..., :-1]), "past_key has the shape"),
    (changed("past_key", lambda x: x[0]), "past_key has the shape"),
    (changed("past_value", lambda x: x[:, :, 1:]), "past_value has the shape"),
    (changed("head_sink", lambda x: x[1:]), "head_sink has the shape"),
    (changed("q_norm_weight", lambda x: x[1:]), "q_norm_weight has the shape"),
    (changed("k_scale", lambda x: x[..., 1:]), "k_scale has the shape"),
    (changed("v_scale", lambda x: x.ravel()), "v_scale has the shape"),
    (changed("v_scale", lambda x: np.repeat(x, 2, axis=2)), "v_scale has the shape"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_tensor_is_refused(
    open_session: Open, change: Callable[[dict[str, Array]], None], message: str, tokens: int
) -> None:
    case = Case(past=(5, 33), tokens=tokens, rows=40, form="int8", half=8, sinks=True, norms=True)
    feeds = feeds_of(case)
    change(feeds)
    with pytest.raises(Exception, match=message):
        run(open_session(build(case)), feeds)


def test_short_tables_are_refused(open_session: Open) -> None:
    case = Case(past=(5, 33), half=8)
    feeds = feeds_of(case)
    for name in ("cos_cache", "sin_cache"):
        feeds[name] = feeds[name][:-1]
    with pytest.raises(Exception, match="cos_cache has 33 positions, total_sequence_length is 34"):
        run(open_session(build(case)), feeds)


def test_a_window_larger_than_its_buffer_is_refused(open_session: Open) -> None:
    case = Case(past=(5,), rows=10, window=11, rolling=True)
    with pytest.raises(Exception, match="past_key holds 10 rows, expected at least the window of 11"):
        run(open_session(build(case)), feeds_of(case))


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_cache_of_another_type_is_refused(open_session: Open, form: str) -> None:
    case = Case(past=(5,), form=form)
    feeds = feeds_of(case)
    bits = 4 if form == "int8" else 8
    with pytest.raises(Exception, match="past_key has elements of type"):
        run(open_session(build(case, kv_cache_bit_width=bits)), feeds)


@pytest.mark.parametrize("name", ["position_ids", "attention_bias"])
def test_an_input_that_would_be_ignored_is_refused(open_session: Open, name: str) -> None:
    case = Case(past=(5,))
    shape, kind = ((1, 1), np.int64) if name == "position_ids" else ((1, 1, 1, 6), np.float32)
    feeds = feeds_of(case) | {name: np.zeros(shape, kind)}
    with pytest.raises(Exception, match=f"{name} (are|is) not supported"):
        run(open_session(build(case, extra_inputs=(name,))), feeds)


def test_constant_scales(open_session: Open) -> None:
    """Scales as initializers, as artifacts have them."""
    case = Case(past=(20,), form="int8")
    feeds = feeds_of(case)
    wanted = run(open_session(build(case)), feeds)
    model = build(case)
    for name in ("k_scale", "v_scale"):
        model.graph.initializer.append(numpy_helper.from_array(feeds.pop(name), name))
        model.graph.input.remove(next(i for i in model.graph.input if i.name == name))
    np.testing.assert_array_equal(run(open_session(model), feeds)["output"], wanted["output"])


def test_one_scale_for_all_channels(open_session: Open) -> None:
    case = Case(past=(20,), form="int8")
    feeds = feeds_of(case)
    for name in ("k_scale", "v_scale"):
        feeds[name] = np.full_like(feeds[name], 0.03)
    wanted = run(open_session(build(case)), feeds)
    one = feeds | {name: np.array([0.03], np.float32) for name in ("k_scale", "v_scale")}
    got = run(open_session(build(case, k_quant_type="PER_TENSOR", v_quant_type="PER_TENSOR")), one)
    np.testing.assert_array_equal(got["output"], wanted["output"])
