"""The dialect inside torch.onnx: how ``ryzen::`` operators pass through it unchanged.

torch.onnx translates core ATen. Every operator that has a rule of ours is handed to it as an ONNX operator of the same
name and arguments in a domain of its own, described by a schema read off the torch operator; ``lowering`` replaces
those nodes afterwards, when all shapes are known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch

from ryzen_compile import ops
from ryzen_compile.backends.onnxruntime.emit import LOCAL
from ryzen_compile.backends.onnxruntime.rules import RULES

OpSchema = onnx.defs.OpSchema
ATTRIBUTE_TYPES = {
    "float": OpSchema.AttrType.FLOAT,
    "int": OpSchema.AttrType.INT,
    "bool": OpSchema.AttrType.INT,
    "str": OpSchema.AttrType.STRING,
}
TENSOR_TYPES = [
    f"tensor({name})"
    for name in ("float", "float16", "bfloat16", "double", "int64", "int32", "int16", "int8", "uint8", "bool")
]
SCHEMAS: dict[str, torch.FunctionSchema] = {
    name: (torch.ops.aten.linear.default if name == "linear" else getattr(ops, name)._opoverload)._schema
    for name in RULES
}


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export``: each operator with a rule -> a function that records it as a node of our domain."""
    table: dict[Callable[..., Any], Callable[..., Any]] = {}
    for name, schema in SCHEMAS.items():
        overload = torch.ops.aten.linear.default if name == "linear" else getattr(ops, name)._opoverload
        table[overload] = _recorder(name, schema)
    return table


def tensor_arity(name: str) -> int:
    """How many tensor arguments the operator's schema has, optional ones included."""
    return sum(_is_tensor(argument) for argument in SCHEMAS[name].arguments)


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """A recorded node's other arguments, by name."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _recorder(name: str, schema: torch.FunctionSchema) -> Callable[..., Any]:
    arguments = list(schema.arguments)
    record = onnxscript.values.Op(onnxscript.values.Opset(LOCAL, 1), name, _onnx_schema(name, arguments, schema))

    def translate(*args: Any, **kwargs: Any) -> Any:
        bound = {a.name: a.default_value if a.has_default_value() else None for a in arguments}
        bound |= dict(zip(bound, args, strict=False)) | kwargs
        tensors = [bound[a.name] for a in arguments if _is_tensor(a)]
        return record(*tensors, **{a.name: bound[a.name] for a in arguments if not _is_tensor(a)})

    return translate


def _onnx_schema(name: str, arguments: list[Any], schema: torch.FunctionSchema) -> OpSchema:
    option = OpSchema.FormalParameterOption
    inputs = [
        OpSchema.FormalParameter(
            a.name, f"T_{a.name}", param_option=option.Optional if "Optional" in str(a.type) else option.Single
        )
        for a in arguments
        if _is_tensor(a)
    ]
    outputs = [OpSchema.FormalParameter(f"out_{i}", f"T_out_{i}") for i in range(len(schema.returns))]
    constraints = [(parameter.type_str, TENSOR_TYPES, "") for parameter in (*inputs, *outputs)]
    attributes = [OpSchema.Attribute(a.name, ATTRIBUTE_TYPES[str(a.type)]) for a in arguments if not _is_tensor(a)]
    return OpSchema(name, LOCAL, 1, inputs=inputs, outputs=outputs, type_constraints=constraints, attributes=attributes)


def _is_tensor(argument: Any) -> bool:
    return "Tensor" in str(argument.type)
