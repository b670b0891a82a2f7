"""What is done to the ONNX graph beside lowering it: one copy of every weight, no idle nodes, readable names."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir
import torch
from onnx_ir import convenience
from onnx_ir.passes import common

from ryzen_compile.backends.onnxruntime.emit import CONTRIB
from ryzen_compile.backends.onnxruntime.fold import constant_nodes
from ryzen_compile.program import module_path


def share_initializers(graph: ir.Graph) -> None:
    """Initializers over the same storage (tied weights) become one."""
    first: dict[Hashable, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        raw = getattr(value.const_value, "raw", None)
        if not isinstance(raw, torch.Tensor):
            continue
        key = (raw.data_ptr(), raw.dtype, tuple(raw.shape), raw.stride())
        kept = first.setdefault(key, value)
        if kept is not value:
            convenience.replace_all_uses_with(value, kept)
            del graph.initializers[name]


def simplify(model: ir.Model) -> None:
    """Constants become initializers, equal nodes one node, idle and unread nodes none."""
    for change in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(size_limit=64),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
    ):
        change(model)


def keep_one_table(graph: ir.Graph) -> None:
    """A table that is looked up (V, C) and multiplied by (C, V) is stored once, as it is looked up.

    ``FusedMatMul`` reads it transposed. ONNX Runtime packs either form for the multiplication when it loads the model,
    so speed and private memory are the same, and the file holds one copy instead of two.
    """
    constant = constant_nodes(graph)
    for node in constant:
        table = node.inputs[0]
        if node.op_type != "Transpose" or table is None:
            continue
        looked_up = table.is_initializer() and any(user not in constant for user, _ in table.uses())
        readers = list(node.outputs[0].uses())
        if not looked_up or any(user.op_type != "MatMul" or index != 1 for user, index in readers):
            continue
        for user, _ in readers:
            product = user.outputs[0]
            fused = ir.node("FusedMatMul", [user.inputs[0], table], attributes={"transB": 1}, domain=CONTRIB)
            fused.meta["node"] = user.meta.get("node")
            convenience.replace_nodes_and_values(graph, user, [user], [fused], [product], [fused.outputs[0]])
        graph.remove(node, safe=True)


def finish(model: ir.Model) -> None:
    """Removes what nothing reads, names every node by module path and operator, and drops torch's annotations."""
    graph = model.graph
    for change in (common.RemoveUnusedNodesPass(), common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass()):
        change(model)
    taken: set[str] = set()
    for node in graph:
        origin = node.meta.get("node")
        path = module_path(origin) if origin is not None else ""
        stem = f"{path}/{node.op_type}" if path else node.op_type
        name, serial = stem, 0
        while name in taken:
            serial += 1
            name = f"{stem}_{serial}"
        taken.add(name)
        node.name = name
        for output in node.outputs:
            if len(node.outputs) > 1 and not output.uses() and not output.is_graph_output():
                output.name = ""  # left out: the runtime need not compute it
    for value in list(graph.initializers.values()):
        reader, index = next(iter(value.uses()))
        if isinstance(value.const_value, ir.LazyTensor):
            value.name = f"{reader.name}/input_{index}"  # folding invented it; its reader says what it is
    common.ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "ryzen_compile", None
    graph.name = "decoder"
