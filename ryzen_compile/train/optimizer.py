"""Which optimizer moves which parameter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ryzen_compile.errors import ConfigError
from ryzen_compile.train.config import OptimizationSettings


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices of the model that are neither its table of tokens nor its head."""
    ends = {id(weight) for module in _ends(model) for weight in module.parameters()}
    return [p for p in model.parameters() if p.ndim == 2 and id(p) not in ends]


def make_optimizers(
    model: nn.Module,
    hidden: Sequence[nn.Parameter],
    extra: Iterable[nn.Parameter],
    settings: OptimizationSettings,
    *,
    fused: bool,
) -> list[torch.optim.Optimizer]:
    """One or two optimizers over the model's trainable parameters and ``extra`` ones, each of these once.

    Matrices decay, vectors do not. Muon (Jordan et al., 2024) takes the ``hidden`` matrices, with its rate matched to
    AdamW's; nothing else decays then. Raises ``ConfigError`` when nothing is trained.
    """
    trained = _distinct(p for p in model.parameters() if p.requires_grad)
    own = _distinct(p for p in extra if p.requires_grad)
    known = {id(p) for p in trained}
    own = [p for p in own if id(p) not in known]
    if not trained and not own:
        raise ConfigError("no parameter of the model is trained", hint="see passes.lora, which freezes the model")
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "fused": fused}
    if settings.optimizer == "adamw":
        matrices, vectors = _split(trained, lambda p: p.ndim >= 2)
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": [*vectors, *own], "weight_decay": 0.0},
        ]
        return [torch.optim.AdamW([group for group in groups if group["params"]], **options)]
    chosen = {id(p) for p in hidden}
    orthogonal, rest = _split(trained, lambda p: id(p) in chosen)
    optimizers: list[torch.optim.Optimizer] = []
    if orthogonal:
        decay = settings.weight_decay
        optimizers.append(
            torch.optim.Muon(orthogonal, lr=settings.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        )
    if rest or own:
        optimizers.append(torch.optim.AdamW([*rest, *own], weight_decay=0.0, **options))
    return optimizers


def _ends(model: nn.Module) -> list[nn.Module]:
    found = [getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")]
    modules = [get() for get in found if get is not None]
    return [module for module in modules if module is not None]


def _distinct(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(p): p for p in parameters}.values())


def _split(parameters: Sequence[nn.Parameter], test: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return [p for p in parameters if test(p)], [p for p in parameters if not test(p)]
