"""The law: every way to break it is named, with the node and where it came from."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from ryzen_compile.errors import PassError
from ryzen_compile.program import Program, is_call
from ryzen_compile.verify import verify
from tests.passes.graphs import captured

aten = torch.ops.aten


def head(program: Program) -> fx.Node:
    return next(n for n in reversed(program.graph.nodes) if is_call(n, aten.linear))


def results(program: Program, *nodes: fx.Node) -> None:
    program.graph.output_node().args = (nodes,)


def add_call(program: Program, target: Callable, *args: object) -> fx.Node:
    with program.graph.inserting_before(head(program)):
        node = program.graph.call_function(target, args)
    node.meta["val"] = head(program).meta["val"]
    node.meta["nn_module_stack"] = head(program).meta["nn_module_stack"]
    return node


def not_linted(program: Program) -> None:
    linear = head(program)
    linear.append(linear.args[0])  # its input after itself


def no_value(program: Program) -> None:
    del head(program).meta["val"]


def foreign_operator(program: Program) -> None:
    add_call(program, torch.ops.prims.neg.default, head(program).args[0])


def python_call(program: Program) -> None:
    add_call(program, time.sleep, head(program).args[0])


def attribute(program: Program) -> None:
    with program.graph.inserting_before(head(program)):
        node = program.graph.create_node("call_method", "abs", (head(program).args[0],))
    node.meta["val"] = head(program).meta["val"]


def input_unnamed(program: Program) -> None:
    program.exported.graph_signature.input_specs.pop(0)


def input_imagined(program: Program) -> None:
    spec = InputSpec(InputKind.USER_INPUT, TensorArgument("nowhere"), None)
    program.exported.graph_signature.input_specs.append(spec)


def inputs_swapped(program: Program) -> None:
    specs = program.exported.graph_signature.input_specs
    specs[-1], specs[-2] = specs[-2], specs[-1]


def output_unnamed(program: Program) -> None:
    results(program, head(program).args[0])


def output_is_an_input(program: Program) -> None:
    results(program, program.inputs[0])
    program.exported.graph_signature.output_specs[0].arg.name = program.inputs[0].name


def returned_twice(program: Program) -> None:
    results(program, head(program), head(program))
    program.exported.graph_signature.output_specs.append(program.exported.graph_signature.output_specs[0])


BREAKS = {
    not_linted: r"lint: .*before it has been defined",
    no_value: r"linear\w* has no meta\['val'\]",
    foreign_operator: r"neg\w* \(lm_head\) calls prims\.neg\.default, expected aten or ryzen",
    python_call: r"sleep\w* \(lm_head\) calls <built-in function sleep>, expected aten or ryzen",
    attribute: r"abs\w* is a call_method",
    input_unnamed: r"signature inputs differ from the placeholders: \['p_",
    input_imagined: r"signature inputs differ from the placeholders: \['nowhere'\]",
    inputs_swapped: r"signature inputs differ from the placeholders: ",
    output_unnamed: r"signature outputs are \['linear\w*'\], the graph returns \['slice\w*'\]",
    output_is_an_input: "output input_ids is an input",
    returned_twice: "one value is returned twice",
}


@pytest.mark.parametrize("breach", BREAKS, ids=lambda f: f.__name__)
def test_each_violation_is_named(breach: Callable[[Program], None]) -> None:
    program = captured("llama").copy()
    program = program.with_graph(program.graph, program.exported.state_dict, program.exported.constants)
    signature = program.exported.graph_signature
    signature.output_specs[:] = [type(s)(s.kind, TensorArgument(s.arg.name), s.target) for s in signature.output_specs]
    verify(program)
    breach(program)
    with pytest.raises(PassError, match=BREAKS[breach]) as caught:
        verify(program)
    assert caught.value.message.startswith("the graph breaks the IR's law: ")


def test_shape_arithmetic_is_lawful() -> None:
    program = captured("llama").copy()
    size = next(n for n in program.graph.nodes if is_call(n, aten.sym_size))
    with program.graph.inserting_after(size):
        node = program.graph.call_function(operator.mul, (size, 2))
    node.meta["val"] = size.meta["val"] * 2
    verify(program)


def test_ten_violations_are_listed_and_the_rest_counted() -> None:
    program = captured("llama").copy()
    calls = [n for n in program.graph.nodes if n.op == "call_function"][:13]
    for node in calls:
        del node.meta["val"]
    with pytest.raises(PassError) as caught:
        verify(program)
    assert caught.value.message.count("has no meta['val']") == 10
    assert caught.value.message.endswith("(+3 more)")
