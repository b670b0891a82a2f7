"""Linear layers with an epilogue against their formulas in float64, and as custom operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.testing import assert_close

from ryzen_compile import ops
from ryzen_compile.numerics.blockwise import BlockFormat, BlockTensor, absmax_grid, quantize

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
