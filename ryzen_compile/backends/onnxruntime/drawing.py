"""A drawing of a graph: its view as an ONNX file, for programs that show such files (Netron).

It is not a model and cannot be run: nodes call the operators of the IR, ``aten`` and ``ryzen``, which no ONNX runtime
has, arguments are text, and weights have their shapes and no values. A weight is written as a sparse tensor without
entries, which is the one form in which a viewer shows it inside its reader, in its true shape, and which takes no room.
"""

from __future__ import annotations

from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, ValueInfoProto, helper

from ryzen_compile.backends.onnxruntime.node_facts import OPSET
from ryzen_compile.graphs.text import Names, names_of
from ryzen_compile.graphs.view import SHORT, GraphView, NodeView, ValueType

IR_VERSION = 10  # the first whose nodes have metadata
_ELEMENTS = {
    SHORT.get(name, name): number
    for name, number in {
        "float64": TensorProto.DOUBLE,
        "float32": TensorProto.FLOAT,
        "float16": TensorProto.FLOAT16,
        "bfloat16": TensorProto.BFLOAT16,
        "int64": TensorProto.INT64,
        "int32": TensorProto.INT32,
        "int16": TensorProto.INT16,
        "int8": TensorProto.INT8,
        "uint64": TensorProto.UINT64,
        "uint32": TensorProto.UINT32,
        "uint16": TensorProto.UINT16,
        "uint8": TensorProto.UINT8,
        "bool": TensorProto.BOOL,
    }.items()
}


def drawing(view: GraphView, title: str) -> ModelProto:
    """The drawing of a Program's view, named as in its canonical text; ``title`` is the graph's name.

    Every node is one ONNX node, in the domain that its operator's name begins with. Its module path is in its metadata,
    and what the operator calls its inputs.
    """
    names = names_of(view)
    graph = GraphProto(name=title)
    graph.input.extend(_value(names.values[value.name], value.type) for value in view.inputs)
    for weight in view.weights:
        name = names.values[weight.name]
        if _has_entries(weight.type):
            graph.sparse_initializer.append(_empty(name, weight.type))
        else:
            graph.input.append(_value(name, weight.type))
    types = {value.name: value.type for value in (*view.inputs, *view.weights)}
    for node in view.nodes:
        graph.node.append(_node(node, names))
        types |= dict(zip(node.outputs, node.types, strict=True))
    graph.output.extend(_value(names.values[name], types[name]) for name in view.outputs)
    made = [name for node in view.nodes for name in node.outputs if name not in view.outputs]
    graph.value_info.extend(_value(names.values[name], types[name]) for name in made if types[name].dtype in _ELEMENTS)
    domains = sorted({node.domain for node in graph.node})
    model = helper.make_model(
        graph,
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in domains)],
        producer_name="ryzen_compile",
    )
    model.doc_string = "A drawing of a graph between two passes. It holds no weights and cannot be run."
    return model


def _node(node: NodeView, names: Names) -> NodeProto:
    domain, _, op = node.op.rpartition(".")
    proto = helper.make_node(
        op,
        [names.values.get(name, name) for name in node.inputs],
        [names.values[name] for name in node.outputs],
        names.nodes[node.name],
        domain=domain,
    )
    proto.attribute.extend(helper.make_attribute(name, text) for name, text in node.attributes)
    facts = {"module": node.module} if node.module else {}
    if node.parameters:
        facts["input_names"] = str(list(node.parameters))  # where Netron looks for them, in this spelling
    helper.set_metadata_props(proto, facts)
    return proto


def _value(name: str, kind: ValueType) -> ValueInfoProto:
    dims = None if kind.dims is None else [int(dim) if dim.isdecimal() else dim for dim in kind.dims]
    return helper.make_tensor_value_info(name, _ELEMENTS.get(kind.dtype, TensorProto.UNDEFINED), dims)


def _has_entries(kind: ValueType) -> bool:
    """Whether a sparse tensor can be of this type: one dimension at least, and none of size zero."""
    dims = kind.dims or ()
    return kind.dtype in _ELEMENTS and bool(dims) and all(dim.isdecimal() and int(dim) for dim in dims)


def _empty(name: str, kind: ValueType) -> SparseTensorProto:
    tensor = SparseTensorProto()
    tensor.values.CopyFrom(TensorProto(name=name, data_type=_ELEMENTS[kind.dtype], dims=[0], raw_data=b""))
    tensor.indices.CopyFrom(TensorProto(name=f"{name}.indices", data_type=TensorProto.INT64, dims=[0], raw_data=b""))
    tensor.dims.extend(int(dim) for dim in kind.dims or ())
    return tensor
