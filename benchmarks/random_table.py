"""Models that look up rows of one random table, for ``embedding_speed.py``: speed does not depend on what is in it.

    python benchmarks/random_table.py 8x2 30522 384 table-8x2

writes ``model.onnx`` and its data into the directory ``table-8x2``, through the library's own lowering. Equal arguments
give equal tables.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from embedding_speed import BLOCKS, PLAIN
from torch import Tensor, nn
from torch.export import Dim

from ryzen_compile import ops
from ryzen_compile.backends.onnxruntime import MODEL_NAME
from ryzen_compile.backends.onnxruntime.lowering import lower
from ryzen_compile.backends.onnxruntime.weights_file import WeightsFiles
from ryzen_compile.numerics.codebook import CodebookFormat, CodebookTensor
from ryzen_compile.program import Program
from ryzen_compile.spec import ModelSpec

BLOCK = 32
PARTS = ("codes", "codebook", "scales", "gain", "offset", "slots", "kept")


class Lookup(nn.Module):
    """Rows of a table: ``op(ids, *tensors, *numbers)``."""

    def __init__(self, op: Any, tensors: list[Tensor | None], *numbers: int) -> None:
        super().__init__()
        self.op, self.numbers, self.names = op, numbers, [f"part{i}" for i in range(len(tensors))]
        for name, tensor in zip(self.names, tensors, strict=True):
            self.register_buffer(name, tensor)

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.op(ids, *(getattr(self, name) for name in self.names), *self.numbers)
        return rows


def lookup(form: str, rows: int, width: int) -> Lookup:
    """``form``: fp32; int4-g32; or a codebook's BITSxDIM or BITSxDIMxSTAGES, with a scale for every row, a gain and an
    offset for every channel."""
    if form == PLAIN:
        return Lookup(nn.functional.embedding, [torch.randn(rows, width)])
    if form == BLOCKS:
        packed = torch.randint(0, 256, (rows, width // BLOCK, BLOCK // 2), dtype=torch.uint8)
        scales = torch.rand(rows, width // BLOCK)
        return Lookup(ops.embedding_nbits, [packed, scales, None], width, 4, BLOCK)
    code = CodebookFormat(*map(int, form.split("x")))
    table = CodebookTensor(
        code,
        (rows, width),
        torch.randint(0, 256, (rows, code.row_bytes(width)), dtype=torch.uint8),
        torch.randn(code.stages, code.entries, code.dim),
        scales=torch.rand(rows, 1).half(),
        gain=torch.rand(width),
        offset=torch.randn(width),
    )
    tensors = [table.tensors.get(name) for name in PARTS]
    return Lookup(ops.codebook_embedding, tensors, width, code.bits, code.group_argument)


def write(form: str, rows: int, width: int, directory: Path) -> None:
    torch.manual_seed(0)
    directory.mkdir(parents=True, exist_ok=True)
    module, ids = lookup(form, rows, width).eval(), torch.zeros(3, dtype=torch.int64)
    exported = torch.export.export(module, (ids,), dynamic_shapes=({0: Dim("tokens")},), strict=False)
    program = Program(exported, ModelSpec(0, 0, 0, 0, 0, 0, 0, False, 0, "table"))
    WeightsFiles(directory).write(lower(program), MODEL_NAME)


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
