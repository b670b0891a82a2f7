"""Block-wise integers: a row is cut into blocks, each with a scale and, for asymmetric formats, a zero point.

    w ≈ (code - zero) * scale

Codes are packed low bits first, as ONNX Runtime's ``MatMulNBits`` and ``GatherBlockQuantized`` read them. A format of 3
bits is stored in 4. The last block of a row is padded with codes that mean zero.

Symmetric codes reach one step further below zero than above it, so a scale carries a sign: the weight of the largest
magnitude, whatever its own sign, takes the lowest code and all levels are used. On Gaussian weights of 4 bits in
blocks of 32 that is 1.05 dB better than a positive scale which spans the same weights with one level idle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ryzen_compile.errors import UsageError

BITS = (2, 3, 4, 8)
BLOCKS = (16, 32, 64, 128, 256)
CHUNK_ELEMENTS = 1 << 20  # of a table worked on at a time: temporaries stay in the cache, and small beside the table
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # below it float32 loses digits, and processors flush to zero


@dataclass(frozen=True)
class BlockFormat:
    """``bits`` per code, ``block`` weights per scale. Symmetric codes stand around a zero point that is not stored.

    Raises ``UsageError`` for bits and blocks that are not among ``BITS`` and ``BLOCKS``.
    """

    bits: int = 4
    block: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (("bits", self.bits, BITS), ("block", self.block, BLOCKS)):
            if value not in known or isinstance(value, bool):
                choices = f"{', '.join(map(str, known[:-1]))} or {known[-1]}"
                raise UsageError(f"{name} must be {choices}, got {value!r}")

    @property
    def stored_bits(self) -> int:
        """Bits that a code takes in memory."""
        return 4 if self.bits == 3 else self.bits

    @property
    def zero_code(self) -> int:
        """The code of zero in a symmetric tensor."""
        return 1 << (self.stored_bits - 1)

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and largest code: 2 ** bits of them, around ``zero_code`` or from 0."""
        if not self.symmetric:
            return 0, (1 << self.bits) - 1
        half = 1 << (self.bits - 1)
        return self.zero_code - half, self.zero_code + half - 1

    @property
    def bits_per_weight(self) -> float:
        """Stored, with scales and zero points, for rows that blocks divide (and an even number of zero points)."""
        return self.stored_bits + (32 + (0 if self.symmetric else self.stored_bits)) / self.block

    def blocks(self, width: int) -> int:
        """How many blocks a row of ``width`` takes."""
        return -(-width // self.block)


@dataclass(frozen=True, eq=False)
class BlockTensor:
    """A matrix ``shape`` (N, K) of ``format``.

    ``packed`` (N, B, block * stored_bits / 8) uint8 with B = ceil(K / block), ``scales`` (N, B) float32, ``zeros``
    (N, ceil(B * stored_bits / 8)) uint8 packed like codes, or none for a symmetric format.
    """

    format: BlockFormat
    shape: tuple[int, int]
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    @classmethod
    def stored(
        cls, packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, block: int, width: int
    ) -> BlockTensor:
        """From the tensors as an operator holds them; ``bits`` are those stored, ``width`` is K."""
        return cls(BlockFormat(bits, block, zeros is None), (packed.shape[0], width), packed, scales, zeros)

    @classmethod
    def from_codes(
        cls, codes: Tensor, scales: Tensor, zero_points: Tensor | None, form: BlockFormat, shape: tuple[int, int]
    ) -> BlockTensor:
        """``codes`` (N, B, block), ``scales`` (N, B) and ``zero_points`` (N, B) of any number types.

        Codes are what is stored, not offsets from zero; any that fit in ``stored_bits`` are taken, whoever chose them.
        Those past K are replaced by the zero point. Raises ``UsageError`` when shapes do not fit, codes do not fit in
        their bits, or a scale is not finite.
        """
        rows, width = shape
        grid = (rows, form.blocks(width))
        _expect_shape("codes", codes, (*grid, form.block))
        _expect_grid(scales, zero_points, form, grid)
        _expect_codes("codes", codes, form)
        zeros = None
        if zero_points is not None:
            _expect_codes("zero points", zero_points, form)
            zeros = pack(zero_points, form.stored_bits)
        packed = pack(_cleared_padding(codes, zero_points, form, width), form.stored_bits)
        return cls(form, (rows, width), packed, scales.float().contiguous(), zeros)

    @classmethod
    def concat(cls, parts: Sequence[BlockTensor]) -> BlockTensor:
        """The rows of ``parts``, which share format and width, below each other. Raises ``UsageError`` if not."""
        if not parts:
            raise UsageError("there is nothing to join: the list of tensors is empty")
        first = parts[0]
        odd = next((p for p in parts if p.format != first.format or p.shape[1] != first.shape[1]), None)
        if odd is not None:
            raise UsageError(
                f"tensors of different formats or widths cannot be joined: "
                f"{first.format} of width {first.shape[1]}, {odd.format} of width {odd.shape[1]}"
            )
        zeros = None if first.zeros is None else torch.cat([p.zeros for p in parts if p.zeros is not None])
        return cls(
            first.format,
            (sum(p.shape[0] for p in parts), first.shape[1]),
            torch.cat([p.packed for p in parts]),
            torch.cat([p.scales for p in parts]),
            zeros,
        )

    @property
    def nbytes(self) -> int:
        """Of codes, scales and zero points, padding included."""
        return self.packed.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    def rows(self, start: int, stop: int) -> BlockTensor:
        """Rows ``start`` to ``stop`` (exclusive), as views."""
        part = slice(start, stop)
        packed, zeros = self.packed[part], None if self.zeros is None else self.zeros[part]
        shape = (packed.shape[0], self.shape[1])
        return replace(self, shape=shape, packed=packed, scales=self.scales[part], zeros=zeros)

    def codes(self) -> Tensor:
        """(N, B, block) uint8, padding included."""
        return unpack(self.packed, self.format.stored_bits, self.format.block)

    def zero_points(self) -> Tensor:
        """(N, B) uint8; the implied ones of a symmetric tensor."""
        if self.zeros is None:
            return torch.full_like(self.scales, self.format.zero_code, dtype=torch.uint8)
        return unpack(self.zeros, self.format.stored_bits, self.scales.shape[1])

    def dequantize(self) -> Tensor:
        """(N, K) float32: exactly ``(code - zero) * scale`` in float32."""
        out = torch.empty(self.shape, device=self.packed.device)
        for start, stop in row_chunks(*self.shape):
            part = self.rows(start, stop)
            offsets = part.codes().float() - part.zero_points().float()[..., None]
            out[start:stop] = (offsets * part.scales[..., None]).flatten(1)[:, : self.shape[1]]
        return out


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., n) of ``bits`` (2, 4 or 8) -> (..., ceil(n * bits / 8)) uint8, low bits first, filled up with 0."""
    per_byte = 8 // bits
    codes = codes.to(torch.uint8)
    if per_byte == 1:
        return codes.contiguous()
    missing = -codes.shape[-1] % per_byte
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    packed = codes[..., ::per_byte].clone(memory_format=torch.contiguous_format)
    for i in range(1, per_byte):
        packed |= codes[..., i::per_byte] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of each row of ``packed``, uint8."""
    parts = [(packed >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)]
    return torch.stack(parts, dim=-1).flatten(-2)[..., :count]


def blocks_of(w: Tensor, block: int) -> Tensor:
    """(N, K) -> (N, ceil(K / block), block) float32, padded with zeros."""
    missing = -w.shape[1] % block
    w = torch.nn.functional.pad(w.float(), (0, missing)) if missing else w.float()
    return w.reshape(w.shape[0], w.shape[1] // block, block)


def row_chunks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of rows that hold about ``CHUNK_ELEMENTS`` numbers each."""
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def check_weight(w: Tensor) -> None:
    """Raises ``UsageError`` unless ``w`` is a matrix of finite floating-point numbers (finite in float32, too)."""
    if w.ndim != 2 or not w.is_floating_point():
        raise UsageError(f"a weight must be a matrix of floating-point numbers, got {w.dtype} {tuple(w.shape)}")
    bad = sum(int((~torch.isfinite(w[start:stop].float())).sum()) for start, stop in row_chunks(*w.shape))
    if bad:
        raise UsageError(
            f"{bad} of {w.numel()} weights are NaN or infinite",
            hint="the checkpoint is damaged, or was saved after its training had diverged",
        )


def absmax_grid(w: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor | None]:
    """(scales (N, B) float32, zero points (N, B) uint8 or none) that span each block of ``w`` (N, K).

    Symmetric: the largest magnitude takes the lowest code, so scales may be negative; what lies within half a step of
    the opposite end is clipped, by one step at most. Asymmetric: from the lowest to the highest weight, zero included;
    nothing is clipped by more than half a step, and a block of one value besides zeros is exact. A block of zeros has
    scale 1. Raises ``UsageError`` for NaN and infinities.
    """
    check_weight(w)
    parts = [spanning_grid(blocks_of(w[start:stop], form.block), form) for start, stop in row_chunks(*w.shape)]
    if not parts:
        empty = torch.empty(0, form.blocks(w.shape[1]), device=w.device)
        return empty, None if form.symmetric else empty.to(torch.uint8)
    scales, zero_points = zip(*parts, strict=True)
    return torch.cat(scales), None if form.symmetric else torch.cat(zero_points)


def spanning_grid(blocks: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor | None]:
    """``absmax_grid`` of ``blocks`` (..., block) float32: each (...,)."""
    low, high = blocks.amin(-1), blocks.amax(-1)
    if form.symmetric:
        extreme = torch.where(high > -low, high, low)
        return usable_scales(extreme / -(1 << (form.bits - 1))), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    levels = (1 << form.bits) - 1
    scales = usable_scales(high / levels - low / levels)  # divided first: the range itself may overflow
    # A block of one value and zeros takes that value as its scale: (value / levels) * levels would round.
    single = torch.where(high > 0, high, low)
    exact = ((blocks == 0) | (blocks == single[..., None])).all(-1) & (single.abs() >= SMALLEST_SCALE)
    scales = torch.where(exact, single.abs(), scales)
    return scales, (-low / scales).round().clamp(0, levels).to(torch.uint8)


def usable_scales(scales: Tensor) -> Tensor:
    """``scales`` with those of all-zero blocks made 1, and denormal ones the smallest normal number of their sign."""
    raised = torch.copysign(scales.abs().clamp(min=SMALLEST_SCALE), scales)
    return torch.where(scales == 0, torch.ones_like(scales), raised)


def quantize(w: Tensor, form: BlockFormat, scales: Tensor, zero_points: Tensor | None) -> BlockTensor:
    """The nearest codes to ``w`` (N, K) on a grid of ``scales`` (N, B) and ``zero_points`` (N, B) or none.

    ``|w - dequantized|`` is at most ``|scale| / 2`` wherever the grid reaches. Raises ``UsageError`` for NaN and
    infinities, and for a grid that does not fit the format.
    """
    check_weight(w)
    rows, width = w.shape
    _expect_grid(scales, zero_points, form, (rows, form.blocks(width)))
    if (scales == 0).any():
        raise UsageError(
            f"{int((scales == 0).sum())} of {scales.numel()} scales are zero: no weight can be rounded to them"
        )
    parts = []
    for start, stop in row_chunks(rows, width):
        zeros = None if zero_points is None else zero_points[start:stop]
        steps = scales[start:stop].float()
        codes = nearest_codes(blocks_of(w[start:stop], form.block), steps, zeros, form)
        parts.append(BlockTensor.from_codes(codes, steps, zeros, form, (stop - start, width)))
    return BlockTensor.concat(parts) if parts else _empty(form, width, scales, zero_points)


def nearest_codes(blocks: Tensor, scales: Tensor, zero_points: Tensor | None, form: BlockFormat) -> Tensor:
    """``blocks`` (..., block) float32, ``scales`` (...,) and ``zero_points`` (...,) or none -> codes as uint8."""
    zero = form.zero_code if zero_points is None else zero_points[..., None]
    low, high = form.code_range
    return (blocks / scales[..., None]).round_().add_(zero).clamp_(low, high).to(torch.uint8)


def _empty(form: BlockFormat, width: int, scales: Tensor, zero_points: Tensor | None) -> BlockTensor:
    codes = torch.empty(0, form.blocks(width), form.block, dtype=torch.uint8, device=scales.device)
    return BlockTensor.from_codes(codes, scales, zero_points, form, (0, width))


def _cleared_padding(codes: Tensor, zero_points: Tensor | None, form: BlockFormat, width: int) -> Tensor:
    used = width % form.block
    if not used:
        return codes
    codes = codes.to(torch.uint8, copy=True)
    codes[:, -1, used:] = form.zero_code if zero_points is None else zero_points[:, -1:].to(torch.uint8)
    return codes


def _expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UsageError(f"{name} must be {shape}, got {tuple(tensor.shape)}")


def _expect_grid(scales: Tensor, zero_points: Tensor | None, form: BlockFormat, grid: tuple[int, int]) -> None:
    _expect_shape("scales", scales, grid)
    if (zero_points is None) != form.symmetric:
        raise UsageError(f"{form} {'has no' if form.symmetric else 'needs'} zero points")
    if zero_points is not None:
        _expect_shape("zero points", zero_points, grid)
    bad = int((~torch.isfinite(scales)).sum())
    if bad:
        raise UsageError(f"{bad} of {scales.numel()} scales are NaN or infinite")


def _expect_codes(name: str, codes: Tensor, form: BlockFormat) -> None:
    most = (1 << form.stored_bits) - 1
    if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) <= most):
        raise UsageError(f"{name} must be 0 to {most}, got {codes.min().item()} to {codes.max().item()}")
