"""Remove what nothing reads: calls, weights and inputs.

Last in the order. An input that no computation reads (``position_ids`` of a model whose positions all went into the
attention) would otherwise be asked of every caller.
"""

from __future__ import annotations

from typing import ClassVar

from ryzen_compile.edit import Edit
from ryzen_compile.passes.base import Pass, PassResult, Site
from ryzen_compile.program import Program


class EliminateDead(Pass):
    """Erases unread calls and placeholders; ``input_ids`` always stays."""

    name: ClassVar[str] = "eliminate_dead"

    def run(self, program: Program) -> PassResult:
        edit = Edit(program, self.name)
        edit.erase_dead()
        hits = []
        keep = edit.program.inputs[0]
        for node in list(edit.graph.nodes):
            if node.op == "placeholder" and not node.users and node is not keep:
                hits.append(Site(node.name, "", "nothing reads it"))
                edit.remove_input(node)
        return PassResult(edit.finish(), tuple(hits))
