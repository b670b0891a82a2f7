"""What an artifact's lookup gives for a token: the rows of its table, decoded, to be held to the model's own.

The nodes that read the token ids are taken out of the graph and run alone, whatever they are: a gather, integers in
blocks, or the function of a table of codes. So a table that was stored or decoded wrongly shows by itself, and not only
in what the whole model says.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import GraphProto, ModelProto, TensorProto, helper

from ryzen_compile.backends.onnxruntime import MODEL_NAME, native
from ryzen_compile.backends.onnxruntime.artifact_check import check_model
from ryzen_compile.backends.onnxruntime.model_index import ModelIndex
from ryzen_compile.errors import UnsupportedError

IDS = "input_ids"
BATCH = 4096  # tokens looked up at a time


def lookup_rows(artifact: str | os.PathLike[str], ids: np.ndarray) -> np.ndarray:
    """Rows ``(n, C)`` float32 that the artifact's first lookup gives for ``ids`` ``(n,)`` int64.

    Raises ``UnsupportedError`` for a graph in which the ids are read by something that is no lookup, and what reading
    an artifact raises.
    """
    directory = Path(artifact)
    model = check_model(directory, MODEL_NAME)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = native.open_model(_lookup(model), directory, options)
    parts = [session.run(None, {IDS: ids[None, start : start + BATCH]})[0][0] for start in range(0, len(ids), BATCH)]
    rows: np.ndarray = np.concatenate(parts)
    return rows


def _lookup(model: ModelProto) -> ModelProto:
    """The first node that reads the ids and gives a float for each channel, as a model of its own."""
    index = ModelIndex(model)
    for node in model.graph.node:
        shape = index.shape(node.output[0]) if IDS in node.input else None
        if shape is None or len(shape) != 3 or index.element(node.output[0]) != TensorProto.FLOAT:
            continue
        fixed = {name for name in node.input if name and name != IDS}
        if not fixed <= index.constants.keys():
            continue
        graph = GraphProto(name="lookup", node=[node])
        graph.input.append(helper.make_tensor_value_info(IDS, TensorProto.INT64, ["batch", "sequence"]))
        graph.output.append(
            helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, ["batch", "sequence", shape[-1]])
        )
        graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in fixed)
        return helper.make_model(
            graph,
            functions=list(model.functions),
            opset_imports=list(model.opset_import),
            ir_version=model.ir_version,
        )
    raise UnsupportedError(
        f"no node of the graph looks {IDS} up in a table alone", hint="its table cannot be compared with the model's"
    )
