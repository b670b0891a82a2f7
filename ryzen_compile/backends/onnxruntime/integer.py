"""Products with, and lookups in, integer weights: ONNX Runtime's operators over the blocks as the Program has them.

``MatMulNBits`` reads codes (N, blocks, bytes), ``GatherBlockQuantized`` the same bytes as (V, bytes of a row): a head
tied to its embedding is stored once. For prompts there is a second form: the weights once more with 8 bits and one
scale per output channel, multiplied by activations rounded to 8 bits row by row. No row then depends on another, as it
would with ``DynamicQuantizeLinear``, whose one scale spans all rows: chunks of a prompt give what the whole does.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
import torch

from ryzen_compile.backends.onnxruntime.emit import CONTRIB, Emitter
from ryzen_compile.numerics.blockwise import BlockTensor, row_chunks

Values = tuple[ir.Value, ...]
ZERO = 128  # of the unsigned codes that rows are rounded to
LARGEST = 127.0
# The same for results of activations that are never far below 0: more codes are left for what is above.
ZEROS = {"relu": 0, "relu2": 0, "sigmoid": 0, **dict.fromkeys(("gelu", "gelu_tanh", "silu", "quick_gelu"), 24)}


def linear_nbits(
    e: Emitter,
    x: ir.Value,
    packed: ir.Value,
    scales: ir.Value,
    zeros: ir.Value | None,
    bias: ir.Value | None,
    *,
    bits: int,
    block: int,
) -> Values:
    width, rows = static_size(x, -1), static_size(packed, 0)
    if e.options.wide_prompts and static_size(x, 1) != 1:  # a single row, the pruned head's, gains nothing
        product = _wide_product(e, x, packed, scales, zeros, bits, block, width)
        return (e.op("Add", product, bias) if bias is not None else product,)
    return (
        e.op(
            "MatMulNBits",
            x,
            packed,
            scales,
            zeros,
            None,
            bias,
            domain=CONTRIB,
            K=width,
            N=rows,
            bits=bits,
            block_size=block,
            accuracy_level=e.options.accuracy_level,
        ),
    )


def embedding_nbits(
    e: Emitter,
    ids: ir.Value,
    packed: ir.Value,
    scales: ir.Value,
    zeros: ir.Value | None,
    *,
    width: int,
    bits: int,
    block: int,
) -> Values:
    rows, blocks, size = (static_size(packed, axis) for axis in range(3))
    table = e.op("Reshape", packed, e.ints(rows, blocks * size))
    out = e.op(
        "GatherBlockQuantized",
        table,
        ids,
        scales,
        zeros,
        domain=CONTRIB,
        bits=bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    if blocks * block != width:  # the padding of the last block
        out = e.op("Slice", out, e.ints(0), e.ints(width), e.ints(-1))
    return (out,)


def _wide_product(
    e: Emitter,
    x: ir.Value,
    packed: ir.Value,
    scales: ir.Value,
    zeros: ir.Value | None,
    bits: int,
    block: int,
    width: int,
) -> ir.Value:
    weight, channel = e.once(  # a weight may be multiplied with in several places
        ("bytes", packed.name), lambda: _byte_weight(e, packed, scales, zeros, bits, block, width)
    )
    return rows_by_bytes(e, x, weight, channel)


def rows_by_bytes(e: Emitter, x: ir.Value, weight: ir.Value, channel: ir.Value) -> ir.Value:
    """``x`` (..., C), rounded to 8 bits row by row, times ``weight`` (C, N) int8 with a scale for each channel (N,)."""
    middle = ZEROS.get(e.activated.get(x, ""), ZERO) if e.options.many_rows else ZERO
    step, codes = e.call("QuantizeRows", (middle,), partial(_quantize_rows, middle), (x,), outputs=2)
    one = e.once(("one",), lambda: e.constant(1.0))
    zero = e.once(("zero", middle), lambda: e.constant(middle, np.uint8))
    product = e.op("MatMulIntegerToFloat", codes, weight, one, channel, zero, domain=CONTRIB)
    return e.op("Mul", product, step)


def _quantize_rows(middle: int, e: Emitter, x: ir.Value) -> Values:
    """(step (..., 1), codes (..., C) uint8): each row over its own extremes, 0 as ``middle``; a row of zeros stays
    one."""
    last, least = e.ints(-1), e.constant(1e-30)
    most = e.op("ReduceMax", x, last)
    if middle == ZERO:
        most = e.op("Max", most, e.op("Neg", e.op("ReduceMin", x, last)), least)
        step = e.op("Mul", most, e.constant(1 / LARGEST))
    else:
        above = e.op("Mul", most, e.constant(1 / (255 - middle)))
        below = [e.op("Mul", e.op("ReduceMin", x, last), e.constant(-1 / middle))] if middle else []
        step = e.op("Max", above, *below, least)
    return step, e.op("QuantizeLinear", e.op("Div", x, step), e.constant(1.0), e.constant(middle, np.uint8))


def _byte_weight(
    e: Emitter,
    packed: ir.Value,
    scales: ir.Value,
    zeros: ir.Value | None,
    bits: int,
    block: int,
    width: int,
) -> tuple[ir.Value, ir.Value]:
    """(C, N) int8 and (N,) float32: the blocks again, rounded to 8 bits over each output channel's largest weight."""
    stored = [None if value is None else value.const_value for value in (packed, scales, zeros)]
    rows = static_size(packed, 0)

    def stored_tensor() -> BlockTensor:
        codes, steps, offsets = (None if t is None else torch.from_numpy(np.array(t.numpy())) for t in stored)
        if codes is None or steps is None:
            raise ValueError(f"{packed.name} is no constant")
        return BlockTensor.stored(codes, steps, offsets, bits, block, width)

    def weight() -> ir.Tensor:
        tensor, out = stored_tensor(), np.empty((width, rows), np.int8)
        for start, stop in row_chunks(rows, width):
            part = tensor.rows(start, stop).dequantize().numpy()
            out[:, start:stop] = np.rint(part / _channel_steps(part)[:, None]).T
        return ir.Tensor(out)

    def channel() -> ir.Tensor:
        tensor = stored_tensor()
        parts = (tensor.rows(start, stop).dequantize().numpy() for start, stop in row_chunks(rows, width))
        return ir.Tensor(np.concatenate([_channel_steps(part) for part in parts]))

    return (
        e.initializer(ir.LazyTensor(weight, ir.DataType.INT8, ir.Shape([width, rows])), f"{packed.name}_bytes"),
        e.initializer(ir.LazyTensor(channel, ir.DataType.FLOAT, ir.Shape([rows])), f"{packed.name}_channels"),
    )


def _channel_steps(table: np.ndarray) -> np.ndarray:
    """(N,) float32: what makes each row's largest magnitude 127."""
    steps: np.ndarray = np.maximum(np.abs(table).max(axis=1), 1e-30).astype(np.float32) / np.float32(LARGEST)
    return steps


def static_size(value: ir.Value, axis: int) -> int:
    """A static dimension; 0 for one that is symbolic."""
    size = value.shape[axis] if value.shape is not None else 0
    return size if isinstance(size, int) else 0
