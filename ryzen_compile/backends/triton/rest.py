"""What is left between the kernels: runs of ordinary PyTorch operations, compiled by ``torch.compile``.

Behind all passes little is left, in most decoders nothing: a scaled embedding, a soft cap on the logits, a router of
experts. A run of two such operations or more becomes a submodule of its own and is compiled; products stay with
cuBLAS, and our operators with their kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

LEAST = 2  # operations that are worth a kernel of their own
PRODUCTS = ("linear", "mm", "bmm", "addmm", "matmul", "baddbmm", "embedding", "convolution")
FREE = ("view", "reshape", "slice", "permute", "transpose", "expand", "unsqueeze", "squeeze", "select")


def compile_rest(module: fx.GraphModule, compiler: Callable[..., Any] | None = None) -> fx.GraphModule:
    """``module`` with every run of pointwise work and reductions compiled; ``compiler`` is ``torch.compile`` unless
    given."""
    compiler = compiler or (lambda part: torch.compile(part, dynamic=True))
    partitioner = CapabilityBasedPartitioner(module, _Pointwise(), allows_single_node_partition=False)
    parts = [p for p in partitioner.propose_partitions() if sum(map(_computes, p.nodes)) >= LEAST]
    fused = partitioner.fuse_partitions(parts, prefix="rest_")
    made: dict[str, Any] = {}  # layers that are alike are compiled once
    for name, part in list(fused.named_children()):
        if name.startswith("rest_") and isinstance(part, fx.GraphModule):
            structure = _structure(part.graph)
            if structure not in made:
                made[structure] = compiler(part)
            setattr(fused, name, made[structure])
    return fused


def _structure(graph: fx.Graph) -> str:
    """The same for graphs that differ in names only."""
    place = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    return "\n".join(
        f"{node.op} {'' if node.op == 'placeholder' else node.target} {map_arg((node.args, node.kwargs), place.get)}"
        for node in graph.nodes
    )


class _Pointwise(OperatorSupportBase):
    """ATen operations that a compiler gains from joining."""

    def is_node_supported(self, submodules: Mapping[str, torch.nn.Module], node: fx.Node) -> bool:  # noqa: ARG002
        target = node.target
        return (
            node.op == "call_function"
            and isinstance(target, torch._ops.OpOverload)
            and target.namespace == "aten"
            and target._opname not in (*PRODUCTS, "sym_size")
        )


def _computes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._opname not in FREE
