"""Norms, however spelled, become one operator; the residual addition joins the norm that reads it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.fuse_add_norm import FuseAddNorm
from ryzen_compile.passes.fuse_norm import FuseNorm
from tests.passes.graphs import logits_moved, models, passed, rewrite

C = 8
X, R = torch.randn(2, 7, C), torch.randn(2, 7, C)
OTHER, OTHER_R = torch.randn(3, 5, C), torch.randn(3, 5, C)
EPS = 1e-5
CANONICAL = (Canonicalize(),)


class Norm(nn.Module):
    """``function(x, w, b)`` with random weights."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, ...] = (C,)) -> None:
        super().__init__()
        self.function = function
        self.w, self.b = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w, self.b)


def ms(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True) + EPS


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


RMS = {
    "weight after": (lambda x, w, b: x * torch.rsqrt(ms(x)) * w, False),
    "weight before": (lambda x, w, b: w * (torch.rsqrt(ms(x)) * x), False),
    "no weight": (lambda x, w, b: x * torch.rsqrt(ms(x)), False),
    "product": (lambda x, w, b: w * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)), False),
    "reciprocal": (lambda x, w, b: x * (1.0 / torch.sqrt(ms(x))) * w, False),
    "quotient": (lambda x, w, b: w * (x / torch.sqrt(ms(x))), False),
    "power": (lambda x, w, b: w * (x * torch.pow(ms(x), -0.5)), False),
    "positive dim": (lambda x, w, b: w * (x * torch.rsqrt(x.square().mean(2, keepdim=True) + EPS)), False),
    "one plus weight": (lambda x, w, b: x * torch.rsqrt(ms(x)) * (1.0 + w), True),
    "weight plus one": (lambda x, w, b: (w.float() + 1) * (x.float() * torch.rsqrt(ms(x.float()))).to(x.dtype), True),
    "aten": (lambda x, w, b: functional.rms_norm(x, (C,), w, EPS), False),
    "aten, eps of the type": (lambda x, w, b: functional.rms_norm(x, (C,), w), False),
    "aten, one plus weight": (lambda x, w, b: functional.rms_norm(x, (C,), 1 + w, EPS), True),
}


@pytest.mark.parametrize("spelling", RMS)
def test_fuses_rms_norm(spelling: str) -> None:
    function, unit_offset = RMS[spelling]
    before, after = rewrite(FuseNorm(), Norm(function), X, after=CANONICAL)
    assert after.ops == ["ryzen.rms_norm"]
    assert after.program.outputs[0].args[3] is unit_offset
    assert_close(after(OTHER), before(OTHER), rtol=1e-5, atol=1e-6)


LAYER = {
    "aten": lambda x, w, b: functional.layer_norm(x, (C,), w, b, EPS),
    "aten, no bias": lambda x, w, b: functional.layer_norm(x, (C,), w, None, EPS),
    "aten, plain": lambda x, w, b: functional.layer_norm(x, (C,)),
    "squares": lambda x, w, b: w * (centred(x) * torch.rsqrt(ms(centred(x)))),
    "squares, weight and bias": lambda x, w, b: centred(x) / torch.sqrt(ms(centred(x))) * w + b,
    "variance": lambda x, w, b: centred(x) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS) * w + b,
    "no weight, bias": lambda x, w, b: b + centred(x) * torch.rsqrt(ms(centred(x))),
}


@pytest.mark.parametrize("spelling", LAYER)
def test_fuses_layer_norm(spelling: str) -> None:
    before, after = rewrite(FuseNorm(), Norm(LAYER[spelling]), X, after=CANONICAL)
    assert after.ops == ["ryzen.layer_norm"]
    assert_close(after(OTHER), before(OTHER), rtol=1e-5, atol=1e-5)  # two ways to sum a variance


def test_weight_expression_of_layer_norm_stays() -> None:
    model = Norm(lambda x, w, b: functional.layer_norm(x, (C,), w + 1, b, EPS))
    before, after = rewrite(FuseNorm(), model, X, after=CANONICAL)
    assert after.ops == ["aten.add", "ryzen.layer_norm"]
    assert_close(after(OTHER), before(OTHER), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("early", [True, False], ids=["cast before the weight", "cast after the weight"])
def test_casts_around_the_norm_belong_to_it(early: bool) -> None:
    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        wide = x.float() * torch.rsqrt(ms(x.float()))
        return w * wide.to(x.dtype) if early else (wide * (1.0 + w.float())).to(x.dtype)

    before, after = rewrite(FuseNorm(), Norm(norm).bfloat16(), X.bfloat16(), after=CANONICAL)
    assert after.ops == ["ryzen.rms_norm"]
    assert_close(after(OTHER.bfloat16()), before(OTHER.bfloat16()), rtol=2**-7, atol=2**-7)  # one rounding less


def test_norm_of_heads() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            heads = x.unflatten(-1, (2, 4))
            turned = (self.w * (heads * torch.rsqrt(ms(heads)))).transpose(1, 2)
            return self.w * (turned * torch.rsqrt(ms(turned)))

    before, after = rewrite(FuseNorm(), Heads(), X, after=CANONICAL)
    assert after.ops == ["aten.reshape", "ryzen.rms_norm", "aten.permute", "ryzen.rms_norm"]
    assert_close(after(OTHER), before(OTHER), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (1, C), (1, 1, C)])
def test_another_tensor_than_a_channel_weight_stays_outside(shape: tuple[int, ...]) -> None:
    before, after = rewrite(FuseNorm(), Norm(lambda x, w, b: w * (x * torch.rsqrt(ms(x))), shape), torch.ones(2, 7, C))
    assert after.ops == ["ryzen.rms_norm", "aten.mul"]
    assert_close(after(X), before(X), rtol=1e-5, atol=1e-6)


def test_a_normed_value_that_is_read_twice_keeps_its_weights_outside() -> None:
    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        normed = x * torch.rsqrt(ms(x))
        return normed * w + normed * b

    before, after = rewrite(FuseNorm(), Norm(norm), X)
    assert after.ops == ["ryzen.rms_norm", "aten.mul", "aten.mul", "aten.add"]
    assert_close(after(OTHER), before(OTHER), rtol=1e-5, atol=1e-6)


def squares(x: Tensor) -> Tensor:
    return x.pow(2)


def root_read_twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    root = torch.rsqrt(ms(x))
    return x * root + root


def mean_read_elsewhere(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = squares(x).mean(-1, keepdim=True)
    return x * torch.rsqrt(mean + EPS) + mean


NORM_MISSES = {
    "two dims": (lambda x, w, b: x * torch.rsqrt(squares(x).mean((-2, -1), keepdim=True) + EPS), "normalizes dims"),
    "another dim": (lambda x, w, b: x * torch.rsqrt(squares(x).mean(1, keepdim=True) + EPS), r"normalizes dims \[1\]"),
    "two dims, aten": (lambda x, w, b: functional.layer_norm(x.view(-1, 2, 4), (2, 4)), "normalizes 2 dims"),
    "eps is a tensor": (lambda x, w, b: x * torch.rsqrt(squares(x).mean(-1, keepdim=True) + w), "eps is not a number"),
    "not squares": (lambda x, w, b: x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + EPS), "not one of squares"),
    "a sum": (lambda x, w, b: x * torch.rsqrt(squares(x).sum(-1, keepdim=True) + EPS), "not taken of a mean"),
    "scales another": (lambda x, w, b: (x + w) * torch.rsqrt(ms(x)), "does not only scale"),
    "root read twice": (root_read_twice, "does not only scale"),
    "mean read elsewhere": (mean_read_elsewhere, r"mean\w* is read elsewhere"),
    "unbiased variance": (
        lambda x, w, b: centred(x) * torch.rsqrt(x.var(-1, keepdim=True) + EPS),
        "correction is not 0",
    ),
    "not centred": (
        lambda x, w, b: x * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + EPS),
        "not centred on its mean",
    ),
}


@pytest.mark.parametrize("case", NORM_MISSES)
def test_leaves_near_norms_alone(case: str) -> None:
    function, reason = NORM_MISSES[case]
    before, after = rewrite(FuseNorm(), Norm(function), X, after=CANONICAL)
    assert after.ops == before.ops
    assert re.search(reason, after.reasons), after.reasons


def test_eps_of_a_narrow_type_is_not_guessed() -> None:
    model = Norm(lambda x, w, b: functional.rms_norm(x, (C,), w)).bfloat16()
    before, after = rewrite(FuseNorm(), model, X.bfloat16())
    assert after.ops == before.ops
    assert "eps is not given" in after.reasons


class Residual(nn.Module):
    """``function(sum, norm)`` of ``x + r``."""

    def __init__(self, function: Callable[..., Tensor], norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.function = function
        self.norm, self.second = norm(C), norm(C)
        for weight in self.parameters():
            nn.init.normal_(weight)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return self.function(self, x, r)


PREPARED = (Canonicalize(), FuseNorm())


@pytest.mark.parametrize(("norm", "op"), [(nn.LayerNorm, "ryzen.add_layer_norm"), (nn.RMSNorm, "ryzen.add_rms_norm")])
def test_fuses_the_residual_addition(norm: type[nn.Module], op: str) -> None:
    def early_reader(m: Residual, x: Tensor, r: Tensor) -> Tensor:
        h = x + r
        return torch.relu(h) * m.norm(h) + h

    before, after = rewrite(FuseAddNorm(), Residual(early_reader, norm), X, R, after=PREPARED)
    assert after.ops == [op, "aten.relu", "aten.mul", "aten.add"]
    assert_close(after(OTHER, OTHER_R), before(OTHER, OTHER_R), rtol=1e-5, atol=1e-6)


def test_fuses_a_sum_that_is_returned() -> None:
    class Returned(Residual):
        def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            h = x + r
            return h, self.norm(h)

    before, after = rewrite(FuseAddNorm(), Returned(torch.add), X, R, after=PREPARED)
    assert after.ops == ["ryzen.add_layer_norm"]
    assert_close(after(OTHER, OTHER_R), before(OTHER, OTHER_R), rtol=0, atol=0)  # the sum itself


def test_the_first_of_two_norms_takes_the_sum() -> None:
    def parallel(m: Residual, x: Tensor, r: Tensor) -> Tensor:
        h = x + r
        return h + torch.relu(m.norm(h)) + m.second(h)

    before, after = rewrite(FuseAddNorm(), Residual(parallel), X, R, after=PREPARED)
    assert after.ops[:2] == ["ryzen.add_layer_norm", "aten.relu"]
    assert after.ops.count("ryzen.layer_norm") == 1
    assert "another norm already takes the addition" in after.reasons
    assert_close(after(OTHER, OTHER_R), before(OTHER, OTHER_R), rtol=1e-5, atol=1e-6)


def test_a_weight_expression_younger_than_the_sum() -> None:
    model = Residual(lambda m, x, r: functional.layer_norm(x + r, (C,), m.norm.weight + 1, m.norm.bias))
    before, after = rewrite(FuseAddNorm(), model, X, R, after=PREPARED)
    assert after.ops == ["aten.add", "ryzen.add_layer_norm"]
    assert_close(after(OTHER, OTHER_R), before(OTHER, OTHER_R), rtol=1e-5, atol=1e-6)


def late_weight(m: Residual, x: Tensor, r: Tensor) -> Tensor:
    h = x + r
    doubled = 2 * h
    return doubled * functional.layer_norm(h, (C,), m.norm.weight + 1)


ADD_MISSES = {
    "no sum": (lambda m, x, r: m.norm(x * r), R, "its input is not a sum"),
    "a number": (lambda m, x, r: m.norm(x + 1.5) * r, R, "adds a number"),
    "alpha": (lambda m, x, r: m.norm(torch.add(x, r, alpha=2)), R, "alpha is 2, expected 1"),
    "broadcast": (lambda m, x, r: m.norm(x + r), R[:, :1], r"add broadcasts \(\w+, 1, 8\) onto \(\w+, \w+, 8\)"),
    "types": (lambda m, x, r: m.norm(x + r), R.bfloat16(), "adds torch.bfloat16 to torch.float32"),
    "late weight": (late_weight, R, r"add\w* is computed after the sum is first read"),
}


@pytest.mark.parametrize("case", ADD_MISSES)
def test_leaves_other_sums_alone(case: str) -> None:
    function, residual, reason = ADD_MISSES[case]
    before, after = rewrite(FuseAddNorm(), Residual(function), X, residual, after=PREPARED)
    assert after.ops == before.ops
    assert re.search(reason, after.reasons), after.reasons


# norms; additions that joined one. What does not join: the first norm, norms behind a projection (post-norms, head
# norms), the second norm of a parallel block, and OPT's, which flattens batch and tokens in between.
HITS = {"cohere2": (3, 2), "gemma": (5, 4), "gemma2": (9, 4), "gpt2": (5, 5), "gpt_neox": (5, 2), "llama": (5, 4),
        "olmo2": (9, 1), "opt": (5, 1), "phi": (3, 2), "phi3": (5, 4), "qwen3": (9, 4)}  # fmt: skip


@pytest.mark.parametrize("model", models(HITS))
def test_models(model: str) -> None:
    norms, added = passed(model)["fuse_norm"], passed(model)["fuse_add_norm"]
    assert (len(norms.hits), len(added.hits)) == HITS[model]
    assert not norms.misses
    assert logits_moved(model, "fuse_add_norm") < 1e-6  # logits are below 1: a few float32 roundings
    assert not {"aten.rsqrt", "aten.mean", "aten.layer_norm"} & set(added.program.ops())
