"""Probe: runs a part of a Program's graph on values of our choosing.

Most of what a pass wants to know about a piece of a graph ("is this a rotation?", "which keys does this mask hide?")
has dozens of spellings and one meaning. A probe asks for the meaning: it feeds chosen tensors to the piece and looks at
what comes out. The spelling then does not matter, and neither does the release of the library that wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, fx

from ryzen_compile.interpret import interpret
from ryzen_compile.program import Program, is_call

aten = torch.ops.aten


class Probe:
    """Knows which values depend on the tokens and which only on their positions or number.

    ``of_tokens`` are the nodes computed from token ids; ``of_padding`` those computed from an encoder's padding and not
    from ids; ``of_positions`` those computed from ``position_ids`` or from the number of tokens alone: rotary angles,
    masks, position embeddings.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self.ids = program.inputs[0]
        self.positions = program.input("position_ids")
        self.padding = program.input("attention_mask")
        self.order = {node: i for i, node in enumerate(program.graph.nodes)}
        self.of_tokens = self._reached([self.ids], through_sizes=False)
        sizes = [n for n in program.graph.nodes if is_call(n, aten.sym_size)]
        roots = [*sizes, *([self.positions] if self.positions else [])]
        self.of_padding = self._reached([self.padding] if self.padding else [], through_sizes=False) - self.of_tokens
        self.of_positions = self._reached(roots, through_sizes=True) - self.of_tokens - self.of_padding - set(roots)

    def _reached(self, roots: Iterable[fx.Node], *, through_sizes: bool) -> set[fx.Node]:
        found = set(roots)
        for node in self._program.graph.nodes:
            reads = node.op == "call_function" and not found.isdisjoint(node.all_input_nodes)
            if reads and (through_sizes or not is_call(node, aten.sym_size)):
                found.add(node)
        return found

    def evaluate(self, target: fx.Node, feeds: Mapping[fx.Node, Tensor], tokens: int, batch: int = 1) -> Tensor:
        """The value of ``target`` when the nodes in ``feeds`` have the given values.

        Token ids are zeros (``batch``, ``tokens``), positions count from zero and nothing is padding, unless fed.
        Weights are the model's.
        """
        values: dict[fx.Node, object] = dict(feeds)
        values.setdefault(self.ids, torch.zeros((batch, tokens), dtype=torch.long))
        if self.positions is not None:
            values.setdefault(self.positions, torch.arange(tokens).repeat(batch, 1))
        if self.padding is not None:
            values.setdefault(self.padding, torch.ones((batch, tokens), dtype=torch.long))
        (result,) = interpret(self._program, values, [target])
        if not isinstance(result, Tensor):
            raise TypeError(f"{target.name} is not a tensor")
        return result

    def common_source(
        self,
        exit_: fx.Node,
        expandable: frozenset[object],
        until: Callable[[fx.Node], bool] = lambda _: True,
    ) -> tuple[fx.Node, set[fx.Node]] | None:
        """The nearest tensor that every token-dependent path into ``exit_`` goes through and that ``until`` accepts,
        and the nodes between.

        Walks back, latest node first, through calls of ``expandable`` overload packets only; none when the walk has to
        cross anything else.
        """
        frontier: set[fx.Node] = {exit_}
        region: set[fx.Node] = set()
        while True:
            latest = max(frontier, key=self.order.__getitem__)
            if len(frontier) == 1 and region and isinstance(latest.meta["val"], Tensor) and until(latest):
                return latest, region
            packet = getattr(latest.target, "overloadpacket", latest.target)
            if latest.op != "call_function" or packet not in expandable:
                return None
            frontier.remove(latest)
            region.add(latest)
            frontier |= {n for n in latest.all_input_nodes if n in self.of_tokens}
            if not frontier:
                return None
