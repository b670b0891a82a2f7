"""Lookups in tables of codes, for claiming: a call of a function that decodes rows becomes our ``CodebookEmbedding``.

What the function computes is not guessed at: for tables of these shapes its body has to be, node by node, one that the
lowering writes. Our operator reads the same tensors and its results are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import onnx
from onnx import FunctionProto, NodeProto, TensorProto

from ryzen_compile.backends.onnxruntime.claim_report import NATIVE
from ryzen_compile.backends.onnxruntime.codebook_lookup import Lookup
from ryzen_compile.backends.onnxruntime.model_index import ModelIndex
from ryzen_compile.backends.onnxruntime.node_facts import OPSET
from ryzen_compile.backends.onnxruntime.structure import Structures

BITS, DIMS, STAGES = range(1, 9), (1, 2, 4, 8), (1, 2)
MOST_CHANNELS = 1 << 20
MOST_DIMENSIONS = 7  # of ids
MOST_KEPT = (1 << 15) - 1  # rows: slots are int16
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
INPUTS = ("codes", "codebook", "scales", "gain", "offset", "slots", "kept")  # of our operator, behind ids


def reads_codes(node: NodeProto, index: ModelIndex) -> bool:
    """Whether a call reads what such a table's codes and codebook could be."""
    if len(node.input) < 3:
        return False
    kinds = [index.element(name) for name in node.input[1:3]]
    ranks = [len(index.shape(name) or ()) for name in node.input[1:3]]
    return kinds == [TensorProto.UINT8, TensorProto.FLOAT] and ranks == [2, 3]


def claim_lookup(node: NodeProto, function: FunctionProto, index: ModelIndex) -> NodeProto | str:
    """Our operator in place of ``node``, which calls ``function`` and reads codes; or why it stays."""
    if not all(node.input) or len(node.input) != len(function.input) or len(node.output) != 1:
        return "an input or output that is not known"
    if missing := [name for name in node.input[1:] if name not in index.constants]:
        return f"{missing[0]} is no constant"
    ids = node.input[0]
    if index.element(ids) != TensorProto.INT64:
        return f"its ids are of type {index.element(ids)}"
    if len(index.shape(ids) or ()) > MOST_DIMENSIONS:
        return f"its ids have {len(index.shape(ids) or ())} dimensions"
    form = _form_of(function, node.input[1:], index)
    if form is None:
        return "its function computes something else than rows of a table of codes"
    tensors = _named(form, node.input[1:])
    if fault := _misfit(form, tensors, index):
        return fault
    inputs = [ids, *(tensors.get(name, "") for name in INPUTS)]
    while not inputs[-1]:
        inputs.pop()
    facts: dict[str, Any] = {"bits": form.bits, "width": form.width, "group": max(form.group, 0)}
    return onnx.helper.make_node("CodebookEmbedding", inputs, list(node.output), node.name, domain=NATIVE, **facts)


def _form_of(function: FunctionProto, tensors: Sequence[str], index: ModelIndex) -> Lookup | None:
    """The form of lookup whose body ``function`` has; None where there is none for such tensors."""
    if [o.version for o in function.opset_import if o.domain in ("", "ai.onnx")] != [OPSET]:
        return None
    structures = Structures()
    found = structures.of_function(function)
    forms = (form for form in _forms(tensors, index) if found and form.arity == len(function.input))
    return next((form for form in forms if structures.of_body(form.body, form.arity) == found), None)


def _forms(tensors: Sequence[str], index: ModelIndex) -> Iterator[Lookup]:
    """All forms that tables of these shapes may have: the last byte of a row, and two vectors, leave a choice."""
    row_bytes = index.constants[tensors[0]].dims[1]
    stages, entries, dim = index.constants[tensors[1]].dims
    bits = entries.bit_length() - 1
    if stages not in STAGES or dim not in DIMS or bits not in BITS or entries != 1 << bits:
        return
    scales = index.constants[tensors[2]] if len(tensors) > 2 else None
    scaled = scales is not None and scales.data_type == TensorProto.FLOAT16 and len(scales.dims) == 2
    groups = scales.dims[1] if scaled and scales is not None else 0
    fewest, most = (8 * size // (stages * bits) for size in (row_bytes - 1, row_bytes))
    widths = [codes * dim for codes in range(max(fewest, 0) + 1, min(most, MOST_CHANNELS // dim) + 1)]
    maybe = (False, True)
    for width, gain, offset, kept in product(widths, maybe, maybe, maybe):
        if scaled and (not groups or width % groups):
            continue
        group = -1 if not scaled else 0 if groups == 1 else width // groups
        yield Lookup(width, bits, dim, stages, group, gain, offset, kept)


def _named(form: Lookup, tensors: Sequence[str]) -> dict[str, str]:
    """Each tensor by the name of what it is."""
    there = (True, True, form.group >= 0, form.gain, form.offset, form.kept, form.kept)
    return dict(zip((name for name, is_there in zip(INPUTS, there, strict=True) if is_there), tensors, strict=True))


def _misfit(form: Lookup, tensors: dict[str, str], index: ModelIndex) -> str:
    """What is wrong with the table's shapes and types; empty when nothing is."""
    rows = index.constants[tensors["codes"]].dims[0]
    kept = index.constants[tensors["kept"]].dims[:1] if form.kept else []
    if kept and kept[0] > MOST_KEPT:
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
