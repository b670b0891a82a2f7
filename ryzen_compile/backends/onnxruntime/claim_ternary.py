"""Products with weights of -1, 0 and +1, for claiming: ``MatMulNBits`` behind anchored rows becomes ``MatMulTernary``.

The function that anchors rows has to be, node by node, the one that the lowering writes for rows of this width. The
product then is what our operator computes from the rows as they are: over the same codes and scales, which it looks
through when it is made (a session of other ones is refused, and the stock one opened).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import FunctionProto, NodeProto, TensorProto

from ryzen_compile.backends.onnxruntime.claim_lookup import FunctionKey
from ryzen_compile.backends.onnxruntime.claim_report import NATIVE
from ryzen_compile.backends.onnxruntime.model_index import ModelIndex
from ryzen_compile.backends.onnxruntime.node_facts import OPSET, function_called
from ryzen_compile.backends.onnxruntime.structure import Structure
from ryzen_compile.backends.onnxruntime.ternary import BITS, BLOCK, anchored, blocks

MOST_DIMENSIONS = 4  # of what our operator reads
MOST_CHANNELS = 1 << 20


class TernaryClaims:
    """Claims of one model's products; ``idle`` are the places of the calls that nobody reads any more."""

    def __init__(
        self, functions: Mapping[FunctionKey, FunctionProto], nodes: Sequence[NodeProto], index: ModelIndex
    ) -> None:
        self._functions = functions
        self._nodes = nodes
        self._index = index
        self._calls = {
            node.output[0]: place
            for place, node in enumerate(nodes)
            if function_called(node) in functions and len(node.input) == len(node.output) == 1
        }
        self._anchors: dict[tuple[FunctionKey, int, int], bool] = {}
        self._claimed: dict[int, set[str]] = {}  # by the place of a call the outputs of products that read it no more

    def claim(self, node: NodeProto, facts: Mapping[str, Any]) -> NodeProto | None:
        """Our operator in place of a ``MatMulNBits`` whose constants were checked; None where it is another product."""
        place = self._calls.get(node.input[0])
        if place is None or facts["bits"] != BITS or facts["block_size"] != BLOCK or any(node.input[3:]):
            return None
        call = self._nodes[place]
        shape = self._index.shape(call.input[0]) or ()
        width, rank = (shape[-1] if shape else 0), len(shape)
        if not isinstance(width, int) or not 0 < width <= MOST_CHANNELS or rank > MOST_DIMENSIONS:
            return None
        if facts["K"] != blocks(width) * BLOCK or not self._is_anchored(function_called(call), width, rank):
            return None
        if self._index.element(call.input[0]) not in (0, TensorProto.FLOAT):
            return None
        self._claimed.setdefault(place, set()).update(node.output)
        inputs = [call.input[0], *node.input[1:3]]
        return onnx.helper.make_node(
            "MatMulTernary", inputs, list(node.output), node.name, domain=NATIVE, K=width, N=facts["N"]
        )

    @property
    def idle(self) -> set[int]:
        """The places of the calls all of whose readers were claimed."""
        index = self._index

        def unread(place: int, claimed: set[str]) -> bool:
            rows = self._nodes[place].output[0]
            readers = (self._nodes[reader] for reader in index.readers.get(rows, ()))
            return rows not in index.outside and all(claimed.issuperset(reader.output) for reader in readers)

        return {place for place, claimed in self._claimed.items() if unread(place, claimed)}

    def _is_anchored(self, called: FunctionKey, width: int, rank: int) -> bool:
        """Whether a function over our version of the operators anchors rows of ``width`` channels."""
        key = called, width, rank
        if key not in self._anchors:
            function = self._functions[called]
            versions = [opset.version for opset in function.opset_import if opset.domain in ("", "ai.onnx")]
            self._anchors[key] = versions == [OPSET] and Structure(function).is_body(anchored(width, rank))
        return self._anchors[key]
