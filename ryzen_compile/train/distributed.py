"""Tensors of a run that several processes share: whole on the way to a checkpoint, sharded again on the way back.

Every process has to take part in gathering, whether it writes or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 has sharded (a DTensor); any other as it is."""
    whole = getattr(tensor, "full_tensor", None)
    found: Tensor = tensor if whole is None else whole()
    return found.detach()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds its parameters in parts."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole_model(model: Any) -> Any:
    """A transformers model with all of a sharded one's weights, on the CPU; one that is not sharded as it is."""
    if not is_sharded(model):
        return model
    tensors = {name: gathered(value).cpu() for name, value in model.state_dict().items()}
    twin = type(model)(model.config)
    twin.load_state_dict(tensors)
    twin.generation_config = model.generation_config
    return twin


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copies ``whole`` into ``target``, each process its shard of it."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(target, DTensor):
            whole = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)
    target.copy_(whole)
