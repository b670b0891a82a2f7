"""Linears whose weights are a number times -1, 0 and +1 get activations of 8 bits, as they were trained to.

    linear(x, s C, b)   ->  linear_ternary(x, C, s) + b        C of -1, 0 and +1, s one for all or one a row

For a model that was trained so (BitNet b1.58, Ma et al., 2024), whose saved weights are exact products of scale and
codes, but whose graph knows nothing of the rounding of activations. Hence lossy: it is held to a budget, and what it
makes is what the passes after it are measured against. After canonicalize, when every product with a weight is a
``linear``; before merge_linear, which stacks codes as it does weights.
"""

from __future__ import annotations

import re
from typing import ClassVar

import torch
from torch import Tensor, fx

from ryzen_compile import ops
from ryzen_compile.edit import Edit
from ryzen_compile.interpret import interpret
from ryzen_compile.numerics import ternary
from ryzen_compile.passes.base import Pass, PassResult, Promise, Site
from ryzen_compile.passes.weight_targets import Target, find_targets
from ryzen_compile.program import Program, is_call, module_path

aten = torch.ops.aten


class TernaryLinears(Pass):
    """``max_kl`` is what the rounding of activations may cost, mean nats per token."""

    name: ClassVar[str] = "ternary_linears"
    promise: ClassVar[Promise] = "lossy"
    produces: ClassVar[frozenset[str]] = frozenset({"ryzen::linear_ternary"})
    required: ClassVar[bool] = True
    works_on: ClassVar[str] = "linear with weights of one number times -1, 0 and +1"

    def __init__(self, max_kl: float) -> None:
        self.max_kl = max_kl

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        targets, misses = find_targets(program)
        edit = Edit(program, self.name)
        nodes = {node.name: node for node in edit.graph.nodes}  # Edit works on a copy of the graph
        hits, left = [], [Site(m.node.name, module_path(m.node), m.reason) for m in misses]
        for target in targets:
            found = _stored(target, program)
            site = Site(target.site.name, module_path(target.site), found if isinstance(found, str) else "")
            if isinstance(found, str):
                left.append(site)
            else:
                _rewrite(edit, target, *found, nodes)
                hits.append(site)
        return PassResult(edit.finish() if hits else program, tuple(hits), tuple(left))


def _stored(target: Target, program: Program) -> tuple[Tensor, Tensor] | str:
    """Packed codes and scale of a target's weight, or why it has none."""
    if target.lookups:
        return f"{target.label} is looked up"
    if not all(is_call(node, aten.linear) for node in target.linears):
        return f"{target.label} is fused with what follows it"
    found = ternary.recover(interpret(program, {}, [target.weight])[0])
    return f"{target.label} is not one number a row times -1, 0 and +1" if found is None else found


def _rewrite(edit: Edit, target: Target, packed: Tensor, scale: Tensor, nodes: dict[str, fx.Node]) -> None:
    stem = re.sub(r"\W+", "_", target.label)
    stored = edit.add_constant(f"{stem}_codes", packed), edit.add_constant(f"{stem}_scale", scale)
    for twin in target.linears:
        node = nodes[twin.name]
        x, _, *bias = node.args
        product = edit.call(ops.linear_ternary, x, *stored, before=node)
        if bias and bias[0] is not None:
            product = edit.call(aten.add.Tensor, product, bias[0], before=node)
        edit.replace(node, product)
