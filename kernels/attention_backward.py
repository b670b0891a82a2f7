"""The operator ``ryzen::attention_backward`` on a GPU: launches the kernels of ``attention_gradients``."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ryzen_compile.errors import UsageError
from ryzen_compile.kernels import attention_tile as tile
from ryzen_compile.kernels import launch
from ryzen_compile.kernels.attention_gradients import keys_kernel, queries_kernel, sinks_kernel

SINKS_BLOCK = 1024  # queries of a head at a time
HALF_QUERIES: tile.Choices = {
    64: ((64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 2), (128, 128, 8, 2)),
    128: ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3), (128, 32, 8, 3)),
    256: ((64, 32, 4, 2), (128, 32, 8, 2), (64, 16, 4, 2)),
}
HALF_KEYS: tile.Choices = {
    64: ((64, 64, 4, 3), (64, 128, 8, 3), (32, 128, 4, 3), (128, 128, 8, 2)),
    128: ((64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2), (32, 64, 4, 3)),
    256: ((32, 64, 8, 1), (32, 64, 8, 2), (64, 64, 8, 2)),
}
SINGLE_QUERIES: tile.Choices = {64: ((32, 32, 4, 2),), 128: ((32, 32, 8, 2),), 256: ((16, 16, 4, 2),)}
SINGLE_KEYS: tile.Choices = {64: ((16, 32, 4, 2), (32, 32, 8, 2)), 128: ((16, 32, 8, 2),), 256: ((16, 16, 8, 2),)}


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
    """The operator ``ryzen::attention_backward``: ``grad`` and ``out`` (B, T, H, D') with ``q`` (B, H, T, D), ``k``
    (B, K, T, D) and ``v`` (B, K, T, D') of one type -> the gradients of ``q``, ``k``, ``v`` and ``sinks``, the last one
    (0,) where there are none.

    Rows are read wherever they lie, if the channels of each are next to each other. Raises as ``attention`` does.
    """
    tile.expect_fit("attention_backward", q, k, v, sinks, window, mask)
    batch, heads, tokens, _ = q.shape
    for name, x in (("grad", grad), ("out", out)):
        if x.shape != (batch, tokens, heads, v.shape[3]) or x.dtype != q.dtype:
            raise UsageError(
                f"attention_backward: {name} must be {(batch, tokens, heads, v.shape[3])} of {q.dtype}, "
                f"got {tuple(x.shape)} of {x.dtype}"
            )
    device = launch.expect_device("attention_backward", q=q, k=k, v=v, grad=grad, out=out, sinks=sinks)
    dq, dk, dv = (launch.empty(x.shape, x.dtype, device) for x in (q, k, v))
    like = q if sinks is None else sinks
    dsinks = launch.empty((0,) if sinks is None else (heads,), like.dtype, device)
    sizes, deltas = (launch.empty((batch * heads, -(-tokens // 4) * 4), torch.float32, device) for _ in range(2))
    sinks = None if sinks is None else sinks.contiguous()
    with launch.on(q):
        if dq.numel():
            upward, positive = tile.upwards(q, scale)
            rows = [tile.by_strides(x) for x in (upward, k, v, grad.transpose(1, 2), out.transpose(1, 2))]
            numbers = tile.arguments(q, k, v, positive, window, softcap, causal)
            described = [tile.describable(*rows[1:3]), tile.describable(rows[0], rows[3])]
            alike = [tile.alike(q, k, v, window, softcap, causal, x) for x in described]
            _launch_queries(rows, sinks, [dq, sizes, deltas], numbers | {"scale": scale}, described[0], alike[0])
            _launch_keys(rows[:4], [sizes, deltas, dk, dv], numbers | {"scale": positive}, described[1], alike[1])
        if sinks is not None:
            sinks_kernel[(heads,)](sinks, sizes, deltas, dsinks, batch, heads, tokens, BLOCK=SINKS_BLOCK)
    return dq, dk, dv, dsinks


def _launch_queries(
    rows: list[Tensor],  # q, k, v, grad, out, of (B, heads, T, channels)
    sinks: Tensor | None,
    results: list[Tensor],
    numbers: tile.Numbers,
    described: bool,
    alike: tuple[object, ...],
) -> None:
    q, k, v, grad, out = rows
    heads = q.shape[0] * q.shape[1]

    def run(config: triton.Config) -> None:
        m, n, engine = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "DESCRIBED"))
        keys, values = (tile.source(x, n, engine) for x in (k, v))
        queries_kernel[(heads * triton.cdiv(q.shape[2], m),)](
            *(q, keys, values, grad, out, sinks, *results),
            *(x.stride()[:3] for x in rows),
            together=min(numbers["GROUP"] * tile.fitting(k, v), heads),
            **numbers,
            **config.all_kwargs(),
        )

    choices = tile.configs(HALF_QUERIES, SINGLE_QUERIES, k, v, described)
    run(launch.tuned("attention_backward_queries", alike, choices, run, q.device))


def _launch_keys(
    rows: list[Tensor],  # q, k, v, grad, of (B, heads, T, channels)
    results: list[Tensor],
    numbers: tile.Numbers,
    described: bool,
    alike: tuple[object, ...],
) -> None:
    q, k, v, grad = rows
    sizes, deltas, dk, dv = results
    heads = k.shape[0] * k.shape[1]

    def run(config: triton.Config) -> None:
        m, n, engine = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "DESCRIBED"))
        queries, grads = (tile.source(x, m, engine) for x in (q, grad))
        sums = (_numbers_source(x, q.shape[2], m, engine) for x in (sizes, deltas))
        keys_kernel[(heads * triton.cdiv(q.shape[2], n),)](
            *(queries, k, v, grads, *sums, dk, dv),
            *(x.stride()[:3] for x in rows),
            together=min(max(tile.fitting(q, grad) // numbers["GROUP"], 1), heads),
            **numbers,
            **config.all_kwargs(),
        )

    choices = tile.configs(HALF_KEYS, SINGLE_KEYS, q, grad, described)
    run(launch.tuned("attention_backward_keys", alike, choices, run, q.device))


def _numbers_source(x: Tensor, tokens: int, count: int, described: bool) -> Tensor | TensorDescriptor:
    """What a kernel reads so many of a head's ``tokens`` numbers from at a time."""
    return TensorDescriptor(x, [len(x), tokens], list(x.stride()), [1, count]) if described else x
