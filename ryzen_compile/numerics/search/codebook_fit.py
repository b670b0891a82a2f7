"""Choosing codes: a table as a ``CodebookTensor`` of the least squared error found.

    w ≈ (entry * scale) * gain + offset

Channels lose their mean and their size first, where that helps, then every row (or group of its weights) its size: what
is left are vectors that one small codebook serves. Codebook and codes come from k-means on a sample of rows, and from
then on everything is fitted in turns to the rest of it, in the error of the table itself: a coordinate counts as the
square of its scale and gain, times the weight of its row.

*   scales, in closed form for the codes, rounded to float16, then codes again for the rounded scales;
*   the codebook, in closed form for codes and scales. Two stages are solved for together (additive quantization,
    Babenko & Lempitsky, 2014), and their codes are the best of a beam: the ``BEAM`` nearest entries of the first stage,
    each with its nearest of the second. Measured on Gaussian vectors of 4 weights in two codes of 8 bits: the nearest
    of each stage 20.0 dB, the beam 20.9, both 21.1.

The last turn of the codebook sees the whole table; on a line, where a few weights far out decide the error of 8 bits,
k-means runs on a histogram of all weights. Rows are independent once the codebook stands, so they are read in chunks:
what is held besides the table and its result are codes before they are packed, a byte each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.blockwise import check_weight
from ryzen_compile.numerics.codebook import CodebookFormat, CodebookTensor
from ryzen_compile.numerics.search.kmeans import closeness, kmeans, nearest, spread

SAMPLE = 1 << 18  # vectors that a codebook is learned from
TRIAL = 1 << 15  # vectors that choose between transforms
ROUNDS = 5  # of Lloyd when codebook and scales are fitted in turns
CHANCE = 3e-3  # fall of the error, 0.013 dB, by which a transform must be better: starts of k-means differ by as much
BEAM = 8  # 16 give 0.1 dB more for twice the time
NARROW_BEAM = 2  # for codes that only a first guess of the scales is made with
BINS = 1 << 16  # of the histogram of all weights: some 256 to a cell of 8 bits
BEAM_SCORES = 1 << 21  # of vectors with entries at a time
CHUNK = 1 << 18  # weights of a table encoded at a time
# A group as short as this has scales better than the one that fits its size; these multiples of it are tried.
SHORT_GROUP = 128
WIDTHS = (0.85, 1.15)
HIGHEST_SCALE = torch.finfo(torch.float16).max
DAMPING = 1e-6  # of the joint codebooks, which may exchange a vector: towards what they were
Progress = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class FitSettings:
    """``centre`` and ``channel_gain`` may be used, and are where they lower the error on a sample of rows.

    ``rounds`` of fitting scales and codebook in turns. ``row_weights`` (V,), 0 or more: how much the squared error of a
    row counts. ``keep`` (n,): ids of rows that are stored as they are, in ``keep_dtype`` (float16 or float32).
    ``seed`` decides which rows are looked at.
    """

    centre: bool = True
    channel_gain: bool = True
    rounds: int = 3
    row_weights: Tensor | None = None
    keep: Tensor | None = None
    keep_dtype: torch.dtype = torch.float16
    seed: int = 0


def fit_codebook(
    table: Tensor, form: CodebookFormat, settings: FitSettings | None = None, progress: Progress | None = None
) -> CodebookTensor:
    """``table`` (V, C) of any floating-point type in ``form``; the same arguments give the same codes.

    ``progress`` hears the share of the work done, rising from 0 to 1. Raises ``UsageError`` for weights that are NaN or
    infinite, a width that does not fit ``form``, row weights that are negative, not finite or all 0 (of rows that are
    not kept), and kept rows that are not the table's, repeated or too large for ``keep_dtype``.
    """
    settings = settings or FitSettings()
    check_weight(table)
    form.check(table.shape[1])
    source = _Source.of(table.detach(), settings)
    say = progress or _unheard
    say(0.0)
    if not source.total:
        say(1.0)
        return _nothing_coded(source, form)
    model = _best_transform(source, form, settings)
    say(0.1)
    model = _learned(source, model, settings, lambda share: say(0.1 + 0.3 * share))
    return _encoded(source, model, say)


# --- what is fitted ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Source:
    """``table`` (V, C); ``weights`` (V,) float32 with a mean of 1, 0 for rows that are kept; ``keep`` (n,) int64."""

    table: Tensor
    weights: Tensor
    keep: Tensor
    keep_dtype: torch.dtype

    @classmethod
    def of(cls, table: Tensor, settings: FitSettings) -> _Source:
        rows, device = len(table), table.device
        weights = torch.ones(rows, device=device)
        if settings.row_weights is not None:
            weights = _checked_weights(settings.row_weights.detach().to(device), rows)
        keep = torch.empty(0, dtype=torch.int64, device=device)
        if settings.keep is not None:
            keep = _checked_ids(settings.keep.to(device), rows)
        if not isinstance(settings.rounds, int) or settings.rounds < 0:
            raise UsageError(f"rounds must be 0 or more, got {settings.rounds!r}")
        if settings.keep_dtype not in (torch.float16, torch.float32):
            raise UsageError(f"kept rows are stored in float16 or float32, got {settings.keep_dtype}")
        weights[keep] = 0
        if settings.row_weights is not None and len(keep) < rows and not weights.any():
            raise UsageError("the weights of all rows that are not kept are 0")
        return cls(table, weights / weights.mean().clamp(min=1e-30), keep, settings.keep_dtype)

    @property
    def total(self) -> int:
        """Rows that count."""
        return int((self.weights > 0).sum())

    def sample(self, vectors: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
        """Rows (R, C) float32 of about so many vectors, and their weights (R,)."""
        counted = self.weights.nonzero()[:, 0]
        rows = max(1, -(-vectors * dim // self.table.shape[1]))
        chosen = counted[spread(len(counted), rows, torch.Generator().manual_seed(seed)).to(counted.device)]
        return self.table[chosen].float(), self.weights[chosen]


@dataclass(frozen=True, eq=False)
class _Model:
    """Everything but the codes and scales.

    ``gain`` (C,) float32 is what ``codebook`` (stages, k, dim) is to be multiplied by for weights of the table; one
    number for all channels unless ``by_channel``. ``offset`` (C,) is 0 where there is none. ``importance`` (C,) is the
    square of the gain, with a mean of 1, or none where it is the same everywhere.
    """

    form: CodebookFormat
    gain: Tensor
    by_channel: bool
    offset: Tensor
    centred: bool
    importance: Tensor | None
    codebook: Tensor

    def points(self, rows: Tensor) -> Tensor:
        """Rows of the table (R, C) -> what entries times scales are to match, (R, G, group)."""
        divisor = torch.where(self.gain > 0, self.gain, 1.0)
        return ((rows.float() - self.offset) / divisor).unflatten(1, (max(1, self.form.groups(rows.shape[1])), -1))

    def grouped_importance(self, points: Tensor) -> Tensor:
        """(G, group), or a 1."""
        if self.importance is None:
            return points.new_ones(1, 1)
        return self.importance.view(points.shape[1:])

    def vector_importance(self, rows: int) -> Tensor | None:
        """(rows * C / dim, dim), or none."""
        if self.importance is None:
            return None
        return self.importance.view(-1, self.form.dim).repeat(rows, 1)

    def values(self, codes: Tensor) -> Tensor:
        """``codes`` (N, stages) -> (N, dim)."""
        found = self.codebook[0].index_select(0, codes[:, 0])
        if self.form.stages == 2:
            found += self.codebook[1].index_select(0, codes[:, 1])
        return found


def _transforms(source: _Source, form: CodebookFormat, settings: FitSettings) -> list[_Model]:
    """All that the settings allow, the plain one first. Statistics are weighted, and of the whole table."""
    width, device = source.table.shape[1], source.table.device
    total = torch.zeros(width, dtype=torch.float64, device=device)
    square = torch.zeros_like(total)
    for start, stop in _chunks(source.table):
        rows, weights = source.table[start:stop].double(), source.weights[start:stop].double()
        total += weights @ rows
        square += weights @ rows.square_()
    count = source.weights.double().sum()
    mean, square = total / count, square / count
    empty = torch.zeros(form.stages, form.entries, form.dim, device=device)
    found = []
    for centred in (False, True)[: 1 + settings.centre]:
        size = (square - mean.square()).clamp_(min=0) if centred else square
        # What rounding leaves of a channel that is constant counts as nothing.
        size = torch.where(size > square * 1e-12, size, 0.0)
        offset = mean.float() if centred else torch.zeros(width, device=device)
        for by_channel in (False, True)[: 1 + settings.channel_gain]:
            one = size.mean().expand(width)
            gain = (size if by_channel else torch.where(one > 0, one, 1.0)).sqrt().float()
            importance = (size / size.mean()).float() if by_channel and size.any() else None
            found.append(_Model(form, gain, by_channel, offset, centred, importance, empty))
    return found


def _best_transform(source: _Source, form: CodebookFormat, settings: FitSettings) -> _Model:
    """The one that serves a small sample of rows best, for its bytes: a bit of all weights quarters the error."""
    models = _transforms(source, form, settings)
    if len(models) == 1:
        return models[0]
    rows, weights = source.sample(TRIAL, form.dim, settings.seed)
    best, least = models[0], math.inf
    for model in models:
        tried = _started(model, rows, weights, ROUNDS, settings.seed)
        bits = 32 * (model.centred + model.by_channel) / len(source.table)  # of each weight
        error = _table_error(tried, rows, weights) * 4**bits
        if error < least * (1 - CHANCE):
            best, least = model, error
    return best


# --- the codebook -----------------------------------------------------------------------------------------------------


def _learned(source: _Source, model: _Model, settings: FitSettings, say: Progress) -> _Model:
    rows, weights = source.sample(SAMPLE, model.form.dim, settings.seed)
    model = _started(model, rows, weights, 25, settings.seed)
    say(0.5)
    best, least, scales = model, math.inf, None
    for done in range(settings.rounds + 1):
        codes, scales, error = _encode(model, rows, weights, scales)
        if error >= least:
            break
        best, least = model, error
        if done < settings.rounds:
            model = _refitted(model, rows, weights, codes, scales)
            say(0.5 + 0.5 * (done + 1) / settings.rounds)
    return best


def _started(model: _Model, rows: Tensor, weights: Tensor, iterations: int, seed: int) -> _Model:
    """A codebook from k-means, one stage after the other, for scales that are the sizes of their groups."""
    form = model.form
    points = model.points(rows)
    scales = _sizes(model, points)
    vectors = _divided(points, scales).reshape(-1, form.dim)
    counts = _counts(model, points, scales, weights)
    if not counts.any():  # nothing but zeros
        return model
    stages = []
    for stage in range(form.stages):
        stages.append(kmeans(vectors, form.entries, weights=counts, iterations=iterations, seed=seed))
        if stage + 1 < form.stages:
            vectors -= stages[-1][nearest(vectors, stages[-1], counts)]
    return replace(model, codebook=torch.stack(stages))


def _refitted(model: _Model, rows: Tensor, weights: Tensor, codes: Tensor, scales: Tensor) -> _Model:
    """The codebook again for the scales that were found; one stage alone takes a few rounds of Lloyd."""
    sums = _Sums(model)
    sums.add(model, rows, weights, codes, scales)
    model = replace(model, codebook=sums.solved(model.codebook))
    points = model.points(rows)
    vectors = _divided(points, scales).reshape(-1, model.form.dim)
    counts = _counts(model, points, scales, weights)
    if model.form.stages == 2 or not counts.any():
        return model
    start = model.codebook[0]
    found = kmeans(vectors, model.form.entries, weights=counts, start=start, iterations=ROUNDS, sample=len(vectors))
    return replace(model, codebook=found[None])


class _Sums:
    """Normal equations of all entries, of which a vector's stages add up: for every coordinate, or for all at once.

    ``mass`` (1 or dim, stages * k, stages * k) (of one stage: its diagonal) and ``match`` (dim, stages * k), float64.
    """

    def __init__(self, model: _Model) -> None:
        form, device = model.form, model.codebook.device
        self.entries, self.stages = form.entries, form.stages
        self.columns = 1 if model.importance is None else form.dim
        size = (self.entries,) if form.stages == 1 else (2 * self.entries, 2 * self.entries)
        self.mass = torch.zeros(self.columns, *size, dtype=torch.float64, device=device)
        self.match = torch.zeros(form.dim, form.stages * form.entries, dtype=torch.float64, device=device)

    def add(self, model: _Model, rows: Tensor, weights: Tensor, codes: Tensor, scales: Tensor) -> None:
        """``rows`` (R, C) of the table with ``codes`` (R, stages, C / dim) and ``scales`` (R, G)."""
        points = model.points(rows)
        counts = _counts(model, points, scales, weights)
        heavy = _divided(points, scales).reshape(-1, model.form.dim) * counts
        codes = codes.transpose(1, 2).reshape(-1, self.stages).long()
        k = self.entries
        for column in range(self.columns):
            count = counts[:, column].double()
            if self.stages == 1:
                self.mass[column] += torch.bincount(codes[:, 0], count, k)
                continue
            pairs = torch.bincount(codes[:, 0] * k + codes[:, 1], count, k * k).view(k, k)
            self.mass[column, :k, k:] += pairs
            self.mass[column, k:, :k] += pairs.T
            self.mass[column].diagonal().add_(torch.cat([pairs.sum(1), pairs.sum(0)]))
        for column in range(model.form.dim):
            each = [torch.bincount(codes[:, stage], heavy[:, column].double(), k) for stage in range(self.stages)]
            self.match[column] += torch.cat(each)

    def solved(self, before: Tensor) -> Tensor:
        """(stages, k, dim) float32; entries that nothing uses stay as ``before``."""
        old = before.double().permute(2, 0, 1).flatten(1)  # (dim, stages * k)
        if self.stages == 1:
            found = torch.where(self.mass > 0, self.match / self.mass, old)
        else:
            damping = DAMPING * self.mass.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-300)
            system = self.mass + torch.diag_embed(damping[:, None].expand(-1, self.mass.shape[1]))
            rest = self.match - (self.mass @ old[..., None])[..., 0]
            found = old + torch.linalg.solve(system.expand(len(old), -1, -1), rest)
        found = found.unflatten(1, before.shape[:2]).permute(1, 2, 0).float().contiguous()
        return found.sort(1).values if self.stages == 1 and found.shape[2] == 1 else found


class _Histogram:
    """All single weights over their scales, in bins that are finer towards 0: with k-means, a codebook for them.

    ``mass`` and ``total`` (``BINS``,) float64 of what fell into a bin, so that only the borders of cells are rounded.
    """

    def __init__(self, model: _Model) -> None:
        self.mass = torch.zeros(BINS, dtype=torch.float64, device=model.codebook.device)
        self.total = torch.zeros_like(self.mass)

    def add(self, model: _Model, rows: Tensor, weights: Tensor, _: Tensor, scales: Tensor) -> None:
        points = model.points(rows)
        values = _divided(points, scales).reshape(-1)
        counts = _counts(model, points, scales, weights)[:, 0].double()
        bins = (values / (1 + values.abs())).add_(1).mul_(BINS / 2).int().clamp_(0, BINS - 1)
        self.mass += torch.bincount(bins, counts, BINS)
        self.total += torch.bincount(bins, counts.mul_(values), BINS)

    def solved(self, before: Tensor) -> Tensor:
        used = self.mass > 0
        if not used.any():
            return before
        mass = self.mass[used]
        means = (self.total[used] / mass).float()
        return kmeans(means[:, None], before.shape[1], weights=(mass / mass.mean()).float())[None]


# --- codes and scales -------------------------------------------------------------------------------------------------


def _encode(model: _Model, rows: Tensor, weights: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """``rows`` (R, C) -> codes (R, stages, C / dim) uint8, scales (R, G) float32 that float16 holds, and their error.

    ``scales`` are where the search for better ones starts, else the sizes of the groups.
    """
    codes, found = [], []
    error = 0.0
    step = max(1, CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        one = _encode_chunk(model, rows[part], None if scales is None else scales[part])
        codes.append(one[0])
        found.append(one[1])
        error += float((one[2].double().sum(1) * weights[part].double()).sum())
    return torch.cat(codes), torch.cat(found), error


def _encode_chunk(model: _Model, rows: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, squared errors (R, G)), of each group the best of what was tried."""
    points = model.points(rows)
    if model.form.group is None:
        best = _Tried(model, points, _sizes(model, points), BEAM)
    else:
        best = _Tried(model, points, _guessed(model, points) if scales is None else scales, BEAM)
        best.take_better_scales()
    return best.codes.to(torch.uint8), best.scales, best.errors


def _guessed(model: _Model, points: Tensor) -> Tensor:
    """Scales (R, G): fitted to the codes for the sizes of the groups; for short groups, the best of several such."""
    size = _halved(_sizes(model, points))
    best = _Tried(model, points, size, NARROW_BEAM)
    best.take_better_scales()
    for width in WIDTHS if points.shape[2] <= SHORT_GROUP else ():
        other = _Tried(model, points, _halved(size * width), NARROW_BEAM)
        other.take_better_scales()
        better = other.errors < best.errors
        best.scales = torch.where(better, other.scales, best.scales)
        best.errors = torch.where(better, other.errors, best.errors)
    return best.scales


class _Tried:
    """The best codes of ``points`` (R, G, group) for given ``scales`` (R, G), and their squared ``errors`` (R, G)."""

    def __init__(self, model: _Model, points: Tensor, scales: Tensor, beam: int) -> None:
        self.points, self.scales = points, scales
        self.importance = model.grouped_importance(points)
        rows, form = len(points), model.form
        vectors = _divided(points, scales).reshape(-1, form.dim)
        codes = _codes(model, vectors, model.vector_importance(rows), beam)
        self.values = model.values(codes).view(points.shape)
        self.codes = codes.view(rows, -1, form.stages).transpose(1, 2)
        self.errors = self._errors(scales)

    def take_better_scales(self) -> None:
        """The scales of the least error for these codes, as float16 holds them, wherever that helps."""
        heavy = self.values * self.importance
        match, size = (heavy * self.points).sum(-1), (heavy * self.values).sum(-1)
        fitted = _halved(torch.where(size > 0, match / size, self.scales))
        errors = self._errors(fitted)
        better = errors < self.errors
        self.scales = torch.where(better, fitted, self.scales)
        self.errors = torch.where(better, errors, self.errors)

    def _errors(self, scales: Tensor) -> Tensor:
        return (self.values * scales[..., None]).sub_(self.points).square_().mul_(self.importance).sum(-1)


def _codes(model: _Model, vectors: Tensor, importance: Tensor | None, beam: int) -> Tensor:
    """``vectors`` (N, dim) -> (N, stages) integers."""
    if model.form.stages == 1:
        return nearest(vectors, model.codebook[0], importance)[:, None]
    codes = torch.empty(len(vectors), 2, dtype=torch.int32, device=vectors.device)
    step = max(1, BEAM_SCORES // model.form.entries)
    for start in range(0, len(vectors), step):
        part = slice(start, start + step)
        codes[part] = _beam(model.codebook, vectors[part], None if importance is None else importance[part], beam)
    return codes


def _beam(codebook: Tensor, vectors: Tensor, importance: Tensor | None, beam: int) -> Tensor:
    first, second = codebook
    firsts = closeness(vectors, first, importance).topk(min(beam, len(first)), 1).indices
    least = vectors.new_full((len(vectors),), torch.inf)
    best = torch.zeros(len(vectors), 2, dtype=torch.int32, device=vectors.device)
    for candidate in firsts.int().T:
        rest = vectors - first.index_select(0, candidate)
        code = closeness(rest, second, importance).argmax(1).int()
        error = rest.sub_(second.index_select(0, code)).square_()
        error = (error if importance is None else error.mul_(importance)).sum(1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better[:, None], torch.stack([candidate, code], 1), best)
    return best


def _sizes(model: _Model, points: Tensor) -> Tensor:
    """(R, G): root of the weighted mean square; 1 where the format has no scales."""
    if model.form.group is None:
        return points.new_ones(points.shape[:2])
    importance = model.grouped_importance(points).expand(points.shape[1:])
    return ((points.square() * importance).sum(-1) / importance.sum(-1).clamp(min=1e-30)).sqrt_()


def _divided(points: Tensor, scales: Tensor) -> Tensor:
    """``points`` (R, G, group) over ``scales`` (R, G); nothing where the scale is 0, whatever the code may be."""
    return torch.where(scales[..., None] != 0, points / scales[..., None], 0.0)


def _counts(model: _Model, points: Tensor, scales: Tensor, weights: Tensor) -> Tensor:
    """(N, 1 or dim): how much the error of a vector (or of each of its coordinates) counts, before its scale."""
    counts = scales.square() * weights[:, None]
    if model.importance is None:
        per_group = points.shape[2] // model.form.dim
        return counts.repeat_interleave(per_group, 1).reshape(-1, 1)
    return (counts[..., None] * model.grouped_importance(points)).reshape(-1, model.form.dim)


def _halved(scales: Tensor) -> Tensor:
    """As float16 holds them."""
    return scales.clamp(-HIGHEST_SCALE, HIGHEST_SCALE).half().float()


def _table_error(model: _Model, rows: Tensor, weights: Tensor) -> float:
    """In units of the table, so that models of different gains can be compared."""
    error = _encode(model, rows, weights)[2]
    return error * float(model.gain.double().square().mean())


# --- the whole table --------------------------------------------------------------------------------------------------


def _encoded(source: _Source, model: _Model, say: Progress) -> CodebookTensor:
    """Once through the table for the codebook (twice for single weights, which is cheap), once for the codes."""
    form, (rows, width) = model.form, source.table.shape
    codes = torch.empty(rows, form.stages, form.codes(width), dtype=torch.uint8, device=source.table.device)
    scales = torch.empty(rows, max(1, form.groups(width)), device=source.table.device)
    line = form.dim == form.stages == 1
    turns = 2 if line else 1
    for turn in range(turns + 1):
        sums = _Histogram(model) if line else _Sums(model)
        for start, stop in _chunks(source.table):
            part = slice(start, stop)
            known = scales[part] if turn else None
            codes[part], scales[part], _ = _encode(model, source.table[part], source.weights[part], known)
            if turn < turns:
                sums.add(model, source.table[part], source.weights[part], codes[part], scales[part])
            say(0.4 + 0.6 * (turn + stop / rows) / (turns + 1))
        if turn < turns:
            model = replace(model, codebook=sums.solved(model.codebook))
    codes[source.keep], scales[source.keep] = 0, 0
    return _stored(source, model, codes, scales)


def _stored(source: _Source, model: _Model, codes: Tensor, scales: Tensor) -> CodebookTensor:
    """A gain that all channels share is the codebook's own size."""
    return CodebookTensor.from_codes(
        codes,
        model.codebook if model.by_channel else model.codebook * model.gain[0],
        model.form,
        source.table.shape[1],
        scales=None if model.form.group is None else scales,
        gain=model.gain if model.by_channel else None,
        offset=model.offset if model.centred else None,
        kept_ids=source.keep if len(source.keep) else None,
        kept=source.table[source.keep].to(source.keep_dtype) if len(source.keep) else None,
    )


def _nothing_coded(source: _Source, form: CodebookFormat) -> CodebookTensor:
    """A table without rows, or whose rows are all kept."""
    rows, width = source.table.shape
    device = source.table.device
    plain = torch.ones(width, device=device)
    empty = torch.zeros(form.stages, form.entries, form.dim, device=device)
    codes = torch.zeros(rows, form.stages, form.codes(width), dtype=torch.uint8, device=device)
    model = _Model(form, plain, False, torch.zeros_like(plain), False, None, empty)
    return _stored(source, model, codes, torch.zeros(rows, form.groups(width), device=device))


def _chunks(table: Tensor) -> list[tuple[int, int]]:
    step = max(1, CHUNK // table.shape[1])
    return [(start, min(start + step, len(table))) for start in range(0, len(table), step)]


def _unheard(share: float) -> None:
    """Progress that nobody asked for."""


def _checked_weights(weights: Tensor, rows: int) -> Tensor:
    if tuple(weights.shape) != (rows,):
        raise UsageError(f"row weights must be {(rows,)}, got {tuple(weights.shape)}")
    weights = weights.to(torch.float32, copy=True)
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise UsageError("row weights must be finite and 0 or more")
    return weights


def _checked_ids(ids: Tensor, rows: int) -> Tensor:
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UsageError(f"the ids of kept rows must be (n,) integers, got {ids.dtype} {tuple(ids.shape)}")
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < rows):
        raise UsageError(f"the ids of kept rows must be 0 to {rows - 1}, got {int(ids.min())} to {int(ids.max())}")
    return ids.long()
