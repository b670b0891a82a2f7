"""AWQ (Lin et al., 2023): scale up the weights of channels with large inputs before they are rounded.

``x Wᵀ = (x / s) (W s)ᵀ`` for any s > 0. Division by s goes into whatever produces x, so it costs nothing. A channel
multiplied by s is rounded s times finer as long as its block's scale does not grow as much. Searched is alpha in
``s = mean_abs ** alpha``: with 0 nothing changes, with 1 all channels weigh alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.blockwise import BlockFormat, BlockTensor, check_weight
from ryzen_compile.numerics.search.statistics import InputStatistics

Quantizer = Callable[[Tensor, BlockFormat, InputStatistics | None], BlockTensor]
COARSE = tuple(i / 10 for i in range(11))
FINE = 0.05  # further tried, on both sides of the best
SAMPLED_ROWS = 512  # of each weight that alphas are compared on; the best is then judged on all rows
SPREAD = 1e4  # the largest ratio between two channels' scales: a dead channel needs no more


def channel_scales(
    weights: Sequence[Tensor], form: BlockFormat, statistics: InputStatistics, quantizer: Quantizer
) -> tuple[Tensor, float, float]:
    """(s (K,) float32, loss without, loss with) for ``weights``, each (N, K), that read one input.

    The loss is ``tr(E H Eᵀ) / tr(W H Wᵀ)`` over all weights, ``E = Q(W s) / s - W`` and H the damped second moments;
    with s it is never larger: s is all ones when nothing helps. Raises ``UsageError`` for weights of another width.
    """
    if not weights:
        raise UsageError("there are no weights to scale")
    for w in weights:
        check_weight(w)
        if w.shape[1] != statistics.width:
            raise UsageError(f"a weight reads {w.shape[1]} channels, the statistics are of {statistics.width}")
    hessian = statistics.damped()
    sample = [w[:: -(-w.shape[0] // SAMPLED_ROWS)] for w in weights]

    def loss(tables: Sequence[Tensor], s: Tensor) -> float:
        return _relative_loss(tables, form, statistics, hessian, quantizer, s)

    def sampled(alpha: float) -> float:
        return loss(sample, _scales(statistics.mean_abs, alpha))

    losses = {alpha: sampled(alpha) for alpha in COARSE}
    near = min(losses, key=lambda alpha: losses[alpha])
    losses |= {alpha: sampled(alpha) for alpha in (near - FINE, near + FINE) if 0 < alpha < 1}
    s = _scales(statistics.mean_abs, min(losses, key=lambda alpha: losses[alpha]))
    ones = torch.ones_like(s)
    before, after = loss(weights, ones), loss(weights, s)
    return (s, before, after) if after < before else (ones, before, before)


def _scales(mean_abs: Tensor, alpha: float) -> Tensor:
    """``mean_abs ** alpha``, its largest and smallest value balanced around 1."""
    most = float(mean_abs.max())
    if alpha == 0 or most <= 0:
        return torch.ones_like(mean_abs, dtype=torch.float32)
    s = (mean_abs.float() / most).clamp(min=1 / SPREAD).pow(alpha)
    return s / (s.max() * s.min()).sqrt()


def _relative_loss(
    weights: Sequence[Tensor],
    form: BlockFormat,
    statistics: InputStatistics,
    hessian: Tensor,
    quantizer: Quantizer,
    s: Tensor,
) -> float:
    scaled = statistics.rescaled(s)
    lost = whole = 0.0
    for w in weights:
        w = w.float()
        error = quantizer(w * s, form, scaled).dequantize() / s - w
        lost += float(((error @ hessian) * error).sum(dtype=torch.float64))
        whole += float(((w @ hessian) * w).sum(dtype=torch.float64))
    return lost / whole if whole > 0 else 0.0
