"""Spreading a norm's channels changes nothing but what rounding loses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ryzen_compile.capture_encoder import capture_encoder
from ryzen_compile.config import Recipe
from ryzen_compile.interpret import interpret, text_feeds
from ryzen_compile.passes.smooth_activations import SmoothActivations
from ryzen_compile.pipeline import encoder_passes, run_passes
from ryzen_compile.program import Program, is_call
from ryzen_compile.spec import Pooling
from ryzen_compile.verify import verify
from tests.test_capture_encoder import MEAN, texts, tiny

dialect = torch.ops.ryzen
LINEARS = (torch.ops.aten.linear, dialect.linear_act, dialect.gated_linear)


def fused(model: nn.Module, pooling: Pooling = MEAN) -> Program:
    return run_passes(capture_encoder(model, pooling), encoder_passes(Recipe()))[0]


@pytest.fixture(scope="module")
def uneven() -> dict[str, Program]:
    """Norms behind the residual (Bert) and in front of it (EuroBert), with one channel far above the others."""
    programs = {}
    for family in ("Bert", "EuroBert"):
        model = tiny(family)
        for module in model.modules():
            if type(module).__name__.endswith(("LayerNorm", "RMSNorm")):
                module.weight.data[3] *= 10
        programs[family] = fused(model)
    return programs


def vectors(program: Program, *, rounded: bool = False) -> Tensor:
    """With ``rounded``, what a linear reads is rounded to 8 bits by each row's largest."""

    def rounding(node: object, args: tuple) -> tuple:
        if not rounded or not is_call(node, *LINEARS):
            return args
        step = args[0].abs().amax(-1, keepdim=True) / 127
        return ((args[0] / step).round() * step, *args[1:])

    ids, mask = texts(rows=64)
    (found,) = interpret(program, text_feeds(program, ids, mask=mask), [program.outputs[0]], intercept=rounding)
    return found


@pytest.mark.parametrize("family", ["Bert", "EuroBert"])
def test_the_same_vectors_and_less_lost_to_rounding(uneven: dict[str, Program], family: str) -> None:
    before = uneven[family]
    text = torch.randint(99, (4, 40))
    result = SmoothActivations(text).run(before)
    after = result.program
    verify(after)
    assert len(result.hits) == 4  # in front of each layer's two products
    want = vectors(before)
    torch.testing.assert_close(vectors(after), want, rtol=0, atol=2e-5)  # float32, through attention that tips over
    # Where a random model's attention tips over, one text may lose anything: half of the 64 lose half as much.
    lost = [float((vectors(p, rounded=True) - want).norm(dim=1).median()) for p in (before, after)]
    assert 0 < lost[1] < 0.7 * lost[0]
    assert "its channels are as large as their weights call for" in {
        site.note for site in SmoothActivations(text).run(after).misses
    }
    assert not SmoothActivations(text).run(after).hits


def test_a_norm_that_others_read_is_computed_twice(uneven: dict[str, Program]) -> None:
    """The residual behind Bert's norms reads them as they were; EuroBert's are read by products alone."""
    counts = {}
    for family, program in uneven.items():
        after = SmoothActivations().run(program).program
        counts[family] = sum("norm" in name for name in after.ops()) - sum("norm" in name for name in program.ops())
    assert counts == {"Bert": 4, "EuroBert": 0}


class Norms(nn.Module):
    """``kind`` says what is in the way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.block_size = kind, 31
        self.table, self.out = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8, elementwise_affine=kind != "no scale")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.norm(self.table(input_ids))
        if self.kind == "no linear":
            return x * attention_mask.unsqueeze(-1)
        if self.kind == "no weight":
            return nn.functional.linear(x, self.out.weight * x.sum())
        return self.out(x) * attention_mask.unsqueeze(-1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("no scale", "it has no scale to divide"),
        ("no linear", "no linear reads its result"),
        ("no weight", "has no constant weight"),
    ],
)
def test_near_misses_have_reasons(kind: str, reason: str) -> None:
    program = fused(Norms(kind), Pooling("max", normalize=False))
    result = SmoothActivations().run(program)
    assert result.program is program and not result.hits
    assert any(reason in site.note for site in result.misses)
