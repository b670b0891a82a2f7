"""The Triton kernel of attention against the operator in float64; in Triton's interpreter where there is no GPU."""

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
from tests.kernels.oracle import DEVICE, DTYPES, LIMITS, assert_close, guarded, nmse

pytestmark = pytest.mark.usefixtures("untuned")

WIDTHS = (64, 128, 256)
SMALL = dict.fromkeys(WIDTHS, ((16, 16, 4, 2),))  # many blocks for few tokens


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    from ryzen_compile.kernels import attention

    return attention


@pytest.fixture
def small(kernels, monkeypatch) -> ModuleType:
    """With blocks of 16 queries and 16 keys."""
    monkeypatch.setattr(kernels, "HALF", SMALL)
    monkeypatch.setattr(kernels, "SINGLE", SMALL)
    return kernels


@dataclass(frozen=True)
class Problem:
    tokens: int = 37
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    value_dim: int = 16
    scale: float = 0.3
    window: int = 0
    softcap: float = 0.0
    causal: bool = True
    sinks: bool = False
    batch: int = 1

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(self.tokens + self.dim)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

        q = normal(self.batch, self.heads, self.tokens, self.dim)
        k = normal(self.batch, self.kv_heads, self.tokens, self.dim)
        v = normal(self.batch, self.kv_heads, self.tokens, self.value_dim)
        return q, k, v, normal(self.heads).float() if self.sinks else None

    @property
    def form(self) -> tuple[float, int, float, bool]:
        return self.scale, self.window, self.softcap, self.causal


def reference(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, problem: Problem) -> Tensor:
    q, k, v = (x.cpu().double() for x in (q, k, v))
    return ops.attention(q, k, v, None if sinks is None else sinks.cpu().double(), *problem.form)


def assert_right(kernels: ModuleType, problem: Problem, dtype: torch.dtype) -> None:
    tensors = problem.tensors(dtype)
    got = kernels.attention(*tensors, *problem.form)
    assert got.dtype == dtype and got.is_contiguous()
    assert_close(got, reference(*tensors, problem))


FORMS = {
    "plain": Problem(),
    "all keys": Problem(causal=False),
    "window": Problem(window=5),
    "window 1": Problem(window=1),
    "window of several blocks": Problem(window=33, tokens=71),
    "window, later keys": Problem(window=5, causal=False),
    "window longer than the tokens": Problem(window=1000),
    "soft cap": Problem(softcap=0.8),
    "sinks": Problem(sinks=True),
    "no groups": Problem(kv_heads=4),
    "one group": Problem(kv_heads=1),
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
@pytest.mark.parametrize("form", ["plain", "all keys", "soft cap", "scale below 0", "values wider", "everything"])
def test_forms_in_half_precision(small, form, dtype):
    assert_right(small, FORMS[form], dtype)


@pytest.mark.parametrize("window", [15, 16, 17, 18, 31])
def test_windows_about_as_long_as_a_block(small, window):
    """Where a block is the last one that all see, or some, or none."""
    assert_right(small, Problem(66, heads=1, kv_heads=1, window=window), torch.float32)


@pytest.mark.parametrize("tokens", [1, 2, 15, 17, 63, 64, 65, 127, 129])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(kernels, tokens, causal):
    assert_right(kernels, Problem(tokens, heads=2, kv_heads=1, causal=causal), torch.float16)


@pytest.mark.parametrize("dims", [(1, 1), (3, 65), (17, 16), (64, 64), (80, 80), (129, 31), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths(kernels, dims, dtype):
    assert_right(kernels, Problem(19, 2, 1, *dims), dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_choice_of_blocks(kernels, monkeypatch, width):
    """Whatever measuring would find on some device, with the copying engine and, for the first, with pointers."""
    problem = Problem(tokens=131, heads=1, kv_heads=1, dim=width, value_dim=width, window=120, scale=0.1)
    tensors = problem.tensors(torch.bfloat16)
    for config in kernels.tile.configs(kernels.HALF, kernels.SINGLE, *tensors[1:3], True):
        monkeypatch.setattr(kernels.launch, "tuned", lambda *_, config=config: config)
        assert_close(kernels.attention(*tensors, *problem.form), reference(*tensors, problem))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_choice_of_blocks_in_single_precision(kernels, monkeypatch, width):
    for choice in kernels.SINGLE[width]:
        monkeypatch.setattr(kernels, "SINGLE", {width: (choice,)})
        assert_right(kernels, Problem(tokens=75, heads=1, kv_heads=1, dim=width, value_dim=width), torch.float32)


def test_half_precision_goes_through_the_copying_engine_and_odd_places_do_not(kernels):
    from triton.tools.tensor_descriptor import TensorDescriptor

    _, k, v, _ = Problem(dim=24).tensors(torch.float16)
    ways = [config.kwargs["DESCRIBED"] for config in kernels.tile.configs(kernels.HALF, kernels.SINGLE, k, k, True)]
    assert ways == [True] * (len(ways) - 1) + [False]
    assert isinstance(kernels.tile.source(k, 16, True), TensorDescriptor)
    assert kernels.tile.describable(k.transpose(1, 2).contiguous().transpose(1, 2))
    packed = torch.cat((k, v), -1)
    assert kernels.tile.describable(packed[..., :24])
    assert not kernels.tile.describable(packed[..., 1:25])  # begins at an odd place
    assert not kernels.tile.describable(packed[..., :25].contiguous())  # rows begin at odd places
    assert not kernels.tile.describable(k[:, :1].expand(-1, 4, -1, -1))
    assert not kernels.tile.describable(k.float())


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The numbers of ``x`` (B, H, T, D) in other memory, and whether a kernel can read them there."""
    return {
        "heads within tokens": x.transpose(1, 2).contiguous().transpose(1, 2),
        "packed": torch.cat((x, x), -1)[..., : x.shape[-1]],
        "odd rows": torch.cat((x, x[..., :1]), -1)[..., : x.shape[-1]],
        "channels apart": torch.stack((x, x), -1)[..., 0],
        "channels outermost": x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 2)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(small, layout, dtype):
    problem = Problem(20, batch=2)
    tensors = problem.tensors(dtype)
    laid = [layouts(x)[layout] for x in tensors[:3]]
    assert all(torch.equal(x, y) and not x.is_contiguous() for x, y in zip(laid, tensors, strict=False))
    assert_close(small.attention(*laid, None, *problem.form), reference(*tensors, problem))
    copied = any(small.tile.by_strides(x) is not x for x in laid)
    assert copied == (layout in ("channels apart", "channels outermost"))


def test_heads_that_share_memory(small):
    problem = Problem()
    q, k, v, _ = problem.tensors(torch.float16)
    k, v = k[:, :1].expand(-1, 2, -1, -1), v[:, :1].expand(-1, 2, -1, -1)
    assert_close(small.attention(q, k, v, None, *problem.form), reference(q, k, v, None, problem))


@pytest.mark.parametrize("bytes_of_cache", [1, 2 * 21 * 2 * 16 * 2])
@pytest.mark.parametrize("form", ["everything", "values wider"])
def test_everything_is_written_and_nothing_else(small, monkeypatch, form, bytes_of_cache):
    """Programs in sections of one group, and in sections of two, of which the last may be smaller."""
    monkeypatch.setattr(small.tile, "CACHE", bytes_of_cache)
    problem = replace(FORMS[form], tokens=21, heads=6, kv_heads=3)
    tensors = problem.tensors(torch.float16)
    with guarded(monkeypatch) as parts:
        got = small.attention(*tensors, *problem.form)
    assert len(parts) == 1 and not got.isnan().any()
    assert_close(got, reference(*tensors, problem))


def test_sinks_far_above_the_scores(small):
    """What is left for the keys is small, yet not lost: weights are formed without the sink."""
    problem = Problem(sinks=True)
    q, k, v, sinks = problem.tensors(torch.float16)
    sinks = sinks + 9
    assert_close(small.attention(q, k, v, sinks, *problem.form), reference(q, k, v, sinks, problem))
    none = small.attention(q, k, v, torch.full_like(sinks, float("-inf")), *problem.form)
    assert torch.equal(none, small.attention(q, k, v, None, *problem.form))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_scores_that_only_float32_holds(small, dtype):
    problem = Problem(scale=40.0)
    tensors = problem.tensors(dtype)
    assert_close(small.attention(*tensors, *problem.form), reference(*tensors, problem))


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter's maximum
def test_a_nan_stays_in_its_row(small):
    problem = Problem()
    q, k, v, _ = problem.tensors(torch.float32)
    clean = small.attention(q, k, v, None, *problem.form)
    q[0, 1, 20, 3] = float("nan")
    got = small.attention(q, k, v, None, *problem.form)
    assert got[0, 20, 1].isnan().all()
    got[0, 20, 1] = clean[0, 20, 1]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("shape", [(0, 4, 2, 5), (2, 4, 2, 0)], ids=str)
def test_nothing_to_do(kernels, shape):
    batch, heads, kv_heads, tokens = shape
    q, k = (torch.zeros(batch, h, tokens, 16, device=DEVICE) for h in (heads, kv_heads))
    assert kernels.attention(q, k, k[..., :8], None, 1.0, 0, 0.0, True).shape == (batch, tokens, heads, 8)


def test_places_beyond_int32(small):
    """The last sequence lies 2^31 elements behind the first; NumPy's zeros take memory once written to."""
    problem = Problem(batch=3, heads=1, kv_heads=1, tokens=5)
    far = torch.from_numpy(np.zeros((1 << 31) + 1024, np.float16)).to(DEVICE)
    q, k, v, _ = problem.tensors(torch.float16)
    for x in (q, k, v):
        laid = far.as_strided(x.shape, (1 << 30, 80, 16, 1))
        laid.copy_(x)
        tensors = [laid if y is x else y for y in (q, k, v)]
        assert_close(small.attention(*tensors, None, *problem.form), reference(q, k, v, None, problem))


NEAR = Problem(window=5)
CONTROLS = {
    "mask shifted by one": lambda of, q, k, v: of(q, k.roll(-1, 2), v.roll(-1, 2), NEAR),
    "last key dropped": lambda of, q, k, v: of(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], NEAR),
    "scale off by 1 %": lambda of, q, k, v: of(q, k, v, replace(NEAR, scale=0.303)),
    "window off by one": lambda of, q, k, v: of(q, k, v, replace(NEAR, window=6)),
    "groups exchanged": lambda of, q, k, v: of(q, k.flip(1), v.flip(1), NEAR),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_comparison_sees_a_wrong_attention(small, dtype):
    def of(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        return reference(q, k, v, None, problem)

    q, k, v, _ = NEAR.tensors(dtype)
    got, right = small.attention(q, k, v, None, *NEAR.form), of(q, k, v, NEAR)
    for name, control in CONTROLS.items():
        if dtype == torch.bfloat16 and "scale" in name:
            continue  # bfloat16's limit is an error of 1 % itself
        wrong = control(of, q, k, v)
        rows = slice(-wrong.shape[1], None)  # without its last key, the last query sees the keys of the one before it
        assert nmse(got[:, rows], right[:, rows]) <= LIMITS[dtype]
        assert nmse(got[:, rows], wrong) > LIMITS[dtype], name


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        ({"q": (1, 4, 5)}, UsageError, r"expected q \(B, H, T, D\).*got q \(1, 4, 5\)"),
        ({"k": (1, 2, 6, 16)}, UsageError, r"expected q .*k \(1, 2, 6, 16\)"),
        ({"k": (1, 2, 5, 8)}, UsageError, r"expected q .*k \(1, 2, 5, 8\)"),
        ({"v": (1, 4, 5, 16)}, UsageError, r"expected q .*v \(1, 4, 5, 16\)"),
        ({"q": (1, 3, 5, 16)}, UsageError, "a multiple of the heads of k, got 3 and 2"),
        ({"q": (1, 0, 5, 16)}, UsageError, "a multiple of the heads of k, got 0 and 2"),
        ({"sinks": (3,)}, UsageError, r"sinks must be \(4,\) floats, got \(3,\)"),
        ({"window": -1}, UsageError, "window must be the number of keys .*got -1"),
        ({"v": (1, 2, 5, 257)}, UnsupportedError, "1 to 256 channels, got 16 and 257"),
        ({"dtype": torch.float64}, UnsupportedError, "of one type, float32, float16 or bfloat16, got torch.float64"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(kernels, other, error, message):
    shapes = {"q": (1, 4, 5, 16), "k": (1, 2, 5, 16), "v": (1, 2, 5, 16)} | other
    q, k, v = (torch.zeros(shapes[name], dtype=other.get("dtype"), device=DEVICE) for name in "qkv")
    sinks = torch.zeros(other["sinks"], device=DEVICE) if "sinks" in other else None
    with pytest.raises(error, match=f"attention: .*{message}"):
        kernels.attention(q, k, v, sinks, 1.0, other.get("window", 0), 0.0, True)


def test_types_and_devices_must_be_one(kernels):
    q, k, v, _ = Problem().tensors(torch.float32)
    with pytest.raises(UnsupportedError, match=r"got torch\.float32, torch\.float16 and torch\.float32"):
        kernels.attention(q, k.half(), v, None, *Problem().form)
    with pytest.raises(UsageError, match=f"q is on {DEVICE}.*, v on meta"):
        kernels.attention(q, k, v.to("meta"), None, *Problem().form)


COMPILE = """
import re
import subprocess
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ryzen_compile.kernels import attention


KERNEL = attention._attention_kernel
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


def of(name, type, known, rows, described):
    if name in known:
        return "constexpr"
    if name in ("k", "v") and described:
        return f"tensordesc<{type}[1, 1, {rows}, {known['D']}]>"
    if name.endswith("_strides"):
        return ("i32",) * 3
    return {"factor": "fp32", "cap": "fp32", "sinks": "*fp32"}.get(name, "*" + type if name in "qkvout" else "i32")


def compiled(type, dim, choice, described, capped=False):
    m, n, warps, stages = choice
    known = {"GROUP": 4, "CAPPED": capped, "INTERPRETED": False, "D": dim, "DV": dim, "BLOCK_M": m, "BLOCK_N": n}
    known |= {"DESCRIBED": described} | ({} if capped else {"sinks": None})
    names = list(enumerate(KERNEL.arg_names))
    aligned = [(i, j) for i, name in names if name.endswith("_strides") for j in range(3)]
    aligned += [(i,) for i, name in names if name in "qkvout"]
    source = ASTSource(
        fn=KERNEL,
        signature={name: of(name, type, known, n, described) for _, name in names},
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
    return "wgmma" in code, "cp.async.bulk.tensor" in code, spilled, "serialized" in said


print(compiled("bf16", 64, attention.HALF[64][0], True))
print(compiled("bf16", 128, attention.HALF[128][1], True, capped=True))
print(compiled("bf16", 128, attention.HALF[128][0], False))
print(compiled("fp32", 64, attention.SINGLE[64][0], False))
"""


def test_the_kernel_compiles_for_a_gpu(tmp_path):
    """For compute capability 9.0, which needs no GPU: with its matrix instructions, not one after the other, with its
    copying engine where it is asked for, and without running out of registers."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    half, single = "(True, True, 0, False)", "(False, False, 0, False)"
    assert child.stdout.splitlines() == [half, half, "(True, False, 0, False)", single], child.stderr
