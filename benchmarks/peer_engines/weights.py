"""What a decoder directory holds, read off ``config.json`` and the safetensors header. Standard library and numpy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Parameters:
    """Weights a token must pass: ``linear`` of all layers, ``head`` of the output (the embedding itself where tied)."""

    linear: int
    head: int

    @property
    def per_token(self) -> int:
        return self.linear + self.head

    def prompt_operations(self, tokens: int) -> int:
        """Multiplications and additions of a prompt's products: every layer for each token, the head for the last."""
        return 2 * (self.linear * tokens + self.head)


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The tensors of a safetensors file by name (dtype, shape, data_offsets), and where the data begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def read_parameters(directory: Path) -> Parameters:
    header, _ = read_header(directory / "model.safetensors")
    sizes = {name: int(np.prod(entry["shape"])) for name, entry in header.items() if len(entry["shape"]) == 2}
    table = sizes["model.embed_tokens.weight"]
    head = sizes.get("lm_head.weight", table)
    return Parameters(sum(sizes.values()) - table - sizes.get("lm_head.weight", 0), head)


def open_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a float32 file, mapped and not read."""
    header, begin = read_header(path)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            raise ValueError(f"{path.name}: {name} is {entry['dtype']}, expected F32")
        tensors[name] = np.memmap(path, np.float32, "r", begin + entry["data_offsets"][0], tuple(entry["shape"]))
    return tensors
