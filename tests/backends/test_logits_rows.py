"""Logits of as many tokens as a step is asked for: the file's one row widened in memory, and only where it can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from ryzen_compile.api import export
from ryzen_compile.backends.eager import EagerEngine
from ryzen_compile.backends.onnxruntime import OnnxRuntimeBackend, artifact
from ryzen_compile.backends.onnxruntime.artifact import Artifact
from ryzen_compile.backends.onnxruntime.artifact_check import check_model
from ryzen_compile.backends.onnxruntime.logits_rows import ROWS, START, choose_rows
from ryzen_compile.backends.onnxruntime.session import KEPT_SHAPES, OrtEngine, SessionOptions
from ryzen_compile.config import find_recipe
from ryzen_compile.errors import UsageError
from ryzen_compile.runtime.cache import KVCache
from tests.model_directory import case_named
from tests.zoo import VOCAB, build

STOCK = SessionOptions(threads=1, native=frozenset())
LENGTHS = (1, 2, 3, 4, 7, 8, 9, 16, 17)
RTOL, ATOL = 1e-5, 2e-5  # logits of order 10 in float32, summed in another order where a row is alone


@pytest.fixture(scope="module")
def written(
    decoder_program: Callable, heads: Callable, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, object]:
    """Two Llama layers with one row of logits."""
    program = decoder_program(heads(), heads(), last_only=True)
    return OnnxRuntimeBackend().write(program, tmp_path_factory.mktemp("last")), program


@pytest.fixture
def model(written: tuple[Path, object]) -> ModelProto:
    return check_model(written[0].parent)


@pytest.fixture
def engine(written: tuple[Path, object]) -> Iterator[OrtEngine]:
    path, program = written
    opened = OrtEngine(path, program.spec, program.slots, STOCK)
    yield opened
    opened.close()


def the_slice(model: ModelProto) -> NodeProto:
    return [node for node in model.graph.node if node.op_type == "Slice"][-1]


# --- what is rewritten


def test_the_start_becomes_an_input_and_shapes_follow(model: ModelProto) -> None:
    name = choose_rows(model)
    assert name == START == the_slice(model).input[1]
    given = model.graph.input[-1]
    assert (given.name, given.type.tensor_type.elem_type) == (START, TensorProto.INT64)
    logits = next(value for value in model.graph.output if value.name == "logits")
    assert logits.type.tensor_type.shape.dim[1].dim_param == ROWS


def test_a_taken_name_is_not_taken_again(model: ModelProto) -> None:
    the_slice(model).name = "unrelated"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), START))
    name = choose_rows(model)
    assert name != START and name.startswith(START)


def _bound(place: int, value: int) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        name = f"bound_{place}"
        model.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
        the_slice(model).input[place] = name

    return change


def _computed_start(model: ModelProto) -> None:
    model.graph.node.insert(0, onnx.helper.make_node("Shape", ["input_ids"], ["computed"]))
    the_slice(model).input[1] = "computed"


def _also_read(model: ModelProto) -> None:
    """A second reader of the sliced states, which expects one row."""
    model.graph.node.append(onnx.helper.make_node("Identity", [the_slice(model).output[0]], ["elsewhere"]))


def _mixes_tokens(model: ModelProto) -> None:
    """A constant that differs along tokens, multiplied with the logits."""
    head = next(node for node in model.graph.node if "logits" in node.output)
    head.output[0] = "before"
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 1), np.float32), "along"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["before", "along"], ["logits"]))


def _sums_tokens(model: ModelProto) -> None:
    head = next(node for node in model.graph.node if "logits" in node.output)
    head.output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Softmax", ["before"], ["logits"], axis=1))


def _turned_product(model: ModelProto) -> None:
    head = next(node for node in model.graph.node if "logits" in node.output)
    head.op_type, head.domain = "FusedMatMul", "com.microsoft"
    del head.attribute[:]
    head.attribute.append(onnx.helper.make_attribute("transA", 1))


def _constant_first(model: ModelProto) -> None:
    head = next(node for node in model.graph.node if "logits" in node.output)
    head.op_type, head.domain = "MatMul", ""
    del head.attribute[:]
    head.input[0], head.input[1] = head.input[1], head.input[0]


def _other_axis_of_tokens(model: ModelProto) -> None:
    """The states are said to have another second dimension than the ids."""
    states = the_slice(model).input[0]
    info = next(value for value in model.graph.value_info if value.name == states)
    info.type.tensor_type.shape.dim[1].dim_param = "other"


@pytest.mark.parametrize(
    "change",
    [
        _bound(1, -2),
        _bound(1, 0),
        _bound(2, -1),
        _bound(2, 1),
        _bound(3, 2),
        _bound(4, -1),
        _computed_start,
        _also_read,
        _mixes_tokens,
        _sums_tokens,
        _turned_product,
        _constant_first,
        _other_axis_of_tokens,
    ],
    ids=lambda change: getattr(change, "__name__", "bound"),
)
def test_anything_else_stays_as_it_is(model: ModelProto, change: Callable[[ModelProto], None]) -> None:
    change(model)
    before = model.SerializeToString(deterministic=True)
    assert choose_rows(model) == ""
    assert model.SerializeToString(deterministic=True) == before


def test_a_model_with_all_logits_stays_as_it_is(decoder: object, tmp_path: Path) -> None:
    model = check_model(OnnxRuntimeBackend().write(decoder, tmp_path).parent)
    before = model.SerializeToString(deterministic=True)
    assert choose_rows(model) == "" and model.SerializeToString(deterministic=True) == before


# --- what an engine makes of it


def test_an_artifact_that_is_not_recognised_works_as_before(
    written: tuple[Path, object], engine: OrtEngine, tmp_path: Path
) -> None:
    path, program = written
    changed = check_model(path.parent)
    _bound(2, 1 << 20)(changed)  # an end that a long prompt would reach
    onnx.save(changed, tmp_path / "model.onnx")
    (tmp_path / "model.onnx.data").write_bytes(path.with_suffix(".onnx.data").read_bytes())
    plain = OrtEngine(tmp_path / "model.onnx", program.spec, program.slots, STOCK)
    assert (plain.verifies, plain.all_logits, engine.verifies, engine.all_logits) == (False, False, True, False)
    ids = np.arange(5)[None]
    want = engine.step(ids, KVCache(engine.slots, 1, 8))
    got = plain.step(ids, KVCache(plain.slots, 1, 8))
    assert got.shape == (1, 1, 61)
    np.testing.assert_array_equal(got, want)
    with pytest.raises(UsageError, match="logits of 2 tokens were asked for, and the model gives those of the newest"):
        plain.step(ids, KVCache(plain.slots, 1, 8), 2)
    plain.close()


def test_rows_are_those_of_the_references(decoder_program: Callable, heads: Callable, engine: OrtEngine) -> None:
    eager = EagerEngine(decoder_program(heads(), heads()))
    ids = np.random.default_rng(3).integers(0, 61, (1, 17))
    want = eager.step(ids, KVCache(eager.slots, 1, 17))
    for last in LENGTHS:
        got = engine.step(ids, KVCache(engine.slots, 1, 17), last)
        assert got.shape == (1, last, 61) and got.dtype == np.float32
        np.testing.assert_allclose(got, want[:, -last:], rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("last", [0, -1, 4])
def test_numbers_that_make_no_sense_are_refused(engine: OrtEngine, last: int) -> None:
    with pytest.raises(UsageError, match=f"logits of {last} tokens were asked for in a step of 3"):
        engine.step(np.zeros((1, 3), np.int64), KVCache(engine.slots, 1, 8), last)


def test_shapes_in_turn_keep_their_buffers_and_one_of_logits(engine: OrtEngine) -> None:
    """Results do not depend on the shapes before; the kept shapes are few, whatever comes."""
    ids = np.random.default_rng(4).integers(0, 61, (1, 60))
    bound = engine._main
    want = {last: engine.step(ids[:, :20], KVCache(engine.slots, 1, 60), last).copy() for last in (1, 5, 20)}
    for last in (1, 5, 1, 20, 5, 1):
        np.testing.assert_array_equal(engine.step(ids[:, :20], KVCache(engine.slots, 1, 60), last), want[last])
    kept = bound._shapes[1, 20, 5]
    engine.step(ids[:, :20], KVCache(engine.slots, 1, 60), 5)
    assert bound._shapes[1, 20, 5] is kept
    for new in range(1, 50):
        engine.step(ids[:, :new], KVCache(engine.slots, 1, 60), max(1, new // 2))
        engine.step(ids[:, :new], KVCache(engine.slots, 1, 60))
    assert len(bound._shapes) <= KEPT_SHAPES
    assert len({shape.logits.base is None or shape.logits.base.ctypes.data for shape in bound._shapes.values()}) == 1
    np.testing.assert_array_equal(engine.step(ids[:, :20], KVCache(engine.slots, 1, 60), 20), want[20])


@pytest.mark.parametrize("name", ["gemma2", "granite", "gptj"])
def test_heads_of_every_form_are_recognised(name: str, tmp_path: Path) -> None:
    """A soft cap, a division and a bias behind the head."""
    export(build(case_named(name)), tmp_path / "out", "fp32", verify=False)
    found = artifact.read(tmp_path / "out")
    engine = OrtEngine(found.model, found.spec, found.slots, STOCK)
    assert engine.verifies and not engine.all_logits
    ids, cache = np.random.default_rng(5).integers(3, VOCAB, (1, 9)), KVCache(engine.slots, 1, 9)
    got = engine.step(ids, KVCache(engine.slots, 1, 9), 9)[0].copy()
    for place in range(9):
        single = engine.step(ids[:, place : place + 1], cache)[0, 0]
        np.testing.assert_allclose(single, got[place], rtol=RTOL, atol=ATOL)
        cache.advance(1)
    engine.close()


# --- native operators: the same to the bit


@pytest.fixture(scope="module")
def twofold(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """In 4 bits, with a form for prompts that no checking step may use."""
    out = tmp_path_factory.mktemp("rows") / "int4"
    model = build(case_named("llama", hidden_size=256, num_attention_heads=4, intermediate_size=288, vocab_size=301))
    export(model, out, find_recipe("int4", method="rtn", prefill="int8"), verify=False)
    return artifact.read(out)


@pytest.fixture
def native(library: Path, twofold: Artifact) -> Iterator[OrtEngine]:
    options = SessionOptions(2, require_native=True)
    engine = OrtEngine(twofold.model, twofold.spec, twofold.slots, options, twofold.prefill)
    yield engine
    engine.close()


@pytest.mark.parametrize("held", [0, 5, 100])
def test_several_rows_are_those_of_single_steps_to_the_bit(native: OrtEngine, held: int) -> None:
    assert native.claims.rows_alike and native.verifies and not native.all_logits
    ids = np.random.default_rng(held).integers(0, native.spec.vocab, (1, held + max(LENGTHS)))
    cache = KVCache(native.slots, 1, 160)
    if held:
        native.step(ids[:, :held], cache)
        cache.advance(held)
    single = []
    for place in range(held, ids.shape[1]):
        single.append(native.step(ids[:, place : place + 1], cache)[0, -1].copy())
        cache.advance(1)
    for count in LENGTHS:
        cache.truncate(held)
        rows = native.step(ids[:, held : held + count], cache, count)
        np.testing.assert_array_equal(rows[0], single[:count])


def test_checking_steps_use_the_form_for_decoding(twofold: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OrtEngine(twofold.model, twofold.spec, twofold.slots, STOCK, twofold.prefill)
    used: list[str] = []
    for name in ("_main", "_prefill"):
        session = getattr(engine, name)

        def noted(*arguments: Any, name: str = name, run: Any = session.run) -> Any:
            used.append(name)
            return run(*arguments)

        monkeypatch.setattr(session, "run", noted)
    ids, cache = np.arange(20)[None], KVCache(engine.slots, 1, 32)
    engine.step(ids, cache)
    engine.step(ids, cache, 20)
    engine.step(ids, cache, 2)
    assert used == ["_prefill", "_main", "_main"]
    engine.close()
