"""A Program as a module on one device: weights moved once, caches written in place, floats of one precision.

What changes against the Program's graph:

* ``attention_mask`` and the sum over it become ``lengths`` (B,): a captured CUDA graph cannot hold a growing mask.
* ``cached_attention`` becomes ``cached_attention_inplace`` over the caller's buffers, which are not outputs any more.
* The slice before the head starts where ``last`` says, so that a step gives the logits of as many tokens.
* In half precision, weights and activations are cast; tables of angles, scales and codebooks, which the operators read
  in float32, stay. What a lookup gives in float32 is cast behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from ryzen_compile import ops
from ryzen_compile.backends.eager import fold_constants
from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.passes.prune_logits import head_chain
from ryzen_compile.program import Program, is_call, module_path
from ryzen_compile.spec import CacheSlot

aten = torch.ops.aten
TORCH_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Arguments of operators that stay float32 whatever the precision: angles, scales and what codes stand for.
FULL = frozenset(
    {"cos", "sin", "scales", "scale", "k_scale", "v_scale", "k_mean", "codebook", "gain", "offset", "kept"}
)
# ATen operations that the processor has to wait for: shapes and choices that follow from numbers.
WAITING = frozenset({"nonzero", "masked_select", "item", "_local_scalar_dense", "one_hot", "_unique2", "unique_dim"})
LOOKUPS = (ops.embedding_nbits, ops.codebook_embedding)  # give float32
HALF_CACHE = "fp16"  # the format of rows that an engine in half precision keeps where the Program says fp32


@dataclass(frozen=True)
class Lowered:
    """``module(ids, positions, lengths, last, *caches) -> logits (B, n, V)``; ids and positions (B, T) int64, lengths
    (B,) int64 including the new tokens, caches in the order of ``slots``, keys before values. ``all_logits`` says that
    n is T whatever ``last`` is, ``uncapturable`` why its steps cannot be captured in CUDA graphs, if so."""

    module: fx.GraphModule
    slots: tuple[CacheSlot, ...]
    all_logits: bool
    uncapturable: str


def lower(program: Program, device: torch.device, precision: torch.dtype) -> Lowered:
    """See the module. Raises ``UsageError`` for a Program without a cache, ``UnsupportedError``, by node and module
    path, for what cannot be carried."""
    if not program.slots:
        raise UsageError("the Program has no key/value cache", hint="run insert_kv_cache first")
    return _Lowering(program, device, precision).run()


class _Lowering:
    def __init__(self, program: Program, device: torch.device, precision: torch.dtype) -> None:
        self.program, self.device, self.precision = program, device, precision
        self.is_half = precision != torch.float32
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.constants = fold_constants(program)
        self.moved: dict[tuple[int, torch.dtype], str] = {}
        self.values: dict[fx.Node, Any] = {}
        logits = program.outputs[0]
        head, _ = head_chain(logits)
        before = head.args[0] if head.args else None
        is_tail = isinstance(before, fx.Node) and is_call(before, aten.slice) and before.args[1:3] == (1, -1)
        self.tail = before if is_tail else None

    def run(self) -> Lowered:
        given = {name: self.graph.placeholder(name) for name in ("ids", "positions", "lengths", "last")}
        caches = [
            [self.graph.placeholder(f"{kind}_{index}") for kind in ("keys", "values")]
            for index in range(len(self.program.slots))
        ]
        known = {"input_ids": given["ids"], "position_ids": given["positions"]}
        for index, pair in enumerate(caches):
            for kind, node in zip(("key", "value"), pair, strict=True):
                known[f"past_key_values_{index}_{kind}"] = node
        self.values |= {node: known[node.name] for node in self.program.inputs if node.name in known}
        self.given = given
        wanted = self._needed(self.program.outputs[0])
        for node in self.program.graph.nodes:
            if node in wanted and node.op != "placeholder":
                self.values[node] = self._lowered(node)
        self.graph.output(self._value(self.program.outputs[0], full=False))
        self.graph.lint()
        module = fx.GraphModule(self.root, self.graph)
        form = HALF_CACHE if self.is_half else "fp32"
        slots = tuple(
            replace(slot, key_format=_format(slot.key_format, form), value_format=_format(slot.value_format, form))
            for slot in self.program.slots
        )
        return Lowered(module, slots, self.tail is None, self._uncapturable())

    def _uncapturable(self) -> str:
        """The first node that would have a captured step wait for the device."""
        for node in self.graph.nodes:
            if getattr(node.target, "_opname", "") in WAITING:
                return f"{node.name} ({node.target}) makes the processor wait for a number"
        return ""

    def _needed(self, logits: fx.Node) -> set[fx.Node]:
        """What ``logits`` is computed from, short of constants and inputs."""
        found: set[fx.Node] = set()
        pending = [logits]
        while pending:
            node = pending.pop()
            if node not in found and node not in self.constants and node not in self.values:
                found.add(node)
                pending.extend(node.all_input_nodes)
        return found

    def _lowered(self, node: fx.Node) -> Any:
        """What stands for ``node`` in the new graph: a node, or for a call with caches its only result."""
        mask = self.program.input("attention_mask")
        if is_call(node, aten.sum) and node.args[0] is mask:
            return self.given["lengths"]
        if mask is not None and mask in node.all_input_nodes:
            raise UnsupportedError(f"node {node.name} at {module_path(node)!r} reads the attention mask")
        if is_call(node, ops.cached_attention._opoverload):
            return self._attention(node)
        source: Any = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and is_call(source, ops.cached_attention._opoverload):
            return self.values[source]  # its first result, the only one wanted
        if node is self.tail:
            hidden = self._value(source, full=False)
            start = self.graph.call_function(_minus, (self.given["last"],))
            return self.graph.call_function(aten.slice.Tensor, (hidden, 1, start, 2**63 - 1))
        self._refuse_angles(node)
        args, kwargs = self._arguments(node)
        made = self.graph.call_function(node.target, args, kwargs)
        if self.is_half and is_call(node, *(op._opoverload for op in LOOKUPS)):
            made = self.graph.call_method("to", (made, self.precision))
        return made

    def _attention(self, node: fx.Node) -> fx.Node:
        args, kwargs = self._arguments(node)
        arguments = ops.cached_attention._opoverload._schema.arguments
        filled: dict[str, Any] = {argument.name: argument.default_value for argument in arguments}
        filled |= dict(zip(filled, args, strict=False)) | kwargs
        if filled["rolling"]:
            raise UnsupportedError(
                f"node {node.name} at {module_path(node)!r} evicts rows of its cache by itself",
                hint="insert the cache with bounded=False",
            )
        if self.is_half:
            filled |= {name: _format(filled[name], HALF_CACHE) for name in ("k_format", "v_format")}
        return self.graph.call_function(torch.ops.ryzen.cached_attention_inplace.default, tuple(filled.values()))

    def _arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The node's own, with what they stand for here."""
        schema = getattr(node.target, "_schema", None)
        names = [argument.name for argument in schema.arguments] if schema is not None else []
        is_ours = getattr(node.target, "namespace", "") == "ryzen"
        args = tuple(
            map_arg(argument, lambda n, i=i: self._value(n, full=is_ours and names[i] in FULL))
            for i, argument in enumerate(node.args)
        )
        kwargs = {
            name: map_arg(value, lambda n, name=name: self._value(n, full=is_ours and name in FULL))
            for name, value in node.kwargs.items()
        }
        if self.is_half:
            args = tuple(self._cast(argument) for argument in args)
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        if isinstance(kwargs.get("device"), torch.device):
            kwargs["device"] = self.device
        return args, kwargs

    def _cast(self, argument: object) -> object:
        return self.precision if argument == torch.float32 else argument

    def _value(self, node: fx.Node, *, full: bool) -> Any:
        """The new graph's node for ``node``; a constant in float32 where ``full``, else in the precision."""
        if node in self.values:
            return self.values[node]
        value = self.constants[node]
        if not isinstance(value, Tensor):
            return value
        dtype = self.precision if value.is_floating_point() and not full else value.dtype
        key = (id(value), dtype)
        if key not in self.moved:
            self.moved[key] = f"constant_{len(self.moved)}"
            self.root.register_buffer(self.moved[key], value.detach().to(self.device, dtype), persistent=False)
        return self.graph.get_attr(self.moved[key])

    def _refuse_angles(self, node: fx.Node) -> None:
        """Positions as floats have to stay exact, which half precision is not beyond 256: whatever makes floats of
        integers alone is refused, but for lookups."""
        is_lookup = getattr(node.target, "namespace", "") != "aten" or is_call(node, aten.embedding, aten.index)
        if not self.is_half or is_lookup:
            return
        given = [n.meta["val"] for n in node.all_input_nodes if n not in self.constants]
        counts = [v for v in given if isinstance(v, Tensor) and not v.is_floating_point() and v.dtype != torch.bool]
        makes_floats = isinstance(node.meta["val"], Tensor) and node.meta["val"].is_floating_point()
        if makes_floats and (is_call(node, aten.arange) or (counts and len(counts) == len(given))):
            raise UnsupportedError(
                f"node {node.name} at {module_path(node)!r} computes with positions as numbers, which half precision "
                "cannot hold",
                hint="use precision fp32",
            )


def _minus(value: int) -> int:
    return -value


def _format(form: str, floats: str) -> str:
    """``floats`` in the place of the Program's own."""
    return floats if form == "fp32" else form
