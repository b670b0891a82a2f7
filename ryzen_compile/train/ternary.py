"""Training linears of -1, 0 and +1 (BitNet b1.58, Ma et al., 2024).

    w  ->  scale * clamp(round(w / scale), -1, 1),  scale = mean |w|

and the layer's input is rounded to 8 bits, row by row, as ``numerics.ternary.round_rows`` does it. Both gradients are
passed straight through. A layer then computes what ``ryzen::linear_ternary`` computes from its codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ryzen_compile.errors import ModelError
from ryzen_compile.numerics.ternary import round_rows
from ryzen_compile.train.component import ComponentFacts
from ryzen_compile.train.config import TernarySettings
from ryzen_compile.train.parameters import (
    FLOAT_BYTES,
    Layer,
    find_layers,
    float_bytes,
    give_back,
    stand_in,
    standing_in,
    straight_through,
)

SMALLEST_SCALE = 1e-5  # as in BitNet: a matrix of zeros has a scale, too


def ternarize(w: Tensor) -> tuple[Tensor, Tensor]:
    """``w`` of any shape -> codes -1, 0 and 1, in its type and shape, and their scale ()."""
    scale = w.abs().mean().clamp(min=SMALLEST_SCALE)
    return (w / scale).round().clamp(-1, 1), scale


def round_activations(x: Tensor) -> Tensor:
    """``x`` (..., C) rounded to 8 bits a row, in its type."""
    codes, step = round_rows(x if x.dtype == torch.float64 else x.float())
    return (codes * step).to(x.dtype)


class _Ternary(nn.Module):
    """Stands in for a layer's weight, and rounds the layer's input."""

    def __init__(self) -> None:
        super().__init__()
        self.active = False
        self.hook = -1

    def forward(self, latent: Tensor) -> Tensor:
        return straight_through(latent, self.rounded) if self.active else latent

    def rounded(self, latent: Tensor) -> Tensor:
        codes, scale = ternarize(latent)
        return codes * scale

    def attach(self, layer: Layer) -> None:
        stand_in(layer.weight, self)
        self.hook = layer.module.register_forward_pre_hook(self.round_input).id

    @torch.no_grad()
    def detach(self, module: nn.Module, attribute: str) -> None:
        """The layer with the weight that it computed with."""
        module._forward_pre_hooks.pop(self.hook)
        give_back(module, attribute)
        if self.active:
            weight = getattr(module, attribute)
            weight.copy_(self.rounded(weight))

    def round_input(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (straight_through(args[0], round_activations), *args[1:]) if self.active else args


class TernaryComponent:
    """All linear layers beside the head.

    While it is on, ``detach`` bakes: a weight becomes scale times codes, so that the saved model has the weights that
    were trained. (Rounding these again would give another scale: a baked model is not trained on in this way.) The
    rounding of activations cannot lie in weights: ``recipe_changes`` asks the export for it, which finds the codes in
    baked weights, to the bit, and stores them in 2 bits; the head and the table stay float32.
    """

    name = "ternary"
    optional = True

    def __init__(self, settings: TernarySettings) -> None:
        self.settings = settings
        self.start = settings.start
        self.active = False
        self._ternary: list[tuple[Layer, _Ternary]] = []
        self._float_bytes = 0

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        """Raises ``ConfigError`` for a model without linear layers, and what capturing it raises."""
        self._float_bytes = float_bytes(model)
        layers, _ = find_layers(model)
        self._ternary = [(layer, _Ternary()) for layer in layers]
        for layer, ternary in self._ternary:
            ternary.attach(layer)
        return []

    def activate(self) -> None:
        self._switch(active=True)

    def deactivate(self) -> None:
        self._switch(active=False)

    def advance(self, progress: float) -> None:
        """There is nothing to anneal."""

    def tighten(self) -> bool:
        return False

    def relax(self) -> bool:
        return False

    @torch.no_grad()
    def facts(self) -> ComponentFacts:
        """On or off. The ratio counts all parameters, ternary ones at 2 bits; the error those that are ternary."""
        saved = 0
        error = square = 0.0
        for layer, ternary in self._ternary:
            w = layer.weight.rows
            saved += FLOAT_BYTES * (w.numel() - 1) - w.shape[0] * -(-w.shape[1] // 4)
            error += float((ternary.rounded(w) - w).double().square().sum())
            square += float(w.double().square().sum())
        ratio = self._float_bytes / (self._float_bytes - saved)
        return ComponentFacts(ratio, error / square if square else 0.0, {"layers": len(self._ternary)})

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"active": self.active}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:  # noqa: ARG002 - the protocol's
        """Raises ``ModelError`` for values that ``state`` does not give."""
        if not isinstance(values.get("active"), bool):
            raise ModelError(f"ternary: the checkpoint's state is {dict(values)}, expected whether it is active")
        self._switch(active=values["active"])

    def detach(self, model: nn.Module) -> None:
        for module, attribute, ternary in standing_in(model, _Ternary):
            ternary.detach(module, attribute)

    def recipe_changes(self) -> Mapping[str, Any]:
        """For the model that ``detach`` leaves."""
        return {"ternary": True}

    def _switch(self, *, active: bool) -> None:
        self.active = active
        for _, ternary in self._ternary:
            ternary.active = active
