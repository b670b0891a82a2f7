"""Quantization-aware training: the forward pass reads weights as the export will round them (Jacob et al., 2018).

Rounded is what the export rounds, in the format that it chooses: linears, the head, the table of tokens, one that is
tied once. The gradient of a rounded weight is passed straight through to the weight in float32 behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ryzen_compile.config import WeightQuantization
from ryzen_compile.errors import ConfigError, ModelError
from ryzen_compile.numerics.blockwise import BlockFormat, blocks_of, row_chunks, spanning_grid
from ryzen_compile.numerics.search.rtn import offsets_of
from ryzen_compile.train.component import ComponentFacts
from ryzen_compile.train.config import QatSettings
from ryzen_compile.train.parameters import (
    FLOAT_BYTES,
    Matrix,
    export_formats,
    find_matrices,
    float_bytes,
    give_back,
    stand_in,
    standing_in,
    straight_through,
)

# The parity gate measures the rounded model against the captured one, whose weights are those behind the rounding:
# nobody trained that model's predictions, and how far they are away says nothing.
NO_BUDGET = 1000.0


def fake_quantize(w: Tensor, form: BlockFormat) -> Tensor:
    """``round_to_nearest(w, form).dequantize()`` to the bit, (N, K) float32, without packing.

    NaN and infinities are not refused: they make their block NaN.
    """
    if torch.compiler.is_compiling():  # the compiler fuses what chunks would keep in the cache
        return _rounded(w, form)
    parts = [_rounded(w[start:stop], form) for start, stop in row_chunks(*w.shape)]
    return torch.cat(parts) if parts else w.float()


def _rounded(w: Tensor, form: BlockFormat) -> Tensor:
    blocks = blocks_of(w, form.block)
    scales, zeros = spanning_grid(blocks, form)
    offsets = offsets_of(blocks, scales, None if zeros is None else zeros.float(), form)
    return (offsets * scales[..., None]).flatten(1)[:, : w.shape[1]]


def stored_bytes(rows: int, width: int, form: BlockFormat) -> int:
    """``nbytes`` of a ``BlockTensor`` (rows, width)."""
    blocks = form.blocks(width)
    codes = blocks * form.block * form.stored_bits // 8
    zeros = 0 if form.symmetric else -(-blocks * form.stored_bits // 8)
    return rows * (codes + FLOAT_BYTES * blocks + zeros)


class _Rounding(nn.Module):
    """Stands in for a parameter: what it rounds to, or while inactive the parameter itself."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.active = False
        self.form = BlockFormat()

    def forward(self, latent: Tensor) -> Tensor:
        return straight_through(latent, self.rounded) if self.active else latent

    def rounded(self, latent: Tensor) -> Tensor:
        if self.transposed:
            return fake_quantize(latent.t(), self.form).t().to(latent.dtype)
        return fake_quantize(latent, self.form).to(latent.dtype)


class QatComponent:
    """Blocks of ``bits[0]``, later of the narrower stages.

    ``detach`` leaves the weights behind the rounding. They are what to save: an export with ``recipe_changes`` rounds
    them to the very values that were trained, while the plain float model was never looked at and may be worse.
    """

    name = "qat"
    optional = True

    def __init__(self, settings: QatSettings) -> None:
        self.settings = settings
        self.start = settings.start
        self.active = False
        self._stage = 0
        self._rounded: list[tuple[Matrix, _Rounding]] = []
        self._float_bytes = 0

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        """Raises ``ConfigError`` for a model without products or lookups, and what capturing it raises."""
        self._float_bytes = float_bytes(model)
        self._rounded = [(matrix, _Rounding(matrix.transposed)) for matrix in find_matrices(model)]
        if not self._rounded:
            raise ConfigError(f"{type(model).__name__} has no weights that an export would round")
        for matrix, rounding in self._rounded:
            stand_in(matrix, rounding)
        self._enter(0)
        return []

    def activate(self) -> None:
        self._switch(active=True)

    def deactivate(self) -> None:
        self._switch(active=False)

    def advance(self, progress: float) -> None:
        """Stages are the controller's to change."""

    def tighten(self) -> bool:
        return self._enter(self._stage + 1)

    def relax(self) -> bool:
        return self._enter(self._stage - 1)

    @torch.no_grad()
    def facts(self) -> ComponentFacts:
        """Of the present stage, on or off. The ratio counts all parameters, the error those that are rounded."""
        saved = 0
        error = square = 0.0
        for matrix, rounding in self._rounded:
            w = matrix.rows
            saved += FLOAT_BYTES * w.numel() - stored_bytes(w.shape[0], w.shape[1], rounding.form)
            error += float((fake_quantize(w, rounding.form) - w).double().square().sum())
            square += float(w.double().square().sum())
        quantization = self._quantization()
        return ComponentFacts(
            ratio=self._float_bytes / (self._float_bytes - saved),
            error=error / square if square else 0.0,
            settings=quantization.model_dump(include={"bits", "block", "symmetric", "head_bits"}),
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"stage": self._stage, "active": self.active}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:  # noqa: ARG002 - the protocol's
        """Raises ``ModelError`` for a stage that the settings do not have."""
        stage = values.get("stage")
        if isinstance(stage, bool) or not isinstance(stage, int) or not self._enter(stage):
            raise ModelError(
                f"qat: the checkpoint is in stage {stage!r}, the settings have {len(self.settings.bits)}",
                hint="go on with the settings that the run began with",
            )
        self._switch(active=bool(values.get("active")))

    def detach(self, model: nn.Module) -> None:
        for module, attribute, _ in standing_in(model, _Rounding):
            give_back(module, attribute)

    def recipe_changes(self) -> Mapping[str, Any]:
        return {"weights": self._quantization()}

    def _quantization(self) -> WeightQuantization:
        settings = self.settings
        return WeightQuantization(
            bits=settings.bits[self._stage],
            block=settings.block,
            symmetric=settings.symmetric,
            method="rtn",
            head_bits=settings.head_bits,
            max_kl=NO_BUDGET,
        )

    def _enter(self, stage: int) -> bool:
        if not 0 <= stage < len(self.settings.bits):
            return False
        self._stage = stage
        formats = export_formats([matrix for matrix, _ in self._rounded], self._quantization())
        for (_, rounding), form in zip(self._rounded, formats, strict=True):
            rounding.form = form
        return True

    def _switch(self, *, active: bool) -> None:
        self.active = active
        for _, rounding in self._rounded:
            rounding.active = active
