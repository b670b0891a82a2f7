"""Compute logits for the last token only.

After insert_kv_cache: generation reads one row, and the head over a whole prompt is a large part of prefill when the
vocabulary is large. The slice goes in front of the head:

    head(h)[:, -1:]  =  head(h[:, -1:])

through everything between the head and the output that treats tokens one by one.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ryzen_compile.edit import Edit
from ryzen_compile.passes.base import Pass, PassResult, Site
from ryzen_compile.program import Program, is_call, module_path, shape

aten = torch.ops.aten
TOKEN_WISE = (aten.mul, aten.div, aten.add, aten.sub, aten.tanh, aten._to_copy, aten.neg,
              torch.ops.ryzen.activation)  # fmt: skip
HEADS = (aten.linear, torch.ops.ryzen.linear_act, torch.ops.ryzen.linear_nbits, torch.ops.ryzen.linear_ternary)


class PruneLogits(Pass):
    """``logits (B, T, V)``  ->  ``logits (B, 1, V)``, the head applied to the last token's state."""

    name: ClassVar[str] = "prune_logits"

    def run(self, program: Program) -> PassResult:
        edit = Edit(program, self.name)
        logits = edit.program.outputs[0]
        tokens = shape(edit.program.inputs[0])[1]
        head, chain = head_chain(logits)
        if not is_call(head, *HEADS):
            return PassResult(program, misses=(Site(head.name, module_path(head), "the output is not a linear head"),))
        hidden = head.args[0]
        if len(shape(hidden)) != 3 or not statically_known_true(shape(hidden)[1] == tokens):
            return PassResult(
                program, misses=(Site(hidden.name, module_path(hidden), f"the head reads {shape(hidden)}"),)
            )
        last = edit.call(aten.slice.Tensor, hidden, 1, -1, 2**63 - 1, before=head)
        value = edit.call(head.target, last, *head.args[1:], before=logits)
        for node in reversed(chain):
            args = [value if isinstance(a, fx.Node) else a for a in node.args]
            value = edit.call(node.target, *args, before=logits)
        edit.set_output(0, value)
        return PassResult(edit.finish(), (Site(head.name, module_path(head)),))


def head_chain(logits: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The node that makes the logits, and what is done to them one by one after it, last first."""
    chain, head = [], logits
    while is_call(head, *TOKEN_WISE) and _one_tensor(head):
        chain.append(head)
        head = next(a for a in head.args if isinstance(a, fx.Node))
    return head, chain


def _one_tensor(node: fx.Node) -> bool:
    return len(node.all_input_nodes) == 1 and not node.kwargs
