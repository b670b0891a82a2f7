"""Training a compressed table: a few hundred steps in which only the table and its codebook move.

The student looks tokens up in the table as differentiable k-means sees it (DKM, Cho et al., ICLR 2022): weights are
drawn to the entries near them, more sharply step by step, while the loss, the divergence of the student's predictions
from the model's own on text, moves weights, entries, scales, gain, offset and kept rows. What a batch does not look up
is not computed, so a step's cost does not depend on the vocabulary. At the end every vector takes its nearest entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ryzen_compile.errors import NumericalError, UsageError
from ryzen_compile.numerics.codebook import CodebookTensor, pack_codes
from ryzen_compile.numerics.divergence import mean_divergence
from ryzen_compile.numerics.dkm import DKMLayer, temperature_schedule
from ryzen_compile.train.lookup import SubstitutedLookup, check_looked_up, evaluating, find_table, logits

HELD_BACK = 8  # windows of the text that decide whether training helped
FEWEST_WINDOWS = 2 * HELD_BACK
WARM_UP = 20  # steps in which the rates rise
LAST_RATE = 0.05  # of the first, where the cosine ends
LARGEST_SCALE = torch.finfo(torch.float16).max
SMALLEST_SCALE = 2.0**-24  # of float16; a scale of 0 would make a row's weights infinite
# Learning rates, in units of a normalised weight's size (entries and weights are of order one).
RATES = {"weights": 0.008, "codebook": 0.002, "scales": 0.0008, "channels": 0.0002, "kept": 0.0002}


@dataclass(frozen=True)
class FinetuneSettings:
    """``steps`` of ``batch`` windows. ``temperatures``, first and last, are in units of a vector's mean squared error
    at the start: above 1 entries blur into each other, far below it the nearest one has all the weight."""

    steps: int = 300
    batch: int = 8
    temperatures: tuple[float, float] = (1.0, 0.05)
    seed: int = 0


@dataclass(frozen=True)
class FinetuneResult:
    """``kl`` before and after: mean divergence from the model on text not trained on, nats per token. ``table`` is the
    better of the two."""

    table: CodebookTensor
    kl_before: float
    kl_after: float


def dkm_finetune(
    model: nn.Module,
    name: str,
    start: CodebookTensor,
    windows: Tensor,
    settings: FinetuneSettings | None = None,
    progress: Callable[[float], None] | None = None,
) -> FinetuneResult:
    """Trains ``start`` in place of the model's parameter ``name`` (V, C), on text ``windows`` (n, T) int64.

    The last ``HELD_BACK`` windows are measured on, not trained on. Only lookups are replaced: a tied head keeps its
    weights. The model is left as it was. ``progress`` hears the share done. Raises ``UsageError`` for too little text
    and a parameter that is not there or of another shape, ``NumericalError`` when the loss is not finite.
    """
    settings = settings or FinetuneSettings()
    table = find_table(model, name)
    if tuple(table.shape) != start.shape:
        raise UsageError(f"parameter {name!r} is {tuple(table.shape)}, the compressed table {start.shape}")
    if len(windows) < FEWEST_WINDOWS:
        raise UsageError(
            f"{len(windows)} windows of text are too few to train on, expected at least {FEWEST_WINDOWS}",
            hint="give a longer calibration text, or use method 'kmeans'",
        )
    train, held = windows[:-HELD_BACK], windows[-HELD_BACK:]
    with evaluating(model):
        before = _divergence(model, name, table, start, held)
        trained = _Trained(start, table.detach())
        _train(model, table, trained, train, settings, progress)
        found = trained.hardened()
        after = _divergence(model, name, table, found, held)
    return FinetuneResult(found if after < before else start, before, after)


class _Trained:
    """The table in training. ``weights`` (V, C) are normalised: what codes are chosen for."""

    def __init__(self, start: CodebookTensor, table: Tensor) -> None:
        self.start = start
        rows, width = start.shape
        scales = torch.ones(rows, 1) if start.scales is None else start.scales.float()
        self.scales = nn.Parameter(scales)
        self.gain = nn.Parameter(torch.ones(width) if start.gain is None else start.gain.clone())
        self.offset = nn.Parameter(torch.zeros(width) if start.offset is None else start.offset.clone())
        self.kept = nn.Parameter(torch.empty(0, width) if start.kept is None else start.kept.float())
        spread = self._spread(scales.clamp(min=SMALLEST_SCALE)) * self.gain.detach()
        self.weights = nn.Parameter((table.float() - self.offset.detach()) / spread)
        self.stages = [DKMLayer(book, temperature=1.0, iterations=0) for book in start.codebook]
        self.error = self._start_error()

    def parameter_groups(self) -> list[dict[str, object]]:
        """Of what ``start`` stores, nothing else: absent scales stay 1, an absent gain 1, an absent offset 0."""
        stored = self.start.tensors
        channels = [p for n, p in (("gain", self.gain), ("offset", self.offset)) if n in stored]
        groups = {
            "weights": [self.weights],
            "codebook": [stage.centroids for stage in self.stages],
            "scales": [self.scales] if "scales" in stored else [],
            "channels": channels,
            "kept": [self.kept] if "kept" in stored else [],
        }
        return [{"params": params, "rate": RATES[name]} for name, params in groups.items() if params]

    def anneal(self, temperature: float) -> None:
        for stage in self.stages:
            stage.temperature = temperature * max(self.error, torch.finfo(torch.float32).tiny)

    def rows(self, ids: Tensor) -> Tensor:
        """``ids`` (...) -> (..., C): rows as they are at this temperature."""
        unique, places = ids.reshape(-1).unique(return_inverse=True)
        points = self.weights[unique].reshape(-1, self.start.format.dim)
        coded: Tensor = self.stages[0](points)
        for stage in self.stages[1:]:
            coded = coded + stage(points - coded)
        rows = coded.reshape(len(unique), -1) * self._spread(self.scales[unique]) * self.gain + self.offset
        if self.start.slots is not None:
            slots = self.start.slots[unique].long()
            rows = torch.where((slots >= 0)[:, None], self.kept[slots.clamp(min=0)], rows)
        return rows[places].reshape(*ids.shape, -1)

    @torch.no_grad()
    def hardened(self) -> CodebookTensor:
        """The table with every vector at its nearest entry; each stage codes what the one before left."""
        form, (rows, width) = self.start.format, self.start.shape
        codes = torch.empty(rows, form.stages, form.codes(width), dtype=torch.uint8)
        left, books = self.weights.reshape(-1, form.dim), []
        for index, stage in enumerate(self.stages):
            chosen, book = stage.harden(left)
            books.append(book)
            codes[:, index] = chosen.reshape(rows, -1).to(torch.uint8)
            left = left - book[chosen.long()]
        start = self.start
        return replace(
            start,
            codes=pack_codes(codes.flatten(1), form.bits),
            codebook=torch.stack(books),
            scales=None if start.scales is None else self.scales.clamp(-LARGEST_SCALE, LARGEST_SCALE).half(),
            gain=None if start.gain is None else self.gain.detach().clone(),
            offset=None if start.offset is None else self.offset.detach().clone(),
            kept=None if start.kept is None else self.kept.to(start.kept.dtype),
        )

    def _spread(self, scales: Tensor) -> Tensor:
        """(R, groups) -> (R, C)."""
        return scales.repeat_interleave(self.start.shape[1] // scales.shape[1], dim=1)

    @torch.no_grad()
    def _start_error(self) -> float:
        """Mean squared distance of a vector from its entries at the start, kept rows left out."""
        coded = (
            torch.arange(self.start.shape[0]) if self.start.slots is None else (self.start.slots < 0).nonzero()[:, 0]
        )
        sample = coded[:: max(1, len(coded) // 1024)]
        rows = self.start.rows(sample)
        spread = self._spread(self.scales[sample].clamp(min=SMALLEST_SCALE)) * self.gain
        error = self.weights[sample] - (rows - self.offset) / spread
        return float(error.square().mean()) * self.start.format.dim


def _train(
    model: nn.Module,
    table: Tensor,
    trained: _Trained,
    windows: Tensor,
    settings: FinetuneSettings,
    progress: Callable[[float], None] | None,
) -> None:
    groups = trained.parameter_groups()
    optimizer = torch.optim.Adam(groups, lr=1.0, betas=(0.9, 0.95))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = _order(len(windows), settings)
    for step in range(settings.steps):
        if progress is not None:
            progress(step / settings.steps)
        done = step / max(1, settings.steps - 1)
        trained.anneal(temperature_schedule(done, *settings.temperatures))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * _rate(step, settings.steps)
        loss = _loss(model, table, trained, windows[order[step]])
        if not torch.isfinite(loss):
            raise NumericalError(f"the loss is {loss.item()} at step {step}", hint="fewer steps, or method 'kmeans'")
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    if progress is not None:
        progress(1.0)


def _loss(model: nn.Module, table: Tensor, trained: _Trained, ids: Tensor) -> Tensor:
    """Mean KL(model || student) over the tokens of ``ids`` (B, T)."""
    with torch.no_grad():
        target = torch.log_softmax(logits(model, ids), dim=-1)
    with torch.enable_grad(), SubstitutedLookup(table, trained.rows):
        student = torch.log_softmax(logits(model, ids), dim=-1)
    return (target.exp() * (target - student)).sum(-1).mean()


@torch.no_grad()
def _divergence(model: nn.Module, name: str, table: Tensor, compressed: CodebookTensor, windows: Tensor) -> float:
    """Mean over ``windows`` (n, T), nats per token."""
    total = 0.0
    for ids in windows.split(2):
        with SubstitutedLookup(table, compressed.rows) as lookup:
            student = logits(model, ids)
        check_looked_up(lookup.calls, name)
        total += mean_divergence(logits(model, ids), student)[0] * len(ids)
    return total / len(windows)


def _order(windows: int, settings: FinetuneSettings) -> Tensor:
    """(steps, batch) int64: every window once before any comes again."""
    generator = torch.Generator().manual_seed(settings.seed)
    needed = settings.steps * settings.batch
    rounds = [torch.randperm(windows, generator=generator) for _ in range(-(-needed // windows))]
    return torch.cat(rounds)[:needed].reshape(settings.steps, settings.batch)


def _rate(step: int, steps: int) -> float:
    """A linear rise, then half a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / WARM_UP) * (LAST_RATE + (1 - LAST_RATE) * cosine)
