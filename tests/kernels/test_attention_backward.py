"""The Triton kernels of attention's gradients against the operator in float64; interpreted where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from ryzen_compile import ops
from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.ops.attention_backward import attention_backward
from tests.kernels.oracle import DEVICE, LIMITS, assert_close, guarded, nmse

pytestmark = pytest.mark.usefixtures("untuned")

WIDTHS = (64, 128, 256)
SMALL = dict.fromkeys(WIDTHS, ((16, 16, 4, 2),))  # many blocks for few tokens
TABLES = ("HALF_QUERIES", "HALF_KEYS", "SINGLE_QUERIES", "SINGLE_KEYS")
NAMES = ("dq", "dk", "dv", "dsinks")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    from ryzen_compile.kernels import attention_backward

    return attention_backward


@pytest.fixture
def small(kernels, monkeypatch) -> ModuleType:
    """With blocks of 16 queries and 16 keys."""
    for table in TABLES:
        monkeypatch.setattr(kernels, table, SMALL)
    return kernels


@dataclass(frozen=True)
class Problem:
    tokens: int = 37
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    value_dim: int = 16
    scale: float = 0.3
    window: int = 0
    softcap: float = 0.0
    causal: bool = True
    sinks: bool = False
    batch: int = 1

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """The gradient of the output, q, k, v, the output, and sinks or none."""
        generator = torch.Generator().manual_seed(self.tokens + self.dim)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        q = normal(self.batch, self.heads, self.tokens, self.dim)
        k = normal(self.batch, self.kv_heads, self.tokens, self.dim)
        v = normal(self.batch, self.kv_heads, self.tokens, self.value_dim)
        grad = normal(self.batch, self.tokens, self.heads, self.value_dim)
        sinks = normal(self.heads).float() if self.sinks else None
        exact = [x.double() for x in (q, k, v)]
        out = ops.attention(*exact, None if sinks is None else sinks.double(), *self.form).to(dtype)
        all_six = (grad, q, k, v, out, sinks)
        return tuple(None if x is None else x.to(DEVICE) for x in all_six)  # type: ignore[return-value]

    @property
    def form(self) -> tuple[float, int, float, bool]:
        return self.scale, self.window, self.softcap, self.causal


def reference(tensors: tuple[Tensor | None, ...], problem: Problem) -> tuple[Tensor, ...]:
    return attention_backward(*(None if x is None else x.cpu().double() for x in tensors), *problem.form)


def assert_all_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    assert len(got) == 4
    for name, x, y in zip(NAMES, got, want, strict=True):
        assert x.is_contiguous() and x.dtype == (torch.float32 if name == "dsinks" and len(x) else dtype), name
        if len(y) and y.norm() < 1e-9:  # the difference of equal numbers: what is left of it in float32 is rounding
            assert x.shape == y.shape and x.abs().max() < 1e-5, name
        else:
            assert_close(x, y, LIMITS[dtype])


def assert_right(kernels: ModuleType, problem: Problem, dtype: torch.dtype) -> None:
    tensors = problem.tensors(dtype)
    assert_all_close(kernels.attention_backward(*tensors, *problem.form), reference(tensors, problem), dtype)


FORMS = {
    "plain": Problem(),
    "all keys": Problem(causal=False),
    "window": Problem(window=5),
    "window 1": Problem(window=1, tokens=20),
    "window of several blocks": Problem(window=33, tokens=71),
    "window, later keys": Problem(window=5, causal=False),
    "window longer than the tokens": Problem(window=1000),
    "soft cap": Problem(softcap=0.8),
    "sinks": Problem(sinks=True),
    "no groups": Problem(kv_heads=2),
    "two groups": Problem(heads=6, kv_heads=2, tokens=20),
    "scale below 0": Problem(scale=-0.3, window=7),
    "scale 0": Problem(scale=0.0, window=7),
    "values narrower": Problem(dim=40, value_dim=24),
    "values wider": Problem(dim=7, value_dim=19),
    "everything": Problem(window=20, softcap=2.0, sinks=True, batch=2, dim=24),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(small, form):
    assert_right(small, FORMS[form], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["plain", "window, later keys", "scale below 0", "values wider", "everything"])
def test_forms_in_half_precision(small, form, dtype):
    assert_right(small, FORMS[form], dtype)


@pytest.mark.parametrize("window", [15, 16, 17, 18, 31])
def test_windows_about_as_long_as_a_block(small, window):
    """Where a block is the last one that all see, or some, or none."""
    assert_right(small, Problem(66, heads=1, window=window), torch.float32)


@pytest.mark.parametrize("tokens", [1, 2, 31, 64, 127, 129])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(kernels, tokens, causal):
    assert_right(kernels, Problem(tokens, causal=causal), torch.float16)


@pytest.mark.parametrize("dims", [(1, 1), (17, 65), (80, 80)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widths(kernels, dims, dtype):
    assert_right(kernels, Problem(19, 2, 1, *dims), dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_choice_of_blocks(kernels, monkeypatch, width):
    """Whatever measuring would find on some device, with the copying engine and, for the first, with pointers."""
    tokens = 67 if width == 256 else 131  # more than one block of most
    problem = Problem(tokens, heads=1, dim=width, value_dim=width, window=tokens - 11, scale=0.1)
    tensors = problem.tensors(torch.bfloat16)
    want = reference(tensors, problem)
    for index in range(1 + max(len(kernels.HALF_QUERIES[width]), len(kernels.HALF_KEYS[width]))):
        monkeypatch.setattr(kernels.launch, "tuned", lambda _, __, all_, *___, index=index: all_[index % len(all_)])
        assert_all_close(kernels.attention_backward(*tensors, *problem.form), want, torch.bfloat16)


def test_layouts(small):
    """Heads within tokens, as capturing leaves them, rows at odd places, channels apart, and a gradient of ones."""
    problem = Problem(20, batch=2)
    grad, q, k, v, out, _ = problem.tensors(torch.float16)
    grad = torch.ones(1, dtype=grad.dtype, device=DEVICE).expand(grad.shape)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat((k, k[..., :1]), -1)[..., : k.shape[-1]]
    out = torch.stack((out, out), -1)[..., 0]
    tensors = (grad, q, k, v, out, None)
    assert not any(x.is_contiguous() for x in (grad, q, k, out))
    assert_all_close(small.attention_backward(*tensors, *problem.form), reference(tensors, problem), torch.float16)


@pytest.mark.parametrize("bytes_of_cache", [1, 4 * 21 * 2 * 16 * 2])
@pytest.mark.parametrize("form", ["everything", "values wider"])
def test_everything_is_written_and_nothing_else(small, monkeypatch, form, bytes_of_cache):
    """Programs in sections of one group, and in sections of two, of which the last may be smaller."""
    monkeypatch.setattr(small.tile, "CACHE", bytes_of_cache)
    problem = replace(FORMS[form], tokens=21, heads=6, kv_heads=3)
    tensors = problem.tensors(torch.float16)
    with guarded(monkeypatch) as parts:
        got = small.attention_backward(*tensors, *problem.form)
    assert len(parts) == 6
    assert_all_close(got, reference(tensors, problem), torch.float16)


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_do(kernels, tokens):
    q, k = (torch.zeros(0 if tokens else 2, heads, tokens, 16, device=DEVICE) for heads in (4, 2))
    out, sinks = q.transpose(1, 2), torch.ones(4, device=DEVICE)
    dq, dk, dv, dsinks = kernels.attention_backward(out, q, k, k, out, sinks, 1.0, 0, 0.0, True)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)
    assert torch.equal(dsinks, torch.zeros_like(sinks))


def test_sinks_gradient_of_many_blocks_and_sequences(small, monkeypatch):
    monkeypatch.setattr(small, "SINKS_BLOCK", 16)
    assert_right(small, Problem(sinks=True, batch=3), torch.float32)


def test_places_beyond_int32(small):
    """The last sequence lies 2^31 elements behind the first; NumPy's zeros take memory once written to."""
    problem = Problem(batch=3, heads=1, kv_heads=1, tokens=5)
    far = torch.from_numpy(np.zeros((1 << 31) + 1024, np.float16)).to(DEVICE)
    tensors = problem.tensors(torch.float16)
    want = reference(tensors, problem)
    for i, x in enumerate(tensors[:5]):
        laid = far.as_strided(x.shape, (1 << 30, *x.stride()[1:]))
        laid.copy_(x)
        got = small.attention_backward(*tensors[:i], laid, *tensors[i + 1 :], *problem.form)
        assert_all_close(got, want, torch.float16)


CONTROLS = {
    "mask shifted by one": lambda of, g, q, k, v, o: of(g, q, k.roll(-1, 2), v.roll(-1, 2), o),
    "scale off by 1 %": lambda of, g, q, k, v, o: of(g, q, k, v, o, scale=0.303),
    "window off by one": lambda of, g, q, k, v, o: of(g, q, k, v, o, window=6),
    "last key dropped": lambda of, g, q, k, v, o: of(g, q, k, v.index_fill(2, torch.tensor(36), 0), o),
    "output of others": lambda of, g, q, k, v, o: of(g, q, k, v, o.flip(1)),
    "groups exchanged": lambda of, g, q, k, v, o: of(g, q, k.flip(1), v, o),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_comparison_sees_wrong_gradients(small, dtype):
    near = Problem(window=5, heads=4, kv_heads=2)
    tensors = near.tensors(dtype)

    def of(*tensors: Tensor, **other: float) -> tuple[Tensor, ...]:
        return reference((*tensors, None), replace(near, **other))[:3]

    got = small.attention_backward(*tensors, *near.form)[:3]
    for name, control in CONTROLS.items():
        wrong = control(of, *(x.cpu() for x in tensors[:5]))
        assert max(map(nmse, got, wrong)) > LIMITS[dtype], name


def test_what_does_not_fit_is_refused(kernels):
    grad, q, k, v, out, _ = Problem().tensors(torch.float32)
    form = Problem().form
    with pytest.raises(
        UsageError, match=r"attention_backward: grad must be \(1, 37, 2, 16\) of torch.float32, got \(1, 2"
    ):
        kernels.attention_backward(grad.transpose(1, 2), q, k, v, out, None, *form)
    with pytest.raises(UsageError, match=r"out must be \(1, 37, 2, 16\) of torch.float32, got .* of torch.float16"):
        kernels.attention_backward(grad, q, k, v, out.half(), None, *form)
    with pytest.raises(UsageError, match=r"attention_backward: sinks must be \(2,\) floats, got \(3,\)"):
        kernels.attention_backward(grad, q, k, v, out, torch.zeros(3, device=DEVICE), *form)
    with pytest.raises(UnsupportedError, match=r"attention_backward: .* one type.*torch.float64, torch.float32 and"):
        kernels.attention_backward(grad, q.double(), k, v, out, None, *form)
    with pytest.raises(UsageError, match=f"q is on {DEVICE}.*, out on meta"):
        kernels.attention_backward(grad, q, k, v, out.to("meta"), None, *form)


COMPILE = """
import re
import subprocess
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ryzen_compile.kernels import attention_backward, attention_gradients


PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
FLOATS = ("factor", "cap", "scale")
NUMBERS = ("tokens", "heads", "together", "window", "reach", "batch")


def compiled(kernel, type, known, described, warps, stages):
    signature = {}
    for name in kernel.arg_names:
        if name in known:
            signature[name] = "constexpr"
        elif name in described:
            signature[name] = f"tensordesc<{described[name]}>"
        elif name.endswith("_strides"):
            signature[name] = ("i32",) * 3
        elif name in FLOATS + NUMBERS:
            signature[name] = "fp32" if name in FLOATS else "i32"
        else:
            signature[name] = "*fp32" if name in ("sizes", "deltas", "sinks", "dsinks") else "*" + type
    kinds = list(enumerate(signature.values()))
    aligned = [(i, j) for i, kind in kinds if isinstance(kind, tuple) for j in range(3)]
    aligned += [(i,) for i, kind in kinds if kind[0] == "*"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=known,
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    ptx = Path(sys.argv[1]) / "kernel.ptx"
    ptx.write_text(code)
    said = subprocess.run(
        [PTXAS, "-v", "--gpu-name=sm_90a", ptx, "-o", ptx.with_suffix(".cubin")], capture_output=True, text=True
    ).stderr
    spilled = int(re.search(r"(\\d+) bytes spill stores", said)[1])
    return "wgmma" in code, "cp.async.bulk.tensor" in code, spilled <= 16, "serialized" in said


def gradients(kernel, type, dim, choice, described, **other):
    m, n, warps, stages = choice
    known = {"GROUP": 4, "CAPPED": False, "INTERPRETED": False, "D": dim, "DV": dim, "BLOCK_M": m, "BLOCK_N": n}
    queries = kernel is attention_gradients.queries_kernel
    rows = dict.fromkeys(("k", "v") if queries else ("q", "grad"), f"{type}[1, 1, {n if queries else m}, {dim}]")
    if not queries:
        rows |= dict.fromkeys(("sizes", "deltas"), f"fp32[1, {m}]")
    known |= {"DESCRIBED": described} | other
    return compiled(kernel, type, known, rows if described else {}, warps, stages)


QUERIES, KEYS = attention_gradients.queries_kernel, attention_gradients.keys_kernel
print(gradients(QUERIES, "bf16", 128, attention_backward.HALF_QUERIES[128][0], True, CAPPED=True))
print(gradients(KEYS, "bf16", 64, attention_backward.HALF_KEYS[64][0], True))
print(gradients(KEYS, "fp32", 64, attention_backward.SINGLE_KEYS[64][0], False))
print(compiled(attention_gradients.sinks_kernel, "bf16", {"BLOCK": 1024}, {}, 4, 2))
"""


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """For compute capability 9.0, which needs no GPU: with its matrix instructions, not one after the other, with its
    copying engine where it is asked for, and without running out of registers."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    half, single = "(True, True, True, False)", "(False, False, True, False)"
    assert child.stdout.splitlines() == [half, half, single, single], child.stderr
