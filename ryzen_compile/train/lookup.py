"""Standing in for a table of a model while it runs: the rows that tokens get come from a function of ours.

A lookup is found by what is called, ``embedding(ids, table)`` on the very parameter, whatever module calls it; a head
that shares the parameter goes on reading it, and the model itself is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ryzen_compile.errors import UsageError


class SubstitutedLookup(TorchFunctionMode):
    """Inside, ``embedding(ids, table)`` gives ``rows(ids)``, (..., C) for ids (...) int64. ``calls`` counts them."""

    def __init__(self, table: Tensor, rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._table, self._rows = table, rows
        self.calls = 0

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is nn.functional.embedding:
            bound = dict(zip(("input", "weight"), args, strict=False)) | given
            if bound["weight"] is self._table:
                self.calls += 1
                return self._rows(bound["input"])
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
        raise UsageError(f"the model has no parameter {name!r} to train")
    return found


def check_looked_up(calls: int, name: str) -> None:
    """Raises ``UsageError`` when nothing was looked up: what follows would train nothing."""
    if not calls:
        raise UsageError(
            f"the model does not look {name} up through torch.nn.functional.embedding, so it cannot be trained",
            hint="method 'kmeans' needs no training",
        )
