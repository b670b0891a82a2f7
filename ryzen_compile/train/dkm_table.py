"""Token lookups through softly clustered rows, trained by the run's own loss (DKM, Cho et al., 2022).

The module that ``get_input_embeddings`` names keeps its class, its parameter and its name. What it does itself (some
scale what they look up) it goes on doing: in its forward pass alone, the lookup in its table is answered by a
``SoftTable``. A head tied to the table reads the weights behind it, as it does in an export, where it keeps weights of
its own beside the codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from ryzen_compile.config import EmbeddingCompression
from ryzen_compile.errors import ConfigError, ModelError, UsageError
from ryzen_compile.numerics.codebook import CodebookFormat, CodebookTensor
from ryzen_compile.numerics.dkm import temperature_schedule
from ryzen_compile.numerics.table_quality import TableQuality, table_quality
from ryzen_compile.train.component import ComponentFacts
from ryzen_compile.train.config import DkmSettings
from ryzen_compile.train.distributed import gathered
from ryzen_compile.train.parameters import FLOAT_BYTES, float_bytes
from ryzen_compile.train.soft_table import SoftTable, several_processes

CHILD = "dkm"  # what the table's module calls its SoftTable while one is attached
# The parity gate measures codes against a model that looks up the weights behind them, which nobody trained for.
NO_BUDGET = 1000.0
NUMBERS = ("unit", "spread", "error", "began", "progress")  # of the state, beside stage, active and what the table was


class DkmComponent:
    """The table clustered in ``bits[0]``, later in the narrower stages; clusters begin anew with each.

    They are found by k-means when it is first turned on. From there to the end of the run the temperature falls from
    the first of ``temperatures`` to the last. In evaluation lookups get the rows that an export stores, so a validation
    measures those. Turned off and on again it goes on where it was if the weights have not moved meanwhile.
    """

    name = "dkm"
    optional = True

    def __init__(self, settings: DkmSettings) -> None:
        self.settings = settings
        self.start = settings.start
        self.active = False
        self._stage = 0
        self._progress, self._began = 0.0, 0.0  # shares of the run: now, and when clusters last began
        self._size: float | None = None  # of the table when it was last turned off; None before there are clusters
        self._clustered = False
        self._model_bytes, self._tied, self._name = 0, False, ""
        self._embedding: Any = None
        self._soft: SoftTable | None = None

    # --- the model ----------------------------------------------------------------------------------------------------
    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        """Raises ``ConfigError`` for a model whose table cannot be stored so or is looked up in some other way."""
        embedding = _table_module(model)
        table = _table(embedding)
        rows, width = table.shape
        try:
            soft = SoftTable(rows, width, self._form(0))
        except UsageError as error:
            raise ConfigError(f"dkm: {error}", hint="choose another cluster_dim") from error
        self._model_bytes = float_bytes(model)
        self._tied = sum(p is table for _, p in model.named_parameters(remove_duplicate=False)) > 1
        embedding.add_module(CHILD, soft.to(table.device).train(embedding.training))
        embedding.forward = MethodType(_forward, embedding)
        self._embedding, self._soft = embedding, soft
        path = next(name for name, module in model.named_modules() if module is embedding)
        self._name = f"{path}.weight" if path else "weight"
        return list(soft.parameters())

    def detach(self, model: nn.Module) -> None:
        """Leaves the weights behind the codes: call ``table`` before for what an export is to store."""
        finder: Any = model
        embedding = finder.get_input_embeddings()
        if hasattr(embedding, CHILD):
            del embedding.forward
            delattr(embedding, CHILD)
        if embedding is self._embedding:
            self._embedding = self._soft = None
            self.active = False

    def activate(self) -> None:
        """Raises ``UsageError`` for weights that are not finite."""
        soft = self._attached()
        if self.active:
            return
        if not self._clustered or self._size != self._table_size():
            self._cluster()
        self.active = soft.active = True

    def deactivate(self) -> None:
        if self.active:
            self._size = self._table_size()
        self.active = self._attached().active = False

    def advance(self, progress: float) -> None:
        self._progress = progress
        left = 1 - self._began
        done = (progress - self._began) / left if left > 0 else 1.0
        self._attached().temperature = temperature_schedule(min(1.0, max(0.0, done)), *self.settings.temperatures)

    def tighten(self) -> bool:
        return self._enter(self._stage + 1)

    def relax(self) -> bool:
        return self._enter(self._stage - 1)

    # --- what it has come to ------------------------------------------------------------------------------------------
    def table(self) -> CodebookTensor:
        """What an export is to store, on the CPU: every vector at its nearest entry. Raises ``UsageError`` before the
        table was ever clustered and after ``detach``."""
        soft = self._attached()
        if not self._clustered:
            raise UsageError("the table has no clusters yet", hint="turn dkm on first, or let the run reach its start")
        return soft.hardened(_table(self._embedding))

    @property
    def table_name(self) -> str:
        """Of the module's parameter, in the model that ``prepare`` saw."""
        return self._name

    def facts(self) -> ComponentFacts:
        """Of the whole model, all but its table in float32, a head that is tied to it as well. ``settings`` have the
        table's own ratio and its signal to noise, dB."""
        settings: dict[str, Any] = {"bits": self._form(self._stage).bits, "cluster_dim": self.settings.cluster_dim}
        if not self._clustered:
            return ComponentFacts(settings=settings)
        stored = self.table()
        table_bytes = FLOAT_BYTES * stored.shape[0] * stored.shape[1]
        rest = self._model_bytes - (0 if self._tied else table_bytes)
        quality = _quality(gathered(_table(self._embedding)), stored)
        settings |= {
            "tied": self._tied,
            "table_ratio": table_bytes / stored.nbytes,
            "table_sqnr_db": quality.sqnr,
            "temperature": self._attached().temperature,
        }
        return ComponentFacts(self._model_bytes / (rest + stored.nbytes), quality.relative_error**2, settings)

    def recipe_changes(self) -> Mapping[str, Any]:
        """For an export that is given ``table``; one that is not clusters the weights behind it."""
        form = self._form(self._stage)
        return {
            "embedding": EmbeddingCompression(
                bits=form.bits, cluster_dim=self.settings.cluster_dim, keep=0.0, weighting="none", max_kl=NO_BUDGET
            )
        }

    # --- its state ----------------------------------------------------------------------------------------------------
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        soft = self._attached()
        values = {
            "stage": self._stage,
            "active": self.active,
            "clustered": self._clustered,
            "size": self._size,
            "began": self._began,
            "progress": self._progress,
            "unit": soft.unit,
            "spread": soft.spread,
            "error": soft.error,
        }
        return {name: buffer.detach().clone() for name, buffer in soft.named_buffers()}, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Raises ``ModelError`` for a state that is not of these settings and this table."""
        soft = self._attached()
        buffers = dict(soft.named_buffers())
        shapes = {name: tuple(buffer.shape) for name, buffer in buffers.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        stage, size = values.get("stage"), values.get("size")
        if found != shapes or not _is_stage(stage, self.settings) or not all(_is_number(values, n) for n in NUMBERS):
            raise ModelError(
                f"dkm: the checkpoint's state (stage {stage!r}, tensors {found}) does not fit, expected {shapes}",
                hint="go on with the settings that the run began with",
            )
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(tensors[name])
        self._stage, self._size = int(values["stage"]), None if size is None else float(size)
        self._clustered = bool(values.get("clustered"))
        soft.unit, soft.spread, soft.error, self._began, _ = (float(values[name]) for name in NUMBERS)
        soft.form = self._form(self._stage)
        self.active = soft.active = bool(values.get("active"))
        self.advance(float(values["progress"]))

    # --- clusters -----------------------------------------------------------------------------------------------------
    def _form(self, stage: int) -> CodebookFormat:
        return CodebookFormat(self.settings.bits[stage], self.settings.cluster_dim)

    def _enter(self, stage: int) -> bool:
        if not 0 <= stage < len(self.settings.bits):
            return False
        self._stage = stage
        self._clustered = False
        if self.active:
            self._cluster()
        return True

    def _cluster(self) -> None:
        self._attached().cluster(_table(self._embedding), self._form(self._stage))
        self._clustered = True
        self._began = self._progress
        self.advance(self._progress)

    def _table_size(self) -> float:
        """By which a table that moved is told from one that did not."""
        return float(torch.linalg.vector_norm(gathered(_table(self._embedding)).float()))

    def _attached(self) -> SoftTable:
        if self._soft is None:
            raise UsageError("dkm is attached to no model", hint="prepare it first")
        return self._soft


class _Lookup(TorchFunctionMode):
    """Inside, ``embedding(ids, weight)`` gives ``rows(ids)`` in the weight's type; ``calls`` counts them."""

    def __init__(self, rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._rows = rows
        self.calls = 0

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is nn.functional.embedding:
            bound = dict(zip(("input", "weight"), args, strict=False)) | given
            self.calls += 1
            return self._rows(bound["input"]).to(bound["weight"].dtype)
        return func(*args, **given)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What the module's forward becomes. It is bound to the module, so a copy of the model has one of its own."""
    soft: SoftTable = getattr(self, CHILD)
    if soft.active:
        return _clustered(self, *args, **kwargs)
    rows = type(self).forward(self, *args, **kwargs)
    return rows + soft.idle() if several_processes() and rows.requires_grad else rows


@torch.compiler.disable
def _clustered(module: Any, *args: Any, **kwargs: Any) -> Any:
    """A compiler cannot see through the number of different ids, and leaves this call as it is."""
    soft: SoftTable = getattr(module, CHILD)
    table = _table(module)
    with _Lookup(lambda ids: soft.lookup(table, ids, module.padding_idx)) as lookup:
        out = type(module).forward(module, *args, **kwargs)
    if lookup.calls != 1:
        raise UsageError(
            f"{type(module).__name__} looks its tokens up {lookup.calls} times through torch.nn.functional.embedding, "
            "expected once",
            hint="turn passes.dkm off for this model",
        )
    return out


def _table(module: Any) -> Tensor:
    """The parameter, whatever stands in for it (the head's rounding, where it is tied)."""
    found: Tensor = (
        module.parametrizations.weight.original if parametrize.is_parametrized(module, "weight") else module.weight
    )
    return found


def _table_module(model: nn.Module) -> nn.Module:
    get = getattr(model, "get_input_embeddings", None)
    module = get() if get is not None else None
    if not isinstance(module, nn.Embedding):
        raise ConfigError(
            f"dkm: expected a model whose get_input_embeddings() is an nn.Embedding, {type(model).__name__} has "
            f"{'none' if module is None else type(module).__name__}",
            hint="turn passes.dkm off for this model",
        )
    if module.max_norm is not None or module.sparse or "forward" in vars(module) or hasattr(module, CHILD):
        raise ConfigError(
            f"dkm: {type(module).__name__} changes its table as it looks up, has sparse gradients, or is stood in for",
            hint="turn passes.dkm off for this model",
        )
    return module


def _quality(table: Tensor, stored: CodebookTensor) -> TableQuality:
    return table_quality(table.cpu().float(), stored.decode())


def _is_stage(stage: object, settings: DkmSettings) -> bool:
    return type(stage) is int and 0 <= stage < len(settings.bits)


def _is_number(values: Mapping[str, Any], name: str) -> bool:
    return type(values.get(name)) in (int, float) and math.isfinite(values[name])
