"""Integer weights in ONNX Runtime against the eager references, in decibels: 10 log10(signal / noise)."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from ryzen_compile import ops
from ryzen_compile.backends.onnxruntime.emit import LoweringOptions
from ryzen_compile.backends.onnxruntime.lowering import lower
from ryzen_compile.backends.onnxruntime.weights_file import WeightsFiles
from ryzen_compile.numerics.blockwise import BlockFormat, BlockTensor, absmax_grid, quantize
from ryzen_compile.program import Program
from ryzen_compile.spec import ModelSpec

WIDTHS = (32, 200, 33)  # blocks that fit, a padded last one, one number over
ROWS = 21
EXACT, ROUNDED = LoweringOptions(accuracy_level=0), LoweringOptions(accuracy_level=4)
WIDE = LoweringOptions(accuracy_level=0, wide_prompts=True)


def stored(rows: int, width: int, form: BlockFormat) -> BlockTensor:
    w = torch.randn((rows, width), generator=torch.Generator().manual_seed(width))
    return quantize(w, form, *absmax_grid(w, form))


PARTS = ("packed", "scales", "zeros")


def hold(module: nn.Module, index: int, tensor: BlockTensor) -> None:
    """Makes what ``tensor`` is stored in buffers of ``module``; the zero points that it has not, an attribute."""
    for part in PARTS:
        value = getattr(tensor, part)
        if value is None:
            setattr(module, f"{part}_{index}", None)
        else:
            module.register_buffer(f"{part}_{index}", value)


class Products(nn.Module):
    """One product for each tensor, from one input for each width; every second form has a bias."""

    def __init__(self, tensors: list[BlockTensor]) -> None:
        super().__init__()
        self.tensors = tensors
        self.bias = nn.Parameter(torch.randn(ROWS))
        for i, t in enumerate(tensors):
            hold(self, i, t)

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        out = []
        for i, t in enumerate(self.tensors):
            x = xs[WIDTHS.index(t.shape[1])]
            parts = (getattr(self, f"{part}_{i}") for part in PARTS)
            stored_as = (t.format.stored_bits, t.format.block)
            packed, scales, zeros = parts
            out += [ops.linear_nbits(x, packed, scales, zeros, bias, *stored_as) for bias in (None, self.bias)]
        return tuple(out)


FORMATS = [
    BlockFormat(bits, block, symmetric) for bits in (2, 3, 4, 8) for block, symmetric in ((32, True), (16, False))
]
TENSORS = [stored(ROWS, width, form) for form in FORMATS for width in WIDTHS]


@pytest.fixture(scope="module")
def products() -> tuple[Products, Program]:
    """Every format at every width, over (batch, tokens, width) with dynamic batch and tokens."""
    torch.manual_seed(0)
    module = Products(TENSORS).eval()
    return module, dynamic(module, *(torch.randn(2, 3, width) for width in WIDTHS))


def dynamic(module: nn.Module, *inputs: Tensor) -> Program:
    dims = {0: Dim("batch"), 1: Dim("tokens")}
    if isinstance(module, Products):
        shapes: tuple = (tuple(dims for _ in inputs),)
    else:
        shapes = tuple(dims for _ in inputs)
    exported = torch.export.export(module.eval(), inputs, dynamic_shapes=shapes, strict=False)
    return Program(exported, ModelSpec(0, 0, 0, 0, 0, 0, 0, False, 0, "toy"))


def opened(program: Program, directory: Path, options: LoweringOptions) -> onnxruntime.InferenceSession:
    WeightsFiles(directory).write(lower(program, options), "model.onnx")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level, settings.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(directory / "model.onnx", settings, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, *inputs: Tensor) -> list[np.ndarray]:
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


def decibels(got: np.ndarray, want: np.ndarray) -> float:
    noise = np.square(got.astype(np.float64) - want).sum()
    return float(10 * np.log10(np.square(want.astype(np.float64)).sum() / max(noise, 1e-300)))


def decoded(tensor: BlockTensor, x: Tensor, bias: Tensor | None) -> np.ndarray:
    """The product in float64 by the weight as it decodes."""
    y = x.double() @ tensor.dequantize().double().T
    return (y if bias is None else y + bias.detach().double()).numpy()


@pytest.mark.parametrize(("options", "least"), [(EXACT, 60), (ROUNDED, 38), (WIDE, 35)], ids=["fp32", "int8", "wide"])
def test_products_match_the_decoded_weight(
    products: tuple[Products, Program], tmp_path: Path, options: LoweringOptions, least: float
) -> None:
    """Exact activations lose nothing but rounding in float32; those of 8 bits per block, or per row, about 40 dB."""
    module, program = products
    torch.manual_seed(1)
    inputs = [torch.randn(3, 5, width) for width in WIDTHS]
    with torch.no_grad():
        reference = module(*inputs)
    found = iter(zip(run(opened(program, tmp_path, options), *inputs), reference, strict=True))
    worst = {}
    for tensor in TENSORS:
        x = inputs[WIDTHS.index(tensor.shape[1])]
        for bias in (None, module.bias):
            got, eager = next(found)
            want = decoded(tensor, x, bias)
            assert got.shape == want.shape == (3, 5, ROWS)
            assert decibels(eager.numpy(), want) >= 100
            worst[tensor.format, tensor.shape, bias is not None] = decibels(got, want)
    assert min(worst.values()) >= least, min(worst.items(), key=lambda item: item[1])


def test_the_operators_are_the_ones_meant(products: tuple[Products, Program]) -> None:
    _, program = products
    count = 2 * len(TENSORS)
    for options in (EXACT, ROUNDED):
        nodes = list(lower(program, options).graph)
        assert {node.op_type for node in nodes} == {"MatMulNBits"} and len(nodes) == count
        assert {node.attributes["accuracy_level"].as_int() for node in nodes} == {options.accuracy_level}
        assert {node.attributes["bits"].as_int() for node in nodes} == {2, 4, 8}
    kinds = Counter(node.op_type for node in lower(program, WIDE).graph)
    assert kinds["MatMulIntegerToFloat"] == count // 2 and "MatMulNBits" not in kinds  # a bias comes after the product


def test_in_the_wide_form_a_prompt_may_come_in_chunks(products: tuple[Products, Program], tmp_path: Path) -> None:
    """Bit by bit: a row is rounded by itself."""
    session = opened(products[1], tmp_path, WIDE)
    inputs = [torch.randn(1, 37, width) for width in WIDTHS]
    whole = run(session, *inputs)
    for bounds in ((0, 16, 37), (0, 1, 2, 20, 37), (0, 36, 37)):
        parts = [run(session, *(x[:, a:b] for x in inputs)) for a, b in pairwise(bounds)]
        for i, want in enumerate(whole):
            np.testing.assert_array_equal(np.concatenate([part[i] for part in parts], axis=1), want)


@pytest.mark.parametrize("options", [EXACT, ROUNDED, WIDE], ids=["fp32", "int8", "wide"])
def test_rows_of_zeros_and_extremes_stay_numbers(
    products: tuple[Products, Program], tmp_path: Path, options: LoweringOptions
) -> None:
    module, program = products
    inputs = [torch.randn(1, 4, width) for width in WIDTHS]
    for x in inputs:
        x[0, 1], x[0, 2], x[0, 3] = 0.0, x[0, 2] * 1e-20, x[0, 3] * 1e20
    found = run(opened(program, tmp_path, options), *inputs)
    for i, got in enumerate(found):
        assert np.isfinite(got).all()
        bias = module.bias.detach().numpy() if i % 2 else 0.0
        np.testing.assert_array_equal(got[0, 1], np.broadcast_to(bias, ROWS))
        if not i % 2:
            want = decoded(TENSORS[i // 2], inputs[WIDTHS.index(TENSORS[i // 2].shape[1])], None)
            assert decibels(got[0, 3], want[0, 3]) >= 25, TENSORS[i // 2].format


# --- lookups ----------------------------------------------------------------------------------------------------------
class Lookups(nn.Module):
    def __init__(self, tensors: list[BlockTensor]) -> None:
        super().__init__()
        self.tensors = tensors
        for i, t in enumerate(tensors):
            hold(self, i, t)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            ops.embedding_nbits(
                ids,
                *(getattr(self, f"{part}_{i}") for part in PARTS),
                t.shape[1],
                t.format.stored_bits,
                t.format.block,
            )
            for i, t in enumerate(self.tensors)
        )


@pytest.fixture(scope="module")
def tables() -> list[BlockTensor]:
    return [stored(ROWS, width, form) for form in FORMATS for width in (*WIDTHS, 1)]


def test_lookups_match_the_reference(tables: list[BlockTensor], tmp_path: Path) -> None:
    """Decoding is one product in float32 on both sides."""
    module = Lookups(tables)
    session = opened(dynamic(module, torch.zeros(2, 3, dtype=torch.long)), tmp_path, ROUNDED)
    ids = torch.tensor([[0, ROWS - 1, 7, 7, 3], [1, 2, 0, ROWS - 2, 5]])
    for got, want, tensor in zip(run(session, ids), module(ids), tables, strict=True):
        assert got.shape == (2, 5, tensor.shape[1])
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-6, atol=0, err_msg=str((tensor.format, tensor.shape)))


def test_the_padding_of_a_row_is_cut_off_where_there_is_some(tables: list[BlockTensor]) -> None:
    module = Lookups(tables)
    kinds = Counter(n.op_type for n in lower(dynamic(module, torch.zeros(2, 3, dtype=torch.long)), ROUNDED).graph)
    assert kinds["GatherBlockQuantized"] == len(tables)
    assert kinds["Slice"] == sum(t.shape[1] % t.format.block != 0 for t in tables)


class Tied(nn.Module):
    """A table that is looked up and multiplied with."""

    def __init__(self, tensor: BlockTensor) -> None:
        super().__init__()
        self.t = tensor
        self.register_buffer("packed", tensor.packed)
        self.register_buffer("scales", tensor.scales)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        bits, block = self.t.format.stored_bits, self.t.format.block
        x = ops.embedding_nbits(ids, self.packed, self.scales, None, self.t.shape[1], bits, block)
        return (ops.linear_nbits(x, self.packed, self.scales, None, None, bits, block),)


@pytest.mark.parametrize("width", [64, 200])
def test_a_tied_table_is_in_the_file_once(width: int, tmp_path: Path) -> None:
    tensor = stored(50, width, BlockFormat(4, 32))
    module, ids = Tied(tensor), torch.tensor([[3, 49, 0]])
    session = opened(dynamic(module, torch.zeros(2, 3, dtype=torch.long)), tmp_path, EXACT)
    assert decibels(run(session, ids)[0], module(ids)[0].numpy()) >= 60
    model = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    places = {
        tuple((e.key, e.value) for e in t.external_data)
        for t in model.graph.initializer
        if t.data_type == onnx.TensorProto.UINT8
    }
    assert len(places) == 1
    size = (tmp_path / "model.onnx.data").stat().st_size
    assert tensor.nbytes <= size <= tensor.nbytes + 2 * 4096
