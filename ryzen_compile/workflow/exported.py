"""A model in training as it would be exported now: how fast that runs, and which recipe it takes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ryzen_compile.config import DEFAULT_RECIPE, Recipe, find_recipe

if TYPE_CHECKING:
    from torch import nn

    from ryzen_compile.train.component import Component

PROMPT, DECODED, REPEATS = 128, 32, 3


def trained_recipe(components: Sequence[Component]) -> Recipe | None:
    """The recipe under which an export computes what was trained; None if any recipe will do."""
    changes: dict[str, Any] = {}
    for component in components:
        if component.active:
            changes |= component.recipe_changes()
    if not changes:
        return None
    return Recipe(name="trained", description="as the model was trained", **changes)


def plain_copy(model: nn.Module, components: Sequence[Component]) -> nn.Module:
    """A copy of the model with the components' work in its weights, and none of them attached."""
    twin = copy.deepcopy(model)
    for component in reversed(components):
        component.detach(twin)
    return twin.eval()


def exported_speed(model: nn.Module, components: Sequence[Component]) -> Mapping[str, float]:
    """Exports a copy and measures it: ``ttft_seconds`` for ``PROMPT`` tokens, ``decode_tokens_per_second`` behind them.

    Raises whatever exporting raises. Seconds for a small model.
    """
    from ryzen_compile.api import optimize
    from ryzen_compile.validate.latency import Workload, measure

    recipe = trained_recipe(components) or find_recipe(DEFAULT_RECIPE, method="rtn")
    compiled = optimize(plain_copy(model, components).float().cpu(), recipe, verify=False)
    half = compiled.engine.spec.context // 2
    prompt, decoded = min(PROMPT, half), min(DECODED, half)
    try:
        first, decode = measure([compiled.engine], [Workload("pp", prompt), Workload("tg", decoded, prompt)], REPEATS)
    finally:
        compiled.close()
    return {"ttft_seconds": min(first.seconds), "decode_tokens_per_second": max(decode.rates)}
