"""MaskSpec: which keys a query may see, as three facts instead of a tensor.

A Hugging Face model builds a mask *function* ``f(batch, head, query, key) -> bool``. Reading its name would tie us to
one release; evaluating it on a few rows says what it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ryzen_compile.errors import UnsupportedError

REACH = 40_000  # a row this long tells every window in use from "no window"


@dataclass(frozen=True)
class MaskSpec:
    """A query sees keys less than ``window`` positions away, itself included; 0 means all of them. ``causal``: none
    behind itself, else a window reaches as far to both sides."""

    causal: bool = True
    window: int = 0


def read_mask(function: Callable, hint: int | None = None, *, length: int | None = None) -> MaskSpec:
    """Evaluates ``function`` on whole rows and names what it is; raises ``UnsupportedError`` for anything else.

    ``hint`` is a window or chunk length that the caller knows of; it only makes the rows longer when needed. ``length``
    bounds the rows of a function that is defined on so many positions only: a window as long cannot be told from none.
    """
    length = length or max(REACH, 4 * (hint or 0) + 3)
    rows = sorted({max(length - 2, 0), length - 1, length // 2, length // 3, 0})  # neighbours tell window from chunk
    keys = torch.arange(length)
    zero = torch.zeros((), dtype=torch.long)
    seen = {q: torch.as_tensor(function(zero, zero, torch.tensor(q), keys)).expand(length) for q in rows}
    causal = not any(bool(row[q + 1 :].any()) for q, row in seen.items())
    window = int(seen[length - 1].sum())
    spec = MaskSpec(causal, 0 if window == length else window)
    for q, row in seen.items():
        expected = keys <= q if causal else torch.ones(length, dtype=torch.bool)
        if spec.window:
            expected = expected & ((keys - q).abs() < spec.window)
        if not torch.equal(row, expected):
            raise UnsupportedError(
                f"the attention mask is neither causal, windowed nor full: query {q} sees {int(row.sum())} keys, "
                f"expected {int(expected.sum())} for {spec}",
                hint="chunked, block-wise and packed-sequence masks are not supported yet",
            )
    return spec
