"""The gradients of attention against autograd through its formula, against differences, and as custom operators."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.testing import assert_close

from ryzen_compile import ops
from ryzen_compile.ops.attention_backward import attention_backward


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True)
class Options:
    scale: float = 0.4
    window: int = 0
    softcap: float = 0.0
    causal: bool = True
    sinks: bool = False
    shift: int = 0  # of the mask: for controls

    @property
    def form(self) -> tuple[float, int, float, bool]:
        return self.scale, self.window, self.softcap, self.causal


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, o: Options) -> Tensor:
    """(B, H, T, D) -> (B, T, H, D'), by operations that autograd knows."""
    heads, kv_heads, tokens = q.shape[1], k.shape[1], q.shape[2]
    of = torch.arange(heads) // (heads // kv_heads)
    scores = o.scale * torch.einsum("bhtd,bhsd->bhts", q, k[:, of])
    if o.softcap:
        scores = o.softcap * torch.tanh(scores / o.softcap)
    behind = torch.arange(tokens)[:, None] + o.shift - torch.arange(tokens)  # of a key, behind a query
    hidden = (behind < 0) if o.causal else torch.zeros_like(behind, dtype=torch.bool)
    if o.window:
        hidden = hidden | (behind.abs() >= o.window)
    powers = scores.masked_fill(hidden, float("-inf")).exp()
    total = powers.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp().view(1, -1, 1, 1))
    return torch.einsum("bhts,bhsd->bthd", powers / total, v[:, of])


def tensors(o: Options, tokens: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    q, k, v = torch.randn(2, 4, tokens, 6), torch.randn(2, 2, tokens, 6), torch.randn(2, 2, tokens, 3)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)] + [
        torch.randn(4, dtype=dtype).requires_grad_() if o.sinks else None
    ]


def there(inputs: list[Tensor | None]) -> list[Tensor]:
    return [x for x in inputs if x is not None]


FORMS = {
    "plain": Options(),
    "window 1": Options(window=1),
    "window 3": Options(window=3),
    "window to both sides": Options(window=3, causal=False),
    "all keys": Options(causal=False),
    "softcap": Options(softcap=0.8),
    "softcap below 0": Options(softcap=-0.8),
    "sinks": Options(sinks=True),
    "scale below 0": Options(scale=-0.4),
    "everything": Options(window=3, softcap=0.8, sinks=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_formula(form: str) -> None:
    o = FORMS[form]
    inputs = tensors(o)
    out = ops.attention(*inputs, *o.form)
    want = attend(*inputs, o)
    assert_close(out, want, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, there(inputs), grad)
    assert_close(got, torch.autograd.grad(want, there(inputs), grad), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["plain", "window to both sides", "everything"])
def test_gradients_are_quotients_of_differences(form: str) -> None:
    o = FORMS[form]
    inputs = tensors(o, tokens=4)
    assert torch.autograd.gradcheck(lambda *x: ops.attention(*x, *([] if o.sinks else [None]), *o.form), there(inputs))


@pytest.mark.parametrize("form", ["all keys", "window to both sides", "everything"])
def test_gradients_pass_padding_by(form: str) -> None:
    """A query that sees nothing (padding in a window of padding) gives no gradient, and no NaN."""
    o = FORMS[form]
    inputs = tensors(o, tokens=6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])

    def attention(*x: Tensor) -> Tensor:
        return ops.attention(*x, *([] if o.sinks else [None]), *o.form, mask)

    assert torch.autograd.gradcheck(attention, there(inputs))
    out = attention(*there(inputs))
    dk, dv = torch.autograd.grad(out.sum(), inputs[1:3])
    assert not dk[0, :, 3:].any() and not dv[0, :, 3:].any() and dv[0, :, :3].all() and dv[1].all()
    if not o.causal:
        alone = ops.attention(*(x[:1, :, :3] for x in inputs[:3]), None, *o.form)
        assert_close(out[:1, :3], alone, rtol=1e-12, atol=1e-12)


CONTROLS = {
    "mask shifted by one": Options(window=3, sinks=True, shift=1),
    "window one too long": Options(window=4, sinks=True),
    "scale off by 1 %": Options(scale=0.404, window=3, sinks=True),
    "no sinks": Options(window=3),
    "soft cap": Options(window=3, softcap=5.0, sinks=True),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_the_comparison_sees_wrong_gradients(control: str) -> None:
    o, wrong = Options(window=3, sinks=True), CONTROLS[control]
    *inputs, sinks = tensors(o)
    out = ops.attention(*inputs, sinks, *o.form)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, grad)
    other = torch.autograd.grad(attend(*inputs, sinks if wrong.sinks else None, wrong), inputs, grad)
    assert not any(torch.allclose(x, y, rtol=1e-3, atol=1e-3) for x, y in zip(got, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    o = FORMS["everything"]
    q, k, v, sinks = (x.detach() for x in there(tensors(o, dtype=dtype)))
    out = ops.attention(q, k, v, sinks, *o.form)
    grad = torch.randn_like(out)
    got = attention_backward(grad, q, k, v, out, sinks, *o.form)
    exact = attention_backward(*(x.float() for x in (grad, q, k, v, out, sinks)), *o.form)
    assert [x.dtype for x in got] == [dtype] * 4
    for x, y in zip(got, exact, strict=True):
        assert torch.equal(x, y.to(dtype))


def test_without_sinks_there_is_no_gradient_of_them() -> None:
    q, k, v = (x.detach() for x in there(tensors(Options())))
    out = ops.attention(q, k, v, None, *Options().form)
    gradients = attention_backward(out, q, k, v, out, None, *Options().form)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape, (0,)]


@pytest.mark.parametrize("wanted", ["q", "k", "v", "sinks"])
def test_one_gradient_at_a_time(wanted: str) -> None:
    o = FORMS["everything"]
    named = dict(zip(("q", "k", "v", "sinks"), tensors(o), strict=True))
    all_of_them = torch.autograd.grad(ops.attention(*named.values(), *o.form).sum(), list(named.values()))
    named = {name: x.detach().requires_grad_(name == wanted) for name, x in named.items()}
    alone = torch.autograd.grad(ops.attention(*named.values(), *o.form).sum(), named[wanted])
    assert_close(alone[0], dict(zip(named, all_of_them, strict=True))[wanted], rtol=0, atol=0)


@pytest.mark.parametrize("form", ["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_a_custom_operator(form: str, dtype: torch.dtype) -> None:
    o = replace(FORMS[form])
    q, k, v, sinks = (None if x is None else x.detach() for x in tensors(o, dtype=dtype))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    grad = torch.randn(1, 1, 1, 1, dtype=dtype).expand(2, 7, 4, 3)
    opcheck(attention_backward, (grad, q, k, v, ops.attention(q, k, v, sinks, *o.form), sinks, *o.form))


@pytest.mark.parametrize("form", ["plain", "everything"])
def test_attention_as_a_custom_operator_with_gradients(form: str) -> None:
    o = FORMS[form]
    opcheck(ops.attention, (*tensors(o, dtype=torch.float32), *o.form))
