"""Store the weights of linears and of the embedding in blocks of 2, 4 or 8 bit integers.

    linear(x, W, b)       ->  linear_nbits(x, codes, scales, zeros, b)
    linear_act(x, W, b)   ->  activation(linear_nbits(...))
    gated_linear(x, W)    ->  gated_activation(linear_nbits(...))
    embedding(W, ids)     ->  embedding_nbits(ids, codes, scales, zeros)

After fuse_linear, when the weights that are stored together have been merged; before insert_kv_cache, because a method
that calibrates runs the whole graph on text. It does so once, product by product: the inputs of a product give the
statistics, its weight is quantized on the spot, and what follows is computed with the quantized weight, so that later
layers make up for earlier ones (as in GPTQ, Frantar et al., 2022). Memory holds one layer's activations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ryzen_compile import ops
from ryzen_compile.config import WeightQuantization
from ryzen_compile.edit import Edit
from ryzen_compile.errors import UnsupportedError
from ryzen_compile.interpret import interpret, text_feeds
from ryzen_compile.numerics.blockwise import BlockTensor
from ryzen_compile.numerics.search import METHODS, StatisticsBuilder, quantize_with
from ryzen_compile.passes.base import Pass, PassResult, Promise, Site
from ryzen_compile.passes.bit_plan import mix_bits
from ryzen_compile.passes.prune_logits import head_chain
from ryzen_compile.passes.weight_targets import (
    LINEARS,
    Choice,
    Target,
    assemble,
    change_format,
    choose_formats,
    find_targets,
)
from ryzen_compile.program import Program, is_call, module_path

aten = torch.ops.aten
dialect = torch.ops.ryzen


class QuantizeWeights(Pass):
    """``calibration`` (B, T) int64 is text in the model's tokens; ``given`` weights come quantized, by name."""

    name: ClassVar[str] = "quantize_weights"
    promise: ClassVar[Promise] = "lossy"
    produces: ClassVar[frozenset[str]] = frozenset(
        {"ryzen::linear_nbits", "ryzen::embedding_nbits", "ryzen::activation", "ryzen::gated_activation"}
    )
    required: ClassVar[bool] = True
    works_on: ClassVar[str] = "linear or embedding"

    def __init__(
        self,
        settings: WeightQuantization,
        *,
        calibration: Tensor | None = None,
        given: Mapping[str, BlockTensor] | None = None,
    ) -> None:
        self.settings = settings
        self.max_kl, self.max_cosine = settings.max_kl, settings.max_cosine
        self._calibration = calibration
        self._given = given or {}

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        targets, misses = find_targets(program)
        done = self._repacked(program, targets)
        choices = choose_formats([t for t in targets if t not in done], self.settings)
        choices = {target: self._affordable(target, choice) for target, choice in choices.items()}
        if self.settings.target_bits is not None:
            choices = mix_bits(program, choices, self.settings.target_bits, self._calibration)
        done |= quantize_targets(program, choices, self._calibration)
        edit = Edit(program, self.name)
        rewritten = {node.name: node for node in edit.graph.nodes}  # Edit works on a copy of the graph
        for target, tensor in done.items():
            _rewrite(edit, target, tensor, rewritten)
        left = [Site(m.node.name, module_path(m.node), m.reason) for m in misses]
        hits = [_site(target, tensor, choices.get(target)) for target, tensor in done.items()]
        return PassResult(edit.finish() if hits else program, tuple(hits), tuple(left))

    def _repacked(self, program: Program, targets: Sequence[Target]) -> dict[Target, BlockTensor]:
        """The targets whose weights came quantized; raises ``UnsupportedError`` for one that cannot be kept so."""
        found = {target: assemble(target.weight, program, self._given) for target in targets} if self._given else {}
        done = {target: tensor for target, tensor in found.items() if tensor is not None}
        lost = set(self._given) & set(program.weight_names.values()) - {name for t in done for name in t.names}
        if lost:
            raise UnsupportedError(
                f"{len(lost)} weight(s) came quantized and cannot be kept so, {min(lost)} among them: it is merged "
                f"with weights of another format, or read by something else than a linear",
                hint="recipe fp32 takes such a checkpoint with its weights widened",
            )
        return done

    def _affordable(self, target: Target, choice: Choice) -> Choice:
        """A method that needs statistics, where there are none: the fallback. A lookup alone has no inputs to count."""
        if not METHODS[choice.method].needs_statistics or (self._calibration is not None and target.linears):
            return choice
        return change_format(target, choice, self.settings.fallback)


def quantize_targets(
    program: Program, choices: Mapping[Target, Choice], calibration: Tensor | None
) -> dict[Target, BlockTensor]:
    """Every target in its chosen format; those whose method calibrates see the inputs that the others leave them."""
    done = {
        target: quantize_with(choice.method, _value(program, target), choice.format)
        for target, choice in choices.items()
        if not METHODS[choice.method].needs_statistics
    }
    if len(done) < len(choices) and calibration is not None:
        _calibrate(program, choices, calibration, done)
    return {target: done[target] for target in choices}


def _calibrate(
    program: Program, choices: Mapping[Target, Choice], text: Tensor, done: dict[Target, BlockTensor]
) -> None:
    """Runs ``program`` on ``text`` and quantizes each target that is not ``done`` when its first product is reached."""
    stored = {node: target for target in choices for node in (*target.linears, *target.lookups)}

    def quantize_from(target: Target, weight: Tensor, x: Tensor) -> None:
        statistics = StatisticsBuilder(target.width)
        statistics.add(x)
        choice = choices[target]
        done[target] = quantize_with(choice.method, weight, choice.format, statistics.finish())

    def swap_weight(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        target = stored.get(node)
        if target is None:
            return args
        if target not in done:
            if node in target.lookups:
                return args  # a tied table is looked up before its product is reached
            quantize_from(target, args[1], args[0])
        slot = 0 if node in target.lookups else 1
        return (*args[:slot], done[target].dequantize(), *args[slot + 1 :])

    # The head's logits would be the largest value of all and nobody reads them: its input is where the run ends.
    heads = {node: target for target in choices if target.is_head for node in target.linears}
    head, _ = head_chain(program.outputs[0])
    goals = [node.args[0] for node in heads] or [head.args[0] if is_call(head, *LINEARS) else program.outputs[0]]
    inputs = interpret(program, text_feeds(program, text), goals, intercept=swap_weight)
    for target, x in zip(heads.values(), inputs, strict=False):
        if target not in done:
            quantize_from(target, _value(program, target), x)


def _value(program: Program, target: Target) -> Tensor:
    weight: Tensor = interpret(program, {}, [target.weight])[0]
    return weight


def _rewrite(edit: Edit, target: Target, tensor: BlockTensor, nodes: Mapping[str, fx.Node]) -> None:
    stem = re.sub(r"\W+", "_", target.label)
    packed, scales = (
        edit.add_constant(f"{stem}_codes", tensor.packed),
        edit.add_constant(f"{stem}_scales", tensor.scales),
    )
    zeros = None if tensor.zeros is None else edit.add_constant(f"{stem}_zeros", tensor.zeros)
    stored = (packed, scales, zeros)
    bits, block = tensor.format.stored_bits, tensor.format.block
    for twin in target.lookups:
        node = nodes[twin.name]
        row = edit.call(ops.embedding_nbits, node.args[1], *stored, target.width, bits, block, before=node)
        edit.replace(node, row)
    for twin in target.linears:
        node = nodes[twin.name]
        x, _, *rest = node.args
        bias = rest[0] if rest and not is_call(node, dialect.gated_linear) else None
        product = edit.call(ops.linear_nbits, x, *stored, bias, bits, block, before=node)
        edit.replace(node, _epilogue(edit, node, product))


def _epilogue(edit: Edit, node: fx.Node, product: fx.Node) -> fx.Node:
    """The activation that ``node`` carried, after its product."""
    if is_call(node, dialect.gated_linear):
        return edit.call(ops.gated_activation, product, node.args[2], before=node)
    if is_call(node, dialect.linear_act) and node.args[3] != "none":
        return edit.call(ops.activation, product, node.args[3], before=node)
    return product


def _site(target: Target, tensor: BlockTensor, choice: Choice | None) -> Site:
    form = tensor.format
    how = "as it came" if choice is None else choice.method
    kind = "" if form.symmetric else " with zero points"
    note = f"{target.label}: {form.bits} bits, blocks of {form.block}{kind}, {how}"
    return Site(target.site.name, module_path(target.site), note)
