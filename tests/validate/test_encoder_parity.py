"""The gate of encoders: padding counts, rounding does not, and a loss is told as 1 - cosine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from ryzen_compile.capture_encoder import capture_encoder
from ryzen_compile.config import WeightQuantization, find_recipe
from ryzen_compile.edit import Edit
from ryzen_compile.errors import CaptureError, ParityError
from ryzen_compile.passes.base import Pass, PassResult, Promise, Site
from ryzen_compile.pipeline import encoder_passes, run_passes
from ryzen_compile.program import Program, is_call
from ryzen_compile.validate.parity import EncoderGate, ParityGate, check_capture, gate_for
from tests.test_capture_encoder import MEAN, tiny

ATTENTION = torch.ops.ryzen.attention


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny("ModernBert")


@pytest.fixture(scope="module")
def captured(model: nn.Module) -> Program:
    return capture_encoder(model, MEAN)


class Change(Pass):
    """Gives every attention the arguments that ``how`` makes of its own."""

    name: ClassVar[str] = "change"

    def __init__(self, how: Callable[[list], list], promise: Promise = "exact", allowed: float = 0.0) -> None:
        self.how, self.promise, self.max_cosine = how, promise, allowed  # type: ignore[misc]

    def run(self, program: Program) -> PassResult:
        edit = Edit(program, self.name)
        sites = []
        for node in [n for n in edit.graph.nodes if is_call(n, ATTENTION)]:
            edit.replace(node, edit.call(ATTENTION.default, *self.how(list(node.args)), before=node))
            sites.append(Site(node.name, ""))
        return PassResult(edit.finish(), tuple(sites))


def without_mask(args: list) -> list:
    return args[:8]


def wider(args: list) -> list:
    return [*args[:5], args[5] and args[5] + 1, *args[6:]]


def same(args: list) -> list:
    return [args[0], *args[1:]]


@pytest.mark.parametrize(("how", "kept"), [(same, True), (without_mask, False), (wider, False)])
def test_what_padding_or_a_window_loses_is_rolled_back(captured: Program, how: Callable, kept: bool) -> None:
    _, report = run_passes(captured, (Change(how),), gate=gate_for(captured))
    (record,) = report.records
    assert record.status == ("applied" if kept else "rolled back")
    assert kept or (record.detail.startswith("vectors moved by") and "first in layers." in record.detail)


def test_the_gate_is_the_programs(captured: Program) -> None:
    assert type(gate_for(captured)) is EncoderGate
    assert issubclass(EncoderGate, ParityGate)


def test_the_passes_are_exact_and_int8_is_measured(captured: Program) -> None:
    recipe = find_recipe("int8")
    text = torch.randint(99, (4, 40))
    program, report = run_passes(
        captured, encoder_passes(recipe, calibration=text), gate=gate_for(captured, text=text), strict=True
    )
    states = {record.name: record.status for record in report.records}
    assert "rolled back" not in states.values() and states["smooth_activations"] == "applied"
    record = next(r for r in report.records if r.name == "quantize_weights")
    assert recipe.weights is not None and record.cosine is not None
    assert 0 < record.cosine < recipe.weights.max_cosine and record.kl is None
    assert record.moved.startswith("cos ") and "ryzen.linear_nbits" in program.ops()


def test_a_loss_beyond_its_budget_is_an_error(captured: Program) -> None:
    recipe = find_recipe("int8").model_copy(update={"weights": WeightQuantization(bits=2, max_cosine=1e-4)})
    with pytest.raises(ParityError, match=r"mean of 1 - cosine 0\.\d+, 0.0001 is allowed"):
        run_passes(captured, encoder_passes(recipe), gate=gate_for(captured))
    accepted = Change(wider, "lossy", allowed=1.0)
    _, report = run_passes(captured, (accepted,), gate=gate_for(captured))
    assert report.records[0].status == "applied" and 0 < (report.records[0].cosine or 0) < 1


def test_capture_is_held_to_the_model(model: nn.Module, captured: Program) -> None:
    check_capture(model, captured)
    for how in (without_mask, wider):
        with pytest.raises(CaptureError, match="their vectors are"):
            check_capture(model, Change(how).run(captured).program)
    last = replace(captured, spec=replace(captured.spec, pooling=replace(MEAN, mode="last")))
    with pytest.raises(CaptureError, match="their vectors are"):
        check_capture(model, last)
