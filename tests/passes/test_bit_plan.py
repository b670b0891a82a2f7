"""Mixed precision meets the size asked for, and spends it where the logits need it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from ryzen_compile.capture import capture
from ryzen_compile.config import WeightQuantization
from ryzen_compile.errors import ConfigError
from ryzen_compile.passes.bit_plan import WIDER, mix_bits, sensitivities
from ryzen_compile.passes.quantize_weights import QuantizeWeights
from ryzen_compile.passes.weight_targets import Choice, Target, choose_formats, find_targets
from ryzen_compile.program import Program
from tests.zoo import VOCAB, NanoDecoder, randomize

TEXT = torch.randint(VOCAB, (3, 19), generator=torch.Generator().manual_seed(7))
SENSITIVE = "blocks.1.out"
LOW, HIGH = 2 + 32 / 64, 4 + 32 / 64  # blocks of 64, symmetric


@pytest.fixture(scope="module")
def program() -> Program:
    """A decoder whose ``SENSITIVE`` matrix drives the logits: what else is added to the stream is a hundredth of it."""
    torch.manual_seed(0)
    model = NanoDecoder().eval()
    randomize(model)
    with torch.no_grad():
        for faint in (model.blocks[0].out, model.blocks[0].down, model.blocks[1].down):
            faint.weight /= 100
            faint.bias /= 100
    return capture(model)


@pytest.fixture(scope="module")
def narrow(program: Program) -> dict[Target, Choice]:
    return choose_formats(find_targets(program)[0], WeightQuantization(bits=2, block=64, method="rtn"))


def bits(choices: dict[Target, Choice]) -> float:
    sizes = {t: t.rows * t.width for t in choices}
    return sum(c.format.bits_per_weight * sizes[t] for t, c in choices.items()) / sum(sizes.values())


@pytest.mark.parametrize("target", [LOW - 0.01, HIGH + 0.01, 8.9])
def test_a_target_outside_the_range_names_both_ends(
    program: Program, narrow: dict[Target, Choice], target: float
) -> None:
    message = f"target_bits {target}: with these formats the weights take {LOW:.2f} to {HIGH:.2f} bits each; choose"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        mix_bits(program, narrow, target, TEXT)


@pytest.mark.parametrize("target", [LOW, 2.9, 3.25, 3.9, HIGH])
def test_the_total_meets_the_target_as_nearly_as_it_can(
    program: Program, narrow: dict[Target, Choice], target: float
) -> None:
    mixed = mix_bits(program, narrow, target, TEXT)
    assert list(mixed) == list(narrow)
    assert bits(mixed) <= target
    for left, choice in mixed.items():
        if choice == narrow[left]:
            wider = {**mixed, left: replace(choice, format=replace(choice.format, bits=4))}
            assert bits(wider) > target, left.label
        else:
            assert choice == replace(narrow[left], format=replace(narrow[left].format, bits=4))
    assert (mixed == narrow) == (target == LOW)
    assert {c.format.bits for c in mixed.values()} == ({2} if target == LOW else {4} if target == HIGH else {2, 4})


@pytest.mark.parametrize("text", [TEXT, None], ids=["text", "random tokens"])
def test_the_most_sensitive_matrix_is_widened_first(
    program: Program, narrow: dict[Target, Choice], text: torch.Tensor | None
) -> None:
    """Of two that are as large, and with room for one, the one that matters; with more room, first what matters most
    for its size: the head."""
    sizes = {t.label: t.rows * t.width for t in narrow}
    assert min(sizes, key=lambda label: (sizes[label], label)) == "blocks.0.out"
    for room, widened in ((sizes[SENSITIVE], [SENSITIVE]), (sizes["head"], ["head"])):
        only = LOW + (HIGH - LOW) * room / sum(sizes.values())
        assert [t.label for t, c in mix_bits(program, narrow, only, text).items() if c.format.bits == 4] == widened


def test_sensitivities_are_divergences(program: Program, narrow: dict[Target, Choice]) -> None:
    found = {t.label: kl for t, kl in sensitivities(program, narrow, TEXT).items()}
    assert all(kl > 0 for kl in found.values())
    exact = {t: replace(c, format=replace(c.format, bits=8, block=16)) for t, c in narrow.items()}
    assert all(kl < found[t.label] / 10 for t, kl in sensitivities(program, exact, TEXT).items())
    assert sensitivities(program, narrow, TEXT) == sensitivities(program, narrow, TEXT)


@pytest.mark.parametrize(("given", "wider"), WIDER.items())
def test_every_format_has_its_wider_one(program: Program, narrow: dict[Target, Choice], given: int, wider: int) -> None:
    start = {t: replace(c, format=replace(c.format, bits=given)) for t, c in narrow.items()}
    stored = 4 if given == 3 else given
    mixed = mix_bits(program, start, (stored + wider) / 2 + 0.5, TEXT)
    assert {c.format.bits for c in mixed.values()} == {given, wider}


def test_bits_that_were_asked_for_stay(program: Program, narrow: dict[Target, Choice]) -> None:
    start = {t: replace(c, fixed=t.label == SENSITIVE) for t, c in narrow.items()}
    free, held = (mix_bits(program, choices, 3.25, TEXT) for choices in (narrow, start))
    width = lambda found: next(c.format.bits for t, c in found.items() if t.label == SENSITIVE)
    assert (width(free), width(held)) == (4, 2)


def test_eight_bits_cannot_be_widened(program: Program, narrow: dict[Target, Choice]) -> None:
    start = {t: replace(c, format=replace(c.format, bits=8)) for t, c in narrow.items()}
    with pytest.raises(ConfigError, match=r"take 8\.50 to 8\.50 bits each"):
        mix_bits(program, start, 8.7, TEXT)
    assert mix_bits(program, start, 8.5, TEXT) == start


def test_the_pass_reports_both_widths(program: Program) -> None:
    settings = WeightQuantization(bits=2, block=64, method="rtn", target_bits=3.0)
    notes = [site.note for site in QuantizeWeights(settings, calibration=TEXT).run(program).hits]
    assert any(note.startswith(f"{SENSITIVE}: 4 bits, blocks of 64") for note in notes)
    assert any(": 2 bits, blocks of 64" in note for note in notes)
