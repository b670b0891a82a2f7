"""A Program as a module that trains: the fused graph in the forward pass, the operators' own formulas in the backward.

Its parameters are the model's own, so gradients arrive where the user's optimizer looks for them, and whatever merges
weights (``cat(w_q, w_k, w_v)``) is an expression that is differentiated with the rest. Kernels that are attached to the
operators run in both directions.
"""

from __future__ import annotations

from torch import Tensor, fx, nn

from ryzen_compile.errors import UsageError
from ryzen_compile.program import Program


def training_module(program: Program) -> fx.GraphModule:
    """``module(input_ids, position_ids) -> logits (B, T, V)`` of a Program without a cache; inputs (B, T) int64.

    Parameters keep the names of their placeholders. Raises ``UsageError`` for a Program with a cache.
    """
    if program.slots:
        raise UsageError("the Program has a key/value cache", hint="train what the passes before insert_kv_cache gave")
    root, graph = nn.Module(), fx.Graph()
    weights = program.weights
    names: dict[int, str] = {}  # a tied weight is one parameter
    values: dict[fx.Node, fx.Node] = {}
    inputs = {node: graph.placeholder(node.name) for node in program.inputs}
    for node in program.graph.nodes:
        if node in inputs:
            values[node] = inputs[node]
        elif node.op == "placeholder":
            name = names.setdefault(id(weights[node.name]), node.name)
            if name == node.name:
                _register(root, name, weights[name])
            values[node] = graph.get_attr(name)
        elif node.op == "call_function":
            values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(values[program.outputs[0]])
    graph.lint()
    return fx.GraphModule(root, graph)


def _register(root: nn.Module, name: str, weight: Tensor) -> None:
    if isinstance(weight, nn.Parameter):
        root.register_parameter(name, weight)
    else:
        root.register_buffer(name, weight, persistent=False)
