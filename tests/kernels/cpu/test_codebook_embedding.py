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
CONSTANTS = ("codes", "codebook", "scales", "gain", "offset", "slots", "kept")  # in the operator's order
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Table:
    """Random codes, codebooks and whatever else ``also`` names."""

    bits: int
    dim: int
    stages: int
    width: int
    group: int | None = None  # None: no scales; 0: one for a row
    also: tuple[str, ...] = ()  # of gain, offset, kept
    kept: type = np.float16
    rows: int = V

    @property
    def attributes(self) -> dict[str, int]:
        return {"bits": self.bits, "width": self.width, "group": self.group or 0}

    def stored(self) -> tuple[Arrays, np.ndarray]:
        """The operator's constants, and the decoded table: every step in float32."""
        rng = np.random.default_rng(self.bits * 1000 + self.width)
        codes = rng.integers(0, 1 << self.bits, (self.rows, self.stages, self.width // self.dim))
        bits = (codes.reshape(self.rows, -1, 1) >> np.arange(self.bits)) & 1
        packed = np.packbits(bits.reshape(self.rows, -1).astype(np.uint8), axis=1, bitorder="little")
        codebook = rng.standard_normal((self.stages, 1 << self.bits, self.dim), np.float32)
        rows = codebook[0][codes[:, 0]]
        if self.stages == 2:
            rows = rows + codebook[1][codes[:, 1]]
        rows = rows.reshape(self.rows, self.width)
        constants = {"codes": packed, "codebook": codebook}
        if self.group is not None:
            group = self.group or self.width
            scales = constants["scales"] = rng.standard_normal((self.rows, self.width // group)).astype(np.float16)
            rows = rows * np.repeat(scales.astype(np.float32), group, axis=1)
        if "gain" in self.also:
            gain = constants["gain"] = rng.standard_normal(self.width, np.float32)
            rows = rows * gain
        if "offset" in self.also:
            offset = constants["offset"] = rng.standard_normal(self.width, np.float32)
            rows = rows + offset
        if "kept" in self.also:
            slots = constants["slots"] = np.full(self.rows, -1, np.int16)
            slots[[0, 5, self.rows - 1]] = (2, 0, 2)
            kept = constants["kept"] = rng.standard_normal((3, self.width)).astype(self.kept)
            rows[slots >= 0] = kept[slots[slots >= 0]]
        return constants, rows


def model_of(
    one_node: Callable[..., ModelProto],
    constants: Arrays,
    ids: int = TensorProto.INT64,
    fed: tuple[str, ...] = (),
    **attributes: Any,
) -> ModelProto:
    """What is in ``fed`` is an input of the graph, not an initializer."""
    inputs = ["ids", *(name if name in constants else "" for name in CONSTANTS)]
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node("CodebookEmbedding", inputs, ["out"], domain="ryzen", **attributes)
    kinds = {name: helper.np_dtype_to_tensor_dtype(constants[name].dtype) for name in fed}
    held = {name: array for name, array in constants.items() if name not in fed}
    return one_node(node, {"ids": ids, **kinds}, {"out": TensorProto.FLOAT}, held)


ALL = ("gain", "offset", "kept")
TABLES = [
    *(Table(bits, dim, stages, 37 * dim) for bits in range(1, 9) for dim in (1, 2, 4, 8) for stages in (1, 2)),
    *(Table(8, dim, stages, 48 * dim, 16, ALL) for dim in (1, 2, 4, 8) for stages in (1, 2)),
    *(Table(4, 1, 2, width, 0, ALL) for width in (1, 2, 7, 15, 16, 17, 64, 511, 512, 513, 1031)),
    *(Table(6, 2, 2, width, width // 3, ALL, np.float32) for width in (6, 36, 66, 510, 1032)),
    Table(8, 2, 1, 896, 0, ("gain", "offset")),
    Table(8, 2, 1, 896, 0, ("gain",)),
    Table(8, 2, 1, 896, None, ("offset",)),
    Table(8, 4, 2, 896, 128, ("kept",)),
    Table(3, 1, 1, 105, 7, ("offset", "kept"), np.float32),
    Table(5, 2, 2, 2, 1, ALL),
    Table(7, 1, 1, 70, None, ("kept",)),
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
def test_ids_of_any_shape(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    shape: tuple[int, ...],
) -> None:
    table = Table(4, 2, 1, 18, 0, ALL)
    constants, rows = table.stored()
    ids = np.random.default_rng(0).integers(0, V, shape)
    fed = ("codebook", "scales", "slots", "kept")
    session = open_session(model_of(one_node, constants, fed=fed, **table.attributes))
    out = session.run(None, {"ids": ids, **{name: constants[name] for name in fed}})[0]
    assert out.shape == (*shape, 18)
    np.testing.assert_array_equal(out, rows[ids])


def test_threads_and_guard_bands(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
) -> None:
    for table in (Table(3, 1, 2, 517, 47, ALL), Table(8, 2, 1, 384, 0, ALL, np.float32), Table(8, 8, 1, 8, 0)):
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
    table = Table(4, 1, 1, 20, also=("kept",))
    constants, rows = table.stored()
    session = open_session(model_of(one_node, constants, **table.attributes, isa=isa))
    with pytest.raises(Exception, match=f"id {bad} at place 1 is outside"):
        session.run(None, {"ids": np.array([0, bad, 1])})
    np.testing.assert_array_equal(session.run(None, {"ids": np.array([2])})[0], rows[[2]])


@pytest.mark.parametrize("slot", [-2, -32768])
def test_any_negative_slot_is_a_coded_row(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
    slot: int,
) -> None:
    table = Table(4, 1, 1, 20, also=("kept",))
    constants, rows = table.stored()
    constants["slots"][7] = slot  # which was coded before
    session = open_session(model_of(one_node, constants, **table.attributes, isa=isa))
    np.testing.assert_array_equal(session.run(None, {"ids": np.arange(V)})[0], rows)


@pytest.mark.parametrize("bad", [3, 32767])
def test_slots_without_a_kept_row_are_an_error_when_the_row_is_asked_for(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
    bad: int,
) -> None:
    table = Table(4, 1, 1, 20, also=("kept",))
    constants, rows = table.stored()
    constants["slots"][7] = bad
    session = open_session(model_of(one_node, constants, **table.attributes, isa=isa))
    np.testing.assert_array_equal(session.run(None, {"ids": np.array([0, 6])})[0], rows[[0, 6]])
    with pytest.raises(Exception, match=f"slots has {bad} for row 7"):
        session.run(None, {"ids": np.array([0, 7])})


def test_rows_of_every_slot(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
) -> None:
    """As many kept rows as slots can name: all are coded but the last two, which are the last two kept."""
    table = Table(1, 8, 1, 8, also=("kept",), rows=32769)
    constants, rows = table.stored()
    constants["slots"][:] = -1
    constants["slots"][-2:] = (32765, 32766)
    constants["kept"] = np.arange(32767 * 8, dtype=np.float32).reshape(-1, 8)
    session = open_session(model_of(one_node, constants, **table.attributes, isa=isa))
    ids = np.array([32768, 3, 32767])
    wanted = np.stack([constants["kept"][-1], rows[3], constants["kept"][-2]])
    np.testing.assert_array_equal(session.run(None, {"ids": ids})[0], wanted)


def test_values_that_are_no_numbers(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
) -> None:
    """Infinities, signed zeros and the smallest numbers go the way that NumPy's go."""
    values = np.array([np.inf, -np.inf, np.nan, -0.0, 6e-8, -6e-5, 65504, 1], np.float16)
    constants = {
        "codes": np.arange(8, dtype=np.uint8).reshape(8, 1).repeat(16, 1),
        "codebook": np.tile(np.float32([1.5, -0.0, 1e-40, 3e38, 0, -2, np.inf, np.nan] * 32), 1).reshape(1, 256, 1),
        "scales": values.reshape(8, 1),
        "offset": np.full(16, -0.0, np.float32),
        "slots": np.int16([-1, -1, -1, -1, -1, -1, -1, 0]),
        "kept": np.tile(values, 2).reshape(1, 16),
    }
    with np.errstate(all="ignore"):
        wanted = constants["codebook"][0, :8] * values.astype(np.float32)[:, None] + constants["offset"]
    wanted[7] = constants["kept"][0]
    session = open_session(model_of(one_node, constants, bits=8, width=16, isa=isa))
    got = session.run(None, {"ids": np.arange(8)})[0]
    numbers = ~np.isnan(wanted)
    assert np.isnan(got[~numbers]).all()
    np.testing.assert_array_equal(got[numbers].view(np.int32), wanted[numbers].view(np.int32))


def test_kept_halves_widen_to_the_same_bits(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isa: str,
) -> None:
    """Every float16 there is; a signalling NaN becomes a quiet one, with the highest bit of the fraction set."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    fraction, exponent = (halves & 0x3FF).astype(np.uint32), halves >> 10 & 31
    no_numbers = (exponent == 31) & (fraction != 0)
    wanted = halves.view(np.float16).astype(np.float32).view(np.uint32)
    sign = (halves & 0x8000).astype(np.uint32) << 16
    wanted = np.where(no_numbers, sign | 0x7F800000 | 1 << 22 | fraction << 13, wanted)
    constants = {
        "codes": np.zeros((1, 1 << 16), np.uint8),
        "codebook": np.zeros((1, 256, 1), np.float32),
        "slots": np.zeros(1, np.int16),
        "kept": halves.view(np.float16)[None],
    }
    session = open_session(model_of(one_node, constants, bits=8, width=1 << 16, isa=isa))
    got = session.run(None, {"ids": np.array([0])})[0]
    np.testing.assert_array_equal(got[0].view(np.uint32), wanted)


@pytest.mark.parametrize(
    ("attributes", "part"),
    [
        ({"bits": 0}, "bits"),
        ({"bits": 9}, "bits"),
        ({"bits": 5}, "codebook has the shape"),
        ({"width": 21, "group": 7}, "multiple of the codebook's 2 channels"),
        ({"width": -20}, "width is -20"),
        ({"width": 2**62}, "width is"),
        ({"width": 24}, "codes has the shape"),
        ({"group": -1}, "group"),
        ({"group": 8}, "group is 8, expected a divisor"),
        ({"group": 5}, "scales has the shape"),
        ({"group": 0}, "scales has the shape"),
        ({"isa": "neon"}, "isa is 'neon'"),
    ],
)
def test_refused_when_the_session_is_made(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    attributes: dict[str, Any],
    part: str,
) -> None:
    table = Table(4, 2, 2, 20, 4)
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
        ("codebook", np.zeros((2, 16, 3), np.float32)),
        ("codebook", np.zeros((3, 16, 2), np.float32)),
        ("codebook", np.zeros((2, 32), np.float32)),
        ("scales", np.zeros((V - 1, 5), np.float16)),
        ("scales", np.zeros((V, 4), np.float16)),
        ("scales", np.zeros(V, np.float16)),
        ("gain", np.zeros(19, np.float32)),
        ("gain", np.zeros((1, 20), np.float32)),
        ("offset", np.zeros((V, 20), np.float32)),
        ("slots", np.zeros(V - 1, np.int16)),
        ("slots", np.zeros((V, 1), np.int16)),
        ("kept", np.zeros((3, 19), np.float16)),
        ("kept", np.zeros(60, np.float16)),
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
    table = Table(4, 2, 2, 20, 4, ALL)
    constants = {**table.stored()[0], name: array}
    model = model_of(one_node, constants, fed=(name,) if fed else (), **table.attributes)
    with pytest.raises(Exception, match=f"{name} has the shape"):
        open_session(model).run(None, {"ids": np.array([0]), name: array})


def test_the_rank_of_codes_is_checked_first(
    one_node: Callable[..., ModelProto], open_session: Callable[..., onnxruntime.InferenceSession]
) -> None:
    """Also where the codebook is computed by the graph, and all else is there to be compared with rows of codes."""
    table = Table(4, 2, 2, 20, 4, ALL)
    constants = {**table.stored()[0], "codes": np.zeros(V * 10, np.uint8)}
    model = model_of(one_node, constants, fed=("codebook",), **table.attributes)
    with pytest.raises(Exception, match=r"codes has the shape .*, expected two dimensions"):
        open_session(model)


def test_ids_of_more_dimensions_than_seven(
    one_node: Callable[..., ModelProto], open_session: Callable[..., onnxruntime.InferenceSession]
) -> None:
    table = Table(4, 2, 2, 20, 4)
    constants, _ = table.stored()
    session = open_session(model_of(one_node, constants, **table.attributes))
    assert session.run(None, {"ids": np.zeros((1,) * 7, np.int64)})[0].shape == (*[1] * 7, 20)
    for dimensions, part in ((8, "the most are 7"), (9, "the most are 8")):
        with pytest.raises(Exception, match=part):
            session.run(None, {"ids": np.zeros((1,) * dimensions, np.int64)})


def test_fewer_stages_or_channels_than_the_codes_have(
    one_node: Callable[..., ModelProto], open_session: Callable[..., onnxruntime.InferenceSession]
) -> None:
    table = Table(4, 2, 2, 20, 4)
    for shape in ((1, 16, 2), (2, 16, 4), (2, 16, 1)):
        constants = {**table.stored()[0], "codebook": np.zeros(shape, np.float32)}
        with pytest.raises(Exception, match="codes has the shape"):
            open_session(model_of(one_node, constants, **table.attributes))


@pytest.mark.parametrize("name", ["slots", "kept"])
def test_slots_go_with_kept_rows(
    one_node: Callable[..., ModelProto], open_session: Callable[..., onnxruntime.InferenceSession], name: str
) -> None:
    table = Table(4, 2, 2, 20, 4, ALL)
    constants = table.stored()[0]
    del constants[name]
    with pytest.raises(Exception, match="slots and kept must be both given or both absent"):
        open_session(model_of(one_node, constants, **table.attributes))


def test_more_kept_rows_than_slots_can_name(
    one_node: Callable[..., ModelProto], open_session: Callable[..., onnxruntime.InferenceSession]
) -> None:
    table = Table(1, 8, 1, 8, also=("kept",))
    constants = {**table.stored()[0], "kept": np.zeros((32768, 8), np.float16)}
    with pytest.raises(Exception, match="kept has 32768 rows, the most are 32767"):
        open_session(model_of(one_node, constants, **table.attributes))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ids", np.int32),
        ("scales", np.float32),
        ("gain", np.float16),
        ("slots", np.int32),
        ("kept", np.float64),
        ("kept", np.int8),
    ],
)
def test_elements_of_another_type(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    name: str,
    kind: type,
) -> None:
    """The runtime refuses a type that the operator does not have; of kept rows, which have two, the operator does."""
    table = Table(4, 1, 1, 20, 0, ALL)
    constants = table.stored()[0]
    ids = TensorProto.INT32 if name == "ids" else TensorProto.INT64
    if name != "ids":
        constants[name] = constants[name].astype(kind)
    with pytest.raises(Exception, match="kept has elements" if name == "kept" else "Type"):
        open_session(model_of(one_node, constants, ids, **table.attributes))
