"""A model's body as fused operators, for training: the rewritten graph, over the model's own parameters.

What the passes leave before the cache goes in is one operator for each attention, norm, rotation and gated product,
each with a gradient, and kernels for both where they are attached. The graph ends where the head begins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ryzen_compile.capture import capture
from ryzen_compile.config import Recipe
from ryzen_compile.edit import Edit
from ryzen_compile.errors import UnsupportedError
from ryzen_compile.passes.prune_logits import head_chain
from ryzen_compile.pipeline import default_passes, run_passes
from ryzen_compile.program import is_call
from ryzen_compile.train.module import training_module

CACHED = "insert_kv_cache"  # the first pass that training does without


class FusedBackbone:
    """``backbone(ids (B, T), dtype) -> (B, T, C)`` of ``dtype``: what the head of ``model`` reads.

    Parameters are cast to ``dtype``, and with them everything between them; tables of angles stay float32. Captured on
    the CPU in float32, it follows the parameters to wherever they are moved. Raises ``UnsupportedError`` for a model
    with dropout, which a captured graph has not, or with something in its parameters' place, and for one whose logits
    are more than its head's product; and what capturing raises.
    """

    def __init__(self, model: nn.Module) -> None:
        if (reason := _obstacle(model)) is not None:
            raise UnsupportedError(f"the body cannot be trained as fused operators: {reason}")
        passes = default_passes(Recipe(logits="all"))
        before = [pass_.name for pass_ in passes].index(CACHED)
        program, _ = run_passes(capture(model), passes[:before])
        edit = Edit(program, "fused_backbone")
        head, chain = head_chain(edit.program.outputs[0])
        if chain or not is_call(head, torch.ops.aten.linear):
            raise UnsupportedError("the body cannot be trained as fused operators: logits are more than a product")
        edit.set_output(0, head.args[0])
        module = training_module(edit.finish())
        module.graph.eliminate_dead_code()
        module.recompile()
        self._module: Any = module
        self._compiled: Any = None

    def to(self, device: torch.device) -> FusedBackbone:
        """Moves tables and constants, and with them the parameters, which are the model's."""
        self._module.to(device)
        return self

    def __call__(self, ids: Tensor, dtype: torch.dtype, *, compiled: bool = False) -> Tensor:
        if compiled and self._compiled is None:
            self._compiled = torch.compile(self._run)
        with torch.autocast(ids.device.type, enabled=False):
            found: Tensor = (self._compiled if compiled else self._run)(ids, dtype)
        return found

    def _run(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        weights = {name: parameter.to(dtype) for name, parameter in self._module.named_parameters()}
        found: Tensor = functional_call(self._module, weights, (ids, positions))
        return found


def _obstacle(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return f"{name} drops out"
        if hasattr(module, "parametrizations"):
            return f"something stands in for a parameter of {name}"
        if "forward" in vars(module):
            return f"something stands in for {name}"
    config: Any = getattr(model, "config", None)
    if getattr(config, "attention_dropout", 0.0):
        return "attention drops out"
    return None
