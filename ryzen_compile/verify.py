"""The IR's law, checked after every pass in tests and with ``--verify``, at both ends otherwise.

A Program is well-formed when its graph lints, every node carries ``meta["val"]``, only ATen and ``ryzen::`` operators
(and shape arithmetic) occur, no output is an input or another output again, and the signature names the placeholders.
"""

from __future__ import annotations

import builtins
import math
import operator

import torch
from torch import fx

from ryzen_compile.errors import PassError
from ryzen_compile.program import NAMESPACES, Program, module_path

ARITHMETIC_MODULES = (operator.__name__, "_operator", math.__name__, builtins.__name__, "torch.utils._sympy.functions")


def verify(program: Program) -> None:
    """Raises ``PassError`` that lists every violation (the first ten)."""
    problems = [*_structure(program), *_nodes(program), *_signature(program), *_aliases(program)]
    if problems:
        more = f" (+{len(problems) - 10} more)" if len(problems) > 10 else ""
        raise PassError("the graph breaks the IR's law: " + "; ".join(problems[:10]) + more)


def _structure(program: Program) -> list[str]:
    try:
        program.graph.lint()
    except RuntimeError as error:
        return [f"lint: {error}"]
    return []


def _nodes(program: Program) -> list[str]:
    problems = []
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if node.op not in ("placeholder", "call_function"):
            problems.append(f"{node.name} is a {node.op}")
        elif node.op == "call_function" and not _known(node.target):
            problems.append(f"{node.name} ({module_path(node)}) calls {node.target}, expected aten or ryzen")
        if "val" not in node.meta:
            problems.append(f"{node.name} has no meta['val']")
    return problems


def _known(target: object) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in NAMESPACES
    return getattr(target, "__module__", "") in (*ARITHMETIC_MODULES, "torch")


def _signature(program: Program) -> list[str]:
    placeholders = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    named = [s.arg.name for s in program.exported.graph_signature.input_specs]
    results = [n.name for n in program.outputs if isinstance(n, fx.Node)]
    named_results = [s.arg.name for s in program.exported.graph_signature.output_specs]
    problems = []
    if placeholders != named:
        problems.append(f"signature inputs differ from the placeholders: {sorted(set(placeholders) ^ set(named))[:5]}")
    if results != named_results:
        problems.append(f"signature outputs are {named_results[:5]}, the graph returns {results[:5]}")
    return problems


def _aliases(program: Program) -> list[str]:
    results = list(program.outputs)
    problems = [f"output {n.name} is an input" for n in results if n.op == "placeholder"]
    if len(set(results)) != len(results):
        problems.append("one value is returned twice")
    return problems
