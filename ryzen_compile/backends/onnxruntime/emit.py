"""Emitter: collects new ONNX nodes, for a graph or for the body of a model-local function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.backends.onnxruntime.node_facts import CONTRIB, OPSET

__all__ = ["CONTRIB", "LOCAL", "Emitter", "LoweringOptions"]

LOCAL = "ryzen"  # domain of our model-local functions, and of the dialect's nodes before they are lowered


@dataclass(frozen=True)
class LoweringOptions:
    """``accuracy_level`` 4 lets products with integer weights round their activations to 8 bits per block, 0 keeps them
    in float32. ``wide_prompts`` expresses those products for many rows at once: 8-bit weights with a scale per output
    channel, activations rounded to 8 bits row by row. ``many_rows`` is for graphs that never see a row alone, encoders:
    a sum and its norm are two nodes there, because ONNX Runtime's fused one takes three times as long."""

    accuracy_level: int = 4
    wide_prompts: bool = False
    many_rows: bool = False


class Emitter:
    """``nodes`` grows in order. ``initializers`` are weights made here, ``functions`` the bodies that nodes call.

    ``activated`` remembers which values are results of which activations: a product that rounds them does so better.
    """

    def __init__(self, options: LoweringOptions | None = None) -> None:
        self.options = options or LoweringOptions()
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.functions: dict[tuple[Any, ...], ir.Function] = {}
        self.activated: dict[ir.Value, str] = {}
        self._shared: dict[tuple[Any, ...], Any] = {}

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Adds a node with one result. None stands for an optional input left out."""
        return self.ops(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """Adds a node with ``outputs`` results."""
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        node = ir.node(op_type, given, attributes=attributes, domain=domain, num_outputs=outputs)
        self.nodes.append(node)
        return tuple(node.outputs)

    def constant(self, value: Any, dtype: type = np.float32) -> ir.Value:
        return self.op("Constant", value=ir.tensor(np.asarray(value, dtype=dtype)))

    def initializer(self, tensor: ir.LazyTensor, name: str) -> ir.Value:
        """A weight of the graph's own, computed when it is written."""
        tensor.name = name
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.initializers.append(value)
        return value

    def ints(self, *values: int) -> ir.Value:
        """A vector of int64."""
        return self.constant(values, np.int64)

    def once(self, key: tuple[Any, ...], build: Callable[[], Any]) -> Any:
        """``build()``'s values the first time, the same ones ever after: for what all layers share."""
        if key not in self._shared:
            self._shared[key] = build()
        return self._shared[key]

    def drain(self) -> list[ir.Node]:
        """The nodes collected since the last call."""
        taken, self.nodes = self.nodes, []
        return taken

    def call(
        self,
        name: str,
        variant: tuple[Any, ...],
        body: Callable[..., tuple[ir.Value, ...]],
        inputs: tuple[ir.Value, ...],
        outputs: int = 1,
    ) -> tuple[ir.Value, ...]:
        """Calls the model-local function ``name``; each ``variant`` gets a body of its own, built once.

        ``body(emitter, *parameters)`` builds it. The first variant is called ``name``, the next ``name_1``.
        """
        key = (name, *variant)
        if key not in self.functions:
            serial = sum(known[0] == name for known in self.functions)
            self.functions[key] = _function(f"{name}_{serial}" if serial else name, body, len(inputs))
        return self.ops(self.functions[key].name, *inputs, outputs=outputs, domain=LOCAL)


def _function(name: str, body: Callable[..., tuple[ir.Value, ...]], arity: int) -> ir.Function:
    emitter = Emitter()
    parameters = [ir.Value(name=f"input_{i}") for i in range(arity)]
    results = body(emitter, *parameters)
    imports = {"": OPSET, CONTRIB: 1}
    graph = ir.Graph(parameters, results, nodes=emitter.nodes, name=name, opset_imports=imports)
    return ir.Function(LOCAL, name, graph=graph, attributes=[])
