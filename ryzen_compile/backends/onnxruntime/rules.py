"""One rule per operator of the dialect: which ONNX nodes it becomes.

A rule gets an emitter, the operator's tensors in the order of its schema (None where an optional one is absent) and
its other arguments by name; it returns the results in order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ryzen_compile.backends.onnxruntime.attention import attention, cached_attention, rotary
from ryzen_compile.backends.onnxruntime.codebook_lookup import codebook_embedding
from ryzen_compile.backends.onnxruntime.emit import CONTRIB, Emitter
from ryzen_compile.backends.onnxruntime.functions import activation, gated_act
from ryzen_compile.backends.onnxruntime.integer import embedding_nbits, linear_nbits
from ryzen_compile.backends.onnxruntime.sparsity import sparsify, sparsify_topk
from ryzen_compile.backends.onnxruntime.ternary import linear_ternary

Values = tuple[ir.Value, ...]
SKIP_RANKS = (2, 3)  # of the fused residual norms; any other rank is added first


def rms_norm(e: Emitter, x: ir.Value, weight: ir.Value | None, *, eps: float, unit_offset: bool) -> Values:
    return (_rms(e, x, _scale(e, x, weight, unit_offset), eps),)


def add_rms_norm(
    e: Emitter, x: ir.Value, residual: ir.Value, weight: ir.Value | None, *, eps: float, unit_offset: bool
) -> Values:
    scale = _scale(e, x, weight, unit_offset)
    if e.options.many_rows or _rank(x) not in SKIP_RANKS:
        total = e.op("Add", x, residual)
        return _rms(e, total, scale, eps), total
    out = e.ops("SkipSimplifiedLayerNormalization", x, residual, scale, outputs=4, domain=CONTRIB, epsilon=eps)
    return out[0], out[3]


def layer_norm(e: Emitter, x: ir.Value, weight: ir.Value | None, bias: ir.Value | None, *, eps: float) -> Values:
    return (_layer(e, x, _scale(e, x, weight, False), bias, eps),)


def add_layer_norm(
    e: Emitter, x: ir.Value, residual: ir.Value, weight: ir.Value | None, bias: ir.Value | None, *, eps: float
) -> Values:
    scale = _scale(e, x, weight, False)
    if e.options.many_rows or _rank(x) not in SKIP_RANKS:
        total = e.op("Add", x, residual)
        return _layer(e, total, scale, bias, eps), total
    out = e.ops("SkipLayerNormalization", x, residual, scale, bias, outputs=4, domain=CONTRIB, epsilon=eps)
    return out[0], out[3]


def linear(e: Emitter, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> Values:
    return linear_act(e, x, weight, bias, act="none")


def linear_act(e: Emitter, x: ir.Value, weight: ir.Value, bias: ir.Value | None, *, act: str) -> Values:
    return (activation(e, _matmul(e, x, weight), act, bias),)


def activate(e: Emitter, x: ir.Value, *, act: str) -> Values:
    out = activation(e, x, act)
    e.activated[out] = act
    return (out,)


def gated_linear(e: Emitter, x: ir.Value, weight: ir.Value, *, act: str) -> Values:
    return gated_activation(e, _matmul(e, x, weight), act=act)


def gated_activation(e: Emitter, x: ir.Value, *, act: str) -> Values:
    return e.call("GatedAct", (act,), gated_act(act), (x,))


RULES: dict[str, Callable[..., Values]] = {
    "activation": activate,
    "add_layer_norm": add_layer_norm,
    "add_rms_norm": add_rms_norm,
    "attention": attention,
    "cached_attention": cached_attention,
    "codebook_embedding": codebook_embedding,
    "embedding_nbits": embedding_nbits,
    "gated_activation": gated_activation,
    "gated_linear": gated_linear,
    "layer_norm": layer_norm,
    "linear": linear,
    "linear_act": linear_act,
    "linear_nbits": linear_nbits,
    "linear_ternary": linear_ternary,
    "rms_norm": rms_norm,
    "rotary": rotary,
    "sparsify": sparsify,
    "sparsify_topk": sparsify_topk,
}


def _matmul(e: Emitter, x: ir.Value, weight: ir.Value) -> ir.Value:
    """``weight`` (N, C) is turned to (C, N); folding makes that the stored form."""
    return e.op("MatMul", x, e.op("Transpose", weight, perm=[1, 0]))


def _rms(e: Emitter, x: ir.Value, scale: ir.Value, eps: float) -> ir.Value:
    return e.op("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=eps, stash_type=1)


def _layer(e: Emitter, x: ir.Value, scale: ir.Value, bias: ir.Value | None, eps: float) -> ir.Value:
    return e.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=eps)


def _rank(x: ir.Value) -> int:
    return len(x.shape) if x.shape is not None else 0


def _scale(e: Emitter, x: ir.Value, weight: ir.Value | None, unit_offset: bool) -> ir.Value:
    """The operators want a scale: ones for none, and Gemma's ``1 + w`` as an expression to fold."""
    if weight is None:
        if x.shape is None or not isinstance(x.shape[-1], int):
            raise ValueError(f"the last dimension of {x.name} must be static, its shape is {x.shape}")
        width = x.shape[-1]
        ones: ir.Value = e.once(("ones", width), lambda: e.constant(np.ones(width)))
        return ones
    return e.op("Add", weight, e.constant(1.0)) if unit_offset else weight
