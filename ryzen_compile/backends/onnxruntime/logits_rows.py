"""How many tokens the logits are computed of, chosen step by step.

An artifact's head reads the newest token's state alone: a Slice with constant bounds. Checking several drafted tokens
takes the logits of each of them. In memory, when a session is made, the Slice's start becomes an input of the graph;
the file stays as it is.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from ryzen_compile.backends.onnxruntime.model_index import ModelIndex
from ryzen_compile.backends.onnxruntime.node_facts import CONTRIB, PLAIN_ACTIVATIONS, attributes_of, operator_of

START = "logits_start"  # the input: minus the number of tokens, int64 (1,)
ROWS = "logits_rows"  # the dimension that follows it
TO_THE_END = (1 << 31) - 1  # an end from which on a Slice stops with its tensor, which is no longer than that
# With a constant behind what they multiply, and that as it is: a row of the result for each row.
PRODUCTS = frozenset((("", "MatMul"), (CONTRIB, "FusedMatMul"), (CONTRIB, "MatMulNBits")))
TURNED = ("transA", "transBatchA")
# Each token's result depends on that token alone, as long as constants do not vary along tokens.
ELEMENTWISE = frozenset(
    (
        *(("", name) for name in ("Add", "Sub", "Mul", "Div", "Neg", "Cast", "Gelu")),
        *PLAIN_ACTIVATIONS,
        *((CONTRIB, name) for name in ("BiasGelu", "QuickGelu")),
    )
)


def choose_rows(model: ModelProto) -> str:
    """Makes the first token that ``logits`` are computed of an input of ``model``, in place; returns the input's name.

    Empty, and the model as it was, unless logits are the newest token's: on the way to them nothing but products with
    constants and elementwise operators behind a Slice ``[:, -1:]`` of the states of all new tokens, and no other reader
    of anything on it. The input is int64 ``(1,)``: -n for the n newest tokens, ``logits`` is then ``(B, n, V)``.
    """
    index = ModelIndex(model)
    path = _path(index)
    if not path:
        return ""
    start = index.fresh(START)
    path[-1].input[1] = start
    model.graph.input.append(onnx.helper.make_tensor_value_info(start, TensorProto.INT64, [1]))
    # What is told of these values' shapes would no longer be true.
    names = {node.output[0] for node in path}
    for value in (*model.graph.value_info, *model.graph.output):
        if value.name in names and len(value.type.tensor_type.shape.dim) > 1:
            value.type.tensor_type.shape.dim[1].dim_param = ROWS
    return start


def _path(index: ModelIndex) -> list[NodeProto]:
    """The nodes from the one that gives the logits back to the Slice; none where the graph is of another form."""
    made = {name: node for node in index.nodes for name in node.output}
    path: list[NodeProto] = []
    name = "logits"
    while name in made:
        node = made[name]
        read_once = name not in index.readers if not path else index.only_reader(name) is not None
        if not read_once or len(node.output) != 1:
            return []
        path.append(node)
        if operator_of(node) == ("", "Slice"):
            return path if _takes_the_last(node, index) else []
        name = _token_wise(node, index)
    return []


def _token_wise(node: NodeProto, index: ModelIndex) -> str:
    """What a node computes its result from, token by token; empty for a node that may do anything else."""
    operator = operator_of(node)
    read = [name for name in node.input if name and name not in index.constants]
    fixed = [index.constants[name].dims for name in node.input if name in index.constants]
    if len(read) != 1 or (operator in PRODUCTS and node.input[0] != read[0]):
        return ""
    if operator in PRODUCTS:
        facts = attributes_of(node)
        turned = any(facts.get(name, 0) for name in TURNED)
        return "" if turned or (operator[1] != "MatMulNBits" and len(fixed[0]) != 2) else read[0]
    along_tokens = any(len(dims) > 3 or (len(dims) > 1 and dims[-2] != 1) for dims in fixed)
    return read[0] if operator in ELEMENTWISE and not along_tokens else ""


def _takes_the_last(node: NodeProto, index: ModelIndex) -> bool:
    """Whether a Slice is ``[:, -1:]`` of something of three dimensions, the second of which are the new tokens."""
    bounds = [_whole_number(name, index) for name in node.input[1:]]
    if len(bounds) == 3:
        bounds.append(1)  # the step that is left out
    shape, ids = index.shape(node.input[0]), index.shape("input_ids")
    if shape is None or ids is None or len(shape) != 3 or len(ids) != 2 or shape[1] != ids[1]:
        return False
    start, end, axis, step = bounds if len(bounds) == 4 else (None, None, None, None)
    return start == -1 and end is not None and end >= TO_THE_END and axis == 1 and step == 1


def _whole_number(name: str, index: ModelIndex) -> int | None:
    """The one whole number of a constant that lies in the model file itself."""
    tensor = index.constants.get(name)
    if tensor is None or tensor.data_location == TensorProto.EXTERNAL or list(tensor.dims) != [1]:
        return None
    value: np.ndarray = numpy_helper.to_array(tensor)
    return int(value[0]) if value.dtype.kind == "i" else None
