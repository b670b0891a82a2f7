"""Capture of encoders: a PyTorch model that gives every token a vector becomes a Program that gives every text one.

What ``capture`` does for decoders, with the user's padding in the place of positions: each attention of a model that
honours the attention interface gets the padding mask as an argument of its node. Pooling and normalization are part of
the graph, so every backend has them and every pass is held to what a caller will see.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ryzen_compile.capture import TRACED, Wrapped, context_of, trace
from ryzen_compile.errors import CaptureError, ConfigError, UnsupportedError
from ryzen_compile.interpret import interpret, text_feeds
from ryzen_compile.pooling import pool
from ryzen_compile.program import Program, is_call, shape
from ryzen_compile.spec import ModelSpec, Pooling

aten = torch.ops.aten
LAYOUT = (aten.slice, aten.clone, aten.view, aten.reshape, aten.alias, aten._to_copy)
AGREEING = 24  # tokens on which a captured graph is compared with its model
SAMPLE = 64  # tokens of a text that tells how positions are counted: beyond what a table of distances tells apart


def capture_encoder(model: nn.Module, pooling: Pooling, *, context: int | None = None) -> Program:
    """Traces ``model`` as ``(input_ids (B, T), attention_mask (B, T)) -> vectors (B, C)``, B and T dynamic.

    ``model`` is a Hugging Face model whose result has a ``last_hidden_state``, or any ``forward(input_ids,
    attention_mask) -> (B, T, C)``; ``attention_mask`` is 1 for a token and 0 for padding, on whichever side, and every
    row has a token. ``context`` is the largest number of tokens, by default what the model's config and its tables of
    positions hold. Raises as ``capture`` does.
    """
    program = _captured(model, pooling, context_of(model, context))
    if context is not None and program.spec.context < context:
        raise ConfigError(
            f"context {context} exceeds the {program.spec.context} tokens that the tables of {type(model).__name__} "
            "have positions for",
            hint="a context can only shorten the model's own",
        )
    return program


def _captured(model: nn.Module, pooling: Pooling, limit: int) -> Program:
    """Through the attention interface if that says all there is to say, else as ATen: a model may add a bias to its
    scores that the interface knows nothing of, or hand its attention a mask of its own making."""
    try:
        program = _traced(model, pooling, limit, interface=True)
    except UnsupportedError:
        return _traced(model, pooling, limit, interface=False)
    if program.provenance["attention"] == "aten" or _agrees(model, program):
        return program
    return _traced(model, pooling, limit, interface=False)


def _traced(model: nn.Module, pooling: Pooling, limit: int, *, interface: bool) -> Program:
    ids, mask = padded_texts(2, TRACED[1])
    inputs = {"input_ids": ids, "attention_mask": mask}
    exported, provenance = trace(_Encoder(model, pooling), inputs, limit, interface=interface)
    return _bounded(Program(exported, _read_spec(model, exported, pooling, limit), provenance=provenance))


def _agrees(model: nn.Module, program: Program) -> bool:
    ids, mask = padded_texts(program.spec.vocab, min(AGREEING, program.spec.context))
    want = embed(model, program.spec, ids, mask)
    (got,) = interpret(program, text_feeds(program, ids, mask=mask), [program.outputs[0]])
    return bool(torch.allclose(got, want, rtol=1e-2, atol=1e-3 * float(want.abs().max())))  # otherwise it is far off


def padded_texts(vocab: int, tokens: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids (3, ``tokens``) and their mask: one text fills its row, the others leave a third of it to padding,
    behind one of them and in front of the other."""
    ids = torch.randint(vocab, (3, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, tokens - tokens // 3 :] = 0
    mask[2, : tokens // 3] = 0
    return ids, mask


def embed(model: nn.Module, spec: ModelSpec, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, C) vectors of ``ids`` (B, T) from the model itself, run as its user runs it."""
    if spec.pooling is None:
        raise ValueError("a decoder has no vectors of texts")
    encoder = _Encoder(model, spec.pooling)
    training = [(module, module.training) for module in model.modules()]  # parts may be frozen in another mode
    encoder.eval()
    try:
        with torch.no_grad():
            vectors: Tensor = encoder(ids, mask)
    finally:
        for module, flag in training:
            module.training = flag
    return vectors


class _Encoder(Wrapped):
    """The call every encoder is reduced to."""

    def __init__(self, model: nn.Module, pooling: Pooling) -> None:
        super().__init__(model)
        names = inspect.signature(model.forward).parameters
        required = [name for name, p in names.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        self._by_name: Any = "attention_mask" in names
        if not self._by_name and len(required) != 2:
            raise CaptureError(
                f"{type(model).__name__} does not look like an encoder: expected forward(input_ids, attention_mask), "
                f"got forward({', '.join(names)})",
                hint="without a mask, the vector of a text would depend on how far it is padded",
            )
        self._arguments: Any = {"use_cache": False} if "use_cache" in names else {}
        self._pooling: Any = pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = hidden_states(
            self.model_to_capture(input_ids, attention_mask=attention_mask, **self._arguments)
            if self._by_name
            else self.model_to_capture(input_ids, attention_mask, **self._arguments)
        )
        if states.ndim != 3:
            raise CaptureError(
                f"{type(self.model_to_capture).__name__} does not look like an encoder: expected vectors of tokens "
                f"(B, T, C), got a result of shape {tuple(states.shape)}"
            )
        return pool(states, attention_mask, self._pooling)


def hidden_states(result: Any) -> Tensor:
    """(B, T, C): the vectors of tokens in what a model returned."""
    states = getattr(result, "last_hidden_state", result)
    found: Tensor = states[0] if isinstance(states, tuple) else states
    return found


def _read_spec(model: nn.Module, exported: ExportedProgram, pooling: Pooling, context: int) -> ModelSpec:
    lookups = [n for n in exported.graph.nodes if is_call(n, aten.embedding)]
    table = next((n.args[0] for n in lookups if _source(n.args[1]).name == "input_ids"), None)
    if table is None:
        raise CaptureError(
            f"{type(model).__name__} does not look like an encoder: expected a table that input_ids are looked up in"
        )
    attentions = [n for n in exported.graph.nodes if is_call(n, torch.ops.ryzen.attention)]
    q, k = (shape(attentions[0].args[0]), shape(attentions[0].args[1])) if attentions else ((0,) * 4, (0,) * 4)
    sizes = {t.data_ptr(): t.numel() for t in model.parameters()}
    return ModelSpec(
        layers=len(attentions),
        heads=int(q[1]),
        kv_heads=int(k[1]),
        head_dim=int(q[3]),
        hidden=int(shape(exported.graph.output_node().args[0][0])[1]),
        vocab=int(shape(table)[0]),
        context=context,
        tied=False,
        parameters=sum(sizes.values()),
        architecture=str(getattr(getattr(model, "config", None), "model_type", type(model).__name__)),
        pooling=pooling,
    )


def _source(ids: fx.Node) -> fx.Node:
    """What ``ids`` are a copy or a part of."""
    while is_call(ids, *LAYOUT):
        ids = ids.args[0]
    return ids


def _bounded(program: Program) -> Program:
    """``program`` with no more tokens than its tables of positions have rows for.

    A config may count rows that no token reaches: positions that come after padding's own, say. What is looked up is
    read off two short texts; an index that grows token by token bounds them.
    """
    ids = program.inputs[0]
    lookups = [n for n in program.graph.nodes if is_call(n, aten.embedding) and _source(n.args[1]) is not ids]
    short = min(SAMPLE, max(program.spec.context // 4, 1))
    found = [program.spec.context]
    for lookup in lookups:
        first, second = (_largest_index(program, lookup.args[1], tokens) for tokens in (short, 2 * short))
        if second - first == short:
            found.append(int(shape(lookup.args[0])[0]) - 1 - first + short)
    return replace(program, spec=replace(program.spec, context=min(found)))


def _largest_index(program: Program, index: fx.Node, tokens: int) -> int:
    """In a text of so many equal tokens; of two tokens one at most is padding's."""
    texts = torch.arange(2)[:, None].expand(-1, tokens)
    (value,) = interpret(program, text_feeds(program, texts), [index])
    return int(value.max())
