"""Whether two computations are the same nodes over the same inputs, whatever their names and order.

Every value gets a number that stands for how it is computed: operator, attributes and the numbers of its inputs. Equal
numbers are equal computations. A function of a model is followed node by node; a body of ours is then built with a
``Maker`` that gives out the numbers of the function's values, only as far as the function goes along.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, TensorProto

from ryzen_compile.backends.onnxruntime.node_facts import operator_of

NOTHING = -1  # an input that is left out
Key = tuple[Hashable, ...]


class Structure:
    """What a function computes. Reading it raises nothing, whatever the function holds."""

    def __init__(self, function: FunctionProto) -> None:
        self.arity = len(function.input)
        self.size = function.ByteSize()
        self._numbers: dict[Key, int] = {}
        self._made: Counter[int] = Counter()  # how often each number is worked out
        self._results = self._followed(function)

    def is_body(self, body: Callable[..., tuple[int, ...]]) -> bool:
        """Whether these are the nodes of ``body``, neither fewer nor more. It is built up to the first that is not."""
        maker = _Known(self._numbers)
        try:
            results = body(maker, *(maker.number(_input(place)) for place in range(self.arity)))
        except _UnknownError:
            return False
        return results == self._results and maker.made == self._made

    def _followed(self, function: FunctionProto) -> tuple[int, ...] | None:
        """The results; None for a function that bodies of ours cannot be."""
        if function.attribute or function.attribute_proto:
            return None
        known = {name: self._number(_input(place)) for place, name in enumerate(function.input)}
        if len(known) != len(function.input) or "" in known:
            return None
        known[""] = NOTHING
        for node in function.node:
            domain, op_type = operator_of(node)
            attributes = {a.name: _value(a) for a in node.attribute}
            if any(name not in known for name in node.input) or None in attributes.values():
                return None
            twice = len(attributes) != len(node.attribute) or any(name in known for name in node.output)
            if domain or node.overload or twice or len(node.output) != 1:
                return None
            number = self._number(_node(op_type, [known[name] for name in node.input], attributes))
            self._made[number] += 1
            known[node.output[0]] = number
        return tuple(known[name] for name in function.output) if known.keys() >= set(function.output) else None

    def _number(self, key: Key) -> int:
        return self._numbers.setdefault(key, len(self._numbers))


class _UnknownError(Exception):
    """A body has a node that the function has not."""


class _Known:
    """A ``Maker`` of nodes with one result, of the standard domain, that are known already."""

    def __init__(self, numbers: Mapping[Key, int]) -> None:
        self._numbers = numbers
        self.made: Counter[int] = Counter()

    def number(self, key: Key) -> int:
        if key not in self._numbers:
            raise _UnknownError
        return self._numbers[key]

    def op(self, op_type: str, *inputs: int | None, **attributes: Any) -> int:
        number = self.number(_node(op_type, [NOTHING if value is None else value for value in inputs], attributes))
        self.made[number] += 1
        return number

    def constant(self, value: Any, dtype: type = np.float32) -> int:
        array: np.ndarray = np.asarray(value, dtype=dtype)
        stored = array.astype(array.dtype.newbyteorder("<")).tobytes()  # as a model file has it
        return self.op("Constant", value=(onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, stored))

    def ints(self, *values: int) -> int:
        return self.constant(values, np.int64)


def _input(place: int) -> Key:
    return "input", place


def _node(op_type: str, inputs: Sequence[int], attributes: Mapping[str, Any]) -> Key:
    return op_type, tuple(inputs), tuple(sorted(attributes.items()))


def _value(attribute: AttributeProto) -> Hashable | None:
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
