"""Low-rank adaptation (Hu et al., 2022), by the library peft: the model is frozen, its linears get trained updates.

    x Wᵀ  ->  x Wᵀ + (alpha / rank) x Aᵀ Bᵀ,  A (rank, C), B (N, rank)

It does not go together with rounding in the loop. A rounded W with an update beside it is not what an export stores,
which merges the two and rounds the sum; and the sum is never formed while peft trains.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from ryzen_compile.errors import ConfigError, ModelError
from ryzen_compile.train.component import ComponentFacts
from ryzen_compile.train.config import LoraSettings
from ryzen_compile.train.parameters import find_layers

ADAPTER = "default"


class LoraComponent:
    """Updates of the linear layers whose names one of ``targets`` is found in, as a regular expression; never the head.

    While it is off, updates count nothing, and as all else is frozen, nothing is trained. ``detach`` merges what is on,
    and lets those parameters be trained again that could be before.
    """

    name = "lora"
    optional = False  # all else is frozen
    start = 0.0

    def __init__(self, settings: LoraSettings) -> None:
        self.settings = settings
        self.active = False
        self._layers: list[Any] = []
        self._own: list[nn.Parameter] = []
        self._trainable: dict[str, bool] = {}
        self._weights = 0

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        """Returns the As and Bs; an update is zero to begin with.

        Raises ``ConfigError`` without peft, for targets that match no linear layer, and what capturing raises.
        """
        peft = _import_peft()
        names = _chosen([layer.name for layer in find_layers(model)[0]], self.settings.targets)
        self._trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._weights = sum(parameter.numel() for parameter in model.parameters())
        config = peft.LoraConfig(
            r=self.settings.rank,
            lora_alpha=self.settings.alpha,
            lora_dropout=self.settings.dropout,
            target_modules="|".join(map(re.escape, names)),  # matched whole
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # it finds out which layers need it
            peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        self._layers = _lora_layers(model)
        self._own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.deactivate()
        return list(self._own)

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
        """Merged, the model is as large as before, and exact."""
        trained = sum(parameter.numel() for parameter in self._own)
        settings = self.settings.model_dump(include={"rank", "alpha"})
        return ComponentFacts(settings={**settings, "layers": len(self._layers), "trained": trained / self._weights})

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"active": self.active}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:  # noqa: ARG002 - the protocol's
        """Raises ``ModelError`` for values that ``state`` does not give."""
        if not isinstance(values.get("active"), bool):
            raise ModelError(f"lora: the checkpoint's state is {dict(values)}, expected whether it is active")
        self._switch(active=values["active"])

    def detach(self, model: nn.Module) -> None:
        for name, module in list(model.named_modules()):
            if _is_lora(module):
                module.merge()
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, module.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._trainable[name])

    def recipe_changes(self) -> Mapping[str, Any]:
        return {}

    def _switch(self, *, active: bool) -> None:
        # Not peft's own switch: with the updates left out nothing has a gradient, and a step could not be made.
        self.active = active
        for layer in self._layers:
            layer.set_scale(ADAPTER, 1.0 if active else 0.0)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("lora needs the package peft", hint="pip install 'ryzen-compile[train]'") from error
    return peft


def _is_lora(module: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def _lora_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _is_lora(module)]


def _chosen(names: Sequence[str], targets: Sequence[str] | None) -> list[str]:
    """Those of ``names`` that match; raises ``ConfigError`` for a target that none does, or that is no expression."""
    if targets is None:
        return list(names)
    chosen: set[str] = set()
    for target in targets:
        try:
            found = [name for name in names if re.search(target, name)]
        except re.error as error:
            raise ConfigError(f"lora: target {target!r} is not a regular expression: {error}") from error
        if not found:
            near = get_close_matches(target, names, n=1, cutoff=0.0)
            raise ConfigError(
                f"lora: target {target!r} matches none of {len(names)} linear layers",
                hint=f"one of them is {near[0]!r}",
            )
        chosen.update(found)
    if not chosen:
        raise ConfigError("lora: expected targets, got none", hint="leave targets out to train all linear layers")
    return [name for name in names if name in chosen]
