"""``embedding_codes.safetensors``: a trained table of codes beside the model that it was trained in.

Its tensors are those of a ``CodebookTensor``. Format, shape, the parameter's name and how far the table is from the
parameter are JSON in the file's metadata. What an export reads is checked against the model: codes that were trained
with other weights than those beside them are refused.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ryzen_compile.errors import ModelError, ResourceError, RyzenCompileError, UnsafeError
from ryzen_compile.manifest import shown, shown_path
from ryzen_compile.numerics.codebook import CodebookFormat, CodebookTensor
from ryzen_compile.numerics.table_quality import table_quality

FORMAT = "ryzen_compile.codes/1"
FACTS = {"parameter", "relative_error", "shape", "bits", "dim", "stages", "group"}
TYPES = {
    "codes": {torch.uint8},
    "slots": {torch.int16},
    "codebook": {torch.float32},
    "scales": {torch.float16},
    "gain": {torch.float32},
    "offset": {torch.float32},
    "kept": {torch.float16, torch.float32},
}
DRIFT = 0.02  # by which the relative error may differ: weights are saved in 16 bits


@dataclass(frozen=True, eq=False)
class TrainedTable:
    """``tensor`` stands for the parameter ``name`` in lookups, from which it had ``relative_error`` (of the Frobenius
    norm) when it was saved."""

    name: str
    tensor: CodebookTensor
    relative_error: float


def save_table(path: str | Path, name: str, tensor: CodebookTensor, table: Tensor) -> None:
    """Writes ``tensor``, which stands for the parameter ``name``, ``table`` (V, C), into the file ``path``.

    Raises ``UsageError`` for a table of another shape, ``ResourceError`` where the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    error = table_quality(table.detach().float().cpu(), tensor.decode().cpu()).relative_error
    form = tensor.format
    facts = {
        "parameter": name,
        "relative_error": error,
        "shape": list(tensor.shape),
        "bits": form.bits,
        "dim": form.dim,
        "stages": form.stages,
        "group": form.group,
    }
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensor.tensors.items()}
    try:
        save_file(tensors, str(path), metadata={FORMAT: json.dumps(facts)})
    except (OSError, SafetensorError) as fault:
        raise ResourceError(f"cannot write {shown_path(path)}: {fault}") from fault


def load_table(path: str | Path) -> TrainedTable:
    """What ``save_table`` wrote. Raises ``ModelError`` for any other file, ``UnsafeError`` for a link or special file,
    ``ResourceError`` for one that cannot be read."""
    from safetensors import SafetensorError, safe_open

    from ryzen_compile.safetensors_header import check_safetensors

    path = Path(path)
    _refuse_links(path)
    entries = check_safetensors(path)
    if strange := sorted(entries.keys() - TYPES.keys()):
        raise _fault(path, f"holds {shown(strange[0])}, which is no part of a table of codes")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in entries}
    except (OSError, SafetensorError) as error:
        raise _fault(path, f"cannot be read: {error}") from error
    facts = _facts(path, metadata)
    for name, tensor in tensors.items():
        if tensor.dtype not in TYPES[name]:
            raise _fault(path, f"holds {name} as {tensor.dtype}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise _fault(path, f"holds {name} that are NaN or infinite")
    try:
        form = CodebookFormat(facts["bits"], facts["dim"], facts["stages"], facts["group"])
        rows, width = facts["shape"]
        stored = CodebookTensor(form, (rows, width), **tensors)
    except (RyzenCompileError, TypeError, ValueError) as error:
        raise _fault(path, f"holds tensors that do not fit together: {error}") from error
    if stored.slots is not None and stored.kept is not None and int(stored.slots.max()) >= len(stored.kept):
        raise _fault(path, f"keeps {len(stored.kept)} rows and refers to row {int(stored.slots.max())}")
    return TrainedTable(facts["parameter"], stored, float(facts["relative_error"]))


def given_tables(model: nn.Module, path: str | Path) -> dict[str, CodebookTensor]:
    """The table in the file ``path`` by every name that its parameter has in ``model`` (``EmbeddingCompressor.given``).

    Raises what ``load_table`` raises, and ``ModelError`` where the model has no such parameter, or its weights are not
    those that the codes were trained with.
    """
    trained = load_table(path)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    table = parameters.get(trained.name)
    where = Path(path).name
    if table is None or tuple(table.shape) != trained.tensor.shape:
        found = "none" if table is None else f"one of {tuple(table.shape)}"
        raise ModelError(
            f"{shown(where)} stands for a parameter {shown(trained.name)} of {trained.tensor.shape}, the model has "
            f"{found}",
            hint=f"remove {shown(where)} to have the table clustered anew",
        )
    error = table_quality(table.detach().float().cpu(), trained.tensor.decode()).relative_error
    if not abs(error - trained.relative_error) <= DRIFT * max(trained.relative_error, DRIFT):
        raise ModelError(
            f"{shown(where)} was {trained.relative_error:.2%} away from the weights that it was trained with, from "
            f"those of the model it is {error:.2%}",
            hint=f"the weights have changed since; remove {shown(where)} to have the table clustered anew",
        )
    return {name: trained.tensor for name, parameter in parameters.items() if parameter is table}


def _facts(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if set(metadata) != {FORMAT}:
        raise _fault(path, f"is not {FORMAT}")
    try:
        facts = json.loads(metadata[FORMAT])
    except (ValueError, RecursionError) as error:
        raise _fault(path, "has metadata that are no JSON") from error
    if not isinstance(facts, dict) or set(facts) != FACTS:
        raise _fault(path, f"has other metadata than {', '.join(sorted(FACTS))}")
    shape, distance = facts["shape"], facts["relative_error"]
    plain = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
    measured = type(distance) is float and 0 <= distance < math.inf
    if not plain or not measured or not isinstance(facts["parameter"], str):
        raise _fault(path, "has metadata of other types than expected")
    return facts


def _refuse_links(path: Path) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError as error:
        raise ModelError(f"{shown_path(path)} is missing") from error
    except OSError as error:
        raise ResourceError(f"cannot read {shown_path(path)}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise UnsafeError(f"{shown_path(path)} is a link or a special file, expected a plain file")


def _fault(path: Path, what: str) -> ModelError:
    return ModelError(f"{shown(path.name)} {what}", hint="save the trained model again")
