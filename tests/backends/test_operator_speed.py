"""Operators beside PyTorch's: that both sides compute the artifact's own operators, and how figures become rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from ryzen_compile.api import export
from ryzen_compile.backends.onnxruntime import OnnxRuntimeBackend, operator_speed, operator_subjects
from ryzen_compile.backends.onnxruntime import artifact as artifacts
from ryzen_compile.backends.onnxruntime.engine_options import engine_options
from ryzen_compile.backends.onnxruntime.lowering import cache_slots
from ryzen_compile.backends.onnxruntime.node_facts import attributes_of
from ryzen_compile.backends.onnxruntime.operator_speed import OperatorSpeeds, measure_operators
from ryzen_compile.backends.onnxruntime.operator_subjects import Subject, prepare
from ryzen_compile.config import find_recipe
from ryzen_compile.errors import MemoryLimitError, UnsupportedError, UsageError
from ryzen_compile.kernels import cpu
from ryzen_compile.numerics.blockwise import BlockTensor
from ryzen_compile.program import Program
from tests.model_directory import TOKENS, shared_artifact, shared_model
from tests.zoo import CONTEXT, LAYERS

RTOL, ATOL = 1e-4, 2e-5  # float32 in other orders, over results of order 1
# Products whose activations are rounded to 8 bits a block: errors of rounding are 0.3 % of a random row, and less sums.
ROUNDED = 0.02
BOTH = pytest.mark.parametrize("native", [False, True], ids=["stock", "native"])


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Program], Path]:
    """``written(program)``: its artifact."""

    def write(program: Program) -> Path:
        out = tmp_path_factory.mktemp("operators") / "artifact"
        return artifacts.write(
            out,
            lambda directory: OnnxRuntimeBackend().write(program, directory),
            spec=program.spec,
            slots=cache_slots(program.slots),
            facts={},
        )

    return write


def integers(factory: pytest.TempPathFactory, **changes: Any) -> Path:
    """The tiny Llama in 4 bits."""
    out = factory.mktemp("operators") / "int4"
    export(shared_model(factory), out, find_recipe("int4", method="rtn", block=32, **changes), verify=False)
    return out


@pytest.fixture(scope="session")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return integers(tmp_path_factory, prefill="int8")


@pytest.fixture(scope="session")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_artifact(tmp_path_factory)


def prepared(directory: Path, native: Any, *, context: int = 13, tokens: int = 1) -> tuple[dict[Any, Subject], Any]:
    if native is True and cpu.library() is None:
        pytest.skip(cpu.reason())
    found = artifacts.read(directory, digests=False)
    return prepare(found, engine_options(found, threads=1, native=native), context=context, tokens=tokens)


def run_both(subject: Subject) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Copies of what both sides give, ours first."""
    subject.ours()
    ours = [output.copy() for output in subject.outputs]
    with torch.inference_mode():
        theirs = [tensor.numpy() for tensor in subject.theirs()]
    return ours, theirs


# --- both sides compute the artifact's operators


def stored_weights(directory: Path) -> list[np.ndarray]:
    """(K, N) of every product of the artifact, in the order of its nodes: read here, not by what is tested."""
    graph = onnx.load(directory / "model.onnx").graph
    whole = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return [stored_weight(node, whole) for node in graph.node if "MatMul" in node.op_type]


def stored_weight(node: onnx.NodeProto, whole: dict[str, np.ndarray]) -> np.ndarray:
    if node.op_type != "MatMulNBits":
        weight = whole[node.input[1]]
        return weight.T if attributes_of(node).get("transB", 0) else weight
    facts = attributes_of(node)
    packed, scales = (torch.from_numpy(whole[name].copy()) for name in node.input[1:3])
    zeros = torch.from_numpy(whole[node.input[3]].copy()) if len(node.input) > 3 and node.input[3] else None
    shape = facts["N"], -(-facts["K"] // facts["block_size"])
    stored = BlockTensor.stored(
        packed.reshape(*shape, -1), scales.reshape(shape), zeros, facts["bits"], facts["block_size"], facts["K"]
    )
    return stored.dequantize().numpy().T


@BOTH
@pytest.mark.parametrize("tokens", [1, 7])
def test_products_run_the_real_weights(int4: Path, native: bool, tokens: int) -> None:
    subject = prepared(int4, native, tokens=tokens)[0]["product"]
    assert subject.native == native
    ours, theirs = run_both(subject)
    weights = stored_weights(int4)
    assert len(weights) == 4 * LAYERS + 1
    for place, (site, got, _) in enumerate(zip(subject.graph.sites, ours, weights, strict=True)):
        want = subject.inputs[site.x] @ weights[place]  # type: ignore[index]
        assert np.linalg.norm(got - want) < ROUNDED * np.linalg.norm(want)
        # No other product of the same size would do.
        for weight in (w for i, w in enumerate(weights) if i != place and w.shape == weights[place].shape):
            other = subject.inputs[site.x] @ weight  # type: ignore[index]
            assert np.linalg.norm(got - other) > 0.5 * np.linalg.norm(want)
    assert [a.shape for a in ours] == [b.shape for b in theirs]


@BOTH
def test_float_products_run_the_real_weights(fp32: Path, native: bool) -> None:
    """No operator of ours multiplies floats: they stay stock ones in a native session."""
    subject = prepared(fp32, native)[0]["product"]
    assert not subject.native
    for site, got, weight in zip(subject.graph.sites, run_both(subject)[0], stored_weights(fp32), strict=True):
        want = subject.inputs[site.x] @ weight  # type: ignore[index]
        np.testing.assert_allclose(got, want, rtol=RTOL, atol=ATOL)


@BOTH
@pytest.mark.parametrize("tokens", [1, 5])
def test_norms_are_the_same(fp32: Path, native: bool, tokens: int) -> None:
    subject = prepared(fp32, native, tokens=tokens)[0]["norm"]
    assert subject.native == native
    for got, want in zip(*run_both(subject), strict=True):
        np.testing.assert_allclose(got, want, rtol=RTOL, atol=ATOL)


ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "as many kv heads": {"kv_heads": 4},
    "one kv head": {"kv_heads": 1},
    "not turned": {"rotated": 0},
    "pairs side by side": {"interleaved": True},
    "other heads, turned in part": {"head_dim": 32, "value_dim": 32},
    "not packed": {"packed": False},
    "padded heads": {"head_dim": 20, "value_dim": 20},
    "a window": {"window": 5},
    "a rolling window": {"window": 5, "rolling": True},
    "capped": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all of it": {"window": 4, "softcap": 3.0, "sinks": True, "packed": False},
    "codes": {"form": "int8"},
}


@pytest.fixture(scope="session")
def attentions(attentions_program: Callable[..., Program], written: Callable[[Program], Path], heads: Any) -> Path:
    """One of each kind, side by side, each with a cache of its own."""
    return written(attentions_program(*(heads(**changes) for changes in ATTENTIONS.values())))


@BOTH
@pytest.mark.parametrize("context", [0, 2, 23])
@pytest.mark.parametrize("tokens", [1, 6])
def test_attentions_are_the_same(attentions: Path, native: bool, context: int, tokens: int) -> None:
    subjects, reasons = prepared(attentions, native, context=context, tokens=tokens)
    subject = subjects["attention"]
    assert subject.native == native and "attention" not in reasons
    sites = dict(zip(ATTENTIONS, subject.graph.sites, strict=True))
    assert [site.slot for site in sites.values()] == list(range(len(sites)))  # type: ignore[union-attr]
    for name, got, want in zip(sites, *run_both(subject), strict=True):
        assert got.shape == want.shape and np.abs(want).max() > 0.1, name
        if name == "codes":  # what those stand for, PyTorch does not know: it has floats of its own
            assert np.isfinite(got).all() and np.abs(got - want).max() > 0.1
        else:
            np.testing.assert_allclose(got, want, rtol=RTOL, atol=ATOL, err_msg=name)


def test_heads_that_the_artifact_pads_are_cut_for_pytorch(attentions: Path) -> None:
    """If the model's own heads had 20 channels, those stored with 24 would be padded ones, and no others."""
    found = artifacts.read(attentions)
    own = replace(found, spec=replace(found.spec, head_dim=20))
    subjects, _ = prepare(own, engine_options(own, threads=1, native=False), context=13, tokens=2)
    ours, theirs = run_both(subjects["attention"])
    shapes = {name: (a.shape[-1], b.shape[-1]) for name, a, b in zip(ATTENTIONS, ours, theirs, strict=True)}
    assert shapes.pop("padded heads") == (4 * 24, 4 * 20)
    assert all(stored == used for stored, used in shapes.values())


def test_calls_may_be_repeated(fp32: Path) -> None:
    """Neither side changes what the other reads, nor what it reads itself."""
    subjects, _ = prepared(fp32, False)
    for subject in subjects.values():
        first, again = run_both(subject), run_both(subject)
        for one, other in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
            np.testing.assert_array_equal(one, other)


# --- rows


def graph_counts(directory: Path) -> Counter[str]:
    """The artifact's nodes by kind, counted here."""
    nodes = onnx.load(directory / "model.onnx", load_external_data=False).graph.node
    kinds = {"MatMul": "product", "FusedMatMul": "product", "MatMulNBits": "product", "Gemm": "product"}
    return Counter(
        kinds.get(node.op_type, "attention" if "Attention" in node.op_type else "norm")
        for node in nodes
        if node.op_type in kinds or "Attention" in node.op_type or node.op_type.endswith("LayerNormalization")
    )


@BOTH
def test_rows_say_what_was_measured(int4: Path, native: bool) -> None:
    if native and cpu.library() is None:
        pytest.skip(cpu.reason())
    before = torch.get_num_threads()
    found = measure_operators(int4, context=9, rounds=2, threads=1, native=native)
    assert torch.get_num_threads() == before
    assert (found.context, found.tokens, found.threads, found.reasons) == (9, 1, 1, {})
    assert {row.kind: row.nodes for row in found.rows} == graph_counts(int4)
    assert [row.kind for row in found.rows] == ["product", "attention", "norm"]
    shapes = {row.kind: row.shapes for row in found.rows}
    assert shapes == {
        "product": {
            "1x64x128": LAYERS,
            "1x64x64": LAYERS,
            "1x64x192": LAYERS,
            "1x96x64": LAYERS,
            f"1x64x{TOKENS}": 1,
        },
        "attention": {"1x4/2x16": LAYERS},
        "norm": {"1x64": 2 * LAYERS + 1},
    }
    for row in found.rows:
        assert row.native == native
        assert (row.ours_ms.unit, row.ours_ms.count, row.torch_ms.count) == ("ms", 2, 2)
        assert row.ours_ms.minimum > 0 and row.torch_ms.minimum > 0
        assert row.ratio.value == pytest.approx(row.torch_ms.median / row.ours_ms.median)
        assert row.ratio.unit == "x" and row.ratio.samples == 2
    assert found.total is not None and found.total.unit == "x" and found.total.samples == 2
    ratios = [row.ratio.value for row in found.rows]
    assert 0.5 * min(ratios) < found.total.value < 2 * max(ratios)  # of sums of two rounds, not of their medians
    assert OperatorSpeeds.model_validate_json(found.model_dump_json()) == found


def test_a_prompt_has_a_row_for_each_token_but_one_for_the_head(fp32: Path) -> None:
    found = measure_operators(fp32, context=4, tokens=11, rounds=1, threads=1, native=False)
    products, attention, norms = (row.shapes for row in found.rows)
    assert products[f"1x64x{TOKENS}"] == 1 and products["11x64x64"] == LAYERS and len(products) == 5
    assert attention == {"11x4/2x16": LAYERS}
    assert sum(count for name, count in norms.items() if name in ("11x64", "1x64")) == 2 * LAYERS + 1


def fake_subjects(seconds: dict[str, tuple[float, float]]) -> dict[Any, Any]:
    """Stand-ins whose runs are (kind, side): all that sampling looks at."""
    graph = SimpleNamespace(sites=[SimpleNamespace(text="1x2")])
    return {kind: SimpleNamespace(graph=graph, native=False, ours=(kind, 0), theirs=(kind, 1)) for kind in seconds}


def test_all_take_turns_and_totals_are_of_the_sums_within_a_round(fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds 2 and 4 are ten times slower for both sides: a ratio of medians over rounds does not see it."""
    seconds = {"product": (1.0, 4.0), "norm": (2.0, 3.0)}
    order: list[tuple[str, int]] = []

    def sample(run: tuple[str, int], calls: int) -> float:
        number = len(order) // 4
        order.append(run)
        return seconds[run[0]][run[1]] * (10 if number % 2 else 1)

    monkeypatch.setattr(operator_speed, "_sample", sample)
    monkeypatch.setattr(operator_speed, "_calls", lambda run: 1)
    monkeypatch.setattr(operator_speed, "prepare", lambda *a, **k: (fake_subjects(seconds), {"attention": "none"}))
    found = measure_operators(fp32, context=1, rounds=5, threads=1)
    forwards = [("product", 0), ("product", 1), ("norm", 0), ("norm", 1)]
    assert order == [*forwards, *forwards[::-1], *forwards, *forwards[::-1], *forwards]
    assert [row.ratio.value for row in found.rows] == [4.0, 1.5]
    assert [(row.ours_ms.median, row.ours_ms.maximum) for row in found.rows] == [(1e3, 1e4), (2e3, 2e4)]
    assert found.total is not None and found.total.value == pytest.approx(7 / 3)
    assert found.total.low is not None and found.total.low <= 7 / 3 <= (found.total.high or 0)
    assert found.reasons == {"attention": "none"}


def test_a_sample_is_the_mean_of_its_calls_and_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []
    monkeypatch.setattr(operator_speed, "time", SimpleNamespace(sleep=lambda s: None, perf_counter=lambda: clock[0]))

    def run() -> None:
        calls.append(1)
        clock[0] += 0.003

    assert operator_speed._calls(run) == 7  # 20 ms of calls of 3
    calls.clear()
    assert operator_speed._sample(run, 8) == pytest.approx(0.003)
    assert len(calls) == 8 + 2  # a quarter as many, not counted, before them


# --- what cannot be measured


def test_a_kind_that_the_artifact_has_not_has_no_row(attentions: Path) -> None:
    found = measure_operators(attentions, context=2, rounds=1, threads=1, native=False)
    assert [row.kind for row in found.rows] == ["product", "attention"]
    assert found.reasons == {"norm": "no norm is a node of the artifact's graph"} and found.total is not None


def test_without_any_row_there_is_no_total(fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_speed, "prepare", lambda *a, **k: ({}, {"norm": "x"}))
    found = measure_operators(fp32, context=1, rounds=1, threads=1)
    assert (found.rows, found.total, found.reasons) == ((), None, {"norm": "x"})


def test_nodes_that_are_left_out_are_said(fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = operator_subjects.operator_graph

    def without(*arguments: Any, **options: Any) -> Any:
        graph = original(*arguments, **options)
        return SimpleNamespace(**{**vars(graph), "left": {"a": 1, "b": 2}, "constant": graph.constant})

    monkeypatch.setattr(operator_subjects, "operator_graph", without)
    subjects, reasons = prepared(fp32, False)
    assert set(subjects) == set(reasons) and set(reasons.values()) == {"left out: 2 x b; 1 x a"}


def test_a_form_for_prompts_multiplies_otherwise(int4: Path) -> None:
    """16 tokens are read by it where products are stock ones; 15 are not, nor any number by native products."""
    subjects, reasons = prepared(int4, False, tokens=16)
    assert set(subjects) == {"attention", "norm"} and "second form" in reasons["product"]
    assert set(prepared(int4, False, tokens=15)[0]) == {"product", "attention", "norm"}
    subjects, reasons = prepared(int4, True, tokens=16)
    assert set(subjects) == {"product", "attention", "norm"} and not reasons


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": -1}, "1 new tokens behind -1 do not fit the model's context of 160"),
        ({"context": CONTEXT}, "1 new tokens behind 160 do not fit"),
        ({"context": CONTEXT - 4, "tokens": 5}, "5 new tokens behind 156 do not fit"),
        ({"context": 3, "tokens": 0}, "0 new tokens behind 3"),
        ({"context": 3, "rounds": 0}, "rounds must be at least 1, got 0"),
        ({"context": 3, "threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(fp32: Path, options: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        measure_operators(fp32, **options)  # type: ignore[arg-type]


def test_the_last_token_of_the_context_can_be_measured(fp32: Path) -> None:
    assert set(prepared(fp32, False, context=CONTEXT - 1)[0]) == {"product", "attention", "norm"}


def test_weights_that_do_not_fit_are_refused(fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_subjects, "read_machine", lambda: SimpleNamespace(memory_available=1000))
    with pytest.raises(MemoryLimitError, match=r"need 0\.0 GiB of float32 weights, 0\.0 GiB are free"):
        prepared(fp32, False)


def test_native_operators_that_are_insisted_on_and_missing(int4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)
    monkeypatch.setattr(cpu, "reason", lambda: "they were not built")
    with pytest.raises(UnsupportedError, match="there are no native operators: they were not built"):
        measure_operators(int4, context=2, rounds=1, threads=1, native=True)
    found = measure_operators(int4, context=2, rounds=1, threads=1)
    assert [row.native for row in found.rows] == [False] * 3


@pytest.mark.parametrize("native", ["auto", True])
def test_native_operators_that_fail(int4: Path, monkeypatch: pytest.MonkeyPatch, native: Any) -> None:
    if cpu.library() is None:
        pytest.skip(cpu.reason())

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(operator_subjects.native, "open_claimed", broken)
    if native is True:
        with pytest.raises(UnsupportedError, match="native operators cannot run the model's product nodes: broken"):
            prepared(int4, native)
        return
    with pytest.warns(UserWarning, match="nodes run on stock operators, native ones failed: broken"):
        subjects, _ = prepared(int4, native)
    assert not any(subject.native for subject in subjects.values())
