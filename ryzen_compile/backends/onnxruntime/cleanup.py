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
    """Constants become initializers, equal nodes one node; idle and unread nodes and computed sizes go."""
    lift = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    lift(model)
    split_sequences(model.graph)
    fix_reshapes(model.graph)
    for change in (
        common.RemoveUnusedNodesPass(),
        lift,
        common.DeduplicateInitializersPass(size_limit=8),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
    ):
        change(model)
    cancel_turns(model.graph)
    absorb_bias(model.graph)


def split_sequences(graph: ir.Graph) -> None:
    """torch.onnx turns ``aten.split`` into a sequence and picks from it; with fixed picks that is one Split."""
    for node in list(graph):
        if node.op_type != "SplitToSequence" or node.inputs[1] is None or node.inputs[1].const_value is None:
            continue
        picks = {
            user: None if user.inputs[1] is None else user.inputs[1].const_value for user, _ in node.outputs[0].uses()
        }
        sizes = node.inputs[1].const_value.numpy().reshape(-1).tolist()
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        source = node.inputs[0]
        shape = None if source is None else source.shape
        whole = None if shape is None else shape[axis]
        if len(sizes) == 1 and isinstance(whole, int):  # one number is the size of each part
            sizes = [min(sizes[0], whole - start) for start in range(0, whole, sizes[0])]
        if sum(sizes) != whole or any(u.op_type != "SequenceAt" or index is None for u, index in picks.items()):
            continue
        lengths = ir.node("Constant", [], attributes={"value": ir.tensor(sizes, dtype=ir.DataType.INT64)})
        split = ir.node("Split", [node.inputs[0], lengths.outputs[0]], {"axis": axis}, num_outputs=len(sizes))
        lengths.meta["node"] = split.meta["node"] = node.meta.get("node")
        graph.insert_before(node, [lengths, split])
        for user, index in picks.items():
            if index is None:  # excluded above; said for the type checker
                continue
            old, new = user.outputs[0], split.outputs[int(index.numpy())]
            if new.shape is None and source is not None and shape is not None:
                new.name, new.type, old.name = old.name, source.type, None
                part = list(shape)
                part[axis] = sizes[int(index.numpy())]
                new.shape = ir.Shape(part)
            convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            graph.remove(user, safe=True)
        graph.remove(node, safe=True)


def fix_reshapes(graph: ir.Graph) -> None:
    """A Reshape whose sizes are computed gets constants where shapes allow: 0 keeps a dimension, one may be -1."""
    for node in list(graph):
        if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].const_value is not None:
            continue
        before, after = (None if v is None else v.shape for v in (node.inputs[0], node.outputs[0]))
        if before is None or after is None:
            continue
        sizes = [
            d if isinstance(d, int) else 0 if i < len(before) and before[i] == d else -1 for i, d in enumerate(after)
        ]
        if sizes.count(-1) > 1:
            continue
        # A new node: torch's carries an attribute that makes 0 mean empty.
        constant = ir.node("Constant", [], attributes={"value": ir.tensor(sizes, dtype=ir.DataType.INT64)})
        reshape = ir.node("Reshape", [node.inputs[0], constant.outputs[0]])
        constant.meta["node"] = reshape.meta["node"] = node.meta.get("node")
        convenience.replace_nodes_and_values(graph, node, [node], [constant, reshape], node.outputs, reshape.outputs)


def cancel_turns(graph: ir.Graph) -> None:
    """A Transpose that undoes the one before it goes, and a Reshape of a Reshape or to the shape that is there."""
    for node in list(graph):
        if node.op_type == "Transpose":
            inner = _made_by(node, "Transpose")
            orders = [n.attributes["perm"].as_ints() for n in (node, inner) if n is not None and "perm" in n.attributes]
            if inner is not None and len(orders) == 2 and [orders[1][i] for i in orders[0]] == sorted(orders[0]):
                _let_readers_have(node.outputs[0], inner.inputs[0])
        elif node.op_type == "Reshape" and (sizes := _sizes(node)) is not None:
            inner = _made_by(node, "Reshape")
            earlier = _sizes(inner) if inner is not None else None
            kept = [i for i, size in enumerate(sizes) if size == 0]  # these dimensions are the input's
            if inner is not None and earlier is not None and all(earlier[i : i + 1] == [0] for i in kept):
                node.replace_input_with(0, inner.inputs[0])
            source = node.inputs[0]
            there = source.shape if source is not None else None
            if (
                there is not None
                and len(there) == len(sizes)
                and all(s in (0, d) for s, d in zip(sizes, there, strict=True))
            ):
                _let_readers_have(node.outputs[0], source)


def _made_by(node: ir.Node, op_type: str) -> ir.Node | None:
    """The node that makes the first input of ``node``, if it is an ``op_type``."""
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    return producer if producer is not None and producer.op_type == op_type else None


def _sizes(reshape: ir.Node) -> list[int] | None:
    """A Reshape's constant sizes, in which 0 keeps a dimension; None where they are computed or 0 means empty."""
    sizes = reshape.inputs[1]
    if sizes is None or sizes.const_value is None or "allowzero" in reshape.attributes:
        return None
    return [int(size) for size in sizes.const_value.numpy().reshape(-1)]


def _let_readers_have(old: ir.Value, new: ir.Value | None) -> None:
    if new is not None and not old.is_graph_output():
        convenience.replace_all_uses_with(old, new)


def absorb_bias(graph: ir.Graph) -> None:
    """A linear layer's bias, added just before a residual norm, becomes that norm's own bias."""
    slots = {"SkipSimplifiedLayerNormalization": 3, "SkipLayerNormalization": 4}
    for node in list(graph):
        slot = slots.get(node.op_type)
        added = node.inputs[0].producer() if slot is not None and node.inputs[0] is not None else None
        if slot is None or added is None or added.op_type != "Add" or len(added.outputs[0].uses()) != 1:
            continue
        x, bias = added.inputs
        scale = node.inputs[2]
        if x is None or bias is None or scale is None or not bias.is_initializer() or bias.shape != scale.shape:
            continue
        if added.outputs[0].is_graph_output() or len(node.inputs) > slot:
            continue
        inputs = [*node.inputs, *[None] * (slot - len(node.inputs)), bias]
        inputs[0] = x
        twin = ir.node(node.op_type, inputs, node.attributes, domain=node.domain, num_outputs=len(node.outputs))
        twin.meta["node"] = node.meta.get("node")
        convenience.replace_nodes_and_values(graph, node, [node], [twin], node.outputs, twin.outputs)
        graph.remove(added, safe=True)


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
        if path.startswith("_empty_nn_module_stack"):  # torch.export's word for a node of no module
            path = ""
        stem = f"{path}/{node.op_type}" if path else node.op_type
        name, serial = stem, 0
        while name in taken:
            serial += 1
            name = f"{stem}_{serial}"
        taken.add(name)
        node.name = name
        for output in node.outputs:
            if node.domain == CONTRIB and not output.uses() and not output.is_graph_output():
                output.name = ""  # left out: the runtime need not compute it
    for value in list(graph.initializers.values()):
        reader, index = next(iter(value.uses()))
        if isinstance(value.const_value, ir.LazyTensor):
            value.name = f"{reader.name}/input_{index}"  # folding invented it; its reader says what it is
        elif value.name is not None:
            value.name = value.name.removeprefix("model_to_capture.")  # capture's wrapper
    common.ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "ryzen_compile", None
    graph.name = "decoder"
