"""Capture: a PyTorch decoder becomes a Program.

A Hugging Face model that honours the attention interface is switched, for the capture only, to an attention function
that emits one ``ryzen::attention`` node and a mask function that returns a :class:`MaskSpec` instead of a tensor: the
graph then holds no mask arithmetic. Everything else, and any plain ``nn.Module``, is captured as ATen and left to the
passes. The model is handed back as it was; its weights are referred to, never copied.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ryzen_compile import ops
from ryzen_compile.errors import CaptureError, ConfigError, UnsupportedError
from ryzen_compile.mask_spec import MaskSpec, read_mask
from ryzen_compile.program import NAMESPACES, Program, is_call, module_path, shape
from ryzen_compile.spec import ModelSpec

ATTENTION = "ryzen"
EXPERTS = "batched_mm"  # experts as gathers and products; the other forms loop over data or call a private operator
TRACED = (2, 7)  # rows and tokens; sizes of one would be specialised to one
SWITCHES = ("_attn_implementation", "_experts_implementation")
aten = torch.ops.aten
ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
)
# Kept whole because one node says more than its parts, and every backend has them.
KEPT = (
    aten.linear.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.scaled_dot_product_attention.default,
    aten.gelu.default,
    aten.silu.default,
    aten.softmax.int,
    aten.matmul.default,
)


def capture(model: nn.Module, *, context: int | None = None) -> Program:
    """Traces ``model`` as ``(input_ids (B, T), position_ids (B, T)) -> logits (B, T, V)``, B and T dynamic.

    ``context`` is the largest number of positions; by default it is read from the model's config
    (``max_position_embeddings``, ``n_positions``, ``block_size`` or ``context_length``). Raises ``CaptureError`` when
    ``torch.export`` cannot trace the model, ``ConfigError`` when the context is unknown or longer than the model's,
    ``UnsupportedError`` for weights that are not float32 and for a mask that is neither causal, windowed nor full.
    """
    limit = context_of(model, context)
    ids, positions = torch.zeros(TRACED, dtype=torch.long), torch.arange(TRACED[1]).repeat(TRACED[0], 1)
    exported, provenance = trace(_wrap(model), {"input_ids": ids, "position_ids": positions}, limit)
    return Program(exported, _read_spec(model, exported, limit), provenance=provenance)


class Wrapped(nn.Module):
    """A user's model behind the one call that its kind is reduced to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model_to_capture = model


class _WithPositions(Wrapped):
    """The call every decoder is reduced to."""

    def __init__(self, model: nn.Module, takes_positions: bool, no_cache: bool) -> None:
        super().__init__(model)
        self._arguments: Any = {"use_cache": False} if no_cache else {}
        self._takes_positions: Any = takes_positions

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        arguments: dict[str, Any] = dict(self._arguments)
        if self._takes_positions:
            arguments["position_ids"] = position_ids
        result = self.model_to_capture(input_ids, **arguments)
        logits = getattr(result, "logits", result)
        return logits[0] if isinstance(logits, tuple) else logits


def _wrap(model: nn.Module) -> _WithPositions:
    names = inspect.signature(model.forward).parameters
    return _WithPositions(model, "position_ids" in names, "use_cache" in names)


def trace(
    wrapped: Wrapped, inputs: Mapping[str, Tensor], context: int, *, interface: bool = True
) -> tuple[ExportedProgram, dict[str, str]]:
    """The graph of ``wrapped`` for ``inputs`` (B, T) by name, B and T dynamic, and where it comes from.

    Without the ``interface`` its attention is captured as ATen even if it honours it. Raises as ``capture`` does; the
    model is handed back as it was.
    """
    model = wrapped.model_to_capture
    _refuse_half(model)
    training = [(module, module.training) for module in model.modules()]  # parts may be frozen in another mode
    wrapped.eval()
    try:
        with _attention_recorder(model, interface) as honoured:
            exported = _export(wrapped, inputs, context)
    finally:
        for module, flag in training:
            module.training = flag
    return exported, {
        "class": type(model).__name__,
        "attention": "interface" if honoured else "aten",
        "config_sha256": _config_digest(model),
        "torch": torch.__version__,
    }


def _export(wrapped: Wrapped, inputs: Mapping[str, Tensor], context: int) -> ExportedProgram:
    # A table or mask of the context's size bounds the tokens; at exactly that size its slice is a case of its own.
    batch, tokens = Dim("batch"), Dim("tokens", max=max(context - 1, 8))
    dynamic = {name: {0: batch, 1: tokens} for name in inputs}
    try:
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            wrapped(**inputs)  # reads the masks with real tensors before anything is traced
            exported = torch.export.export(wrapped, tuple(inputs.values()), dynamic_shapes=dynamic, strict=False)
            return _without_assertions(exported.run_decompositions(_decompositions()))
    except (UnsupportedError, CaptureError):
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError, KeyError, IndexError, AttributeError) as error:
        first = " ".join(str(error).split()) or type(error).__name__
        raise CaptureError(
            f"torch.export could not trace {type(wrapped.model_to_capture).__name__}: {first[:300]}",
            hint="the whole trace is in this error's __cause__; data-dependent control flow is the usual reason",
        ) from error


def _refuse_foreign(exported: ExportedProgram) -> None:
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in NAMESPACES:
            raise UnsupportedError(
                f"node {node.name} in {module_path(node) or 'the model'} calls {node.target}, expected ATen",
                hint="a private operator cannot be rewritten or exported; is there a setting that avoids it?",
            )


def _without_assertions(exported: ExportedProgram) -> ExportedProgram:
    """Tracing leaves checks of what it already proved; they return nothing and would only be carried along."""
    for node in list(exported.graph.nodes):
        if is_call(node, *ASSERTIONS):
            exported.graph.erase_node(node)
    _refuse_foreign(exported)
    exported.graph_module.recompile()
    return exported


def _decompositions() -> dict:
    table = torch.export.default_decompositions()
    for op in KEPT:
        table.pop(op, None)
    return table


@contextmanager
def _attention_recorder(model: Any, wanted: bool) -> Iterator[bool]:
    """Switches a Hugging Face model to our attention; yields whether it honours the interface."""
    if not (hasattr(model, "set_attn_implementation") and hasattr(model, "config")):
        yield False
        return
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention_function)
    AttentionMaskInterface.register(ATTENTION, _mask_function())
    before = [(c, name, getattr(c, name)) for c in _configs(model) for name in SWITCHES if hasattr(c, name)]
    try:
        if hasattr(model, "set_experts_implementation") and hasattr(model.config, SWITCHES[1]):
            model.set_experts_implementation(EXPERTS)
        with suppress(ValueError, AttributeError, KeyError):  # how a model says that it does not honour the interface
            model.set_attn_implementation(ATTENTION if wanted else "eager")
        honoured = model.config._attn_implementation == ATTENTION
        if not honoured:
            model.set_attn_implementation("eager")
        yield honoured
    finally:
        for config, name, implementation in before:
            setattr(config, name, implementation)
        AttentionInterface._global_mapping.pop(ATTENTION, None)
        AttentionMaskInterface._global_mapping.pop(ATTENTION, None)


def _configs(model: Any) -> list[Any]:
    configs = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in configs if hasattr(config, SWITCHES[0])}.values())


@dataclass(frozen=True)
class _Mask:
    """What a model's attention is handed as its mask; ``padding`` (B, T) is true where a key is a token."""

    spec: MaskSpec
    padding: Tensor | None


def _mask_function() -> Callable[..., _Mask]:
    """The eager run reads each mask; the traced run, where tensors hold no values, gets the same specs in order."""
    specs: list[MaskSpec] = []
    replayed = 0

    def mask(
        *,
        mask_function: Callable,
        local_size: int | None = None,
        attention_mask: Tensor | None = None,
        **_: object,
    ) -> _Mask:
        nonlocal replayed
        if torch.compiler.is_exporting():
            replayed += 1
            return _Mask(specs[(replayed - 1) % len(specs)], attention_mask)
        specs.append(read_mask(mask_function, local_size))
        return _Mask(specs[-1], attention_mask)

    return mask


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: _Mask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """The attention interface's contract: heads-first tensors in, (B, T, H, D') out, no weights."""
    if isinstance(attention_mask, Tensor):
        raise UnsupportedError(
            f"{type(module).__name__} passes a mask tensor to its attention", hint="only MaskSpec masks are captured"
        )
    causal = bool(options.get("is_causal", getattr(module, "is_causal", True)))
    mask = attention_mask or _Mask(MaskSpec(causal), None)
    spec = mask.spec
    scale = scaling if scaling is not None else 1.0 / math.sqrt(query.shape[-1])
    attend = partial(ops.attention, query, key, value, s_aux, float(scale), spec.window, float(softcap or 0.0))
    return attend(spec.causal) if mask.padding is None else attend(spec.causal, mask.padding), None


def context_of(model: nn.Module, wanted: int | None) -> int:
    """What the model says, or ``wanted`` if that is shorter: a position beyond the model's tables has no meaning."""
    config: Any = getattr(model, "config", model)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "block_size", "context_length", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            if wanted is not None and wanted > value:
                raise ConfigError(
                    f"context {wanted} exceeds the {value} positions of {type(model).__name__} ({name})",
                    hint="a context can only shorten the model's own",
                )
            return wanted or value
    if wanted is not None:
        return wanted
    raise ConfigError(
        f"{type(model).__name__} does not say how many positions it has",
        hint="pass context=N, the longest sequence (prompt plus new tokens) it may see",
    )


def _refuse_half(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype is not torch.float32:
            raise UnsupportedError(
                f"parameter {name} is {parameter.dtype}, expected torch.float32",
                hint="pass the model's path, which is loaded as float32, or call .float() on it",
            )


def _read_spec(model: nn.Module, exported: ExportedProgram, context: int) -> ModelSpec:
    placeholders = {s.arg.name: s for s in exported.graph_signature.input_specs}
    embedding = next((n for n in exported.graph.nodes if is_call(n, aten.embedding)), None)
    logits = exported.graph.output_node().args[0][0]
    if embedding is None or logits.meta["val"].ndim != 3:
        raise CaptureError(
            f"{type(model).__name__} does not look like a decoder: expected a token embedding and logits (B, T, V), "
            f"got an output of shape {shape(logits)}" + ("" if embedding else " and no embedding")
        )
    table = embedding.args[0]
    attentions = [n for n in exported.graph.nodes if is_call(n, torch.ops.ryzen.attention)]
    q, k = (shape(attentions[0].args[0]), shape(attentions[0].args[1])) if attentions else ((0, 0, 0, 0), (0, 0, 0, 0))
    sizes = {t.data_ptr(): t.numel() for t in model.parameters()}
    head = next((n for n in reversed(list(exported.graph.nodes)) if is_call(n, aten.linear)), None)
    return ModelSpec(
        layers=len(attentions),
        heads=int(q[1]),
        kv_heads=int(k[1]),
        head_dim=int(q[3]),
        hidden=int(shape(table)[1]),
        vocab=int(logits.meta["val"].shape[2]),
        context=context,
        tied=head is not None and _same_weight(exported, placeholders, table, head.args[1]),
        parameters=sum(sizes.values()),
        architecture=str(getattr(getattr(model, "config", None), "model_type", type(model).__name__)),
    )


def _same_weight(exported: ExportedProgram, specs: dict, a: torch.fx.Node, b: torch.fx.Node) -> bool:
    if a is b:
        return True
    state = exported.state_dict
    pair = [state.get(specs[n.name].target) if n.name in specs else None for n in (a, b)]
    return pair[0] is not None and pair[1] is not None and pair[0].data_ptr() == pair[1].data_ptr()


def _config_digest(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    text = config.to_json_string(use_diff=False) if hasattr(config, "to_json_string") else repr(config)
    return hashlib.sha256(text.encode()).hexdigest()
