"""Program: the model as one graph of core ATen and ``ryzen::`` operators, with what is known about it.

A Program wraps a ``torch.export.ExportedProgram``. Weights are lifted placeholders that refer to the user's own
storage: no pass copies them. A pass that needs a changed weight (a merge, a transpose) writes the expression into the
graph (``cat(w_q, w_k, w_v)``), and whoever runs or writes the Program folds it, one tensor at a time. A Program lives
in memory only: what lasts is ONNX, safetensors and JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, OutputKind

from ryzen_compile.spec import CacheSlot, ModelSpec

NAMESPACES = ("aten", "ryzen")  # of the operators a Program may hold
WEIGHT_KINDS = frozenset({InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR})


@dataclass(frozen=True)
class Program:
    """``slots`` is empty until ``insert_kv_cache`` has run; ``provenance`` says what it came from."""

    exported: ExportedProgram
    spec: ModelSpec
    slots: tuple[CacheSlot, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.exported.graph

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Placeholder name -> the tensor behind it, in graph order; tied parameters appear as one tensor object."""
        exported = self.exported
        found = {}
        for spec in exported.graph_signature.input_specs:
            if spec.kind in WEIGHT_KINDS:
                store = exported.state_dict if spec.target in exported.state_dict else exported.constants
                found[spec.arg.name] = store[spec.target]
        return found

    @property
    def weight_names(self) -> dict[str, str]:
        """Placeholder name -> the parameter's qualified name in the user's model."""
        specs = self.exported.graph_signature.input_specs
        wrapped = "model_to_capture."  # capture's own module around the user's
        return {
            s.arg.name: s.target.removeprefix(wrapped) for s in specs if s.kind in WEIGHT_KINDS and s.target is not None
        }

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders a caller feeds, in order."""
        names = self.exported.graph_signature.user_inputs
        by_name = {n.name: n for n in self.graph.nodes if n.op == "placeholder"}
        return [by_name[name] for name in names if isinstance(name, str)]

    @property
    def output_names(self) -> list[str]:
        return [s.arg.name for s in self.exported.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        return tuple(self.graph.output_node().args[0])

    def input(self, name: str) -> fx.Node | None:
        return next((node for node in self.inputs if node.name == name), None)

    def copy(self) -> Program:
        """A Program with its own graph and signature over the same weights: rolling back is keeping the old one."""
        return self.with_graph(_copy_graph(self.graph), dict(self.exported.state_dict), dict(self.exported.constants))

    def with_graph(
        self,
        graph: fx.Graph,
        state: dict[str, Tensor],
        constants: dict[str, Any],
        signature: ExportGraphSignature | None = None,
    ) -> Program:
        old = self.exported
        exported = ExportedProgram(
            root=old.graph_module,
            graph=graph,
            graph_signature=signature or _copy_signature(old.graph_signature),
            state_dict=state,
            range_constraints=old.range_constraints,
            module_call_graph=old.module_call_graph,
            example_inputs=None,
            constants=constants,
            verifiers=old.verifiers,
        )
        return replace(self, exported=exported)

    def ops(self) -> list[str]:
        """The operators in order, as ``namespace.name``; shape arithmetic and tuple access are left out."""
        return [op_name(n) for n in self.graph.nodes if n.op == "call_function" and is_operator(n)]


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        twin = copied.node_copy(node, lambda n: mapping[n])
        if twin.name != node.name:
            twin._rename(node.name)
        mapping[node] = twin
    return copied


def _copy_signature(signature: ExportGraphSignature) -> ExportGraphSignature:
    return ExportGraphSignature(list(signature.input_specs), list(signature.output_specs))


def op_name(node: fx.Node) -> str:
    """``aten.add`` for ``aten.add.Tensor``: the name without its overload."""
    target = node.target
    return f"{target.namespace}.{target._opname}" if isinstance(target, torch._ops.OpOverload) else str(target)


def is_operator(node: fx.Node) -> bool:
    """True for tensor operators; false for ``sym_size``, ``getitem`` and symbolic arithmetic."""
    return isinstance(node.target, torch._ops.OpOverload) and op_name(node) != "aten.sym_size"


def is_call(node: object, *targets: object) -> bool:
    """True when ``node`` calls one of ``targets`` (overloads, or packets for any overload)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return any(node.target is t or packet is t for t in targets)


def shape(node: fx.Node) -> tuple:
    """The node's dims, symbolic ones as symbols; empty for a value that is no tensor (a split, a size)."""
    value = node.meta["val"]
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def module_path(node: fx.Node) -> str:
    """The path of the module that the node came from, ``model.layers.0.mlp``; empty when unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0].removeprefix("L['self'].")
    path = path.removeprefix("model_to_capture").removeprefix(".")
    return "" if path.startswith("_empty_nn_module_stack") else path
