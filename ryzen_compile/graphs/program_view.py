"""The view of a Program.

What a graph computes stays, how ``torch.fx`` spells it goes: reading part i of a tuple is the value ``name.i`` instead
of a node of its own, and arithmetic on sizes is written where it is used, ``[B,T,4,16]``, in names for the symbolic
sizes that do not depend on how torch numbers them.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

from ryzen_compile.graphs.view import SHORT, GraphView, NodeView, ValueType, ValueView, plain
from ryzen_compile.program import Program, is_operator, module_path, op_name

# The sizes of inputs that all decoders share: batch, new tokens, all tokens, rows that a cache has room for.
INPUT_DIMS = {"input_ids": ("B", "T"), "position_ids": ("B", "T"), "attention_mask": ("B", "total")}
CACHE_DIMS = ("B", "", "S", "")  # (B, K, S, W); K and W are numbers
CACHE_PREFIX = "past_key_values"
ALL = torch.iinfo(torch.int64).max  # where a slice ends that has no end


def view_program(program: Program) -> GraphView:
    """The graph of ``program``; nodes and values are named as in ``program.graph``."""
    sizes = _Sizes(program)
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return GraphView(
        inputs=tuple(ValueView(node.name, _types(node, sizes)[0]) for node in program.inputs),
        weights=tuple(
            ValueView(name, _types(placeholders[name], sizes)[0], plain(label))
            for name, label in program.weight_names.items()
        ),
        nodes=tuple(_view(node, sizes) for node in program.graph.nodes if _is_shown(node)),
        outputs=tuple(_value(node) for node in program.outputs),
    )


class _Sizes:
    """Words for the symbols in shapes: those of the known inputs first, ``n1``, ``n2``, ... in the order of use."""

    def __init__(self, program: Program) -> None:
        self._words: dict[Any, sympy.Symbol] = {}
        self._texts: dict[Any, str] = {}
        for node in program.inputs:
            wanted = CACHE_DIMS if node.name.startswith(CACHE_PREFIX) else INPUT_DIMS.get(node.name, ())
            for size, word in zip(node.meta["val"].shape, wanted, strict=False):
                symbol = None if isinstance(size, int) else size.node.expr
                if word and isinstance(symbol, sympy.Symbol) and symbol not in self._words:
                    self._words[symbol] = self._fresh(word)

    def text(self, size: Any) -> str:
        """``size``, a number or a symbolic one, as it is written."""
        if isinstance(size, (bool, int, float)):
            return str(size)
        expression = size.node.expr
        if expression not in self._texts:
            for symbol in sorted(expression.free_symbols, key=str):
                if symbol not in self._words:
                    self._words[symbol] = self._fresh("n1", first=1)
            # Replaced before it is printed: sympy sorts the parts of an expression by name.
            self._texts[expression] = plain(str(expression.xreplace(self._words)).replace(" ", ""))
        return self._texts[expression]

    def _fresh(self, word: str, first: int = 0) -> sympy.Symbol:
        taken = {str(symbol) for symbol in self._words.values()}
        stem, serial, name = word.rstrip("0123456789"), first, word
        while name in taken:
            serial += 1
            name = f"{stem}{serial}"
        return sympy.Symbol(name, integer=True, positive=True)


def _is_shown(node: fx.Node) -> bool:
    """Calls that make tensors; parts of tuples and arithmetic on sizes are written where they are read."""
    if node.op != "call_function":
        return False
    return is_operator(node) or (isinstance(node.meta["val"], Tensor) and not _part(node))


def _part(node: fx.Node) -> bool:
    return node.target is operator.getitem and not isinstance(node.args[0].meta["val"], Tensor)


def _value(node: fx.Node) -> str:
    return f"{_value(node.args[0])}.{node.args[1]}" if _part(node) else node.name


def _view(node: fx.Node, sizes: _Sizes) -> NodeView:
    inputs, parameters, attributes = _arguments(node, sizes)
    types = _types(node, sizes)
    several = isinstance(node.meta["val"], (tuple, list))
    return NodeView(
        name=node.name,
        op=op_name(node) if is_operator(node) else f"{node.target.__module__}.{node.target.__name__}",
        inputs=inputs,
        outputs=tuple(f"{node.name}.{i}" for i in range(len(types))) if several else (node.name,),
        attributes=attributes,
        types=types,
        module=plain(module_path(node)),
        parameters=parameters,
    )


def _types(node: fx.Node, sizes: _Sizes) -> tuple[ValueType, ...]:
    value = node.meta["val"]
    return tuple(_type(part, sizes) for part in (value if isinstance(value, (tuple, list)) else (value,)))


def _type(value: Any, sizes: _Sizes) -> ValueType:
    if isinstance(value, Tensor):
        return ValueType(_word(value.dtype), tuple(sizes.text(size) for size in value.shape))
    return ValueType(type(value).__name__.removeprefix("Sym").lower())


def _arguments(node: fx.Node, sizes: _Sizes) -> tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Tensors in order, what the operator's schema calls them, and by such names the rest, where not the default."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return tuple(_value(source) for source in node.all_input_nodes), (), ()
    schema = node.target._schema.arguments
    given = dict(zip([argument.name for argument in schema], node.args, strict=False)) | node.kwargs
    inputs: list[str] = []
    parameters: list[str] = []
    attributes = []
    for argument in schema:
        if argument.name not in given:
            continue
        value = given[argument.name]
        parts = value if isinstance(value, (tuple, list)) else (value,)
        if "Tensor" in str(argument.type) and all(part is None or _is_tensor(part) for part in parts):
            inputs += ["" if part is None else _value(part) for part in parts]
            several = isinstance(value, (tuple, list))
            parameters += [f"{argument.name}.{i}" if several else argument.name for i in range(len(parts))]
        elif not argument.has_default_value() or value != argument.default_value:
            attributes.append((argument.name, _text(value, sizes)))
    while inputs and not inputs[-1]:
        inputs.pop()
    return tuple(inputs), tuple(parameters[: len(inputs)]), tuple(attributes)


def _is_tensor(value: object) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta["val"], Tensor)


def _text(value: Any, sizes: _Sizes) -> str:
    """An argument that is no tensor."""
    if isinstance(value, fx.Node):
        return _value(value) if _is_tensor(value) else _text(value.meta["val"], sizes)
    if isinstance(value, (tuple, list)):
        return f"[{','.join(_text(part, sizes) for part in value)}]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return sizes.text(value)
    if isinstance(value, float):
        return repr(value)
    if value == ALL and isinstance(value, int):
        return "max"
    return _word(value) if isinstance(value, torch.dtype) else plain(str(value).removeprefix("torch."))


def _word(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return SHORT.get(name, name)
