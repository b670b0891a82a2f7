"""Program: what it knows of its graph, and copies that share weights and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ryzen_compile.capture import capture
from ryzen_compile.program import Program, is_call, is_operator, module_path, op_name, shape
from ryzen_compile.verify import verify
from tests.passes.graphs import Graph, captured
from tests.zoo import CONTEXT, VOCAB, NanoDecoder

aten = torch.ops.aten


@pytest.fixture(scope="module")
def nano() -> tuple[nn.Module, Program]:
    """A decoder whose head is its embedding, and its capture."""
    torch.manual_seed(0)
    model = NanoDecoder(width=32, heads=2, layers=1).eval()
    return model, capture(model)


@pytest.fixture(scope="module")
def llama() -> Program:
    return captured("llama")


def tensors(program: Program) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in program.weights.items()}


def test_weights_are_the_users_own_storage(nano: tuple[nn.Module, Program]) -> None:
    model, program = nano
    stores = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    named = dict(model.named_parameters(remove_duplicate=False))
    for placeholder, name in program.weight_names.items():
        own = named.get(name)
        if own is not None:
            assert program.weights[placeholder].data_ptr() == own.data_ptr()
    assert {p.data_ptr() for p in model.parameters()} <= set(tensors(program).values()) <= stores


def test_a_change_of_the_model_is_seen(nano: tuple[nn.Module, Program]) -> None:
    model, program = nano
    before = model.norm.bias[0].item()
    with torch.no_grad():
        model.norm.bias[0] = 7.0
    seen = [t[0].item() for t in program.weights.values() if t.data_ptr() == model.norm.bias.data_ptr()]
    with torch.no_grad():
        model.norm.bias[0] = before
    assert seen == [7.0]


def test_tied_weights_are_one_tensor(nano: tuple[nn.Module, Program], llama: Program) -> None:
    model, program = nano
    table = next(n for n in program.graph.nodes if is_call(n, aten.embedding)).args[0]
    head = next(n for n in reversed(program.graph.nodes) if is_call(n, aten.linear)).args[1]
    assert program.weights[table.name].data_ptr() == program.weights[head.name].data_ptr()
    assert program.weights[table.name].data_ptr() == model.wte.weight.data_ptr()
    assert program.spec.tied
    assert not llama.spec.tied


def test_a_copy_shares_weights_and_nothing_else(llama: Program) -> None:
    ops, inputs, stores = llama.ops(), [n.name for n in llama.inputs], tensors(llama)
    twin = llama.copy()
    assert tensors(twin) == stores
    assert [n.name for n in twin.graph.nodes] == [n.name for n in llama.graph.nodes]
    assert set(twin.graph.nodes).isdisjoint(llama.graph.nodes)
    assert all(a.meta["val"] is b.meta["val"] for a, b in zip(twin.inputs, llama.inputs, strict=True))
    verify(twin)

    head = next(n for n in reversed(twin.graph.nodes) if is_call(n, aten.linear))
    twin.graph.output_node().args = ((head.args[0],),)
    twin.exported.graph_signature.input_specs.pop()
    twin.exported.state_dict.clear()
    next(iter(twin.graph.nodes)).meta["mark"] = True
    assert llama.ops() == ops
    assert [n.name for n in llama.inputs] == inputs
    assert tensors(llama.copy()) == stores
    assert not any("mark" in n.meta for n in llama.graph.nodes)
    verify(llama)


def test_a_copy_computes_the_same(llama: Program) -> None:
    ids = torch.randint(3, 99, (3, 7), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(7).repeat(3, 1)
    torch.testing.assert_close(Graph(llama.copy())(ids, positions), Graph(llama)(ids, positions), rtol=0, atol=0)


def test_inputs_and_outputs(llama: Program) -> None:
    assert [n.name for n in llama.inputs] == ["input_ids", "position_ids"]
    assert llama.input("position_ids") is llama.inputs[1]
    assert llama.input("attention_mask") is None
    assert len(llama.outputs) == 1
    assert llama.output_names == [llama.outputs[0].name]
    assert set(llama.weights) == set(llama.weight_names)
    assert set(llama.weights).isdisjoint(n.name for n in llama.inputs)


def test_what_is_known_of_a_decoder(nano: tuple[nn.Module, Program], llama: Program) -> None:
    spec = llama.spec
    assert (spec.layers, spec.heads, spec.kv_heads, spec.head_dim) == (2, 4, 2, 16)
    assert (spec.hidden, spec.vocab, spec.context, spec.architecture) == (64, 99, 128, "llama")
    model, program = nano
    assert (program.spec.hidden, program.spec.vocab, program.spec.context) == (32, VOCAB, CONTEXT)
    assert program.spec.parameters == sum(p.numel() for p in model.parameters())
    assert (program.spec.layers, program.spec.architecture) == (0, "NanoDecoder")  # its attention is not one node yet
    assert program.provenance["attention"] == "aten"
    assert llama.provenance["attention"] == "interface"


def test_operators_leave_out_shape_arithmetic(llama: Program) -> None:
    calls = [n for n in llama.graph.nodes if n.op == "call_function"]
    sizes = [n for n in calls if is_call(n, aten.sym_size)]
    assert sizes
    assert not any(is_operator(n) for n in sizes)
    assert len(llama.ops()) == sum(is_operator(n) for n in calls) < len(calls)
    assert llama.ops().count("ryzen.attention") == 2
    assert {name.split(".")[0] for name in llama.ops()} == {"aten", "ryzen"}


def test_questions_about_a_node(llama: Program) -> None:
    linear = next(n for n in llama.graph.nodes if is_call(n, aten.linear))
    assert op_name(linear) == "aten.linear"
    assert is_call(linear, aten.add, aten.linear) and is_call(linear, aten.linear.default)
    assert not is_call(linear, aten.add)
    assert not is_call(linear.args[1], aten.linear)  # a placeholder
    assert not is_call(3, aten.linear)
    assert shape(linear)[2] == 64 and not isinstance(shape(linear)[0], int)
    assert shape(next(n for n in llama.graph.nodes if is_call(n, aten.sym_size))) == ()
    assert module_path(linear) == "model.layers.0.self_attn.q_proj"
    assert module_path(llama.inputs[0]) == ""
