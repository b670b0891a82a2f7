"""What a node or a function of a model computes, read off its operators and attributes, never off its name.

With the operator sets that are written and read: standard operators of one version, and ONNX Runtime's own.
"""

from __future__ import annotations

from typing import Any

from onnx import AttributeProto, FunctionProto, NodeProto

CONTRIB = "com.microsoft"
OPSET = 21  # the version of the standard operators in what we write
PLAIN_ACTIVATIONS = {
    (CONTRIB, "FastGelu"): "gelu_tanh",
    (CONTRIB, "Gelu"): "gelu",
    ("", "Relu"): "relu",
    ("", "Sigmoid"): "sigmoid",
    ("", "Tanh"): "tanh",
}
# The kinds of nodes that we have operators for (see claim_report), by domain and name. Of embeddings there is none:
# they are calls of a model's own functions.
KIND_OF: dict[tuple[str, str], str] = {
    (CONTRIB, "MatMulNBits"): "matmul",
    (CONTRIB, "GroupQueryAttention"): "attention",
    ("", "SimplifiedLayerNormalization"): "norm",
    ("", "LayerNormalization"): "norm",
    (CONTRIB, "SkipSimplifiedLayerNormalization"): "norm",
    (CONTRIB, "SkipLayerNormalization"): "norm",
}
# Operators of ONNX Runtime that compute a row in another way when it is alone.
STOCK_ROWS = frozenset(
    ("MatMul", "FusedMatMul", "Gemm", "MatMulNBits", "MatMulIntegerToFloat", "MatMulInteger", "GroupQueryAttention")
)


def activation_of(node: NodeProto) -> str | None:
    """The activation that a node of one input computes, by its name in ``ops.ACTIVATIONS``; None for anything else."""
    if len([name for name in node.input if name]) != 1 or len(node.output) != 1:
        return None
    facts, operator = attributes_of(node), operator_of(node)
    if operator == (CONTRIB, "QuickGelu"):
        alpha = facts.get("alpha", 1.702)
        return {1.0: "silu", 1.702: "quick_gelu"}.get(round(alpha, 6)) if isinstance(alpha, float) else None
    if operator == ("", "Gelu"):
        return {b"none": "gelu", b"tanh": "gelu_tanh"}.get(facts.get("approximate", b"none"))
    return PLAIN_ACTIVATIONS.get(operator)


def gated_activation(function: FunctionProto) -> str | None:
    """The activation of a function that computes ``act(first half) * second half`` of its input's last dimension.

    Read off the body, by what each value in it is of the input; None for a body that computes anything else.
    """
    if len(function.input) != 1 or len(function.output) != 1 or function.attribute or function.attribute_proto:
        return None
    whole, gate, up = "whole", "gate", "up"
    known = {function.input[0]: whole}
    acted: dict[str, str] = {}  # activations of the gate
    products: dict[str, str] = {}  # of one of those and the other half
    for node in function.node:
        operator, facts, act = operator_of(node), attributes_of(node), activation_of(node)
        parts = [known.get(name) for name in node.input]
        halves = len(node.output) == 2 and "split" not in facts  # before opset 13, sizes are an attribute
        if operator == ("", "Split") and parts == [whole] and halves and facts.get("axis", 0) == -1:
            known |= {node.output[0]: gate, node.output[1]: up}
            acted[node.output[0]] = "none"
        elif act is not None and parts == [gate]:
            acted[node.output[0]] = act
        elif operator == ("", "Mul") and len(node.input) == 2 and len(node.output) == 1:
            left, right = sorted(node.input, key=lambda name: known.get(name) == up)
            if left == right and acted.get(left) == "relu":
                acted[node.output[0]] = "relu2"
            elif left in acted and known.get(right) == up:
                products[node.output[0]] = acted[left]
    return products.get(function.output[0])


def operator_of(node: NodeProto) -> tuple[str, str]:
    """Domain and name."""
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Numbers and texts by name; what is neither, which no node of these kinds has, is None."""
    fields = {AttributeProto.FLOAT: "f", AttributeProto.INT: "i", AttributeProto.STRING: "s"}
    return {a.name: getattr(a, fields[a.type]) if a.type in fields else None for a in node.attribute}


def function_called(node: NodeProto) -> tuple[str, str, str]:
    """Domain, name and overload of the function that a node calls, if there is such a one."""
    return (*operator_of(node), node.overload)
