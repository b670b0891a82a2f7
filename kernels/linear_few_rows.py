"""Few rows of ``x`` times integer weights on a GPU, for ``ryzen::linear_nbits``: decoding, and verifying some tokens.

Reading the weights is what takes the time. Each byte is read once, 16 at a time and ahead of its use, and a weight
takes two to three instructions, so that reading stays the limit: two codes at a time are cut out of a word with one
mask and taken for the bits of two tiny half-precision numbers, which one multiply-add scales up and centres, exactly.
Scales are applied to the sum of a block, in float32. A warp has its own part of the input channels, and the parts are
added in a fixed order: nothing is split between programs, and results are the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ryzen_compile.kernels import launch
from ryzen_compile.numerics.blockwise import BlockTensor

MOST_ROWS = 32
HALVES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
VECTORS = {2: torch.int64, 4: torch.int64, 8: torch.int32}  # that x is read in, by bits
SUMS = 128 * 16  # of one warp: more do not fit into its registers


@triton.jit
def _half(bits: tl.tensor, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """The number whose bits are the lower 16."""
    if (
        INTERPRETED
    ):  # which has no arithmetic of bfloat16, and no small numbers of it: it is the upper half of a float32
        if DTYPE.is_bf16():
            return (bits << 16).to(tl.int32).to(tl.float32, bitcast=True)
        return bits.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return bits.to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _numbers(
    words: tl.tensor, PHASE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr
) -> tl.tensor:
    """Codes ``PHASE`` and ``PHASE + 16 / BITS`` of words (S, N, W) int32: (S, N, 2 W), times 2^-7 or, float16, 2^-9.

    The bits of a small integer are those of it times half precision's smallest number, up to 7 bits of mantissa and one
    of the exponent. So there is no shift to the half words' low bytes, and one for all codes in their high bytes.
    """
    PLACE: tl.constexpr = PHASE * BITS % 8
    UP: tl.constexpr = (15 if DTYPE.is_fp16() else 126) - PLACE
    MASK: tl.constexpr = (((1 << BITS) - 1) << PLACE) * 0x10001
    pair = (words >> (PHASE * BITS // 8 * 8)) & MASK
    if not INTERPRETED:  # or LLVM masks the halves one by one: twice the work
        pair = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [pair], dtype=tl.int32, is_pure=True, pack=1)
    both = tl.join(_half(pair & 0xFFFF, DTYPE, INTERPRETED), _half(pair >> 16, DTYPE, INTERPRETED))
    return tl.reshape(both, (words.shape[0], words.shape[1], 2 * words.shape[2])) * 2.0**UP


@triton.jit
def _of_phase(
    first: tl.tensor, second: tl.tensor, PHASE: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr
) -> tl.tensor:
    """Number ``PHASE`` of those that integers hold: 2, 4, or 8 in two of them."""
    held = first if PHASE < 4 else second
    return _half(held >> (PHASE % 4 * 16), DTYPE, INTERPRETED)


@triton.jit
def _channels(
    first: tl.tensor,  # (S, M, W)
    second: tl.tensor,
    PHASE: tl.constexpr,
    JOINED: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:  # (S, M, W * JOINED)
    x = _of_phase(first, second, PHASE, DTYPE, INTERPRETED)
    if JOINED == 2:
        x = tl.join(x, _of_phase(first, second, PHASE + 1, DTYPE, INTERPRETED))
        x = tl.reshape(x, (first.shape[0], first.shape[1], 2 * first.shape[2]))
    return x


@triton.jit
def _products(
    first: tl.tensor,  # (S, M, 2 W)
    second: tl.tensor,
    words: tl.tensor,  # (S, N, W)
    CENTRE: tl.constexpr,
    BITS: tl.constexpr,
    JOINED: tl.constexpr,  # phases of one product: a short slice has not the 16 channels that it takes
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:  # (S, M, N) float32
    product = tl.zeros((first.shape[0], first.shape[1], words.shape[1]), tl.float32)
    for phase in tl.static_range(0, 16 // BITS, JOINED):
        x = _channels(first, second, phase, JOINED, DTYPE, INTERPRETED)
        codes = _numbers(words, phase, BITS, DTYPE, INTERPRETED)
        if JOINED == 2:
            codes = tl.join(codes, _numbers(words, phase + 1, BITS, DTYPE, INTERPRETED))
            codes = tl.reshape(codes, (words.shape[0], words.shape[1], 4 * words.shape[2]))
        product = tl.dot(x, tl.permute(codes - CENTRE, (0, 2, 1)).to(x.dtype), product)
    return product


@triton.jit
def _sums(
    first: tl.tensor,  # (S, M, W)
    second: tl.tensor,
    BITS: tl.constexpr,
    JOINED: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:  # (S, M, 1) float32: of all channels, as if multiplied with the code 1
    ones = tl.full((first.shape[0], 16, first.shape[2] * JOINED // 2), 0x10001, tl.int32)  # codes, for one layout of x
    weights = tl.permute(_numbers(ones, 0, BITS, DTYPE, INTERPRETED), (0, 2, 1))
    total = tl.zeros((first.shape[0], first.shape[1], 16), tl.float32)
    for phase in tl.static_range(0, 16 // BITS, JOINED):
        x = _channels(first, second, phase, JOINED, DTYPE, INTERPRETED)
        total = tl.dot(x, weights.to(x.dtype), total)
    return tl.sum(total, 2, keep_dims=True) * (1 / 16)  # of 16 columns that are the same


@triton.jit
def _zero_points(rows: tl.tensor, block: tl.tensor, inside: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    bit = block * BITS
    held = tl.load(rows + bit // 8, mask=inside, other=0).to(tl.int32)
    return ((held >> (bit % 8)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _read(
    x_at: tl.tensor,
    word_at: tl.tensor,
    scale_at: tl.tensor,
    real: tl.tensor,  # (1, M, 1): rows of x
    begin: tl.tensor,  # (S, 1, 1): the first word of a slice
    vector: tl.tensor,  # (S, 1, 2 W): places in a row of x
    words: tl.tensor,
    vectors: tl.tensor,
    VECTORS: tl.constexpr,
    EVEN: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    if EVEN:
        real, codes, scale = real & (vector >= 0), tl.load(word_at), tl.load(scale_at)
    else:
        real = real & (vector < vectors)
        codes = tl.load(word_at, mask=begin < words, other=0)
        scale = tl.load(scale_at, mask=begin < words, other=0.0)
    first = tl.load(x_at, mask=real, other=0)
    second = first
    if VECTORS == 2:
        second = tl.load(x_at + 1, mask=real, other=0)
    return first, second, codes, scale


@triton.jit
def _few_rows_kernel(
    x: tl.tensor,  # (M, vectors): 16 / BITS numbers of half precision in an integer, or in two
    packed: tl.tensor,  # (N, words) int32
    scales: tl.tensor,  # (N, blocks) float32
    zeros: tl.tensor | None,  # (N, zero_bytes) uint8
    bias: tl.tensor | None,  # (N,)
    out: tl.tensor,  # (M, N)
    M: tl.tensor,  # ROWS at most
    N: tl.tensor,
    vectors: tl.tensor,
    words: tl.tensor,
    blocks: tl.tensor,
    zero_bytes: tl.tensor,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,  # channels that share a scale
    SLICE: tl.constexpr,  # channels that are summed before they are scaled
    SLICES: tl.constexpr,  # at a time, shared out among warps
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,  # reads ahead
    EVEN: tl.constexpr,  # slices end where rows do
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    WORDS: tl.constexpr = SLICE * BITS // 32
    PER_BLOCK: tl.constexpr = BLOCK * BITS // 32
    VECTORS: tl.constexpr = 2 if BITS == 2 else 1  # for a half word's codes
    JOINED: tl.constexpr = 2 if WORDS < 8 else 1
    UNIT: tl.constexpr = 2.0 ** (-9 if DTYPE.is_fp16() else -7)
    CENTRE: tl.constexpr = 1 << (BITS - 1)

    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight = tl.minimum(col, N - 1).to(tl.int64)  # int64: its products with a row's size overflow int32
    part = tl.arange(0, SLICES)[:, None, None]
    row = tl.arange(0, ROWS)[None, :, None]
    word_at = packed + (weight * words)[None, :, None] + part * WORDS + tl.arange(0, WORDS)[None, None, :]
    vector = (part * (2 * WORDS) + tl.arange(0, 2 * WORDS)[None, None, :]) * VECTORS
    scale_at = scales + (weight * blocks)[None, None, :] + part * WORDS // PER_BLOCK
    x_at = x + row * vectors + vector
    if zeros is not None:
        zero_at = zeros + (weight * zero_bytes)[None, None, :]
        ahead = _zero_points(zero_at, part * WORDS // PER_BLOCK, part * WORDS < words, BITS)
    total = tl.zeros((SLICES, ROWS, BLOCK_N), tl.float32)
    for word in tl.range(0, words, SLICES * WORDS, num_stages=STAGES):
        along = word * (2 * VECTORS)
        first, second, codes, scale = _read(
            x_at + along, word_at + word, scale_at + word // PER_BLOCK, row < M, word + part * WORDS, vector + along,
            words, vectors, VECTORS, EVEN,
        )  # fmt: skip
        product = _products(first, second, codes, CENTRE * UNIT, BITS, JOINED, DTYPE, INTERPRETED)
        if zeros is not None:  # what codes are off that were centred where symmetric ones are
            product -= _sums(first, second, BITS, JOINED, DTYPE, INTERPRETED) * (ahead - CENTRE)
            later = word + (SLICES + part) * WORDS
            ahead = _zero_points(zero_at, later // PER_BLOCK, later < words, BITS)
        total += product * scale
    result = tl.sum(total, 0) * (1 / UNIT)
    if bias is not None:
        result += tl.load(bias + weight).to(tl.float32)[None, :]
    line = tl.arange(0, ROWS)[:, None]
    tl.store(out + line * N + col[None, :], result.to(out.dtype.element_ty), mask=(line < M) & (col < N)[None, :])


def fits(x: Tensor, weight: BlockTensor) -> bool:
    """Whether ``few_rows`` takes ``x`` (M, C) and ``weight`` (N, C), both contiguous; what it does not is rare."""
    bits, block, codes = weight.format.stored_bits, weight.format.block, 16 // weight.format.stored_bits
    aligned = x.shape[1] % codes == 0 and x.storage_offset() % codes == 0 and weight.packed.storage_offset() % 4 == 0
    return x.dtype in HALVES and 0 < x.shape[0] <= MOST_ROWS and aligned and block >= 32 and bits * block >= 128


def few_rows(x: Tensor, weight: BlockTensor, bias: Tensor | None, out: Tensor) -> None:
    """``x`` (M, C) times ``weight`` (N, C), which fit, plus ``bias`` (N,), into ``out`` (M, N)."""
    (count, width), rows = x.shape, weight.shape[0]

    def run(config: triton.Config) -> None:
        _launch(x, weight, bias, out, config)

    form = weight.format
    key = (x.dtype, form.stored_bits, form.block, form.symmetric, *map(launch.bucket, (count, rows, width)))
    with launch.on(x):
        run(launch.tuned("linear_nbits_few_rows", key, _candidates(count, weight), run, x.device))


def _candidates(count: int, weight: BlockTensor) -> list[triton.Config]:
    """(rows of the weight, channels at a time, warps, stages): wide where there are rows enough for every processor."""
    narrow = [(16, 512, 4, 4), (16, 1024, 8, 3)]
    wide = [(32, 512, 4, 3), (32, 512, 4, 4), (32, 1024, 8, 3), (64, 512, 4, 3), (64, 1024, 8, 3)]
    some = wide + narrow if weight.shape[0] >= 8192 else narrow + wide
    rows = 16 if count <= 16 else MOST_ROWS
    configs = []
    for block_n, channels, warps, stages in some:
        part = min(weight.format.block, channels // warps)
        sums = channels // part * rows * block_n
        if sums <= SUMS * warps and rows * block_n <= 1024:
            kwargs = {"SLICE": part, "SLICES": channels // part, "ROWS": rows, "BLOCK_N": block_n, "STAGES": stages}
            configs.append(triton.Config(kwargs, num_warps=warps, num_stages=stages))
    return configs


def _launch(x: Tensor, weight: BlockTensor, bias: Tensor | None, out: Tensor, config: triton.Config) -> None:
    bits, rows = weight.format.stored_bits, weight.shape[0]
    words = weight.packed[0].numel() // 4
    vectors = x.view(VECTORS[bits])
    _few_rows_kernel[(triton.cdiv(rows, config.kwargs["BLOCK_N"]),)](
        vectors,
        weight.packed.view(torch.int32),
        weight.scales,
        weight.zeros,
        bias,
        out,
        x.shape[0],
        rows,
        vectors.shape[1],
        words,
        weight.scales.shape[1],
        0 if weight.zeros is None else weight.zeros.shape[1],
        BITS=bits,
        BLOCK=weight.format.block,
        EVEN=x.shape[1] % (config.kwargs["SLICE"] * config.kwargs["SLICES"]) == 0,
        DTYPE=HALVES[x.dtype],
        INTERPRETED=launch.interpreted(),
        **config.all_kwargs(),
    )
