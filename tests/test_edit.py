"""Edit: new nodes carry true metadata and provenance, and the Program it started from never changes."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from ryzen_compile import ops
from ryzen_compile.edit import Edit
from ryzen_compile.interpret import interpret
from ryzen_compile.program import Program, is_call, module_path, shape
from ryzen_compile.spec import CacheSlot
from ryzen_compile.verify import verify
from tests.passes.graphs import Graph, captured

aten = torch.ops.aten
IDS, POSITIONS = torch.tensor([[5, 17, 80], [3, 41, 9]]), torch.arange(3).repeat(2, 1)


@pytest.fixture
def edit() -> Edit:
    return Edit(captured("llama"), "a_test")


@pytest.fixture(autouse=True)
def _the_source_stays() -> None:
    program = captured("llama")
    before = (program.ops(), [n.name for n in program.graph.nodes], list(program.weights), program.output_names)
    yield
    assert (program.ops(), [n.name for n in program.graph.nodes], list(program.weights), program.output_names) == before


def head(program: Program) -> fx.Node:
    return next(n for n in reversed(program.graph.nodes) if is_call(n, aten.linear))


def test_a_call_has_metadata_provenance_and_a_place(edit: Edit) -> None:
    linear = head(edit.program)
    node = edit.call(aten.mul.Tensor, linear, 2.0, before=edit.graph.output_node(), like=linear)
    assert shape(node) == shape(linear)
    assert isinstance(node.meta["val"], torch._subclasses.FakeTensor)
    assert module_path(node) == module_path(linear) == "lm_head"
    assert node.meta["rewritten_by"] == "a_test"
    names = list(edit.graph.nodes)
    assert names.index(node) == names.index(edit.graph.output_node()) - 1
    edit.set_output(0, node)
    done = edit.finish()
    verify(done)
    want = 2.0 * Graph(captured("llama"))(IDS, POSITIONS)
    torch.testing.assert_close(Graph(done)(IDS, POSITIONS), want, rtol=0, atol=0)


def test_a_wrong_shape_fails_where_the_node_is_born(edit: Edit) -> None:
    linear = head(edit.program)
    with pytest.raises(RuntimeError, match="size"):
        edit.call(aten.matmul.default, linear, linear, before=edit.graph.output_node())


def test_an_operator_of_the_dialect_and_one_of_its_results(edit: Edit) -> None:
    linear = head(edit.program)
    hidden = linear.args[0]
    both = edit.call(ops.add_rms_norm, hidden, hidden, None, 1e-5, False, before=linear)
    total = edit.item(both, 1, before=linear)
    assert both.target is torch.ops.ryzen.add_rms_norm.default
    assert shape(total) == shape(hidden)
    assert module_path(total) == module_path(both)
    edit.swap_argument(linear, hidden, total)
    done = edit.finish()
    verify(done)
    want = 2.0 * Graph(captured("llama"))(IDS, POSITIONS)
    torch.testing.assert_close(Graph(done)(IDS, POSITIONS), want, rtol=1e-5, atol=1e-6)


def test_replace_moves_the_readers_and_erases(edit: Edit) -> None:
    linear = head(edit.program)
    new = edit.call(aten.neg.default, linear.args[0], before=linear)
    twice = edit.call(aten.linear.default, new, linear.args[1], before=linear)
    edit.replace(linear, twice)
    assert linear not in set(edit.graph.nodes)
    done = edit.finish()
    verify(done)
    assert done.output_names == [done.outputs[0].name]
    torch.testing.assert_close(
        Graph(done)(IDS, POSITIONS), -Graph(captured("llama"))(IDS, POSITIONS), rtol=1e-6, atol=1e-7
    )


def test_replace_keeps_a_node_that_the_new_one_reads(edit: Edit) -> None:
    linear = head(edit.program)
    scaled = edit.call(aten.mul.Tensor, linear, 3.0, before=edit.graph.output_node())
    edit.set_output(0, scaled)
    weight = linear.args[1]
    edit.replace(weight, weight)  # a placeholder is never erased
    assert linear in set(edit.graph.nodes) and weight in set(edit.graph.nodes)


def test_constants_are_weights_once_per_tensor(edit: Edit) -> None:
    value = torch.arange(64.0)
    first = edit.add_constant("table", value)
    again = edit.add_constant("other_name", value)
    other = edit.add_constant("table", value.clone())
    assert again is first and other.name == "table_1"
    assert edit.add_constant("input_ids", value.clone()).name == "input_ids_1"
    linear = head(edit.program)
    hidden = linear.args[0]
    moved = edit.call(aten.add.Tensor, edit.call(aten.add.Tensor, hidden, first, before=linear), other, before=linear)
    edit.swap_argument(linear, hidden, moved)
    done = edit.finish()
    verify(done)
    assert done.weights["table"].data_ptr() == value.data_ptr()
    assert [n.name for n in done.inputs] == ["input_ids", "position_ids"]
    assert set(done.weights) - set(captured("llama").weights) == {"table", "table_1", "input_ids_1"}


@pytest.mark.parametrize("name", ["Wqkv_codes", "0_out", "a.b+c", "TABLE", "Table"])
def test_a_constant_may_have_any_name(edit: Edit, name: str) -> None:
    """The graph writes names in its own way, and the signature has to follow."""
    nodes = [edit.add_constant(name, torch.full((64,), float(i))) for i in range(2)]
    linear = head(edit.program)
    moved = linear.args[0]
    for node in nodes:
        moved = edit.call(aten.add.Tensor, moved, node, before=linear)
    edit.swap_argument(linear, linear.args[0], moved)
    done = edit.finish()
    verify(done)
    assert [float(done.weights[node.name][0]) for node in nodes] == [0.0, 1.0]


def test_inputs_outputs_and_slots(edit: Edit) -> None:
    batch, capacity = shape(edit.program.inputs[0])[0], edit.new_dim(11)
    given = edit.add_input("extra", edit.fake_empty((batch, capacity, 3), torch.float32))
    second = edit.add_input("more", edit.fake_empty((batch,), torch.int64))
    assert edit.new_dim(11) is not capacity and not isinstance(capacity, int)
    edit.add_output(edit.call(aten.neg.default, given, before=edit.graph.output_node()))
    edit.add_output(edit.call(aten.abs.default, second, before=edit.graph.output_node()))
    slots = (CacheSlot(0, 2, 16, 16),)
    edit.set_cache(slots, heads=4)
    done = edit.finish()
    verify(done)
    assert done.slots == slots and captured("llama").slots == ()
    assert [n.name for n in done.inputs] == ["input_ids", "position_ids", "extra", "more"]
    assert len(done.outputs) == 3
    feeds = dict(zip(done.inputs, (IDS, POSITIONS, torch.ones(2, 5, 3), torch.tensor([-1, 2])), strict=True))
    _, negative, absolute = interpret(done, feeds, list(done.outputs))
    assert torch.equal(negative, -torch.ones(2, 5, 3)) and absolute.tolist() == [1, 2]


def test_an_input_takes_another_type_and_its_readers_are_made_anew(edit: Edit) -> None:
    batch = shape(edit.program.inputs[0])[0]
    given = edit.add_input("extra", edit.fake_empty((batch, 4), torch.float32))
    reader = edit.call(aten.neg.default, given, before=edit.graph.output_node())
    edit.add_output(reader)
    edit.retype_input(given, edit.fake_empty((batch, 2), torch.int8))
    assert given.meta["rewritten_by"] == "a_test"
    edit.set_output(1, edit.call(aten.neg.default, given, before=edit.graph.output_node()))
    assert edit.erase_dead() == 1
    edit.set_slots((CacheSlot(0, 2, 16, 16, "int8", "int4"),))
    spec = edit.spec
    done = edit.finish()
    verify(done)
    assert done.spec == spec and [slot.key_format for slot in done.slots] == ["int8"]
    assert [x.meta["val"].dtype for x in (done.input("extra"), done.outputs[1])] == [torch.int8] * 2
    assert shape(done.outputs[1]) == shape(done.input("extra")) == (batch, 2)
    feeds = dict(zip(done.inputs, (IDS, POSITIONS, torch.full((2, 2), 7, dtype=torch.int8)), strict=True))
    assert torch.equal(interpret(done, feeds, [done.outputs[1]])[0], torch.full((2, 2), -7, dtype=torch.int8))


def test_a_weight_that_nothing_reads_can_go(edit: Edit) -> None:
    linear = head(edit.program)
    weight = linear.args[1]
    edit.set_output(0, edit.call(aten.neg.default, linear.args[0], before=edit.graph.output_node()))
    assert edit.erase_dead() == 1
    edit.remove_input(weight)
    done = edit.finish()
    verify(done)
    assert weight.name not in done.weights
    assert len(done.weights) == len(captured("llama").weights) - 1
    assert set(done.exported.state_dict) < set(captured("llama").exported.state_dict)


def test_a_shared_store_outlives_one_of_its_names() -> None:
    edit = Edit(captured("llama"), "a_test")
    value = torch.ones(64)
    edit.add_constant("kept", value)
    gone = edit.add_constant("gone", torch.zeros(64))
    edit.remove_input(gone)
    done = edit.finish()
    assert "gone" not in done.weights and done.weights["kept"] is value


def test_dead_chains_are_erased_whole(edit: Edit) -> None:
    end = edit.graph.output_node()
    node = head(edit.program)
    for _ in range(3):
        node = edit.call(aten.neg.default, node, before=end)
    assert edit.erase_dead() == 3
    assert edit.erase_dead() == 0
    assert edit.finish().ops() == captured("llama").ops()
