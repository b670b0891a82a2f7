"""Bodies of the model-local functions: what ONNX Runtime has no single operator for.

Each is a function of an emitter and its parameters. The runtime inlines them when it loads the model; to a reader of
the file they are one node with a name.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ryzen_compile.backends.onnxruntime.emit import CONTRIB, Emitter


def activation(e: Emitter, x: ir.Value, act: str, bias: ir.Value | None = None) -> ir.Value:
    """``act(x + bias)`` in the fewest nodes; ``act`` is a name in ``ops.ACTIVATIONS``."""
    if act == "gelu_tanh":
        return e.op("FastGelu", x, bias, domain=CONTRIB)
    if act == "gelu" and bias is not None:
        return e.op("BiasGelu", x, bias, domain=CONTRIB)
    if bias is not None:
        x = e.op("Add", x, bias)
    if act == "none":
        return x
    if act == "silu":
        return e.op("QuickGelu", x, domain=CONTRIB, alpha=1.0)
    if act == "quick_gelu":
        return e.op("QuickGelu", x, domain=CONTRIB, alpha=1.702)
    if act == "gelu":
        return e.op("Gelu", x, domain=CONTRIB)
    if act == "relu2":
        y = e.op("Relu", x)
        return e.op("Mul", y, y)
    return e.op({"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}[act], x)


def gated_act(act: str) -> Callable[[Emitter, ir.Value], tuple[ir.Value, ...]]:
    """``act(first half) * second half`` of the last dimension."""

    def body(e: Emitter, x: ir.Value) -> tuple[ir.Value, ...]:
        gate, up = e.ops("Split", x, outputs=2, axis=-1, num_outputs=2)
        return (e.op("Mul", activation(e, gate, act), up),)

    return body


def full_attention(
    kv_heads: int, groups: int, scale: float, window: int, softcap: float, causal: bool, masked: bool = False
) -> Callable[..., tuple[ir.Value, ...]]:
    """``ryzen::attention`` in standard operators: q (B, H, T, D), k (B, K, T, D), v (B, K, T, D'), then mask (B, T) if
    ``masked``, and sinks (H,) if there are any.

    The query heads of one kv head become a dimension of their own, (B, K, G, T, D), so keys and values are never
    repeated.
    """

    def body(e: Emitter, q: ir.Value, k: ir.Value, v: ir.Value, *more: ir.Value) -> tuple[ir.Value, ...]:
        mask = more[0] if masked else None
        sinks = next(iter(more[masked:]), None)
        tail = e.op("Shape", q, start=2)  # T, D
        batch = e.op("Shape", q, start=0, end=1)
        q = e.op("Reshape", q, e.op("Concat", batch, e.ints(kv_heads, groups), tail, axis=0))
        keys = e.op("Transpose", e.op("Unsqueeze", k, e.ints(2)), perm=[0, 1, 2, 4, 3])
        scores = e.op("Mul", e.op("MatMul", q, keys), e.constant(scale))
        if softcap:
            cap = e.constant(softcap)
            scores = e.op("Mul", e.op("Tanh", e.op("Div", scores, cap)), cap)
        visible = _visible(e, q, window, causal, mask)
        if visible is not None:
            scores = e.op("Where", visible, scores, e.constant(-np.inf))
        length = e.op("Shape", q, start=3, end=4)
        if sinks is not None:
            column = e.op("Reshape", sinks, e.ints(1, kv_heads, groups, 1, 1))
            shape = e.op("Concat", batch, e.ints(kv_heads, groups), length, e.ints(1), axis=0)
            scores = e.op("Concat", scores, e.op("Expand", column, shape), axis=-1)
        weights = e.op("Softmax", scores, axis=-1)
        if sinks is not None:
            weights = e.op("Slice", weights, e.ints(0), e.ints(-1), e.ints(4))
        if mask is not None and (window or causal):  # padding in a window of padding sees nothing: NaN until here
            weights = e.op("Where", visible, weights, e.constant(0.0))
        out = e.op("MatMul", weights, e.op("Unsqueeze", v, e.ints(2)))
        out = e.op("Transpose", out, perm=[0, 3, 1, 2, 4])
        return (e.op("Reshape", out, e.ints(0, 0, kv_heads * groups, -1)),)

    return body


def _visible(e: Emitter, q: ir.Value, window: int, causal: bool, mask: ir.Value | None) -> ir.Value | None:
    """Bool, for scores (B, K, G, T, T): true where a query may look; None when it may look everywhere."""
    parts = []
    if causal or window:
        length = e.op("Squeeze", e.op("Shape", q, start=3, end=4), e.ints(0))
        key = e.op("Range", e.constant(0, np.int64), length, e.constant(1, np.int64))
        query = e.op("Unsqueeze", key, e.ints(1))
        if causal:
            parts.append(e.op("LessOrEqual", key, query))
        if window:
            apart = e.op("Abs", e.op("Sub", key, query))
            parts.append(e.op("Less", apart, e.constant(window, np.int64)))
    if mask is not None:
        parts.append(e.op("Unsqueeze", e.op("Cast", mask, to=ir.DataType.BOOL), e.ints(1, 2, 3)))
    visible = None
    for part in parts:
        visible = part if visible is None else e.op("And", visible, part)
    return visible
