"""The structural check of ``model.onnx``, before any session sees it.

ONNX Runtime parses untrusted bytes in C++; what it is given has passed this first: sizes and counts within limits,
every external tensor inside a plain, listed file of the same directory and exactly as long as its shape says. The
manifest's digests do not make this redundant: whoever writes a hostile model writes its manifest too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, TensorProto

from ryzen_compile.backends.onnxruntime.claim_report import NATIVE, OPERATORS
from ryzen_compile.backends.onnxruntime.integer_check import check_integer_weights
from ryzen_compile.errors import ArtifactError, ResourceError, TamperedError, UnsafeError
from ryzen_compile.manifest import name_fault, open_plain, shown

MAX_MODEL_BYTES = 1 << 30
MAX_NODES = 1_000_000
MAX_TENSORS = 1_000_000
MAX_FUNCTIONS = 10_000
MAX_DEPTH = 100
MAX_RANK = 1_024
_FunctionKey = tuple[str, str, str]  # domain, name, overload
_EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum"})
_WHOLE_NUMBER = re.compile(r"[0-9]{1,19}")
_BITS = {
    **dict.fromkeys(("COMPLEX128",), 128),
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 64),
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("INT8", "UINT8", "BOOL", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"), 8),
    **dict.fromkeys(("FLOAT8E8M0",), 8),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("INT2", "UINT2"), 2),
}
# Bits per element by type number, for the types that the installed onnx knows.
BITS = {TensorProto.DataType.Value(name): bits for name, bits in _BITS.items() if name in TensorProto.DataType.keys()}  # noqa: SIM118 - a protobuf enum, not a dict
_INLINE: dict[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.INT32: "int32_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.STRING: "string_data",
}


def check_model(
    directory: str | Path, name: str = "model.onnx", *, listed: Collection[str] | None = None
) -> ModelProto:
    """Parses ``directory/name`` without its external data, checks it, and returns it.

    ``listed`` are the names in the directory's manifest; with None any plain file of the directory may hold tensors.
    Raises ArtifactError for what is not a usable model or exceeds a limit, UnsafeError for locations that leave the
    directory, links, special files and unknown external-data keys, TamperedError for sizes that do not add up.
    """
    directory = Path(directory)
    model = _parse(directory, name)
    _check_size(model, name)
    sizes: dict[str, int] = {}
    for count, tensor in enumerate(_tensors(_graphs(model))):
        if count >= MAX_TENSORS:
            raise ArtifactError(f"{shown(name)} has more than {MAX_TENSORS} tensors")
        expected = _tensor_bytes(tensor)
        if tensor.data_location == TensorProto.EXTERNAL:
            _check_external(directory, tensor, expected, listed, sizes)
        else:
            _check_inline(tensor, expected)
    check_integer_weights(model)
    _check_operators(model)
    return model


def check_encoder(graph: GraphProto, hidden: int) -> None:
    """Raises ArtifactError unless ``graph`` reads ids and their mask (B, T) and returns vectors (B, ``hidden``)."""
    wanted = {
        "input_ids": (TensorProto.INT64, [0, 0]),
        "attention_mask": (TensorProto.INT64, [0, 0]),
        "sentence_embedding": (TensorProto.FLOAT, [0, hidden]),
    }
    weights = {tensor.name for tensor in graph.initializer}
    found = {
        value.name: (value.type.tensor_type.elem_type, [dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in (*graph.input, *graph.output)
        if value.name not in weights
    }
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise ArtifactError(
                f"{shown(name)} of an encoder: expected type and sizes {wanted.get(name, 'none')}, "
                f"got {found.get(name, 'none')}",
                hint="export it again",
            )


def _parse(directory: Path, name: str) -> ModelProto:
    with open_plain(directory, name) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size == 0:
            raise ArtifactError(f"{shown(name)} is empty", hint="export it again")
        if size > MAX_MODEL_BYTES:
            raise ArtifactError(f"{shown(name)} has {size} bytes, the limit without its data is {MAX_MODEL_BYTES}")
        try:
            model = onnx.load(stream, format="protobuf", load_external_data=False)
        except DecodeError as error:
            raise ArtifactError(f"{shown(name)} is not an ONNX model: {error}", hint="export it again") from error
        except OSError as error:
            raise ResourceError(f"cannot read {shown(name)}: {error.strerror}") from error
    # Random bytes can be a valid, empty protobuf message.
    if not model.ir_version or not model.opset_import or not model.graph.output:
        raise ArtifactError(f"{shown(name)} is not an ONNX model: it lacks a version, opsets or outputs")
    return model


def _check_size(model: ModelProto, name: str) -> None:
    """Refuses too many nodes, those that inlining makes counted: a few nested functions can stand for 2^100 nodes."""
    if len(model.functions) > MAX_FUNCTIONS:
        raise ArtifactError(f"{shown(name)} has {len(model.functions)} functions, the limit is {MAX_FUNCTIONS}")
    bodies: dict[_FunctionKey, FunctionProto] = {}
    for function in model.functions:
        key = (function.domain, function.name, function.overload)
        if key in bodies:
            raise ArtifactError(f"{shown(name)} defines the function {shown(function.name)} twice")
        bodies[key] = function
    calls = {key: _calls(function, bodies) for key, function in bodies.items()}
    # Leaves first: round n settles the functions whose calls nest n deep, so what remains after MAX_DEPTH rounds is
    # deeper or calls itself.
    expanded: dict[_FunctionKey, int] = {}
    pending = set(calls)
    for _ in range(MAX_DEPTH):
        for key in [key for key in pending if not any(callee in pending for callee in calls[key])]:
            expanded[key] = _own_nodes(bodies[key]) + sum(expanded[callee] for callee in calls[key])
        pending -= expanded.keys()
    if pending:
        stuck = shown(min(pending, key=str)[1])
        raise ArtifactError(f"{shown(name)}: function {stuck} calls itself or nests over {MAX_DEPTH} deep")
    roots = [model.graph, *(graph for info in model.training_info for graph in (info.initialization, info.algorithm))]
    nodes = sum(_own_nodes(root) + sum(expanded[callee] for callee in _calls(root, bodies)) for root in roots)
    if max(nodes, sum(map(_own_nodes, model.functions))) > MAX_NODES:
        raise ArtifactError(f"{shown(name)} has {nodes:.3g} nodes with its functions inlined, the limit is {MAX_NODES}")


def _check_operators(model: ModelProto) -> None:
    """Refuses our operators in the file: which nodes they compute is decided here, on checked standard nodes."""
    functions = {(function.domain, function.name, function.overload) for function in model.functions}
    for domain, name, _ in functions:
        if domain == NATIVE and name in OPERATORS:
            raise ArtifactError(f"function {shown(name)} has the name of a native operator, which we never write")
    for graph in _graphs(model):
        for node in graph.node:
            if node.domain == NATIVE and (node.domain, node.op_type, node.overload) not in functions:
                raise ArtifactError(
                    f"node {shown(node.name)} calls {NATIVE}::{shown(node.op_type)}, which the model does not define"
                )


def _own_nodes(root: GraphProto | FunctionProto) -> int:
    return sum(len(graph.node) for graph in _nested(root))


def _calls(root: GraphProto | FunctionProto, bodies: Collection[_FunctionKey]) -> list[_FunctionKey]:
    """The model's own functions that ``root`` calls, once per call."""
    keys = ((node.domain, node.op_type, node.overload) for graph in _nested(root) for node in graph.node)
    return [key for key in keys if key in bodies]


def _graphs(model: ModelProto) -> Iterator[GraphProto | FunctionProto]:
    for root in (model.graph, *model.functions):
        yield from _nested(root)
    for info in model.training_info:
        yield from _nested(info.initialization)
        yield from _nested(info.algorithm)


def _nested(root: GraphProto | FunctionProto) -> Iterator[GraphProto | FunctionProto]:
    """``root`` and the graphs inside its nodes' attributes. Their depth is bounded by the protobuf parser (100)."""
    pending: list[GraphProto | FunctionProto] = [root]
    while pending:
        graph = pending.pop()
        yield graph
        for attribute in _attributes(graph):
            if attribute.HasField("g"):
                pending.append(attribute.g)
            pending.extend(attribute.graphs)


def _attributes(graph: GraphProto | FunctionProto) -> Iterator[AttributeProto]:
    for node in graph.node:
        yield from node.attribute
    if isinstance(graph, FunctionProto):
        yield from graph.attribute_proto


def _tensors(graphs: Iterable[GraphProto | FunctionProto]) -> Iterator[TensorProto]:
    """Every tensor stored anywhere: initializers, sparse ones, and attributes of nodes."""
    for graph in graphs:
        if isinstance(graph, GraphProto):
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        for attribute in _attributes(graph):
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            sparse_tensors = [*attribute.sparse_tensors]
            if attribute.HasField("sparse_tensor"):
                sparse_tensors.append(attribute.sparse_tensor)
            for sparse in sparse_tensors:
                yield from (sparse.values, sparse.indices)


def _tensor_bytes(tensor: TensorProto) -> int:
    """Bytes that the tensor's shape and type need, packed types rounded up; 0 for strings, which have no fixed size."""
    where = f"tensor {shown(tensor.name)}"
    if tensor.data_type not in BITS and tensor.data_type != TensorProto.STRING:
        raise ArtifactError(f"{where} has the unknown type {tensor.data_type}")
    if len(tensor.dims) > MAX_RANK:
        raise ArtifactError(f"{where} has {len(tensor.dims)} dimensions, the limit is {MAX_RANK}")
    elements = 1
    for size in tensor.dims:
        if size < 0:
            raise ArtifactError(f"{where} has the negative dimension {size}")
        elements *= size
        # As C++ multiplies: a later 0 does not undo the overflow.
        if elements >= 1 << 60:
            raise ArtifactError(f"{where}: the product of its dimensions overflows, {shown(list(tensor.dims[:8]))}")
    return -(-elements * BITS.get(tensor.data_type, 0) // 8)


def _check_inline(tensor: TensorProto, expected: int) -> None:
    where = f"tensor {shown(tensor.name)}"
    if tensor.external_data:
        raise UnsafeError(f"{where} has external data but is not marked as external")
    if tensor.HasField("raw_data"):
        if tensor.data_type == TensorProto.STRING:
            raise ArtifactError(f"{where} holds strings as raw bytes")
        if len(tensor.raw_data) != expected:
            raise TamperedError(f"{where}: expected {expected} bytes, got {len(tensor.raw_data)}")
        return
    elements = 1
    for size in tensor.dims:
        elements *= size
    field = _INLINE.get(tensor.data_type)
    if field is not None and len(getattr(tensor, field)) != elements:
        raise TamperedError(f"{where}: expected {elements} values, got {len(getattr(tensor, field))}")
    if (
        field is None
        and elements
        and not any((tensor.int32_data, tensor.uint64_data, tensor.float_data, tensor.double_data))
    ):
        raise TamperedError(f"{where}: expected {elements} values, got none")


def _check_external(
    directory: Path, tensor: TensorProto, expected: int, listed: Collection[str] | None, sizes: dict[str, int]
) -> None:
    """``sizes`` remembers the files already opened and checked."""
    where = f"external tensor {shown(tensor.name)}"
    if tensor.data_type == TensorProto.STRING:
        raise ArtifactError(f"{where} holds strings, which cannot be external")
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key not in _EXTERNAL_KEYS:
            raise UnsafeError(f"{where} has the unknown key {shown(entry.key)}, expected {sorted(_EXTERNAL_KEYS)}")
        if entry.key in entries:
            raise UnsafeError(f"{where} has the key {entry.key} twice")
        entries[entry.key] = entry.value
    location = entries.get("location")
    if location is None:
        raise ArtifactError(f"{where} has no location")
    if fault := name_fault(location, nested=False):
        raise UnsafeError(f"{where}: its location {shown(location)} {fault}")
    if listed is not None and location not in listed:
        raise UnsafeError(f"{where}: its location {shown(location)} is not listed in the manifest")
    if location not in sizes:
        with open_plain(directory, location) as stream:
            sizes[location] = os.fstat(stream.fileno()).st_size
    offset = _whole(entries.get("offset", "0"), "offset", where)
    length = _whole(entries["length"], "length", where) if "length" in entries else sizes[location] - offset
    if offset + length > sizes[location] or length < 0:
        raise TamperedError(
            f"{where}: bytes {offset}..{offset + length} lie outside {shown(location)} of {sizes[location]} bytes"
        )
    if length != expected:
        raise TamperedError(f"{where}: its shape needs {expected} bytes, its length is {length}")


def _whole(text: object, key: str, where: str) -> int:
    # protobuf hands out a string field that is not UTF-8 as bytes
    if not isinstance(text, str) or not _WHOLE_NUMBER.fullmatch(text) or int(text) >= 1 << 63:
        raise TamperedError(f"{where}: {key} {shown(text)} is not a whole number below 2^63")
    return int(text)
