"""The loss from hidden states, against what autograd makes of the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ryzen_compile.errors import UsageError
from ryzen_compile.train import token_loss as module
from ryzen_compile.train.token_loss import Teaching, token_loss

ROWS, WIDTH, VOCAB, TAUGHT_WIDTH = 37, 19, 53, 11
CHUNK_ROWS = 8  # five chunks of 37 rows, the last one of five rows


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", CHUNK_ROWS * VOCAB + 7)


def inputs(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a head whose logits reach about ±10, and labels; leaves that want gradients."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, WIDTH, generator=g).to(dtype).requires_grad_()
    head = torch.randn(VOCAB, WIDTH, generator=g).to(dtype).requires_grad_()
    return hidden, head, torch.randint(VOCAB, (rows,), generator=g)


def teaching(weight: float = 0.5, heat: float = 1.0, dtype: torch.dtype = torch.float32, rows: int = ROWS) -> Teaching:
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(rows, TAUGHT_WIDTH, generator=g).to(dtype)
    return Teaching(hidden, torch.randn(VOCAB, TAUGHT_WIDTH, generator=g), weight, heat)


def reference(hidden: Tensor, head: Tensor, labels: Tensor, taught: Teaching | None) -> dict[str, Tensor]:
    """The formula of the module, by autograd in float64."""
    hidden, head = (t.detach().double().requires_grad_() for t in (hidden, head))
    logits = hidden @ head.t()
    text = functional.cross_entropy(logits, labels)
    guess = logits.argmax(-1)
    loss, agreed = text, torch.zeros(())
    if taught is not None:
        scores = taught.hidden.double() @ taught.head.double().t()
        theirs = (scores / taught.temperature).softmax(-1)
        ours = (logits / taught.temperature).log_softmax(-1)
        divergence = (theirs * (theirs.log() - ours)).sum(-1).mean()
        loss = (1 - taught.weight) * text + taught.weight * taught.temperature**2 * divergence
        agreed = (guess == scores.argmax(-1)).sum()
    loss.backward()
    return {"loss": loss.detach(), "text": text.detach(), "correct": (guess == labels).sum(), "agreed": agreed,
            "hidden": hidden.grad, "head": head.grad}  # fmt: skip


def nmse(found: Tensor | None, expected: Tensor) -> float:
    assert found is not None
    return float((found.double() - expected).square().sum() / expected.square().sum())


def agrees(found: Any, wanted: dict[str, Tensor], leaves: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Losses to the tolerance's root, gradients to ``tolerance`` in normalised squared error, counts exactly."""
    assert found.loss.item() == pytest.approx(float(wanted["loss"]), rel=tolerance**0.5)
    assert found.text.item() == pytest.approx(float(wanted["text"]), rel=tolerance**0.5)
    assert int(found.correct) == int(wanted["correct"]) and int(found.agreed) == int(wanted["agreed"])
    found.loss.backward()
    for leaf, name in zip(leaves, ("hidden", "head"), strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        assert nmse(leaf.grad, wanted[name]) < tolerance


@pytest.mark.parametrize("rows", [1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS, ROWS])
def test_the_text_alone(rows: int) -> None:
    hidden, head, labels = inputs(rows=rows)
    agrees(token_loss(hidden, head, labels), reference(hidden, head, labels, None), (hidden, head), 1e-10)


@pytest.mark.parametrize("heat", [0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9, 1.0])
def test_with_a_teacher(weight: float, heat: float) -> None:
    hidden, head, labels = inputs()
    taught = teaching(weight, heat)
    agrees(token_loss(hidden, head, labels, taught), reference(hidden, head, labels, taught), (hidden, head), 1e-10)


def test_a_vocabulary_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", VOCAB - 1)
    hidden, head, labels = inputs()
    agrees(token_loss(hidden, head, labels, teaching()), reference(hidden, head, labels, teaching()),
           (hidden, head), 1e-10)  # fmt: skip


def test_chunks_do_not_decide_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for logits in (VOCAB, 5 * VOCAB, 1 << 20):
        monkeypatch.setattr(module, "CHUNK_LOGITS", logits)
        found.append(token_loss(*inputs(), teaching()))
    for each in found[1:]:
        assert each.loss.item() == pytest.approx(found[0].loss.item(), rel=1e-6)
        assert each.correct == found[0].correct and each.agreed == found[0].agreed


@pytest.mark.parametrize("taught", [None, 0.4], ids=["text", "teacher"])
def test_bfloat16(taught: float | None) -> None:
    """Logits and gradients by logits are rounded to 8 bits: losses to 1 %, gradients to 1e-4."""
    hidden, head, labels = inputs(torch.bfloat16)
    lesson = None if taught is None else teaching(taught, 2.0, torch.bfloat16)
    wanted = reference(hidden, head, labels, lesson)
    found = token_loss(hidden, head, labels, lesson)
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(float(wanted["loss"]), rel=1e-2)
    found.loss.backward()
    assert nmse(hidden.grad, wanted["hidden"]) < 1e-4 and nmse(head.grad, wanted["head"]) < 1e-4


def test_a_head_in_float32_gets_its_gradient_in_float32() -> None:
    """Master weights under autocast: the product runs in bfloat16, the gradient keeps what its sums hold."""
    hidden, head, labels = inputs()
    half = hidden.detach().bfloat16().requires_grad_()
    token_loss(half, head, labels).loss.backward()
    assert head.grad is not None and head.grad.dtype == torch.float32 and half.grad is not None
    assert not torch.equal(head.grad, head.grad.bfloat16().float())
    assert nmse(head.grad, reference(half, head, labels, None)["head"]) < 1e-4


def test_float16_with_a_scaled_loss() -> None:
    """A loss scaled by 65536, which float16 has no number for, over so many tokens that each one's mean gradient would
    vanish in it: the gradients are those of float64 times the scale, to 1e-4."""
    hidden, head, labels = inputs(rows=2048)
    half = (hidden.detach() / 8).half().requires_grad_()
    token_loss(half, head, labels).loss.mul(65536.0).backward()
    wanted = reference(half, head, labels, None)
    assert half.grad is not None and half.grad.isfinite().all()
    assert nmse(half.grad, 65536 * wanted["hidden"]) < 1e-4 and nmse(head.grad, 65536 * wanted["head"]) < 1e-4


@pytest.mark.parametrize("still", ["hidden", "head", "both"])
def test_what_wants_no_gradient_gets_none(still: str) -> None:
    hidden, head, labels = inputs()
    hidden.requires_grad_(still == "head")
    head.requires_grad_(still == "hidden")
    found = token_loss(hidden, head, labels, teaching())
    wanted = reference(hidden, head, labels, teaching())
    assert found.loss.item() == pytest.approx(float(wanted["loss"]), rel=1e-5)
    assert found.loss.requires_grad == (still != "both")
    if still == "both":
        return
    found.loss.backward()
    moved, kept = (head, hidden) if still == "hidden" else (hidden, head)
    assert kept.grad is None
    assert nmse(moved.grad, wanted["head" if still == "hidden" else "hidden"]) < 1e-10


def test_the_teacher_learns_nothing() -> None:
    taught = teaching()
    for tensor in (taught.hidden, taught.head):
        tensor.requires_grad_()
    token_loss(*inputs(), taught).loss.backward()
    assert taught.hidden.grad is None and taught.head.grad is None


def test_gradients_follow_the_factor_of_the_loss() -> None:
    """Accumulated over three batches, each counts a third."""
    hidden, head, labels = inputs()
    (token_loss(hidden, head, labels).loss / 3).backward()
    assert nmse(hidden.grad, reference(hidden, head, labels, None)["hidden"] / 3) < 1e-10
    assert nmse(head.grad, reference(hidden, head, labels, None)["head"] / 3) < 1e-10


def test_only_the_loss_can_be_differentiated() -> None:
    found = token_loss(*inputs(), teaching())
    assert found.loss.requires_grad
    assert not any(value.requires_grad for value in (found.text, found.correct, found.agreed))


def test_under_no_grad() -> None:
    with torch.no_grad():
        found = token_loss(*inputs())
    assert not found.loss.requires_grad
    assert found.loss.item() == pytest.approx(token_loss(*inputs()).loss.item())


def test_counts() -> None:
    """A head that says the hidden state's own number: right guesses and agreements are those that were made."""
    labels = torch.tensor([0, 1, 2, 3, 4])
    hidden, head = 5 * torch.eye(5), torch.eye(5)
    assert int(token_loss(hidden, head, labels).correct) == 5
    wrong = torch.tensor([1, 1, 2, 2, 3])
    taught = Teaching(hidden[[0, 1, 0, 0, 4]], head, 0.5, 1.0)
    found = token_loss(hidden, head, wrong, taught)
    assert int(found.correct) == 2 and int(found.agreed) == 3
    assert int(token_loss(hidden, head, wrong).agreed) == 0


def test_a_teacher_equal_to_the_student_costs_nothing() -> None:
    hidden, head, labels = inputs()
    taught = Teaching(hidden.detach(), head.detach(), 1.0, 2.0)
    found = token_loss(hidden, head, labels, taught)
    found.loss.backward()
    assert abs(found.loss.item()) < 1e-5 and int(found.agreed) == ROWS
    assert hidden.grad is not None and float(hidden.grad.abs().max()) < 1e-6


def test_logits_that_are_certain() -> None:
    """Of ±10,000: no NaN, and the gradient of a right guess is 0."""
    hidden, head, labels = inputs()
    with torch.no_grad():
        hidden.mul_(1000)
    right = (hidden @ head.t()).argmax(-1)
    assert token_loss(hidden, head, labels, teaching()).loss.isfinite()
    found = token_loss(hidden, head, right)
    found.loss.backward()
    assert found.loss.item() < 1e-5 and hidden.grad is not None and float(hidden.grad.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("hidden", "head", "labels"),
    [
        ((4, 3), (5, 2), (4,)),
        ((4, 3), (5, 3), (3,)),
        ((4, 3), (5, 3), (4, 1)),
        ((2, 2, 3), (5, 3), (2,)),
        ((4, 3), (5,), (4,)),
        ((0, 3), (5, 3), (0,)),
    ],
)
def test_shapes_that_do_not_fit(hidden: tuple[int, ...], head: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="do not fit"):
        token_loss(torch.ones(hidden), torch.ones(head), torch.zeros(labels, dtype=torch.int64))


def test_teachers_that_do_not_fit() -> None:
    hidden, head, labels = inputs()
    taught = teaching()
    with pytest.raises(UsageError, match=f"the teacher knows {VOCAB - 1} tokens, the student {VOCAB}"):
        token_loss(hidden, head, labels, taught._replace(head=taught.head[1:]))
    for states in (taught.hidden[1:], taught.hidden[:, 1:]):
        with pytest.raises(UsageError, match="the teacher's hidden states are"):
            token_loss(hidden, head, labels, taught._replace(hidden=states))
