"""The gradients of attention over a whole sequence, and attention's place in autograd.

The softmax's Jacobian takes a gradient g of its weights P to ``P (g - sum(g P))``, and that sum is the one of the
output's gradient times the output (Dao et al., 2022). A sink has weight but no value: the same formula with g = 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ryzen_compile.ops.attention import attention
from ryzen_compile.ops.precision import wide


@torch.library.custom_op("ryzen::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``grad`` and ``out`` (B, T, H, D') of ``attention`` for ``q`` (B, H, T, D), ``k`` (B, K, T, D), ``v``
    (B, K, T, D') and ``sinks`` (H,) or none; returns the gradients of these four, (0,) where there are no sinks.
    ``k`` and ``v`` have the sum over the query heads of their group; ``mask`` has none."""
    groups, at = q.shape[1] // k.shape[1], torch.arange(q.shape[2], device=q.device)
    queries, keys, values = wide(q), *(wide(x).repeat_interleave(groups, dim=1) for x in (k, v))
    grads, outs = (wide(x).transpose(1, 2) for x in (grad, out))
    scores = queries @ keys.transpose(-1, -2) * scale
    slope = torch.full_like(scores, scale)
    if softcap:
        bound = torch.tanh(scores / softcap)
        scores, slope = softcap * bound, slope * (1 - bound.square())
    ahead = at[None, :] - at[:, None]  # (T, T): from a query to a key
    hidden = (ahead > 0) & causal | ((ahead.abs() >= window) if window else torch.zeros_like(ahead, dtype=torch.bool))
    if mask is not None:
        hidden = hidden | (mask == 0)[:, None, None, :]
    size = scores.masked_fill_(hidden, float("-inf")).logsumexp(-1, keepdim=True)  # (B, H, T, 1)
    delta = (grads * outs).sum(-1, keepdim=True)
    dsinks = q.new_empty(0)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1)
        size = torch.logaddexp(size, column)
        dsinks = -((column - size).exp() * delta).sum((0, 2, 3)).to(sinks.dtype)
    weights = (scores - size).exp().masked_fill(hidden, 0.0)  # NaN where a query sees nothing
    pulls = weights * (grads @ values.transpose(-1, -2) - delta) * slope
    dk, dv = pulls.transpose(-1, -2) @ queries, weights.transpose(-1, -2) @ grads
    dk, dv = (x.unflatten(1, (k.shape[1], groups)).sum(2) for x in (dk, dv))
    return (pulls @ keys).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks


@attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, sinks, *ctx.form, mask = inputs
    ctx.save_for_backward(q, k, v, output, sinks, mask)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, sinks, mask = ctx.saved_tensors
    dq, dk, dv, dsinks = attention_backward(grad, *tensors, sinks, *ctx.form, mask)
    return dq, dk, dv, None if sinks is None else dsinks, None, None, None, None, None


attention.register_autograd(_differentiate, setup_context=_keep)
