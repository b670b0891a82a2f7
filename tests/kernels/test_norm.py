"""The Triton norms and their gradients against the operators' references in float64; in Triton's interpreter where
there is no GPU."""

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
from ryzen_compile.ops import norm as reference
from tests.kernels.oracle import DEVICE, DTYPES, LIMITS, assert_close, guarded, nmse

pytestmark = pytest.mark.usefixtures("untuned")

EPS = 1e-5
SHAPES = [(1, 1), (2, 5, 7), (3, 127), (2, 129), (1023,), (300, 3)]  # the last: more rows than a program of 256 takes


@pytest.fixture(scope="module")
def norm() -> ModuleType:
    pytest.importorskip("triton")
    from ryzen_compile.kernels import norm

    return norm


@pytest.fixture(scope="module")
def backward() -> ModuleType:
    pytest.importorskip("triton")
    from ryzen_compile.kernels import norm_backward

    return norm_backward


@pytest.fixture
def pieces(norm, backward, monkeypatch) -> None:
    """Rows of more than 32 elements are walked, in pieces of 16; down their columns in tiles of 2 by 64."""
    import triton

    monkeypatch.setattr(norm, "WHOLE", 32)
    monkeypatch.setattr(norm, "PIECES", (triton.Config({"BLOCK": 16}, num_warps=1),))
    monkeypatch.setattr(backward, "WHOLE", 32)
    monkeypatch.setattr(backward, "PIECES", norm.PIECES)
    monkeypatch.setattr(backward, "COLUMNS", (2, 64, 1))
    monkeypatch.setattr(backward, "PARTS", (2, 64, 1))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """``x`` is off centre, the weight nowhere near 1."""
    width = shape[-1]
    rows = {name: normal(*shape, dtype=dtype, seed=seed) for seed, name in enumerate(("residual", "grad", "extra"))}
    x = (normal(*shape, seed=3) * 3 + 1).to(dtype)
    return rows | {"x": x, "weight": normal(width, dtype=dtype, seed=4), "bias": normal(width, dtype=dtype, seed=5)}


def there(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def exact(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def run(op: Any, *arguments: Any) -> tuple[Tensor, ...]:
    got = op(*map(there, arguments))
    return got if isinstance(got, tuple) else (got,)


def wanted(op: str, *arguments: Any) -> tuple[Tensor, ...]:
    want = getattr(reference, op)(*map(exact, arguments))
    return want if isinstance(want, tuple) else (want,)


def assert_alike(module: ModuleType, op: str, *arguments: Any) -> None:
    got, want = run(getattr(module, op), *arguments), wanted(op, *arguments)
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.device.type == DEVICE and ours.is_contiguous()
        assert_close(ours, theirs)


def assert_forward(
    norm: ModuleType, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """All four operators, with and without what is optional."""
    t = inputs(shape, dtype)
    x, r, w, b = t["x"], t["residual"], t["weight"], t["bias"]
    with guarded(monkeypatch):
        assert_alike(norm, "rms_norm", x, w, EPS, True)
        assert_alike(norm, "rms_norm", x, None, EPS, False)
        assert_alike(norm, "layer_norm", x, w, b, EPS)
        assert_alike(norm, "layer_norm", x, None, b, EPS)
        assert_alike(norm, "add_rms_norm", x, r, w, EPS, False)
        assert_alike(norm, "add_layer_norm", x, r, w, None, EPS)
        assert_alike(norm, "add_layer_norm", x, r, None, None, EPS)


def assert_backward(
    backward: ModuleType, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    t = inputs(shape, dtype)
    g, x, w, e = t["grad"], t["x"], t["weight"], t["extra"]
    eps = EPS if shape[-1] > 3 else 0.5  # the gradient of a row of one element is nothing but what eps leaves of it
    with guarded(monkeypatch):
        assert_alike(backward, "rms_norm_backward", g, x, w, None, eps, True)
        assert_alike(backward, "rms_norm_backward", g, x, w, e, eps, False)
        assert_alike(backward, "rms_norm_backward", g, x, None, None, eps, False)
        assert_alike(backward, "layer_norm_backward", g, x, w, True, e, eps)
        assert_alike(backward, "layer_norm_backward", g, x, w, False, None, eps)
        assert_alike(backward, "layer_norm_backward", g, x, None, True, None, eps)
        assert_alike(backward, "layer_norm_backward", g, x, None, False, e, eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(norm, monkeypatch, shape, dtype):
    assert_forward(norm, monkeypatch, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(backward, monkeypatch, shape, dtype):
    assert_backward(backward, monkeypatch, shape, dtype)


@pytest.mark.parametrize("width", [33, 47, 64, 100])
def test_rows_in_pieces(norm, backward, pieces, monkeypatch, width):
    assert_forward(norm, monkeypatch, (5, width), torch.float32)
    assert_backward(backward, monkeypatch, (5, width), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_pieces_of_every_type(norm, backward, pieces, monkeypatch, dtype):
    assert_forward(norm, monkeypatch, (3, 49), dtype)
    assert_backward(backward, monkeypatch, (3, 49), dtype)


@pytest.mark.parametrize("width", [8192, 8193, 16384, 16385, 65536])
def test_wide_rows(norm, backward, monkeypatch, width):
    monkeypatch.setattr(backward, "COLUMNS", (2, 4096, 8))  # few programs: the interpreter takes a millisecond for each
    monkeypatch.setattr(backward, "PARTS", (2, 4096, 8))
    t = inputs((2, width), torch.bfloat16)
    with guarded(monkeypatch):
        assert_alike(norm, "add_layer_norm", t["x"], t["residual"], t["weight"], t["bias"], EPS)
        assert_alike(backward, "layer_norm_backward", t["grad"], t["x"], t["weight"], True, t["extra"], EPS)


def test_every_candidate(norm, backward, monkeypatch):
    """Whichever is the fastest on a device: all give the same numbers. 9 rows in steps of up to 8."""
    t = inputs((9, 200), torch.float32)
    for module in (norm, backward):
        for config in module._shapes(256, 8):
            monkeypatch.setattr(module, "_shapes", lambda block, rows, config=config: (config,))
            if module is norm:
                assert_alike(norm, "add_rms_norm", t["x"], t["residual"], t["weight"], EPS, False)
            else:
                assert_alike(backward, "layer_norm_backward", t["grad"], t["x"], t["weight"], True, None, EPS)


@pytest.mark.parametrize("rows", [1, 2, 7, 12, 13])
def test_programs_that_walk_several_rows(backward, monkeypatch, rows):
    """Two rows a step, three programs: some take a step more than others, and the last step lacks a row."""
    import triton

    config = triton.Config({"ROWS": 2, "FILL": 3, "STAGES": 2}, num_warps=1)
    monkeypatch.setattr(backward, "_shapes", lambda block, rows: (config,))
    monkeypatch.setattr(backward, "_processors", lambda device: 1)
    monkeypatch.setattr(backward, "PARTS", (2, 4, 1))
    assert_backward(backward, monkeypatch, (rows, 11), torch.float32)


@pytest.mark.parametrize("wide", [False, True])
def test_a_large_mean_leaves_the_variance_alone(norm, backward, monkeypatch, request, wide):
    if wide:
        request.getfixturevalue("pieces")
    x = normal(3, 100) + 3000
    t = inputs((3, 100), torch.float32) | {"x": x}
    assert_alike(norm, "layer_norm", x, t["weight"], t["bias"], EPS)
    assert_alike(backward, "layer_norm_backward", t["grad"], x, t["weight"], True, None, EPS)
    # That the limit is one which squares less the squared mean would break.
    variance = x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square()
    naive = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + EPS)
    assert nmse(naive, wanted("layer_norm", x, None, None, EPS)[0]) > LIMITS[torch.float32]


@pytest.mark.parametrize("wide", [False, True])
def test_the_sum_is_rounded_before_it_is_normalised(norm, request, wide):
    if wide:
        request.getfixturevalue("pieces")
    x, r = torch.full((2, 100), 1024.0, dtype=torch.float16), normal(2, 100, dtype=torch.float16)
    y, total = run(norm.add_layer_norm, x, r, None, None, EPS)
    assert torch.equal(total.cpu(), x + r)
    rounded = wanted("layer_norm", x + r, None, None, EPS)[0]
    assert_close(y, rounded)
    assert nmse(rounded, wanted("add_layer_norm", x, r, None, None, EPS)[0]) > 1e3 * LIMITS[torch.float16]


def test_squares_beyond_half_precision(norm, backward):
    x = normal(2, 65, dtype=torch.float16) * 1000
    g, w = normal(2, 65, dtype=torch.float16, seed=1), normal(65, dtype=torch.float16, seed=2)
    assert x.square().isinf().any()
    assert_alike(norm, "rms_norm", x, w, EPS, False)
    assert_alike(backward, "rms_norm_backward", g, x, w, None, EPS, False)


def test_weights_of_another_type(norm, backward):
    t = inputs((3, 33), torch.bfloat16)
    weight, bias = t["weight"].float(), t["bias"].half()
    assert_alike(norm, "layer_norm", t["x"], weight, bias, EPS)
    got = run(backward.layer_norm_backward, t["grad"], t["x"], weight, True, None, EPS)
    assert [tensor.dtype for tensor in got] == [torch.bfloat16, torch.float32, torch.float32]
    for ours, theirs in zip(
        got, wanted("layer_norm_backward", t["grad"], t["x"], weight, True, None, EPS), strict=True
    ):
        assert_close(ours, theirs)


def test_other_memory(norm, backward):
    x, g = normal(2, 9, 5).transpose(1, 2), normal(2, 5, 18, seed=1)[..., ::2]
    extra, weight = normal(1, 5, 9, seed=2).expand(2, 5, 9), normal(9, 2, seed=3)[:, 0]
    assert_alike(norm, "add_rms_norm", x, g, weight, EPS, False)
    assert_alike(norm, "layer_norm", extra, weight, weight, EPS)
    assert_alike(backward, "layer_norm_backward", g, x, weight, True, extra, EPS)
    assert_alike(backward, "rms_norm_backward", extra, x, weight, g, EPS, True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_stays_in_its_row(norm, backward, request, wide, bad):
    if wide:
        request.getfixturevalue("pieces")
    t = inputs((6, 50), torch.float32)
    t["x"][3, 41] = bad
    assert_alike(norm, "layer_norm", t["x"], t["weight"], t["bias"], EPS)
    for tensor in run(norm.add_rms_norm, t["x"], t["residual"], t["weight"], EPS, False):
        assert (~tensor.isfinite()).any(-1).nonzero().flatten().tolist() == [3]
    dx, dweight = run(backward.rms_norm_backward, t["grad"], t["x"], t["weight"], None, EPS, False)
    assert dx.isnan().any(-1).nonzero().flatten().tolist() == [3]
    assert bool(dweight.isnan().any())  # which sums over the rows


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter, in rows behind the last
def test_without_an_eps_rows_behind_the_last_add_nothing(norm, backward):
    t = inputs((5, 6), torch.float32)  # in a program of 8 rows
    assert_alike(norm, "rms_norm", t["x"], t["weight"], 0.0, False)
    assert_alike(backward, "rms_norm_backward", t["grad"], t["x"], t["weight"], None, 0.0, False)
    assert_alike(backward, "layer_norm_backward", t["grad"], t["x"], t["weight"], True, None, 0.0)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_nothing_to_normalise(norm, backward, monkeypatch, shape):
    t = inputs(shape, torch.float32)
    with guarded(monkeypatch):
        y, total = run(norm.add_rms_norm, t["x"], t["residual"], t["weight"], EPS, False)
        assert y.shape == total.shape == shape
        dx, *sums = run(backward.layer_norm_backward, t["grad"], t["x"], t["weight"], True, None, EPS)
        assert dx.shape == shape
        assert [tensor.tolist() for tensor in sums] == [[0.0] * shape[-1]] * 2


CONTROLS = {
    "columns off by one": lambda t: {"x": t["x"].roll(1, -1)},
    "rows off by one": lambda t: {"grad": t["grad"].roll(1, 0)},
    "weight off by one": lambda t: {"weight": t["weight"].roll(1)},
    "last row left out": lambda t: {"grad": torch.cat((t["grad"][:-1], torch.zeros_like(t["grad"][-1:])))},
    "last column left out": lambda t: {"x": torch.cat((t["x"][:, :-1], torch.zeros_like(t["x"][:, -1:])), 1)},
    "another eps": lambda t: {"eps": 1.0},
}


@pytest.mark.parametrize("control", CONTROLS)
def test_the_comparison_sees_a_wrong_gradient(backward, control):
    t: dict[str, Any] = inputs((4, 31), torch.bfloat16) | {"eps": EPS}
    names = ("grad", "x", "weight", "eps")

    def arguments(t: dict[str, Any]) -> tuple[Any, ...]:
        g, x, w, eps = (t[name] for name in names)
        return g, x, w, True, None, eps

    want = wanted("layer_norm_backward", *arguments(t))
    wrong = run(backward.layer_norm_backward, *arguments(t | CONTROLS[control](t)))
    assert nmse(wrong[0], want[0]) > 3 * LIMITS[torch.bfloat16]
    if control != "weight off by one":  # of which its own gradient knows nothing
        assert nmse(wrong[1], want[1]) > 3 * LIMITS[torch.bfloat16]


REFUSED = {
    "scalar": ({"x": torch.ones(())}, UsageError, r"add_layer_norm: x must be \(\.\.\., C\), got \(\)"),
    "double": (
        {"x": torch.ones(2, 6).double()},
        UnsupportedError,
        "x must be float32, float16 or bfloat16, got torch.floa",
    ),
    "integers": ({"weight": torch.ones(6, dtype=torch.int32)}, UnsupportedError, "weight must be float32, float16 or"),
    "weight": ({"weight": torch.ones(5)}, UsageError, r"add_layer_norm: weight must be \(6,\), got \(5,\)"),
    "bias": ({"bias": torch.ones(1, 6)}, UsageError, r"add_layer_norm: bias must be \(6,\), got \(1, 6\)"),
    "shape": (
        {"residual": torch.ones(6)},
        UsageError,
        r"residual must be as x is, \(2, 6\) in torch.float32, got \(6,\)",
    ),
    "type": ({"residual": torch.ones(2, 6).half()}, UsageError, r"got \(2, 6\) in torch.float16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_do_not_fit_are_refused(norm, case):
    other, error, message = REFUSED[case]
    t = inputs((2, 6), torch.float32) | other
    with pytest.raises(error, match=message):
        run(norm.add_layer_norm, t["x"], t["residual"], t["weight"], t["bias"], EPS)


def test_gradients_that_do_not_fit_are_refused(backward):
    t = inputs((2, 6), torch.float32)
    with pytest.raises(UsageError, match=r"rms_norm_backward: grad must be as x is, \(2, 6\) .* got \(2, 5\)"):
        run(backward.rms_norm_backward, torch.ones(2, 5), t["x"], t["weight"], None, EPS, False)
    with pytest.raises(UsageError, match=r"layer_norm_backward: extra must be as x is, .* in torch.bfloat16"):
        run(backward.layer_norm_backward, t["grad"], t["x"], None, True, t["extra"].bfloat16(), EPS)
    with pytest.raises(UsageError, match=r"all tensors must be on one device: x is on .*, weight on meta"):
        backward.rms_norm_backward(there(t["grad"]), there(t["x"]), torch.ones(6, device="meta"), None, EPS, False)


@pytest.mark.gpu
def test_gradients_are_the_same_each_time(backward):
    t = inputs((4099, 1000), torch.bfloat16)
    first, second = (
        run(backward.layer_norm_backward, t["grad"], t["x"], t["weight"], True, None, EPS) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1000, 65535])
def test_places_beyond_int32(norm, backward, width):
    rows = (1 << 31) // width + 2
    x = torch.zeros((rows, width), dtype=torch.float16, device=DEVICE)
    x[-1] = normal(width).to(DEVICE)
    weight = torch.ones(width, dtype=torch.float16, device=DEVICE)
    last = x[-1:].clone()
    torch.testing.assert_close(norm.rms_norm(x, weight, EPS, False)[-1:], norm.rms_norm(last, weight, EPS, False))
    got = backward.rms_norm_backward(x, x, weight, None, EPS, False)[0][-1:]
    torch.testing.assert_close(got, backward.rms_norm_backward(last, last, weight, None, EPS, False)[0])


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ryzen_compile.kernels import norm, norm_backward


SUMS = {"means": "*fp32", "rstds": "*fp32", "parts": "*fp32", "eps": "fp32"}
NUMBERS = {"rows": "i32", "C": "i32", "count": "i32"}


def compiled(kernel, warps, absent=(), **constants):
    constants |= dict.fromkeys(absent)
    types = {
        name: "constexpr" if name in constants else (SUMS | NUMBERS).get(name, "*bf16") for name in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types[name][0] in "*i"}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]


def wide(code):
    loads = [line.split()[0 if line.split()[0][0] != "@" else 1] for line in code.splitlines() if "ld.global" in line]
    return bool(loads) and all(".v4." in load for load in loads)


layer = {"CENTRED": True, "UNIT_OFFSET": False}
rms = {"CENTRED": False, "UNIT_OFFSET": True}
absent = ("residual", "total", "bias")
print(wide(compiled(norm._norm_kernel, 8, **layer, ROWS=1, BLOCK=4096)))
print(wide(compiled(norm._norm_kernel, 4, absent, **rms, ROWS=2, BLOCK=1024)))
for config in norm.PIECES[:1]:
    print(wide(compiled(norm._norm_pieces_kernel, config.num_warps, **layer, **config.kwargs)))
    print(wide(compiled(norm_backward._norm_backward_pieces_kernel, config.num_warps, **layer, **config.kwargs)))
config = norm_backward._shapes(4096, 4096)[2]
shape = {name: value for name, value in config.kwargs.items() if name != "FILL"} | {"BLOCK": 4096}
both = {"WEIGHT": True, "BIAS": True}
print("cp.async" in compiled(norm_backward._norm_backward_kernel, config.num_warps, **layer, **both, **shape))
rows, block, warps = norm_backward.COLUMNS
compiled(norm_backward._column_parts_kernel, warps, CENTRED=True, **both, ROWS=rows, BLOCK=block)
rows, block, warps = norm_backward.PARTS
print(wide(compiled(norm_backward._add_parts_kernel, warps, ROWS=rows, BLOCK=block)))
# Triton takes a number that is 1 for a constant.
compiled(norm._norm_kernel, 1, **layer, ROWS=1, BLOCK=1, rows=1, C=1)
compiled(norm_backward._norm_backward_kernel, 1, **layer, **both, ROWS=1, BLOCK=1, STAGES=3, rows=1, C=1)
compiled(norm_backward._column_parts_kernel, 1, CENTRED=True, **both, ROWS=1, BLOCK=256, rows=1)
compiled(norm_backward._add_parts_kernel, 1, ROWS=16, BLOCK=32, count=1, C=1)
"""


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """For compute capability 9.0, which needs no GPU: every global read takes 16 bytes, and the rows of the next step
    are on their way during this one."""
    pytest.importorskip("triton")
    child = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert child.stdout.split() == ["True"] * 6, child.stderr
