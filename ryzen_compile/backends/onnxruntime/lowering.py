"""Lowering: a Program becomes an ONNX model, with the input and output names that onnxruntime-genai reads.

torch.onnx translates ATen, our rules replace the dialect's nodes, and what is left over is cleaned away and folded.
Weights stay where they are: the model's initializers refer to the Program's storage until they are written.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import onnx_ir as ir
import torch
from onnx_ir import convenience
from torch import fx
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.utils import _pytree as pytree

from ryzen_compile.backends.onnxruntime import cleanup, fold
from ryzen_compile.backends.onnxruntime.attention import padded_head_dim
from ryzen_compile.backends.onnxruntime.dialect import attributes_of, tensor_arity, translation_table
from ryzen_compile.backends.onnxruntime.emit import CONTRIB, LOCAL, Emitter, LoweringOptions
from ryzen_compile.backends.onnxruntime.node_facts import OPSET
from ryzen_compile.backends.onnxruntime.rules import RULES
from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.numerics.rows import RowFormat
from ryzen_compile.program import Program, module_path, op_name
from ryzen_compile.spec import CacheSlot

IR_VERSION = 10
DEFAULTS = LoweringOptions()


def lower(program: Program, options: LoweringOptions = DEFAULTS) -> ir.Model:
    """The ONNX model of ``program``, opset 21 and ``com.microsoft`` 1; with or without a cache.

    Raises ``UnsupportedError``, by operator, node and module path, for what has no translation, and ``UsageError`` when
    the Program's outputs do not match its slots.
    """
    if program.slots and len(program.outputs) != 1 + 2 * len(program.slots):
        raise UsageError(
            f"{len(program.slots)} cache slots and {len(program.outputs)} outputs: expected logits and a pair per slot"
        )
    if program.spec.pooling is not None:
        options = replace(options, many_rows=True)
    model = _translate(program)
    cleanup.share_initializers(model.graph)
    _apply_rules(model, options)
    _name_interface(model.graph, program)
    cleanup.simplify(model)
    cleanup.keep_one_table(model.graph)
    fold.fold_constants(model.graph)
    cleanup.finish(model)
    return model


def cache_slots(slots: Sequence[CacheSlot]) -> tuple[CacheSlot, ...]:
    """The slots as the lowered model has them: heads padded to what GroupQueryAttention takes."""
    widths = [
        padded_head_dim(
            max(slot.head_dim, slot.value_dim), RowFormat.parse(slot.key_format).bits, rolling=slot.window > 0
        )
        for slot in slots
    ]
    return tuple(replace(s, head_dim=w, value_dim=w) for s, w in zip(slots, widths, strict=True))


def _translate(program: Program) -> ir.Model:
    """The Program's graph in ONNX, the dialect's operators untouched."""
    try:
        with _quietly():
            onnx_program = torch.onnx.export(
                _with_flat_calls(program.exported),
                custom_translation_table=translation_table(),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise _unsupported(program, error) from error
    if onnx_program is None:
        raise UnsupportedError("torch.onnx returned no model")
    model: ir.Model = onnx_program.model
    model.ir_version = IR_VERSION
    return model


def _with_flat_calls(exported: ExportedProgram) -> ExportedProgram:
    """Passes add inputs and outputs; torch.onnx re-traces by the calling convention, which is told of them here."""
    signature = exported.graph_signature
    inputs = tuple(signature.user_inputs)
    _, in_spec = pytree.tree_flatten((inputs, {}))
    _, out_spec = pytree.tree_flatten(tuple(signature.user_outputs))
    return ExportedProgram(
        root=exported.graph_module,
        graph=exported.graph,
        graph_signature=signature,
        state_dict=exported.state_dict,
        range_constraints=exported.range_constraints,
        module_call_graph=[ModuleCallEntry("", ModuleCallSignature([], [], in_spec, out_spec))],
        example_inputs=None,
        constants=exported.constants,
        verifiers=exported.verifiers,
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """torch.onnx logs about packages it does without, and warns of its own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _unsupported(program: Program, error: BaseException) -> UnsupportedError:
    """Names the Program's node that torch.onnx could not translate, and the module it came from."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    reason = str(root).strip().splitlines()[0][:300]
    failed = _failed_node(error)
    if failed is None:
        return UnsupportedError(f"torch.onnx cannot translate the graph: {reason}")
    # torch.onnx works on a re-trace, whose nodes remember the names of those they were made from.
    origins = [source.name for source in failed.meta.get("from_node", ())]
    ours = next((n for n in program.graph.nodes if n.name in (*origins, failed.name)), failed)
    where = f"node {ours.name}, module {module_path(ours) or 'unknown'}"
    return UnsupportedError(
        f"{op_name(ours)} has no ONNX translation ({where}): {reason}",
        hint="use backend='eager', or add a pass that expresses it in core ATen",
    )


def _failed_node(error: BaseException) -> fx.Node | None:
    """The node under translation: torch.onnx's errors carry it in no field, only in their frames."""
    found = None
    link: BaseException | None = error
    while link is not None:
        trace = link.__traceback__
        while trace is not None:
            node = trace.tb_frame.f_locals.get("node")
            found = node if isinstance(node, fx.Node) else found
            trace = trace.tb_next
        link = link.__cause__
    return found


def _apply_rules(model: ir.Model, options: LoweringOptions) -> None:
    """Replaces each node of the dialect by what its rule emits, in graph order."""
    emitter = Emitter(options)
    graph = model.graph
    for node in list(graph):
        if node.domain != LOCAL:
            continue
        missing = tensor_arity(node.op_type) - len(node.inputs)
        results = RULES[node.op_type](emitter, *node.inputs, *[None] * missing, **attributes_of(node))
        new = emitter.drain()
        for made in new:
            made.meta["node"] = node.meta.get("node")
        graph.insert_before(node, new)
        _replace_results(node, results)
        graph.remove(node, safe=True)
    for value in emitter.initializers:
        graph.register_initializer(value)
    for function in emitter.functions.values():
        model.functions[function.identifier()] = function
    model.graph.opset_imports.update({"": OPSET, CONTRIB: 1})


def _replace_results(node: ir.Node, results: Sequence[ir.Value]) -> None:
    for old, new in zip(node.outputs, results, strict=True):
        name, old.name = old.name, None
        new.name, new.type, new.shape = name, old.type, old.shape
        convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _name_interface(graph: ir.Graph, program: Program) -> None:
    """genai's names for inputs and outputs, words for the symbolic dimensions, and the padded cache heads."""
    for value, node in zip(graph.inputs, program.inputs, strict=True):
        value.name = re.sub(r"^past_key_values_(\d+)_(key|value)$", r"past_key_values.\1.\2", node.name)
    first = "logits" if program.spec.pooling is None else "sentence_embedding"
    names = [first] + [f"present.{i}.{half}" for i in range(len(program.slots)) for half in ("key", "value")]
    for value, name in zip(graph.outputs, names, strict=False):
        value.name = name
    words = _dimension_words(graph)
    for value in (*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([words.get(str(d), d) if not isinstance(d, int) else d for d in value.shape])
    for index, slot in enumerate(cache_slots(program.slots)):
        width = RowFormat.parse(slot.key_format).width(slot.head_dim)  # of values too: they are padded alike
        capacity = f"window_{slot.window}_capacity" if slot.window else "capacity"
        for half in ("key", "value"):
            past = next(v for v in graph.inputs if v.name == f"past_key_values.{index}.{half}")
            past.shape = ir.Shape(["batch", slot.kv_heads, capacity, width])
            # Without a shared buffer, which only a caller decides, the present is longer than the past.
            present = next(v for v in graph.outputs if v.name == f"present.{index}.{half}")
            present.shape = ir.Shape(["batch", slot.kv_heads, f"present_{capacity}", width])


def _dimension_words(graph: ir.Graph) -> dict[str, str]:
    """torch's symbols -> ``batch``, ``sequence``, ``total``."""
    words: dict[str, str] = {}
    for value in graph.inputs:
        if value.shape is None:
            continue
        dims = [str(d) for d in value.shape if not isinstance(d, int)]
        meaning = ("batch", "total") if value.name == "attention_mask" else ("batch", "sequence")
        if value.name in {"input_ids", "position_ids", "attention_mask"}:
            words |= {symbol: word for symbol, word in zip(dims, meaning, strict=False) if symbol not in words}
    return words
