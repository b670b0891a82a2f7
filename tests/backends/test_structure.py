"""Functions and bodies of ours: the same nodes or not, and what no body can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import FunctionProto, NodeProto, TensorProto, helper

from ryzen_compile.backends.onnxruntime.structure import Structure


def concat(inputs: list[str], output: str) -> NodeProto:
    return helper.make_node("Concat", inputs, [output], axis=1)


def constant(output: str, **facts: Any) -> NodeProto:
    tensor = helper.make_tensor("", TensorProto.INT64, [2], np.int64([3, 4]).tobytes(), raw=True)
    return helper.make_node("Constant", [], [output], **({"value": tensor} | facts))


def function(
    *nodes: NodeProto, inputs: tuple[str, ...] = ("x", "y"), outputs: tuple[str, ...] = ("z",)
) -> FunctionProto:
    return helper.make_function("ryzen", "F", inputs, outputs, nodes, [helper.make_opsetid("", 21)])


def good() -> FunctionProto:
    return function(constant("c"), concat(["x", "y"], "xy"), helper.make_node("Gather", ["xy", "c"], ["z"]))


def body(e: Any, x: Any, y: Any) -> tuple[Any]:
    return (e.op("Gather", e.op("Concat", x, y, axis=1), e.ints(3, 4)),)


def test_the_same_nodes_are_the_same_in_any_order() -> None:
    assert Structure(good()).is_body(body)
    other = function(
        concat(["a", "b"], "u"),
        constant("v"),
        helper.make_node("Gather", ["u", "v"], ["w"]),
        inputs=("a", "b"),
        outputs=("w",),
    )
    assert Structure(other).is_body(body)


@pytest.mark.parametrize(
    "unlike",
    [
        lambda e, x, y: (e.op("Gather", e.op("Concat", y, x, axis=1), e.ints(3, 4)),),
        lambda e, x, y: (e.op("Gather", e.op("Concat", x, y, axis=0), e.ints(3, 4)),),
        lambda e, x, y: (e.op("Gather", e.op("Concat", x, y), e.ints(3, 4)),),
        lambda e, x, y: (e.op("Gather", e.op("Concat", x, y, axis=1), e.ints(3, 5)),),
        lambda e, x, y: (e.op("Gather", e.op("Concat", x, y, axis=1), e.constant([3, 4], np.int32)),),
        lambda e, x, y: (e.op("Gather", e.op("Concat", x, y, axis=1), e.constant([[3, 4]], np.int64)),),
        lambda e, x, y: (e.op("Gather", e.op("Concat", x, y, axis=1), e.ints(3, 4), None),),
        lambda e, x, y: (e.op("Concat", x, y, axis=1),),
        lambda e, x, y: (*body(e, x, y), e.op("Concat", x, y, axis=1)),
        lambda e, x, y: (e.ints(3, 4) and None, *body(e, x, y))[1:],  # a constant twice
    ],
)
def test_other_nodes_are_not(unlike: Callable[..., tuple[Any, ...]]) -> None:
    assert not Structure(good()).is_body(unlike)


def test_what_is_left_out_is_told_from_what_is_there() -> None:
    left_out = function(helper.make_node("Clip", ["x", "", "y"], ["z"]))
    assert Structure(left_out).is_body(lambda e, x, y: (e.op("Clip", x, None, y),))
    assert not Structure(left_out).is_body(lambda e, x, y: (e.op("Clip", x, y, None),))


def test_a_body_is_built_only_as_far_as_the_function_goes_along() -> None:
    def far(e: Any, x: Any, y: Any) -> tuple[Any]:
        e.op("Neg", x)
        raise AssertionError("built on")

    assert not Structure(good()).is_body(far)


# --- each is a function but for one thing, which no body of ours has


def _an_attribute_of_its_own(f: FunctionProto) -> None:
    f.attribute.append("alpha")


def _an_attribute_with_a_default(f: FunctionProto) -> None:
    f.attribute_proto.append(helper.make_attribute("alpha", 1))


def _an_overloaded_node(f: FunctionProto) -> None:
    f.node[1].overload = "another"


def _another_domain(f: FunctionProto) -> None:
    f.node[1].domain = "com.microsoft"


def _an_attribute_twice(f: FunctionProto) -> None:
    """The first of them would be another axis."""
    f.node[1].attribute.insert(0, helper.make_attribute("axis", 0))


def _a_referred_attribute(f: FunctionProto) -> None:
    f.node[1].attribute[0].ref_attr_name = "alpha"


def _an_external_constant(f: FunctionProto) -> None:
    f.node[0].attribute[0].t.data_location = TensorProto.EXTERNAL


def _a_node_of_two_results(f: FunctionProto) -> None:
    f.node[1].output.append("second")


EXTRAS = (
    *(_an_attribute_of_its_own, _an_attribute_with_a_default, _an_overloaded_node, _another_domain),
    *(_an_attribute_twice, _a_referred_attribute, _an_external_constant, _a_node_of_two_results),
)


@pytest.mark.parametrize("change", EXTRAS)
def test_what_no_body_has_is_not_looked_past(change: Callable[[FunctionProto], None]) -> None:
    """All else is as in the body."""
    changed = good()
    change(changed)
    assert not Structure(changed).is_body(body)


def test_a_value_has_one_meaning() -> None:
    """Whoever takes the first would see another result."""

    def longer(e: Any, x: Any, y: Any) -> tuple[Any]:
        e.op("Neg", x)
        return body(e, x, y)

    for name, same in (("other", True), ("xy", False), ("x", False)):
        f = good()
        f.node.insert(0, helper.make_node("Neg", ["x"], [name]))
        assert Structure(f).is_body(longer) == same


def test_the_results_are_those_of_the_body() -> None:
    def other(e: Any, x: Any, y: Any) -> tuple[Any]:
        xy = e.op("Concat", x, y, axis=1)
        e.op("Gather", xy, e.ints(3, 4))
        return (xy,)

    assert not Structure(good()).is_body(other)


@pytest.mark.parametrize("inputs", [("y", "y"), ("", "y")])
def test_every_input_has_a_name_of_its_own(inputs: tuple[str, ...]) -> None:
    second = lambda e, x, y: (e.op("Neg", y),)
    negated = helper.make_node("Neg", ["y"], ["z"])
    assert Structure(function(negated)).is_body(second)
    assert not Structure(function(negated, inputs=inputs)).is_body(second)


@pytest.mark.parametrize(
    ("node", "read_as"),
    [
        (helper.make_node("Constant", [], ["z"], value_float=1.0), {"value_float": None}),
        (
            constant("z", value=helper.make_tensor("", TensorProto.INT64, [2], [3, 4])),
            {"value": (TensorProto.INT64, (2,), b"")},
        ),
    ],
    ids=["another type", "a tensor in numbers"],
)
def test_attributes_that_are_not_read_are_not_looked_past(node: NodeProto, read_as: dict[str, Any]) -> None:
    assert not Structure(function(node)).is_body(lambda e, x, y: (e.op("Constant", **read_as),))


@pytest.mark.parametrize(
    "odd",
    [
        function(concat(["x", "nothing"], "z")),
        function(concat(["x", "y"], "xy")),
        function(helper.make_node("Split", ["x"], [])),
        function(),
    ],
    ids=["input from nowhere", "output from nowhere", "no result", "nothing"],
)
def test_what_cannot_be_followed_is_no_body(odd: FunctionProto) -> None:
    assert not Structure(odd).is_body(body) and not Structure(odd).is_body(lambda e, x, y: (None,))
