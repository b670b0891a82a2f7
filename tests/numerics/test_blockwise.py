"""Block formats: every element within its closed-form bound, every bit where ONNX Runtime looks for it."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics import blockwise
from ryzen_compile.numerics.blockwise import (
    BITS,
    BLOCKS,
    BlockFormat,
    BlockTensor,
    absmax_grid,
    pack,
    quantize,
    unpack,
)

FORMATS = [BlockFormat(*f) for f in product(BITS, BLOCKS, (True, False))]
WIDTHS = [lambda block: block, lambda block: block + 1, lambda block: 200, lambda block: 33, lambda block: 1]
ids = lambda form: f"{form.bits}b{form.block}{'s' if form.symmetric else 'a'}"


def rounded(w: Tensor, form: BlockFormat) -> BlockTensor:
    return quantize(w, form, *absmax_grid(w, form))


def gaussian(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def snr_db(w: Tensor, tensor: BlockTensor) -> float:
    w = w.double()
    return float(10 * torch.log10(w.square().sum() / (w - tensor.dequantize().double()).square().sum()))


def each_element(values: Tensor, form: BlockFormat, width: int) -> Tensor:
    """Values of blocks (N, B) for every weight (N, K)."""
    return values.double().repeat_interleave(form.block, dim=1)[:, :width]


def check_bound(w: Tensor, tensor: BlockTensor) -> None:
    """The closed form, in float64: half a step where the grid reaches, else the distance to its nearest end."""
    form, width = tensor.format, w.shape[1]
    scales, zeros = (each_element(t, form, width) for t in (tensor.scales, tensor.zero_points()))
    low, high = ((end - zeros) * scales for end in form.code_range)
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    exact = w.double()
    beyond = (exact - exact.clamp(low, high)).abs()
    # 1e-6 of the largest weight: the division, the product and float64 weights are rounded to float32.
    slack = 1e-6 * exact.abs().amax(1, keepdim=True)
    allowed = torch.where(beyond > scales.abs() / 2, beyond, scales.abs() / 2) + slack
    assert ((exact - tensor.dequantize().double()).abs() <= allowed).all()
    # What the spanning grid does not reach: at most one step of a symmetric one, half a step of an asymmetric one.
    assert (beyond <= scales.abs() * (1.0 if form.symmetric else 0.5) + slack).all()


@pytest.mark.parametrize("form", FORMATS, ids=ids)
@pytest.mark.parametrize("width", WIDTHS, ids=["block", "block+1", "200", "33", "1"])
def test_every_element_is_within_the_closed_form_bound(form, width):
    w = gaussian(5, width(form.block))
    w[1] *= 1e4
    w[2] = w[2].abs() + 1
    w[3] = -w[3].abs()
    check_bound(w, rounded(w, form))


SPECIAL = st.sampled_from([0.0, -0.0, 1e-45, 1.1754944e-38, 65504.0, 1e30, -1e30])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(FORMATS),
    values=st.lists(st.one_of(st.floats(-1e6, 1e6, width=32), SPECIAL), min_size=1, max_size=70),
    rows=st.integers(1, 3),
)
def test_the_bound_holds_for_any_values(form, values, rows):
    w = torch.tensor(values).repeat(rows, 1)
    tensor = rounded(w, form)
    check_bound(w, tensor)
    assert torch.isfinite(tensor.dequantize()).all() and (tensor.scales != 0).all()


@pytest.mark.parametrize("form", FORMATS, ids=ids)
def test_packing_is_exact_for_any_codes(form):
    generator = torch.Generator().manual_seed(form.block)
    blocks = 5  # odd: packed zero points end inside a byte
    shape = (3, blocks * form.block)
    codes = torch.randint(1 << form.stored_bits, (3, blocks, form.block), generator=generator)
    zeros = None if form.symmetric else torch.randint(1 << form.stored_bits, (3, blocks), generator=generator)
    scales = torch.randn(3, blocks, generator=generator)
    tensor = BlockTensor.from_codes(codes, scales, zeros, form, shape)
    assert torch.equal(tensor.codes(), codes.to(torch.uint8))
    assert tensor.packed.shape == (3, blocks, form.block * form.stored_bits // 8) and tensor.packed.is_contiguous()
    assert torch.equal(tensor.scales, scales)
    if zeros is None:
        assert tensor.zeros is None and (tensor.zero_points() == form.zero_code).all()
    else:
        assert torch.equal(tensor.zero_points(), zeros.to(torch.uint8))
        assert tensor.zeros is not None and tensor.zeros.shape == (3, math.ceil(blocks * form.stored_bits / 8))
    again = BlockTensor.stored(
        tensor.packed, tensor.scales, tensor.zeros, form.stored_bits, form.block, shape[1]
    ).dequantize()
    assert torch.equal(again, tensor.dequantize())


def test_low_bits_come_first():
    assert pack(torch.tensor([1, 2, 3]), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([1, 2, 3, 0, 1]), 2).tolist() == [0b00111001, 1]
    assert pack(torch.tensor([[7], [255]]), 8).tolist() == [[7], [255]]
    assert unpack(torch.tensor([0x21, 0x03], dtype=torch.uint8), 4, 3).tolist() == [1, 2, 3]


def numpy_dequantize(tensor: BlockTensor) -> np.ndarray:
    """Byte by byte, as the operators' documentation describes it."""
    bits, block, (rows, width) = tensor.format.stored_bits, tensor.format.block, tensor.shape
    out = np.zeros((rows, width), np.float32)
    packed, scales = tensor.packed.numpy(), tensor.scales.numpy()
    for n in range(rows):
        for k in range(width):
            b, at = divmod(k, block)
            code = (int(packed[n, b, at * bits // 8]) >> (at * bits % 8)) % (1 << bits)
            zero = 1 << (bits - 1)
            if tensor.zeros is not None:
                zero = (int(tensor.zeros.numpy()[n, b * bits // 8]) >> (b * bits % 8)) % (1 << bits)
            out[n, k] = np.float32(code - zero) * scales[n, b]
    return out


@pytest.mark.parametrize("form", FORMATS, ids=ids)
def test_dequantizing_equals_an_independent_reading(form):
    tensor = rounded(gaussian(2, 3 * form.block - 7, seed=1), form)
    assert np.array_equal(tensor.dequantize().numpy(), numpy_dequantize(tensor))


@pytest.mark.parametrize("form", FORMATS, ids=ids)
def test_constant_and_zero_rows_are_exact(form):
    w = torch.zeros(6, form.block + 5)
    w[1], w[2], w[3] = 0.1, -0.3, 1e-3
    w[4, ::3], w[5, 1::2] = 0.7, -1 / 3  # one value among zeros
    tensor = rounded(w, form)
    assert torch.equal(tensor.dequantize(), w)
    assert torch.equal(tensor.scales[0], torch.ones_like(tensor.scales[0]))


@pytest.mark.parametrize("form", FORMATS, ids=ids)
def test_padding_means_zero(form):
    width = form.block + 3
    tensor = rounded(gaussian(4, width) + 3, form)
    past = tensor.codes()[:, -1, 3:]
    assert (past == tensor.zero_points()[:, -1:]).all()
    codes = torch.full_like(tensor.codes(), (1 << form.bits) - 1)
    zeros = None if form.symmetric else tensor.zero_points()
    dirty = BlockTensor.from_codes(codes, tensor.scales, zeros, form, (4, width))
    assert (dirty.codes()[:, -1, 3:] == dirty.zero_points()[:, -1:]).all()
    assert (dirty.codes()[:, -1, :3] == (1 << form.bits) - 1).all()
    assert (codes == (1 << form.bits) - 1).all()  # the caller's own are left alone


@pytest.mark.parametrize("form", FORMATS, ids=ids)
def test_an_outlier_costs_its_block_alone(form):
    w = gaussian(3, 4 * form.block)
    reference = rounded(w, form).dequantize()
    w[1, form.block] = 1e4
    tensor = rounded(w, form)
    check_bound(w, tensor)
    changed = (tensor.dequantize() != reference).any(0).unflatten(0, (4, form.block)).any(1)
    assert changed.tolist() == [False, True, False, False]
    # Exact up to float32, except that a zero point is rounded: there by as much as the other weights are large.
    tolerance = 1e-2 if form.symmetric else w[1, form.block : 2 * form.block].abs().sort().values[-2].item() + 1e-2
    assert tensor.dequantize()[1, form.block].item() == pytest.approx(1e4, abs=tolerance)


def test_denormal_weights_stay_finite_and_close():
    w = torch.tensor([[1e-45, -1e-40, 3e-39, 0.0]]).repeat(1, 8)
    for form in FORMATS:
        tensor = rounded(w, form)
        assert (tensor.scales.abs() >= torch.finfo(torch.float32).tiny).all()
        assert ((tensor.dequantize() - w).abs() <= torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinities_are_counted(bad):
    w = gaussian(4, 40)
    form = BlockFormat(4, 32)
    grid = absmax_grid(w, form)
    w[1, 3] = w[2, 39] = bad
    with pytest.raises(UsageError, match="2 of 160 weights are NaN or infinite"):
        absmax_grid(w, form)
    with pytest.raises(UsageError, match="2 of 160"):
        quantize(w, form, *grid)
    with pytest.raises(UsageError, match="1 of 4 weights"):  # finite in float64, not in the format's float32
        absmax_grid(torch.tensor([[1e300, 1, 2, 3]], dtype=torch.float64), form)


@pytest.mark.parametrize("w", [torch.zeros(3), torch.zeros(2, 2, 2), torch.zeros(2, 2, dtype=torch.int64)])
def test_what_is_no_matrix_is_refused(w):
    with pytest.raises(UsageError, match="must be a matrix of floating-point numbers"):
        absmax_grid(w, BlockFormat())


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 16, -4, True, "4"])
def test_unknown_bits_are_refused(bits):
    with pytest.raises(UsageError, match="bits must be 2, 3, 4 or 8, got"):
        BlockFormat(bits)


@pytest.mark.parametrize("block", [0, 1, 8, 31, 33, 127, 512, -32])
def test_unknown_blocks_are_refused(block):
    with pytest.raises(UsageError, match="block must be 16, 32, 64, 128 or 256, got"):
        BlockFormat(4, block)


def test_grids_that_do_not_fit_are_refused():
    w, symmetric, asymmetric = gaussian(4, 40), BlockFormat(4, 32), BlockFormat(4, 32, False)
    scales, zeros = absmax_grid(w, asymmetric)
    for form, grid, message in (
        (symmetric, (scales, zeros), "has no zero points"),
        (asymmetric, (scales, None), "needs zero points"),
        (symmetric, (scales[:, :1], None), r"scales must be \(4, 2\), got \(4, 1\)"),
        (asymmetric, (scales, zeros[:3]), r"zero points must be \(4, 2\), got \(3, 2\)"),
        (symmetric, (scales * 0, None), "8 of 8 scales are zero"),
        (symmetric, (scales / 0, None), "8 of 8 scales are NaN or infinite"),
    ):
        with pytest.raises(UsageError, match=message):
            quantize(w, form, *grid)


def test_codes_that_do_not_fit_are_refused():
    form, scales = BlockFormat(4, 16), torch.ones(2, 1)
    with pytest.raises(UsageError, match="codes must be 0 to 15, got 0 to 16"):
        BlockTensor.from_codes(torch.tensor([0, 16] * 16).view(2, 1, 16), scales, None, form, (2, 16))
    with pytest.raises(UsageError, match="codes must be 0 to 15, got -1 to 3"):
        BlockTensor.from_codes(torch.tensor([-1, 3] * 16).view(2, 1, 16), scales, None, form, (2, 16))
    with pytest.raises(UsageError, match=r"codes must be \(2, 2, 16\), got \(2, 1, 16\)"):
        BlockTensor.from_codes(torch.zeros(2, 1, 16), scales, None, form, (2, 17))
    with pytest.raises(UsageError, match="zero points must be 0 to 15"):
        BlockTensor.from_codes(
            torch.zeros(2, 1, 16), scales, torch.full((2, 1), 16), BlockFormat(4, 16, False), (2, 16)
        )


def test_a_checkpoint_may_hold_zero_scales():
    tensor = BlockTensor.from_codes(torch.full((1, 1, 16), 9), torch.zeros(1, 1), None, BlockFormat(4, 16), (1, 16))
    assert (tensor.dequantize() == 0).all()


@pytest.mark.parametrize("form", FORMATS, ids=ids)
def test_joining_and_cutting_rows_is_exact(form):
    w = gaussian(7, form.block + 9)
    whole = rounded(w, form)
    joined = BlockTensor.concat([rounded(w[:3], form), rounded(w[3:4], form), rounded(w[4:], form)])
    assert joined.shape == whole.shape and joined.nbytes == whole.nbytes
    assert torch.equal(joined.packed, whole.packed) and torch.equal(joined.dequantize(), whole.dequantize())
    part = joined.rows(2, 5)
    assert part.shape == (3, form.block + 9) and torch.equal(part.dequantize(), whole.dequantize()[2:5])
    assert joined.rows(6, 99).shape[0] == 1 and joined.rows(3, 3).dequantize().shape == (0, form.block + 9)


def test_joining_different_formats_is_refused():
    w = gaussian(2, 64)
    first = rounded(w, BlockFormat(4, 32))
    for other in (rounded(w, BlockFormat(8, 32)), rounded(w[:, :63], BlockFormat(4, 32))):
        with pytest.raises(UsageError, match="different formats or widths"):
            BlockTensor.concat([first, other])
    with pytest.raises(UsageError, match="nothing to join"):
        BlockTensor.concat([])


@pytest.mark.parametrize("form", FORMATS, ids=ids)
def test_bytes_are_as_many_as_bits_per_weight_says(form):
    w = gaussian(3, 8 * form.block)
    tensor = rounded(w, form)
    assert tensor.nbytes * 8 == w.numel() * form.bits_per_weight
    assert tensor.nbytes == sum(t.nbytes for t in (tensor.packed, tensor.scales, tensor.zeros) if t is not None)


def test_known_bits_per_weight():
    assert BlockFormat(4, 128).bits_per_weight == 4.25
    assert BlockFormat(4, 32, False).bits_per_weight == 5.125
    assert BlockFormat(3, 64).bits_per_weight == 4.5  # stored as 4
    assert BlockFormat(8, 256).bits_per_weight == 8.125
    assert BlockFormat(2, 16).bits_per_weight == 4.0


@pytest.mark.parametrize("symmetric", [True, False])
def test_three_bits_are_eight_codes_of_four(symmetric):
    form = BlockFormat(3, 32, symmetric)
    codes = rounded(gaussian(200, 64), form).codes()
    assert codes.unique().tolist() == (list(range(4, 12)) if symmetric else list(range(8)))
    assert form.stored_bits == 4 and form.zero_code == 8 and form.code_range == ((4, 11) if symmetric else (0, 7))


@pytest.mark.parametrize("form", [f for f in FORMATS if f.symmetric], ids=ids)
def test_the_largest_weight_takes_the_lowest_code(form):
    w = gaussian(6, 2 * form.block)
    tensor = rounded(w, form)
    blocks = w.unflatten(1, (2, form.block))
    largest = blocks.abs().argmax(-1, keepdim=True)
    assert (tensor.codes().gather(-1, largest) == form.code_range[0]).all()
    # Powers of two divide without rounding: the largest weight of each block is exact.
    assert torch.equal(
        tensor.dequantize().unflatten(1, (2, form.block)).gather(-1, largest), blocks.gather(-1, largest)
    )


# anchors/performance.md §3, "int absmax": a unit Gaussian, symmetric, b bits and one scale a block.
ABSMAX_DB = {
    (2, 32): 8.80, (3, 32): 15.16, (4, 32): 21.30, (8, 32): 45.48,
    (2, 128): 7.42, (3, 128): 13.61, (4, 128): 19.69, (8, 128): 43.81,
}  # fmt: skip


@pytest.mark.parametrize(("bits", "block"), ABSMAX_DB)
def test_gaussian_signal_to_noise_is_the_known_one(bits, block):
    w = gaussian(512, 512)
    # 262 144 samples: 0.05 dB of sampling error
    assert snr_db(w, rounded(w, BlockFormat(bits, block))) == pytest.approx(ABSMAX_DB[bits, block], abs=0.1)


def test_a_format_that_loses_a_level_is_noticed():
    # The negative control of the test above: a grid of 15 levels instead of 16 is a decibel worse.
    w, form = gaussian(256, 512), BlockFormat(4, 32)
    scales, _ = absmax_grid(w, form)
    assert snr_db(w, quantize(w, form, scales.abs() * 8 / 7, None)) < ABSMAX_DB[4, 32] - 0.8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_read_as_float32(dtype):
    w = gaussian(4, 50).to(dtype)
    for form in (BlockFormat(4, 32), BlockFormat(8, 16, False)):
        tensor, reference = rounded(w, form), rounded(w.float(), form)
        assert torch.equal(tensor.packed, reference.packed) and torch.equal(tensor.scales, reference.scales)


def test_strides_do_not_matter():
    w = gaussian(50, 60)
    for view in (w.T, w[::3, 1::2], w.T[:, ::7], w[:1].expand(5, 60)):
        for form in (BlockFormat(4, 32), BlockFormat(2, 16, False)):
            assert torch.equal(rounded(view, form).packed, rounded(view.contiguous(), form).packed)


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_empty_matrix_has_no_blocks(symmetric):
    form = BlockFormat(4, 32, symmetric)
    tensor = rounded(torch.empty(0, 40), form)
    assert tensor.shape == (0, 40) and tensor.nbytes == 0 and tensor.dequantize().shape == (0, 40)


@pytest.mark.parametrize("symmetric", [True, False])
def test_chunks_do_not_show(monkeypatch, symmetric):
    w, form = gaussian(23, 100), BlockFormat(4, 32, symmetric)
    whole = rounded(w, form)
    monkeypatch.setattr(blockwise, "CHUNK_ELEMENTS", 250)  # two rows and a rest
    pieces = rounded(w, form)
    assert torch.equal(pieces.packed, whole.packed) and torch.equal(pieces.scales, whole.scales)
    assert torch.equal(pieces.dequantize(), whole.dequantize())


@pytest.mark.parametrize("form", FORMATS, ids=ids)
def test_what_is_quantized_stays_when_quantized_again(form):
    tensor = rounded(gaussian(4, form.block + 3), form)
    zeros = None if form.symmetric else tensor.zero_points()
    again = quantize(tensor.dequantize(), form, tensor.scales, zeros)
    assert torch.equal(again.packed, tensor.packed)
