"""Edit: the one way to change a Program's graph.

Every node a pass adds is made here, by running the operator's shape function on its inputs' metadata, so
``meta["val"]`` is always true and a wrong shape fails where the node is born. Provenance (module path, source line) is
inherited from the node being replaced, and the pass's name is added to it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.fx.node import map_arg

from ryzen_compile.program import WEIGHT_KINDS, Program
from ryzen_compile.spec import CacheSlot

INHERITED = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")


class Edit:
    """Edits a copy of ``program``; ``finish`` returns the changed Program. ``by`` names the pass in provenance."""

    def __init__(self, program: Program, by: str) -> None:
        source = program.copy()
        self._program = source
        self._by = by
        self.graph = source.graph
        self._state = source.exported.state_dict
        self._constants = source.exported.constants
        self._signature = source.exported.graph_signature
        self._fake = _fake_mode(self.graph)
        self._slots = program.slots
        self.spec = program.spec
        self._added: dict[str, fx.Node] = {}

    @property
    def program(self) -> Program:
        """The Program under edit, for reading."""
        return self._program

    def call(self, target: Callable, *args: object, before: fx.Node, like: fx.Node | None = None) -> fx.Node:
        """Adds ``target(*args)`` before ``before``; provenance comes from ``like`` (default ``before``)."""
        overload = _overload(target)
        with self.graph.inserting_before(before):
            node = self.graph.call_function(overload, args)
        values = map_arg(args, lambda n: n.meta["val"])
        with self._fake:
            node.meta["val"] = overload(*values)
        self._stamp(node, like or before)
        return node

    def item(self, source: fx.Node, index: int, *, before: fx.Node) -> fx.Node:
        """Adds ``source[index]`` for a node with several results."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(operator.getitem, (source, index))
        node.meta["val"] = source.meta["val"][index]
        self._stamp(node, source)
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Gives every reader of ``old`` the value ``new``; the old node dies unless it still has readers."""
        old.replace_all_uses_with(new)
        if not old.users and old.op == "call_function":
            self.graph.erase_node(old)

    def swap_argument(self, node: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Makes one reader read ``new`` where it read ``old``."""
        node.replace_input_with(old, new)

    def add_constant(self, name: str, value: Tensor) -> fx.Node:
        """Adds a weight placeholder holding ``value``, once per tensor object; ``name`` is made unique."""
        for known, tensor in self._state.items():
            if tensor is value and known in self._added:
                return self._added[known]
        unique = name
        serial = 0
        taken = {n.name for n in self.graph.nodes}
        while unique in taken or unique in self._state:
            serial += 1
            unique = f"{name}_{serial}"
        node = self._placeholder(
            unique, self._fake.from_tensor(value, static_shapes=True), before=self._first_user_input()
        )
        unique = node.name
        self._state[unique] = value
        self._added[unique] = node
        specs = self._signature.input_specs
        index = sum(spec.kind in WEIGHT_KINDS for spec in specs)
        specs.insert(index, InputSpec(InputKind.BUFFER, TensorArgument(unique), unique, persistent=True))
        return node

    def add_input(self, name: str, value: Tensor) -> fx.Node:
        """Adds a user input after the existing ones; ``value`` is made by ``fake_empty``."""
        last = self._program.inputs[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        node.meta["val"] = value
        node.meta["rewritten_by"] = self._by
        self._signature.input_specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None))
        return node

    def retype_input(self, node: fx.Node, value: Tensor) -> None:
        """Gives a user input another size or type; its readers have to be made anew by the caller."""
        node.meta["val"] = value
        node.meta["rewritten_by"] = self._by

    def add_output(self, node: fx.Node) -> None:
        output = self.graph.output_node()
        output.args = ((*output.args[0], node),)
        self._signature.output_specs.append(OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None))

    def set_output(self, index: int, node: fx.Node) -> None:
        output = self.graph.output_node()
        results = list(output.args[0])
        results[index] = node
        output.args = (tuple(results),)
        self._signature.output_specs[index] = OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None)

    def remove_input(self, node: fx.Node) -> None:
        """Removes a user input or weight that nothing reads."""
        specs = self._signature.input_specs
        index = next(i for i, spec in enumerate(specs) if spec.arg.name == node.name)
        spec = specs.pop(index)
        if spec.kind in WEIGHT_KINDS and not any(other.target == spec.target for other in specs):
            self._state.pop(spec.target, None)
            self._constants.pop(spec.target, None)
        self.graph.erase_node(node)

    def set_cache(self, slots: tuple[CacheSlot, ...], heads: int) -> None:
        """Records the cache's slots, and in the spec the layers and the first layer's heads, now that all are known."""
        first = slots[0]
        self.set_slots(slots)
        self.spec = replace(self.spec, layers=len(slots), heads=heads, kv_heads=first.kv_heads, head_dim=first.head_dim)

    def set_slots(self, slots: tuple[CacheSlot, ...]) -> None:
        """Records how the cache's slots are laid out now."""
        self._slots = slots

    def fake_empty(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of size (symbols allowed) and type only, for ``add_input``."""
        with self._fake:
            return torch.empty(size, dtype=dtype)

    def new_dim(self, example: int) -> int:
        """A fresh symbolic dimension (to the type checker an int), for an input whose size nobody fixed."""
        from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        return self._fake.from_tensor(torch.empty(example), symbolic_context=context).shape[0]

    def erase_dead(self) -> int:
        """Removes calls that nothing reads; returns how many."""
        removed = 0
        for node in reversed(list(self.graph.nodes)):
            if node.op == "call_function" and not node.users:
                self.graph.erase_node(node)
                removed += 1
        return removed

    def finish(self) -> Program:
        self.erase_dead()
        specs = self._signature.output_specs
        for i, (spec, node) in enumerate(zip(specs, self.graph.output_node().args[0], strict=True)):
            if spec.arg.name != node.name:
                specs[i] = replace(spec, arg=TensorArgument(node.name))  # the old one is the source Program's too
        self.graph.lint()
        done = self._program.with_graph(self.graph, self._state, self._constants, self._signature)
        return replace(done, slots=self._slots, spec=self.spec)

    def _stamp(self, node: fx.Node, like: fx.Node) -> None:
        for key in INHERITED:
            if key in like.meta:
                node.meta[key] = like.meta[key]
        node.meta["rewritten_by"] = self._by

    def _first_user_input(self) -> fx.Node:
        return self._program.inputs[0]

    def _placeholder(self, name: str, value: Tensor, before: fx.Node) -> fx.Node:
        with self.graph.inserting_before(before):
            node = self.graph.placeholder(name)
        node.target = node.name  # fx has its own spelling of names: lower case, no digit first
        node.meta["val"] = value
        node.meta["rewritten_by"] = self._by
        return node


def _overload(target: Callable) -> Callable:
    """A custom operator's default overload, or the target itself."""
    return target._opoverload if isinstance(target, torch._library.custom_ops.CustomOpDef) else target


def _fake_mode(graph: fx.Graph) -> FakeTensorMode:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    raise ValueError("the graph has no node with shape metadata; a Program starts from a capture")
