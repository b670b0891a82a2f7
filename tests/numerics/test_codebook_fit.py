"""Fitted tables against rate-distortion yardsticks, against plainer fits, and against their own parts."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.codebook import CodebookFormat, CodebookTensor
from ryzen_compile.numerics.search.codebook_fit import CHUNK, FitSettings, fit_codebook

PLAIN = FitSettings(centre=False, channel_gain=False, rounds=0)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def like_a_table(rows: int, width: int, seed: int = 0) -> Tensor:
    """Channels of different mean and size, rows of different size."""
    x = gaussian(rows, width, seed=seed) * gaussian(rows, 1, seed=seed + 1).mul(0.5).exp()
    return x * gaussian(width, seed=seed + 2).mul(0.7).exp() + gaussian(width, seed=seed + 3)


def error(table: Tensor, tensor: CodebookTensor, weights: Tensor | None = None) -> float:
    each = (table.double() - tensor.decode().double()).square().sum(1)
    return float((each if weights is None else each * weights).sum())


def signal_to_noise(table: Tensor, tensor: CodebookTensor) -> float:
    return 10 * math.log10(float(table.double().square().sum()) / error(table, tensor))


# Best scalar quantizer of a Gaussian: Max (1960).
@pytest.mark.parametrize(("bits", "decibels"), [(2, 9.30), (3, 14.62), (4, 20.22), (8, 43.84)])
def test_single_weights_reach_lloyd_max(bits, decibels):
    table = gaussian(1024, 256)
    without_scales = fit_codebook(table, CodebookFormat(bits, 1, group=None))
    # 262 144 weights: some 0.02 dB of sampling noise; 256 entries fit the sample's own tails.
    assert decibels - 0.05 <= signal_to_noise(table, without_scales) <= decibels + (0.35 if bits == 8 else 0.1)
    # A scale for a row knows the row's size, which is worth 0.05 dB and more.
    assert signal_to_noise(table, fit_codebook(table, CodebookFormat(bits, 1))) > decibels


@pytest.mark.parametrize(
    ("form", "least"),
    [
        (CodebookFormat(4, 2), 9.30 + 0.25),
        (CodebookFormat(8, 4), 9.30 + 0.6),
        (CodebookFormat(4, 4, 2), 9.30 + 0.3),
        (CodebookFormat(4, 1, 1, 32), 21.74),  # the best int4 with a searched scale for 32 weights
    ],
    ids=str,
)
def test_vectors_stages_and_groups_beat_scalars_at_equal_bits(form, least):
    table = gaussian(1024, 64)
    assert signal_to_noise(table, fit_codebook(table, form)) > least


FORMATS = [
    CodebookFormat(3, 1), CodebookFormat(5, 2), CodebookFormat(4, 4), CodebookFormat(6, 8, group=16),
    CodebookFormat(4, 1, 1, None), CodebookFormat(3, 2, 2), CodebookFormat(2, 1, 2, 8), CodebookFormat(4, 8, 2, None),
    CodebookFormat(1, 1),
]  # fmt: skip
PROPERTIES = [
    ("channels", like_a_table(300, 48)),
    ("gaussian", gaussian(300, 48)),
    ("heavy tails", gaussian(300, 48) / gaussian(3, 300, 48, seed=1).square().mean(0).sqrt()),
    ("few rows", like_a_table(7, 48)),
    ("tiny", like_a_table(100, 48) * 1e-20),
    ("huge", like_a_table(100, 48) * 1e20),
]


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("table", [t for _, t in PROPERTIES], ids=[name for name, _ in PROPERTIES])
def test_refinements_are_no_worse_than_plain_k_means(form, table):
    # 0.05 dB: k-means of two starts differ by as much, and transforms are chosen by a short one.
    assert error(table, fit_codebook(table, form)) <= error(table, fit_codebook(table, form, PLAIN)) * 1.012


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_channels_of_different_size_gain_from_transforms(form):
    table = like_a_table(400, 48)
    plain = fit_codebook(table, form, FitSettings(centre=False, channel_gain=False))
    full = fit_codebook(table, form)
    assert plain.offset is None and plain.gain is None
    assert full.offset is not None or full.gain is not None
    assert signal_to_noise(table, full) > signal_to_noise(table, plain) + 0.3


def test_transforms_that_gain_nothing_are_not_stored():
    tensor = fit_codebook(gaussian(600, 64), CodebookFormat(4, 1))
    assert tensor.gain is None and tensor.offset is None


def test_two_stages_beat_the_nearest_of_each():
    """Codes chosen together and codebooks solved for together, against one stage after the other."""
    from ryzen_compile.numerics.search.kmeans import kmeans, nearest

    table = gaussian(1024, 32)
    points = table.reshape(-1, 4)
    first = kmeans(points, 32)
    left = points - first[nearest(points, first)]
    second = kmeans(left, 32)
    left = left - second[nearest(left, second)]
    greedy = 10 * math.log10(float(points.square().sum() / left.square().sum()))
    form = CodebookFormat(5, 4, 2, None)
    assert signal_to_noise(table, fit_codebook(table, form)) > greedy + 0.4


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_codes_are_the_best_for_codebook_and_scales(form):
    """Changing any code of one stage, the rest being as it is, hardly helps."""
    table = like_a_table(30, 48)
    tensor = fit_codebook(table, form)
    codes = tensor.unpacked().long()
    own = (tensor.decode().double() - table.double()).square().unflatten(1, (-1, form.dim)).sum(-1)
    for stage in range(form.stages):
        least = own
        for entry in range(form.entries):
            other = codes.clone()
            other[:, stage] = entry
            changed = CodebookTensor.from_codes(
                other, tensor.codebook, form, 48, scales=tensor.scales, gain=tensor.gain, offset=tensor.offset
            )
            each = (changed.decode().double() - table.double()).square().unflatten(1, (-1, form.dim)).sum(-1)
            least = torch.minimum(least, each)
        # Scales are fitted last, which moves a few weights over the border of their cell; and a beam is not exhaustive.
        assert float(own.sum()) <= float(least.sum()) * (1.005 if form.stages == 1 else 1.03)


def test_scales_are_the_best_of_their_neighbours():
    table = like_a_table(50, 64)
    tensor = fit_codebook(table, CodebookFormat(3, 2, group=16))
    own = error(table, tensor)
    for factor in (0.97, 1.03):
        assert error(table, replace(tensor, scales=(tensor.scales.float() * factor).half())) > own


def test_rows_that_count_more_have_smaller_errors():
    table = like_a_table(600, 32)
    table[:300] = gaussian(300, 32, seed=7).sign() * (1 + gaussian(300, 32, seed=8).abs() * 0.1)
    weights = torch.ones(600)
    weights[:300] = 100
    form = CodebookFormat(4, 4)
    plain, weighted = fit_codebook(table, form), fit_codebook(table, form, FitSettings(row_weights=weights))
    assert error(table, weighted, weights) < 0.95 * error(table, plain, weights)
    same = fit_codebook(table, form, FitSettings(row_weights=torch.full((600,), 7.0)))
    assert torch.equal(same.codes, plain.codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kept_rows_are_exact_and_draw_nothing(dtype):
    table = gaussian(200, 16).half().float()
    keep = torch.tensor([199, 3, 77])
    table[keep] = (gaussian(3, 16, seed=1) * 200).half().float()
    form = CodebookFormat(5, 2, group=None)
    tensor = fit_codebook(table, form, FitSettings(keep=keep, keep_dtype=dtype))
    assert torch.equal(tensor.decode()[keep], table[keep])
    assert tensor.kept is not None and tensor.kept.dtype == dtype
    others = torch.ones(200, dtype=torch.bool)
    others[keep] = False
    alone = fit_codebook(table[others], form)
    assert error(table, tensor) <= error(table[others], alone) * 1.02


def test_tables_without_anything_to_code():
    form = CodebookFormat(3, 2)
    assert fit_codebook(torch.empty(0, 8), form).decode().shape == (0, 8)
    table = gaussian(4, 8).half().float()
    assert torch.equal(fit_codebook(table, form, FitSettings(keep=torch.arange(4))).decode(), table)
    assert not fit_codebook(torch.zeros(5, 8), form).decode().any()
    constant = torch.tensor([0.1, -3.0, 0.0, 7.7]).expand(9, 4).contiguous()
    torch.testing.assert_close(fit_codebook(constant, form).decode(), constant, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_zero_rows_and_constant_channels(form):
    table = gaussian(200, 48)
    table[5] = 0
    table[:, 7] = 3.0
    table[:, 9] = 0
    tensor = fit_codebook(table, form)
    assert tensor.decode().isfinite().all()
    plain = fit_codebook(table, form, PLAIN)
    assert error(table, tensor) <= error(table, plain) * 1.012
    if tensor.gain is not None and tensor.offset is not None:
        assert (tensor.decode()[:, 7] == tensor.offset[7]).all() and abs(float(tensor.offset[7]) - 3) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tables_of_any_float_type(dtype):
    table = like_a_table(100, 16).to(dtype).requires_grad_()
    form = CodebookFormat(4, 2)
    tensor = fit_codebook(table, form)
    assert torch.equal(tensor.codes, fit_codebook(table.detach().float(), form).codes)
    assert not tensor.codebook.requires_grad


def test_the_same_arguments_give_the_same_table():
    table, form = like_a_table(300, 32), CodebookFormat(4, 2, 2)
    first = fit_codebook(table, form)
    torch.manual_seed(5)
    again = fit_codebook(table, form)
    assert all(torch.equal(a, again.tensors[name]) for name, a in first.tensors.items())


@pytest.mark.parametrize("form", [CodebookFormat(4, 1), CodebookFormat(4, 2), CodebookFormat(2, 4, 2)], ids=str)
def test_progress_rises_from_nothing_to_all(form):
    heard: list[float] = []
    fit_codebook(gaussian(2 * CHUNK // 512, 512), form, progress=heard.append)
    assert heard == sorted(heard) and heard[0] == 0 and heard[-1] == 1 and len(heard) > 6


def test_shipped_table(tiny_python_lm):
    """8 bits and a scale a row: 0.7 % relative error at 3.9 times fewer bytes than float32, everything counted."""
    from safetensors.torch import load_file

    table = load_file(tiny_python_lm / "model.safetensors")["model.embed_tokens.weight"].float()
    tensor = fit_codebook(table, CodebookFormat(8, 1))
    assert math.sqrt(error(table, tensor) / float(table.double().square().sum())) <= 0.005
    assert 4 * table.numel() / tensor.nbytes >= 3.9


MEMORY = """
import json, resource, torch
from ryzen_compile.numerics.codebook import CodebookFormat
from ryzen_compile.numerics.search.codebook_fit import fit_codebook
torch.set_num_threads(1)
form = CodebookFormat({bits}, {dim}, {stages})
fit_codebook(torch.randn(64, 256), form)
table = torch.empty({rows}, 256)
for part in table.split(4096):
    part.normal_()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
tensor = fit_codebook(table, form)
print(json.dumps([peak() - before, table.nbytes, tensor.nbytes]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux counts it")
@pytest.mark.parametrize(("bits", "dim", "stages"), [(8, 1, 1), (4, 2, 1)])
def test_memory_is_within_twice_the_table(bits, dim, stages):
    """The peak of a process over what it had with the table in memory: less than the table once more."""
    code = MEMORY.format(bits=bits, dim=dim, stages=stages, rows=60_000)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    more, table, _ = json.loads(child.stdout)
    assert more <= table


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        (torch.tensor([[1.0, torch.nan]]), FitSettings(), "1 of 2 weights are NaN"),
        (gaussian(8), FitSettings(), "matrix"),
        (gaussian(4, 5), FitSettings(), "multiple of dim"),
        (gaussian(4, 8), FitSettings(row_weights=torch.ones(3)), r"\(4,\), got \(3,\)"),
        (gaussian(4, 8), FitSettings(row_weights=torch.tensor([1.0, -1, 1, 1])), "0 or more"),
        (gaussian(4, 8), FitSettings(row_weights=torch.tensor([1.0, torch.inf, 1, 1])), "finite"),
        (gaussian(4, 8), FitSettings(row_weights=torch.zeros(4)), "not kept are 0"),
        (gaussian(4, 8), FitSettings(keep=torch.tensor([4])), "0 to 3, got 4 to 4"),
        (gaussian(4, 8), FitSettings(keep=torch.tensor([-1])), "0 to 3, got -1"),
        (gaussian(4, 8), FitSettings(keep=torch.tensor([1, 1])), "repeated"),
        (gaussian(4, 8), FitSettings(keep=torch.tensor([True, False, True, True])), "integers"),
        (gaussian(4, 8) * 1e6, FitSettings(keep=torch.tensor([1])), "kept are NaN or infinite"),
        (gaussian(4, 8), FitSettings(keep_dtype=torch.int8), "float16 or float32"),
        (gaussian(4, 8), FitSettings(rounds=-1), "rounds must be 0 or more"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_fitted_is_refused(table, settings, message):
    with pytest.raises(UsageError, match=message):
        fit_codebook(table, CodebookFormat(3, 2), settings)
