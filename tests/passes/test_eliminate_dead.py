"""What nothing reads goes, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ryzen_compile.capture import capture
from ryzen_compile.edit import Edit
from ryzen_compile.passes.eliminate_dead import EliminateDead
from ryzen_compile.program import Program, is_call
from ryzen_compile.verify import verify
from tests.passes.graphs import Graph, rewrite

X, R = torch.randn(2, 7, 8), torch.randn(2, 7, 8)


class Half(nn.Module):
    """Reads one of two inputs and one of two weights; a tied one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.twin = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.twin.weight = self.used.weight
        self.register_buffer("table", torch.randn(3))

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        torch.cos(r) + self.unused(x)
        return self.twin(self.used(x))


def test_unread_inputs_weights_and_calls_go() -> None:
    before, after = rewrite(EliminateDead(), Half(), X, R)
    assert after.ops == ["aten.linear", "aten.linear"]
    assert [n.name for n in after.program.inputs] == ["x"]
    assert {site.node for site in after.hits} >= {"r", "p_unused_weight"}
    assert all(site.note == "nothing reads it" for site in after.hits)
    kept = set(after.program.weight_names.values())
    assert kept <= {"used.weight", "twin.weight"} and kept
    assert set(after.program.exported.state_dict) == kept
    assert_close(after(X), before(X, R), rtol=0, atol=0)


def test_a_tensor_that_another_name_reads_is_kept() -> None:
    module = Half()
    program = rewrite(EliminateDead(), module, X, R)[1].program
    assert {t.data_ptr() for t in program.weights.values()} == {module.used.weight.data_ptr()}


def test_token_ids_stay_even_when_nothing_reads_them() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return torch.cos(r) * self.w

    before, after = rewrite(EliminateDead(), Constant(), X, R)
    assert [n.name for n in after.program.inputs] == ["x", "r"]
    assert not after.hits
    assert_close(after(X, R), before(X, R), rtol=0, atol=0)


class Tokens(nn.Module):
    block_size = 31

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


def test_positions_that_nothing_reads_are_not_asked_for() -> None:
    program = capture(Tokens())
    assert [n.name for n in program.inputs] == ["input_ids", "position_ids"]
    result = EliminateDead().run(program)
    verify(result.program)
    assert [site.node for site in result.hits] == ["position_ids"]
    assert [n.name for n in result.program.inputs] == ["input_ids"]
    assert [n.name for n in program.inputs] == ["input_ids", "position_ids"]
    ids = torch.tensor([[3, 1, 4]])
    assert_close(Graph(result.program)(ids), Graph(program)(ids, ids), rtol=0, atol=0)


def test_a_weight_freed_by_an_edit_goes_with_its_call() -> None:
    program = capture(Tokens())
    edit = Edit(program, "test")
    table = edit.add_constant("other", torch.randn(11, 8))
    rows = next(n for n in edit.graph.nodes if is_call(n, torch.ops.aten.embedding))
    edit.replace(rows, edit.call(torch.ops.aten.embedding.default, table, rows.args[1], before=rows))
    edited: Program = edit.finish()
    assert len(edited.weights) == 2
    result = EliminateDead().run(edited)
    verify(result.program)
    assert list(result.program.weights) == ["other"]
    assert set(result.program.exported.state_dict) == {"other"}


def test_a_lean_graph_is_left_as_it_is() -> None:
    class Lean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cos(x)

    _, after = rewrite(EliminateDead(), Lean(), X)
    assert after.ops == ["aten.cos"] and not after.hits and not after.misses
