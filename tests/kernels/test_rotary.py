"""The Triton rotation against the reference, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ryzen_compile import ops
from ryzen_compile.errors import UnsupportedError, UsageError
from tests.kernels.oracle import DEVICE, DTYPES, assert_close, guarded, nmse

POSITIONS = 13


@pytest.fixture(scope="module")
def rotary() -> ModuleType:
    pytest.importorskip("triton")
    from ryzen_compile.kernels import rotary

    return rotary


def sample(
    width: int, rotated: int, heads: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads last in memory, as projections leave them; angles that follow no rule."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn((2, 5, heads, width), generator=generator).to(dtype).transpose(1, 2)
    return (
        x.to(DEVICE),
        torch.randint(POSITIONS, (2, 5), generator=generator).to(DEVICE),
        (torch.rand((POSITIONS, rotated), generator=generator) * 6).to(DEVICE),
    )


def reference(x: Tensor, positions: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    cos, sin = angles.cos().double(), angles.sin().double()  # of the float32 tables
    return ops.rotary(x.double().cpu(), positions.cpu(), cos.cpu(), sin.cpu(), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "rotated"), [(2, 1), (16, 8), (8, 1), (31, 5), (257, 127)])
def test_every_width(rotary, width, rotated, interleaved):
    x, positions, angles = sample(width, rotated)
    got = rotary.rotary(x, positions, angles.cos(), angles.sin(), interleaved)
    assert got.is_contiguous() and got.dtype == x.dtype
    assert_close(got, reference(x, positions, angles, interleaved))
    assert torch.equal(got, ops.rotary(x, positions, angles.cos(), angles.sin(), interleaved))  # rounded step by step


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tables", ["float32", "of the same type"])
def test_every_type(rotary, dtype, tables):
    x, positions, angles = sample(15, 7, dtype=dtype)
    cos, sin = (table if tables == "float32" else table.to(dtype) for table in (angles.cos(), angles.sin()))
    got = rotary.rotary(x, positions, cos, sin, False)
    want = ops.rotary(x.double().cpu(), positions.cpu(), cos.double().cpu(), sin.double().cpu(), False)
    assert got.dtype == dtype
    assert_close(got, want)


@pytest.mark.parametrize("heads", [1, 17])
def test_heads_are_cut_among_programs(rotary, monkeypatch, heads):
    monkeypatch.setattr(rotary, "ELEMENTS", 64)
    x, positions, angles = sample(15, 4, heads)
    with guarded(monkeypatch) as made:
        got = rotary.rotary(x, positions, angles.cos(), angles.sin(), True)
    assert len(made) == 1
    assert_close(got, reference(x, positions, angles, True))


def test_tensors_with_gaps(rotary):
    x, positions, angles = sample(8, 3)
    x = torch.stack((x, -x), -1)[..., 0]
    positions = positions[:1].expand(2, 5)
    tables = torch.stack((angles.cos(), angles.sin()), -1)
    assert x.stride(3) == 2 and positions.stride(0) == 0
    got = rotary.rotary(x, positions, tables[..., 0], tables[..., 1], False)
    assert_close(got, reference(x, positions, angles, False))


def test_what_is_not_a_number_stays_in_its_place(rotary):
    x, positions, angles = sample(8, 2)
    x[0, 1, 2, 7] = float("nan")  # a channel that does not turn
    positions[1, 0], positions[1, 4] = -1, POSITIONS  # nothing beside the tables is read
    got = rotary.rotary(x, positions, angles.cos(), angles.sin(), False)
    want = torch.zeros_like(got, dtype=torch.bool)
    want[0, 1, 2, 7] = want[1, :, 0, :4] = want[1, :, 4, :4] = True
    assert torch.equal(got.isnan(), want)


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8)])
def test_nothing_to_do(rotary, shape):
    x, positions = torch.zeros(shape, device=DEVICE), torch.zeros(shape[0], shape[2], dtype=torch.int64, device=DEVICE)
    angles = torch.zeros(1, 2, device=DEVICE)
    assert rotary.rotary(x, positions, angles, angles, False).shape == shape


def test_the_gradient_is_the_rotation_back(rotary):
    x, positions, angles = sample(16, 5)
    wide = x.double().requires_grad_()
    upstream = torch.randn_like(wide)
    ops.rotary(wide, positions, angles.cos().double(), angles.sin().double(), True).backward(upstream)
    got = rotary.rotary(upstream.float(), positions, angles.cos(), -angles.sin(), True)
    assert wide.grad is not None
    assert_close(got, wide.grad)


def test_the_comparison_sees_a_wrong_rotation(rotary):
    x, positions, angles = sample(8, 3)
    want = reference(x, positions, angles, False)

    def error(positions: Tensor = positions, angles: Tensor = angles, interleaved: bool = False) -> float:
        return nmse(rotary.rotary(x, positions, angles.cos(), angles.sin(), interleaved), want)

    assert error() < 1e-12
    assert error(positions=(positions + 1) % POSITIONS) > 1e-2
    assert error(angles=-angles) > 1e-2
    assert error(angles=angles.flip(1)) > 1e-2
    assert error(interleaved=True) > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 8)}, r"x must be \(B, H, T, D\), got \(2, 5, 8\)"),
        ({"positions": torch.zeros(2, 4, dtype=torch.int64)}, r"positions must be integers \(2, 5\), got .*\(2, 4\)"),
        ({"positions": torch.zeros(2, 5)}, r"positions must be integers \(2, 5\), got torch\.float32"),
        ({"cos": torch.zeros(13, 5)}, r"cos and sin must be \(N, R\) with 2 R between 2 and 8, got \(13, 5\)"),
        ({"sin": torch.zeros(13, 2)}, r"got \(13, 3\) and \(13, 2\)"),
        ({"cos": torch.zeros(13, 0), "sin": torch.zeros(13, 0)}, "with 2 R between 2 and 8"),
        ({"sin": torch.zeros(13, 3, device="meta")}, "all tensors must be on one device"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(rotary, change, message):
    x, positions, angles = sample(8, 3)
    given = {"x": x, "positions": positions, "cos": angles, "sin": angles, "interleaved": False}
    change = {name: tensor if tensor.is_meta else tensor.to(DEVICE) for name, tensor in change.items()}
    with pytest.raises(UsageError, match=message):
        rotary.rotary(**given | change)


def test_float64_is_left_to_the_reference(rotary):
    x, positions, angles = sample(8, 3)
    with pytest.raises(UnsupportedError, match=r"x must be float32, float16 or bfloat16, got torch\.float64"):
        rotary.rotary(x.double(), positions, angles, angles, False)


COMPILE = """
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ryzen_compile.kernels import rotary

KERNEL = rotary._rotary_kernel
for interleaved in (False, True):
    constants = {"D": 128, "R": 64, "INTERLEAVED": interleaved, "HEADS": 16, "CHANNELS": 128}
    types = {"x": "*bf16", "positions": "*i64", "cos": "*fp32", "sin": "*fp32", "out": "*bf16"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in KERNEL.arg_names}
    source = ASTSource(fn=KERNEL, signature=signature, constexprs=constants)
    options = {"enable_fp_fusion": False, "num_warps": 8}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    print(len(re.findall(r"\\bfma\\.", code)))
"""


def test_the_kernel_compiles_for_a_gpu_and_rounds_every_step(tmp_path):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    child = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert child.stdout.split() == ["0", "0"], child.stderr


@pytest.mark.gpu
def test_places_beyond_int32(rotary):
    heads, tokens, width = 2, (1 << 21) + 1, 1024
    x = torch.zeros(1, 1, tokens, width, dtype=torch.float16, device=DEVICE).expand(1, heads, tokens, width)
    positions = torch.zeros(1, tokens, dtype=torch.int64, device=DEVICE)
    angles = torch.zeros(1, 1, device=DEVICE)
    got = rotary.rotary(x + 1, positions, angles.cos(), angles.sin(), False)
    assert bool((got[0, -1, -1] == 1).all())
