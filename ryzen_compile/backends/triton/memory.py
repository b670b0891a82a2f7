"""Rows of keys and values in a device's memory: torch tensors under the cache's contract."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class DeviceStorage:
    """A ``Storage`` on ``device``."""

    shares_pages = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def zeros(self, shape: Sequence[int], dtype: np.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=_torch_type(dtype), device=self.device)

    def copy_rows(self, buffer: Tensor, rows: np.ndarray, held: int, capacity: int) -> Tensor:
        copies = buffer.new_zeros((len(rows), buffer.shape[1], capacity, buffer.shape[3]))
        for index, row in enumerate(rows.tolist()):
            copies[index, :, :held] = buffer[row, :, :held]
        return copies

    def read(self, part: Tensor) -> np.ndarray:
        return part.cpu().numpy()

    def write(self, part: Tensor, rows: np.ndarray) -> None:
        part.copy_(torch.from_numpy(np.ascontiguousarray(rows)))

    def memory_bytes(self) -> int | None:
        """What is free on a GPU now, and what torch keeps for itself without using it; unknown elsewhere."""
        if self.device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)


def _torch_type(dtype: np.dtype) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
