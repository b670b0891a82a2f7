"""Folding: expressions over constants become initializers that are computed when they are written, and then forgotten.

``cat(w_q, w_k, w_v)`` transposed is a whole weight matrix: computing all of those at once would double the model's
memory. A folded initializer knows its shape and how to compute itself from the tensors below it; writing a model takes
memory for about one tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray
Shape = tuple[int, ...]
Operands = list[ir.TensorProtocol | None]
Attributes = dict[str, Any]

UNARY: dict[str, Callable[[Array], Array]] = {
    "Identity": lambda x: x,
    "Neg": np.negative,
    "Abs": np.abs,
    "Exp": np.exp,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
}
BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": operator.truediv,
    "Pow": np.power,
}


def fold_constants(graph: ir.Graph) -> int:
    """Replaces every node that reads constants only by lazy initializers; returns how many nodes went."""
    nodes = constant_nodes(graph)
    for node in nodes:
        operands = [None if value is None else value.const_value for value in node.inputs]
        for index, output in enumerate(node.outputs):
            _replace(graph, output, _lazy(node, operands, index))
        graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    return len(nodes)


def constant_nodes(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that read constants only, directly or through each other, in graph order."""
    found: list[ir.Node] = []
    constant = set(graph.initializers.values())
    results = set(graph.outputs)
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if _is_known(node) and constant.issuperset(inputs) and results.isdisjoint(node.outputs):
            found.append(node)
            constant.update(node.outputs)
    return found


def _is_known(node: ir.Node) -> bool:
    if node.domain != "" or not node.inputs:
        return False
    if node.op_type == "Div":  # ONNX rounds integer division towards zero, numpy down
        return node.inputs[0] is not None and node.inputs[0].dtype in {ir.DataType.FLOAT, ir.DataType.DOUBLE}
    return node.op_type in SHAPES


def _replace(graph: ir.Graph, output: ir.Value, tensor: ir.LazyTensor) -> None:
    # The name goes from the node's result to the initializer, so that readers of the file recognise it.
    name, output.name = output.name, None
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    tensor.name = name
    graph.register_initializer(value)
    output.replace_all_uses_with(value)


def _lazy(node: ir.Node, operands: Operands, index: int) -> ir.LazyTensor:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    op_type = node.op_type
    shape = SHAPES[op_type](operands, attributes, index)
    first = operands[0]
    if first is None:
        raise ValueError(f"{op_type} has no first input")
    dtype = ir.DataType(attributes["to"]) if op_type == "Cast" else first.dtype

    def compute() -> ir.Tensor:
        arrays = [None if operand is None else operand.numpy() for operand in operands]
        result = np.asarray(EVALUATE[op_type](arrays, attributes, index)).reshape(shape)
        return ir.Tensor(np.ascontiguousarray(result, dtype=dtype.numpy()), dtype=dtype)

    return ir.LazyTensor(compute, dtype, ir.Shape(shape))


# --- shapes, without touching data ------------------------------------------------------------------------------------
def _dims(operand: ir.TensorProtocol | None) -> Shape:
    return tuple(int(d) for d in operand.shape) if operand is not None else ()  # type: ignore[arg-type]


def _ints(operand: ir.TensorProtocol | None) -> list[int]:
    return [int(i) for i in operand.numpy().reshape(-1)] if operand is not None else []


def _broadcast_shape(operands: Operands, _: Attributes, __: int) -> Shape:
    return np.broadcast_shapes(*(_dims(operand) for operand in operands))


def _transpose_shape(operands: Operands, attributes: Attributes, _: int) -> Shape:
    dims = _dims(operands[0])
    return tuple(dims[axis] for axis in attributes.get("perm", range(len(dims))[::-1]))


def _concat_shape(operands: Operands, attributes: Attributes, _: int) -> Shape:
    dims = list(_dims(operands[0]))
    axis = attributes["axis"] % len(dims)
    dims[axis] = sum(_dims(operand)[axis] for operand in operands)
    return tuple(dims)


def _reshape_shape(operands: Operands, attributes: Attributes, _: int) -> Shape:
    dims, wanted = _dims(operands[0]), _ints(operands[1])
    if not attributes.get("allowzero"):
        wanted = [dims[i] if size == 0 else size for i, size in enumerate(wanted)]
    known = int(np.prod([size for size in wanted if size != -1]))
    return tuple(int(np.prod(dims)) // known if size == -1 else size for size in wanted)


def _squeeze_shape(operands: Operands, _: Attributes, __: int) -> Shape:
    dims = _dims(operands[0])
    axes = {axis % len(dims) for axis in _ints(operands[1])} if len(operands) > 1 else set()
    return tuple(d for i, d in enumerate(dims) if (i not in axes if axes else d != 1))


def _unsqueeze_shape(operands: Operands, _: Attributes, __: int) -> Shape:
    dims, axes = list(_dims(operands[0])), _ints(operands[1])
    for axis in sorted(axis % (len(dims) + len(axes)) for axis in axes):
        dims.insert(axis, 1)
    return tuple(dims)


def _expand_shape(operands: Operands, _: Attributes, __: int) -> Shape:
    return np.broadcast_shapes(_dims(operands[0]), tuple(_ints(operands[1])))


def _slices(dims: Shape, starts: list[int], ends: list[int], axes: list[int], steps: list[int]) -> tuple[slice, ...]:
    picked = [slice(None)] * len(dims)
    for i, axis in enumerate(axes or range(len(starts))):
        step = steps[i] if steps else 1
        # Backwards, ONNX says "past the first element" by a very negative end, numpy by None.
        end = None if step < 0 and ends[i] < -dims[axis] else ends[i]
        picked[axis] = slice(starts[i], end, step)
    return tuple(picked)


def _slice_shape(operands: Operands, _: Attributes, __: int) -> Shape:
    dims = _dims(operands[0])
    padded = [*operands, None, None]
    picked = _slices(dims, *(_ints(operand) for operand in padded[1:5]))
    return tuple(len(range(*cut.indices(size))) for cut, size in zip(picked, dims, strict=True))


def _split_sizes(dims: Shape, sizes: list[int], attributes: Attributes) -> tuple[int, list[int]]:
    axis = attributes.get("axis", 0) % len(dims)
    if not sizes:
        count = attributes["num_outputs"]
        each = -(-dims[axis] // count)
        sizes = [min(each, dims[axis] - each * i) for i in range(count)]
    return axis, sizes


def _split_shape(operands: Operands, attributes: Attributes, index: int) -> Shape:
    dims = list(_dims(operands[0]))
    axis, sizes = _split_sizes(tuple(dims), _ints(operands[1]) if len(operands) > 1 else [], attributes)
    dims[axis] = sizes[index]
    return tuple(dims)


def _gather_shape(operands: Operands, attributes: Attributes, _: int) -> Shape:
    dims = _dims(operands[0])
    axis = attributes.get("axis", 0) % len(dims)
    return (*dims[:axis], *_dims(operands[1]), *dims[axis + 1 :])


def _same_shape(operands: Operands, _: Attributes, __: int) -> Shape:
    return _dims(operands[0])


# --- values -----------------------------------------------------------------------------------------------------------
Arrays = Sequence[Any]


def _slice(arrays: Arrays, _: Attributes, __: int) -> Array:
    padded = [*arrays, None, None]
    numbers = [[] if a is None else [int(i) for i in a] for a in padded[1:5]]
    result: Array = arrays[0][_slices(arrays[0].shape, *numbers)]
    return result


def _split(arrays: Arrays, attributes: Attributes, index: int) -> Array:
    x = arrays[0]
    axis, sizes = _split_sizes(x.shape, [int(i) for i in arrays[1]] if len(arrays) > 1 else [], attributes)
    start = sum(sizes[:index])
    result: Array = x[(slice(None),) * axis + (slice(start, start + sizes[index]),)]
    return result


def _elementwise(function: Callable[..., Any]) -> Callable[[Arrays, Attributes, int], Array]:
    return lambda arrays, _, __: function(*arrays)


SHAPES: dict[str, Callable[[Operands, Attributes, int], Shape]] = {
    **dict.fromkeys(UNARY, _same_shape),
    **dict.fromkeys(BINARY, _broadcast_shape),
    "Cast": _same_shape,
    "Concat": _concat_shape,
    "Expand": _expand_shape,
    "Gather": _gather_shape,
    "Reshape": _reshape_shape,
    "Slice": _slice_shape,
    "Split": _split_shape,
    "Squeeze": _squeeze_shape,
    "Transpose": _transpose_shape,
    "Unsqueeze": _unsqueeze_shape,
}
EVALUATE: dict[str, Callable[[Arrays, Attributes, int], Any]] = {
    **{name: _elementwise(function) for name, function in UNARY.items()},
    **{name: _elementwise(function) for name, function in BINARY.items()},
    "Cast": lambda a, _, __: a[0],
    "Concat": lambda a, attributes, _: np.concatenate(a, axis=attributes["axis"]),
    "Expand": lambda a, _, __: a[0] * np.ones([int(i) for i in a[1]], a[0].dtype),
    "Gather": lambda a, attributes, _: np.take(a[0], a[1], axis=attributes.get("axis", 0)),
    "Reshape": lambda a, _, __: a[0],  # every result is given its shape
    "Slice": _slice,
    "Split": _split,
    "Squeeze": lambda a, _, __: a[0],
    "Transpose": lambda a, attributes, _: np.transpose(a[0], attributes.get("perm")),
    "Unsqueeze": lambda a, _, __: a[0],
}
