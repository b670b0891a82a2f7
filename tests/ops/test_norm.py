"""The norms against their formulas in float64, and as custom operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.testing import assert_close

from ryzen_compile import ops
from ryzen_compile.ops.norm import layer_norm_backward, rms_norm_backward

EPS = 1e-5
SHAPES = [(1, 1, 1), (2, 5, 7), (3, 127), (1023,)]


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


def layouts() -> dict[str, Tensor]:
    """(2, 5, 8) in every kind of memory that a transpose, a slice or a broadcast leaves behind."""
    return {
        "contiguous": torch.randn(2, 5, 8),
        "transposed": torch.randn(2, 8, 5).transpose(1, 2),
        "strided": torch.randn(2, 5, 16)[..., ::2],
        "expanded": torch.randn(2, 1, 8).expand(2, 5, 8),
    }


def rms(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool = False) -> Tensor:
    x = x.double()
    root = ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()
    scale = 1.0 if weight is None else weight.double() + (1.0 if unit_offset else 0.0)
    return x / root * scale


def layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    x = x.double()
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    y = centred / ((centred * centred).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()
    return y * (1.0 if weight is None else weight.double()) + (0.0 if bias is None else bias.double())


def matches(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm_is_its_formula(shape: tuple[int, ...], unit_offset: bool) -> None:
    x, w = torch.randn(shape) * 3 + 1, torch.randn(shape[-1])
    assert_close(ops.rms_norm(x, w, EPS, unit_offset).double(), rms(x, w, EPS, unit_offset), rtol=1e-5, atol=1e-6)
    assert_close(ops.rms_norm(x, None, EPS, unit_offset).double(), rms(x, None, EPS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("weighted", "biased"), [(True, True), (True, False), (False, True), (False, False)])
def test_layer_norm_is_its_formula(shape: tuple[int, ...], weighted: bool, biased: bool) -> None:
    x = torch.randn(shape) * 3 + 1
    w, b = (torch.randn(shape[-1]) if given else None for given in (weighted, biased))
    assert_close(ops.layer_norm(x, w, b, EPS).double(), layer(x, w, b, EPS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", layouts())
def test_add_norms_return_the_norm_of_the_sum_and_the_sum(memory: str) -> None:
    x, w, b = layouts()[memory], torch.randn(8), torch.randn(8)
    r = torch.randn(x.shape)
    total = x.double() + r.double()
    for got, want in (
        (ops.add_rms_norm(x, r, w, EPS, True), rms(total, w, EPS, True)),
        (ops.add_layer_norm(x, r, w, b, EPS), layer(total, w, b, EPS)),
    ):
        assert_close(got[0].double(), want, rtol=1e-5, atol=1e-5)
        assert_close(got[1].double(), total, rtol=1e-6, atol=1e-6)


def test_half_precision_is_rounded_once() -> None:
    x, w = torch.randn(3, 127).bfloat16(), torch.randn(127).bfloat16()
    want = rms(x, w, EPS, True)
    assert_close(ops.rms_norm(x, w, EPS, True).double(), want, rtol=2**-8, atol=1e-6)  # half a bfloat16 step, no more
    rounded_twice = (rms(x, None, EPS).bfloat16() * (1 + w)).double()
    assert not torch.allclose(rounded_twice, want, rtol=2**-8, atol=1e-6)


CONTROLS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "scale off by 1 %": lambda x, w: (ops.rms_norm(x, 1.01 * w, EPS, False), rms(x, w, EPS)),
    "offset forgotten": lambda x, w: (ops.rms_norm(x, w, EPS, False), rms(x, w, EPS, True)),
    "larger eps": lambda x, w: (ops.rms_norm(x, w, 0.1, False), rms(x, w, EPS)),
    "not centred": lambda x, w: (ops.layer_norm(x, w, None, EPS), rms(x, w, EPS)),
    "bias forgotten": lambda x, w: (ops.layer_norm(x, w, None, EPS), layer(x, w, w, EPS)),
    "unbiased variance": lambda x, w: (ops.layer_norm(x, w, None, EPS) * (6 / 7) ** 0.5, layer(x, w, None, EPS)),
    "sum of another": lambda x, w: (ops.add_rms_norm(x, w.expand_as(x), w, EPS, False)[1], x.double()),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_the_comparison_sees_a_wrong_norm(control: str) -> None:
    x, w = torch.randn(2, 5, 7) + 1, torch.randn(7)
    assert matches(ops.rms_norm(x, w, EPS, False), rms(x, w, EPS))
    got, want = CONTROLS[control](x, w)
    assert not matches(got, want)


@pytest.mark.parametrize("memory", layouts())
def test_opcheck(memory: str) -> None:
    x, w, b = layouts()[memory], torch.randn(8), torch.randn(8)
    r = x.clone()
    opcheck(ops.rms_norm, (x, w, EPS, True))
    opcheck(ops.rms_norm, (x, None, EPS, False))
    opcheck(ops.layer_norm, (x, w, b, EPS))
    opcheck(ops.layer_norm, (x, None, None, EPS))
    opcheck(ops.add_rms_norm, (x, r, w, EPS, False))
    opcheck(ops.add_rms_norm, (x, r, None, EPS, True))
    opcheck(ops.add_layer_norm, (x, r, w, b, EPS))
    opcheck(ops.add_layer_norm, (x, r, None, None, EPS))


def random64(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 7), (5,)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_are_those_of_small_steps(shape: tuple[int, ...], affine: bool) -> None:
    x, r = random64(*shape), random64(*shape)
    w, b = (random64(shape[-1]), random64(shape[-1])) if affine else (None, None)
    eps = 0.3  # or a row of one element is 1 whatever it was
    for offset in (True, False):
        assert gradcheck(lambda x, w, offset=offset: ops.rms_norm(x, w, eps, offset), (x, w))
        assert gradcheck(lambda x, r, w, offset=offset: ops.add_rms_norm(x, r, w, eps, offset), (x, r, w))
    assert gradcheck(lambda x, w, b: ops.layer_norm(x, w, b, eps), (x, w, b))
    assert gradcheck(lambda x, r, w, b: ops.add_layer_norm(x, r, w, b, eps), (x, r, w, b))


def test_a_bias_alone_and_a_weight_alone_have_gradients() -> None:
    x, p = random64(3, 7), random64(7)
    assert gradcheck(lambda x, b: ops.layer_norm(x, None, b, EPS), (x, p))
    assert gradcheck(lambda x, w: ops.layer_norm(x, w, None, EPS), (x, p))


ADDING: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "rms": lambda x, r, w: ops.add_rms_norm(x, r, w, EPS, False),
    "layer": lambda x, r, w: ops.add_layer_norm(x, r, w, w, EPS),
}


@pytest.mark.parametrize("kind", ADDING)
@pytest.mark.parametrize("read", [(0,), (1,), (0, 1)], ids=str)
def test_outputs_that_nothing_reads_have_no_part_in_gradients(kind: str, read: tuple[int, ...]) -> None:
    x, r, w = random64(2, 7), random64(2, 7), random64(7)
    factors = torch.randn(2, 2, 7, dtype=torch.float64)
    (sum(ADDING[kind](x, r, w)[i] * factors[i] for i in read)).sum().backward()  # type: ignore[union-attr]
    got = (x.grad, r.grad, w.grad)
    x.grad = r.grad = w.grad = None
    total = x + r
    normed = rms(total, w, EPS) if kind == "rms" else layer(total, w, w, EPS)
    (sum((normed, total)[i] * factors[i] for i in read)).sum().backward()  # type: ignore[union-attr]
    for ours, theirs in zip(got, (x.grad, r.grad, w.grad), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_gradients_in_half_precision_are_rounded_once() -> None:
    g, x, w, e = (torch.randn(3, 127).bfloat16() for _ in range(4))
    for got, want in zip(
        layer_norm_backward(g, x, w[0], True, e, EPS),
        layer_norm_backward(g.double(), x.double(), w[0].double(), True, e.double(), EPS),
        strict=True,
    ):
        assert got.dtype == torch.bfloat16
        assert_close(got.double(), want, rtol=2**-8, atol=1e-6)
    got = rms_norm_backward(g, x, w[0], e, EPS, True)[0]
    twice = rms_norm_backward(g, x, w[0], None, EPS, True)[0] + e
    want = rms_norm_backward(g.double(), x.double(), w[0].double(), e.double(), EPS, True)[0]
    assert_close(got.double(), want, rtol=2**-8, atol=1e-6)
    assert not torch.allclose(twice.double(), want, rtol=2**-8, atol=1e-6)


def test_gradients_of_parameters_have_their_type() -> None:
    x, w, b = torch.randn(3, 7).bfloat16().requires_grad_(), torch.randn(7, requires_grad=True), torch.randn(7).half()
    ops.layer_norm(x, w, b.requires_grad_(), EPS).sum().backward()
    assert [t.grad.dtype for t in (x, w, b) if t.grad is not None] == [torch.bfloat16, torch.float32, torch.float16]


@pytest.mark.parametrize("memory", layouts())
def test_opcheck_of_gradients(memory: str) -> None:
    x, w, b = layouts()[memory].requires_grad_(), torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    g, e = torch.randn(2, 5, 8), torch.randn(2, 8, 5).transpose(1, 2)
    opcheck(ops.rms_norm, (x, w, EPS, True))
    opcheck(ops.layer_norm, (x, None, b, EPS))
    opcheck(ops.add_rms_norm, (x, g, w, EPS, False))
    opcheck(ops.add_layer_norm, (g, x, w, b, EPS))
    x = x.detach()
    opcheck(rms_norm_backward, (g, x, w.detach(), e, EPS, False))
    opcheck(rms_norm_backward, (g, x, None, None, EPS, True))
    opcheck(layer_norm_backward, (g, x, w.detach().half(), True, e, EPS))
    opcheck(layer_norm_backward, (e, x, None, True, None, EPS))
    opcheck(layer_norm_backward, (e, x, None, False, None, EPS))
