"""Writing a model and its weights: one tensor in memory at a time, and equal bytes once.

Initializers that hold the same bytes point at the same place in the data file: a head tied to its embedding whatever
shape each reads it in, and the tables of a second model beside the first. Offsets are aligned so that the file can be
mapped, and the same models give the same files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

ALIGNMENT = 4096  # bytes: what a mapping may start at
INLINE = 256  # bytes up to which a tensor stays inside the model file
Place = tuple[str, int, int]  # file, offset, length


class WeightsFiles:
    """Writes models into ``directory``; each tensor goes to the data file of the first model that holds its bytes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[bytes, Place] = {}

    def write(self, model: ir.Model, name: str) -> Path:
        """Writes ``name`` and, for tensors that no earlier model has, ``name.data``; returns the model's path."""
        values = [v for v in model.graph.initializers.values() if v.const_value is not None]
        kept = [value.const_value for value in values]
        data = f"{name}.data"
        path = self._directory / name
        try:
            with (self._directory / data).open("wb") as stream:
                for value in values:
                    self._move(value, data, stream)
                used = stream.tell()
            path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        finally:
            for value, tensor in zip(values, kept, strict=True):
                value.const_value = tensor
        if not used:
            (self._directory / data).unlink()
        return path

    def _move(self, value: ir.Value, data: str, stream: BinaryIO) -> None:
        """Leaves an external tensor in place of a large one."""
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= INLINE:
            return
        array = np.ascontiguousarray(tensor.numpy())
        content = array.data.cast("B")
        digest = hashlib.sha256(content).digest()
        if digest not in self._known:
            stream.write(bytes(-stream.tell() % ALIGNMENT))
            self._known[digest] = (data, stream.tell(), len(content))
            stream.write(content)
        location, offset, length = self._known[digest]
        value.const_value = ir.ExternalTensor(
            location,
            offset,
            length,
            tensor.dtype,
            shape=ir.Shape(array.shape),
            name=value.name or "",
            base_dir=self._directory,
        )
