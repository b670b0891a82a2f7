"""One spelling for every computation, so that the passes after it match one form.

First in the order. Each rule is exact: it removes an operation that changes nothing (a copy to the same type, a full
slice, a multiplication by one), folds layout operations into one, writes every matrix product with a weight as
``linear``, or lets equal computations be one. A second spelling of an operator is taught here, never as a second
pattern in a fusion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ryzen_compile.edit import Edit
from ryzen_compile.passes.base import Pass, PassResult, Site
from ryzen_compile.program import Program, is_call, module_path, shape

aten = torch.ops.aten
COPIES = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
)
SIDE_EFFECTS = ("rand", "bernoulli", "dropout", "normal_")


class Canonicalize(Pass):
    """Applies the rules to a fixed point, then merges equal computations."""

    name: ClassVar[str] = "canonicalize"

    def run(self, program: Program) -> PassResult:
        edit = Edit(program, self.name)
        hits: list[Site] = []
        changed = True
        while changed:
            changed = False
            for node in list(edit.graph.nodes):
                if node.op != "call_function" or not node.users:
                    continue
                replacement = _simplified(edit, node)
                if replacement is not None and replacement is not node:
                    hits.append(Site(node.name, module_path(node), str(node.target)))
                    edit.replace(node, replacement)
                    changed = True
            changed |= bool(_merge_equal(edit, hits))
            edit.erase_dead()
        return PassResult(edit.finish(), tuple(hits))


def _simplified(edit: Edit, node: fx.Node) -> fx.Node | None:
    for targets, rule in RULES:
        if is_call(node, *targets):
            return rule(edit, node)
    return None


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    left, right = shape(a), shape(b)
    return len(left) == len(right) and all(
        type(x) is type(y) and statically_known_true(x == y) for x, y in zip(left, right, strict=True)
    )


def _read_size_once(edit: Edit, node: fx.Node) -> fx.Node | None:
    """A size that the token ids have too is read off them: other inputs may then turn out to be needless."""
    ids = edit.program.inputs[0]
    if node.args[0] is ids:
        return None
    for dim, size in enumerate(shape(ids)):
        if statically_known_true(size == node.meta["val"]):
            first = next(n for n in edit.graph.nodes if n.op == "call_function")
            return edit.call(aten.sym_size.int, ids, dim, before=first, like=node)
    return None


def _drop(edit: Edit, node: fx.Node) -> fx.Node:
    return node.args[0]


def _drop_if_same_type(edit: Edit, node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    return source if node.meta["val"].dtype == source.meta["val"].dtype else None


def _drop_if_same_shape(edit: Edit, node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    return source if _same_shape(node, source) else None


def _drop_neutral(edit: Edit, node: fx.Node) -> fx.Node | None:
    """``x * 1`` and ``x / 1``, ``x + 0`` and ``x - 0``, where type and shape stay."""
    neutral = 1 if is_call(node, aten.mul, aten.div) else 0
    source, other = node.args[0], node.args[1]
    if not isinstance(source, fx.Node) or other != neutral or isinstance(other, fx.Node) or node.kwargs:
        return None  # a rounding mode makes x / 1 more than nothing
    return _drop_if_same_type(edit, node)


def _mul_rule(edit: Edit, node: fx.Node) -> fx.Node | None:
    """``x * x`` is ``pow(x, 2)``."""
    a, b = node.args
    if a is b and isinstance(a, fx.Node):
        return edit.call(aten.pow.Tensor_Scalar, a, 2, before=node)
    return _drop_neutral(edit, node)


def _div_rule(edit: Edit, node: fx.Node) -> fx.Node | None:
    """``x / sqrt(v)`` is ``x * rsqrt(v)``, to one rounding."""
    a, b = node.args
    if is_call(b, aten.sqrt) and isinstance(a, fx.Node) and not node.kwargs:
        root = edit.call(aten.rsqrt.default, b.args[0], before=node)
        return edit.call(aten.mul.Tensor, a, root, before=node)
    return _drop_neutral(edit, node)


def _spell_rsqrt(edit: Edit, node: fx.Node) -> fx.Node | None:
    """``1 / sqrt(v)`` and ``pow(v, -0.5)`` are ``rsqrt(v)``, to one rounding."""
    source = node.args[0]
    if is_call(node, aten.reciprocal):
        return edit.call(aten.rsqrt.default, source.args[0], before=node) if is_call(source, aten.sqrt) else None
    inverse_root = is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == -0.5
    return edit.call(aten.rsqrt.default, source, before=node) if inverse_root else None


def _fold_reshape(edit: Edit, node: fx.Node) -> fx.Node | None:
    """A reshape of a reshape is one; a reshape to the same shape is none. Strides are nobody's business here, so
    ``view``, which minds them, is spelled ``reshape``."""
    source, sizes = node.args
    while is_call(source, aten.reshape, aten.view):
        source = source.args[0]
    if _same_shape(node, source):
        return source
    if is_call(node, aten.reshape) and source is node.args[0]:
        return None
    return edit.call(aten.reshape.default, source, sizes, before=node)


def _fold_permute(edit: Edit, node: fx.Node) -> fx.Node | None:
    source, order = node.args
    order = [d % len(order) for d in order]
    if order == sorted(order):
        return source
    if is_call(source, aten.permute):
        inner = [d % len(order) for d in source.args[1]]
        return edit.call(aten.permute.default, source.args[0], [inner[d] for d in order], before=node)
    return None


def _spell_transpose(edit: Edit, node: fx.Node) -> fx.Node:
    rank = len(shape(node))
    a, b = (0, 1) if is_call(node, aten.t) else (node.args[1] % rank, node.args[2] % rank)
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return edit.call(aten.permute.default, node.args[0], order, before=node)


def _is_weight(edit: Edit, node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder" and node.name in edit.program.weights


def _weight_transposed(edit: Edit, node: fx.Node, before: fx.Node) -> fx.Node | None:
    """The (N, C) weight whose transpose ``node`` (C, N) is; none when ``node`` is not a weight."""
    if is_call(node, aten.permute) and list(node.args[1]) == [1, 0] and _is_weight(edit, node.args[0]):
        return node.args[0]
    return edit.call(aten.permute.default, node, [1, 0], before=before) if _is_weight(edit, node) else None


def _spell_linear(edit: Edit, node: fx.Node) -> fx.Node | None:
    """``mm``, ``addmm`` and ``matmul`` with a weight on the right."""
    if is_call(node, aten.addmm):
        if len(node.args) != 3 or node.kwargs:
            return None
        bias, x, right = node.args
        if len(shape(bias)) != 1:
            return None
    else:
        (x, right), bias = node.args, None
    if not isinstance(right, fx.Node) or len(shape(right)) != 2:
        return None
    weight = _weight_transposed(edit, right, node)
    return None if weight is None else edit.call(aten.linear.default, x, weight, bias, before=node)


def _lift_linear(edit: Edit, node: fx.Node) -> fx.Node | None:
    """``reshape(linear(reshape(x, (-1, C))), (..., N))`` is ``linear(reshape(x, (..., C)))``: rows stay rows."""
    linear = node.args[0]
    if not is_call(linear, aten.linear) or not is_call(linear.args[0], aten.reshape, aten.view):
        return None
    if len(linear.users) != 1:
        return None  # the product would be computed twice
    flat = linear.args[0]
    if not statically_known_true(shape(node)[-1] == shape(linear)[-1]):
        return None  # the reshape splits the features: it belongs to whoever reads it
    x = edit.call(aten.reshape.default, flat.args[0], [*node.args[1][:-1], shape(flat)[-1]], before=node)
    return edit.call(aten.linear.default, x, *linear.args[1:], before=node)  # the sizes may be younger than the linear


def _reshape_rule(edit: Edit, node: fx.Node) -> fx.Node | None:
    return _lift_linear(edit, node) or _fold_reshape(edit, node)


RULES: tuple[tuple[tuple[object, ...], Callable[[Edit, fx.Node], fx.Node | None]], ...] = (
    ((aten.sym_size,), _read_size_once),
    (COPIES, _drop),
    ((aten._to_copy,), _drop_if_same_type),
    ((aten.view, aten.reshape, aten._unsafe_view), _reshape_rule),
    ((aten.slice, aten.expand), _drop_if_same_shape),
    ((aten.mul,), _mul_rule),
    ((aten.div,), _div_rule),
    ((aten.add, aten.sub), _drop_neutral),
    ((aten.reciprocal, aten.pow), _spell_rsqrt),
    ((aten.transpose, aten.t), _spell_transpose),
    ((aten.permute,), _fold_permute),
    ((aten.mm, aten.addmm, aten.matmul), _spell_linear),
)


def _merge_equal(edit: Edit, hits: list[Site]) -> int:
    """Lets later computations read an earlier equal one (value numbering over a straight-line graph)."""
    seen: dict[object, fx.Node] = {}
    merged = 0
    for node in list(edit.graph.nodes):
        if node.op != "call_function" or any(word in str(node.target) for word in SIDE_EFFECTS):
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            hits.append(Site(node.name, module_path(node), f"equal to {first.name}"))
            edit.replace(node, first)
            merged += 1
    return merged


def _frozen(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    return (type(value).__name__, value) if isinstance(value, (bool, int, float)) else value
