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
    for name, part in list(fused.named_children()):
        if name.startswith("rest_"):
            setattr(fused, name, compiler(part))
    return fused


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
