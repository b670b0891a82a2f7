"""The Triton lookup against decoding the stored table, to the bit; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.numerics.blockwise import BlockFormat, BlockTensor
from ryzen_compile.numerics.codebook import CODE_BITS, DIMS, STAGES, CodebookFormat, CodebookTensor
from tests.kernels.oracle import DEVICE, guarded

V = 11
KEPT = (0, 7)
EVERYTHING = ("gain", "offset", "kept")


@pytest.fixture(scope="module")
def embedding() -> ModuleType:
    pytest.importorskip("triton")
    from ryzen_compile.kernels import embedding

    return embedding


def table(
    form: CodebookFormat,
    width: int,
    there: tuple[str, ...] = EVERYTHING,
    rows: int = V,
    kept_dtype: torch.dtype = torch.float16,
) -> CodebookTensor:
    """Random codes and numbers; of gain, offset and kept rows those that are in ``there``."""
    generator = torch.Generator().manual_seed(width * 8 + form.bits)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return CodebookTensor.from_codes(
        torch.randint(form.entries, (rows, form.stages, form.codes(width)), generator=generator),
        normal(form.stages, form.entries, form.dim),
        form,
        width,
        scales=None if form.group is None else normal(rows, form.groups(width)),
        gain=normal(width) if "gain" in there else None,
        offset=normal(width) if "offset" in there else None,
        kept_ids=torch.tensor(KEPT) if "kept" in there else None,
        kept=normal(len(KEPT), width).to(kept_dtype) if "kept" in there else None,
    )


def arguments(stored: CodebookTensor, device: str = DEVICE, **other: Any) -> tuple[Any, ...]:
    """Those of the operator behind ``ids``, some replaced by ``other``."""
    form = stored.format
    tensors = {name: tensor.to(device) for name, tensor in stored.tensors.items()}
    named = tensors | {"width": stored.shape[1], "bits": form.bits, "group": -1 if form.group is None else form.group}
    names = ("codes", "codebook", "scales", "gain", "offset", "slots", "kept", "width", "bits", "group")
    return tuple((named | other).get(name) for name in names)


def assert_equal(kernels: ModuleType, stored: CodebookTensor, ids: Tensor) -> None:
    got = kernels.codebook_embedding(ids.to(DEVICE), *arguments(stored))
    assert got.dtype == torch.float32 and got.device.type == DEVICE
    assert torch.equal(got.cpu(), stored.rows(ids))


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=environment
    )


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("stages", STAGES)
def test_every_format(embedding, bits, dim, stages):
    # 13 codes a stage end within a byte, but for 8 bits: so the second stage begins there, and the row is padded.
    assert_equal(embedding, table(CodebookFormat(bits, dim, stages), 13 * dim), torch.tensor([V - 1, 7]))


@pytest.mark.parametrize("there", [names for n in range(4) for names in itertools.combinations(EVERYTHING, n)], ids=str)
@pytest.mark.parametrize("group", [None, 0, 2, 6])
def test_optional_tensors(embedding, there, group):
    assert_equal(embedding, table(CodebookFormat(3, 2, 2, group), 18, there), torch.tensor([0, 1]))


@pytest.mark.parametrize("kept_dtype", [torch.float16, torch.float32])
def test_kept_rows_of_both_types(embedding, kept_dtype):
    stored = table(CodebookFormat(4, 1, 1), 9, kept_dtype=kept_dtype)
    assert stored.kept is not None and stored.kept.dtype == kept_dtype
    assert_equal(embedding, stored, torch.tensor(KEPT))


@pytest.mark.parametrize("width", [1, 2, 3, 7, 127, 128, 129, 1023, 1024, 1025, 2053])
@pytest.mark.parametrize("stages", STAGES)
def test_awkward_widths(embedding, width, stages):
    assert_equal(embedding, table(CodebookFormat(5, 1, stages), width), torch.tensor([V - 1, 0]))


def test_a_row_of_several_programs_with_vectors_and_groups(embedding):
    assert_equal(embedding, table(CodebookFormat(6, 8, 2, 24), 24 * 87), torch.tensor([V - 1]))


def test_one_row_of_one_weight(embedding):
    stored = table(CodebookFormat(1, 1, 1), 1, (), rows=1)
    assert_equal(embedding, stored, torch.tensor([0, 0]))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_ids_of_any_shape_and_type(embedding, shape, dtype):
    ids = torch.randint(V, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = table(CodebookFormat(4, 2, 1), 14)
    assert embedding.codebook_embedding(ids.to(DEVICE), *arguments(stored)).shape == (*shape, 14)
    assert_equal(embedding, stored, ids)


def test_tensors_with_gaps(embedding):
    stored = table(CodebookFormat(4, 2, 1), 14)
    gapped = {name: torch.stack((tensor, tensor), -1)[..., 0].to(DEVICE) for name, tensor in stored.tensors.items()}
    assert not gapped["codes"].is_contiguous()
    ids = torch.tensor([[1, 5, 2], [0, 10, 7]]).T
    got = embedding.codebook_embedding(ids.to(DEVICE), *arguments(stored, **gapped))
    assert torch.equal(got.cpu(), stored.rows(ids))


@pytest.mark.parametrize("width", [1, 13, 1025])
def test_nothing_is_written_around_the_output(embedding, width):
    stored = table(CodebookFormat(3, 1, 1), width)
    ids, guard = torch.tensor([V - 1, 0, 4]), 64
    whole = torch.full((2 * guard + len(ids) * width,), -77.0, device=DEVICE)
    on_device = CodebookTensor(
        stored.format, stored.shape, **{name: tensor.to(DEVICE) for name, tensor in stored.tensors.items()}
    )
    embedding._launch(ids.to(DEVICE), on_device, whole[guard:-guard].view(len(ids), width))
    before, rows, after = whole.cpu().split((guard, len(ids) * width, guard))
    assert torch.equal(rows.view(len(ids), width), stored.rows(ids))
    assert bool((before == -77).all()) and bool((after == -77).all())


@pytest.mark.parametrize("there", [(), EVERYTHING])
def test_an_id_outside_the_table_gives_nan_and_is_not_followed(embedding, there):
    stored = table(CodebookFormat(8, 2, 2), 6, there)
    ids = torch.tensor([-1, 3, V, 1 << 40, -(1 << 62), 0])
    got = embedding.codebook_embedding(ids.to(DEVICE), *arguments(stored)).cpu()
    assert got.isnan().all(1).tolist() == [True, False, True, True, True, False]
    assert torch.equal(got[[1, 5]], stored.rows(ids[[1, 5]]))


def test_a_slot_beyond_the_kept_rows_gives_nan_and_is_not_followed(embedding):
    stored = table(CodebookFormat(8, 2, 1), 6)
    slots = torch.full((V,), -1, dtype=torch.int16)
    slots[3], slots[4], slots[5], slots[6] = 1, 2, 32767, -300
    got = embedding.codebook_embedding(torch.arange(V, device=DEVICE), *arguments(stored, slots=slots.to(DEVICE))).cpu()
    assert got.isnan().all(1).nonzero().flatten().tolist() == [4, 5]
    assert torch.equal(got[3], stored.rows(torch.tensor(KEPT[1])))
    assert torch.equal(got[6], stored.rows(torch.tensor(6)))  # coded, as with any negative slot


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"codebook": torch.zeros(256, 2)}, r"codebook must be \(stages, entries, dim\)"),
        ({"codes": torch.zeros(9, dtype=torch.uint8)}, r"codes \(V, row bytes\)"),
        ({"codes": torch.zeros(V, 4, dtype=torch.uint8)}, r"codes must be \(11, 3\), got \(11, 4\)"),
        ({"codes": torch.zeros(V, 3)}, "codes must be packed in uint8, got torch.float32"),
        ({"codebook": torch.zeros(1, 128, 2)}, r"codebook must be \(1, 256, 2\), got \(1, 128, 2\)"),
        ({"bits": 9}, "bits must be 1, 2, 3, 4, 5, 6, 7 or 8, got 9"),
        ({"width": 5}, "rows of 5 weights are not a multiple of dim"),
        ({"scales": None}, "needs scales"),
        ({"gain": torch.ones(5)}, r"gain must be \(6,\), got \(5,\)"),
        ({"kept": None}, "slots and kept rows go together"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_tensors_that_do_not_fit_are_refused(embedding, other, message):
    stored = table(CodebookFormat(8, 2, 1), 6)
    other = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in other.items()}
    with pytest.raises(UsageError, match=message):
        embedding.codebook_embedding(torch.tensor([1], device=DEVICE), *arguments(stored, **other))


def test_ids_must_be_integers(embedding):
    with pytest.raises(UsageError, match=r"ids must be integers, got torch\.float32"):
        embedding.codebook_embedding(torch.zeros(1, device=DEVICE), *arguments(table(CodebookFormat(), 6)))


def test_all_tensors_must_be_on_one_device(embedding):
    stored = table(CodebookFormat(), 6)
    away = torch.ones(6, device="meta")
    with pytest.raises(UsageError, match=f"ids is on {DEVICE}.*, gain on meta"):
        embedding.codebook_embedding(torch.tensor([1], device=DEVICE), *arguments(stored, gain=away))


def test_a_compiled_kernel_refuses_a_cpu(embedding, monkeypatch):
    monkeypatch.setattr(embedding.launch, "interpreted", lambda: False)
    with pytest.raises(UnsupportedError, match="runs on a GPU, the tensors are on cpu; move them to a CUDA device"):
        embedding.codebook_embedding(torch.tensor([1]), *arguments(table(CodebookFormat(), 6), "cpu"))


COMPILE = """
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ryzen_compile.kernels import embedding

KERNEL = embedding._codebook_embedding_kernel
TENSORS = {"ids": "*i64", "codes": "*u8", "codebook": "*fp32", "scales": "*fp16", "gain": "*fp32", "offset": "*fp32",
           "slots": "*i16", "kept": "*fp16", "out": "*fp32"}


def joined(absent, known, **options):  # fused multiply-adds and flushes of subnormal numbers in the kernel for a GPU
    constants = dict.fromkeys(absent) | known
    types = {name: "constexpr" if name in constants else TENSORS.get(name, "i32") for name in KERNEL.arg_names}
    source = ASTSource(fn=KERNEL, signature=types, constexprs=constants)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return len(re.findall(r"\\bfma\\.", code)), code.count(".ftz")


WIDE = {"BITS": 3, "DIM": 2, "STAGES": 2, "VECTORS_PER_SCALE": 16, "BLOCK": 512}
BARE = {"BITS": 8, "DIM": 1, "STAGES": 1, "VECTORS_PER_SCALE": 0, "BLOCK": 1, "vectors": 1, "groups": 1, "rows": 1}
print(joined((), WIDE, enable_fp_fusion=False))
print(joined(("scales", "gain", "offset", "slots", "kept"), BARE, enable_fp_fusion=False))
print(joined((), WIDE, enable_fp_fusion=True)[0] > 0)

KERNEL = embedding._embedding_nbits_kernel
TENSORS = {"ids": "*i64", "packed": "*u8", "scales": "*fp32", "zeros": "*u8", "out": "*fp32"}
print(joined((), {"BITS": 4, "BLOCK": 32, "BYTES": 512}))
"""


def test_the_kernel_compiles_for_a_gpu_and_rounds_every_step(tmp_path):
    """For compute capability 9.0, which needs no GPU; the third line shows what the launch's option prevents. Integers
    have no rounding that a fused multiply-add could save."""
    pytest.importorskip("triton")
    child = run(COMPILE, os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)})
    assert child.stdout.splitlines() == ["(0, 0)", "(0, 0)", "True", "(0, 0)"], child.stderr


BEFORE_A_FORBIDDEN_PAGE = """
import ctypes
import mmap

import torch

from ryzen_compile.kernels import embedding

PROT_NONE = 0
pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
forbidden = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + mmap.PAGESIZE
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(forbidden), mmap.PAGESIZE, PROT_NONE) == 0
for bits in (3, 5, 6, 7, 8):
    pages[mmap.PAGESIZE - 2 * bits : mmap.PAGESIZE] = bytes(2 * bits)
    codes = torch.frombuffer(pages, dtype=torch.uint8, offset=mmap.PAGESIZE - 2 * bits, count=2 * bits).view(2, bits)
    codebook = torch.ones((1, 1 << bits, 1))
    got = embedding.codebook_embedding(torch.tensor([1]), codes, codebook, None, None, None, None, None, 8, bits, -1)
    print(got.sum().item())
"""


def test_nothing_behind_the_last_code_is_read():
    """The codes end where a page begins that must not be read, which would end the process: hence a child."""
    pytest.importorskip("triton")
    child = run(BEFORE_A_FORBIDDEN_PAGE, os.environ | {"TRITON_INTERPRET": "1"})
    assert child.stdout.split() == ["8.0"] * 5, child.stderr


def integers(rows: int, width: int, bits: int = 4, block: int = 32, symmetric: bool = True) -> BlockTensor:
    """Random codes and scales and, unless ``symmetric``, zero points."""
    form, generator = BlockFormat(bits, block, symmetric), torch.Generator().manual_seed(width)
    grid = (rows, form.blocks(width))
    codes = torch.randint(1 << bits, (*grid, block), generator=generator)
    zeros = None if symmetric else torch.randint(1 << bits, grid, generator=generator)
    return BlockTensor.from_codes(codes, torch.randn(grid, generator=generator), zeros, form, (rows, width))


def rows_of_integers(kernels: ModuleType, ids: Tensor, stored: BlockTensor, **other: Any) -> Tensor:
    named = {name: getattr(stored, name) for name in ("packed", "scales", "zeros")}
    named |= {"width": stored.shape[1], "bits": stored.format.stored_bits, "block": stored.format.block} | other
    on_device = (value.to(DEVICE) if isinstance(value, Tensor) else value for value in named.values())
    return kernels.embedding_nbits(ids.to(DEVICE), *on_device)


@pytest.mark.parametrize("width", [1, 3, 31, 127, 129, 1025, 2053])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_of_every_width(embedding, monkeypatch, bits, symmetric, width):
    stored, ids = integers(V, width, bits, 16, symmetric), torch.tensor([[V - 1, 0]])
    with guarded(monkeypatch):
        got = rows_of_integers(embedding, ids, stored)
    assert got.dtype == torch.float32 and torch.equal(got.cpu(), stored.dequantize()[ids])


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_integers_of_every_block(embedding, block):
    stored, ids = integers(V, 600, block=block, symmetric=False), torch.tensor([3, 7])
    assert torch.equal(rows_of_integers(embedding, ids, stored).cpu(), stored.dequantize()[ids])


@pytest.mark.parametrize("ids", [torch.tensor(3), torch.zeros(0, 2, dtype=torch.int32), torch.tensor([[[9]], [[1]]])])
def test_integers_for_ids_of_any_shape(embedding, ids):
    stored = integers(V, 33, symmetric=False)
    gapped = {name: torch.stack((t, t), -1)[..., 0] for name, t in vars(stored).items() if isinstance(t, Tensor)}
    for other in ({}, gapped):
        got = rows_of_integers(embedding, ids, stored, **other)
        assert got.shape == (*ids.shape, 33) and torch.equal(got.cpu(), stored.dequantize()[ids.long()])


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_id_outside_a_table_of_integers_gives_nan(embedding, symmetric):
    stored = integers(V, 33, symmetric=symmetric)
    got = rows_of_integers(embedding, torch.tensor([-1, 3, V, 1 << 40, -(1 << 62)]), stored).cpu()
    assert got.isnan().all(1).tolist() == [True, False, True, True, True]
    assert torch.equal(got[1], stored.dequantize()[3])


def test_the_comparison_sees_wrong_integers(embedding):
    stored, ids = integers(V, 96, symmetric=False), torch.tensor([2])
    assert stored.zeros is not None
    for wrong in (
        {"scales": stored.scales.roll(1, 1)},
        {"zeros": (stored.zeros >> 4) | (stored.zeros << 4)},
        {"packed": (stored.packed >> 4) | (stored.packed << 4)},
    ):
        assert not torch.equal(rows_of_integers(embedding, ids, stored, **wrong).cpu(), stored.dequantize()[ids])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"packed": torch.zeros(V, 2, 16)}, r"packed must be \(11, 2, 16\) in torch.uint8"),
        ({"scales": torch.zeros(V, 2).double()}, r"embedding_nbits: scales must be \(11, 2\) in torch.float32"),
        ({"zeros": torch.zeros(V, 3, dtype=torch.uint8)}, r"zeros must be \(11, 1\)"),
        ({"width": 70}, r"packed must be \(11, 3, 16\) .* for rows of 70, got \(11, 2, 16\)"),
        ({"width": 0}, "in rows of 1 or more, got 4 and 0"),
        ({"bits": 3}, "expected codes of 2, 4 or 8 bits"),
    ],
)
def test_integers_that_do_not_fit_are_refused(embedding, other, message):
    with pytest.raises(UsageError, match=message):
        rows_of_integers(embedding, torch.tensor([1]), integers(V, 33), **other)
    with pytest.raises(UsageError, match="ids must be integers"):
        rows_of_integers(embedding, torch.zeros(1), integers(V, 33))


def test_places_in_the_table_beyond_int32(embedding):
    rows, width = (1 << 21) + 3, 1024
    codes = torch.from_numpy(np.zeros((rows, width), np.uint8)).to(DEVICE)  # NumPy's zeros take memory once written to
    codes[-1] = torch.arange(width, device=DEVICE).to(torch.uint8)
    codebook = torch.arange(256.0, device=DEVICE).view(1, 256, 1)
    ids = torch.tensor([rows - 1], device=DEVICE)
    got = embedding.codebook_embedding(ids, codes, codebook, None, None, None, None, None, width, 8, -1)
    assert torch.equal(got[0], codes[-1].float())


@pytest.mark.gpu
def test_places_in_the_output_beyond_int32(embedding):
    width, count = 1024, (1 << 21) + 1
    stored = table(CodebookFormat(8, 1, 1), width)
    ids = torch.full((count,), 3, device=DEVICE)
    ids[-1] = V - 1
    got = embedding.codebook_embedding(ids, *arguments(stored))
    assert torch.equal(got[-1].cpu(), stored.rows(torch.tensor(V - 1)))
