"""Block and activation choices: shapes read off a model, the stand-in's proportions, and a real, tiny timing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from ryzen_compile.backends.onnxruntime import PREFILL_NAME
from ryzen_compile.backends.onnxruntime.artifact_check import check_model
from ryzen_compile.backends.onnxruntime.kernel_choices import (
    BLOCKS,
    LEVELS,
    KernelTiming,
    NbitsShape,
    advise,
    kernel_choices,
    nbits_shapes,
    stand_in,
    write_stand_in,
)
from ryzen_compile.errors import ArtifactError, UsageError
from tests.model_directory import shared_artifact

LAYERS = (  # a small model's: 5 layers and a head; depths that no block divides
    NbitsShape(80, 72, 4, 32, 4, 5),
    NbitsShape(72, 200, 4, 32, 4, 5),
    NbitsShape(1000, 72, 8, 32, 4, 1),
)


def node(**attributes: int) -> onnx.NodeProto:
    return helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **attributes)


def test_shapes_are_counted_and_found_in_functions_too() -> None:
    model = onnx.ModelProto()
    model.graph.node.extend([node(K=64, N=48, bits=4, block_size=32, accuracy_level=4) for _ in range(3)])
    model.graph.node.append(node(K=64, N=48, block_size=32))  # 4 bits and level 0 are the operator's defaults
    model.graph.node.append(helper.make_node("MatMul", ["a", "b"], ["c"]))
    model.graph.node.append(helper.make_node("MatMulNBits", ["x"], ["y"], domain="elsewhere", K=1))
    model.functions.add(name="f").node.append(node(K=32, N=16, bits=8, block_size=16, accuracy_level=4))
    assert nbits_shapes(model) == (
        NbitsShape(16, 32, 8, 16, 4, 1),
        NbitsShape(48, 64, 4, 32, 0, 1),
        NbitsShape(48, 64, 4, 32, 4, 3),
    )


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"K": 64, "bits": 4, "block_size": 32}, "lacks the attribute 'N'"),
        ({"K": 64, "N": -1, "bits": 4, "block_size": 32}, "-1 x 64"),
        ({"K": 1 << 40, "N": 1, "bits": 4, "block_size": 32}, "MatMulNBits has 1 x"),
        ({"K": 64, "N": 1, "bits": 3, "block_size": 32}, "of 3 bits"),
    ],
)
def test_hostile_sizes_are_refused(attributes: dict[str, int], message: str) -> None:
    model = onnx.ModelProto()
    model.graph.node.append(node(**attributes))
    with pytest.raises(ArtifactError, match=message):
        nbits_shapes(model)


def test_a_stand_in_that_fits_is_the_whole() -> None:
    assert stand_in(LAYERS, 1 << 30) == (LAYERS, 1.0)


@pytest.mark.parametrize("wanted", [0.5, 0.2, 0.07])
def test_a_stand_in_keeps_the_proportions(wanted: float) -> None:
    total = sum(shape.bytes * shape.count for shape in LAYERS)
    large = tuple(NbitsShape(s.rows * 64, s.depth, s.bits, s.block, 4, s.count) for s in LAYERS)
    parts, share = stand_in(large, int(wanted * total * 64))
    assert share == pytest.approx(wanted, rel=0.05)  # rows come in sixteens
    for part, shape in zip(parts, large, strict=True):
        assert part.bytes * part.count / (shape.bytes * shape.count) == pytest.approx(wanted, rel=0.1)
        assert part.rows % 16 == 0 and 1 <= part.rows <= shape.rows and 1 <= part.count <= shape.count


def test_a_stand_in_never_vanishes() -> None:
    parts, share = stand_in(LAYERS, 1)
    assert all(part.count == 1 and part.rows == 16 for part in parts) and 0 < share < 1


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_stand_in_is_a_model_that_runs(tmp_path: Path, block: int, level: int) -> None:
    path = write_stand_in(tmp_path / "model.onnx", LAYERS, block, level)
    shapes = nbits_shapes(check_model(tmp_path))
    assert {(s.rows, s.depth, s.bits, s.count) for s in shapes} == {(s.rows, s.depth, s.bits, s.count) for s in LAYERS}
    assert {(s.block, s.accuracy_level) for s in shapes} == {(block, level)}
    session = onnxruntime.InferenceSession(path)
    feeds = {value.name: np.ones((3, value.shape[1]), np.float32) for value in session.get_inputs()}
    assert set(feeds) == {"x72", "x200"}
    results = session.run(None, feeds)
    assert len(results) == 11 and all(np.isfinite(result).all() for result in results)


def test_no_two_products_of_a_stand_in_are_equal(tmp_path: Path) -> None:
    """ONNX Runtime packs equal weights once: 22 layers would be timed as one that stays in the cache."""
    model = onnx.load(write_stand_in(tmp_path / "model.onnx", LAYERS, 32, 4))
    codes = [tensor.raw_data for tensor in model.graph.initializer if tensor.name.startswith("w")]
    assert len(codes) == len(set(codes)) == 11


def test_real_timing_of_a_small_model(tmp_path: Path) -> None:
    write_stand_in(tmp_path / "model.onnx", LAYERS, 32, 4)
    said: list[str] = []
    found = kernel_choices(tmp_path, threads=1, budget_seconds=0.1, progress=said.append)
    assert [(t.block, t.accuracy_level) for t in found.timings] == [(b, level) for b in BLOCKS for level in LEVELS]
    assert all(t.token_seconds > 0 and t.prompt_seconds > 0 for t in found.timings)
    assert found.now == (32, 4) and not found.skipped and len(found.advice) == 2 and len(said) == 8
    (tmp_path / PREFILL_NAME).touch()  # prompts then go elsewhere
    assert len(kernel_choices(tmp_path, threads=1, budget_seconds=0.1).advice) == 1


def test_float_artifacts_are_skipped_with_a_reason(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = check_model(shared_artifact(tmp_path_factory))
    del model.graph.node[:], model.functions[:]
    assert nbits_shapes(model) == ()
    folder = tmp_path_factory.mktemp("float")
    model.graph.node.append(helper.make_node("Identity", [model.graph.input[0].name], [model.graph.output[0].name]))
    del model.graph.initializer[:]
    onnx.save(model, folder / "model.onnx")
    found = kernel_choices(folder, threads=1)
    assert found.timings == () and "no products with quantized weights" in found.skipped


@pytest.mark.parametrize(("threads", "budget"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_bad_arguments(tmp_path: Path, threads: int, budget: float) -> None:
    with pytest.raises(UsageError, match="expected at least 1 thread"):
        kernel_choices(tmp_path, threads=threads, budget_seconds=budget)


def test_advice_names_the_gain_or_says_that_there_is_none() -> None:
    timings = [KernelTiming(32, 4, 0.020, 1.0), KernelTiming(128, 4, 0.015, 0.97), KernelTiming(128, 0, 0.03, 2.0)]
    token, prompt = advise(timings, (32, 4))
    assert "for one token, blocks of 128 with int8 activations take 15 ms instead of 20 (25 % less)" in token
    assert "prompt of 512, nothing is more than 5 % faster" in prompt
    assert all("nothing is more" in line for line in advise(timings, (128, 4)))
    assert "blocks of 16, as now, were not timed" in advise(timings, (16, 4))[0]
    assert len(advise(timings, (32, 4), prompts=False)) == 1
