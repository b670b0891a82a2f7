"""Claiming: the standard nodes of a model that our operator library computes are replaced by its operators.

An artifact holds standard operators only. Where the library is there, its graph is rewritten in memory before a session
is made of it: the same inputs and outputs, the same weights in the same file. What is fused on the way (a gated
activation, a residual, the rounding of a product's activations into the norm before it) is read off the graph, never
off a name. A node that is not claimed stays as it is and is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto

from ryzen_compile.backends.onnxruntime.claim_lookup import LookupClaims, reads_codes
from ryzen_compile.backends.onnxruntime.claim_report import KINDS, NATIVE, ClaimReport
from ryzen_compile.backends.onnxruntime.claim_sparsity import drops_channels, threshold_of
from ryzen_compile.backends.onnxruntime.claim_ternary import TernaryClaims
from ryzen_compile.backends.onnxruntime.model_index import ModelIndex
from ryzen_compile.backends.onnxruntime.node_facts import (
    KIND_OF,
    STOCK_ROWS,
    activation_of,
    attributes_of,
    function_called,
    gated_activation,
    operator_of,
)

STEPS = 7  # our MatMulNBits' input of that name
RESIDUAL = 6
BLOCKS = (32, 64, 128, 256)
MOST_CHANNELS = 1 << 20  # of a norm
MOST_DIMENSIONS = 4  # of what it reads
_MATMUL_ATTRIBUTES = frozenset(("K", "N", "bits", "block_size", "accuracy_level"))
_ATTENTION_ATTRIBUTES = frozenset(
    (
        *("num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "sliding_window_cache"),
        *("do_rotary", "rotary_interleaved", "qk_norm_epsilon", "k_quant_type", "v_quant_type", "kv_cache_bit_width"),
        *("causal", "smooth_softmax", "qk_output"),
    )
)
_FIXED = {"causal": 1, "smooth_softmax": 0, "qk_output": 0}  # attributes of an attention of which we have one value
_ATTENTION_INPUTS = 16
_UNSUPPORTED = {9: "position_ids", 10: "attention_bias"}  # inputs of an attention
_CACHE_ELEMENTS = (TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8)


def claim(model: ModelProto, *, kinds: frozenset[str] = KINDS, isa: str = "auto") -> tuple[ModelProto, ClaimReport]:
    """A copy of the checked ``model`` over our operators, of the ``kinds`` given, and what became of it.

    ``isa`` other than ``auto`` forces an instruction set. Nodes inside functions and other nodes' graphs are not looked
    at. The model is only described, never read: its weights stay where they are.
    """
    if unknown := kinds - KINDS:
        raise ValueError(f"kinds of native operators are {', '.join(sorted(KINDS))}, got {sorted(unknown)}")
    work = _Claim(model)
    # Norms last: whether one may round depends on who its readers have become.
    rules = {
        "embedding": work.embedding,
        "sparse": work.sparse,  # before the products that it takes
        "matmul": work.matmul,
        "attention": work.attention,
        "norm": work.norm,
    }
    for kind, rule in rules.items():
        for index in work.of_kind(kind):
            if index in work.thinned:
                continue
            why = rule(index) if kind in kinds else "switched off"
            if why:
                work.left[index] = why
    return work.result(isa)


class _Claim:
    """One model under way: ``made`` are our nodes by the place they take, ``gone`` the places of nodes fused away."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.nodes: Sequence[NodeProto] = model.graph.node
        self.index = ModelIndex(model)
        self.made: dict[int, NodeProto] = {}
        self.gone: set[int] = set()
        self.left: dict[int, str] = {}
        self.fused: dict[str, int] = {}
        self.products: dict[int, NodeProto] = {}  # our MatMulNBits by the place of the node that each stands for
        self.thinned: set[int] = set()  # the places of products that skip channels
        # A standard operator's name calls that operator, whatever function the model defines under it.
        self.functions = {(f.domain, f.name, f.overload): f for f in model.functions if f.domain == NATIVE}
        self.lookups = LookupClaims(self.functions, self.index)
        self.ternary = TernaryClaims(self.functions, self.nodes, self.index)
        self.drops = {key for key, function in self.functions.items() if drops_channels(function)}
        self.gates = {key: gated_activation(function) for key, function in self.functions.items()}
        self.kinds = {place: kind for place, node in enumerate(self.nodes) if (kind := self._kind(node))}

    def of_kind(self, kind: str) -> list[int]:
        """The places of all nodes of one kind."""
        return [place for place, its_kind in self.kinds.items() if its_kind == kind]

    def _kind(self, node: NodeProto) -> str:
        if function_called(node) in self.drops:
            return "sparse"
        if function_called(node) in self.functions:
            return "embedding" if reads_codes(node, self.index) else ""
        return KIND_OF.get(operator_of(node), "")

    # --- one rule a kind: replaces the node at ``index``, or says why not

    def embedding(self, index: int) -> str:
        node = self.nodes[index]
        made = self.lookups.claim(node)
        if isinstance(made, str):
            return made
        self.made[index] = made
        return ""

    def sparse(self, index: int) -> str:
        """All products that read what ``node`` leaves of a value become such as skip channels, or none."""
        node = self.nodes[index]
        threshold = threshold_of(node, self.index)
        if isinstance(threshold, str):
            return threshold
        kept, readers = node.output[0], sorted(set(self.index.readers.get(node.output[0], ())))
        if kept in self.index.outside or not readers:
            return "what it leaves is read where we do not see it"
        made = {}
        for place in readers:
            product = self._product(place) if self.kinds.get(place) == "matmul" else "no product with integer weights"
            if isinstance(product, str):
                return f"{self.nodes[place].name or self.nodes[place].op_type} reads what it leaves: {product}"
            made[place] = product
        for place, product in made.items():
            product.op_type, product.input[0] = "SparseMatMulNBits", node.input[0]
            product.attribute.append(onnx.helper.make_attribute("threshold", threshold))
            self.made[self._absorb(place, product)] = product
        self.thinned |= set(readers)
        self.gone.add(index)
        return ""

    def matmul(self, index: int) -> str:
        made = self._product(index)
        if isinstance(made, str):
            return made
        node = self.nodes[index]
        ternary = self.ternary.claim(node, attributes_of(node))
        if ternary is None:
            self.products[index] = made
        self.made[self._absorb(index, ternary or made)] = ternary or made
        return ""

    def _product(self, index: int) -> NodeProto | str:
        """Our MatMulNBits in place of a product, or why it stays."""
        node = self.nodes[index]
        facts = attributes_of(node)
        if unknown := sorted(set(facts) - _MATMUL_ATTRIBUTES):
            return f"the attribute {unknown[0]} is not known"
        if facts.get("accuracy_level", 0) != 4:
            return f"accuracy_level {facts.get('accuracy_level', 0)} keeps its activations in float32"
        depth, rows, bits, block = (facts.get(name, 0) for name in ("K", "N", "bits", "block_size"))
        if bits not in (2, 4, 8) or block not in BLOCKS:
            return f"{bits} bits in blocks of {block}"
        blocks = -(-depth // block)
        inputs = _padded(node.input, STEPS + 1)
        if inputs[4] or any(inputs[RESIDUAL:]):
            return "an input that is not known"
        wanted = (
            (1, "codes", TensorProto.UINT8, rows * blocks * (block * bits // 8)),
            (2, "scales", TensorProto.FLOAT, rows * blocks),
            (3, "zero points", TensorProto.UINT8, rows * -(-blocks * bits // 8)),
            (5, "bias", TensorProto.FLOAT, rows),
        )
        for place, what, element, count in wanted:
            if (inputs[place] or place < 3) and not self.index.is_constant(inputs[place], element, count):
                return f"its {what} are not {count} constants of type {element}"
        made = onnx.helper.make_node("MatMulNBits", _trimmed(inputs), list(node.output), node.name, domain=NATIVE)
        made.attribute.extend(node.attribute)
        return made

    def _absorb(self, index: int, made: NodeProto) -> int:
        """Takes the one node behind the product into it, where it can; the place that ``made`` then has."""
        product = made.output[0]
        place = self.index.only_reader(product)
        if place is None or place in self.gone or len(self.nodes[place].output) != 1:
            return index
        reader = self.nodes[place]
        act, gate = activation_of(reader), self.gates.get(function_called(reader))
        even = attributes_of(made)["N"] % 2 == 0
        if gate is not None and even:
            made.attribute.extend((_attribute("gated", 1), _attribute("activation", gate)))
            what = "gated activation"
        elif act is not None:
            made.attribute.append(_attribute("activation", act))
            what = "activation"
        elif made.op_type == "MatMulTernary":  # which takes no residual
            return index
        elif operator_of(reader) == ("", "Add") and (residual := self._residual(reader, product)):
            inputs = [*_padded(made.input, RESIDUAL), residual]
            del made.input[:]
            made.input.extend(inputs)
            what = "residual"
        else:
            return index
        made.output[0] = reader.output[0]
        self.gone |= {index, place}
        self.fused[what] = self.fused.get(what, 0) + 1
        return place  # where everything that it reads has been made

    def _residual(self, added: NodeProto, product: str) -> str:
        """What is added to ``product``, if that is a tensor of the same shape; else empty."""
        others = [name for name in added.input if name != product]
        shape = self.index.shape(product)
        return others[0] if len(others) == 1 and shape is not None and shape == self.index.shape(others[0]) else ""

    def attention(self, index: int) -> str:
        node = self.nodes[index]
        facts = attributes_of(node)
        if unknown := sorted(set(facts) - _ATTENTION_ATTRIBUTES):
            return f"the attribute {unknown[0]} is not known"
        for name, value in _FIXED.items():
            if facts.get(name, value) != value:
                return f"{name} is {facts[name]}"
        inputs = _padded(node.input, _ATTENTION_INPUTS)
        for place, name in _UNSUPPORTED.items():
            if inputs[place]:
                return f"it reads {name}"
        if len(inputs) > _ATTENTION_INPUTS or not all(map(self.index.unread, node.output[3:])):
            return "an input or output that is not known"
        if not (inputs[0] and inputs[3] and inputs[4]):
            return "it has no cache"
        if self.index.element(inputs[0]) not in (0, TensorProto.FLOAT):
            return f"its query is of type {self.index.element(inputs[0])}"
        kinds = {self.index.element(inputs[3]), self.index.element(inputs[4])}
        if len(kinds) != 1 or not kinds <= set(_CACHE_ELEMENTS):
            return f"its cache is of type {', '.join(map(str, sorted(kinds)))}"
        made = onnx.helper.make_node(
            "GroupQueryAttention", list(node.input), list(node.output)[:3], node.name, domain=NATIVE
        )
        made.attribute.extend(node.attribute)
        self.made[index] = made
        return ""

    def norm(self, index: int) -> str:
        node = self.nodes[index]
        skips, centred = node.op_type.startswith("Skip"), "Simplified" not in node.op_type
        facts = attributes_of(node)
        known = {"epsilon"} if skips else {"axis", "epsilon", "stash_type"}
        if unknown := sorted(set(facts) - known):
            return f"the attribute {unknown[0]} is not known"
        if facts.get("axis", -1) != -1 or facts.get("stash_type", 1) != 1:
            return "it is not over the last axis in float32"
        epsilon = facts.get("epsilon", 1e-12 if skips else 1e-5)  # their schemas' defaults
        if not isinstance(epsilon, float) or not 0 <= epsilon <= 1:
            return f"its epsilon is {epsilon}"
        most = 2 + 2 * skips + centred
        given = _padded(node.input, most)
        if len(given) > most:
            return "an input that is not known"
        x, skip, weight, *rest = given if skips else [given[0], "", *given[1:]]
        shape = self.index.shape(x)
        channels = prod(self.index.constants[weight].dims) if weight in self.index.constants else 0
        for name in (weight, *filter(None, rest)):
            if not self.index.is_constant(name, TensorProto.FLOAT, channels) or self.index.shape(name) != (channels,):
                return "its weight and biases are not vectors of float32"
        # A lone weight may stand for all channels, which ours does not take.
        if self.index.element(x) not in (0, TensorProto.FLOAT) or not 2 <= channels <= MOST_CHANNELS:
            return f"it is over {channels} channels of type {self.index.element(x)}"
        if shape is not None and len(shape) > MOST_DIMENSIONS:
            return f"it is over {len(shape)} dimensions"
        if skip and (shape is None or shape != self.index.shape(skip)):
            return "what is added may be of another shape"
        outputs = _padded(node.output, 4)
        if not all(map(self.index.unread, outputs[1 : 3 if skips else 4])):
            return "its mean or deviation is an output"
        sums = "" if self.index.unread(outputs[3]) else outputs[3]
        made = onnx.helper.make_node(
            "SkipLayerNorm" if centred else "SkipRMSNorm",
            _trimmed([x, skip, weight, *rest]),
            _trimmed([outputs[0], sums]),
            node.name,
            domain=NATIVE,
            epsilon=epsilon,
        )
        self.made[index] = made
        self._round(made, channels)
        return ""

    def _round(self, made: NodeProto, channels: int) -> None:
        """The norm hands out integers, if all that reads its result are products of ours that would round it alike."""
        y = made.output[0]
        places = self.index.readers.get(y, [])
        readers = [self.products[place] for place in places if place in self.products]
        if y in self.index.outside or not readers or len(readers) != len(places):
            return
        facts = [attributes_of(node) for node in readers]
        if {f["K"] for f in facts} != {channels} or len({f["block_size"] for f in facts}) != 1:
            return
        codes, steps = self.index.fresh(f"{y}/codes"), self.index.fresh(f"{y}/steps")
        sums = made.output[1] if len(made.output) > 1 else ""
        del made.output[:]
        made.output.extend(("", sums, codes, steps))
        made.attribute.append(_attribute("block_size", facts[0]["block_size"]))
        for node in readers:
            inputs = [codes, *_padded(node.input, STEPS)[1:], steps]
            del node.input[:]
            node.input.extend(inputs)
        self.fused["rounding"] = self.fused.get("rounding", 0) + 1

    # --- the model again

    def result(self, isa: str) -> tuple[ModelProto, ClaimReport]:
        for node in self.made.values():
            if isa != "auto":
                node.attribute.append(_attribute("isa", isa))
        self.gone |= self.ternary.idle
        kept = [self.made.get(i, node) for i, node in enumerate(self.nodes) if i in self.made or i not in self.gone]
        out = ModelProto()
        out.CopyFrom(self.model)
        del out.graph.node[:], out.graph.value_info[:]
        out.graph.node.extend(kept)
        alive = {name for node in kept for name in node.output}
        out.graph.value_info.extend(value for value in self.model.graph.value_info if value.name in alive)
        if not any(opset.domain == NATIVE for opset in out.opset_import):
            out.opset_import.append(onnx.helper.make_opsetid(NATIVE, 1))
        return out, self._report(kept)

    def _report(self, kept: Sequence[NodeProto]) -> ClaimReport:
        claimed: dict[str, int] = {}
        for node in self.made.values():
            claimed[node.op_type] = claimed.get(node.op_type, 0) + 1
        left = tuple((self.nodes[i].name or f"node {i}", why) for i, why in sorted(self.left.items()))
        missed = {self.kinds[i] for i in self.left}
        inside = (node for function in self.model.functions for node in function.node)
        alike = not any(node.domain != NATIVE and node.op_type in STOCK_ROWS for node in (*kept, *inside))
        return ClaimReport(claimed, left, self.fused, frozenset(self.kinds.values()) - missed, alike)


def _attribute(name: str, value: int | str) -> AttributeProto:
    return onnx.helper.make_attribute(name, value)


def _padded(names: Sequence[str], count: int) -> list[str]:
    return [*names, *[""] * (count - len(names))]


def _trimmed(names: Sequence[str]) -> list[str]:
    """Without what is left out at the end."""
    kept = list(names)
    while kept and not kept[-1]:
        kept.pop()
    return kept
