"""Rotary position embedding on a GPU: the Triton kernel of ``ryzen::rotary`` (Su et al., 2021), its own backward.

Each program turns several heads of one token, which read their angles once. Every product and every sum is rounded by
itself, as in the reference: what is computed in float32 is equal to the bit. ``turned`` is for other kernels as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.kernels import launch

ELEMENTS = 2048  # of one program at most
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def turned(
    heads: tl.tensor,  # places of the heads' first channels, of any shape that broadcasts against
    channel: tl.tensor,  # integers: which channels of a head to compute, with a leading axis of heads
    wanted: tl.tensor,  # bool, of the shape of both
    cos: tl.tensor | None,  # (N, R); none: nothing turns
    sin: tl.tensor | None,  # (N, R)
    position: tl.tensor,  # int64: of the token
    positions: tl.tensor,  # N: at any other position, channels that would turn are NaN
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> tl.tensor:  # float32
    """Those channels of the turned heads: x cos - partner sin for the first channel of a pair, + for the second."""
    x = tl.load(heads + channel, mask=wanted, other=0.0).to(tl.float32)
    if cos is not None:
        if INTERLEAVED:
            pair, second = channel // 2, channel % 2 == 1
            partner = channel ^ 1
        else:
            pair, second = channel % R, channel >= R
            partner = tl.where(second, channel - R, channel + R)
        turns = channel < 2 * R
        known = channel < tl.where((position >= 0) & (position < positions), 2 * R, 0)
        y = tl.load(heads + partner, mask=wanted & turns, other=0.0).to(tl.float32)
        c = tl.load(cos + position * R + pair, mask=known, other=float("nan")).to(tl.float32)
        s = tl.load(sin + position * R + pair, mask=known, other=float("nan")).to(tl.float32)
        x = tl.where(turns, x * c + y * tl.where(second, s, -s), x)
    return x


@triton.jit(do_not_specialize=["tokens", "heads", "count"])
def _rotary_kernel(
    x: tl.tensor,  # (B, H, T, D), channels next to each other
    positions: tl.tensor,  # (B, T) integers
    cos: tl.tensor,  # (N, R) contiguous
    sin: tl.tensor,
    out: tl.tensor,  # (B, H, T, D) contiguous
    x_batch: tl.tensor,  # strides
    x_head: tl.tensor,
    x_token: tl.tensor,
    positions_batch: tl.tensor,
    positions_token: tl.tensor,
    tokens: tl.tensor,  # T
    heads: tl.tensor,  # H
    count: tl.tensor,  # N
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,  # of one program, a power of two
    CHANNELS: tl.constexpr,  # a power of two >= D
) -> None:
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    wanted = (head < heads) & (channel < D)
    position = tl.load(positions + batch * positions_batch + token * positions_token).to(tl.int64)
    first = x + batch * x_batch + token * x_token + head * x_head
    y = turned(first, channel, wanted, cos, sin, position, count, R, INTERLEAVED)
    place = ((batch * heads + head) * tokens + token) * D + channel
    tl.store(out + place, y.to(out.dtype.element_ty), mask=wanted)


def rotary(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The operator ``ryzen::rotary``: ``x`` (B, H, T, D) of float32, float16 or bfloat16 -> the same.

    A position that the tables do not have gives NaN in the channels that turn: nothing outside of them is read. Raises
    ``UsageError`` for tensors that do not fit together, ``UnsupportedError`` for other types and for tensors that are
    not on a GPU (unless Triton interprets its kernels).
    """
    if x.ndim != 4:
        raise UsageError(f"rotary: x must be (B, H, T, D), got {tuple(x.shape)}")
    batch, heads, tokens, dim = x.shape
    if positions.shape != (batch, tokens) or positions.is_floating_point():
        raise UsageError(
            f"rotary: positions must be integers ({batch}, {tokens}), got {positions.dtype} {tuple(positions.shape)}"
        )
    expect_tables("rotary", cos, sin, dim)
    expect_floats("rotary", x=x, cos=cos, sin=sin)
    device = launch.expect_device("rotary", x=x, positions=positions, cos=cos, sin=sin)
    out = launch.empty(x.shape, x.dtype, device)
    if not out.numel():
        return out
    x = x if x.stride(3) == 1 else x.contiguous()
    channels = triton.next_power_of_2(dim)
    together = min(triton.next_power_of_2(heads), max(ELEMENTS // channels, 1))
    with launch.on(x):
        _rotary_kernel[(batch * tokens, triton.cdiv(heads, together))](
            x,
            positions,
            cos.contiguous(),
            sin.contiguous(),
            out,
            *x.stride()[:3],
            *positions.stride(),
            tokens,
            heads,
            len(cos),
            D=dim,
            R=cos.shape[1],
            INTERLEAVED=interleaved,
            HEADS=together,
            CHANNELS=channels,
            num_warps=launch.warps(together * channels),
            enable_fp_fusion=False,  # no fused multiply-add: it rounds once where the formula rounds twice
        )
    return out


def expect_tables(op: str, cos: Tensor, sin: Tensor, dim: int) -> None:
    """Raises ``UsageError`` unless both are (N, R) with ``2 R <= dim``, R at least 1."""
    if cos.ndim != 2 or cos.shape != sin.shape or not 0 < 2 * cos.shape[1] <= dim:
        raise UsageError(
            f"{op}: cos and sin must be (N, R) with 2 R between 2 and {dim}, got {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )


def expect_floats(op: str, **tensors: Tensor | None) -> None:
    """Raises ``UnsupportedError`` for a tensor of another type than the kernels compute with."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise UnsupportedError(
                f"{op}: {name} must be float32, float16 or bfloat16, got {tensor.dtype}",
                hint="the operator's reference computes the others",
            )
