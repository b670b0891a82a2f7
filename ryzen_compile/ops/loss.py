"""Cross-entropy of a linear head's outputs, without the logits of more than a few rows at a time.

Of a large vocabulary the logits of a batch are by far the largest tensor in training. Each row's loss and gradient need
that row alone, so rows are taken in chunks, and since the gradient of a mean is known but for one factor, the forward
pass computes it while a chunk's logits are there (Wijmans et al., "Cut Your Losses", 2024; in chunks of rows as in
Liger, 2024): three products in all, none twice.

All take ``h`` (N, C) and ``w`` (V, C) of one floating-point type, ``labels`` (N,) int64 in 0..V-1 or ``ignore_index``,
and ``softcap``, which bounds the logits by ``c tanh(z / c)`` (Gemma 2; 0: off). The loss is the mean of
``-log_softmax(h wT)[label]`` over the rows whose label is not ``ignore_index``, and 0 when there are none; float32, or
float64 of float64. They raise ``UsageError`` for arguments that do not fit together, and for labels out of range where
looking at them is free, on a CPU; elsewhere such a row's loss is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ryzen_compile.errors import UsageError
from ryzen_compile.ops.precision import wide

CHUNK_LOGITS = 1 << 22  # held at a time by the references: a few tens of megabytes


def expect_inputs(op: str, h: Tensor, w: Tensor, labels: Tensor, softcap: float) -> None:
    """Raises ``UsageError`` when shapes, types or ``softcap`` are not what this file's operators take."""
    if h.dim() != 2 or w.dim() != 2 or h.shape[1] != w.shape[1] or not w.shape[0]:
        shapes = f"{tuple(h.shape)} and {tuple(w.shape)}"
        raise UsageError(f"{op}: h must be (N, C) and w (V, C), V at least 1, got {shapes}")
    if h.dtype != w.dtype or not h.is_floating_point():
        raise UsageError(f"{op}: h and w must be of one floating-point type, got {h.dtype} and {w.dtype}")
    if labels.shape != h.shape[:1] or labels.dtype != torch.int64:
        got = f"{tuple(labels.shape)} {labels.dtype}"
        raise UsageError(f"{op}: labels must be ({h.shape[0]},) torch.int64, got {got}")
    if not 0 <= softcap < math.inf:
        raise UsageError(f"{op}: softcap must be at least 0 and finite, got {softcap}")


def _expect_labels(op: str, labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Raises ``UsageError`` for a label out of range; of tensors on a CPU only, others would have to be waited for."""
    if labels.device.type != "cpu":
        return
    strange = labels[(labels != ignore_index) & ~_known(labels, vocab)]
    if strange.numel():
        raise UsageError(f"{op}: labels must be in 0..{vocab - 1} or {ignore_index}, got {int(strange[0])}")


def _known(labels: Tensor, vocab: int) -> Tensor:
    return (labels >= 0) & (labels < vocab)


class _Chunk(NamedTuple):
    rows: slice
    scores: Tensor  # (rows, V), the logits after the soft cap
    log_p: Tensor  # (rows, V)
    labels: Tensor  # (rows,)

    def losses(self, ignore_index: int) -> Tensor:
        """(rows,), 0 of ignored rows whatever their logits are."""
        vocab = self.log_p.shape[1]
        picked = self.log_p.gather(1, self.labels.clamp(0, vocab - 1)[:, None])[:, 0]
        losses = torch.where(_known(self.labels, vocab), -picked, math.nan)
        return torch.where(self.labels == ignore_index, 0.0, losses)

    def logit_grads(self, ignore_index: int, softcap: float) -> Tensor:
        """(rows, V), of the sum of losses by the logits before the soft cap."""
        vocab = self.log_p.shape[1]
        hit = torch.arange(vocab, device=self.labels.device) == self.labels[:, None]
        grads = self.log_p.exp() - hit.to(self.log_p.dtype)
        if softcap:
            grads = grads * (1 - (self.scores / softcap).square())
        grads = torch.where(_known(self.labels, vocab)[:, None], grads, math.nan)
        return torch.where((self.labels == ignore_index)[:, None], 0.0, grads)


def _chunks(h: Tensor, w: Tensor, labels: Tensor, softcap: float) -> Iterator[_Chunk]:
    """``h`` and ``w`` are in the precision to compute in."""
    size = max(1, CHUNK_LOGITS // w.shape[0])
    for start in range(0, h.shape[0], size):
        rows = slice(start, start + size)
        logits = h[rows] @ w.T
        scores = softcap * torch.tanh(logits / softcap) if softcap else logits
        yield _Chunk(rows, scores, scores.log_softmax(-1), labels[rows])


def _counted(labels: Tensor, ignore_index: int) -> Tensor:
    """What sums over rows are divided by: how many count, at least 1, so that none give 0."""
    return (labels != ignore_index).sum().clamp(min=1)


@torch.library.custom_op("ryzen::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(h: Tensor, w: Tensor, labels: Tensor, ignore_index: int, softcap: float) -> Tensor:
    """The loss alone, a scalar; it has no backward."""
    expect_inputs("linear_cross_entropy", h, w, labels, softcap)
    _expect_labels("linear_cross_entropy", labels, w.shape[0], ignore_index)
    h, w = wide(h), wide(w)
    total = torch.zeros((), dtype=torch.float64, device=h.device)
    for chunk in _chunks(h, w, labels, softcap):
        total += chunk.losses(ignore_index).double().sum()
    return (total / _counted(labels, ignore_index)).to(h.dtype)


@linear_cross_entropy.register_fake
def _(h: Tensor, w: Tensor, labels: Tensor, ignore_index: int, softcap: float) -> Tensor:
    return h.new_empty((), dtype=_loss_dtype(h))


@torch.library.custom_op("ryzen::linear_cross_entropy_grads", mutates_args=())
def linear_cross_entropy_grads(
    h: Tensor, w: Tensor, labels: Tensor, ignore_index: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, a scalar, and its gradients by ``h`` (N, C) and by ``w`` (V, C), in their type.

    The backward of the loss multiplies these two; it is the only output that can be differentiated. In float16,
    gradients below 6e-8 are lost before a loss scale could have raised them: bfloat16 keeps them.
    """
    expect_inputs("linear_cross_entropy_grads", h, w, labels, softcap)
    _expect_labels("linear_cross_entropy_grads", labels, w.shape[0], ignore_index)
    wide_h, wide_w = wide(h), wide(w)
    total = torch.zeros((), dtype=torch.float64, device=h.device)
    dh = torch.zeros(h.shape, dtype=wide_h.dtype, device=h.device)
    dw = torch.zeros(w.shape, dtype=wide_h.dtype, device=h.device)
    for chunk in _chunks(wide_h, wide_w, labels, softcap):
        total += chunk.losses(ignore_index).double().sum()
        by_logits = chunk.logit_grads(ignore_index, softcap)
        dh[chunk.rows] = by_logits @ wide_w
        dw += by_logits.T @ wide_h[chunk.rows]
    counted = _counted(labels, ignore_index)
    return (total / counted).to(wide_h.dtype), (dh / counted).to(h.dtype), (dw / counted).to(w.dtype)


@linear_cross_entropy_grads.register_fake
def _(h: Tensor, w: Tensor, labels: Tensor, ignore_index: int, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty((), dtype=_loss_dtype(h)), h.new_empty(h.shape), w.new_empty(w.shape)


def _loss_dtype(h: Tensor) -> torch.dtype:
    return torch.float64 if h.dtype == torch.float64 else torch.float32


@torch.library.custom_op("ryzen::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(grad_loss: Tensor, gradient: Tensor) -> Tensor:
    """``gradient`` (...) times ``grad_loss``, a scalar of the loss's type.

    A plain product would round the scalar to the gradient's type first, and with it every gradient behind it alike.
    """
    return (wide(gradient) * grad_loss).to(gradient.dtype)


@linear_cross_entropy_backward.register_fake
def _(grad_loss: Tensor, gradient: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, dh, dw = output
    ctx.mark_non_differentiable(dh, dw)
    ctx.set_materialize_grads(False)  # or autograd fills a (V, C) with the zeros that are dw's own gradient
    ctx.save_for_backward(
        *(grad if wanted else None for grad, wanted in zip((dh, dw), ctx.needs_input_grad, strict=False))
    )


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved = (None, None) if grad_loss is None else ctx.saved_tensors
    grads = (None if grad is None else linear_cross_entropy_backward(grad_loss, grad) for grad in saved)
    return (*grads, None, None, None)


linear_cross_entropy_grads.register_autograd(_backward, setup_context=_setup_context)


def cross_entropy(h: Tensor, w: Tensor, labels: Tensor, *, ignore_index: int = -100, softcap: float = 0.0) -> Tensor:
    """The loss of ``h`` (..., C) and ``labels`` (...), with the gradients where autograd will ask for them."""
    if labels.shape != h.shape[:-1]:
        raise UsageError(f"cross_entropy: labels must be {tuple(h.shape[:-1])}, got {tuple(labels.shape)}")
    rows, flat = h.reshape(labels.numel(), h.shape[-1]), labels.reshape(-1)
    if torch.is_grad_enabled() and (h.requires_grad or w.requires_grad):
        return linear_cross_entropy_grads(rows, w, flat, ignore_index, softcap)[0]
    return linear_cross_entropy(rows, w, flat, ignore_index, softcap)
