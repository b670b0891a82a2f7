"""Linear layers with an epilogue against their formulas in float64, and as custom operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.testing import assert_close

from ryzen_compile import ops
from ryzen_compile.errors import UsageError
from ryzen_compile.numerics import blockwise, ternary
from ryzen_compile.numerics.blockwise import BlockFormat, BlockTensor, absmax_grid, quantize
from ryzen_compile.ops.linear import linear_ternary

FORMULAS = {
    "none": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
}
SHAPES = [(1, 1, 1), (2, 5, 7), (31,), (3, 127)]


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.einsum("...c,nc->...n", x.double(), weight.double())
    return y if bias is None else y + bias.double()


def matches(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("act", FORMULAS)
@pytest.mark.parametrize("biased", [True, False])
def test_linear_act_is_its_formula(shape: tuple[int, ...], act: str, biased: bool) -> None:
    x, w, b = torch.randn(shape), torch.randn(5, shape[-1]), torch.randn(5) if biased else None
    got = ops.linear_act(x, w, b, act)
    assert got.shape == (*shape[:-1], 5)
    assert_close(got.double(), FORMULAS[act](linear(x, w, b)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("act", FORMULAS)
def test_gated_linear_is_its_formula(shape: tuple[int, ...], act: str) -> None:
    x, gate, up = torch.randn(shape), torch.randn(3, shape[-1]), torch.randn(3, shape[-1])
    got = ops.gated_linear(x, torch.cat((gate, up)), act)
    want = FORMULAS[act](linear(x, gate, None)) * linear(x, up, None)
    assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_the_comparison_sees_a_wrong_linear() -> None:
    x, gate, up, b = torch.randn(2, 5, 7), torch.randn(3, 7), torch.randn(3, 7), torch.randn(3)
    silu = FORMULAS["silu"]
    plain, gated = silu(linear(x, gate, b)), silu(linear(x, gate, None)) * linear(x, up, None)
    assert matches(ops.linear_act(x, gate, b, "silu"), plain)
    assert not matches(ops.linear_act(x, 1.01 * gate, b, "silu"), plain)
    assert not matches(ops.linear_act(x, gate, None, "silu"), plain)
    assert not matches(ops.linear_act(x, gate, b, "gelu"), plain)
    assert matches(ops.gated_linear(x, torch.cat((gate, up)), "silu"), gated)
    assert not matches(ops.gated_linear(x, torch.cat((up, gate)), "silu"), gated)
    interleaved = torch.stack((gate, up), dim=1).flatten(0, 1)
    assert not matches(ops.gated_linear(x, interleaved, "silu"), gated)


def test_an_unknown_activation_lists_the_known_ones() -> None:
    x, w = torch.randn(2, 7), torch.randn(4, 7)
    for call in (lambda: ops.linear_act(x, w, None, "mish"), lambda: ops.gated_linear(x, w, "mish")):
        with pytest.raises(ValueError, match=r"must be one of none, relu, relu2, silu.*, got 'mish'"):
            call()


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 5, 7),
        torch.randn(2, 7, 5).transpose(1, 2),
        torch.randn(2, 1, 7).expand(2, 5, 7),
        torch.randn(2, 5, 14)[..., ::2],
        torch.randn(7),
    ],
    ids=["contiguous", "transposed", "expanded", "strided", "vector"],
)
def test_opcheck(x: Tensor) -> None:
    for weight in (torch.randn(6, 7), torch.randn(7, 6).t()):
        opcheck(ops.linear_act, (x, weight, None, "silu"))
        opcheck(ops.linear_act, (x, weight, torch.randn(6), "none"))
        opcheck(ops.gated_linear, (x, weight, "gelu_tanh"))


def blocks(weight: Tensor, bits: int, block: int, symmetric: bool) -> BlockTensor:
    form = BlockFormat(bits, block, symmetric)
    return quantize(weight, form, *absmax_grid(weight, form))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(1,), (2, 5, 31), (3, 33)], ids=str)
def test_linear_nbits_multiplies_by_the_decoded_weight(bits: int, symmetric: bool, shape: tuple[int, ...]) -> None:
    """60 dB against decoding first and multiplying in float64: the rounding of float32 products, nothing else."""
    x, bias = torch.randn(shape), torch.randn(5)
    t = blocks(torch.randn(5, shape[-1]), bits, 16, symmetric)
    got = ops.linear_nbits(x, t.packed, t.scales, t.zeros, bias, t.format.stored_bits, 16).double()
    want = linear(x, t.dequantize(), bias)
    assert 10 * torch.log10(want.square().sum() / (got - want).square().sum().clamp(min=1e-300)) >= 60


@pytest.mark.parametrize("act", FORMULAS)
def test_gated_activation_is_its_formula(act: str) -> None:
    x = torch.randn(3, 2, 14)
    got = ops.gated_activation(x, act)
    want = FORMULAS[act](x[..., :7].double()) * x[..., 7:].double()
    assert got.shape == (3, 2, 7)
    assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_opcheck_of_the_integer_forms() -> None:
    t = blocks(torch.randn(4, 20), 4, 16, False)
    opcheck(ops.linear_nbits, (torch.randn(2, 3, 20), t.packed, t.scales, t.zeros, torch.randn(4), 4, 16))
    opcheck(ops.linear_nbits, (torch.randn(20), t.packed, t.scales, t.zeros, None, 4, 16))
    opcheck(ops.gated_activation, (torch.randn(2, 3, 8), "silu"))


def wide(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("act", ["none", "relu2", "silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(2, 3, 7), (7,)], ids=str)
def test_gradients(shape: tuple[int, ...], act: str) -> None:
    gradcheck(lambda x, w, b: ops.linear_act(x, w, b, act), (wide(*shape), wide(5, 7), wide(5)))
    gradcheck(lambda x, w: ops.linear_act(x, w, None, act), (wide(*shape), wide(5, 7)))
    gradcheck(lambda x, w: ops.gated_linear(x, w, act), (wide(*shape), wide(6, 7)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_of_the_integer_form(monkeypatch: pytest.MonkeyPatch, symmetric: bool) -> None:
    """Of ``x`` and ``bias``; the weight in several runs of rows, as a head is decoded."""
    monkeypatch.setattr(blockwise, "CHUNK_ELEMENTS", 40)
    t = blocks(torch.randn(5, 20), 4, 16, symmetric)
    for x in (wide(2, 3, 20), wide(20)):
        gradcheck(lambda x, b: ops.linear_nbits(x, t.packed, t.scales, t.zeros, b, 4, 16), (x, wide(5)))
        gradcheck(lambda x: ops.linear_nbits(x, t.packed, t.scales, t.zeros, None, 4, 16), (x,))


def test_only_what_is_asked_for_has_a_gradient() -> None:
    x, w, b = torch.randn(2, 7), torch.randn(4, 7), torch.randn(4)
    t = blocks(w, 4, 16, True)
    for i in range(3):
        given = [tensor.clone().requires_grad_(i == j) for j, tensor in enumerate((x, w, b))]
        ops.linear_act(*given, "silu").sum().backward()
        assert [tensor.grad is not None for tensor in given] == [i == j for j in range(3)]
    bias = b.clone().requires_grad_()
    ops.linear_nbits(x, t.packed, t.scales, None, bias, 4, 16).sum().backward()
    assert torch.equal(bias.grad, torch.full((4,), 2.0))


def test_the_gradient_check_sees_another_activation() -> None:
    x, w = wide(3, 7), wide(5, 7)
    (right,) = torch.autograd.grad(ops.linear_act(x, w, None, "gelu").sum(), x)
    (other,) = torch.autograd.grad(ops.linear_act(x, w, None, "gelu_tanh").sum(), x)
    want = torch.autograd.grad(torch.nn.functional.gelu(x @ w.t()).sum(), x)[0]
    assert torch.allclose(right, want, rtol=1e-9) and not torch.allclose(other, want, rtol=1e-5)


def test_half_precision_is_rounded_once_behind_the_product() -> None:
    x, w = torch.randn(4, 33).bfloat16(), torch.randn(6, 33).bfloat16() / 6
    product = torch.nn.functional.linear(x, w)
    assert torch.equal(ops.linear_act(x, w, None, "silu"), FORMULAS["silu"](product.double()).bfloat16())
    gate, up = product.double().chunk(2, -1)
    assert torch.equal(ops.gated_linear(x, w, "silu"), (FORMULAS["silu"](gate) * up).bfloat16())


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7)], ids=str)
def test_opcheck_of_gradients(shape: tuple[int, ...]) -> None:
    x, weight, bias = (torch.randn(size, requires_grad=True) for size in (shape, (6, 7), (6,)))
    opcheck(ops.linear_act, (x, weight, bias, "silu"))
    opcheck(ops.linear_act, (x, weight, None, "none"))
    opcheck(ops.gated_linear, (x, weight, "gelu"))
    t = blocks(torch.randn(6, 7), 4, 16, False)
    opcheck(ops.linear_nbits, (x, t.packed, t.scales, t.zeros, bias, 4, 16))
    opcheck(torch.ops.ryzen.linear_nbits_backward, (torch.randn(3, 6), t.packed, t.scales, t.zeros, 7, 4, 16))


def ternary_weights(rows: int, width: int) -> Tensor:
    return torch.randint(-1, 2, (rows, width))


@pytest.mark.parametrize("shape", [(1,), (2, 5, 7), (3, 127), (64,)], ids=str)
@pytest.mark.parametrize("scales", [True, False])
def test_linear_ternary_is_the_product_of_rounded_rows(shape: tuple[int, ...], scales: bool) -> None:
    x, weights = torch.randn(shape), ternary_weights(5, shape[-1])
    scale = torch.randn(5) if scales else torch.tensor(-0.3)
    got = linear_ternary(x, ternary.pack(weights), scale)
    step = x.abs().amax(-1, keepdim=True) / torch.tensor(127.0)
    codes = (x.double() / x.double().abs().amax(-1, keepdim=True) * 127).round()
    assert got.shape == (*shape[:-1], 5) and got.dtype == torch.float32
    assert_close(got.double(), codes @ weights.double().t() * step * scale, rtol=3 * 2.0**-24, atol=0.0)
    error = (linear(x, weights, None) * scale - got).abs()
    assert (error <= 0.51 * step * weights.abs().sum(-1) * scale.abs()).all()


def test_ternary_rows_that_cannot_be_rounded() -> None:
    x = torch.ones(4, 10)
    x[0, 3], x[1, 9], x[2] = torch.nan, torch.inf, 1e-37
    got = linear_ternary(x, ternary.pack(torch.ones(3, 10)), torch.tensor(2.0))
    assert got.isnan().all(1).tolist() == [True, True, False, False]
    assert not got[2].any() and torch.equal(got[3], torch.full((3,), 20.0))


def test_ternary_codes() -> None:
    weights = torch.tensor([[-1, 0, 1, 1, 1], [0, 0, -1, -1, 0]])
    packed = ternary.pack(weights)
    assert packed.tolist() == [[0b10100100, 0b10], [0b00000101, 0b01]]
    assert torch.equal(ternary.unpack(packed, 5), weights.to(torch.int8))
    assert torch.equal(ternary.unpack(packed | torch.tensor([0, 0xFC], dtype=torch.uint8), 5), weights.to(torch.int8))
    for wrong, message in (
        (weights * 2, "must be -1, 0 or 1, got 6 others of 10"),
        (weights[0], r"matrix, got \(5,\)"),
    ):
        with pytest.raises(UsageError, match=message):
            ternary.pack(wrong)
    with pytest.raises(UsageError, match="codes must be 0, 1 or 2, got 3 at 1 of 10 places"):
        linear_ternary(torch.ones(5), packed | torch.tensor([0, 2], dtype=torch.uint8), torch.ones(2))


def test_opcheck_of_the_ternary_form() -> None:
    packed = ternary.pack(ternary_weights(6, 21))
    for x in (torch.randn(2, 3, 21), torch.randn(21), torch.randn(2, 21, dtype=torch.bfloat16)):
        opcheck(linear_ternary, (x, packed, torch.randn(6)))
        opcheck(linear_ternary, (x, packed, torch.tensor(0.5)))
    assert linear_ternary(torch.randn(2, 21).double(), packed, torch.randn(6)).dtype == torch.float64
