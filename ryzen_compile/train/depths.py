"""Depths: the numbers of first channels at which vectors are trained to be cut (Kusupati et al., 2022).

    loss = sum over d of w(d) * loss of the first d channels,  the w(d) being positive and summing to 1

so that a loss keeps its scale, however many depths there are. Of what such a loss is made is its caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ryzen_compile.errors import ConfigError
from ryzen_compile.train.config import MatryoshkaSettings
from ryzen_compile.train.token_loss import TokenLoss

MULTIPLE = 8  # of channels: whole bytes of signs, whole vectors of a processor


@dataclass(frozen=True)
class Depths:
    """``dims``, widest first, and the weight of each in the loss; they sum to 1."""

    dims: tuple[int, ...]
    weights: tuple[float, ...]

    def joined(self, whole: TokenLoss, loss_at: Callable[[int], Tensor]) -> TokenLoss:
        """``whole``, which is the loss of all channels, with the weighted mean over depths as what is differentiated;
        what is reported stays that of all channels."""
        loss = self.weights[0] * whole.loss
        for dim, weight in zip(self.dims[1:], self.weights[1:], strict=True):
            loss = loss + weight * loss_at(dim)
        return whole._replace(loss=loss)


def make_depths(settings: MatryoshkaSettings, channels: int) -> Depths:
    """What ``settings`` mean for a model of so many channels.

    Raises ``ConfigError`` for dims that do not begin with ``channels``, and for a model with too few of them to halve,
    or to halve as often as there are weights.
    """
    dims = halvings(channels, settings.depth) if settings.dims is None else settings.dims
    if dims[0] != channels:
        raise ConfigError(
            f"passes.matryoshka.dims: expected the model's {channels} channels first, got {list(dims)}",
            hint=f"the widest loss is of whole vectors: dims: [{channels}, ...]",
        )
    if len(dims) < 2:
        raise ConfigError(f"passes.matryoshka: {channels} channels have no half that is a multiple of {MULTIPLE}")
    weights = settings.weights or (1.0,) * len(dims)
    if len(weights) != len(dims):
        raise ConfigError(
            f"passes.matryoshka.weights: expected one for each of {list(dims)}, got {len(weights)}",
            hint=f"{channels} channels halve less often than depth says: set dims",
        )
    return Depths(tuple(dims), tuple(weight / sum(weights) for weight in weights))


def halvings(channels: int, depth: int) -> tuple[int, ...]:
    """C, C / 2, C / 4, ... in multiples of ``MULTIPLE`` (the nearest, the larger of two), at most ``depth`` of them and
    each once."""
    dims = [channels]
    for power in range(1, depth):
        dim = MULTIPLE * max(1, int(channels / (1 << power) / MULTIPLE + 0.5))
        if dim < dims[-1]:
            dims.append(dim)
    return tuple(dims)
