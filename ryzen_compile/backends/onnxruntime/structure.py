"""Whether two computations are the same nodes over the same inputs, whatever their names and order.

Every value gets a number that stands for how it is computed: operator, attributes and the numbers of its inputs. Equal
numbers, from one ``Structures``, are equal computations. A function of a model is followed node by node; a body of ours
is built with the same object in place of an emitter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, TensorProto

from ryzen_compile.backends.onnxruntime.node_facts import operator_of

NOTHING = -1  # an input that is left out
MOST_NODES = 256  # of a function; bodies of ours have fewer


class Structures:
    """Numbers of computations; a ``Maker`` of operators with one result, all of them of the standard domain."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[Any, ...], int] = {}

    def input(self, place: int) -> int:
        return self._number("input", place)

    def op(self, op_type: str, *inputs: int | None, **attributes: Any) -> int:
        return self._node(op_type, [NOTHING if value is None else value for value in inputs], attributes)

    def constant(self, value: Any, dtype: type = np.float32) -> int:
        array: np.ndarray = np.asarray(value, dtype=dtype)
        stored = array.astype(array.dtype.newbyteorder("<")).tobytes()  # as a model file has it
        return self.op("Constant", value=(onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, stored))

    def ints(self, *values: int) -> int:
        return self.constant(values, np.int64)

    def of_body(self, body: Callable[..., tuple[int, ...]], arity: int) -> tuple[int, ...]:
        """The results of a body that is built for ``arity`` inputs."""
        return body(self, *map(self.input, range(arity)))

    def of_function(self, function: FunctionProto) -> tuple[int, ...] | None:
        """The results of a function without attributes of its own; None for one that bodies of ours cannot be.

        Raises nothing, whatever the function holds.
        """
        if function.attribute or function.attribute_proto or len(function.node) > MOST_NODES:
            return None
        known = {name: self.input(place) for place, name in enumerate(function.input)} | {"": NOTHING}
        if len(known) != len(function.input) + 1:
            return None
        for node in function.node:
            domain, op_type = operator_of(node)
            attributes = {a.name: _value(a) for a in node.attribute}
            if any(name not in known for name in node.input) or any(value is None for value in attributes.values()):
                return None
            twice = len(attributes) != len(node.attribute) or any(name in known for name in node.output)
            if domain or twice or len(node.output) != 1:
                return None
            known[node.output[0]] = self._node(op_type, [known[name] for name in node.input], attributes)
        return tuple(known[name] for name in function.output) if known.keys() >= set(function.output) else None

    def _node(self, op_type: str, inputs: Sequence[int], attributes: Mapping[str, Any]) -> int:
        return self._number(op_type, tuple(inputs), tuple(sorted(attributes.items())))

    def _number(self, *key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))


def _value(attribute: AttributeProto) -> Any:
    """What an attribute of a body of ours may be, as something hashable; None for all else."""
    if attribute.ref_attr_name:
        return None
    if attribute.type == AttributeProto.INT:
        return attribute.i
    if attribute.type == AttributeProto.STRING:
        return attribute.s.decode(errors="replace")
    if attribute.type == AttributeProto.TENSOR:
        tensor = attribute.t  # the check of the artifact has compared its bytes with its shape
        inside = tensor.HasField("raw_data") and tensor.data_location != TensorProto.EXTERNAL
        return (tensor.data_type, tuple(tensor.dims), tensor.raw_data) if inside else None
    return None
