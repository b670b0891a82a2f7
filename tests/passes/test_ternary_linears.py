"""Linears whose weights are a scale times -1, 0 and +1 get rounded activations; then they are merged and gated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from ryzen_compile import ops
from ryzen_compile.config import Recipe
from ryzen_compile.numerics import ternary
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.fuse_linear import FuseLinear
from ryzen_compile.passes.merge_linear import MergeLinear
from ryzen_compile.passes.recognize_activation import RecognizeActivation
from ryzen_compile.passes.ternary_linears import TernaryLinears
from ryzen_compile.pipeline import default_passes
from tests.passes.graphs import Graph, rewrite
from tests.passes.test_merge_linear import Attention

X, OTHER = torch.randn(2, 7, 8), torch.randn(3, 5, 8)
PASS = TernaryLinears(0.5)


def bake(module: nn.Module) -> nn.Module:
    """Every linear's weight becomes a scale times codes."""
    with torch.no_grad():
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                scale = linear.weight.abs().mean()
                linear.weight.copy_((linear.weight / scale).round().clamp(-1, 1) * scale)
    return module


class Around(nn.Module):
    """A model of one module."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def rounded(x: Tensor) -> Tensor:
    codes, step = ternary.round_rows(x)
    return codes * step


class Gated(nn.Module):
    def __init__(self, up_first: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 11, bias=False), nn.Linear(8, 11, bias=False), nn.Linear(11, 8)
        self.up_first = up_first

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Halves(nn.Module):
    """One product whose first half is what is gated."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(8, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.both(x).chunk(2, -1)
        return functional.silu(gate) * up


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_of_such_weights(bias: bool) -> None:
    """Against the float product of rounded activations in float64; the plain product is 1e-3 away."""
    module = bake(nn.Linear(8, 5, bias=bias))
    before, after = rewrite(PASS, Around(module), X, after=(Canonicalize(),))
    assert after.ops == ["ryzen.linear_ternary", *["aten.add"] * bias]
    offset = module.bias.double() if bias else None
    want = functional.linear(rounded(OTHER).double(), module.weight.double(), offset)
    assert_close(after(OTHER).double(), want, rtol=1e-5, atol=1e-6)
    assert float((before(OTHER) - want).detach().abs().max()) > 1e-3


def test_other_weights_stay_and_say_why() -> None:
    module = Around(bake(nn.Linear(8, 8)), nn.Linear(8, 8, bias=False))
    _, after = rewrite(PASS, module, X, after=(Canonicalize(),))
    assert after.ops.count("aten.linear") == after.ops.count("ryzen.linear_ternary") == 1
    assert "parts.1 is not one number a row times -1, 0 and +1" in after.reasons


def test_a_fused_linear_is_left() -> None:
    module = Around(bake(nn.Linear(8, 8, bias=False)), nn.ReLU())
    _, after = rewrite(PASS, module, X, after=(Canonicalize(), RecognizeActivation(), FuseLinear()))
    assert after.ops == ["ryzen.linear_act"] and "is fused with what follows it" in after.reasons


def scales(graph: Graph) -> list[Tensor]:
    """Of every ternary product, in graph order."""
    program = graph.program
    nodes = [n for n in program.graph.nodes if str(n.target) == "ryzen.linear_ternary.default"]
    return [program.weights[n.args[2].name] for n in nodes]


def test_projections_are_merged_with_a_scale_for_each_row() -> None:
    """To the bit: a row's product is an integer, whatever rows are beside it."""
    module = bake(Attention())
    before, after = rewrite(MergeLinear(), module, X, after=(Canonicalize(), PASS))
    assert after.ops[:2] == ["ryzen.linear_ternary", "aten.split_with_sizes"]
    assert after.ops.count("ryzen.linear_ternary") == 1
    (rows,) = scales(after)
    assert torch.equal(
        rows, torch.cat([w.abs().amax().expand(len(w)) for w in (module.q.weight, module.k.weight, module.v.weight)])
    )
    assert torch.equal(after(OTHER), before(OTHER))


def test_a_ternary_and_a_float_linear_are_not_merged() -> None:
    module = bake(Attention())
    with torch.no_grad():
        module.v.weight[0, 0] += 1
    _, after = rewrite(MergeLinear(), module, X, after=(Canonicalize(), PASS))
    assert "some of the group have a bias and some do not" in after.reasons
    assert after.ops.count("ryzen.linear_ternary") == 2


def test_a_gate_is_joined_with_what_it_gates() -> None:
    before, after = rewrite(
        FuseLinear(), bake(Gated()), X, after=(Canonicalize(), PASS, RecognizeActivation(), MergeLinear())
    )
    assert after.ops == ["ryzen.linear_ternary", "ryzen.gated_activation", "ryzen.linear_ternary", "aten.add"]
    assert_close(after(OTHER), before(OTHER), rtol=1e-5, atol=1e-6)


def test_a_gate_behind_what_it_gates_stays_apart() -> None:
    before, after = rewrite(FuseLinear(), bake(Halves()), X, after=(Canonicalize(), PASS, RecognizeActivation()))
    assert "what is gated comes before its gate" in after.reasons and after.ops == before.ops


def test_the_pass_is_there_when_the_recipe_asks_for_it() -> None:
    names = {ternary: [p.name for p in default_passes(Recipe(ternary=ternary))] for ternary in (True, False)}
    assert [n for n in names[True] if n not in names[False]] == ["ternary_linears"]
    assert names[True].index("canonicalize") < names[True].index("ternary_linears") < names[True].index("merge_linear")
    assert ops.linear_ternary is not None
