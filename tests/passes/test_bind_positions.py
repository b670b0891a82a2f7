"""A table read by counting tokens is read at ``position_ids``; what depends on more than the place is left alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ryzen_compile.capture import capture
from ryzen_compile.passes.base import PassResult
from ryzen_compile.passes.bind_positions import BindPositions
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.program import Program, is_call, module_path
from ryzen_compile.verify import verify
from tests.passes.graphs import Graph

C, CONTEXT = 6, 31
Function = Callable[["Part", Tensor, Tensor], Tensor]


class Part(nn.Module):
    """``function(part, rows, position_ids)`` with a table of its own for tokens and one for places."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.tokens, self.places, self.function = nn.Embedding(11, C), nn.Embedding(CONTEXT, C), function
        self.register_buffer("table", torch.randn(CONTEXT, C))

    def forward(self, ids: Tensor, at: Tensor) -> Tensor:
        return self.function(self, self.tokens(ids), at)


class Parts(nn.Module):
    """Side by side, so that one capture serves every case; a part's name is its module path."""

    block_size = CONTEXT

    def __init__(self, cases: Mapping[str, Function]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: Part(function) for name, function in cases.items()})

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return torch.cat([part(input_ids, position_ids) for part in self.parts.values()], dim=-1)


def bound(cases: Mapping[str, Function]) -> tuple[Program, PassResult]:
    torch.manual_seed(0)
    before = Canonicalize().run(capture(Parts(cases))).program
    ops = before.ops()
    result = BindPositions().run(before)
    verify(result.program)
    assert before.ops() == ops, "the pass changed the Program it was given"
    assert not BindPositions().run(result.program).hits, "a second run found more"
    return before, result


def count(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


def waves(x: Tensor) -> Tensor:
    angle = count(x)[:, None].float() * 10.0 ** -torch.arange(C // 2)
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def one_by_one(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], C).cumsum(0)


COUNTED: dict[str, Function] = {
    "learned": lambda m, x, at: x + m.places(count(x)),
    "learned_first": lambda m, x, at: m.places(count(x)) + x,
    "with_a_batch_of_one": lambda m, x, at: x + m.places(count(x)[None]),
    "slice_of_a_buffer": lambda m, x, at: x + m.table[: x.shape[1]],
    "waves": lambda m, x, at: x * C**0.5 + waves(x),
    "offset": lambda m, x, at: x + m.table[count(x) // 2 + 1],
    "sum_of_counts": lambda m, x, at: x + one_by_one(x),
    "one_column": lambda m, x, at: x + count(x)[:, None] * 0.1,
}


@pytest.fixture(scope="module")
def hits() -> tuple[Program, PassResult]:
    return bound(COUNTED)


def part(program: Program, ids: Tensor, at: Tensor, name: str) -> Tensor:
    i = list(COUNTED).index(name)
    return Graph(program)(ids, at)[..., i * C : (i + 1) * C]


@pytest.mark.parametrize("name", COUNTED)
def test_counting_becomes_reading_at_the_positions(hits: tuple[Program, PassResult], name: str) -> None:
    before, result = hits
    assert [site.module for site in result.hits].count(f"parts.{name}") == 1
    nodes = [n for n in result.program.graph.nodes if module_path(n) == f"parts.{name}" and n.op == "call_function"]
    read = next(n for n in nodes if is_call(n, torch.ops.aten.embedding) and n.args[1].name == "position_ids")
    assert result.program.weights[read.args[0].name].shape == (CONTEXT, 1 if name == "one_column" else C)

    ids = torch.randint(11, (3, CONTEXT - 1), generator=torch.Generator().manual_seed(1))
    counted = torch.arange(CONTEXT - 1).repeat(3, 1)
    whole = part(before, ids, counted, name)
    assert_close(part(result.program, ids, counted, name), whole, rtol=0, atol=0)
    for rows in (slice(5, 12), slice(CONTEXT - 2, CONTEXT - 1)):  # what follows a cached prompt: the point of the pass
        got = part(result.program, ids[:, rows], counted[:, rows], name)
        assert_close(got, whole[:, rows], rtol=0, atol=0)
        assert not torch.allclose(part(before, ids[:, rows], counted[:, rows], name), whole[:, rows], atol=1e-3)
        assert not torch.allclose(part(result.program, ids[:, rows], counted[:, rows] - 2, name), got, atol=1e-3)


def test_what_counted_is_gone(hits: tuple[Program, PassResult]) -> None:
    _, result = hits
    assert len(result.hits) == len(COUNTED) and not result.misses
    assert set(result.program.ops()) == {"aten.embedding", "aten.add", "aten.mul", "aten.cat"}


NEAR_MISSES: dict[str, tuple[Function, str]] = {
    "bound": (lambda m, x, at: x + m.places(at), "already reads position_ids"),
    "relative_to_the_length": (
        lambda m, x, at: x + (count(x) / x.shape[1])[:, None],
        "a row depends on how many tokens there are",
    ),
    "from_the_end": (lambda m, x, at: x + waves(x).flip(0), "a row depends on how many tokens there are"),
    "same_for_all": (
        lambda m, x, at: x + waves(x).mean(0),
        r"adds \(6,\) to \(\w+, \w+, 6\), expected \(T, C\) or \(1, T, C\) to \(B, T, C\)",
    ),
    "channels_count": (
        lambda m, x, at: (x.transpose(1, 2) + waves(x).T).transpose(1, 2),
        "a row depends on how many tokens there are",
    ),
    "of_heads": (
        lambda m, x, at: (x.unflatten(-1, (2, 3)) + waves(x)[:, None, :3]).flatten(2),
        r"adds \(\w+, 1, 3\) to \(\w+, \w+, 2, 3\), expected",
    ),
}


@pytest.fixture(scope="module")
def misses() -> tuple[Program, PassResult]:
    return bound({name: case[0] for name, case in NEAR_MISSES.items()})


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_leaves_near_misses_alone(misses: tuple[Program, PassResult], name: str) -> None:
    notes = [site.note for site in misses[1].misses if f"{site.module}.".startswith(f"parts.{name}.")]
    assert len(notes) == 1 and re.search(NEAR_MISSES[name][1], notes[0]), notes


def test_near_misses_change_nothing(misses: tuple[Program, PassResult]) -> None:
    before, result = misses
    assert result.program is before and not result.hits
    assert len(result.misses) == len(NEAR_MISSES)


def test_other_sums_are_none_of_its_business() -> None:
    _, result = bound({"sums": lambda m, x, at: x + x.sin() + 3 + m.table[0] + m.table[:1]})
    assert not result.hits and not result.misses
