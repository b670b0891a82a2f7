"""Attention over the cache as one GroupQueryAttention, and whatever has to happen around it.

The operator appends, rotates and attends in place. On a CPU it wants a head size divisible by 8, and to rotate inside
also one divisible by 16 with a table whose columns are divisible by 8. Other heads are padded with zeros in the graph
(and so in the cache); other rotations happen in front of it, in RotaryEmbedding, which takes any size. It stores
rows as floats or as integers with fixed scales; keys and values alike.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ryzen_compile.backends.onnxruntime.emit import CONTRIB, Emitter
from ryzen_compile.backends.onnxruntime.functions import full_attention
from ryzen_compile.errors import UnsupportedError
from ryzen_compile.numerics.rows import RowFormat

HEAD_MULTIPLE = 8
ROLLING_MULTIPLE = {32: 8, 8: 16, 4: 32}  # by the bits of a channel, where the operator drops old rows by itself
ROTARY_HEAD_MULTIPLE = 16
ROTARY_TABLE_MULTIPLE = 8
HIDDEN = -1e30  # added to a score that padding hides: low enough for any scores, high enough to stay finite
CACHE_FORMATS = ("fp32", "int8", "int4")


def padded_head_dim(d: int, bits: int = 32, *, rolling: bool = False) -> int:
    """The smallest head size that GroupQueryAttention takes and that holds ``d`` channels, stored in ``bits`` each."""
    multiple = ROLLING_MULTIPLE[bits] if rolling else HEAD_MULTIPLE
    return -(-d // multiple) * multiple


def attention(
    e: Emitter,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    sinks: ir.Value | None,
    mask: ir.Value | None,
    *,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
) -> tuple[ir.Value, ...]:
    """A whole sequence attending to itself, for Programs without a cache: ONNX Runtime's MultiHeadAttention where it
    can say it, else a model-local function."""
    kv_heads, heads = _dim(k, 1), _dim(q, 1)
    if not (causal or window or softcap) and sinks is None and heads == kv_heads:
        return (_multi_head(e, q, k, v, mask, heads, scale),)
    variant = (kv_heads, heads // kv_heads, scale, window, softcap, bool(causal), mask is not None)
    inputs = (q, k, v, *(x for x in (mask, sinks) if x is not None))
    return e.call("Attention", (*variant, sinks is not None), full_attention(*variant), inputs)


def _multi_head(
    e: Emitter, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, heads: int, scale: float
) -> ir.Value:
    kept = None if mask is None else e.once(("kept", mask), lambda: e.op("Cast", mask, to=ir.DataType.INT32))
    inputs = (_tokens_first(e, q), _tokens_first(e, k), _tokens_first(e, v), None, kept)
    attributes = {"num_heads": heads, "scale": scale, "mask_filter_value": HIDDEN}
    out = e.op("MultiHeadAttention", *inputs, domain=CONTRIB, **attributes)
    if q.shape is not None:
        out.shape, out.type = ir.Shape([q.shape[0], q.shape[2], heads * _dim(v, 3)]), q.type
    return e.op("Reshape", out, e.ints(0, 0, heads, -1))


def _tokens_first(e: Emitter, x: ir.Value) -> ir.Value:
    """``x`` (B, H, T, D) as (B, T, H D); where it was made of that, both turns cancel out afterwards."""
    return e.op("Reshape", e.op("Transpose", x, perm=[0, 2, 1, 3]), e.ints(0, 0, _dim(x, 1) * _dim(x, 3)))


def rotary(
    e: Emitter, x: ir.Value, positions: ir.Value, cos: ir.Value, sin: ir.Value, *, interleaved: bool
) -> tuple[ir.Value, ...]:
    """``x`` (B, H, T, D) and positions (B, T), rotated by the tables (N, R)."""
    return (_rotate(e, x, positions, cos, sin, _dim(x, 1), _dim(x, 3), interleaved),)


def cached_attention(
    e: Emitter,
    q: ir.Value,
    k: ir.Value | None,
    v: ir.Value | None,
    k_cache: ir.Value,
    v_cache: ir.Value,
    lengths: ir.Value,
    cos: ir.Value | None,
    sin: ir.Value | None,
    sinks: ir.Value | None,
    k_scale: ir.Value | None,
    v_scale: ir.Value | None,
    k_mean: ir.Value | None,
    *,
    heads: int,
    scale: float,
    window: int,
    softcap: float,
    interleaved: bool,
    k_format: str,
    v_format: str,
    turned: int,
    rolling: int,
) -> tuple[ir.Value, ...]:
    """``ryzen::cached_attention``: returns the output (B, T, H D'), and both caches, whose heads may be padded."""
    if k_format != v_format or k_format not in CACHE_FORMATS or turned or k_mean is not None:
        raise UnsupportedError(
            f"GroupQueryAttention cannot keep keys as {k_format} and values as {v_format}",
            hint=f"both as one of {', '.join(CACHE_FORMATS)}, or backend='eager'",
        )
    kv_heads = _dim(k_cache, 1)
    form = RowFormat.parse(k_format)
    d, d_value = form.channels(_dim(k_cache, 3)), form.channels(_dim(v_cache, 3))
    width = padded_head_dim(max(d, d_value), form.bits, rolling=bool(rolling))
    tables = _tables_inside(e, cos, sin, width, interleaved)
    rotate_before = cos is not None and sin is not None and tables is None
    if k is None and (rotate_before or d != d_value):
        q, k, v = e.ops("Split", q, e.ints(heads * d, kv_heads * d, kv_heads * d_value), outputs=3, axis=-1)
    if rotate_before and cos is not None and sin is not None and k is not None:
        positions = _positions(e, q, lengths)
        q = _rotate(e, q, positions, cos, sin, heads, d, interleaved)
        k = _rotate(e, k, positions, cos, sin, kv_heads, d, interleaved)
    if k is None or v is None:
        q = _pad(e, q, heads + 2 * kv_heads, d, width)
    else:
        q = _pad(e, q, heads, d, width)
        k, v = _pad(e, k, kv_heads, d, width), _pad(e, v, kv_heads, d_value, width)
    last, total = e.once(("lengths", lengths), lambda: _row_lengths(e, lengths))
    attributes: dict[str, object] = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": scale}
    if window:
        attributes["local_window_size"] = window
    if rolling:
        attributes["sliding_window_cache"] = 1
    if k_scale is not None and v_scale is not None:
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": form.bits}
        k_scale, v_scale = _pad_scale(e, k_scale, d, width), _pad_scale(e, v_scale, d_value, width)
    if softcap:
        attributes["softcap"] = softcap
    if tables is not None:
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(interleaved)}
    turn = tables or (None, None)
    inputs = (q, k, v, k_cache, v_cache, last, total, *turn, None, None, sinks, k_scale, v_scale)
    out, present_k, present_v = e.ops("GroupQueryAttention", *inputs, outputs=3, domain=CONTRIB, **attributes)
    if width != d_value:
        out = e.op("Reshape", out, e.ints(0, 0, heads, width))
        out = e.op("Slice", out, e.ints(0), e.ints(d_value), e.ints(3))
        out = e.op("Reshape", out, e.ints(0, 0, heads * d_value))
    return out, present_k, present_v


def _dim(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise ValueError(f"dimension {axis} of {value.name} must be static, its shape is {value.shape}")
    return size


def _pad_scale(e: Emitter, scale: ir.Value, d: int, width: int) -> ir.Value:
    """(1, K, 1, d) -> (1, K, 1, width), ones for the channels that are always zero."""
    if d == width:
        return scale
    ones = e.constant(np.ones((1, _dim(scale, 1), 1, width - d), np.float32))
    return e.op("Concat", scale, ones, axis=3)


def _tables_inside(
    e: Emitter, cos: ir.Value | None, sin: ir.Value | None, width: int, interleaved: bool
) -> tuple[ir.Value, ir.Value] | None:
    """The tables with which the operator can rotate inside, or None. A narrow interleaved table is widened by
    rotations of zero, which leave their channels alone; the half-split form pairs by the table's width, so cannot."""
    if cos is None or sin is None or width % ROTARY_HEAD_MULTIPLE:
        return None
    missing = -_dim(cos, 1) % ROTARY_TABLE_MULTIPLE
    if not missing:
        return cos, sin
    if not interleaved:
        return None
    rows = _dim(cos, 0)

    def widen() -> tuple[ir.Value, ir.Value]:
        ones, zeros = (e.constant(fill((rows, missing), np.float32)) for fill in (np.ones, np.zeros))
        return e.op("Concat", cos, ones, axis=1), e.op("Concat", sin, zeros, axis=1)

    widened: tuple[ir.Value, ir.Value] = e.once(("wide tables", cos, sin), widen)
    return widened


def _row_lengths(e: Emitter, lengths: ir.Value) -> tuple[ir.Value, ir.Value]:
    """GroupQueryAttention's own form of ``lengths`` (B,): each row's last position (B,), and the longest row, int32."""
    narrow = e.op("Cast", lengths, to=ir.DataType.INT32)
    last = e.op("Sub", narrow, e.constant(1, np.int32))
    return last, e.op("ReduceMax", narrow, keepdims=0)


def _positions(e: Emitter, x: ir.Value, lengths: ir.Value) -> ir.Value:
    """The new tokens' positions (B, T): T comes from ``x`` (B, T, ...)."""

    def build() -> ir.Value:
        count = e.op("Shape", x, start=1, end=2)
        ramp = e.op("Range", e.constant(0, np.int64), e.op("Squeeze", count, e.ints(0)), e.constant(1, np.int64))
        return e.op("Add", e.op("Sub", e.op("Unsqueeze", lengths, e.ints(1)), count), ramp)

    positions: ir.Value = e.once(("positions", lengths), build)
    return positions


def _rotate(
    e: Emitter,
    x: ir.Value,
    positions: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    heads: int,
    d: int,
    interleaved: bool,
) -> ir.Value:
    """``x`` (B, T, heads d) or (B, heads, T, d)."""
    rotated = 2 * _dim(cos, 1)
    attributes = {"interleaved": int(interleaved), "num_heads": heads}
    if rotated != d:
        attributes["rotary_embedding_dim"] = rotated
    return e.op("RotaryEmbedding", x, positions, cos, sin, domain=CONTRIB, **attributes)


def _pad(e: Emitter, x: ir.Value, heads: int, d: int, width: int) -> ir.Value:
    """(B, T, heads d) -> (B, T, heads width), zeros behind every head."""
    if d == width:
        return x
    x = e.op("Reshape", x, e.ints(0, 0, heads, d))
    x = e.op("Pad", x, e.ints(0, 0, 0, 0, 0, 0, 0, width - d))
    return e.op("Reshape", x, e.ints(0, 0, heads * width))
