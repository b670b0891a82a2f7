"""Drop the small channels of what linear layers read.

    linear_nbits(x, codes, ...)   ->  linear_nbits(sparsify(x, threshold), codes, ...)        and the other linears

The head's input stays whole. Magnitudes of what linear layers read are spread smoothly around 0 and nearly alike from
text to text, so a threshold per input, a quantile of ``|x|``, drops about the same share anywhere (TEAL, Liu et al.,
2024; CATS, Lee et al., 2024). After quantize_weights, because thresholds are measured with the weights that are stored;
before insert_kv_cache, because that is done on text. The graph runs on it once, input by input: each threshold is
chosen when its input is known, and what follows is computed with it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ryzen_compile import ops
from ryzen_compile.config import SparseActivations
from ryzen_compile.edit import Edit
from ryzen_compile.errors import ConfigError
from ryzen_compile.interpret import first_tokens, interpret, text_feeds
from ryzen_compile.passes.base import Pass, PassResult, Promise, Site
from ryzen_compile.passes.prune_logits import head_chain
from ryzen_compile.passes.weight_targets import LINEARS
from ryzen_compile.program import Program, is_call, module_path, shape

dialect = torch.ops.ryzen
PRODUCTS = (*LINEARS, dialect.linear_nbits)
DROPS = (dialect.sparsify, dialect.sparsify_topk)
TOKENS = 4096  # that thresholds are chosen on
HELD_BACK = 1024  # that the share they drop is counted on
TRIED_ON = 256  # that the greedy allocation is measured on
RANDOM = (4, 256)  # windows of random tokens where there is no text
LEVELS = tuple(level / 20 for level in range(20))  # shares that the greedy allocation tries


@dataclass(frozen=True)
class Read:
    """One value ``x`` (..., C) and the linears that read it; ``weights`` is how many those have."""

    x: fx.Node
    linears: tuple[fx.Node, ...]
    weights: int

    @property
    def label(self) -> str:
        return "+".join(dict.fromkeys(module_path(node) or node.name for node in self.linears))


class SparsifyActivations(Pass):
    """``calibration`` (B, T) int64 is text in the model's tokens: its first windows give the thresholds, its last ones
    say what they drop."""

    name: ClassVar[str] = "sparsify_activations"
    promise: ClassVar[Promise] = "lossy"
    produces: ClassVar[frozenset[str]] = frozenset({"ryzen::sparsify", "ryzen::sparsify_topk"})
    required: ClassVar[bool] = True
    works_on: ClassVar[str] = "linear beside the head"
    remedy: ClassVar[str] = "a smaller share, overrides of 0 for what matters most, or a larger max_kl"

    def __init__(self, settings: SparseActivations, *, calibration: Tensor | None = None) -> None:
        self.settings = settings
        self.max_kl = settings.max_kl
        self._calibration = calibration

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        reads, dense = find_reads(program)
        text, held_back = self._text(program)
        targets = self._targets(program, reads, text)
        wanted = [read for read in reads if targets[read] > 0]
        misses = [Site(n.name, module_path(n), "the head's input stays whole") for n in dense]
        misses += [Site(r.x.name, r.label, "a target of 0") for r in reads if r not in wanted]
        if not wanted:
            return PassResult(program, (), tuple(misses))
        limits = _calibrate(program, {read: targets[read] for read in wanted}, self.settings.method, text)
        edit = Edit(program, self.name)
        nodes = {node.name: node for node in edit.graph.nodes}  # Edit works on a copy of the graph
        made = {}
        for read, limit in limits.items():
            drop = ops.sparsify_topk if isinstance(limit, int) else ops.sparsify
            x, linears = nodes[read.x.name], [nodes[node.name] for node in read.linears]
            kept = made[read] = edit.call(drop, x, limit, before=linears[0])
            for linear in linears:
                edit.swap_argument(linear, x, kept)
        result = edit.finish()
        reached = dropped_shares(result, held_back)
        hits = [self._site(read, limits[read], targets[read], reached[made[read].name]) for read in wanted]
        return PassResult(result, tuple(hits), tuple(misses))

    def _site(self, read: Read, limit: float, target: float, reached: float) -> Site:
        how = f"the largest {limit} channels" if isinstance(limit, int) else f"what reaches {limit:.4g}"
        origin = "random tokens" if self._calibration is None else "held-out text"
        note = f"{read.label}: {how}; {target:.1%} to be dropped, {reached:.1%} of {origin} is"
        return Site(read.x.name, read.label, note)

    def _text(self, program: Program) -> tuple[Tensor, Tensor]:
        """What thresholds are chosen on, and what they are checked on; the same where there is a single window."""
        text = self._calibration
        if text is None:
            generator = torch.Generator().manual_seed(0)
            length = min(RANDOM[1], program.spec.context)
            text = torch.randint(program.spec.vocab, (RANDOM[0], length), generator=generator)
        last = len(text) // 4 or (len(text) > 1)
        if not last:
            return first_tokens(text, TOKENS), first_tokens(text, HELD_BACK)
        return first_tokens(text[:-last], TOKENS), first_tokens(text[-last:], HELD_BACK)

    def _targets(self, program: Program, reads: Sequence[Read], text: Tensor) -> dict[Read, float]:
        """The share to drop of every input. Raises ``ConfigError`` for an override that matches none."""
        settings = self.settings
        asked = dict.fromkeys(reads, settings.target)
        fixed = set()
        for expression, target in settings.overrides.items():
            found = [read for read in reads if re.search(expression, read.label)]
            if not found:
                known = [read.label for read in reads]
                hint = f"they are {known[0]} to {known[-1]}" if known else "there is no linear beside the head"
                raise ConfigError(f"sparsity override {expression!r} matches no module", hint=hint)
            asked |= dict.fromkeys(found, target)
            fixed |= set(found)
        free = [read for read in reads if read not in fixed]
        if settings.allocation == "greedy" and free:
            asked |= allocate(free, _errors(program, free, first_tokens(text, TRIED_ON)), settings.target)
        return asked


def find_reads(program: Program) -> tuple[list[Read], list[fx.Node]]:
    """What linears read, in graph order, and the linears whose input is left alone."""
    head, _ = head_chain(program.outputs[0])
    readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    dense: list[fx.Node] = []
    for node in program.graph.nodes:
        if is_call(node, *PRODUCTS) and node.users and not is_call(node.args[0], *DROPS):
            (dense if node is head else readers[node.args[0]]).append(node)
    reads = [
        Read(x, tuple(nodes), sum(int(shape(node.args[1])[0]) * int(shape(x)[-1]) for node in nodes))
        for x, nodes in readers.items()
    ]
    return reads, dense


def allocate(reads: Sequence[Read], errors: Mapping[Read, Sequence[float]], target: float) -> dict[Read, float]:
    """Shares of ``LEVELS`` with a mean of at least ``target`` over the weights: one level at a time, always where the
    next one adds the least error per weight. ``errors`` have one for each level, 0 first."""
    level = dict.fromkeys(reads, 0)
    whole = sum(read.weights for read in reads)

    def price(read: Read) -> float:
        return (errors[read][level[read] + 1] - errors[read][level[read]]) / read.weights

    while sum(LEVELS[level[read]] * read.weights for read in reads) < target * whole - 1e-9 * whole:
        level[min((read for read in reads if level[read] + 1 < len(LEVELS)), key=price)] += 1
    return {read: LEVELS[level[read]] for read in reads}


def dropped_shares(program: Program, text: Tensor) -> dict[str, float]:
    """The share of zeros in the result of every node that drops channels, by the node's name."""
    found: dict[str, float] = {}

    def count(node: fx.Node, value: object) -> None:
        if is_call(node, *DROPS) and isinstance(value, Tensor):
            found[node.name] = float((value == 0).double().mean())

    interpret(program, text_feeds(program, text), [_goal(program)], watch=count)
    return found


def _calibrate(program: Program, targets: Mapping[Read, float], method: str, text: Tensor) -> dict[Read, float]:
    """The threshold, or for "topk" the number of channels kept, of every input."""
    reads = {node: read for read in targets for node in read.linears}
    limits: dict[Read, float] = {}

    def drop(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        read = reads.get(node)
        if read is None:
            return args
        x, *rest = args
        if read not in limits:
            share = targets[read]
            limits[read] = max(1, round((1 - share) * x.shape[-1])) if method == "topk" else quantile(x, share)
        limit = limits[read]
        return (ops.sparsify_topk(x, limit) if isinstance(limit, int) else ops.sparsify(x, limit), *rest)

    interpret(program, text_feeds(program, text), [_goal(program)], intercept=drop)
    return limits


def quantile(x: Tensor, share: float) -> float:
    """The magnitude that ``share`` of ``x`` is below: one of ``|x|``."""
    magnitudes = x.abs().flatten()
    return float(magnitudes.kthvalue(min(int(share * len(magnitudes)) + 1, len(magnitudes))).values)


def _errors(program: Program, reads: Sequence[Read], text: Tensor) -> dict[Read, list[float]]:
    """What dropping each of ``LEVELS`` changes in the results of an input's linears, squared, relative to them."""
    of_linear = {node: read for read in reads for node in read.linears}
    found = {read: [0.0] * len(LEVELS) for read in reads}

    def compare(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        read = of_linear.get(node)
        if read is not None:
            x, *rest = args
            tried = torch.cat([ops.sparsify(x, quantile(x, share) if share else 0.0) for share in LEVELS])
            whole, *thinned = node.target(tried, *rest).chunk(len(LEVELS))
            for level, part in enumerate(thinned, 1):
                found[read][level] += float((part - whole).square().sum() / whole.square().sum())
        return args

    interpret(program, text_feeds(program, text), [_goal(program)], intercept=compare)
    return found


def _goal(program: Program) -> fx.Node:
    """What the head reads: nobody asks for its logits, which would be the largest value of all."""
    head, _ = head_chain(program.outputs[0])
    goal: fx.Node = head.args[0] if is_call(head, *PRODUCTS) else program.outputs[0]
    return goal
