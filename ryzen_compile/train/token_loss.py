"""The loss of predicted tokens from hidden states, some rows at a time: the logits of a batch never exist at once.

    loss = (1 - w) * cross-entropy(text) + w * T^2 * KL(teacher || student), both softened by T

Forward computes the gradients as well, while a chunk's logits are in the cache (Wijmans et al., 2024, have the idea for
cross-entropy). Products run in the type of the hidden states, as autocast would run them; sums are float32. It also
counts what a trainer reports: right guesses, and where the teacher would have guessed the same. The operator
``linear_cross_entropy`` computes the first term alone, in float32 products, and is what kernels attach to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ryzen_compile.errors import UsageError

CHUNK_LOGITS = 1 << 21  # computed at a time


class TokenLoss(NamedTuple):
    """``loss`` (), to differentiate; ``text`` () nats per token of the text alone; ``correct`` and ``agreed`` (), how
    many tokens the student's first guess was right for, and the teacher's (0 without one)."""

    loss: Tensor
    text: Tensor
    correct: Tensor
    agreed: Tensor


class Teaching(NamedTuple):
    """A teacher's hidden states (N, C') and head (V, C'), its ``weight`` in the loss and the ``temperature``."""

    hidden: Tensor
    head: Tensor
    weight: float
    temperature: float


def token_loss(hidden: Tensor, head: Tensor, labels: Tensor, teaching: Teaching | None = None) -> TokenLoss:
    """``hidden`` (N, C), ``head`` (V, C), ``labels`` (N,) int64; means over the N tokens.

    Raises ``UsageError`` for shapes that do not fit, no tokens, and a teacher with another vocabulary or other tokens.
    """
    if (
        not len(labels)
        or hidden.ndim != 2
        or head.ndim != 2
        or hidden.shape[1] != head.shape[1]
        or labels.shape != hidden.shape[:1]
    ):
        raise UsageError(
            f"token_loss: hidden (N, C), head (V, C) and labels (N,) do not fit: {tuple(hidden.shape)}, "
            f"{tuple(head.shape)}, {tuple(labels.shape)}"
        )
    if teaching is not None and teaching.head.shape[0] != head.shape[0]:
        raise UsageError(f"the teacher knows {teaching.head.shape[0]} tokens, the student {head.shape[0]}")
    if teaching is not None and teaching.hidden.shape != (len(labels), teaching.head.shape[1]):
        raise UsageError(
            f"the teacher's hidden states are {tuple(teaching.hidden.shape)}, "
            f"expected {(len(labels), teaching.head.shape[1])}"
        )
    return TokenLoss(*_TokenLoss.apply(hidden, head, labels, teaching))


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, teaching: Teaching | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = max(1, CHUNK_LOGITS // head.shape[0])
        weight = head.to(hidden.dtype)
        if teaching is not None:
            teaching = teaching._replace(head=teaching.head.to(teaching.hidden.dtype))
        needs_hidden, needs_head, *_ = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if needs_head else None
        total, text = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
        correct, agreed = labels.new_zeros(()), labels.new_zeros(())
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            logits, wanted = (hidden[part] @ weight.t()).float(), labels[part, None]
            guess = logits.argmax(-1)
            correct += (guess == labels[part]).sum()
            log_p = logits.log_softmax(-1)
            nats = -log_p.gather(1, wanted).sum()
            text += nats
            share = 1.0 if teaching is None else 1 - teaching.weight
            total += share * nats
            by_logits = log_p.exp_().mul_(share) if needs_hidden or needs_head else None
            if by_logits is not None:
                by_logits.scatter_add_(1, wanted, torch.full_like(wanted, -share, dtype=torch.float32))
            if teaching is not None:
                divergence, gradient, theirs = _divergence(logits, teaching, part)
                total += divergence
                agreed += (theirs == guess).sum()
                if by_logits is not None:
                    by_logits += gradient
            if by_logits is not None:
                by_logits = by_logits.to(hidden.dtype)  # of sums, not yet means: these would vanish in float16
                if of_hidden is not None:
                    torch.mm(by_logits, weight, out=of_hidden[part])
                if of_head is not None:
                    of_head += (by_logits.t() @ hidden[part]).float()
        ctx.save_for_backward(of_hidden, of_head)
        ctx.head_dtype, ctx.tokens = head.dtype, len(labels)
        text = text / len(labels)
        ctx.mark_non_differentiable(text, correct, agreed)
        return total / len(labels), text, correct, agreed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        of_hidden, of_head = ctx.saved_tensors
        scale = grad / ctx.tokens
        return (
            None if of_hidden is None else (of_hidden.float() * scale).to(of_hidden.dtype),
            None if of_head is None else (of_head * scale).to(ctx.head_dtype),
            None,
            None,
        )


def _divergence(logits: Tensor, teaching: Teaching, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Of a chunk: the weighted divergence summed, its gradient by the student's logits, and the teacher's guesses."""
    hidden, heat = teaching.hidden[part], teaching.temperature
    scores = (hidden @ teaching.head.t()).float()
    theirs = (scores / heat).log_softmax(-1)
    ours = (logits / heat).log_softmax(-1)
    share = theirs.exp()
    divergence = (share * (theirs - ours)).sum() * (teaching.weight * heat * heat)
    return divergence, (ours.exp_() - share) * (teaching.weight * heat), scores.argmax(-1)
