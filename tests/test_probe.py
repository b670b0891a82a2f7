"""Probe: what depends on tokens and what on positions, and the value of a piece of graph on chosen inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from ryzen_compile.capture import capture
from ryzen_compile.probe import Probe
from ryzen_compile.program import Program, is_call, op_name
from tests.passes.graphs import program_of

aten = torch.ops.aten
C = 8


class Toy(nn.Module):
    """A value of every kind: of tokens, of position_ids, of the number of tokens, of weights alone."""

    block_size = 31

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, C)
        self.weight = nn.Parameter(torch.randn(C, C))

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        angle = torch.sin(position_ids[:, :, None].float() + torch.arange(C))
        counted = torch.exp(-torch.arange(input_ids.shape[1])[:, None].float())
        return x * angle + counted + x @ torch.tanh(self.weight)


@pytest.fixture(scope="module")
def toy() -> Program:
    torch.manual_seed(0)
    return capture(Toy())


def call(program: Program, name: str) -> fx.Node:
    return next(n for n in program.graph.nodes if n.op == "call_function" and op_name(n) == name)


def test_what_depends_on_what(toy: Program) -> None:
    probe = Probe(toy)
    of = {name: call(toy, f"aten.{name}") for name in ("embedding", "sin", "exp", "tanh", "matmul")}
    assert {of["embedding"], of["matmul"], toy.outputs[0]} <= probe.of_tokens
    assert {of["sin"], of["exp"]} <= probe.of_positions
    assert of["tanh"] not in probe.of_tokens | probe.of_positions  # of a weight alone
    assert probe.of_tokens.isdisjoint(probe.of_positions)
    assert probe.ids in probe.of_tokens and probe.positions not in probe.of_positions
    sizes = {n for n in toy.graph.nodes if is_call(n, aten.sym_size)}
    assert sizes and sizes.isdisjoint(probe.of_tokens | probe.of_positions)
    product = next(n for n in call(toy, "aten.embedding").users if is_call(n, aten.mul))
    assert product in probe.of_tokens and probe.order[product] > probe.order[of["embedding"]]


def test_evaluate_counts_positions_from_zero(toy: Program) -> None:
    probe = Probe(toy)
    sine, counted = call(toy, "aten.sin"), call(toy, "aten.exp")
    want = torch.sin(torch.arange(5)[:, None].float() + torch.arange(C))
    torch.testing.assert_close(probe.evaluate(sine, {}, 5, batch=3), want.expand(3, 5, C), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        probe.evaluate(counted, {}, 7), torch.exp(-torch.arange(7.0))[:, None], rtol=1e-6, atol=1e-7
    )


def test_evaluate_on_chosen_values(toy: Program) -> None:
    probe = Probe(toy)
    at = torch.tensor([[29, 0, 3]])
    want = torch.sin(at[..., None].float() + torch.arange(C))
    torch.testing.assert_close(
        probe.evaluate(call(toy, "aten.sin"), {probe.positions: at}, 3), want, rtol=1e-6, atol=1e-6
    )
    embedding = call(toy, "aten.embedding")
    product = next(n for n in embedding.users if is_call(n, aten.mul))
    ones = torch.ones(1, 3, C)
    torch.testing.assert_close(
        probe.evaluate(product, {embedding: ones, probe.positions: at}, 3), want, rtol=1e-6, atol=1e-6
    )
    ids = torch.tensor([[7, 2]])
    rows = next(t for name, t in toy.weights.items() if "table" in name)[ids]
    torch.testing.assert_close(probe.evaluate(embedding, {probe.ids: ids}, 2), rows, rtol=0, atol=0)


def test_a_size_is_no_tensor(toy: Program) -> None:
    probe = Probe(toy)
    with pytest.raises(TypeError, match="is not a tensor"):
        probe.evaluate(call(toy, "aten.sym_size"), {}, 3)


class Pieces(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.cos(x)
        left, right = h[..., :3], h[..., 3:]
        turned = torch.cat((-right, left), dim=-1)
        return (turned * 2 + h).relu() + torch.sin(x)


EXPANDABLE = frozenset({aten.slice, aten.neg, aten.cat, aten.mul, aten.add})


@pytest.fixture(scope="module")
def pieces() -> Program:
    return program_of(Pieces(), torch.randn(2, 5, 6))


def test_common_source_is_where_all_paths_meet(pieces: Program) -> None:
    probe = Probe(pieces)
    exit_ = call(pieces, "aten.relu").args[0]
    source, region = probe.common_source(exit_, EXPANDABLE)
    assert source is call(pieces, "aten.cos")
    assert sorted(op_name(n) for n in region) == sorted(
        ["aten.slice", "aten.slice", "aten.neg", "aten.cat", "aten.mul", "aten.add"]
    )
    assert source not in region and exit_ in region


def test_common_source_goes_on_until_it_is_accepted(pieces: Program) -> None:
    probe = Probe(pieces)
    exit_ = call(pieces, "aten.relu").args[0]
    further = probe.common_source(exit_, EXPANDABLE | {aten.cos}, until=lambda n: n.op == "placeholder")
    assert further is not None and further[0] is probe.ids


@pytest.mark.parametrize("missing", [aten.slice, aten.cat, aten.add])
def test_common_source_crosses_nothing_else(pieces: Program, missing: object) -> None:
    probe = Probe(pieces)
    assert probe.common_source(call(pieces, "aten.relu").args[0], EXPANDABLE - {missing}) is None


def test_two_sources_are_none(pieces: Program) -> None:
    probe = Probe(pieces)
    both = pieces.outputs[0]  # of cos(x) through relu, and of sin(x): neither may be crossed
    assert probe.common_source(both, EXPANDABLE | {aten.relu}) is None
    assert probe.common_source(both, EXPANDABLE | {aten.relu, aten.cos, aten.sin})[0] is probe.ids
