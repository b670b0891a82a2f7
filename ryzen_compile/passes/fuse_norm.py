"""Every normalisation over the last dim becomes one ``ryzen::rms_norm`` or ``ryzen::layer_norm``.

After canonicalize (one spelling of squares and reciprocal roots), before fuse_add_norm and merge_linear.
Three forms come in: ``aten.rms_norm``, ``aten.layer_norm``, and the formula spelled out around its ``rsqrt``,

    rms_norm(x)   = x rsqrt(mean(x²) + eps) [w]          w a weight, or 1 + w (unit_offset)
    layer_norm(x) = d rsqrt(mean(d²) + eps) [w] [+ b]    d = x - mean(x); mean(d²) may be var(x)

A cast of ``x`` to float32 before and back after is part of the operator, which computes in float32 and rounds once.
Norms of single heads (B, T, H, D) are norms over the last dim like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ryzen_compile import ops
from ryzen_compile.edit import Edit
from ryzen_compile.passes.base import NoMatch, RewritePass
from ryzen_compile.program import Program, is_call, shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Match:
    """``out`` normalises ``x``; ``centered`` tells LayerNorm from RMSNorm."""

    out: fx.Node
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    centered: bool
    unit_offset: bool = False


@dataclass(frozen=True)
class Core:
    """``normed = x rsqrt(mean(x²) + eps)``, or the same of ``x - mean(x)``."""

    normed: fx.Node
    x: fx.Node
    eps: float
    centered: bool


class FuseNorm(RewritePass):
    """A normalisation over the last dim  ->  ``rms_norm(x, w, eps, unit_offset)`` or ``layer_norm(x, w, b, eps)``."""

    name: ClassVar[str] = "fuse_norm"
    produces: ClassVar[frozenset[str]] = frozenset({"ryzen::rms_norm", "ryzen::layer_norm"})
    anchors = (aten.rsqrt, aten.layer_norm, aten.rms_norm)

    def match(self, node: fx.Node, program: Program) -> Match | NoMatch:  # noqa: ARG002 - the base signature
        if not is_call(node, aten.rsqrt):
            return _match_call(node)
        core = _match_core(node)
        return core if isinstance(core, NoMatch) else _with_weights(core)

    def rewrite(self, edit: Edit, m: Match) -> None:
        if m.centered:
            normed = edit.call(ops.layer_norm, m.x, m.weight, m.bias, m.eps, before=m.out)
        else:
            normed = edit.call(ops.rms_norm, m.x, m.weight, m.eps, m.unit_offset, before=m.out)
        edit.replace(m.out, normed)


def _match_call(node: fx.Node) -> Match | NoMatch:
    centered = is_call(node, aten.layer_norm)
    names = ("input", "normalized_shape", "weight", *(["bias"] if centered else []), "eps")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    x, dims, weight = given["input"], given["normalized_shape"], given.get("weight")
    if len(dims) != 1:
        return NoMatch(f"normalizes {len(dims)} dims, the operator one", node)
    eps = given.get("eps", 1e-5 if centered else None)
    if eps is None and x.meta["val"].dtype is not torch.float32:
        return NoMatch("eps is not given and depends on the type", node)
    eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
    plain, unit_offset = (weight, False) if centered else _split_offset(weight)
    return Match(node, x, plain, given.get("bias"), eps, centered, unit_offset)


def _match_core(root: fx.Node) -> Core | NoMatch:
    """Reads backward from the reciprocal root to what it measures, and one step forward to what it scales."""
    total, eps = root.args[0], 0.0
    if is_call(total, aten.add) and is_call(total.args[0], aten.mean, aten.var):
        total, eps = total.args[0], total.args[1]
        if not isinstance(eps, (int, float)):
            return NoMatch("eps is not a number", root.args[0])
    if not is_call(total, aten.mean, aten.var):
        return NoMatch("the root is not taken of a mean of squares", root)
    if not _over_last(total):
        return NoMatch(f"normalizes dims {_dims(total)} of {shape(total.args[0])}, the operator the last", total)
    measured = _measured(total)
    if isinstance(measured, NoMatch):
        return measured
    readers = list(root.users)
    if len(readers) != 1 or not is_call(readers[0], aten.mul) or set(readers[0].all_input_nodes) != {root, measured}:
        return NoMatch(f"the reciprocal root does not only scale the {measured.name} it was measured on", root)
    leak = next((n for n in _chain(root, total) if len(n.users) != 1), None)
    if leak is not None:
        return NoMatch(f"{leak.name} is read elsewhere", leak)
    source = _uncentered(measured)
    return Core(readers[0], source or measured, float(eps), centered=source is not None)


def _measured(total: fx.Node) -> fx.Node | NoMatch:
    """The tensor whose mean square ``total`` is."""
    source = total.args[0]
    if is_call(total, aten.mean):
        if is_call(source, aten.pow) and source.args[1] == 2:
            return source.args[0]
        return NoMatch("the mean is not one of squares", total)
    if total.kwargs.get("correction") != 0:
        return NoMatch("the variance is not divided by the number of channels (correction is not 0)", total)
    centred = [n for n in source.users if _uncentered(n) is source]
    return centred[0] if len(centred) == 1 else NoMatch("the variance scales a value not centred on its mean", total)


def _dims(reduction: fx.Node) -> list[int]:
    dims = reduction.args[1] if len(reduction.args) > 1 else None
    return list(range(len(shape(reduction.args[0])))) if dims is None else list(dims)


def _over_last(reduction: fx.Node) -> bool:
    """True for a mean or variance over exactly the last dim, which it keeps."""
    rank = len(shape(reduction.args[0]))
    return len(shape(reduction)) == rank and [d % rank for d in _dims(reduction)] == [rank - 1]


def _chain(root: fx.Node, total: fx.Node) -> list[fx.Node]:
    """The intermediate values that disappear: squares, their mean, eps added."""
    squares = [total.args[0]] if is_call(total, aten.mean) else []
    return [*squares, total, *([root.args[0]] if root.args[0] is not total else [])]


def _uncentered(node: fx.Node) -> fx.Node | None:
    """``x`` when ``node`` is ``x - mean(x)`` over the last dim."""
    if not is_call(node, aten.sub) or node.kwargs or not is_call(node.args[1], aten.mean):
        return None
    x, mean = node.args
    return x if mean.args[0] is x and _over_last(mean) else None


def _with_weights(core: Core) -> Match:
    """Walks forward over a cast back, a weight and (for LayerNorm) a bias, as far as one node reads each."""
    wide = core.x
    source = wide.args[0] if is_call(wide, aten._to_copy) and wide.meta["val"].dtype is torch.float32 else wide
    out = _skip_cast(core.normed, source)
    weight, out = _operand(out, aten.mul, source)
    bias = None
    if core.centered:
        bias, out = _operand(_skip_cast(out, source), aten.add, source)
    out = _skip_cast(out, source)
    x = source if source.meta["val"].dtype == out.meta["val"].dtype else wide
    plain, unit_offset = (weight, False) if core.centered else _split_offset(weight)
    return Match(out, x, plain, bias, core.eps, core.centered, unit_offset)


def _only_reader(node: fx.Node) -> fx.Node | None:
    readers = list(node.users)
    return readers[0] if len(readers) == 1 else None


def _skip_cast(node: fx.Node, source: fx.Node) -> fx.Node:
    reader = _only_reader(node)
    if reader is None or not is_call(reader, aten._to_copy):
        return node
    return reader if reader.meta["val"].dtype == source.meta["val"].dtype else node


def _operand(node: fx.Node, target: object, source: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """The (C,) tensor that the only reader of ``node`` multiplies or adds, and that reader; else none and ``node``."""
    reader = _only_reader(node)
    if reader is None or not is_call(reader, target) or reader.kwargs:
        return None, node
    others = [a for a in reader.args if a is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or shape(others[0]) != (shape(source)[-1],):
        return None, node
    return others[0], reader


def _split_offset(weight: fx.Node | None) -> tuple[fx.Node | None, bool]:
    """``w`` and true for ``1 + w``; casts of the weight are part of the operator."""
    plain = _uncast(weight)
    if plain is not None and is_call(plain, aten.add) and not plain.kwargs:
        tensors = [a for a in plain.args if isinstance(a, fx.Node)]
        if len(tensors) == 1 and 1 in plain.args:
            return _uncast(tensors[0]), True
    return plain, False


def _uncast(node: fx.Node | None) -> fx.Node | None:
    return node.args[0] if node is not None and is_call(node, aten._to_copy) else node
