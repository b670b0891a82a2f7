"""The Triton cross-entropy against its reference in float64; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.ops import loss as ops
from tests.kernels.oracle import DEVICE, DTYPES, LIMITS, assert_close, guarded, nmse

pytestmark = pytest.mark.usefixtures("untuned")

IGNORED = -100
NAN = "ignore:All-NaN slice encountered:RuntimeWarning"  # how the interpreter takes a maximum of nothing else
Problem = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def loss() -> ModuleType:
    pytest.importorskip("triton")
    from ryzen_compile.kernels import loss

    return loss


@pytest.fixture
def small_chunks(loss, monkeypatch) -> None:
    """Chunks of four rows for what would be 4096, so that the interpreter sees several."""
    monkeypatch.setattr(loss, "ROWS", 4)
    monkeypatch.setattr(loss, "TILE", 2)


def problem(n: int, c: int, v: int, dtype: torch.dtype = torch.float32) -> Problem:
    """``h``, ``w`` and labels, on the device; the second label is ignored, the last is the last class."""
    generator = torch.Generator().manual_seed(n + c + v)
    h, w = torch.randn(n, c, generator=generator), torch.randn(v, c, generator=generator) * 2 / math.sqrt(c)
    labels = torch.randint(v, (n,), generator=generator)
    labels[-1:] = v - 1
    labels[1:2] = IGNORED
    return h.to(DEVICE, dtype), w.to(DEVICE, dtype), labels.to(DEVICE)


def wanted(h: Tensor, w: Tensor, labels: Tensor, softcap: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    return ops.linear_cross_entropy_grads(h.cpu().double(), w.cpu().double(), labels.cpu(), IGNORED, softcap)


def assert_all_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    assert [x.dtype for x in got] == [torch.float32, dtype, dtype][: len(got)]
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, LIMITS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 2), (2, 16, 127), (5, 31, 257), (3, 64, 4097)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_loss_and_gradients(loss, monkeypatch, dtype, shape, softcap):
    """The buffer begins as NaN, its padding included, and so do the results."""
    h, w, labels = problem(*shape, dtype)
    want = wanted(h, w, labels, softcap)
    with guarded(monkeypatch):
        got = loss.linear_cross_entropy_grads(h, w, labels, IGNORED, softcap)
    assert_all_close(got, want, dtype)
    with guarded(monkeypatch):
        alone = loss.linear_cross_entropy(h, w, labels, IGNORED, softcap)
    assert_all_close((alone,), want[:1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "chunk"), [(4, 4), (9, 6), (35, 6)])
@pytest.mark.usefixtures("small_chunks")
def test_many_chunks(loss, monkeypatch, dtype, n, chunk):
    h, w, labels = problem(n, 5, 37, dtype)
    with guarded(monkeypatch) as parts:
        got = loss.linear_cross_entropy_grads(h, w, labels, IGNORED, 0.0)
    assert_all_close(got, wanted(h, w, labels), dtype)
    assert [tuple(part.shape) for part in parts] == [(n, 5), (37, 5), (chunk, 48), (n,)]
    with guarded(monkeypatch) as parts:
        alone = loss.linear_cross_entropy(h, w, labels, IGNORED, 0.0)
    assert [tuple(part.shape) for part in parts] == [(4, 48), (n,)]
    assert_all_close((alone,), got[:1], dtype)


@pytest.mark.parametrize(
    ("rows", "chunk"),
    [(0, 0), (1, 1), (1023, 1023), (2047, 2047), (2048, 1024), (8192, 1024), (8193, 1152), (1 << 20, 1 << 16)],
)
def test_chunks_of_even_size(loss, rows, chunk):
    assert loss.chunk_rows(rows) == chunk


def test_dw_is_rounded_at_most_sixteen_times(loss):
    for rows in (*range(1, 40000, 37), 131071, 131073, 1 << 24):
        assert math.ceil(rows / loss.chunk_rows(rows)) <= 16
        assert loss.chunk_rows(rows) >= min(rows, 1024)


CONTROLS = {
    "labels shifted": lambda h, w, labels: (h, w, torch.where(labels >= 0, (labels + 1) % len(w), labels)),
    "an ignored row counted": lambda h, w, labels: (h, w, labels.clamp(min=0)),
    "a class left out": lambda h, w, labels: (h, torch.cat((w[:2], w[3:4], w[3:])), labels),
}


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_comparison_sees_another_problem(loss, control, dtype):
    h, w, labels = problem(5, 16, 31, dtype)
    other = CONTROLS[control](h, w, labels)
    got = loss.linear_cross_entropy_grads(h, w, labels, IGNORED, 0.0)
    for one, want in zip(got, wanted(*other), strict=True):
        assert nmse(one, want) > 3 * LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_comparison_sees_another_soft_cap(loss, dtype):
    h, w, labels = problem(5, 16, 31, dtype)
    got = loss.linear_cross_entropy_grads(h, w, labels, IGNORED, 3.0)
    for one, want in zip(got, wanted(h, w, labels, 3.3), strict=True):
        assert nmse(one, want) > 3 * LIMITS[dtype]


@pytest.mark.usefixtures("small_chunks")
def test_the_same_twice(loss):
    h, w, labels = problem(9, 5, 37, torch.bfloat16)
    first, second = (loss.linear_cross_entropy_grads(h, w, labels, IGNORED, 3.0) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_cross_entropy_grads"])
def test_every_candidate_is_right_and_harmless(loss, monkeypatch, name):
    h, w, labels = problem(2, 3, 16411)
    labels[1] = 8191
    want = wanted(h, w, labels)
    chosen = []

    def tuned(kernel: str, key: tuple, candidates: list, run: Callable, device: torch.device) -> object:
        for config in candidates if not chosen else ():
            run(config)
        chosen.append(candidates[len(chosen)])
        return chosen[-1]

    monkeypatch.setattr(loss.launch, "tuned", tuned)
    monkeypatch.setattr(
        loss.launch, "empty", lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device)
    )
    for _ in loss.BLOCKS:
        got = getattr(loss, name)(h, w, labels, IGNORED, 0.0)
        got = got if isinstance(got, tuple) else (got,)
        assert_all_close(got, want[: len(got)], torch.float32)
    assert [(config.kwargs["BLOCK"], config.num_warps) for config in chosen] == list(loss.BLOCKS)


def test_tensors_with_gaps(loss):
    h, w, labels = problem(4, 6, 33)
    gapped = tuple(torch.stack((x, x), -1)[..., 0] for x in (h, w, labels))
    assert not any(x.is_contiguous() for x in gapped)
    assert_all_close(loss.linear_cross_entropy_grads(*gapped, IGNORED, 0.0), wanted(h, w, labels), torch.float32)
    assert_close(loss.linear_cross_entropy(*gapped, IGNORED, 0.0), wanted(h, w, labels)[0])
    transposed = w.T.contiguous().T
    assert_close(loss.linear_cross_entropy(h, transposed, labels, IGNORED, 0.0), wanted(h, w, labels)[0])


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.usefixtures("small_chunks")
def test_an_ignored_row_has_no_gradient_whatever_is_in_it(loss, softcap):
    h, w, labels = problem(6, 5, 37, torch.bfloat16)
    labels[:5] = IGNORED
    h[4] = math.nan
    value, by_h, _ = loss.linear_cross_entropy_grads(h, w, labels, IGNORED, softcap)
    assert not by_h[:5].any() and bool(by_h[5].any())
    assert_close(value, wanted(h[5:], w, labels[5:], softcap)[0], LIMITS[torch.bfloat16])


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("ignored", [5, 1, -1])
def test_nothing_counted_gives_zero(loss, monkeypatch, n, ignored):
    h, w, _ = problem(n, 4, 9)
    labels = torch.full((n,), ignored, device=DEVICE)
    with guarded(monkeypatch):
        got = loss.linear_cross_entropy_grads(h, w, labels, ignored, 0.0)
        alone = loss.linear_cross_entropy(h, w, labels, ignored, 0.0)
    assert [(tuple(x.shape), int(x.count_nonzero())) for x in (*got, alone)] == [
        ((), 0),
        ((n, 4), 0),
        ((9, 4), 0),
        ((), 0),
    ]


@pytest.mark.filterwarnings(NAN)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_nan_stays_in_its_row(loss, monkeypatch, softcap):
    h, w, labels = problem(5, 7, 300)
    want = wanted(h, w, labels, softcap)
    h[3, 2] = math.nan
    with guarded(monkeypatch) as parts:
        value, by_h, by_w = loss.linear_cross_entropy_grads(h, w, labels, IGNORED, softcap)
    assert value.isnan() and by_w.isnan().all()
    rows = next(part for part in parts if part.shape == (5,))
    assert rows.isnan().tolist() == by_h.isnan().all(1).tolist() == [False, False, False, True, False]
    others = torch.arange(5) != 3
    assert_close(by_h.cpu()[others], want[1][others])


def test_one_logit_of_nan_and_one_of_minus_infinity(loss):
    """Which a product does not give, but a kernel reads what is there."""
    w = torch.zeros(300, 1, device=DEVICE)
    w[7] = -math.inf
    h, labels = torch.ones(1, 1, device=DEVICE), torch.tensor([9], device=DEVICE)
    assert_close(loss.linear_cross_entropy(h, w, labels, IGNORED, 0.0), torch.tensor(math.log(299)).double())
    w[7] = math.nan
    assert loss.linear_cross_entropy(h, w, labels, IGNORED, 0.0).isnan()


@pytest.mark.parametrize("label", [37, 47, -1, 1 << 40, -(1 << 62)])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_a_label_out_of_range_gives_nan_and_is_not_followed(loss, monkeypatch, label, softcap):
    """37 and 47 are in the padding of a row of logits."""
    h, w, labels = problem(4, 5, 37)
    labels[2] = label
    with guarded(monkeypatch) as parts:
        value, by_h, by_w = loss.linear_cross_entropy_grads(h, w, labels, IGNORED, softcap)
    assert value.isnan() and by_w.isnan().all()
    rows = next(part for part in parts if part.shape == (4,))
    assert rows.isnan().tolist() == by_h.isnan().all(1).tolist() == [False, False, True, False]
    assert loss.linear_cross_entropy(h, w, labels, IGNORED, softcap).isnan()


def test_float16_keeps_the_gradient_of_unlikely_classes(loss, monkeypatch):
    """Of classes that are no row's label: their softmax over the count is below float16's normal numbers."""
    n, v = 32, 16384
    generator = torch.Generator().manual_seed(0)
    h = (100 + torch.randn(n, 16, generator=generator)).to(DEVICE, torch.float16)
    w = (torch.randn(v, 16, generator=generator) * 1e-3).to(DEVICE, torch.float16)
    labels = torch.arange(n, device=DEVICE)
    want = wanted(h, w, labels)[2][n:]
    got = loss.linear_cross_entropy_grads(h, w, labels, IGNORED, 0.0)[2][n:]
    assert_close(got, want)
    monkeypatch.setattr(loss, "MOST_UNIT", 1)  # the mean's factor in the buffer alone
    assert nmse(loss.linear_cross_entropy_grads(h, w, labels, IGNORED, 0.0)[2][n:], want) > LIMITS[torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 0), (3, 4097), (2, 3, 5)], ids=str)
def test_backward(loss, monkeypatch, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    third = torch.tensor(1 / 3, device=DEVICE)
    want = (gradient.float() * third).to(dtype)
    with guarded(monkeypatch):
        got = loss.linear_cross_entropy_backward(third, gradient)
        gapped = loss.linear_cross_entropy_backward(third, torch.stack((gradient, gradient), -1)[..., 0])
    assert got.dtype == dtype and torch.equal(got, gapped)
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        assert_close(got, want.double())  # Triton's interpreter cuts the digits off
    else:
        assert torch.equal(got, want)
    if dtype != torch.float32 and shape == (3, 4097):
        assert not torch.equal(gradient * third.to(dtype), want)


@pytest.mark.parametrize(
    "name", ["linear_cross_entropy", "linear_cross_entropy_grads", "linear_cross_entropy_backward"]
)
def test_a_launcher_has_its_operators_signature(loss, name):
    schema = getattr(torch.ops.ryzen, name).default._schema
    assert list(inspect.signature(getattr(loss, name)).parameters) == [argument.name for argument in schema.arguments]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h, w, labels: (h[:, 1:], w, labels), UsageError, r"h must be \(N, C\) and w \(V, C\).* got \(4, 4\)"),
        (lambda h, w, labels: (h.half(), w, labels), UsageError, "one floating-point type, got torch.float16"),
        (lambda h, w, labels: (h, w, labels.int()), UsageError, "labels must be .* got .*int32"),
        (lambda h, w, labels: (h.double(), w.double(), labels), UnsupportedError, r"got torch\.float64"),
        (lambda h, w, labels: (h, w.to("meta"), labels), UsageError, f"h is on {DEVICE}.*, w on meta"),
    ],
)
def test_what_does_not_fit_is_refused(loss, change, error, message):
    for name in ("linear_cross_entropy", "linear_cross_entropy_grads"):
        with pytest.raises(error, match=f"{name}: .*{message}"):
            getattr(loss, name)(*change(*problem(4, 5, 9)), IGNORED, 0.0)
        with pytest.raises(UsageError, match=f"{name}: softcap must be at least 0"):
            getattr(loss, name)(*problem(4, 5, 9), IGNORED, -1.0)


def test_backward_refuses_what_does_not_fit(loss):
    gradient = torch.ones(3, device=DEVICE)
    with pytest.raises(UsageError, match=r"grad_loss must be a scalar, got \(3,\)"):
        loss.linear_cross_entropy_backward(gradient, gradient)
    with pytest.raises(UnsupportedError, match=r"got torch\.float64"):
        loss.linear_cross_entropy_backward(gradient[0], gradient.double())


def test_a_compiled_kernel_refuses_a_cpu(loss, monkeypatch):
    monkeypatch.setattr(loss.launch, "interpreted", lambda: False)
    for op in (loss.linear_cross_entropy, loss.linear_cross_entropy_grads):
        with pytest.raises(UnsupportedError, match="runs on a GPU, the tensors are on cpu"):
            op(*(x.cpu() for x in problem(2, 3, 4)), IGNORED, 0.0)
    with pytest.raises(UnsupportedError, match="runs on a GPU, the tensors are on cpu"):
        loss.linear_cross_entropy_backward(torch.tensor(1.0), torch.ones(2))


def test_rows_beyond_int32(loss):
    stride, vocab = (1 << 30) + 16, 20
    if DEVICE == "cpu":
        logits = torch.from_numpy(np.zeros((3, stride), np.float16))  # NumPy's zeros take memory once written to
    else:
        logits = torch.zeros((3, stride), dtype=torch.float16, device=DEVICE)
    logits[2, 3] = 5
    labels, losses = torch.full((3,), 3, device=DEVICE), torch.empty(3, device=DEVICE)
    share = torch.ones((), device=DEVICE)
    loss._cross_entropy_kernel[(3,)](
        logits, labels, losses, share, vocab, stride, IGNORED, 0.0, CAPPED=False, GRADS=True, LANES=8, BLOCK=256
    )
    want = math.log(vocab - 1 + math.exp(5)) - 5
    assert losses.tolist() == pytest.approx([math.log(vocab), math.log(vocab), want])
    assert logits[2, 3].item() == pytest.approx(math.exp(-want) - 1, rel=1e-3)


COMPILE = """
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ryzen_compile.kernels import loss



def code(kernel, types, known, warps):
    names = {name: at for at, name in enumerate(kernel.arg_names)}
    aligned = {(at,): [["tt.divisibility", 16]] for name, at in names.items() if name == "stride" or "*" in types[name]}
    source = ASTSource(fn=kernel, signature=types, constexprs=known, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]


for kind, lanes, capped, grads in (("bf16", 8, False, True), ("fp32", 4, True, True), ("fp16", 8, False, False)):
    known = {"CAPPED": capped, "GRADS": grads, "LANES": lanes, "BLOCK": 4096}
    types = {"logits": f"*{kind}", "labels": "*i64", "losses": "*fp32", "share": "*fp32", "softcap": "fp32"}
    kernel = loss._cross_entropy_kernel
    types = {name: "constexpr" if name in known else types.get(name, "i32") for name in kernel.arg_names}
    got = code(kernel, types, known, 8)
    print([len(re.findall(rf"{way}[.]global[.]{wide}", got)) for way in ("ld", "st") for wide in ("v4[.]b32", "b16")])
types = {"x": "*bf16", "factor": "*fp32", "out": "*bf16", "n": "i32", "BLOCK": "constexpr"}
print("st.global" in code(loss._scale_kernel, types, {"BLOCK": loss.SCALED}, 8))
"""


def test_the_kernels_compile_for_a_gpu_with_wide_loads(tmp_path):
    """For compute capability 9.0, which needs no GPU, and any V: 16 elements of a thread are 2 loads of half precision
    and 4 of float32, for each sweep. The one narrow load is the label's logit."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    child = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert child.stdout.splitlines() == ["[4, 1, 4, 0]", "[8, 0, 8, 0]", "[2, 1, 0, 0]", "True"], child.stderr


@pytest.mark.gpu
def test_a_captured_graph_does_the_same(loss):
    h, w, labels = problem(2050, 64, 4099, torch.bfloat16)
    want = loss.linear_cross_entropy_grads(h, w, labels, IGNORED, 0.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = loss.linear_cross_entropy_grads(h, w, labels, IGNORED, 0.0)
    graph.replay()
    for one, other in zip(got, want, strict=True):
        assert_close(one, other.cpu().double(), LIMITS[torch.bfloat16])


@pytest.mark.gpu
def test_memory_is_a_sixteenth_of_the_logits(loss):
    h, w, labels = problem(16384, 256, 32768, torch.bfloat16)
    loss.linear_cross_entropy_grads(h, w, labels, IGNORED, 0.0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = loss.linear_cross_entropy_grads(h, w, labels, IGNORED, 0.0)
    results = sum(x.numel() * x.element_size() for x in out)
    logits = 2 * 16384 * 32768
    assert torch.cuda.max_memory_allocated() - before - results <= 1.05 * logits / 16
