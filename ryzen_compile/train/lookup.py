"""Standing in for a table of a model while it runs: the rows that its tokens get come from a function of ours.

A lookup is found by what is called, ``embedding(ids, table)`` with the model's own ids on the very parameter, whatever
module calls it. A head that shares the parameter goes on reading it, other ids get their rows from it, and the model
itself is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ryzen_compile.errors import UsageError


class SubstitutedLookup(TorchFunctionMode):
    """Inside, ``embedding(ids, table)`` gives ``rows(ids)``, (..., C) for the given ``ids`` (...), in the table's type.

    ``calls`` counts them. Lookups of anything else are left alone.
    """

    def __init__(self, table: Tensor, ids: Tensor, rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._table, self._ids, self._rows = table, ids.reshape(-1), rows
        self.calls = 0

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is nn.functional.embedding:
            bound = dict(zip(("input", "weight"), args, strict=False)) | given
            if bound["weight"] is self._table and torch.equal(bound["input"].reshape(-1), self._ids):
                self.calls += 1
                return self._rows(bound["input"]).to(self._table.dtype)
        return func(*args, **given)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model without dropout; each of its modules is left in the mode that it was in."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, training in before.items():
            module.training = training


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(B, T, V) float32 for ``ids`` (B, T), whatever the model wraps them in."""
    result: Any = model(ids)
    found: Any = getattr(result, "logits", result)
    values: Tensor = found[0] if isinstance(found, tuple) else found
    return values.float()


def find_table(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter ``name``. Raises ``UsageError`` if the model has none."""
    found = dict(model.named_parameters(remove_duplicate=False)).get(name)
    if found is None:
        raise UsageError(
            f"{name!r} is no parameter of the model, so nothing about it can be learned from text",
            hint="method 'kmeans' with weighting 'frequency' looks at the table alone",
        )
    return found


def check_looked_up(calls: int, name: str) -> None:
    """Raises ``UsageError`` unless the model's tokens were looked up in the table, and once."""
    if calls != 1:
        raise UsageError(
            f"the model looks its tokens up in {name} {calls} times through torch.nn.functional.embedding, expected "
            "once",
            hint="method 'kmeans' with weighting 'frequency' looks at the table alone",
        )
