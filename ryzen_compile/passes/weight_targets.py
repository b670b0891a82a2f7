"""Which weights of a graph can be stored in integer blocks, and in which format each: facts that passes share.

A target is one weight expression with everything that reads it. Projections merged into one product are one target, a
head tied to its embedding is another; each is stored once, in one format.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch
from torch import fx

from ryzen_compile.config import TensorFormat, WeightQuantization
from ryzen_compile.errors import ConfigError
from ryzen_compile.numerics.blockwise import BLOCKS, BlockFormat, BlockTensor
from ryzen_compile.passes.base import NoMatch
from ryzen_compile.passes.prune_logits import head_chain
from ryzen_compile.program import Program, is_call, shape

aten = torch.ops.aten
dialect = torch.ops.ryzen
LINEARS = (aten.linear, dialect.linear_act, dialect.gated_linear)
WASTE = 1 / 16  # of a row that padding may add before a smaller block is taken


@dataclass(frozen=True)
class Target:
    """``weight`` (N, C) and its readers; ``names`` are the parameters it is made of, ``is_head``: it gives logits."""

    weight: fx.Node
    names: tuple[str, ...]
    rows: int
    width: int
    linears: tuple[fx.Node, ...]
    lookups: tuple[fx.Node, ...]
    is_head: bool

    @property
    def label(self) -> str:
        """Short and unique enough to read: the names with their common part written once."""
        first, *rest = (name.removesuffix(".weight") for name in self.names)
        return first + "".join("+" + name.rsplit(".", 1)[-1] for name in rest)

    @property
    def site(self) -> fx.Node:
        return (*self.linears, *self.lookups)[0]


def find_targets(program: Program) -> tuple[list[Target], list[NoMatch]]:
    """All targets in graph order, and why the other linears and lookups are none."""
    readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    misses: list[NoMatch] = []
    for node in program.graph.nodes:
        if is_call(node, *LINEARS, aten.embedding) and node.users:
            readers[node.args[0] if is_call(node, aten.embedding) else node.args[1]].append(node)
    targets = []
    head, _ = head_chain(program.outputs[0])
    for weight, nodes in readers.items():
        found = _target(weight, nodes, program, head)
        if isinstance(found, Target):
            targets.append(found)
        else:
            misses.append(found)
    return targets, misses


def _target(weight: fx.Node, nodes: Sequence[fx.Node], program: Program, head: fx.Node) -> Target | NoMatch:
    node = nodes[0]
    sources = list(_sources(weight))
    if any(s.op != "placeholder" or s.name not in program.weights for s in sources) or not sources:
        return NoMatch(f"{weight.name} is computed from the input, not from weights", node)
    if len(shape(weight)) != 2 or not weight.meta["val"].is_floating_point():
        return NoMatch(f"{weight.name} is no matrix of floating-point numbers", node)
    stranger = next((user for user in weight.users if user not in nodes), None)
    if stranger is not None:
        return NoMatch(f"{weight.name} is also read by {stranger.name}", stranger)
    lookups = tuple(n for n in nodes if is_call(n, aten.embedding))
    counted = next((n for n in lookups if n.args[1] is not program.inputs[0]), None)
    if counted is not None:
        return NoMatch(f"{weight.name} is looked up by something else than input_ids", counted)
    rows, width = (int(size) for size in shape(weight))
    names = tuple(program.weight_names[s.name] for s in sources)
    linears = tuple(n for n in nodes if n not in lookups)
    return Target(weight, names, rows, width, linears, lookups, head in linears)


def _sources(weight: fx.Node) -> Iterator[fx.Node]:
    """The placeholders below an expression, each once, in the order in which it reads them."""
    seen: set[fx.Node] = set()
    pending = [weight]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if not node.all_input_nodes:
            yield node
        pending.extend(reversed(node.all_input_nodes))


@dataclass(frozen=True)
class Choice:
    """How one target is stored, by which method; ``fixed``: its bits were asked for by name."""

    format: BlockFormat
    method: str
    fixed: bool = False


def choose_formats(targets: Sequence[Target], settings: WeightQuantization) -> dict[Target, Choice]:
    """The format of every target that is quantized at all, without mixed precision.

    Raises ``ConfigError`` for an override that matches no weight (naming the nearest) and for one that would split
    weights which are stored as one.
    """
    known = [name for target in targets for name in target.names]
    for expression in settings.overrides:
        if not any(re.search(expression, name) for name in known):
            near = get_close_matches(expression, known, n=1, cutoff=0.3)
            hint = f"the nearest is {near[0]!r}" if near else f"{len(known)} weights are to be quantized"
            raise ConfigError(f"override {expression!r} matches no weight", hint=hint)
    chosen = {}
    for target in targets:
        choice = _choice(target, settings)
        if choice is not None:
            chosen[target] = choice
    return chosen


def change_format(target: Target, choice: Choice, change: TensorFormat) -> Choice:
    """``choice`` with what ``change`` says of it; a block only ever becomes smaller."""
    form = choice.format
    block = form.block if change.block is None else min(form.block, fitting_block(target.width, change.block))
    symmetric = form.symmetric if change.symmetric is None else change.symmetric
    bits = change.bits or form.bits
    return replace(choice, format=BlockFormat(bits, block, symmetric), method=change.method or choice.method)


def _choice(target: Target, settings: WeightQuantization) -> Choice | None:
    asked = {name: _override(name, settings.overrides) for name in target.names}
    change = asked[target.names[0]]
    other = next((name for name, found in asked.items() if found != change), None)
    if other is not None:
        raise ConfigError(
            f"overrides ask for different formats of {target.names[0]} and {other}, which are merged into one weight",
            hint="write an expression that matches both",
        )
    if change.float:
        return None
    bits = settings.head_bits if settings.head_bits is not None and target.is_head else settings.bits
    symmetric = settings.symmetric if change.symmetric is None else change.symmetric
    return Choice(
        BlockFormat(change.bits or bits, fitting_block(target.width, change.block or settings.block), symmetric),
        change.method or settings.method,
        fixed=change.bits is not None,
    )


def _override(name: str, overrides: Mapping[str, TensorFormat]) -> TensorFormat:
    found = [change for expression, change in overrides.items() if re.search(expression, name)]
    return found[-1] if found else TensorFormat()


def fitting_block(width: int, block: int) -> int:
    """The largest block up to ``block`` that pads a row of ``width`` by at most ``WASTE``, else the least wasteful."""
    padding = {b: -width % b / width for b in BLOCKS if b <= block}
    fitting = [b for b, waste in padding.items() if waste <= WASTE]
    return max(fitting) if fitting else min(padding, key=lambda b: (padding[b], -b))


def assemble(weight: fx.Node, program: Program, known: Mapping[str, BlockTensor]) -> BlockTensor | None:
    """The integer blocks of an expression whose every parameter is ``known`` as such (by name): nothing is rounded.

    Only what moves whole rows can be followed: ``cat`` and ``slice`` along the first dimension. None otherwise, and
    when the parts are of different formats.
    """
    if weight.op == "placeholder":
        return known.get(program.weight_names[weight.name])
    if is_call(weight, aten.cat) and (len(weight.args) == 1 or weight.args[1] == 0):
        parts = [assemble(part, program, known) for part in weight.args[0]]
        found = [part for part in parts if part is not None]
        same = len(found) == len(parts) and len({(p.format, p.shape[1]) for p in found}) == 1
        return BlockTensor.concat(found) if same else None
    if is_call(weight, aten.slice) and len(weight.args) == 4 and weight.args[1] == 0:
        whole = assemble(weight.args[0], program, known)
        return None if whole is None else whole.rows(*slice(*weight.args[2:4]).indices(whole.shape[0])[:2])
    return None
