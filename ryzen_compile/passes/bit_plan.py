"""Mixed precision: which weights get the wider format, so that the model's size meets a target at the least loss.

Each weight is rounded alone to the narrow format while the rest of the model stays as it is, and the divergence of the
logits on a little text is measured. Weights are then widened in the order of divergence removed per byte added, until
the size asked for is reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ryzen_compile.errors import ConfigError
from ryzen_compile.interpret import first_tokens, interpret, text_feeds
from ryzen_compile.numerics.blockwise import BlockFormat
from ryzen_compile.numerics.divergence import mean_divergence
from ryzen_compile.numerics.search import quantize_with
from ryzen_compile.passes.weight_targets import Choice, Target
from ryzen_compile.program import Program

WIDER = {2: 4, 3: 8, 4: 8}
TOKENS = 512  # of text that the sensitivities are measured on
METHOD = "mse"  # what a weight is rounded with to measure its sensitivity: the same for all, and without calibration


def mix_bits(
    program: Program, choices: Mapping[Target, Choice], target_bits: float, text: Tensor | None
) -> dict[Target, Choice]:
    """``choices`` with some widened, so that stored bits per weight (scales included) come up to ``target_bits``.

    Without ``text`` (B, T) int64, random tokens are read. Raises ``ConfigError`` when the narrow formats are above the
    target already, or the wide ones still below it.
    """
    wide = {t: c.format if c.fixed else _widened(c.format) for t, c in choices.items()}
    sizes = {t: t.rows * t.width for t in choices}
    budget = target_bits * sum(sizes.values())
    spent = sum(choices[t].format.bits_per_weight * sizes[t] for t in choices)
    most = sum(wide[t].bits_per_weight * sizes[t] for t in choices)
    if not spent <= budget <= most:
        low, high = (total / max(1, sum(sizes.values())) for total in (spent, most))
        raise ConfigError(
            f"target_bits {target_bits}: with these formats the weights take {low:.2f} to {high:.2f} bits each",
            hint="choose a target in between, or other bits and block",
        )
    gains = sensitivities(program, choices, _sample(program, text))
    mixed = dict(choices)
    for target in sorted(choices, key=lambda t: gains[t] / sizes[t], reverse=True):
        extra = (wide[target].bits_per_weight - choices[target].format.bits_per_weight) * sizes[target]
        if extra > 0 and spent + extra <= budget:
            mixed[target] = replace(choices[target], format=wide[target])
            spent += extra
    return mixed


def sensitivities(program: Program, choices: Mapping[Target, Choice], text: Tensor) -> dict[Target, float]:
    """Mean KL divergence of the logits on ``text``, nats per token, that rounding each target alone causes."""
    feeds, output = text_feeds(program, text), [program.outputs[0]]
    reference = interpret(program, feeds, output)[0]
    found = {}
    for target, choice in choices.items():
        rounded = _rounding(program, target, choice.format)
        logits = interpret(program, feeds, output, intercept=rounded)[0]
        found[target] = mean_divergence(reference, logits)[0]
    return found


def _rounding(program: Program, target: Target, form: BlockFormat) -> Any:
    """An interceptor that gives ``target``'s readers its rounded weight."""
    value = interpret(program, {}, [target.weight])[0]
    rounded = quantize_with(METHOD, value, form).dequantize()
    readers = {**dict.fromkeys(target.lookups, 0), **dict.fromkeys(target.linears, 1)}

    def swap(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        slot = readers.get(node)
        return args if slot is None else (*args[:slot], rounded, *args[slot + 1 :])

    return swap


def _widened(form: BlockFormat) -> BlockFormat:
    return replace(form, bits=WIDER.get(form.bits, form.bits))


def _sample(program: Program, text: Tensor | None) -> Tensor:
    if text is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(program.spec.vocab, (1, min(TOKENS, program.spec.context)), generator=generator)
    return first_tokens(text, TOKENS)
