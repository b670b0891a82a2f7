"""Lookups in tables of codes become native ones: which functions are believed, which tables, and the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ryzen_compile.backends.onnxruntime import claim_lookup
from ryzen_compile.backends.onnxruntime.claim import claim
from ryzen_compile.backends.onnxruntime.claim_report import KINDS
from ryzen_compile.backends.onnxruntime.codebook_lookup import Lookup
from ryzen_compile.backends.onnxruntime.emit import Emitter
from ryzen_compile.numerics import codebook
from ryzen_compile.ops import codebook_embedding

ROWS, KEPT = 9, 2
EVERYTHING = Lookup(24, 4, 2, 2, 8, gain=True, offset=True, kept=True)
SHIFTED = Lookup(40, 3, 2, 1, 0, gain=True, offset=False, kept=False)
ELSE = "its function computes something else than rows of a table of codes"
NO_CODEBOOK = "not 1 or 2 stages of 2 to 256 entries of 1, 2, 4 or 8 weights"
LONG = "its rows of 1048576 bytes have no channels or more than 1048576"
Parts = dict[str, np.ndarray]


def random_parts(form: Lookup, half: bool = True) -> Parts:
    random = np.random.default_rng(form.width)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    groups = form.width // form.group if form.group > 0 else 1
    parts = {
        "codes": random.integers(0, 256, (ROWS, form.row_bytes), dtype=np.uint8),
        "codebook": normal(form.stages, 1 << form.bits, form.dim),
    }
    if form.group >= 0:
        parts["scales"] = normal(ROWS, groups).astype(np.float16)
    parts |= {name: normal(form.width) for name in ("gain", "offset") if getattr(form, name)}
    if form.kept:
        slots = np.full(ROWS, -1, np.int16)
        slots[[3, 0]] = np.arange(KEPT)
        kept = normal(KEPT, form.width)
        parts |= {"slots": slots, "kept": kept.astype(np.float16) if half else kept}
    return parts


def model_of(form: Lookup, parts: Parts | None = None, ids: int = TensorProto.INT64, rank: int = 2) -> ModelProto:
    """One lookup as it is lowered, with the initializers ``parts``."""
    parts = random_parts(form) if parts is None else parts
    emitter = Emitter()
    names = ["ids", *parts]
    emitter.call("CodebookLookup", (form,), form.body, tuple(ir.Value(name=name) for name in names))
    function = ir.to_proto(next(iter(emitter.functions.values())))
    graph = helper.make_graph(
        [helper.make_node("CodebookLookup", names, ["rows"], "/table", domain="ryzen")],
        "graph",
        [helper.make_tensor_value_info("ids", ids, [f"d{i}" for i in range(rank)])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in parts.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("ryzen", 1)]
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)


def only(model: ModelProto) -> NodeProto:
    (node,) = claim(model)[0].graph.node
    return node


def facts(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


# --- what is claimed

FORMS = [
    Lookup(width, bits, dim, stages, group, *optional)
    for (bits, dim, stages, width), (group, *optional) in product(
        [(1, 1, 1, 24), (3, 8, 2, 56), (4, 2, 2, 24), (5, 4, 1, 40), (8, 2, 1, 40), (8, 4, 2, 24), (7, 1, 1, 1)],
        [(-1, False, False, False), (0, True, False, False), (8, False, True, True), (8, True, True, True)],
    )
    if width % max(group, 1) == 0
]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.bits}b-d{f.dim}-s{f.stages}-w{f.width}-g{f.group}")
def test_a_lookup_becomes_our_operator(form: Lookup) -> None:
    given = model_of(form)
    before = given.SerializeToString()
    model, report = claim(given)
    assert given.SerializeToString() == before
    assert report.claimed == {"CodebookEmbedding": 1} and report.left == () and report.whole == {"embedding"}
    assert report.kinds == {"embedding"} and report.to_text() == "1 CodebookEmbedding"
    (node,) = model.graph.node
    assert (node.domain, node.op_type, node.name, list(node.output)) == (
        "ryzen",
        "CodebookEmbedding",
        "/table",
        ["rows"],
    )
    assert facts(node) == {"bits": form.bits, "width": form.width, "group": max(form.group, 0)}
    parts = random_parts(form)
    places = ("codes", "codebook", "scales", "gain", "offset", "slots", "kept")
    wanted = ["ids", *(name if name in parts else "" for name in places)]
    assert [*node.input, *[""] * (8 - len(node.input))] == wanted and node.input[-1]
    assert model.graph.initializer == given.graph.initializer
    assert facts(claim(given, isa="scalar")[0].graph.node[0])["isa"] == b"scalar"


def test_a_function_is_known_by_what_it_computes() -> None:
    """Another name, other names of values, and another order."""
    model = model_of(EVERYTHING)
    function = model.functions[0]
    function.name = model.graph.node[0].op_type = "Something"
    renamed = {
        name: f"v{i}" for i, name in enumerate({n for node in function.node for n in (*node.input, *node.output)})
    }
    for node in function.node:
        node.input[:], node.output[:] = [renamed[n] for n in node.input], [renamed[n] for n in node.output]
    function.input[:], function.output[:] = [renamed[n] for n in function.input], [renamed[n] for n in function.output]
    constants = [node for node in function.node if node.op_type == "Constant"]
    rest = [node for node in function.node if node.op_type != "Constant"]
    del function.node[:]
    function.node.extend([*reversed(constants), *rest])
    assert only(model).op_type == "CodebookEmbedding"


def test_a_gain_is_not_taken_for_an_offset() -> None:
    for gain in (True, False):
        form = Lookup(24, 8, 2, 1, -1, gain=gain, offset=not gain, kept=False)
        assert list(only(model_of(form)).input) == [
            "ids",
            "codes",
            "codebook",
            "",
            *([] if gain else [""]),
            *list(random_parts(form))[2:],
        ]


def test_every_call_of_a_function_is_claimed_for_itself() -> None:
    model = model_of(SHIFTED)
    node = NodeProto()
    node.CopyFrom(model.graph.node[0])
    node.name, node.output[0], node.input[3] = "/other", "other", "short"
    model.graph.node.append(node)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((2, 1), np.float16), "short"))
    claimed, report = claim(model)
    assert [n.op_type for n in claimed.graph.node] == ["CodebookEmbedding", "CodebookLookup"]
    assert report.left == (("/other", "its scales are [2, 1] of type 10, not [9, 1] of type 10"),)
    assert report.kinds == {"embedding"} and report.whole == frozenset()


def test_switched_off_lookups_stay() -> None:
    model, report = claim(model_of(EVERYTHING), kinds=KINDS - {"embedding"})
    assert model.graph.node[0].op_type == "CodebookLookup" and report.left == (("/table", "switched off"),)


def test_functions_that_could_read_codes_have_a_reason_to_stay() -> None:
    """By the types of what they read: that nothing is said of them would be found by nobody."""
    for name, array in (("codes", np.ones(8, np.uint8)), ("codebook", np.ones((), np.float32))):
        report = claim(model_of(EVERYTHING, random_parts(EVERYTHING) | {name: array}))[1]
        assert len(report.left) == 1 and report.whole == frozenset()


def test_functions_that_read_no_codes_are_none_of_these() -> None:
    model = model_of(EVERYTHING, random_parts(EVERYTHING) | {"codes": np.ones((ROWS, 3), np.float32)})
    assert claim(model)[1].left == () and claim(model)[1].whole == frozenset()


# --- functions that compute something else


def find(function: FunctionProto, kind: str, last: bool = False) -> NodeProto:
    found = [node for node in function.node if node.op_type == kind]
    return found[-1 if last else 0]


def other_constant(function: FunctionProto, place: int) -> None:
    node = [node for node in function.node if node.op_type == "Constant"][place]
    tensor = node.attribute[0].t
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]


def _sum_for_product(f: FunctionProto) -> None:
    find(f, "Mul").op_type = "Add"


def _other_order(f: FunctionProto) -> None:
    node = find(f, "Add")
    node.input[:] = reversed(node.input)


def _same_stage_twice(f: FunctionProto) -> None:
    find(f, "Add").input[1] = find(f, "Add").input[0]


def _in_half_precision(f: FunctionProto) -> None:
    find(f, "Cast").attribute[0].i = TensorProto.FLOAT16


def _without_allowzero(f: FunctionProto) -> None:
    del find(f, "Reshape", last=True).attribute[:]


def _another_domain(f: FunctionProto) -> None:
    find(f, "Mul").domain = "com.microsoft"


def _another_opset(f: FunctionProto) -> None:
    f.opset_import[0].version = 13


def _no_opset(f: FunctionProto) -> None:
    del f.opset_import[:]


def _two_opsets(f: FunctionProto) -> None:
    f.opset_import.append(helper.make_opsetid("ai.onnx", 13))


def _two_outputs(f: FunctionProto) -> None:
    f.output.append(f.node[-2].output[0])


def _another_output(f: FunctionProto) -> None:
    f.output[0] = find(f, "Add", last=True).output[0]


def _a_step_that_nobody_reads(f: FunctionProto) -> None:
    f.node.append(helper.make_node("Gather", [f.input[1], f.input[1]], ["unread"]))


def _a_step_of_its_own_twice(f: FunctionProto) -> None:
    twice = NodeProto()
    twice.CopyFrom(f.node[0])
    twice.output[0] = "unread"
    f.node.append(twice)


CHANGES = (
    *(_sum_for_product, _other_order, _same_stage_twice, _in_half_precision, _without_allowzero, _another_domain),
    *(_another_opset, _no_opset, _two_opsets, _two_outputs, _another_output),
    *(_a_step_that_nobody_reads, _a_step_of_its_own_twice),
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_function_that_may_compute_something_else_stays(change: Callable[[FunctionProto], None]) -> None:
    model = model_of(EVERYTHING)
    assert claim(model)[1].claimed
    change(model.functions[0])
    claimed, report = claim(model)
    assert report.left == (("/table", ELSE),) and claimed.graph.node[0] == model.graph.node[0]


@pytest.mark.parametrize("form", [EVERYTHING, SHIFTED])
def test_no_constant_of_a_body_may_differ(form: Lookup) -> None:
    count = sum(node.op_type == "Constant" for node in model_of(form).functions[0].node)
    for place in range(count):
        model = model_of(form)
        other_constant(model.functions[0], place)
        assert claim(model)[1].left == (("/table", ELSE),), place


def with_body_of(form: Lookup, other: Lookup) -> ModelProto:
    model = model_of(form)
    model.functions[0].CopyFrom(model_of(other).functions[0])
    return model


def test_a_body_for_another_form_of_table_is_told_by_the_tensors() -> None:
    other = Lookup(40, 3, 2, 1, 8, gain=True, offset=False, kept=False)
    assert claim(with_body_of(SHIFTED, other))[1].left == (("/table", ELSE),)
    # 19 codes of 3 bits take 8 bytes as 20 do: whose width is meant, the body says, and the gain does not fit it.
    narrow = Lookup(38, 3, 2, 1, 0, gain=True, offset=False, kept=False)
    assert claim(with_body_of(SHIFTED, narrow))[1].left[0][1] == "its gain are [40] of type 1, not [38] of type 1"
    offset = Lookup(40, 3, 2, 1, 0, gain=False, offset=True, kept=False)
    assert list(only(with_body_of(SHIFTED, offset)).input)[4:] == ["", "gain"]  # whatever it is called, it is added


# --- tables that do not fit


def astype(name: str, dtype: type) -> Callable[[Parts], Any]:
    return lambda parts: parts.update({name: parts[name].astype(dtype)})


def cut(name: str, *sizes: int) -> Callable[[Parts], Any]:
    return lambda parts: parts.update({name: np.ascontiguousarray(parts[name][tuple(slice(s) for s in sizes)])})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (cut("codes", 3), "its scales are [9, 3] of type 10, not [3, 3] of type 10"),
        (cut("codes", 0), "its codes are [0, 12], not rows of bytes"),
        (lambda parts: parts.update(codes=parts["codes"].reshape(-1)), "its codes are [108], not rows of bytes"),
        (cut("codes", ROWS, 5), ELSE),
        (cut("codes", ROWS, 0), "its rows of 0 bytes have no channels or more than 1048576"),
        (lambda parts: parts.update(codes=np.zeros((1, 1 << 20), np.uint8)), LONG),
        (cut("codebook", 1), ELSE),
        (cut("codebook", 2, 15), f"its codebook is [2, 15, 2], {NO_CODEBOOK}"),
        (cut("codebook", 2, 0), f"its codebook is [2, 0, 2], {NO_CODEBOOK}"),
        (cut("codebook", 0), f"its codebook is [0, 16, 2], {NO_CODEBOOK}"),
        (
            lambda parts: parts.update(codebook=np.ones((3, 16, 2), np.float32)),
            f"its codebook is [3, 16, 2], {NO_CODEBOOK}",
        ),
        (
            lambda parts: parts.update(codebook=np.ones((2, 16, 3), np.float32)),
            f"its codebook is [2, 16, 3], {NO_CODEBOOK}",
        ),
        (lambda parts: parts.update(codebook=parts["codebook"][0]), f"its codebook is [16, 2], {NO_CODEBOOK}"),
        (cut("codebook", 2, 16, 1), ELSE),
        (astype("scales", np.float32), "its scales are [9, 3] of type 1, not [9, groups] of type 10"),
        (cut("scales", ROWS, 2), ELSE),
        (cut("scales", ROWS, 0), "its scales are [9, 0] of type 10, not [9, groups] of type 10"),
        (cut("kept", 0), "it keeps 0 rows"),
        (cut("gain", 23), "its gain are [23] of type 1, not [24] of type 1"),
        (astype("offset", np.float64), "its offset are [24] of type 11, not [24] of type 1"),
        (astype("slots", np.int32), "its slots are [9] of type 6, not [9] of type 5"),
        (cut("slots", 8), "its slots are [8] of type 5, not [9] of type 5"),
        (astype("kept", np.float64), "its kept are [2, 24] of type 11, not [2, 24] of type 1"),
        (cut("kept", 2, 23), "its kept are [2, 23] of type 10, not [2, 24] of type 1"),
        (lambda parts: parts.update(kept=np.zeros((32768, 24), np.float16)), "it keeps 32768 rows"),
        (lambda parts: parts.update(kept=np.float32(1)), "its kept are [] of type 1, not [24] of type 1"),
    ],
)
def test_a_table_that_does_not_fit_stays_and_says_why(change: Callable[[Parts], Any], reason: str) -> None:
    parts = random_parts(EVERYTHING)
    change(parts)
    assert claim(model_of(EVERYTHING, parts))[1].left == (("/table", reason),)


def test_ids_that_ours_does_not_take_stay() -> None:
    assert claim(model_of(EVERYTHING, ids=TensorProto.INT32))[1].left[0][1] == "its ids are of type 6"
    assert claim(model_of(EVERYTHING, rank=8))[1].left[0][1] == "its ids have 8 dimensions"
    assert claim(model_of(EVERYTHING, rank=7))[1].left == ()
    for unknown in (None, [None] * 8):
        model = model_of(EVERYTHING)
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("ids", TensorProto.INT64, unknown))
        assert claim(model)[1].left[0][1] == "the shape of its ids is not known"


def test_a_table_that_a_caller_may_replace_stays() -> None:
    """An initializer that is an input, too, is only a default."""
    for name in ("codes", "kept"):
        model = model_of(EVERYTHING)
        tensor = next(t for t in model.graph.initializer if t.name == name)
        model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
        assert claim(model)[1].left == (("/table", f"{name} is no constant"),)


def test_a_call_with_an_input_left_out_stays() -> None:
    model = model_of(EVERYTHING)
    model.graph.node[0].input[4] = ""
    assert claim(model)[1].left == (("/table", "an input or output that is not known"),)


def test_a_table_of_absurd_size_is_not_worked_out() -> None:
    """No rows need no bytes, so a row may be said to have any number of them."""
    model = model_of(SHIFTED)
    tensor = next(t for t in model.graph.initializer if t.name == "codes")
    tensor.dims[:], tensor.raw_data = [0, 1 << 59], b""
    assert claim(model)[1].left == (("/table", f"its codes are [0, {1 << 59}], not rows of bytes"),)


def test_the_limits_are_those_of_the_format() -> None:
    assert (claim_lookup.BITS, claim_lookup.DIMS, claim_lookup.STAGES) == (
        codebook.CODE_BITS,
        codebook.DIMS,
        codebook.STAGES,
    )
    assert claim_lookup.MOST_CHANNELS == codebook.MOST_CHANNELS and claim_lookup.MOST_KEPT == codebook.MOST_KEPT


def bodies_built(model: ModelProto, monkeypatch: pytest.MonkeyPatch) -> list[Lookup]:
    """The forms for which claiming ``model`` builds a body."""
    built: list[Lookup] = []
    body = Lookup.body

    def counted(form: Lookup, *values: Any) -> Any:
        built.append(form)
        return body(form, *values)

    with monkeypatch.context() as patched:
        patched.setattr(Lookup, "body", counted)
        claim(model)
    return built


BOOKS = {"codebook": np.ones((2, 8, 1), np.float32)}


def called_often(model: ModelProto, times: int) -> ModelProto:
    for i in range(times):
        node = NodeProto()
        node.CopyFrom(model.graph.node[0])
        node.name, node.output[0] = f"/more{i}", f"more{i}"
        model.graph.node.append(node)
    return model


def test_many_calls_over_tables_of_one_shape_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = called_often(model_of(SHIFTED), 30)
    assert claim(model)[1].claimed == {"CodebookEmbedding": 31}
    alone = bodies_built(model_of(SHIFTED), monkeypatch)
    assert bodies_built(model, monkeypatch) == alone
    unlike = called_often(with_body_of(SHIFTED, replace(SHIFTED, group=8)), 30)
    assert len(bodies_built(unlike, monkeypatch)) == 6  # of three widths, with a gain or an offset


def test_no_body_is_built_that_is_larger_than_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """The constants of a long row's body take time, whatever the function: here, a single node."""
    form = Lookup(1 << 20, 3, 1, 2, -1, gain=False, offset=False, kept=False)
    model = model_of(replace(form, width=40), {"codes": np.zeros((1, form.row_bytes), np.uint8)} | BOOKS)
    function = model.functions[0]
    del function.node[:]
    function.node.append(helper.make_node("Identity", [function.input[2]], [function.output[0]]))
    called_often(model, 30)
    assert len(claim(model)[1].left) == 31 and {why for _, why in claim(model)[1].left} == {ELSE}
    assert bodies_built(model, monkeypatch) == []


# --- over the real library


def session(model: ModelProto, library: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 2
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
    )


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.bits}b-d{f.dim}-s{f.stages}-w{f.width}-g{f.group}")
def test_a_claimed_lookup_gives_the_same_bits(library: Path, form: Lookup) -> None:
    for half in (True, False):
        given = model_of(form, random_parts(form, half))
        stock, ours = session(given), session(claim(given)[0], library)
        for shape in ((1, 1), (3, 5), (0, 2)):
            ids = np.random.default_rng(0).integers(0, ROWS, shape)
            want, got = (one.run(None, {"ids": ids})[0] for one in (stock, ours))
            assert want.shape == got.shape == (*shape, form.width) and want.tobytes() == got.tobytes()


@pytest.mark.parametrize("slot", [KEPT, 32767])
def test_slots_beyond_what_is_kept_are_an_error(library: Path, slot: int) -> None:
    parts = random_parts(EVERYTHING)
    parts["slots"][5] = slot
    model = claim(model_of(EVERYTHING, parts))[0]
    with pytest.raises(Exception, match=r"\[ONNXRuntimeError\]"):
        session(model, library).run(None, {"ids": np.arange(ROWS)[None]})


@pytest.mark.parametrize("slot", [-2, -32768])
def test_any_negative_slot_is_a_coded_row_everywhere(library: Path, slot: int) -> None:
    parts = random_parts(EVERYTHING)
    parts["slots"][5] = slot
    given = model_of(EVERYTHING, parts)
    ids = np.arange(ROWS)[None]
    stock, ours = (one.run(None, {"ids": ids})[0] for one in (session(given), session(claim(given)[0], library)))
    names = ("codes", "codebook", "scales", "gain", "offset", "slots", "kept")
    tensors = [torch.from_numpy(parts[name]) for name in names]
    want = codebook_embedding(torch.from_numpy(ids), *tensors, EVERYTHING.width, EVERYTHING.bits, EVERYTHING.group)
    assert stock.tobytes() == ours.tobytes() == want.numpy().tobytes()


def test_ids_from_the_end_are_rows_to_gather_alone(library: Path) -> None:
    """The one difference: ours, as the reference, takes ids of rows, 0 to V - 1, and no others."""
    given = model_of(EVERYTHING)
    stock, ours = session(given), session(claim(given)[0], library)
    (last,) = stock.run(None, {"ids": np.array([[ROWS - 1]])})
    assert stock.run(None, {"ids": np.array([[-1]])})[0].tobytes() == last.tobytes()
    with pytest.raises(Exception, match="outside of the table"):
        ours.run(None, {"ids": np.array([[-1]])})


@pytest.mark.parametrize("row", [-1, ROWS, 1 << 40, -(1 << 63)])
def test_ids_outside_of_the_table_are_an_error(library: Path, row: int) -> None:
    ours = session(claim(model_of(EVERYTHING))[0], library)
    with pytest.raises(Exception, match="outside of the table"):
        ours.run(None, {"ids": np.array([[0, row]])})
