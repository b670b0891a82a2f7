"""Ternary products on ONNX Runtime's own operator and on ours, against the reference; and what is claimed of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.export import Dim

from ryzen_compile import ops
from ryzen_compile.backends.onnxruntime import native
from ryzen_compile.backends.onnxruntime.claim import claim
from ryzen_compile.backends.onnxruntime.claim_report import KINDS
from ryzen_compile.backends.onnxruntime.emit import LoweringOptions
from ryzen_compile.backends.onnxruntime.lowering import lower
from ryzen_compile.backends.onnxruntime.ternary import anchored, blocks
from ryzen_compile.backends.onnxruntime.weights_file import WeightsFiles
from ryzen_compile.numerics import ternary
from ryzen_compile.program import Program
from ryzen_compile.spec import ModelSpec
from tests.backends.test_integer import dynamic

WIDTHS = (1, 127, 128, 300)
ROWS = 22
ROUNDING = 2.0**-22  # of what MatMulNBits adds in float32: codes up to 2, around which weights stand, times activations


class Product(nn.Module):
    """``linear_ternary``, and what ``behind`` makes of it."""

    def __init__(self, width: int, scales: int = ROWS, behind: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(width)
        codes = torch.randint(-1, 2, (ROWS, width), generator=generator)
        scale = torch.rand(scales, generator=generator) + 0.1 if scales else torch.tensor(0.3)
        self.register_buffer("packed", ternary.pack(codes))
        self.register_buffer("scale", scale)
        self.behind = behind or (lambda y: y)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(ops.linear_ternary(x, self.packed, self.scale))


class Twice(nn.Module):
    """Two products of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Product(300), Product(300, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def rows_of(width: int, batch: int = 3, tokens: int = 5) -> Tensor:
    x = torch.randn((batch, tokens, width), generator=torch.Generator().manual_seed(width + 1))
    x[0, 1:2] = 0  # a row of zeros has no step
    x[-1, :1] *= 1e-3
    return x


def written(module: nn.Module, width: int, folder: Path, options: LoweringOptions | None = None) -> Path:
    program = dynamic(module, torch.randn(2, 3, width))
    return WeightsFiles(folder).write(lower(program, options or LoweringOptions()), "model.onnx")


def run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def close(got: Tensor, module: Product, x: Tensor) -> bool:
    want = module(x)
    added = 2 * 128 * blocks(x.shape[-1]) * x.abs().amax(-1, keepdim=True)
    return bool(((got - want).abs() <= ROUNDING * added * module.scale.abs().max()).all())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("wide", [False, True], ids=["blocks", "bytes for prompts"])
def test_the_lowered_product_is_the_reference(tmp_path: Path, width: int, wide: bool) -> None:
    """In float32's rounding, a hundredth of a code: over rows, among them one of zeros, no activation gets another."""
    module = Product(width, 0 if width % 2 else ROWS)
    path = written(module, width, tmp_path, LoweringOptions(wide_prompts=wide))
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert ("MatMulIntegerToFloat" if wide else "MatMulNBits") in kinds
    for batch, tokens in ((3, 5), (1, 1), (2, 17)):
        x = rows_of(width, batch, tokens)
        assert close(run(path, x), module, x)


def test_rounding_over_blocks_would_be_seen(tmp_path: Path) -> None:
    """The negative control: with anchors of zero, each block of a row is rounded by its own largest magnitude."""
    module = Product(300)
    path = written(module, 300, tmp_path)
    model = onnx.load(path)
    (function,) = model.functions
    largest = next(node for node in function.node if node.op_type == "ReduceMax")
    largest.op_type, largest.attribute[0].i = "ReduceMin", 1
    onnx.save(model, tmp_path / "other.onnx")
    x = rows_of(300)
    assert not close(run(tmp_path / "other.onnx", x), module, x)


@pytest.mark.parametrize("width", WIDTHS)
def test_anchors(width: int) -> None:
    """Behind every 127 channels, and behind the zeros that fill up the last run."""

    class Rows:
        def op(self, kind: str, *inputs: Any, **facts: int) -> np.ndarray:
            x = inputs[0]
            made = {
                "Pad": lambda: np.pad(x, ((0, 0), inputs[1])),
                "Reshape": lambda: x.reshape([n or len(x) for n in inputs[1]]),
                "Abs": lambda: np.abs(x),
                "ReduceMax": lambda: x.max(tuple(inputs[1]), keepdims=True),
                "Expand": lambda: x * np.ones(inputs[1]),
                "Concat": lambda: np.concatenate(inputs, facts["axis"]),
            }
            return made[kind]()

        def ints(self, *values: int) -> tuple[int, ...]:
            return values

    x = np.stack((np.arange(1.0, width + 1), -np.arange(2.0, width + 2)))
    (wide,) = anchored(width, 2)(Rows(), x)  # type: ignore[arg-type]
    cut = wide.reshape(2, blocks(width), 128)
    assert (cut[0, :, 127] == width).all() and (cut[1, :, 127] == width + 1).all()
    runs = cut[:, :, :127].reshape(2, -1)
    assert np.array_equal(runs[:, :width], x) and not runs[:, width:].any()


# --- claiming


def model_of(module: nn.Module, width: int, folder: Path) -> ModelProto:
    return onnx.load(written(module, width, folder))


def kinds(model: ModelProto) -> list[str]:
    return [f"{node.domain}::{node.op_type}" for node in model.graph.node]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_product_is_claimed_with_its_rows(tmp_path: Path, library: Path, width: int) -> None:
    module = Product(width, 0 if width % 2 else ROWS)
    path = written(module, width, tmp_path)
    model, report = claim(onnx.load(path, load_external_data=False))
    assert kinds(model) == ["ryzen::MatMulTernary"] and report.left == ()
    assert report.claimed == {"MatMulTernary": 1} and report.whole == {"matmul"} and report.rows_alike
    options = onnxruntime.SessionOptions()
    session, _ = native.open_claimed(path, options, KINDS, "auto")
    x = rows_of(width)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.equal(torch.from_numpy(got), module(x))  # integers, and the same two products behind them
    assert library.exists()


def test_a_gate_and_an_activation_join_their_product(tmp_path: Path) -> None:
    gated = Product(300, behind=lambda y: ops.gated_activation(y, "silu"))
    model, report = claim(model_of(gated, 300, tmp_path))
    assert kinds(model) == ["ryzen::MatMulTernary"] and report.fused == {"gated activation": 1}
    lone = Product(300, behind=lambda y: ops.activation(y, "gelu_tanh"))
    model, report = claim(model_of(lone, 300, tmp_path))
    assert kinds(model) == ["ryzen::MatMulTernary"] and report.fused == {"activation": 1}


def test_what_is_added_stays_a_sum(tmp_path: Path) -> None:
    model, _ = claim(model_of(Product(ROWS, behind=lambda y: y + 1.5), ROWS, tmp_path))
    assert kinds(model) == ["ryzen::MatMulTernary", "::Add"]


def test_rows_that_two_products_read_go_with_the_last(tmp_path: Path) -> None:
    given = model_of(Twice(), 300, tmp_path)
    assert kinds(given).count("ryzen::AnchorRows") == 1
    model, report = claim(given)
    assert kinds(model).count("ryzen::MatMulTernary") == 2 and "ryzen::AnchorRows" not in kinds(model)
    assert report.claimed == {"MatMulTernary": 2}
    first = next(node for node in given.graph.node if node.op_type == "MatMulNBits")
    next(a for a in first.attribute if a.name == "accuracy_level").i = 0
    model, report = claim(given)
    assert kinds(model).count("ryzen::MatMulTernary") == kinds(model).count("ryzen::AnchorRows") == 1
    assert len(report.left) == 1


def change_body(model: ModelProto) -> None:
    next(node for node in model.functions[0].node if node.op_type == "Abs").op_type = "Neg"


def change_version(model: ModelProto) -> None:
    next(opset for opset in model.functions[0].opset_import if not opset.domain).version = 20


def change_shape(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "C"


def change_width(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 301


@pytest.mark.parametrize("change", [change_body, change_version, change_shape, change_width])
def test_near_misses_are_products_of_two_bits(tmp_path: Path, change: Callable[[ModelProto], None]) -> None:
    """Our MatMulNBits reads the rows as they come, and rounds them by their anchors where they have any."""
    given = model_of(Product(300), 300, tmp_path)
    change(given)
    model, report = claim(given)
    assert kinds(model) == ["ryzen::AnchorRows", "ryzen::MatMulNBits"] and report.claimed == {"MatMulNBits": 1}


def test_weights_that_are_not_ternary_are_refused_by_the_operator(tmp_path: Path, library: Path) -> None:
    path = written(Product(300), 300, tmp_path)
    model = onnx.load(path)
    codes = next(t for t in model.graph.initializer if len(t.dims) == 3)
    codes.raw_data = bytes(len(codes.raw_data))
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(Exception, match="packed has code 0 in row 0, expected 1 to 3"):
        native.open_claimed(tmp_path / "other.onnx", onnxruntime.SessionOptions(), KINDS, "auto")
    assert library.exists()


def test_codes_that_the_graph_computes_are_refused() -> None:
    class Computed(nn.Module):
        def forward(self, x: Tensor, packed: Tensor) -> Tensor:
            return ops.linear_ternary(x, packed, torch.tensor(1.0))

    packed = ternary.pack(torch.ones(4, 9))
    exported = torch.export.export(Computed(), (torch.randn(2, 9), packed), dynamic_shapes=({0: Dim("n")}, None))
    with pytest.raises(ValueError, match="is no constant"):
        lower(Program(exported, ModelSpec(0, 0, 0, 0, 0, 0, 0, False, 0, "toy"))).graph.initializers["anything"]
