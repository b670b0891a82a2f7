"""A table whose rows are drawn to the entries of a codebook, softly enough to train through (DKM, Cho et al., 2022).

    x = (w - offset_0) / s_0                 what is clustered: a row w of the table, less its offset, over its size
    y = soft(x) * s + offset                 what stands for the row: s = s_0 (1 + scale), offset = offset_0 + ...

``s_0`` is the row's root mean square times a factor that was fitted when the table was clustered, so sizes follow the
weights while these are trained. What is trained beside them is how far entries, scales and offset are from where
clustering put them, 0 at first: a weight decay pulls towards k-means. Their units are such that at one learning rate
they move by ``SHARES`` of what weights move by, in an optimizer whose steps do not depend on the size of gradients.
Entries move by their gradients; they are not iterated to a fixed point at each step, which would have to see the whole
table.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.blockwise import row_chunks
from ryzen_compile.numerics.codebook import CodebookFormat, CodebookTensor, pack_codes
from ryzen_compile.numerics.dkm import DKMLayer
from ryzen_compile.numerics.search.codebook_fit import FitSettings, fit_codebook
from ryzen_compile.numerics.search.kmeans import nearest
from ryzen_compile.train.distributed import gathered
from ryzen_compile.train.dkm_finetune import EXACT, LARGEST_SCALE, RATES

SAMPLE = 1024  # rows that the error of clustering is measured on
SHARES = {name: RATES[name] / RATES["weights"] for name in ("codebook", "scales", "offset")}
LEAST = 1e-30  # mean square of a row; of less, nothing is left to divide by


class SoftTable(nn.Module):
    """Of a table (``rows``, ``width``): ``codebook`` (k, dim), ``scales`` (rows,), ``offset`` (width,) are trained.

    The shapes are those of ``widest``; a format of fewer bits, which ``cluster`` may be given later, uses the first
    entries. ``temperature`` is in units of a vector's mean squared error when it was clustered. The table itself is
    handed in, never held. Buffers are not part of the model's state: see ``DkmComponent.state``.
    """

    start_codebook: Tensor
    start_scales: Tensor
    start_offset: Tensor

    def __init__(self, rows: int, width: int, widest: CodebookFormat) -> None:
        super().__init__()
        widest.check(width)
        self.shape, self.form = (rows, width), widest
        self.active = False
        self.temperature = 1.0
        # Root mean squares of an entry, and of the table's weights less their offset; mean squared error of a vector.
        self.unit, self.spread, self.error = 1.0, 1.0, 1.0
        self.codebook = nn.Parameter(torch.zeros(widest.entries, widest.dim))
        self.scales = nn.Parameter(torch.zeros(rows))
        self.offset = nn.Parameter(torch.zeros(width))
        for name, parameter in list(self.named_parameters()):
            self.register_buffer(f"start_{name}", torch.zeros_like(parameter), persistent=False)
        # A function with a temperature: the entries are handed to it.
        self._soft = (DKMLayer(torch.zeros(1, widest.dim), temperature=1.0, iterations=0),)

    # --- rows ---------------------------------------------------------------------------------------------------------
    def lookup(self, table: Tensor, ids: Tensor, padding: int | None = None) -> Tensor:
        """Rows (..., C) float32 for ``ids`` (...) of ``table`` (V, C); in evaluation those of ``hardened``, to the bit.

        Each id is drawn once, however often it occurs. The row ``padding`` has no gradient, as in ``nn.Embedding``.
        """
        unique, places = ids.reshape(-1).unique(return_inverse=True)
        with torch.autocast(table.device.type, enabled=False):  # distances in half precision choose other codes
            weights = nn.functional.embedding(unique, table).float()
            rows = self._drawn(weights, unique) if self.training else self._nearest(weights, unique)
            if padding is not None:
                rows = torch.where((unique == padding)[:, None], rows.detach(), rows)
            return nn.functional.embedding(places.reshape(ids.shape), rows)

    def idle(self) -> Tensor:
        """A 0 that depends on every parameter: processes that average gradients wait for those of all parameters."""
        total: Tensor = self.codebook.sum() + self.scales.sum() + self.offset.sum()
        return 0.0 * total

    def _drawn(self, weights: Tensor, ids: Tensor) -> Tensor:
        sizes = self._sizes(weights, ids)
        (soft,) = self._soft
        soft.temperature = max(self.error, EXACT) * self.temperature
        vectors = self._points(weights, sizes).reshape(-1, self.form.dim)
        drawn: Tensor = functional_call(soft, {"centroids": self._entries()}, (vectors,))
        return drawn.reshape(weights.shape) * self.unit * self._scales(sizes, ids) + self._offset()

    def _nearest(self, weights: Tensor, ids: Tensor) -> Tensor:
        codes, scales = self._coded(weights, ids)
        entries = self._entries() * self.unit
        return entries[codes].reshape(weights.shape) * scales.float() + self._offset()

    def _coded(self, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (n * C / dim,) and scales (n, 1) float16."""
        sizes = self._sizes(weights, ids)
        codes = nearest(self._points(weights, sizes).reshape(-1, self.form.dim), self._entries())
        return codes, self._scales(sizes, ids).clamp(-LARGEST_SCALE, LARGEST_SCALE).half()

    def _sizes(self, weights: Tensor, ids: Tensor) -> Tensor:
        """(n, 1), of the table's unit."""
        return _root_mean_square(weights - self.start_offset) * self.start_scales[ids, None]

    def _points(self, weights: Tensor, sizes: Tensor) -> Tensor:
        """(n, C) in units of an entry."""
        return (weights - self.start_offset) / sizes

    def _scales(self, sizes: Tensor, ids: Tensor) -> Tensor:
        """(n, 1) that entries are multiplied by."""
        return sizes * (1 + self._moved("scales")[ids, None]) / self.unit

    def _entries(self) -> Tensor:
        return (self.start_codebook + self._moved("codebook"))[: self.form.entries]

    def _offset(self) -> Tensor:
        return self.start_offset + self._moved("offset") * self.spread

    def _moved(self, name: str) -> Tensor:
        """By how much, in units of what it is."""
        parameter: Tensor = getattr(self, name)
        return parameter * (SHARES[name] / self.spread)

    # --- the whole table ----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def cluster(self, table: Tensor, form: CodebookFormat) -> None:
        """Begins anew, in ``form``, from k-means of ``table`` (V, C). Raises ``UsageError`` for weights that are not
        finite and a format other than the widest but for fewer bits."""
        if form.dim != self.form.dim or form.entries > len(self.codebook) or form.group != 0 or form.stages != 1:
            raise UsageError(f"{form} does not fit {len(self.codebook)} entries of {self.form.dim} weights")
        table = gathered(table).float()
        found = fit_codebook(table, form, FitSettings(channel_gain=False))
        entries = found.codebook[0]
        self.form = form
        self.unit = float(entries.square().mean().sqrt()) or 1.0
        self.start_codebook.zero_()[: form.entries] = entries / self.unit
        self.start_offset.zero_()
        if found.offset is not None:
            self.start_offset.copy_(found.offset)
        squares = 0.0
        for first, last in row_chunks(*self.shape):
            sizes = _root_mean_square(table[first:last] - self.start_offset)[:, 0]
            squares += float(sizes.double().square().sum())
            scales = _present(found.scales)[first:last, 0].float() * self.unit / sizes
            # A row of zeros has no size; what it is multiplied by if it gets one is anybody's guess.
            self.start_scales[first:last] = torch.where(scales == 0, 1.0, scales)
        self.spread = math.sqrt(squares / self.shape[0]) if squares > EXACT else 1.0
        for parameter in self.parameters():
            parameter.zero_()
        self.error = self._mean_error(table)
        self._agree()

    @torch.no_grad()
    def hardened(self, table: Tensor) -> CodebookTensor:
        """Every vector of ``table`` (V, C) at its nearest entry, on the CPU."""
        table = gathered(table)
        form, (rows, width) = self.form, self.shape
        codes = torch.empty(rows, form.codes(width), dtype=torch.uint8)
        scales = torch.empty(rows, 1, dtype=torch.float16)
        for first, last in row_chunks(rows, width):
            ids = torch.arange(first, last, device=table.device)
            chosen, found = self._coded(table[first:last].float(), ids)
            codes[first:last], scales[first:last] = chosen.reshape(last - first, -1).cpu(), found.cpu()
        codebook = (self._entries() * self.unit).cpu()[None]
        return CodebookTensor(
            form, self.shape, pack_codes(codes, form.bits), codebook, scales, offset=self._offset().cpu()
        )

    def _mean_error(self, table: Tensor) -> float:
        """Mean squared distance of a vector from its entry, in units, on a sample of rows."""
        ids = torch.arange(0, len(table), max(1, len(table) // SAMPLE), device=table.device)
        points = self._points(table[ids], self._sizes(table[ids], ids)).reshape(-1, self.form.dim)
        chosen = self._entries()[nearest(points, self._entries())]
        return float((points - chosen).square().sum(1).mean())

    def _agree(self) -> None:
        """The first process's clusters are everybody's: rounding may differ between machines."""
        if not several_processes():
            return
        numbers = torch.tensor(
            [self.unit, self.spread, self.error], dtype=torch.float64, device=self.start_codebook.device
        )
        for tensor in (self.start_codebook, self.start_scales, self.start_offset, numbers):
            torch.distributed.broadcast(tensor, 0)
        self.unit, self.spread, self.error = numbers.tolist()


def _root_mean_square(rows: Tensor) -> Tensor:
    """(n, C) -> (n, 1), never 0."""
    return rows.square().mean(1, keepdim=True).clamp(min=LEAST).sqrt()


def several_processes() -> bool:
    """Whether gradients are averaged over processes, even if there is one."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise UsageError("a clustered table has a scale a row, got none")
    return tensor
