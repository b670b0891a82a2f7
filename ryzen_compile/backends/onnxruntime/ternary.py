"""Products with weights of -1, 0 and +1 on ONNX Runtime's own operator for 2 bits, without rounding but the model's.

``MatMulNBits`` with 2 bits in blocks of 128 and ``accuracy_level`` 4 runs at the speed of memory, but rounds
activations over blocks, not over rows. So every block gets one channel more, an anchor: the row's largest magnitude,
whose weight is zero. A block's largest magnitude then is the row's, its step the row's 127th, and integers are those of
``ryzen::linear_ternary``; a block holds 127 channels of the model. The recipe's accuracy_level is about other products:
level 0 would do without anchors and takes several hundred times as long, and int8 codes in ``MatMulInteger`` are four
times the bytes.

The body is written against ``Maker``, so that what recognizes such a function (``structure``) builds it, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ryzen_compile.backends.onnxruntime.codebook_lookup import Maker, Value

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.backends.onnxruntime.emit import Emitter

BITS, BLOCK = 2, 128
RUN = BLOCK - 1  # channels of the model in a block
ZERO = 2  # the code of a weight of 0: the middle, where no zero points are stored


def blocks(width: int) -> int:
    """How many blocks a row of ``width`` channels takes."""
    return -(-width // RUN)


def anchored(width: int, rank: int) -> Callable[[Maker[Value], Value], tuple[Value]]:
    """``x`` (..., width) of ``rank`` dimensions -> (..., blocks * BLOCK): an anchor behind every ``RUN`` channels.

    The last run is filled up with zeros. (One Gather would do it all, and copies each channel by itself: it took as
    long as the product.)
    """
    count = blocks(width)
    rows = [0] * (rank - 1)  # as they are

    def body(e: Maker[Value], x: Value) -> tuple[Value]:
        if count * RUN > width:
            x = e.op("Pad", x, e.ints(0, count * RUN - width), None, e.ints(-1))
        cut = e.op("Reshape", x, e.ints(*rows, count, RUN))
        largest = e.op("ReduceMax", e.op("Abs", cut), e.ints(-2, -1), keepdims=1)
        anchors = e.op("Expand", largest, e.ints(*[1] * (rank - 1), count, 1))
        return (e.op("Reshape", e.op("Concat", cut, anchors, axis=-1), e.ints(*rows, count * BLOCK)),)

    return body


def linear_ternary(e: Emitter, x: ir.Value, packed: ir.Value, scale: ir.Value) -> tuple[ir.Value, ...]:
    """The rule of ``ryzen::linear_ternary``; for prompts apart, with ``wide_prompts``, int8 codes.

    Raises ``ValueError`` for codes and scales that the graph computes.
    """
    from ryzen_compile.backends.onnxruntime.emit import CONTRIB
    from ryzen_compile.backends.onnxruntime.integer import rows_by_bytes, static_size

    width, rows = static_size(x, -1), static_size(packed, 0)
    if e.options.wide_prompts and static_size(x, 1) != 1:
        weight, channel = e.once(("bytes", packed.name), lambda: _bytes(e, packed, scale, rows, width))
        return (rows_by_bytes(e, x, weight, channel),)
    codes, scales = e.once(("anchored", packed.name), lambda: _blocks(e, packed, scale, rows, width))
    rank = len(x.shape) if x.shape is not None else 0
    (wide,) = e.call("AnchorRows", (width, rank), anchored(width, rank), (x,))
    depth = blocks(width) * BLOCK
    sizes = {"K": depth, "N": rows, "bits": BITS, "block_size": BLOCK, "accuracy_level": 4}
    return (e.op("MatMulNBits", wide, codes, scales, domain=CONTRIB, **sizes),)


def _blocks(e: Emitter, packed: ir.Value, scale: ir.Value, rows: int, width: int) -> tuple[ir.Value, ir.Value]:
    """Codes (N, blocks, bytes) and scales (N, blocks) as ``MatMulNBits`` reads them."""
    count = blocks(width)

    def codes() -> np.ndarray:
        cut = np.full((rows, count * RUN), ZERO, np.uint8)
        cut[:, :width] = _weights(packed, width) + ZERO
        padded = np.full((rows, count, BLOCK), ZERO, np.uint8)
        padded[:, :, :RUN] = cut.reshape(rows, count, RUN)
        parts = [padded[:, :, i::4] << (2 * i) for i in range(4)]
        return parts[0] | parts[1] | parts[2] | parts[3]

    def scales() -> np.ndarray:
        return np.repeat(_scales(scale, rows)[:, None], count, axis=1)

    return (
        _lazy(e, codes, np.uint8, (rows, count, BLOCK * BITS // 8), f"{packed.name}_anchored"),
        _lazy(e, scales, np.float32, (rows, count), f"{packed.name}_scales"),
    )


def _bytes(e: Emitter, packed: ir.Value, scale: ir.Value, rows: int, width: int) -> tuple[ir.Value, ir.Value]:
    """(C, N) int8 and (N,) float32."""
    return (
        _lazy(e, lambda: _weights(packed, width).T, np.int8, (width, rows), f"{packed.name}_bytes"),
        _lazy(e, lambda: _scales(scale, rows), np.float32, (rows,), f"{packed.name}_channels"),
    )


def _lazy(e: Emitter, compute: Callable[[], np.ndarray], dtype: type, shape: tuple[int, ...], name: str) -> ir.Value:
    import onnx_ir as ir

    kind = ir.DataType.from_numpy(np.dtype(dtype))
    tensor = ir.LazyTensor(lambda: ir.Tensor(np.ascontiguousarray(compute(), dtype)), kind, ir.Shape(shape))
    return e.initializer(tensor, name)


def _weights(packed: ir.Value, width: int) -> np.ndarray:
    """(N, C) int8."""
    import torch

    from ryzen_compile.numerics import ternary

    codes: np.ndarray = ternary.unpack(torch.from_numpy(np.array(_constant(packed))), width).numpy()
    return codes


def _scales(scale: ir.Value, rows: int) -> np.ndarray:
    """(N,) float32."""
    return np.broadcast_to(_constant(scale).astype(np.float32), (rows,))


def _constant(value: ir.Value) -> np.ndarray:
    if value.const_value is None:
        raise ValueError(f"{value.name} is no constant")
    array: np.ndarray = value.const_value.numpy()
    return array
