"""The linear layers' kernels against the operators' references in float64; in Triton's interpreter where there is no
GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.numerics.blockwise import BlockFormat, BlockTensor
from ryzen_compile.ops.activation import ACTIVATIONS
from ryzen_compile.ops.linear import gated_linear, linear_act, linear_nbits
from tests.kernels.oracle import DEVICE, DTYPES, LIMITS, assert_close, guarded, nmse

pytestmark = pytest.mark.usefixtures("untuned")

HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    from ryzen_compile.kernels import linear

    return linear


@pytest.fixture(scope="module")
def few() -> ModuleType:
    pytest.importorskip("triton")
    from ryzen_compile.kernels import linear_few_rows

    return linear_few_rows


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored(rows: int, width: int, bits: int = 4, block: int = 128, symmetric: bool = True) -> BlockTensor:
    """Random codes, scales of both signs and, unless ``symmetric``, random zero points."""
    form, generator = BlockFormat(bits, block, symmetric), torch.Generator().manual_seed(rows + width)
    grid = (rows, form.blocks(width))
    codes = torch.randint(1 << bits, (*grid, block), generator=generator)
    zeros = None if symmetric else torch.randint(1 << bits, grid, generator=generator)
    return BlockTensor.from_codes(codes, torch.randn(grid, generator=generator), zeros, form, (rows, width))


def arguments(weight: BlockTensor, bias: Tensor | None = None, **other: Any) -> tuple[Any, ...]:
    """Those of the operator behind ``x``, some replaced by ``other``."""
    form = weight.format
    named = {"packed": weight.packed, "scales": weight.scales, "zeros": weight.zeros, "bias": bias}
    named |= {"bits": form.stored_bits, "block": form.block} | other
    return tuple(value.to(DEVICE) if isinstance(value, Tensor) else value for value in named.values())


def wanted(x: Tensor, weight: BlockTensor, bias: Tensor | None = None) -> Tensor:
    wide = arguments(weight, None if bias is None else bias.double())
    return linear_nbits(x.to(DEVICE).double(), *wide).cpu()


def assert_alike(kernels: ModuleType, x: Tensor, weight: BlockTensor, bias: Tensor | None = None) -> None:
    got = kernels.linear_nbits(x.to(DEVICE), *arguments(weight, bias))
    assert got.device.type == DEVICE and got.dtype == x.dtype and got.is_contiguous()
    assert_close(got, wanted(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_width_of_codes(kernels, monkeypatch, bits, symmetric, dtype):
    weight, x = stored(17, 328, bits, 64, symmetric), normal(3, 328, dtype=dtype)
    with guarded(monkeypatch):
        assert_alike(kernels, x, weight, normal(17, dtype=dtype, seed=1))


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_block(kernels, few, bits, block):
    weight, x = stored(5, 600, bits, block, False), normal(1, 600, dtype=torch.bfloat16)
    assert few.fits(x, weight) == (block >= 32 and (bits, block) != (2, 32))
    assert_alike(kernels, x, weight)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 127, 128, 129, 511, 512, 1023, 1024, 1031])
def test_awkward_widths(kernels, monkeypatch, width):
    with guarded(monkeypatch):
        assert_alike(kernels, normal(2, width, dtype=torch.float16), stored(3, width, symmetric=False))


@pytest.mark.parametrize("shape", [(136,), (1, 136), (2, 3, 136), (16, 136), (17, 136), (31, 136), (33, 136)], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 67])
def test_awkward_numbers_of_rows(kernels, monkeypatch, shape, rows):
    with guarded(monkeypatch):
        assert_alike(kernels, normal(*shape, dtype=torch.bfloat16), stored(rows, 136, block=64))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_code_at_every_place_is_exact(kernels, bits, dtype):
    """A row that is 1 at one channel gives that channel's weights: differences of codes, exact in half precision."""
    width = 512
    codes = torch.arange(8 * width).view(8, width // 128, 128)
    codes = (codes + 3 * (codes // 128)) % (1 << bits)
    zeros = torch.arange(8 * width // 128).view(8, -1) * 5 % (1 << bits)
    form = BlockFormat(bits, 128, False)
    weight = BlockTensor.from_codes(codes, torch.ones_like(zeros), zeros, form, (8, width))
    whole = torch.eye(width, dtype=dtype, device=DEVICE)
    for start in range(0, width, 32):
        got = kernels.linear_nbits(whole[start : start + 32], *arguments(weight)).cpu()
        assert torch.equal(got, weight.dequantize().t()[start : start + 32].to(dtype))


@pytest.mark.parametrize("count", [1, 32])
def test_every_candidate_for_few_rows(kernels, few, monkeypatch, count):
    weight, x = stored(35, 1096, symmetric=False), normal(count, 1096, dtype=torch.bfloat16)
    want = wanted(x, weight)
    for config in few._candidates(count, weight):
        monkeypatch.setattr(few.launch, "tuned", lambda *_, config=config: config)
        with guarded(monkeypatch):
            assert_close(kernels.linear_nbits(x.to(DEVICE), *arguments(weight)), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [9, 40, 70, 260])
def test_every_candidate_for_more_rows(kernels, monkeypatch, count, dtype):
    weight, x = stored(37, 75, block=16, symmetric=False), normal(count, 75, dtype=dtype)  # 75: no words of x
    bias = normal(37, dtype=dtype, seed=1)
    want = wanted(x, weight, bias)
    monkeypatch.setattr(kernels, "DECODED", 75 * 16)  # in three parts
    for config in kernels._candidates(x):
        monkeypatch.setattr(kernels.launch, "tuned", lambda *_, config=config: config)
        with guarded(monkeypatch):
            assert_close(kernels.linear_nbits(x.to(DEVICE), *arguments(weight, bias)), want)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_tensors_with_gaps_and_odd_places(kernels, few, dtype):
    weight = stored(9, 264, symmetric=False)
    x = normal(2, 264, 3, dtype=dtype).permute(2, 0, 1)
    gapped = {name: torch.stack((t, t), -1)[..., 0] for name, t in vars(weight).items() if isinstance(t, Tensor)}
    bias = normal(18, dtype=dtype, seed=1)[::2]
    got = kernels.linear_nbits(x.to(DEVICE), *arguments(weight, bias, **gapped))
    assert_close(got, wanted(x, weight, bias))
    shifted = torch.cat((x.flatten()[:1], x.flatten()))[1:].view(6, 264)
    assert not few.fits(shifted, weight)
    assert_close(kernels.linear_nbits(shifted.to(DEVICE), *arguments(weight)), wanted(shifted, weight))
    packed = torch.cat((weight.packed.flatten()[:1], weight.packed.flatten()))[1:].view(weight.packed.shape)
    got = kernels.linear_nbits(x.to(DEVICE), *arguments(weight, packed=packed))
    assert_close(got, wanted(x, weight))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("count", [4, 40])
def test_a_nan_stays_in_its_row(kernels, count):
    weight, x = stored(19, 136), normal(count, 136, dtype=torch.float16)
    x[1, 77] = torch.nan
    x[3] = 0
    got = kernels.linear_nbits(x.to(DEVICE), *arguments(weight)).cpu()
    assert got.isnan().all(1).nonzero().flatten().tolist() == [1] and not got[3].any()
    kept = [row for row in range(count) if row != 1]
    assert_close(got[kept], wanted(x[kept], weight))


@pytest.mark.parametrize("count", [2, 40])
def test_the_comparison_sees_wrong_weights(kernels, count):
    """Scales of the next block, zero points of the next block, codes of the neighbouring channel: each is far off."""
    weight, x = stored(33, 512, block=64, symmetric=False), normal(count, 512, dtype=torch.bfloat16)
    want = wanted(x, weight)
    swapped = (weight.packed >> 4) | (weight.packed << 4)
    assert weight.zeros is not None
    for wrong in (
        {"scales": weight.scales.roll(1, 1)},
        {"zeros": weight.zeros.roll(1, 1)},
        {"packed": swapped},
        {"packed": weight.packed.roll(1, 0)},
    ):
        got = kernels.linear_nbits(x.to(DEVICE), *arguments(weight, **wrong))
        assert nmse(got, want) > 100 * LIMITS[torch.bfloat16]


def test_nothing_to_do(kernels):
    for count, rows in ((0, 3), (3, 0)):
        got = kernels.linear_nbits(normal(2, count, 64).to(DEVICE), *arguments(stored(rows, 64)))
        assert got.shape == (2, count, rows)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"packed": torch.zeros(3, 2, 31, dtype=torch.uint8)},
            r"packed must be \(3, 2, 32\) in torch.uint8 for rows of",
        ),
        ({"packed": torch.zeros(3, 2, 32, dtype=torch.int8)}, r"got \(3, 2, 32\) in torch.int8"),
        ({"packed": torch.tensor(1, dtype=torch.uint8)}, r"packed must be \(0, 2, 32\)"),
        ({"scales": torch.zeros(3, 1)}, r"linear_nbits: scales must be \(3, 2\) in torch.float32"),
        ({"scales": torch.zeros(3, 2).half()}, r"got \(3, 2\) in torch.float16"),
        ({"zeros": torch.zeros(3, 2, dtype=torch.uint8)}, r"zeros must be \(3, 1\)"),
        ({"bits": 3}, "expected codes of 2, 4 or 8 bits"),
        ({"bits": 5}, "bits must be 2, 3, 4 or 8, got 5"),
        ({"block": 48}, "block must be 16, 32, 64, 128 or 256, got 48"),
        ({"bias": torch.zeros(2)}, r"bias must be \(3,\), got \(2,\)"),
        ({"bias": torch.zeros(3).half()}, "bias must be of the type of x, torch.float32, got torch.float16"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(kernels, other, message):
    with pytest.raises(UsageError, match=message):
        kernels.linear_nbits(normal(1, 100).to(DEVICE), *arguments(stored(3, 100, block=64), **other))


def test_other_types_and_devices_are_refused(kernels, monkeypatch):
    weight = stored(3, 100)
    with pytest.raises(UnsupportedError, match=r"or bfloat16, got torch\.float64"):
        kernels.linear_nbits(normal(1, 100).double().to(DEVICE), *arguments(weight))
    with pytest.raises(UsageError, match=r"x must be \(\.\.\., C\) with channels, got \(2, 0\)"):
        kernels.linear_nbits(normal(2, 0).to(DEVICE), *arguments(weight))
    with pytest.raises(UsageError, match="x is on cpu, packed on meta"):
        kernels.linear_nbits(normal(1, 100), weight.packed.to("meta"), weight.scales, None, None, 4, 128)
    monkeypatch.setattr(kernels.launch, "interpreted", lambda: False)
    with pytest.raises(UnsupportedError, match="linear_nbits: a Triton kernel runs on a GPU"):
        kernels.linear_nbits(normal(1, 100), weight.packed, weight.scales, None, None, 4, 128)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_epilogues(kernels, monkeypatch, act, dtype):
    x, weight = normal(2, 5, 31, dtype=dtype), normal(14, 31, dtype=dtype, seed=1) / 4
    bias = normal(14, dtype=dtype, seed=2)
    on_device, wide = [t.to(DEVICE) for t in (x, weight, bias)], [t.double() for t in (x, weight, bias)]
    with guarded(monkeypatch) as allocated:
        for some in (3, 2):
            given = (*on_device[:some], *[None] * (3 - some))
            want = linear_act(*wide[:some], *[None] * (3 - some), act)
            assert_close(kernels.linear_act(*given, act), want)
        assert len(allocated) == (0 if act == "none" else 2)
        assert_close(kernels.gated_linear(*on_device[:2], act), gated_linear(*wide[:2], act))


def test_the_comparison_sees_halves_that_changed_places(kernels):
    x, weight = normal(4, 31), normal(14, 31, seed=1)
    want = gated_linear(x.double(), weight.double(), "silu")
    got = kernels.gated_linear(x.to(DEVICE), weight.roll(7, 0).to(DEVICE), "silu")
    assert nmse(got, want) > 0.1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (("linear_act", (2, 5), (3, 4), None, "silu"), UsageError, r"x must be \(..., C\) .*, got \(2, 5\)"),
        (("linear_act", (), (3, 4), None, "silu"), UsageError, r"got \(\) and \(3, 4\)"),
        (("linear_act", (2, 5), (3, 5), (2,), "silu"), UsageError, r"linear_act: bias must be \(3,\), got \(2,\)"),
        (("linear_act", (2, 5), (3, 5), None, "mish"), UsageError, "linear_act: activation must be one of none, relu"),
        (("gated_linear", (2, 5), (3, 5), "silu"), UsageError, r"weight must be \(2F, C\).*got \(3, 5\)"),
        (("gated_linear", (2, 5), (4, 6), "silu"), UsageError, r"gated_linear: x must be \(..., C\)"),
    ],
    ids=str,
)  # fmt: skip
def test_products_that_do_not_fit_are_refused(kernels, call, error, message):
    op, *given = call
    tensors = [normal(*value).to(DEVICE) if isinstance(value, tuple) else value for value in given]
    with pytest.raises(error, match=message):
        getattr(kernels, op)(*tensors)


def test_types_of_products(kernels):
    x, weight = normal(2, 5).to(DEVICE), normal(4, 5).to(DEVICE)
    with pytest.raises(UsageError, match=r"type of x, torch\.float32, got torch\.float16"):
        kernels.linear_act(x, weight.half(), None, "silu")
    with pytest.raises(UnsupportedError, match="gated_linear: x must be float32, float16 or bfloat16"):
        kernels.gated_linear(x.double(), weight.double(), "silu")


COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ryzen_compile.kernels import linear, linear_few_rows


TENSORS = {"scales": "*fp32", "zeros": "*u8", "bias": "*bf16", "out": "*bf16"}


def compiled(kernel, config, tensors, aligned, **constants):
    constants |= config.kwargs
    types = {n: "constexpr" if n in constants else (TENSORS | tensors).get(n, "i32") for n in kernel.arg_names}
    wide = {n for n, kind in types.items() if kind.startswith("*")} | set(aligned)
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in wide}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm


def few(x, bits, block, **constants):
    config = triton.Config(
        {"SLICE": block, "SLICES": 512 // block, "ROWS": 16, "BLOCK_N": 32, "STAGES": 3}, num_warps=4, num_stages=3
    )
    asm = compiled(
        linear_few_rows._few_rows_kernel, config, {"x": x, "packed": "*i32"}, ("vectors", "words", "blocks"),
        BITS=bits, BLOCK=block, EVEN=True, DTYPE=tl.bfloat16, INTERPRETED=False, bias=None, **constants,
    )
    code = asm["ptx"]
    wide = any("cp.async.cg.shared.global" in line and "0x10" in line for line in code.splitlines())
    print(code.count("fma.rn.bf16x2"), code.count(".ftz"), asm["ttgir"].count("ttg.local_alloc"), wide)


few("*i64", 4, 128, zeros=None)
few("*i64", 4, 128)
few("*i32", 8, 128, zeros=None)
few("*i64", 4, 32, zeros=None)
for block_m, mma in ((64, "wgmma.mma_async"), (16, "mma.sync")):
    config = triton.Config({"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=3)
    asm = compiled(
        linear._tiles_kernel, config, {"x": "*bf16", "packed": "*u8"}, ("C", "row_bytes"),
        BITS=4, BLOCK=128, INTERPRETED=False, zeros=None, bias=None,
    )
    print(mma in asm["ptx"])
config = triton.Config({"BLOCK_N": 8, "BLOCK_K": 256}, num_warps=4)
print("st.global" in compiled(linear._decode_kernel, config, {"packed": "*u8"}, ("C",), BITS=2, BLOCK=16)["ptx"])
"""


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """For compute capability 9.0, which needs no GPU. 512 channels of 32 rows are 64 pairs of codes a thread, and each
    takes one multiply-add; small numbers are kept; what goes through shared memory is read ahead, 16 bytes at a time,
    and weights are not written there once decoded."""
    pytest.importorskip("triton")
    child = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    few = ["64 0 3 True"] * 4
    assert child.stdout.splitlines() == [*few, "True", "True", "True"], child.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 16, 32, 100, 600])
@pytest.mark.parametrize(
    ("bits", "block", "symmetric"), [(4, 128, True), (4, 32, False), (8, 128, False), (2, 64, True)]
)
def test_real_sizes(kernels, bits, block, symmetric, count, dtype):
    weight, x = stored(2063, 2048, bits, block, symmetric), normal(count, 2048, dtype=dtype)
    assert_alike(kernels, x, weight, normal(2063, dtype=dtype, seed=1))


@pytest.mark.gpu
def test_results_are_the_same_every_time_and_in_a_graph(kernels):
    weight, x = stored(2063, 2048), normal(3, 2048, dtype=torch.bfloat16).to(DEVICE)
    given = arguments(weight)
    first = kernels.linear_nbits(x, *given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.linear_nbits(x, *given)
    for _ in range(3):
        graph.replay()
        assert torch.equal(captured, first) and torch.equal(kernels.linear_nbits(x, *given), first)


@pytest.mark.gpu
def test_places_in_the_weight_beyond_int32(kernels):
    """The last row's bytes begin behind 2^31: every way of multiplying reads them."""
    width = 1 << 15
    rows = (1 << 17) + 1
    packed = torch.zeros(rows, width // 128, 64, dtype=torch.uint8, device=DEVICE)
    scales = torch.ones(rows, width // 128, device=DEVICE)
    packed[-1] = 0x99
    for count, wide in ((1, torch.bfloat16), (1, torch.float32), (300, torch.bfloat16)):
        x = torch.ones(count, width, dtype=wide, device=DEVICE)
        got = kernels.linear_nbits(x, packed, scales, None, None, 4, 128)
        assert (got[:, -1] == width).all() and (got[:, :-1] == -8 * width).all()
