"""Does the artifact's table of tokens still say what the model's says? Row by row, so that one damaged entry shows."""

from __future__ import annotations

from typing import Any

import numpy as np

from ryzen_compile.errors import UnsupportedError
from ryzen_compile.validate.measured import Measured
from ryzen_compile.validate.optimization.measurements import Measurements
from ryzen_compile.validate.outcome import Outcome, Target, judge

ROWS = 65_536  # at most, spread over the vocabulary
# A row's error over its length, at most. Two-bit codes leave about a third; a row of another token is off by 1.4.
WORST = Target(value=0.75, at_least=False)
NAMED = 5


def table_rows(found: Measurements) -> Outcome:
    """The largest relative error of a row. Names the tokens whose rows are off by more than ``WORST`` allows.

    Raises ``UnsupportedError`` for a model without a table of its own and a graph that looks nothing up.
    """
    from ryzen_compile.backends.onnxruntime.lookup_rows import lookup_rows

    table = _table(found.subject.baseline)
    vocab = min(len(table), found.subject.model.spec.vocab)
    ids = np.unique(np.linspace(0, vocab - 1, min(vocab, ROWS)).astype(np.int64))
    found.say("rows of the table")
    own = lookup_rows(found.subject.artifact, ids)
    theirs = table[ids].float().numpy()
    if own.shape != theirs.shape:
        raise UnsupportedError(f"rows of the graph are {own.shape[1]} wide, those of the model {theirs.shape[1]}")
    sizes = np.linalg.norm(theirs, axis=1)
    floor = max(float(np.median(sizes)), 1e-30) * 1e-3  # a row of zeros has no relative error
    errors = np.linalg.norm(own - theirs, axis=1) / np.maximum(sizes, floor)
    errors[~np.isfinite(errors)] = np.inf
    worst = Measured(value=float(errors.max()), unit="share", samples=len(ids))
    status, reason = judge(worst, WORST)
    off = [int(one) for one in ids[np.argsort(-errors)] if errors[np.searchsorted(ids, one)] > WORST.value]
    return Outcome(
        component="embedding",
        check="table_rows",
        status=status,
        measured=worst,
        target=WORST,
        reason=reason,
        culprit=_named(found, off) if off else "",
        details={"rows": len(ids), "rows_off": len(off), "mean_error": float(errors.mean())},
    )


def _table(model: Any) -> Any:
    """(V, C), the weights that the model looks tokens up in."""
    module = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2:
        raise UnsupportedError("the model does not say which of its weights is the table of tokens")
    return weight.detach()


def _named(found: Measurements, ids: list[int]) -> str:
    tokenizer: Any = found.subject.model.tokenizer
    shown = [f"{one} ({tokenizer.decode([one])!r})" if tokenizer is not None else str(one) for one in ids[:NAMED]]
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return f"the table's rows of tokens {', '.join(shown)}{more}"
