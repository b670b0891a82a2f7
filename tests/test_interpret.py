"""Interpret: the values of a graph or a part of it, in float32 or float64, computing only what is asked for."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, fx, nn

from ryzen_compile.edit import Edit
from ryzen_compile.interpret import cached_feeds, empty_caches, interpret, text_feeds
from ryzen_compile.program import Program, is_call, op_name
from ryzen_compile.spec import CacheSlot
from tests.passes.graphs import captured, program_of

aten = torch.ops.aten
X = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))


class Chain(nn.Module):
    """Two weights, one read twice, a constructor, and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Linear(7, 7, bias=False), nn.Linear(7, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w(x).split((3, 4), dim=-1)
        again = self.w(x + torch.ones(7) * 0.1)
        return self.v(again) * b + a.sum(-1, keepdim=True).to(torch.float32)


@pytest.fixture(scope="module")
def chain() -> tuple[Chain, Program]:
    torch.manual_seed(0)
    module = Chain()
    return module, program_of(module, X)


def nodes(program: Program, name: str) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.op == "call_function" and op_name(n) == name]


def test_is_the_module(chain: tuple[Chain, Program]) -> None:
    module, program = chain
    for x in (X, X[:1, :1], torch.randn(3, 31, 7)):
        (got,) = interpret(program, {program.inputs[0]: x}, list(program.outputs))
        torch.testing.assert_close(got, module(x).detach(), rtol=0, atol=0)
        assert not got.requires_grad


def test_double_computes_and_returns_float64(chain: tuple[Chain, Program]) -> None:
    module, program = chain
    seen: list[torch.dtype] = []
    (got,) = interpret(
        program,
        {program.inputs[0]: X},
        list(program.outputs),
        double=True,
        watch=lambda _, value: seen.append(value.dtype) if isinstance(value, Tensor) else None,
    )
    assert got.dtype == torch.float64
    assert set(seen) == {torch.float64}  # constructors and casts to float32 included
    w, v, x = module.w.weight.detach().double(), module.v.weight.detach().double(), X.double()
    rows = x @ w.T
    want = ((x + 0.1) @ w.T @ v.T) * rows[..., 3:] + rows[..., :3].sum(-1, keepdim=True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    assert all(t.dtype == torch.float32 for t in program.weights.values())


def test_double_leaves_integers_alone() -> None:
    program = captured("llama")
    ids = torch.tensor([[3, 5, 7]])
    feeds = dict(zip(program.inputs, (ids, torch.arange(3)[None]), strict=True))
    (single,) = interpret(program, feeds, [program.outputs[0]])
    (double,) = interpret(program, feeds, [program.outputs[0]], double=True)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert 0 < float((single - double).abs().max()) < 1e-5


def test_part_of_a_graph(chain: tuple[Chain, Program]) -> None:
    _, program = chain
    second = nodes(program, "aten.linear")[1]
    ran: list[str] = []
    given = torch.full((2, 5, 7), 2.0)
    value, same = interpret(
        program, {second.args[0]: given}, [second, second.args[0]], watch=lambda node, _: ran.append(node.name)
    )
    assert ran == [second.name]  # nothing before it, nothing behind it
    assert same is given
    torch.testing.assert_close(value, given @ program.weights[second.args[1].name].T, rtol=1e-6, atol=1e-6)


def test_a_weight_can_be_a_target_and_can_be_replaced(chain: tuple[Chain, Program]) -> None:
    _, program = chain
    linear = nodes(program, "aten.linear")[0]
    assert interpret(program, {}, [linear.args[1]])[0] is program.weights[linear.args[1].name]
    zeros = {name: torch.zeros_like(t) for name, t in program.weights.items()}
    value = interpret(program, {program.inputs[0]: X}, [linear], weights=zeros)[0]
    assert not value.any() and value.shape == (2, 5, 7)


def test_an_input_that_is_not_fed_is_missed(chain: tuple[Chain, Program]) -> None:
    _, program = chain
    with pytest.raises(KeyError, match="x"):
        interpret(program, {}, list(program.outputs))


def test_values_are_dropped_after_their_last_reader() -> None:
    class Long(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(20):
                x = torch.cos(x) + 1
            return x

    program = program_of(Long(), X)
    alive: list[weakref.ref] = []
    most = 0

    def watch(node: fx.Node, value: object) -> None:
        nonlocal most
        alive.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in alive))

    interpret(program, {program.inputs[0]: X}, list(program.outputs), watch=watch)
    assert len(alive) == 40
    assert most <= 2  # the value and the one it was made of


def test_a_target_in_the_middle_is_kept(chain: tuple[Chain, Program]) -> None:
    _, program = chain
    first, second = nodes(program, "aten.linear")[:2]
    early, late, split = interpret(program, {program.inputs[0]: X}, [first, program.outputs[0], second])
    alone = interpret(program, {program.inputs[0]: X}, [first])[0]
    assert torch.equal(early, alone)
    assert late.shape == (2, 5, 4) and split.shape == (2, 5, 7)


def test_weights_are_read_right_before_their_first_reader() -> None:
    program = captured("llama")
    order: list[str] = []

    class Recorder(dict):
        def __getitem__(self, name: str) -> Tensor:
            order.append(name)
            return super().__getitem__(name)

    feeds = dict(zip(program.inputs, (torch.tensor([[3, 5]]), torch.arange(2)[None]), strict=True))
    ran: list[int] = []
    interpret(
        program,
        feeds,
        [program.outputs[0]],
        weights=Recorder(program.weights),
        watch=lambda node, _: ran.append(len(order)) if is_call(node, aten.linear) else None,
    )
    assert len(order) == len(set(order))
    assert ran == sorted(set(ran)) and ran[0] < ran[-1] == len(order)


# --- what is fed ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fed() -> Program:
    """A graph with the inputs of a cached one, in no order, and slots of several kinds."""
    edit = Edit(captured("llama"), "a_test")
    for name in ("attention_mask", *(f"past_key_values_{i}_{kind}" for i in range(3) for kind in ("key", "value"))):
        edit.add_input(name, edit.fake_empty((2, 3), torch.float32))
    edit.set_cache(
        (
            CacheSlot(0, 2, 16, 8),
            CacheSlot(1, 3, 16, 32, "int8", "int4-g16", window=5),
            CacheSlot(2, 1, 6, 6, "int4", "int8", window=200),
        ),
        heads=4,
    )
    return edit.finish()


def test_empty_caches_are_in_the_inputs_order_and_as_they_are_stored(fed: Program) -> None:
    sizes = [tuple(x.shape) for x in empty_caches(fed, 2, 31)]
    assert sizes == [(2, 2, 31, 16), (2, 2, 31, 8), (2, 3, 31, 16), (2, 3, 31, 20), (2, 1, 200, 3), (2, 1, 200, 6)]
    rolling = empty_caches(fed, 2, 31, rolling=True)
    rows = [31, 31, 5 + 16, 5 + 16, 225, 225]  # of a window there are a few more rows, whatever the capacity
    assert [tuple(x.shape) for x in rolling] == [(*s[:2], n, s[3]) for s, n in zip(sizes, rows, strict=True)]
    kinds = [torch.float32, torch.float32, torch.int8, torch.uint8, torch.uint8, torch.int8]
    assert [x.dtype for x in rolling] == kinds and not any(x.any() for x in rolling)
    assert len({x.data_ptr() for x in rolling}) == 6


def test_text_is_fed_by_name(fed: Program) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    caches = empty_caches(fed, 2, 13)
    feeds = {node.name: value for node, value in text_feeds(fed, ids, start=10, caches=caches).items()}
    assert list(feeds) == [node.name for node in fed.inputs]
    assert torch.equal(feeds["input_ids"], ids)
    assert feeds["position_ids"].tolist() == [[10, 11, 12]] * 2
    assert feeds["attention_mask"].tolist() == [[1] * 13] * 2
    assert feeds["past_key_values_1_value"] is caches[3]
    whole = {node.name: value for node, value in cached_feeds(fed, ids).items()}
    assert whole["position_ids"].tolist() == [[0, 1, 2]] * 2 and whole["attention_mask"].shape == (2, 3)
    assert [whole[f"past_key_values_{i}_key"].shape[2] for i in range(3)] == [3, 5, 200]
    with pytest.raises(ValueError, match="shorter"):
        text_feeds(fed, ids, caches=caches[:5])
