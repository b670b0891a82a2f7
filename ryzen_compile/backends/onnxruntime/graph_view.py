"""The view of an artifact's graph, from ``model.onnx`` alone: weights in other files are not opened.

A small tensor that is stored in the model itself has no name worth showing, and its values are not shown either: it is
called by its type and a digest of its content, so that equal constants are equal in two texts and changed ones differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, TensorShapeProto, TypeProto

from ryzen_compile.backends.onnxruntime import MODEL_NAME
from ryzen_compile.backends.onnxruntime.artifact import slots_of
from ryzen_compile.backends.onnxruntime.artifact_check import check_model
from ryzen_compile.graphs.artifact_diff import ArtifactFacts
from ryzen_compile.graphs.view import SHORT, UNKNOWN, GraphView, NodeView, ValueType, ValueView, plain
from ryzen_compile.manifest import listed_files, read_manifest, verify_files
from ryzen_compile.runtime.layout import fixed_bytes, token_bytes

MAX_TEXT = 200  # characters of an attribute
_NAMES = {"float": "float32", "double": "float64"}  # ONNX's words -> those of everyone else


def artifact_facts(directory: Path) -> ArtifactFacts:
    """What two artifacts are compared by. Their weights are not hashed: the manifest's digests are taken at their word.

    Raises ``ArtifactError``, ``TamperedError`` or ``UnsafeError`` for what is not an artifact of ours.
    """
    manifest = read_manifest(directory)
    verify_files(directory, manifest, digests=False)
    slots = slots_of(manifest)
    return ArtifactFacts(
        name=str(directory),
        manifest=manifest,
        graph=view_onnx(directory / MODEL_NAME, listed=listed_files(manifest)),
        token_bytes=token_bytes(slots),
        sequence_bytes=fixed_bytes(slots),
    )


def view_onnx(path: Path, *, listed: Collection[str] | None = None) -> GraphView:
    """The graph of the model at ``path`` with the bodies of its functions; checks it as ``check_model`` does, and
    raises what that raises."""
    model = check_model(path.parent, path.name, listed=listed)
    functions = {_called(f.domain, f.name, f.overload): _view_function(f) for f in model.functions}
    return replace(_view_graph(model.graph), functions=tuple(sorted(functions.items(), key=lambda item: item[0])))


def _view_graph(graph: GraphProto) -> GraphView:
    types = {plain(v.name): _type(v.type) for v in (*graph.value_info, *graph.input, *graph.output)}
    weights = [_weight(tensor) for tensor in graph.initializer]
    weights += [_sparse_weight(s.values.name, s.values.data_type, s.dims) for s in graph.sparse_initializer]
    stored = {weight.name for weight in weights}
    return GraphView(
        inputs=tuple(_value(v.name, types) for v in graph.input if plain(v.name) not in stored),
        weights=tuple(weights),
        nodes=_view_nodes(graph.node, types),
        outputs=tuple(plain(v.name) for v in graph.output),
    )


def _view_function(function: FunctionProto) -> GraphView:
    types = {plain(v.name): _type(v.type) for v in function.value_info}
    return GraphView(
        inputs=tuple(_value(name, types) for name in function.input),
        weights=(),
        nodes=_view_nodes(function.node, types),
        outputs=tuple(map(plain, function.output)),
    )


def _value(name: str, types: Mapping[str, ValueType]) -> ValueView:
    return ValueView(plain(name), types.get(plain(name), UNKNOWN))


def _view_nodes(nodes: Iterable[NodeProto], types: Mapping[str, ValueType]) -> tuple[NodeView, ...]:
    views, taken = [], set()
    for index, node in enumerate(nodes):
        name = plain(node.name)
        name = name if name and name not in taken else f"{name}#{index}"  # a number that no name of ours has
        taken.add(name)
        outputs = tuple(map(plain, node.output))
        views.append(
            NodeView(
                name=name,
                op=_called(node.domain, node.op_type, node.overload),
                inputs=tuple(map(plain, node.input)),
                outputs=outputs,
                attributes=tuple((plain(a.name), _text(a)) for a in node.attribute),
                types=tuple(types.get(output, UNKNOWN) for output in outputs if output),
                module=plain(node.name.rpartition("/")[0]),  # as cleanup.finish names nodes
            )
        )
    return tuple(views)


def _called(domain: str, name: str, overload: str) -> str:
    return plain(f"{domain}::{name}" if domain else name) + (f".{plain(overload)}" if overload else "")


def _weight(tensor: TensorProto) -> ValueView:
    kind = ValueType(_word(tensor.data_type), tuple(map(str, tensor.dims)))
    named = tensor.data_location == TensorProto.EXTERNAL
    return ValueView(plain(tensor.name), kind, plain(tensor.name) if named else _by_content(tensor))


def _sparse_weight(name: str, data_type: int, dims: Iterable[int]) -> ValueView:
    return ValueView(plain(name), ValueType(_word(data_type), tuple(map(str, dims))), plain(name))


def _by_content(tensor: TensorProto) -> str:
    """``i64[4]~3fa2c1``."""
    content = TensorProto()
    content.CopyFrom(tensor)
    for field in ("name", "doc_string"):
        content.ClearField(field)
    digest = hashlib.sha256(content.SerializeToString(deterministic=True)).hexdigest()
    return f"{ValueType(_word(tensor.data_type), tuple(map(str, tensor.dims)))}~{digest[:6]}"


def _type(proto: TypeProto) -> ValueType:
    if proto.WhichOneof("value") != "tensor_type":
        return UNKNOWN
    tensor = proto.tensor_type
    if not tensor.HasField("shape"):
        return ValueType(_word(tensor.elem_type))
    return ValueType(_word(tensor.elem_type), tuple(map(_size, tensor.shape.dim)))


def _size(dim: TensorShapeProto.Dimension) -> str:
    known = dim.WhichOneof("value")
    return "?" if known is None else plain(str(getattr(dim, known)))


def _word(data_type: int) -> str:
    if data_type not in TensorProto.DataType.values():
        return UNKNOWN.dtype
    name = TensorProto.DataType.Name(data_type).lower()
    name = _NAMES.get(name, name)
    return SHORT.get(name, name)


def _text(attribute: AttributeProto) -> str:
    """The attribute's value, tensors by type and digest and graphs by their size; long ones are cut."""
    text = f"${plain(attribute.ref_attr_name)}" if attribute.ref_attr_name else _value_text(attribute)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


def _value_text(attribute: AttributeProto) -> str:
    kind = attribute.type
    if kind == AttributeProto.FLOAT:
        return str(np.float32(attribute.f))
    if kind == AttributeProto.INT:
        return str(attribute.i)
    if kind == AttributeProto.STRING:
        return _string(attribute.s)
    if kind == AttributeProto.FLOATS:
        return _list(str(np.float32(value)) for value in attribute.floats)
    if kind == AttributeProto.INTS:
        return _list(map(str, attribute.ints))
    if kind == AttributeProto.STRINGS:
        return _list(map(_string, attribute.strings))
    if kind == AttributeProto.TENSOR:
        return _by_content(attribute.t)
    if kind == AttributeProto.GRAPH:
        return f"<graph of {len(attribute.g.node)} nodes>"
    return f"<{AttributeProto.AttributeType.Name(kind).lower()}>"


def _string(value: bytes) -> str:
    return plain(value.decode("utf-8", "backslashreplace"))


def _list(parts: Iterable[str]) -> str:
    return f"[{','.join(parts)}]"
