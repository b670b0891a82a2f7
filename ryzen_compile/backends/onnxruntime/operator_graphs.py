"""The operators of one kind, taken out of an artifact's graph to run alone: all its products, attentions or norms.

The result is a graph in which each node stands for itself: what it computed from other nodes becomes an input, what it
computes an output. Weights, tables and scales are the model's own, by reference to the same file. Nodes are taken from
the graph of standard operators, so ``claim`` can take them over as it would in the model, but finds nothing beside them
to fuse: what is measured is the operator.

A node that cannot stand alone, or whose size the text decides (an expert's tokens), is left out and its reason counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ryzen_compile.backends.onnxruntime.model_index import ModelIndex
from ryzen_compile.backends.onnxruntime.node_facts import CONTRIB, KIND_OF, attributes_of, operator_of
from ryzen_compile.backends.onnxruntime.operator_sites import Attention, Kind, Norm, Product, Site

NBITS, FUSED, GEMM = (CONTRIB, "MatMulNBits"), (CONTRIB, "FusedMatMul"), ("", "Gemm")
OPERATORS: dict[Kind, frozenset[tuple[str, str]]] = {
    "product": frozenset((("", "MatMul"), GEMM, FUSED, NBITS)),
    "attention": frozenset(operator for operator, kind in KIND_OF.items() if kind == "attention"),
    "norm": frozenset(operator for operator, kind in KIND_OF.items() if kind == "norm"),
}
LAST, TOTAL = "last_position", "total_length"  # inputs of attentions: int32 (1,) and int32 ()
_PAST = re.compile(r"past_key_values\.(\d{1,6})\.key")
_TURNED = ("transA", "transBatchA", "transBatchB")
_ATTENTION = frozenset(
    (
        *("num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "sliding_window_cache"),
        *("do_rotary", "rotary_interleaved", "k_quant_type", "v_quant_type", "kv_cache_bit_width"),
    )
)


@dataclass(frozen=True)
class OperatorGraph:
    """``model`` runs every one of ``sites`` once. ``inputs`` are the float32 ones that are not caches, by name, with
    their shapes. ``left`` counts the nodes of the kind that are not in it, by reason."""

    kind: Kind
    model: ModelProto
    sites: tuple[Site, ...]
    inputs: Mapping[str, tuple[int, ...]]
    left: Mapping[str, int]

    def constant(self, name: str, directory: Path) -> np.ndarray:
        """The values of a weight by name, read from the file in ``directory`` where they lie there."""
        found = next(tensor for tensor in self.model.graph.initializer if tensor.name == name)
        copy = TensorProto()
        copy.CopyFrom(found)  # reading would store the values in the tensor
        values: np.ndarray = numpy_helper.to_array(copy, str(directory))
        return values


def operator_graph(model: ModelProto, kind: Kind, *, context: int, tokens: int) -> OperatorGraph:
    """All nodes of one ``kind`` of the checked ``model``'s main graph, for ``tokens`` new tokens of one row behind
    ``context`` others. ``sites`` are empty where there are none."""
    work = _Extract(model, {"batch": 1, "sequence": tokens, "total": context + tokens})
    rules: dict[Kind, Callable[[NodeProto], Site | str]] = {
        "product": work.product,
        "attention": work.attention,
        "norm": work.norm,
    }
    sites: list[Site] = []
    left: Counter[str] = Counter()
    for node in model.graph.node:
        if operator_of(node) in OPERATORS[kind]:
            found = rules[kind](node)
            if isinstance(found, str):
                left[found] += 1
            else:
                sites.append(found)
    return OperatorGraph(kind, work.result(), tuple(sites), work.inputs, dict(left))


class _Extract:
    """A graph under way. A rule adds one node to it, or says why not and adds nothing."""

    def __init__(self, model: ModelProto, sizes: Mapping[str, int]) -> None:
        self.model, self.sizes = model, sizes
        self.index = ModelIndex(model)
        self.graph = GraphProto(name="operators")
        self.inputs: dict[str, tuple[int, ...]] = {}
        self._given: dict[tuple[Any, ...], str] = {}
        self._values = {value.name: value for value in (*model.graph.input, *model.graph.output)}
        self._slots: set[int] = set()

    def product(self, node: NodeProto) -> Product | str:
        weight = _weight(node, self.index)
        if isinstance(weight, str):
            return weight
        depth, width, bias = weight
        shape = self._shape(node.input[0])
        if shape is None or shape[-1] != depth:
            return "the rows that it multiplies are not known beforehand"
        x, out = self._input("x", shape), self._output((*shape[:-1], width))
        self._take(node, [x, *node.input[1:]], [out])
        return Product(x, shape, width, bias, out)

    def norm(self, node: NodeProto) -> Norm | str:
        skips, centred = node.op_type.startswith("Skip"), "Simplified" not in node.op_type
        facts, shape = attributes_of(node), self._shape(node.input[0])
        if facts.get("axis", -1) != -1 or shape is None:
            return "the rows that it is over are not known beforehand"
        given = [*node.input, *[""] * 5]
        weight, shift = given[1 + skips], given[2 + skips] if centred else ""
        added = given[2 + skips + centred] if skips else ""
        for name in (weight, *filter(None, (shift, added))):
            if not self.index.is_constant(name, TensorProto.FLOAT, shape[-1]):
                return "its weight and biases are not vectors of float32"
        if skips and self._shape(node.input[1]) != shape:
            return "what is added may be of another shape"
        x, skip = self._input("x", shape), self._input("skip", shape) if skips else ""
        total = skips and len(node.output) > 3 and not self.index.unread(node.output[3])
        out, sums = self._output(shape), self._output(shape) if total else ""
        self._take(node, [x, skip, *node.input[2:]] if skips else [x, *node.input[1:]], [out, "", "", sums])
        epsilon = float(facts.get("epsilon", 1e-12 if skips else 1e-5))  # their schemas' defaults
        return Norm(x, shape, centred, epsilon, weight, shift, skip, added, sums, out)

    def attention(self, node: NodeProto) -> Attention | str:
        facts, given = attributes_of(node), [*node.input, *[""] * 16]
        if unknown := sorted(set(facts) - _ATTENTION):
            return f"its attribute {unknown[0]} has no counterpart"
        past = _PAST.fullmatch(given[3])
        slot = int(past[1]) if past else -1
        halves = [f"{name}.{slot}.{half}" for name in ("past_key_values", "present") for half in ("key", "value")]
        own = given[3:5] == halves[:2] and node.output[1:3] == halves[2:] and self._values.keys() >= set(halves)
        if not own or slot in self._slots:
            return "its cache is not its own"
        fixed = [name for name in (*given[7:9], *given[11:14]) if name]
        if any(given[9:11]) or any(given[14:]) or not set(fixed) <= self.index.constants.keys():
            return "an input that has no counterpart"
        heads, kv_heads = facts.get("num_heads", 0), facts.get("kv_num_heads", 0)
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            return f"it has {heads} heads over {kv_heads}"
        width, bits = (self.index.shape(given[3]) or (0,))[-1], facts.get("kv_cache_bit_width", 8)
        if not isinstance(width, int) or not width or bits not in (4, 8):
            return "the size of its heads is not known beforehand"
        width *= 8 // bits
        shapes = self._queries(given[:3], heads, kv_heads, width)
        if not shapes:
            return "the tokens that it reads are not known beforehand"
        return self._attention(node, facts, slot, shapes, width)

    def _queries(self, names: Sequence[str], heads: int, kv_heads: int, width: int) -> list[tuple[int, ...]]:
        """The shapes of query, key and value, or of all three packed in one; none where they are not known.

        Heads that are padded are reshaped on their way here, and nothing tells the result's shape: the rest does.
        """
        counts = [heads, kv_heads, kv_heads] if names[1] else [heads + 2 * kv_heads]
        shapes: list[tuple[int, ...]] = [(1, self.sizes["sequence"], count * width) for count in counts]
        told = [(name, shape) for name, shape in zip(names, shapes, strict=False) if self.index.shape(name) is not None]
        return shapes if names[0] and all(self._shape(name) == shape for name, shape in told) else []

    def _attention(
        self, node: NodeProto, facts: Mapping[str, Any], slot: int, shapes: Sequence[tuple[int, ...]], width: int
    ) -> Attention:
        """The attention that has passed all checks."""
        self._slots.add(slot)
        tokens, heads, kv_heads = shapes[0][1], facts["num_heads"], facts["kv_num_heads"]
        x = tuple(self._input(name, shape) for name, shape in zip("qkv", shapes, strict=False))
        lengths = [self._lengths(LAST, [1]), self._lengths(TOTAL, [])]
        self.graph.input.extend(self._values[name] for name in node.input[3:5])
        out = self._output((1, tokens, heads * width))
        self._take(node, [*x, *[""] * (3 - len(x)), *node.input[3:5], *lengths, *node.input[7:]], [out])
        self.graph.node[-1].output.extend(node.output[1:3])
        self.graph.output.extend(self._values[name] for name in node.output[1:3])
        turns = bool(facts.get("do_rotary", 0))
        return Attention(
            x=x,
            tokens=tokens,
            slot=slot,
            heads=heads,
            kv_heads=kv_heads,
            width=width,
            scale=float(facts.get("scale", 0.0)) or width**-0.5,
            softcap=float(facts.get("softcap", 0.0)),
            window=max(0, facts.get("local_window_size", -1)),
            tables=(node.input[7], node.input[8]) if turns else None,
            interleaved=bool(facts.get("rotary_interleaved", 0)),
            sinks=node.input[11] if len(node.input) > 11 else "",
            out=out,
        )

    def result(self) -> ModelProto:
        """The graph as a model of the same operator sets."""
        used = {name for node in self.graph.node for name in node.input}
        self.graph.initializer.extend(tensor for tensor in self.model.graph.initializer if tensor.name in used)
        opsets = [opset for opset in self.model.opset_import if opset.domain in ("", "ai.onnx", CONTRIB)]
        return helper.make_model(self.graph, opset_imports=opsets, ir_version=self.model.ir_version)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """Of an activation, in numbers; None for a constant, and where a size is not known."""
        told = None if name in self.index.constants else self.index.shape(name)
        if told is None:
            return None
        sizes = [self.sizes.get(size, 0) if isinstance(size, str) else size for size in told]
        return tuple(sizes) if sizes and all(sizes) else None

    def _input(self, prefix: str, shape: tuple[int, ...]) -> str:
        """A float32 input of that shape; nodes that read alike shapes share it."""
        if (prefix, shape) not in self._given:
            name = self.index.fresh("_".join((prefix, *map(str, shape))))
            self.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
            self._given[prefix, shape], self.inputs[name] = name, shape
        return self._given[prefix, shape]

    def _lengths(self, name: str, shape: list[int]) -> str:
        if name not in self._given.values():
            self._given[name,] = name
            self.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT32, shape))
        return name

    def _output(self, shape: tuple[int, ...]) -> str:
        name = self.index.fresh(f"out_{len(self.graph.output)}")
        self.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def _take(self, node: NodeProto, inputs: list[str], outputs: list[str]) -> None:
        """A copy of ``node`` over other inputs and outputs; those left out at the end go."""
        copy = self.graph.node.add()
        copy.CopyFrom(node)
        while outputs and not outputs[-1]:
            outputs.pop()
        del copy.input[:], copy.output[:]
        copy.input.extend(inputs)
        copy.output.extend(outputs)


def _weight(node: NodeProto, index: ModelIndex) -> tuple[int, int, bool] | str:
    """Depth, width and whether there is a bias, of a product with a constant; or why it is none."""
    facts, operator = attributes_of(node), operator_of(node)
    fixed = [name for name in node.input[1:] if name]
    if not fixed or not set(fixed) <= index.constants.keys() or node.input[0] in index.constants:
        return "it multiplies no input by a constant"
    if any(facts.get(name, 0) for name in _TURNED):
        return "it turns what it multiplies"
    if operator == NBITS:
        return facts.get("K", 0), facts.get("N", 0), len(node.input) > 5 and bool(node.input[5])
    dims = tuple(index.constants[node.input[1]].dims)
    if len(dims) != 2:
        return f"its weight has {len(dims)} dimensions"
    depth, width = reversed(dims) if operator in (FUSED, GEMM) and facts.get("transB", 0) else dims
    return depth, width, operator == GEMM and len(node.input) > 2
