"""Activations without their small channels, as model-local functions of standard operators.

The threshold is an input, so that one function serves all layers. Its body is written against ``Maker``, so that what
recognizes such a function (``structure``) builds it, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ryzen_compile.backends.onnxruntime.codebook_lookup import Maker, Value

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.backends.onnxruntime.emit import Emitter


def sparsify(e: Emitter, x: ir.Value, *, threshold: float) -> tuple[ir.Value, ...]:
    return e.call("Sparsify", (), sparsify_body, (x, e.constant(threshold)))


def sparsify_topk(e: Emitter, x: ir.Value, *, keep: int) -> tuple[ir.Value, ...]:
    return e.call("SparsifyTopK", (keep,), _topk_body(keep), (x,))


def sparsify_body(e: Maker[Value], x: Value, threshold: Value) -> tuple[Value]:
    """``x`` (...), ``threshold`` (): 0 where ``|x|`` is below it."""
    return (e.op("Where", e.op("Less", e.op("Abs", x), threshold), e.constant(0.0), x),)


def _topk_body(keep: int) -> Callable[[Emitter, ir.Value], tuple[ir.Value, ...]]:
    def body(e: Emitter, x: ir.Value) -> tuple[ir.Value, ...]:
        magnitudes = e.op("Abs", x)
        largest, _ = e.ops("TopK", magnitudes, e.ints(keep), outputs=2, axis=-1)
        least = e.op("Slice", largest, e.ints(keep - 1), e.ints(keep), e.ints(-1))
        return (e.op("Where", e.op("Less", magnitudes, least), e.constant(0.0), x),)

    return body
