"""The ternary linear layer's kernels: to the bit what the operator's reference and the CPU operator compute; in
Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.numerics import ternary
from ryzen_compile.ops.linear import linear_ternary
from tests.kernels.oracle import DEVICE, assert_close, guarded

pytestmark = pytest.mark.usefixtures("untuned")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    from ryzen_compile.kernels import linear_ternary

    return linear_ternary


def problem(
    shape: tuple[int, ...], rows: int, dtype: torch.dtype = torch.float32, *, scales: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of the operator."""
    generator = torch.Generator().manual_seed(rows + shape[-1])
    weights = torch.randint(-1, 2, (rows, shape[-1]), generator=generator)
    scale = torch.randn(rows if scales else (), generator=generator)
    return torch.randn(shape, generator=generator).to(dtype), ternary.pack(weights), scale


def run(kernels: ModuleType, *arguments: Tensor) -> Tensor:
    return kernels.linear_ternary(*(tensor.to(DEVICE) for tensor in arguments)).cpu()


def assert_same(kernels: ModuleType, *arguments: Tensor) -> None:
    got, want = run(kernels, *arguments), linear_ternary(*arguments)
    assert got.dtype == arguments[0].dtype and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(0), want.nan_to_num(0))


@pytest.mark.parametrize("rows", [1, 16, 35])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (17, 48), (33, 48)], ids=str)
def test_numbers_of_rows(kernels, monkeypatch, shape, rows):
    with guarded(monkeypatch):
        assert_same(kernels, *problem(shape, rows, scales=rows != 16))


@pytest.mark.parametrize("width", [1, 2, 3, 5, 15, 16, 17, 63, 64, 127, 1040, 2047, 2048, 2064, 4096, 4097, 6160])
def test_awkward_widths(kernels, monkeypatch, width):
    with guarded(monkeypatch):
        assert_same(kernels, *problem((2, width), 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(kernels, dtype):
    x, packed, scale = problem((3, 144), 19, dtype)
    assert_same(kernels, x.float(), packed, scale)
    got, want = run(kernels, x, packed, scale), linear_ternary(x.float(), packed, scale)
    assert_close(got, want.double())
    # Rounded to the nearest, but that the interpreter cuts float32 off where it becomes bfloat16.
    if dtype == torch.float16 or DEVICE == "cuda":
        assert torch.equal(got, want.to(dtype)) and torch.equal(got, linear_ternary(x, packed, scale))


@pytest.mark.parametrize("count", [1, 32])
def test_every_candidate_for_few_rows(kernels, monkeypatch, count):
    arguments = problem((count, 2080), 70)
    for config in kernels._few_rows(count, 70):
        monkeypatch.setattr(kernels.launch, "tuned", lambda *_, config=config: config)
        assert_same(kernels, *arguments)


@pytest.mark.parametrize("count", [3, 70])
def test_every_candidate_for_more_rows(kernels, monkeypatch, count):
    arguments = problem((count, 265), 131)  # no whole words of weights
    for config in kernels._tiles(count):
        monkeypatch.setattr(kernels.launch, "tuned", lambda *_, config=config: config)
        with guarded(monkeypatch):
            assert_same(kernels, *arguments)


def test_ties_go_to_even_and_divisions_are_exact(kernels):
    """Steps of every kind of maximum, and numbers half way between codes as seen through a rounded reciprocal."""
    most = torch.cat((torch.rand(40, 1) + 0.5, 127.0 * 2.0 ** torch.arange(-60, 60, 10.0)[:, None]))
    x = torch.cat((most, (torch.arange(-126.5, 127, 1.0) / 127) * most), 1)
    packed = ternary.pack(torch.eye(x.shape[1]))
    assert_same(kernels, x, packed, torch.tensor(1.0))
    codes, steps, sums = (tensor.cpu() for tensor in kernels._rounded(x.to(DEVICE)))
    want, step = ternary.round_rows(x)
    assert torch.equal(codes.transpose(1, 2).reshape(len(x), -1)[:, : x.shape[1]], want)
    assert not codes.transpose(1, 2).reshape(len(x), -1)[:, x.shape[1] :].any()
    assert torch.equal(steps, step[:, 0]) and torch.equal(sums, want.sum(1, dtype=torch.int32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("width", [64, 61])
def test_rows_that_cannot_be_rounded(kernels, width):
    x, packed, scale = problem((6, width), 21)
    x[0, 7], x[1, 33], x[2], x[3, 60] = torch.nan, -torch.inf, 1e-37, torch.nan
    x[4] = 0
    assert_same(kernels, x, packed, scale)
    got = run(kernels, x, packed, scale)
    assert got.isnan().all(1).tolist() == [True, True, False, True, False, False]
    assert not got[2].any() and not got[4].any() and got[5].all()


def test_tensors_with_gaps_and_odd_places(kernels):
    x, packed, scale = problem((3, 5, 64), 21)
    assert_same(kernels, x.transpose(0, 1), packed, scale)
    assert_same(kernels, torch.stack((x, x), -1)[..., 0], torch.stack((packed, packed), -1)[..., 0], scale.expand(21))
    moved = torch.cat((packed.flatten()[:1], packed.flatten()))[1:].view(packed.shape)
    assert_same(kernels, x, moved, scale)


def test_the_comparison_sees_one_wrong_weight(kernels):
    x, packed, scale = problem((2, 64), 21)
    want = linear_ternary(x, packed, scale)
    wrong = packed.clone()
    wrong[20, 15] ^= 0x80 if wrong[20, 15] < 0x80 else 0x40 | 0x80  # the last code of the last row
    got = run(kernels, x, wrong, scale)
    assert torch.equal(got[:, :20], want[:, :20]) and (got[:, 20] != want[:, 20]).all()
    assert not torch.equal(run(kernels, x.roll(1, 1), packed, scale), want)


def test_what_fills_up_the_last_byte_is_not_read(kernels):
    x, packed, scale = problem((2, 62), 5)
    filled = packed.clone()
    filled[:, -1] |= 0xF0
    assert torch.equal(run(kernels, x, filled, scale), linear_ternary(x, packed, scale))


def native(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """The CPU operator's result, in ONNX Runtime."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    from ryzen_compile.kernels import cpu

    library = cpu.library()
    if library is None:
        pytest.skip(cpu.reason())
    constants = {"packed": packed.numpy(), "scale": np.atleast_1d(scale.numpy())}
    sizes = {"K": x.shape[-1], "N": packed.shape[0]}
    node = helper.make_node("MatMulTernary", ["A", "packed", "scale"], ["y"], domain="ryzen", **sizes)
    graph = helper.make_graph(
        [node],
        "one node",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ryzen", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"A": x.numpy()})[0])


@pytest.mark.parametrize(("width", "scales"), [(1056, True), (517, False)])
def test_the_cpu_operator_gives_the_same_bits(kernels, width, scales):
    x, packed, scale = problem((7, width), 43, scales=scales)
    x[2] *= 1e-37
    x[3, :8] = torch.tensor([2.0, 1.5, 0.5, -0.5, -2.5, 3.5, 127.0, 126.5]) / 127
    x[4] = x[4].half().float()
    want = native(x, packed, scale)
    assert torch.equal(linear_ternary(x, packed, scale), want)
    assert torch.equal(run(kernels, x, packed, scale), want)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"x": torch.zeros(2, 0)}, r"x must be floats \(..., 1 to 1048576\), got torch.float32 \(2, 0\)"),
        ({"x": torch.tensor(1.0)}, r"got torch.float32 \(\)"),
        ({"x": torch.zeros(2, 64, dtype=torch.int8)}, r"got torch.int8 \(2, 64\)"),
        ({"x": torch.zeros(2, 65)}, r"packed must be uint8 \(N, 17\) for x of 65 channels, got torch.uint8 \(5, 16\)"),
        ({"packed": torch.zeros(5, 16)}, r"got torch.float32 \(5, 16\)"),
        ({"packed": torch.zeros(80, dtype=torch.uint8)}, r"got torch.uint8 \(80,\)"),
        ({"scale": torch.zeros(4)}, r"scale must be floats \(\) or \(5,\), got torch.float32 \(4,\)"),
        ({"scale": torch.zeros(5, dtype=torch.int64)}, r"got torch.int64 \(5,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(kernels, other: dict[str, Any], message):
    named = dict(zip(("x", "packed", "scale"), problem((2, 64), 5), strict=True)) | other
    for call in (lambda *arguments: run(kernels, *arguments), linear_ternary):
        with pytest.raises(UsageError, match=message):
            call(*named.values())


def test_other_types_and_devices_are_refused(kernels, monkeypatch):
    x, packed, scale = problem((2, 64), 5)
    for arguments in ((x.double(), packed, scale), (x, packed, scale.double())):
        with pytest.raises(UnsupportedError, match="x must be float32, float16 or bfloat16 and scale float32"):
            run(kernels, *arguments)
    with pytest.raises(UsageError, match="x is on cpu, packed on meta"):
        kernels.linear_ternary(x, packed.to("meta"), scale)
    monkeypatch.setattr(kernels.launch, "interpreted", lambda: False)
    with pytest.raises(UnsupportedError, match="linear_ternary: a Triton kernel runs on a GPU"):
        kernels.linear_ternary(x, packed, scale)


def test_nothing_to_do(kernels):
    assert run(kernels, *problem((2, 0, 64), 5)).shape == (2, 0, 5)
    assert run(kernels, *problem((2, 64), 0)).shape == (2, 0)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ryzen_compile.kernels import linear_ternary


TENSORS = {"x": "*bf16", "codes": "*i8", "steps": "*fp32", "sums": "*i32", "scale": "*fp32", "out": "*bf16"}
SIZES = ("row_bytes", "words", "packed_bytes", "C")


def compiled(kernel, packed, warps, **constants):
    kinds = TENSORS | {"packed": packed} | dict.fromkeys(constants, "constexpr")
    types = {n: kinds.get(n, "i32") for n in kernel.arg_names}
    aligned = {n for n, kind in types.items() if kind.startswith("*")} | set(SIZES)
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": 3, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm


few = {"SCALES": True, "WORDS": 8, "SLICES": 8, "ROWS": 16, "BLOCK_N": 32, "STAGES": 3, "INTERPRETED": False}
asm = compiled(linear_ternary._few_rows_kernel, "*i32", 4, **few)
print(asm["ptx"].count("50529027"), asm["ptx"].count(".ftz"), asm["ttgir"].count("ttg.local_alloc"))
tiles = {"SCALES": True, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
print("wgmma.mma_async" in compiled(linear_ternary._tiles_kernel, "*u8", 8, **tiles)["ptx"])
code = compiled(linear_ternary._round_kernel, "*u8", 8, BYTES=1024)["ptx"]
print(code.count("div.rn.f32"), code.count("div.full"), code.count("fma.rn"), code.count(".ftz"))
"""


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """For compute capability 9.0, which needs no GPU. 1024 channels of 32 rows are 64 words of four weights a thread,
    each cut out by one mask; weights and the four phases of the activations are read ahead, and weights are not written
    to shared memory again. Rounding divides exactly, and does not join a product with the sum that rounds it."""
    pytest.importorskip("triton")
    child = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert child.stdout.splitlines() == ["64 0 5", "True", "2 0 0 0"], child.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 16, 32, 100, 600])
@pytest.mark.parametrize("width", [2048, 2050])
def test_real_sizes(kernels, count, width):
    assert_same(kernels, *problem((count, width), 2063))
