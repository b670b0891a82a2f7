"""Cross-entropy of a linear head on a GPU: the kernels of ``ryzen::linear_cross_entropy``, its gradients and backward.

Of a chunk of rows, cuBLAS writes the logits into a buffer that all chunks share, one program per row takes the row's
loss and puts the gradient in place of its logits, and two products bring that to ``h`` and ``w`` (after Wijmans et al.,
"Cut Your Losses", 2024, and Liger, 2024). The buffer is a sixteenth of all logits, or 1024 rows of them.

Programs: a chunk of a long batch has 1024 rows or more, eight for each of 132 SMs. Of a short batch the SMs are not
full, but the products then read all of ``w`` three times, which a row's own 3 V elements are nothing against.

Scales: the buffer holds ``(softmax - onehot) * unit / count``, the products multiply by ``1 / unit`` as they round, and
``unit`` is a power of two of about N. With the mean's ``1 / count`` in the buffer alone, float16 would round nearly all
of the softmax to 0. ``count`` stays on the device.

``dw`` is summed in the type of ``w``, rounded once for each chunk. There are 16 at most, whatever N: measured in
bfloat16, an NMSE of 2e-5 (of 3e-6 when rounded once, 1e-3 after 512 chunks). Summing in float32 instead takes twice the
memory of ``dw``, which at C 4k is eight buffers of 1024 rows, and twice its traffic for each chunk.

Logits are rounded to the type of ``h`` in the buffer, as a linear layer would round them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.kernels import launch
from ryzen_compile.ops.loss import expect_inputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHUNKS = 16  # at most, where each one rounds dw
ROWS = 1024  # of a chunk at least: what keeps the products efficient
TILE = 128  # rows of a product's block: chunks are cut between them
ALIGNED = 16  # elements: rows of the buffer begin where wide loads and cuBLAS's fast kernels can read them
MOST_UNIT = 1 << 15  # what float16 still holds
LOAD_BYTES = 16  # of one thread at a time
BLOCKS = ((4096, 8), (2048, 4), (8192, 16), (16384, 32), (8192, 8), (16384, 16))  # (elements, warps) to choose from
LEAST_BLOCK = 256
SCALED = 4096  # elements of one program


@triton.jit
def _capped(z: tl.tensor, softcap: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    # softcap * tanh(z / softcap) and its derivative, by the exponential of a negative number, which cannot overflow;
    # where 1 - tanh^2 is small, computed as written here it would lose its digits.
    decay = tl.exp(tl.abs(z) * (-2.0 / softcap))
    inverse = 1.0 / (1.0 + decay)
    bounded = (1.0 - decay) * inverse * softcap
    return tl.where(z < 0, -bounded, bounded), 4.0 * decay * inverse * inverse


@triton.jit
def _scores(
    row: tl.tensor,  # (stride,), one row of the buffer
    start: tl.tensor,
    V: tl.tensor,
    stride: tl.tensor,
    softcap: tl.tensor,
    CAPPED: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # (BLOCK // LANES, LANES): -inf beyond V, and the soft cap's derivative; pointers and mask
    group = tl.arange(0, BLOCK // LANES)[:, None]
    column = group * LANES + tl.arange(0, LANES)[None, :]
    # The mask is one of whole groups, which a thread loads and stores at once whatever V is: stride is a multiple of
    # LANES. Between V and stride is padding, which may hold anything, even NaN, and which nothing else reads.
    there = group * LANES < stride - start
    at = row + start + column
    score = tl.load(at, mask=there, other=0.0).to(tl.float32)
    slope = 1.0
    if CAPPED:
        score, slope = _capped(tl.where(column < V - start, score, 0.0), softcap)
    return tl.where(column < V - start, score, float("-inf")), slope, at, there


@triton.jit
def _log_sum(
    row: tl.tensor,
    V: tl.tensor,
    stride: tl.tensor,
    softcap: tl.tensor,
    CAPPED: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:  # () float32, log(sum(exp(scores)))
    # Maxima and sums by group, so that a thread needs no other one before the end of the row. The first maximum is the
    # least finite number: a difference from it is never that of two infinities.
    peak = tl.full((BLOCK // LANES,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK // LANES,), tl.float32)
    for start in range(0, V, BLOCK):
        score, _, _, _ = _scores(row, start, V, stride, softcap, CAPPED, LANES, BLOCK)
        higher = tl.maximum(peak, tl.max(score, 1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(score - higher[:, None]), 1)
        peak = higher
    top = tl.max(peak, 0)
    return top + tl.log(tl.sum(total * tl.exp(peak - top), 0))


@triton.jit
def _cross_entropy_kernel(
    logits: tl.tensor,  # (rows, stride), the first V of each row; with GRADS it comes to hold their gradient
    labels: tl.tensor,  # (rows,) int64
    losses: tl.tensor,  # (rows,) float32
    share: tl.tensor,  # () float32, what the gradient is multiplied by
    V: tl.tensor,
    stride: tl.tensor,  # a multiple of ALIGNED
    ignore_index: tl.tensor,
    softcap: tl.tensor,
    CAPPED: tl.constexpr,
    GRADS: tl.constexpr,
    LANES: tl.constexpr,  # elements that one thread loads at once
    BLOCK: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64)  # int64: rows * stride overflows int32 for a large vocabulary
    row = logits + place * stride
    label = tl.load(labels + place)
    group = tl.arange(0, BLOCK // LANES)[:, None]
    column = group * LANES + tl.arange(0, LANES)[None, :]
    if label == ignore_index:
        tl.store(losses + place, 0.0)
        if GRADS:
            nothing = tl.zeros((BLOCK // LANES, LANES), logits.dtype.element_ty)
            for start in range(0, V, BLOCK):
                tl.store(row + start + column, nothing, mask=group * LANES < stride - start)
    else:
        known = (label >= 0) & (label < V)
        # Read before the second sweep overwrites it; the reductions between them are barriers.
        hit = tl.load(row + label, mask=known, other=0.0).to(tl.float32)
        if CAPPED:
            hit, _ = _capped(hit, softcap)
        log_sum = _log_sum(row, V, stride, softcap, CAPPED, LANES, BLOCK)
        tl.store(losses + place, tl.where(known, log_sum - hit, float("nan")))
        if GRADS:
            scale = tl.where(known, tl.load(share), float("nan"))
            own = tl.where(known, label, -1).to(tl.int32)  # as columns are: half the work of comparing each to an int64
            last = (tl.cdiv(V, BLOCK) - 1) * BLOCK
            for back in range(0, V, BLOCK):  # from the end, which the caches still hold
                start = last - back
                score, slope, at, there = _scores(row, start, V, stride, softcap, CAPPED, LANES, BLOCK)
                grad = tl.exp(score - log_sum)
                grad = tl.where(column == own - start, grad - 1.0, grad) * (slope * scale)
                tl.store(at, grad.to(logits.dtype.element_ty), mask=there)


@triton.jit
def _scale_kernel(
    x: tl.tensor,  # (n,)
    factor: tl.tensor,  # () float32
    out: tl.tensor,  # (n,)
    n: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < n)


def linear_cross_entropy(h: Tensor, w: Tensor, labels: Tensor, ignore_index: int, softcap: float) -> Tensor:
    """The operator ``ryzen::linear_cross_entropy``: the loss alone.

    A label outside of 0..V-1 other than ``ignore_index`` makes its row's loss and so the mean NaN; an error would make
    the host wait. Raises ``UsageError`` for arguments that do not fit together, ``UnsupportedError`` for float64 and
    for tensors that are not on a GPU (unless Triton interprets its kernels).
    """
    _expect("linear_cross_entropy", h, w, labels, softcap)
    sweep = _Sweep(w, labels, ignore_index, softcap, min(len(h), ROWS), 0)
    with launch.on(h):
        for _ in sweep.chunks(h.contiguous()):
            pass
        return sweep.loss()


def linear_cross_entropy_grads(
    h: Tensor, w: Tensor, labels: Tensor, ignore_index: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``ryzen::linear_cross_entropy_grads``: the loss, and its gradients by ``h`` and ``w``.

    A label out of range makes NaN of the loss, of its row of the first gradient and of all the second. A row whose
    label is ignored adds nothing to either, but NaN in its ``h`` is NaN times 0 in the second. Raises as
    ``linear_cross_entropy``.
    """
    _expect("linear_cross_entropy_grads", h, w, labels, softcap)
    h, w = h.contiguous(), w.contiguous()
    dh, dw = launch.empty(h.shape, h.dtype, h.device), launch.empty(w.shape, w.dtype, w.device)
    unit = 1 << max(min(len(h), MOST_UNIT), 1).bit_length() - 1
    sweep = _Sweep(w, labels, ignore_index, softcap, chunk_rows(len(h)), unit)
    with launch.on(h):
        if not len(h):
            dw.zero_()
        for rows, by_logits in sweep.chunks(h):
            torch.addmm(dh[rows], by_logits, w, beta=0, alpha=1 / unit, out=dh[rows])
            torch.addmm(dw, by_logits.T, h[rows], beta=1 if rows.start else 0, alpha=1 / unit, out=dw)
        return sweep.loss(), dh, dw


def linear_cross_entropy_backward(grad_loss: Tensor, gradient: Tensor) -> Tensor:
    """The operator ``ryzen::linear_cross_entropy_backward``: ``gradient`` (...) times the scalar ``grad_loss``.

    Raises ``UsageError`` for more than a scalar, ``UnsupportedError`` as ``linear_cross_entropy``.
    """
    op = "linear_cross_entropy_backward"
    if grad_loss.numel() != 1:
        raise UsageError(f"{op}: grad_loss must be a scalar, got {tuple(grad_loss.shape)}")
    _expect_dtype(op, gradient)
    device = launch.expect_device(op, grad_loss=grad_loss, gradient=gradient)
    out = launch.empty(gradient.shape, gradient.dtype, device)
    if out.numel():
        with launch.on(gradient):
            _scale_kernel[(triton.cdiv(out.numel(), SCALED),)](
                gradient.contiguous(), grad_loss.float(), out, out.numel(), BLOCK=SCALED, num_warps=8
            )
    return out


def chunk_rows(rows: int) -> int:
    """How many of ``rows`` to take at a time where gradients are summed: of even size, and at most ``CHUNKS`` times."""
    chunks = max(min(rows // ROWS, CHUNKS), 1)
    return min(triton.cdiv(triton.cdiv(rows, chunks), TILE) * TILE, rows)


def _expect(op: str, h: Tensor, w: Tensor, labels: Tensor, softcap: float) -> None:
    expect_inputs(op, h, w, labels, softcap)
    _expect_dtype(op, h)
    launch.expect_device(op, h=h, w=w, labels=labels)


def _expect_dtype(op: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise UnsupportedError(f"{op}: the kernel takes {', '.join(map(str, DTYPES))}, got {x.dtype}")


class _Sweep:
    """Rows chunk by chunk: logits, losses, and gradients by logits."""

    def __init__(
        self,
        w: Tensor,  # (V, C)
        labels: Tensor,  # (N,)
        ignore_index: int,
        softcap: float,
        size: int,  # of a chunk, in rows
        unit: int,  # see above; 0 for no gradients
    ) -> None:
        self._w, self._labels = w.contiguous(), labels.contiguous()
        self._ignore_index, self._softcap = ignore_index, float(softcap)
        self._size, self._grads = size, unit > 0
        stride = triton.cdiv(len(w), ALIGNED) * ALIGNED
        self._buffer = launch.empty((size, stride), w.dtype, w.device)
        self._losses = launch.empty(labels.shape, torch.float32, w.device)
        self._count = (labels != ignore_index).sum().clamp(min=1)
        self._share = unit / self._count.float()

    def chunks(self, h: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Of ``h`` (N, C), contiguous: which rows, and what the buffer holds of them (rows, V), until the next."""
        if not len(h):
            return
        config = self._config()
        for start in range(0, len(h), self._size):
            rows = slice(start, min(start + self._size, len(h)))
            part = self._buffer[: rows.stop - start, : len(self._w)]
            torch.mm(h[rows], self._w.T, out=part)
            self._launch(rows, config)
            yield rows, part

    def loss(self) -> Tensor:
        return (self._losses.sum(dtype=torch.float64) / self._count).float()

    def _launch(self, rows: slice, config: triton.Config) -> None:
        _cross_entropy_kernel[(rows.stop - rows.start,)](
            self._buffer,
            self._labels[rows],
            self._losses[rows],
            self._share,
            len(self._w),
            self._buffer.stride(0),
            self._ignore_index,
            self._softcap,
            CAPPED=self._softcap > 0,
            GRADS=self._grads,
            LANES=LOAD_BYTES // self._buffer.element_size(),
            **config.all_kwargs(),
        )

    def _config(self) -> triton.Config:
        """Chosen before the buffer holds anything, for measuring overwrites it."""
        widest = max(triton.next_power_of_2(len(self._w)), LEAST_BLOCK)
        fitting = [(block, warps) for block, warps in BLOCKS if block <= widest] or [(widest, launch.warps(widest))]
        candidates = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in fitting]
        sizes = launch.bucket(len(self._w)), launch.bucket(self._size)
        key = (self._buffer.dtype, *sizes, self._grads, self._softcap > 0)
        run = lambda config: self._launch(slice(0, self._size), config)
        return launch.tuned("cross_entropy", key, candidates, run, self._buffer.device)
