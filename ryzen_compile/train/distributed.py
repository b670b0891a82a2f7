"""Tensors of a run that several processes share: whole on the way to a checkpoint, sharded again on the way back.

Every process has to take part in gathering, whether it writes or not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 has sharded (a DTensor); any other as it is."""
    whole = getattr(tensor, "full_tensor", None)
    found: Tensor = tensor if whole is None else whole()
    return found.detach()


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copies ``whole`` into ``target``, each process its shard of it."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(target, DTensor):
            whole = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)
    target.copy_(whole)
