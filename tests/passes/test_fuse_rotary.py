"""A rotation is found by what it does, however it is spelled; what is none by position stays, with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ryzen_compile.capture import capture
from ryzen_compile.passes.base import PassResult
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.fuse_rotary import CHUNK, FuseRotary
from ryzen_compile.program import Program, is_call, module_path
from ryzen_compile.verify import verify
from tests.passes.graphs import Graph, models, passed

HEADS, WIDTH = 3, 8
CONTEXT = CHUNK + 3  # the table is filled in more than one piece
INV = 10.0 ** -(torch.arange(4) / 4)
Function = Callable[[Tensor, Tensor], Tensor]


def angle(at: Tensor, pairs: int = 4, heads_first: bool = True) -> Tensor:
    """(B, 1, T, R), or (B, T, 1, R)."""
    turned = at[:, :, None].float() * INV[:pairs]
    return turned.unsqueeze(1 if heads_first else 2)


def swapped(x: Tensor) -> Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


def half(x: Tensor, at: Tensor, scale: float = 1.0, pairs: int = 4, heads_first: bool = True) -> Tensor:
    both = angle(at, pairs, heads_first).repeat(1, 1, 1, 2)
    return x * (scale * both.cos()) + swapped(x) * (scale * both.sin())


def stacked(x: Tensor, at: Tensor) -> Tensor:
    cos, sin, (a, b) = angle(at).cos(), angle(at).sin(), (x[..., 0::2], x[..., 1::2])
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def every_two(x: Tensor, at: Tensor) -> Tensor:
    both = angle(at).repeat_interleave(2, dim=-1)
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x * both.cos()) + (turned * both.sin())


def chunked(x: Tensor, at: Tensor) -> Tensor:
    cos, sin, (a, b) = angle(at).cos(), angle(at).sin(), x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def partial(x: Tensor, at: Tensor) -> Tensor:
    return torch.cat((half(x[..., :4], at, pairs=2), x[..., 4:]), dim=-1)


def partial_stacked(x: Tensor, at: Tensor) -> Tensor:
    cos, sin, (a, b) = angle(at, 2).cos(), angle(at, 2).sin(), (x[..., 0:4:2], x[..., 1:4:2])
    return torch.cat((torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2), x[..., 4:]), dim=-1)


def backwards(x: Tensor, at: Tensor) -> Tensor:
    both = angle(at).repeat(1, 1, 1, 2)
    return x * both.cos() - swapped(x) * both.sin()


def looked_up(x: Tensor, at: Tensor) -> Tensor:
    table = torch.outer(torch.arange(CONTEXT).float(), INV).repeat(1, 2)
    return x * table.cos()[at].unsqueeze(1) + swapped(x) * table.sin()[at].unsqueeze(1)


# spelling, heads first, R, interleaved, what the table's angles are multiplied with, and its cos and sin
SPELLINGS: dict[str, tuple[Function, bool, int, bool, float, float]] = {
    "half_split": (half, True, 4, False, 1.0, 1.0),
    "stacked": (stacked, True, 4, True, 1.0, 1.0),
    "every_two": (every_two, True, 4, True, 1.0, 1.0),
    "chunked": (chunked, True, 4, False, 1.0, 1.0),
    "partial": (partial, True, 2, False, 1.0, 1.0),
    "partial_stacked": (partial_stacked, True, 2, True, 1.0, 1.0),
    "heads_last": (lambda x, at: half(x, at, heads_first=False), False, 4, False, 1.0, 1.0),
    "slower": (lambda x, at: half(x, at / 4), True, 4, False, 0.25, 1.0),
    "longer": (lambda x, at: half(x, at, 1.25), True, 4, False, 1.0, 1.25),
    "backwards": (backwards, True, 4, False, -1.0, 1.0),
    "looked_up": (looked_up, True, 4, False, 1.0, 1.0),
}


class Part(nn.Module):
    """``function`` of the heads of its own embedding."""

    def __init__(self, function: Function, heads_first: bool) -> None:
        super().__init__()
        self.table, self.function, self.heads_first = nn.Embedding(11, HEADS * WIDTH), function, heads_first

    def forward(self, ids: Tensor, at: Tensor) -> Tensor:
        x = self.table(ids).unflatten(-1, (HEADS, WIDTH))
        x = x.transpose(1, 2) if self.heads_first else x
        y = self.function(x, at)
        return (y.transpose(1, 2) if self.heads_first and y.ndim == 4 else y).flatten(2)


class Parts(nn.Module):
    """Side by side, so that one capture serves every case; a part's name is its module path."""

    block_size = CONTEXT

    def __init__(self, cases: Mapping[str, tuple[Function, bool]]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: Part(*case) for name, case in cases.items()})

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return torch.cat([part(input_ids, position_ids) for part in self.parts.values()], dim=-1)


def fused(cases: Mapping[str, tuple[Function, bool]]) -> tuple[Program, PassResult]:
    torch.manual_seed(0)
    before = Canonicalize().run(capture(Parts(cases))).program
    ops = before.ops()
    result = FuseRotary().run(before)
    verify(result.program)
    assert before.ops() == ops, "the pass changed the Program it was given"
    assert not FuseRotary().run(result.program).hits, "a second run found more"
    return before, result


@pytest.fixture(scope="module")
def hits() -> tuple[Program, PassResult]:
    return fused({name: case[:2] for name, case in SPELLINGS.items()})


def values(program: Program, at: Tensor, name: str, names: list[str]) -> Tensor:
    ids = torch.randint(11, at.shape, generator=torch.Generator().manual_seed(3))
    width, i = HEADS * WIDTH, names.index(name)
    return Graph(program)(ids, at)[..., i * width : (i + 1) * width]


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_one_node(hits: tuple[Program, PassResult], name: str) -> None:
    before, result = hits
    pairs, interleaved, speed, scale = SPELLINGS[name][2:]
    mine = [n for n in result.program.graph.nodes if module_path(n) == f"parts.{name}"]
    (node,) = [n for n in mine if is_call(n, torch.ops.ryzen.rotary)]
    assert [site.module for site in result.hits].count(f"parts.{name}") == 1
    assert not [n for n in mine if is_call(n, torch.ops.aten.mul, torch.ops.aten.cat, torch.ops.aten.neg)]
    x, positions, cos, sin, turned = node.args
    assert turned is interleaved and positions is result.program.input("position_ids")
    assert is_call(x, torch.ops.aten.permute) and x.meta["val"].shape[1] == HEADS
    angles = speed * torch.arange(CONTEXT).double()[:, None] * INV[:pairs].double()
    for table, want in ((cos, scale * angles.cos()), (sin, scale * angles.sin())):
        got = result.program.weights[table.name]
        assert got.shape == (CONTEXT, pairs) and got.is_contiguous()
        assert_close(got.double(), want, rtol=0, atol=3e-4)  # float32 angles of two thousand
    for at in (torch.arange(7).repeat(2, 1), torch.tensor([[CONTEXT - 1, 0, 5], [1, 1, 700]]), torch.tensor([[31]])):
        names = list(SPELLINGS)
        got, want = values(result.program, at, name, names), values(before, at, name, names)
        assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(values(before, (at + 1) % CONTEXT, name, names), want, rtol=1e-2, atol=1e-2)


def test_nothing_of_the_spellings_is_left_and_no_anchor_unexplained(hits: tuple[Program, PassResult]) -> None:
    _, result = hits
    assert len(result.hits) == len(SPELLINGS) and not result.misses
    assert set(result.program.ops()) == {
        "aten.embedding", "aten.reshape", "aten.permute", "ryzen.rotary", "aten.cat"}  # fmt: skip


def test_equal_angles_share_one_table(hits: tuple[Program, PassResult]) -> None:
    _, result = hits
    nodes = {module_path(n): n.args[2].name for n in result.program.graph.nodes if is_call(n, torch.ops.ryzen.rotary)}
    assert nodes["parts.stacked"] != nodes["parts.half_split"]  # the tables are equal, their readings are not
    tables = [n for n in result.program.weights if n.startswith("rotary_")]
    assert len(tables) % 2 == 0 and set(nodes.values()) == {n for n in tables if "cos" in n}

    both = fused({"q": (half, True), "k": (half, True)})[1].program
    assert [n for n in both.weights if n.startswith("rotary_")] == ["rotary_cos", "rotary_sin"]


def biased(x: Tensor, at: Tensor) -> Tensor:
    both = angle(at).repeat(1, 1, 1, 2)
    return (x * both.cos() + INV.repeat(2)) + swapped(x) * both.sin()


def by_head(x: Tensor, at: Tensor) -> Tensor:
    both = angle(at).repeat(1, 1, 1, 2) * (1 + torch.arange(HEADS)[:, None, None])
    return x * both.cos() + swapped(x) * both.sin()


def by_length(x: Tensor, at: Tensor) -> Tensor:
    both = angle(at).repeat(1, 1, 1, 2) / x.shape[2]
    return x * both.cos() + swapped(x) * both.sin()


def reflected(x: Tensor, at: Tensor) -> Tensor:
    both = angle(at).repeat(1, 1, 1, 2)
    return x * both.cos() + swapped(x).abs() * both.sin()


def mirrored(x: Tensor, at: Tensor) -> Tensor:
    both = angle(at).repeat(1, 1, 1, 2)
    a, b = x.chunk(2, dim=-1)
    return x * both.cos() + torch.cat((b, a), dim=-1) * both.sin()


def stretched(x: Tensor, at: Tensor) -> Tensor:
    cos, sin, (a, b) = angle(at).cos(), angle(at).sin(), x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, 2 * (b * cos + a * sin)), dim=-1)


def of_two(x: Tensor, at: Tensor) -> Tensor:
    both = angle(at).repeat(1, 1, 1, 2)
    return torch.cos(x) * both.cos() + swapped(torch.exp(x)) * both.sin()


def flat(x: Tensor, at: Tensor) -> Tensor:
    rows = x.flatten(2)
    both = at[:, :, None].float() * torch.linspace(0, 1, rows.shape[-1] // 2).repeat(2)
    return rows * both.cos() + swapped(rows) * both.sin()


NEAR_MISSES: dict[str, tuple[Function, bool, str]] = {
    "bias": (biased, True, "adds something to its input: it is not a rotation"),
    "heads_differ": (by_head, True, "heads are turned differently"),
    "dynamic": (by_length, True, "angles depend on the length of the sequence, not on the position alone"),
    "relative": (lambda x, at: half(x, at - at[:, :1]), True, "angle depends on the other tokens' positions"),
    "counted": (
        lambda x, at: half(x, torch.arange(x.shape[2])[None]),
        True,
        "a token's angle depends on the other tokens' positions",
    ),
    "mirrored": (mirrored, True, "does not turn pairs of channels"),
    "stretched": (stretched, True, "does not turn pairs of channels"),
    "not_linear": (reflected, True, "no single tensor is both the source and the shape"),
    "two_sources": (of_two, True, "no single tensor is both the source and the shape"),
    "only_scaled": (lambda x, at: x * angle(at).repeat(1, 1, 1, 2).cos(), True, "no single tensor is both"),
    "no_heads": (
        flat,
        False,
        r"the rotated tensor is \(\w+, \w+, 24\), expected four dims with batch first and one token dim",
    ),
}


@pytest.fixture(scope="module")
def misses() -> tuple[Program, PassResult]:
    return fused({name: case[:2] for name, case in NEAR_MISSES.items()})


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_leaves_near_misses_alone(misses: tuple[Program, PassResult], name: str) -> None:
    notes = {site.note for site in misses[1].misses if site.module == f"parts.{name}"}
    assert notes and all(re.search(NEAR_MISSES[name][2], note) for note in notes), notes


def test_near_misses_change_nothing(misses: tuple[Program, PassResult]) -> None:
    before, result = misses
    assert result.program is before or result.program.ops() == before.ops()
    assert not result.hits


@pytest.mark.parametrize("model", models(["cohere2", "gpt_neox", "llama"]))
def test_models(model: str) -> None:
    program = passed(model)["recognize_activation"].program
    result = FuseRotary().run(program)
    verify(result.program)
    assert len(result.hits) == 4  # queries and keys of two layers
    assert not result.misses
    ids, at = torch.randint(3, 99, (3, 11)), torch.arange(11).repeat(3, 1)
    assert_close(Graph(result.program)(ids, at), Graph(program)(ids, at), rtol=0, atol=1e-6)
