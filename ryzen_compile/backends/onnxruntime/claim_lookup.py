"""Lookups in tables of codes, for claiming: a call of a function that decodes rows becomes our ``CodebookEmbedding``.

What the function computes is not guessed at: for tables of these shapes its body has to be, node by node, one that the
lowering writes. Our operator reads the same tensors, and for ids of rows its results are equal to the bit. It refuses
all other ids, of which Gather, in the function, counts those from -V to -1 from the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import onnx
from onnx import FunctionProto, NodeProto, TensorProto

from ryzen_compile.backends.onnxruntime.claim_report import NATIVE
from ryzen_compile.backends.onnxruntime.codebook_lookup import Lookup
from ryzen_compile.backends.onnxruntime.model_index import ModelIndex
from ryzen_compile.backends.onnxruntime.node_facts import OPSET, function_called
from ryzen_compile.backends.onnxruntime.structure import Structure

# Those of numerics.codebook, which would import torch.
BITS, DIMS, STAGES = range(1, 9), (1, 2, 4, 8), (1, 2)
MOST_CHANNELS = 1 << 20
MOST_KEPT = (1 << 15) - 1  # rows: slots are int16
MOST_DIMENSIONS = 7  # of ids
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
INPUTS = ("codes", "codebook", "scales", "gain", "offset", "slots", "kept")  # of our operator, behind ids
FunctionKey = tuple[str, str, str]  # domain, name, overload


def reads_codes(node: NodeProto, index: ModelIndex) -> bool:
    """Whether a call reads what such a table's codes and codebook could be, by their types."""
    return [index.element(name) for name in node.input[1:3]] == [TensorProto.UINT8, TensorProto.FLOAT]


class LookupClaims:
    """Claims of one model's lookups. What a function computes is worked out once for all tables of one shape: calls are
    small, and their work must not grow beyond the model's own size."""

    def __init__(self, functions: Mapping[FunctionKey, FunctionProto], index: ModelIndex) -> None:
        self._functions = functions
        self._index = index
        self._structures: dict[FunctionKey, Structure | None] = {}
        self._forms: dict[tuple[FunctionKey, _Sizes], Lookup | None] = {}

    def claim(self, node: NodeProto) -> NodeProto | str:
        """Our operator in place of ``node``, which calls one of the functions and reads codes; or why it stays."""
        called, index = function_called(node), self._index
        if not all(node.input) or len(node.input) != len(self._functions[called].input) or len(node.output) != 1:
            return "an input or output that is not known"
        ids, *tensors = node.input
        if missing := [name for name in tensors if name not in index.constants]:
            return f"{missing[0]} is no constant"
        if index.element(ids) != TensorProto.INT64:
            return f"its ids are of type {index.element(ids)}"
        shape = index.shape(ids)
        if shape is None or len(shape) > MOST_DIMENSIONS:
            return "the shape of its ids is not known" if shape is None else f"its ids have {len(shape)} dimensions"
        sizes = _sizes(tensors, index)
        if isinstance(sizes, str):
            return sizes
        form = self._form_of(called, sizes)
        if form is None:
            return "its function computes something else than rows of a table of codes"
        named = _named(form, tensors)
        return _misfit(form, named, index) or _made(node, form, named)

    def _form_of(self, called: FunctionKey, sizes: _Sizes) -> Lookup | None:
        """The form of lookup whose body a function has; None where there is none for such tables."""
        key = called, sizes
        if key not in self._forms:
            structure = self._structure_of(called)
            like = (form for form in sizes.forms() if structure and _computes(structure, form))
            self._forms[key] = next(like, None)
        return self._forms[key]

    def _structure_of(self, called: FunctionKey) -> Structure | None:
        """What a function computes; None for one over other versions of the operators than ours are."""
        if called not in self._structures:
            function = self._functions[called]
            versions = [opset.version for opset in function.opset_import if opset.domain in ("", "ai.onnx")]
            self._structures[called] = Structure(function) if versions == [OPSET] else None
        return self._structures[called]


@dataclass(frozen=True)
class _Sizes:
    """What a table's tensors say of its form. ``groups`` 0: there are no scales."""

    row_bytes: int
    bits: int
    dim: int
    stages: int
    groups: int

    @property
    def widths(self) -> range:
        """Of a row, what its bytes may hold: the last one leaves a choice."""
        fewest, most = (8 * size // (self.stages * self.bits) for size in (self.row_bytes - 1, self.row_bytes))
        return range((max(fewest, 0) + 1) * self.dim, most * self.dim + 1, self.dim)

    def forms(self) -> Iterator[Lookup]:
        """All that there may be: two vectors leave a choice as well."""
        maybe = (False, True)
        for width, gain, offset, kept in product(self.widths, maybe, maybe, maybe):
            if self.groups and width % self.groups:
                continue
            group = {0: -1, 1: 0}.get(self.groups, width // (self.groups or 1))
            yield Lookup(width, self.bits, self.dim, self.stages, group, gain, offset, kept)


def _computes(structure: Structure, form: Lookup) -> bool:
    """Whether a function is the body of ``form``, which is not built for one that is too small to be it."""
    return structure.arity == form.arity and structure.size >= form.least_bytes and structure.is_body(form.body)


def _sizes(tensors: Sequence[str], index: ModelIndex) -> _Sizes | str:
    """Of codes, codebook and scales; or what none of ours is like."""
    codes, codebook = (list(index.constants[name].dims) for name in tensors[:2])
    if len(codes) != 2 or codes[0] < 1:
        return f"its codes are {codes}, not rows of bytes"
    entries = codebook[1] if len(codebook) == 3 else 0
    bits = entries.bit_length() - 1
    if bits not in BITS or entries != 1 << bits or codebook[0] not in STAGES or codebook[2] not in DIMS:
        return f"its codebook is {codebook}, not 1 or 2 stages of 2 to 256 entries of 1, 2, 4 or 8 weights"
    groups = 0
    third = index.constants[tensors[2]] if len(tensors) > 2 else None
    if third is not None and len(third.dims) == 2:  # no other tensor in this place has two
        groups = third.dims[1]
        if third.data_type != TensorProto.FLOAT16 or groups < 1:
            wanted = f"[{codes[0]}, groups] of type {TensorProto.FLOAT16}"
            return f"its scales are {list(third.dims)} of type {third.data_type}, not {wanted}"
    sizes = _Sizes(codes[1], bits, codebook[2], codebook[0], groups)
    if not sizes.widths or sizes.widths[-1] > MOST_CHANNELS:
        return f"its rows of {codes[1]} bytes have no channels or more than {MOST_CHANNELS}"
    return sizes


def _named(form: Lookup, tensors: Sequence[str]) -> dict[str, str]:
    """Each tensor by the name of what it is."""
    there = (True, True, form.group >= 0, form.gain, form.offset, form.kept, form.kept)
    return dict(zip((name for name, is_there in zip(INPUTS, there, strict=True) if is_there), tensors, strict=True))


def _misfit(form: Lookup, tensors: dict[str, str], index: ModelIndex) -> str:
    """What is wrong with the table's shapes and types; empty when nothing is."""
    rows = index.constants[tensors["codes"]].dims[0]
    kept = index.constants[tensors["kept"]].dims[:1] if form.kept else []
    if kept and not 1 <= kept[0] <= MOST_KEPT:
        return f"it keeps {kept[0]} rows"
    groups = form.width // form.group if form.group > 0 else 1
    wanted = {
        "codes": ((TensorProto.UINT8,), [rows, form.row_bytes]),
        "codebook": ((TensorProto.FLOAT,), [form.stages, 1 << form.bits, form.dim]),
        "scales": ((TensorProto.FLOAT16,), [rows, groups]),
        "gain": ((TensorProto.FLOAT,), [form.width]),
        "offset": ((TensorProto.FLOAT,), [form.width]),
        "slots": ((TensorProto.INT16,), [rows]),
        "kept": (FLOATS, [*kept, form.width]),
    }
    for name, tensor in tensors.items():
        constant, (types, dims) = index.constants[tensor], wanted[name]
        if constant.data_type not in types or list(constant.dims) != dims:
            return f"its {name} are {list(constant.dims)} of type {constant.data_type}, not {dims} of type {types[0]}"
    return ""


def _made(node: NodeProto, form: Lookup, tensors: dict[str, str]) -> NodeProto:
    inputs = [node.input[0], *(tensors.get(name, "") for name in INPUTS)]
    while not inputs[-1]:
        inputs.pop()
    facts: dict[str, Any] = {"bits": form.bits, "width": form.width, "group": max(form.group, 0)}
    return onnx.helper.make_node("CodebookEmbedding", inputs, list(node.output), node.name, domain=NATIVE, **facts)
