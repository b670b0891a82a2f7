"""Training a compressed table: a few hundred steps in which only the table and its codebook move.

The student looks tokens up in the table as differentiable k-means draws it (DKM, Cho et al., ICLR 2022): weights go
towards the entries near them, more sharply step by step, while the loss, the divergence of the student's predictions
from the model's own on text, moves weights, entries, scales, offset and kept rows. Entries start from k-means and are
trained themselves, so they are not iterated to a fixed point at every step. Rows that the text does not contain are not
trained; like all others they take their nearest entries at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ryzen_compile.errors import NumericalError, UsageError
from ryzen_compile.numerics.blockwise import row_chunks
from ryzen_compile.numerics.codebook import CodebookTensor, pack_codes
from ryzen_compile.numerics.divergence import mean_divergence
from ryzen_compile.numerics.dkm import DKMLayer, temperature_schedule
from ryzen_compile.train.lookup import SubstitutedLookup, check_looked_up, evaluating, find_table, logits

MEASURED = 8  # windows of the text that decide whether training helped
FEWEST_WINDOWS = 2 * MEASURED
WARM_UP = 20  # steps in which the rates rise
LAST_RATE = 0.05  # of the first, where the cosine ends
LOGITS = 1 << 25  # computed at a time; a batch of more is read in parts
EXACT = 1e-12  # mean squared error of a vector of size one: float32 has no better
LARGEST_SCALE = torch.finfo(torch.float16).max
# Learning rates. Weights, offset and kept rows are in units of an entry's root mean square, scales relative to what
# they were: the same rates fit tables of any size.
RATES = {"weights": 0.008, "codebook": 0.002, "scales": 0.0008, "offset": 0.002, "kept": 0.002}


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
    model: torch.nn.Module,
    name: str,
    start: CodebookTensor,
    windows: Tensor,
    settings: FinetuneSettings | None = None,
    progress: Callable[[float], None] | None = None,
) -> FinetuneResult:
    """Trains ``start`` in place of the model's parameter ``name`` (V, C), on text ``windows`` (n, T) int64.

    The last ``MEASURED`` windows are measured on, not trained on. Only lookups are replaced: a tied head keeps its
    weights. The model is left as it was. ``progress`` hears the share done.

    Raises ``UsageError`` for too little text, a parameter that is not there or of another shape, and a table of two
    stages or with a gain for each channel (its codes are chosen by other distances than those that draw weights), and
    ``NumericalError`` when the loss is not finite.
    """
    settings = settings or FinetuneSettings()
    table = find_table(model, name)
    _check(table, name, start, windows)
    train, held = windows[:-MEASURED], windows[-MEASURED:]
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        before = _divergence(model, name, table, start, held)
        trained = _Trained(start, table.detach(), train.unique())
        if trained.error < EXACT:  # the codes hold the table as it is
            return FinetuneResult(start, before, before)
        _train(model, table, trained, train, settings, progress)
        found = trained.hardened()
        after = _divergence(model, name, table, found, held)
    return FinetuneResult(found if after < before else start, before, after)


def _check(table: Tensor, name: str, start: CodebookTensor, windows: Tensor) -> None:
    if tuple(table.shape) != start.shape:
        raise UsageError(f"parameter {name!r} is {tuple(table.shape)}, the compressed table {start.shape}")
    if start.format.stages != 1 or start.gain is not None:
        raise UsageError(
            f"a table of {start.format.stages} stage(s) {'with' if start.gain is not None else 'without'} gain cannot "
            "be trained, expected one stage and no gain",
            hint="fit it with FitSettings(channel_gain=False)",
        )
    if len(windows) < FEWEST_WINDOWS:
        raise UsageError(
            f"{len(windows)} windows of text are too few to train on, expected at least {FEWEST_WINDOWS}",
            hint="give a longer calibration text, or use method 'kmeans'",
        )


class _Trained:
    """The rows ``ids`` (n,), ascending, of the table in training.

    ``weights`` (n, C) are divided by scale and ``unit``, the entries' root mean square: what entries are near to.
    """

    def __init__(self, start: CodebookTensor, table: Tensor, ids: Tensor) -> None:
        self.start, self.table, self.ids = start, table, ids
        entries = start.codebook[0]
        self.unit = float(entries.square().mean().sqrt()) or 1.0
        self.layer = DKMLayer(entries / self.unit, temperature=1.0, iterations=0)
        self.weights = self._normalised(ids).requires_grad_()
        self.scales = torch.ones(len(ids), max(1, start.format.groups(start.shape[1])), requires_grad=True)
        self.offset = torch.zeros(start.shape[1], requires_grad=True)
        self.kept = torch.zeros(0 if start.kept is None else len(start.kept), start.shape[1], requires_grad=True)
        self.error = self._mean_error()

    def parameter_groups(self) -> list[dict[str, object]]:
        """Of what ``start`` stores, nothing else."""
        stored = self.start.tensors
        groups = {"weights": self.weights, "codebook": self.layer.centroids}
        groups |= {n: getattr(self, n) for n in ("scales", "offset", "kept") if n in stored}
        return [{"params": [parameter], "rate": RATES[name]} for name, parameter in groups.items()]

    def rows(self, ids: Tensor) -> Tensor:
        """``ids`` (...), all of them trained -> (..., C): rows as they are at this temperature."""
        unique, places = ids.reshape(-1).unique(return_inverse=True)
        mine = torch.searchsorted(self.ids, unique)
        drawn = self.layer(self.weights[mine].reshape(-1, self.start.format.dim)).reshape(len(unique), -1)
        rows = drawn * self._spread(self._scales_of(unique) * self.scales[mine]) * self.unit
        rows = rows + self._offset()
        if self.start.slots is not None and self.start.kept is not None:
            slots = self.start.slots[unique].long()
            kept = self.start.kept.float() + self.kept * self.unit
            rows = torch.where((slots >= 0)[:, None], kept[slots.clamp(min=0)], rows)
        return rows[places].reshape(*ids.shape, -1)

    @torch.no_grad()
    def hardened(self) -> CodebookTensor:
        """The table with every vector, of all rows, at its nearest entry."""
        start, form, (rows, width) = self.start, self.start.format, self.start.shape
        codes = torch.empty(rows, form.codes(width), dtype=torch.uint8)
        for first, last in row_chunks(rows, width):
            ids = torch.arange(first, last)
            weights = self._normalised(ids)
            place = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
            mine = self.ids[place] == ids
            weights[mine] = self.weights[place[mine]]
            chosen, _ = self.layer.harden(weights.reshape(-1, form.dim))
            codes[first:last] = chosen.reshape(last - first, -1).to(torch.uint8)
        scales = None if start.scales is None else start.scales.clone()
        if scales is not None:
            moved = self._scales_of(self.ids) * self.scales
            scales[self.ids] = moved.clamp(-LARGEST_SCALE, LARGEST_SCALE).half()
        kept = None if start.kept is None else start.kept.float() + self.kept * self.unit
        return replace(
            start,
            codes=pack_codes(codes, form.bits),
            codebook=self.layer.centroids.detach()[None] * self.unit,
            scales=scales,
            offset=None if start.offset is None else self._offset().detach(),
            kept=None if kept is None or start.kept is None else kept.to(start.kept.dtype),
        )

    def _normalised(self, ids: Tensor) -> Tensor:
        """(n, C): rows of the table, less offset, over scale and unit; of a scale of 0 nothing is seen."""
        offset = 0.0 if self.start.offset is None else self.start.offset
        scales = self._scales_of(ids)
        divisor = self._spread(torch.where(scales == 0, 1.0, scales)) * self.unit
        return (self.table[ids].float() - offset) / divisor

    def _scales_of(self, ids: Tensor) -> Tensor:
        """(n, groups) float32, as they were at the start."""
        return torch.ones(len(ids), 1) if self.start.scales is None else self.start.scales[ids].float()

    def _offset(self) -> Tensor:
        return self.offset * self.unit if self.start.offset is None else self.start.offset + self.offset * self.unit

    def _spread(self, scales: Tensor) -> Tensor:
        """(n, groups) -> (n, C)."""
        return scales.repeat_interleave(self.start.shape[1] // scales.shape[1], dim=1)

    @torch.no_grad()
    def _mean_error(self) -> float:
        """Mean squared distance of a vector from its entry, of rows that are coded; 0 where there are none."""
        coded = torch.ones(len(self.ids), dtype=torch.bool)
        if self.start.slots is not None:
            coded = self.start.slots[self.ids] < 0
        sample = coded.nonzero()[:, 0][:: max(1, int(coded.sum()) // 1024)]
        if not len(sample):
            return 0.0
        points = self.weights[sample].reshape(-1, self.start.format.dim)
        codes, entries = self.layer.harden(points)
        return float((points - entries[codes]).square().sum(1).mean())


def _train(
    model: torch.nn.Module,
    table: Tensor,
    trained: _Trained,
    windows: Tensor,
    settings: FinetuneSettings,
    progress: Callable[[float], None] | None,
) -> None:
    optimizer = torch.optim.Adam(trained.parameter_groups(), lr=1.0, betas=(0.9, 0.95))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = _order(len(windows), settings)
    for step in range(settings.steps):
        if progress is not None:
            progress(step / settings.steps)
        done = step / max(1, settings.steps - 1)
        trained.layer.temperature = trained.error * temperature_schedule(done, *settings.temperatures)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * _rate(step, settings.steps)
        optimizer.zero_grad()
        _add_gradients(model, table, trained, windows[order[step]], parameters, step)
        optimizer.step()
    if progress is not None:
        progress(1.0)


def _add_gradients(
    model: torch.nn.Module, table: Tensor, trained: _Trained, ids: Tensor, parameters: list[Tensor], step: int
) -> None:
    """To ``parameters`` that of the mean KL(model || student) over the tokens of ``ids`` (B, T), part by part."""
    at_once = max(1, LOGITS // (ids.shape[1] * len(table)))
    for part in ids.split(at_once):
        with torch.no_grad():
            target = torch.log_softmax(logits(model, part), dim=-1)
        with SubstitutedLookup(table, part, trained.rows):
            student = torch.log_softmax(logits(model, part), dim=-1)
        loss = (target.exp() * (target - student)).sum(-1).mean() * (len(part) / len(ids))
        if not torch.isfinite(loss):
            raise NumericalError(f"the loss is {loss.item()} at step {step}", hint="use method 'kmeans'")
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
        ):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


@torch.no_grad()
def _divergence(model: torch.nn.Module, name: str, table: Tensor, compressed: CodebookTensor, windows: Tensor) -> float:
    """Mean over ``windows`` (n, T), nats per token."""
    total = 0.0
    for ids in windows.split(1):
        with SubstitutedLookup(table, ids, compressed.rows) as lookup:
            student = logits(model, ids)
        check_looked_up(lookup.calls, name)
        total += mean_divergence(logits(model, ids), student)[0]
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
