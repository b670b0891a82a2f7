"""Matryoshka representation learning (Kusupati et al., 2022): the first channels are trained to do without the rest.

Of a language model they are those of its last hidden states and of its head, which a tied table shares: the logits of
depth d are ``h[:, :d] @ W[:, :d].T``. Of an encoder they are those of its vectors, which are renormalised when cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ryzen_compile.errors import ConfigError, ModelError
from ryzen_compile.train.component import ComponentFacts
from ryzen_compile.train.config import MatryoshkaSettings
from ryzen_compile.train.contrastive import ContrastiveObjective
from ryzen_compile.train.depths import Depths, make_depths
from ryzen_compile.train.objective import Objective


class MatryoshkaComponent:
    """While it is on, ``objective`` has ``depths``. What is validated is the loss of all channels all the same."""

    name = "matryoshka"
    optional = True

    def __init__(self, objective: Objective, settings: MatryoshkaSettings) -> None:
        """Raises ``ConfigError`` for settings that do not fit the model's channels."""
        self.settings = settings
        self.start = settings.start
        self.active = False
        self.depths: Depths = make_depths(settings, objective.channels)
        self._objective = objective

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        """Raises ``ConfigError`` for a language model whose logits are more than its head's product."""
        if isinstance(self._objective, ContrastiveObjective):
            return []
        rows = torch.arange(min(len(self._objective.head), 9), device=self._objective.head.device)[None]
        if not self._objective.logits_are_a_product(rows):
            raise ConfigError(
                f"passes.matryoshka: logits of the model, {type(model).__name__}, are more than its head's product, "
                "which is what a depth cuts",
                hint="leave passes.matryoshka out",
            )
        return []

    def activate(self) -> None:
        self._switch(active=True)

    def deactivate(self) -> None:
        self._switch(active=False)

    def advance(self, progress: float) -> None:
        """There is nothing to anneal."""

    def tighten(self) -> bool:
        return False

    def relax(self) -> bool:
        return False

    def facts(self) -> ComponentFacts:
        """Nothing is smaller until it is cut."""
        return ComponentFacts(settings={"dims": list(self.depths.dims), "weights": list(self.depths.weights)})

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"active": self.active}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:  # noqa: ARG002 - the protocol's
        """Raises ``ModelError`` for values that ``state`` does not give."""
        if not isinstance(values.get("active"), bool):
            raise ModelError(f"matryoshka: the checkpoint's state is {dict(values)}, expected whether it is active")
        self._switch(active=values["active"])

    def detach(self, model: nn.Module) -> None:
        """Nothing is attached to the model."""
        if model is self._objective.model:
            self.deactivate()

    def recipe_changes(self) -> Mapping[str, Any]:
        return {}

    def _switch(self, *, active: bool) -> None:
        self.active = active
        self._objective.depths = self.depths if active else None
