"""How far a decoded table is from the one it was made of, and how far any code of that size could have come."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.blockwise import row_chunks
from ryzen_compile.numerics.codebook import CodebookTensor, unpack_codes
from ryzen_compile.numerics.divergence import mean_divergence

LOGITS = 1 << 24  # of states with rows at a time
DECIBELS_PER_BIT = 20 * math.log10(2)  # Shannon's bound for a Gaussian source: 6.02 dB for each bit of a number


@dataclass(frozen=True)
class TableQuality:
    """``relative_error`` is that of the Frobenius norm, ``sqnr`` the same in dB, ``cosine`` the mean over rows that
    were not zero (0 for one that became so). ``kl`` is the mean divergence of the predictions that states would get
    from the table as a head, nats, or none without states."""

    relative_error: float
    sqnr: float
    cosine: float
    kl: float | None = None


@dataclass(frozen=True)
class TableStats:
    """``bits`` per weight with everything counted, ``ratio`` to float32, ``kept`` rows, the share of codebook entries
    in use, the codes' first-order entropy per weight, and the SQNR in dB that no code of as many ``bits`` can exceed on
    independent Gaussian weights (Shannon, 1959)."""

    nbytes: int
    bits: float
    ratio: float
    kept: int
    entries_used: float
    entropy: float
    bound: float


def table_quality(table: Tensor, decoded: Tensor, hidden: Tensor | None = None) -> TableQuality:
    """``table`` and ``decoded`` (V, C), ``hidden`` (N, C) states that both are a head of. Sums are taken in float64.

    Raises ``UsageError`` for shapes that differ.
    """
    if table.shape != decoded.shape or table.ndim != 2:
        raise UsageError(f"a table {tuple(table.shape)} cannot be compared with one of {tuple(decoded.shape)}")
    signal = noise = cosines = 0.0
    counted = 0
    for start, stop in row_chunks(*table.shape):
        one, other = table[start:stop].double(), decoded[start:stop].double()
        signal += float(one.square().sum())
        noise += float((one - other).square().sum())
        norms = one.norm(dim=1) * other.norm(dim=1)
        cosines += float(((one * other).sum(1) / torch.where(norms > 0, norms, 1.0)).sum())
        counted += int(one.any(1).sum())
    relative = math.sqrt(noise / signal) if signal else 0.0 if not noise else math.inf
    sqnr = -20 * math.log10(relative) if 0 < relative < math.inf else math.inf if not relative else -math.inf
    kl = None if hidden is None else _divergence(table.float(), decoded.float(), hidden.float())
    return TableQuality(relative, sqnr, cosines / counted if counted else 1.0, kl)


def _divergence(table: Tensor, decoded: Tensor, hidden: Tensor) -> float:
    """Mean over states, a few states' logits at a time."""
    parts = hidden.split(max(1, LOGITS // len(table)))
    return sum(mean_divergence(h @ table.T, h @ decoded.T)[0] * len(h) for h in parts) / len(hidden)


def table_stats(tensor: CodebookTensor) -> TableStats:
    """What ``tensor`` takes, and how well its codes use it; rows that are kept have no codes that count."""
    form, (rows, width) = tensor.format, tensor.shape
    counts = torch.zeros(form.stages, form.entries, dtype=torch.float64)
    coded = torch.ones(rows, dtype=torch.bool) if tensor.slots is None else tensor.slots.cpu() < 0
    for start, stop in row_chunks(rows, width):
        part = unpack_codes(tensor.codes[start:stop].cpu(), form.bits, form.stages * form.codes(width))
        part = part.unflatten(1, (form.stages, -1))[coded[start:stop]]
        for stage in range(form.stages):
            counts[stage] += torch.bincount(part[:, stage].reshape(-1).int(), minlength=form.entries)
    used, entropy = 0, 0.0
    for stage in range(form.stages):
        shares = counts[stage][counts[stage] > 0] / counts[stage].sum()
        used += len(shares)
        entropy -= float((shares * shares.log2()).sum()) / form.dim
    bits = tensor.bits_per_weight
    kept = 0 if tensor.kept is None else len(tensor.kept)
    share = used / (form.stages * form.entries)
    return TableStats(tensor.nbytes, bits, 32 / bits, kept, share, entropy, DECIBELS_PER_BIT * bits)
