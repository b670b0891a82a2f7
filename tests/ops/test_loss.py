"""Cross-entropy without logits against torch's own on all logits, in float64, and as custom operators."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.nn import functional
from torch.testing import assert_close

from ryzen_compile.errors import UsageError
from ryzen_compile.ops import loss

N, C, V = 7, 5, 11
IGNORED = -100


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


def inputs(n: int = N, c: int = C, v: int = V, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """``h``, ``w`` and labels, the second of which is ignored."""
    labels = torch.randint(v, (n,))
    labels[1:2] = IGNORED
    return torch.randn(n, c).to(dtype), torch.randn(v, c).to(dtype), labels


def torchs(h: Tensor, w: Tensor, labels: Tensor, softcap: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients in float64, by autograd through all logits."""
    h, w = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    logits = h @ w.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    value = functional.cross_entropy(logits, labels, ignore_index=IGNORED)
    return value.detach(), *torch.autograd.grad(value, (h, w))


def close(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.allclose(one, other, rtol=1e-12, atol=1e-14) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("rows", [1, 3, 64], ids=lambda rows: f"{rows}-rows-at-once")
@pytest.mark.parametrize("shape", [(2, 1, 1), (N, C, V), (17, 3, 127)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_it_is_torchs_cross_entropy(monkeypatch, rows, shape, softcap):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", rows * shape[2] + shape[2] // 2)
    h, w, labels = inputs(*shape)
    want = torchs(h, w, labels, softcap)
    assert close(loss.linear_cross_entropy_grads(h, w, labels, IGNORED, softcap), want)
    assert close((loss.linear_cross_entropy(h, w, labels, IGNORED, softcap),), want[:1])


CONTROLS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "labels shifted": lambda h, w, labels: (h, w, torch.where(labels >= 0, (labels + 1) % V, labels)),
    "one more ignored": lambda h, w, labels: (h, w, torch.cat((labels[:-1], labels[1:2]))),
    "rows in another order": lambda h, w, labels: (h.flip(0), w, labels),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_the_comparison_sees_another_problem(control):
    problem = inputs()
    for got, want in zip(
        loss.linear_cross_entropy_grads(*CONTROLS[control](*problem), IGNORED, 0.0), torchs(*problem), strict=True
    ):
        assert not close((got,), (want,))


def test_the_comparison_sees_a_soft_cap():
    problem = inputs()
    for got, want in zip(
        loss.linear_cross_entropy_grads(*problem, IGNORED, 2.0), torchs(*problem, softcap=2.1), strict=True
    ):
        assert not close((got,), (want,))


def test_no_more_logits_than_a_chunk_exist_at_once(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 3 * V + 1)
    h, w, labels = inputs()
    chunks = list(loss._chunks(h, w, labels, 0.0))
    assert [tuple(chunk.scores.shape) for chunk in chunks] == [(3, V), (3, V), (1, V)]
    assert torch.equal(torch.cat([chunk.labels for chunk in chunks]), labels)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradcheck(monkeypatch, softcap):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 3 * V)
    h, w, labels = inputs()
    run = lambda h, w: loss.cross_entropy(h, w, labels, softcap=softcap)
    assert gradcheck(run, (h.requires_grad_(), w.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    h, w, labels = inputs(dtype=dtype)
    gapped = torch.stack((h, h), -1)[..., 0]
    opcheck(loss.linear_cross_entropy, (h, w, labels, IGNORED, 0.0))
    opcheck(loss.linear_cross_entropy, (gapped, w, labels, IGNORED, 2.0))
    opcheck(loss.linear_cross_entropy_grads, (gapped, w, labels, IGNORED, 2.0))
    for grads in (True, False), (False, True), (True, True):
        wanted = tuple(x.detach().clone().requires_grad_(grad) for x, grad in zip((h, w), grads, strict=True))
        opcheck(loss.linear_cross_entropy_grads, (*wanted, labels, IGNORED, 0.0))
    opcheck(loss.linear_cross_entropy_backward, (torch.tensor(3.0), gapped))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_cross_entropy_takes_leading_dimensions(shape, trained):
    h, w, _ = inputs()
    h = torch.randn(*shape, C, dtype=torch.float64).requires_grad_(trained)
    labels = torch.randint(V, shape)
    got = loss.cross_entropy(h, w, labels)
    rows = h.detach().reshape(-1, C)
    want, by_h, _ = torchs(rows, w, labels.reshape(-1)) if len(rows) else (torch.zeros_like(got), rows, w)
    assert got.shape == () and got.requires_grad == trained
    assert_close(got.detach(), want, rtol=1e-12, atol=1e-14)
    if trained:
        got.backward()
        assert h.grad is not None
        assert_close(h.grad, by_h.reshape(h.shape), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("enabled", "trained", "grads"),
    [(True, "h", True), (True, "w", True), (True, "", False), (False, "h", False)],
)
def test_gradients_are_computed_only_where_they_are_wanted(monkeypatch, enabled, trained, grads):
    called = []
    for name in ("linear_cross_entropy", "linear_cross_entropy_grads"):
        op = getattr(loss, name)
        monkeypatch.setattr(loss, name, lambda *args, op=op, name=name: called.append(name) or op(*args))
    h, w, labels = inputs()
    with torch.set_grad_enabled(enabled):
        loss.cross_entropy(h.requires_grad_(trained == "h"), w.requires_grad_(trained == "w"), labels)
    assert called == ["linear_cross_entropy_grads" if grads else "linear_cross_entropy"]


def test_the_loss_alone_is_differentiable():
    h, w, labels = inputs()
    out = loss.linear_cross_entropy_grads(h.requires_grad_(), w, labels, IGNORED, 0.0)
    assert [x.requires_grad for x in out] == [True, False, False]
    (2 * out[0]).backward()
    assert_close(h.grad, 2 * torchs(h, w, labels)[1], rtol=1e-12, atol=1e-14)
    assert w.grad is None  # frozen


def test_the_form_without_gradients_has_no_backward():
    h, w, labels = inputs()
    out = loss.linear_cross_entropy(h.requires_grad_(), w, labels, IGNORED, 0.0)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        out.backward()


@pytest.mark.parametrize("n", [0, 2])
def test_nothing_counted_gives_zero(n):
    h, w, _ = inputs(n)
    out = loss.linear_cross_entropy_grads(h, w, torch.full((n,), 3), 3, 0.0)
    assert [int(x.count_nonzero()) for x in out] == [0, 0, 0]
    assert out[2].shape == w.shape
    assert loss.linear_cross_entropy(h, w, torch.full((n,), 3), 3, 0.0) == 0


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_an_ignored_row_has_no_gradient_whatever_is_in_it(softcap):
    h, w, labels = inputs()
    want = loss.linear_cross_entropy_grads(h, w, labels, IGNORED, softcap)
    h[1] = math.nan
    got = loss.linear_cross_entropy_grads(h, w, labels, IGNORED, softcap)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert not got[1][1].any()


def test_nan_stays_in_its_row():
    h, w, labels = inputs()
    want = torchs(h, w, labels)[1]
    h[3, 0] = math.nan
    value, by_h, by_w = loss.linear_cross_entropy_grads(h, w, labels, IGNORED, 0.0)
    assert value.isnan() and by_w.isnan().all() and by_h[3].isnan().all()
    others = torch.arange(N) != 3
    assert_close(by_h[others], want[others], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_are_rounded_once(dtype):
    h, w, labels = inputs(dtype=dtype)
    want = torchs(h, w, labels)
    out = loss.linear_cross_entropy_grads(h, w, labels, IGNORED, 0.0)
    assert [x.dtype for x in out] == [torch.float32, dtype, dtype]
    assert loss.linear_cross_entropy(h, w, labels, IGNORED, 0.0).dtype == torch.float32
    assert_close(out[0].double(), want[0], rtol=1e-6, atol=0)
    for got, exact in zip(out[1:], want[1:], strict=True):
        half_a_step = torch.finfo(dtype).eps / 2 + 2e-6  # and what float32 adds
        assert_close(got.double(), exact, rtol=half_a_step, atol=1e-6)


def test_the_factor_is_not_rounded_to_the_gradients_type():
    gradient, third = torch.randn(64).bfloat16(), torch.tensor(1 / 3)
    got = loss.linear_cross_entropy_backward(third, gradient)
    assert torch.equal(got, (gradient.double() / 3).bfloat16())
    assert not torch.equal(gradient * third.bfloat16(), got)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, labels: (h[0], w, labels), r"h must be \(N, C\) and w \(V, C\), V at least 1, got \(5,\) and"),
        (lambda h, w, labels: (h[:, 1:], w, labels), r"got \(7, 4\) and \(11, 5\)"),
        (lambda h, w, labels: (h, w[:0], labels), r"V at least 1, got \(7, 5\) and \(0, 5\)"),
        (
            lambda h, w, labels: (h.float(), w, labels),
            r"one floating-point type, got torch\.float32 and torch\.float64",
        ),
        (
            lambda h, w, labels: (h.int(), w.int(), labels),
            r"one floating-point type, got torch\.int32 and torch\.int32",
        ),
        (lambda h, w, labels: (h, w, labels[1:]), r"labels must be \(7,\) torch\.int64, got \(6,\) torch\.int64"),
        (lambda h, w, labels: (h, w, labels.int()), r"labels must be \(7,\) torch\.int64, got \(7,\) torch\.int32"),
        (lambda h, w, labels: (h, w, labels.fill_(V)), r"labels must be in 0\.\.10 or -100, got 11"),
        (lambda h, w, labels: (h, w, labels.fill_(-1)), r"labels must be in 0\.\.10 or -100, got -1"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    for name in ("linear_cross_entropy", "linear_cross_entropy_grads"):
        with pytest.raises(UsageError, match=f"^{name}: .*{message}"):
            getattr(loss, name)(*change(*inputs()), IGNORED, 0.0)


@pytest.mark.parametrize("softcap", [-1.0, math.inf, math.nan])
def test_a_soft_cap_is_finite_and_not_negative(softcap):
    with pytest.raises(UsageError, match=f"softcap must be at least 0 and finite, got {softcap}"):
        loss.cross_entropy(*inputs(), softcap=softcap)


def test_labels_have_the_leading_dimensions():
    h, w, labels = inputs()
    with pytest.raises(UsageError, match=r"labels must be \(7,\), got \(7, 1\)"):
        loss.cross_entropy(h, w, labels[:, None])


def test_a_label_out_of_range_that_is_not_looked_at_gives_nan(monkeypatch):
    """As on a GPU, where looking would mean waiting."""
    monkeypatch.setattr(loss, "_expect_labels", lambda *_: None)
    h, w, labels = inputs()
    labels[0], labels[4] = V, -1
    value, by_h, by_w = loss.linear_cross_entropy_grads(h, w, labels, IGNORED, 2.0)
    assert value.isnan() and by_w.isnan().all()
    assert by_h.isnan().all(1).nonzero().flatten().tolist() == [0, 4]
    assert loss.linear_cross_entropy(h, w, labels, IGNORED, 0.0).isnan()
