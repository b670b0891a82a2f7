"""Codebook tables: every bit in its place, every value by the formula in steps, every misfit refused."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics import blockwise
from ryzen_compile.numerics.codebook import (
    CODE_BITS,
    DIMS,
    MOST_CHANNELS,
    STAGES,
    CodebookFormat,
    CodebookTensor,
    pack_codes,
    unpack_codes,
)

FORMATS = [CodebookFormat(*f) for f in product(CODE_BITS, DIMS, STAGES)]
OPTIONAL = ("gain", "offset", "kept")
name = lambda form: f"{form.bits}b-d{form.dim}-s{form.stages}"


def random_parts(form: CodebookFormat, rows: int, width: int, optional: tuple[str, ...] = OPTIONAL) -> dict[str, Any]:
    """Arguments of ``from_codes``."""
    random = torch.Generator().manual_seed(form.bits)
    normal = lambda *shape: torch.randn(shape, generator=random)
    kept = torch.randperm(rows, generator=random)[: rows // 3]
    parts: dict[str, Any] = {
        "codes": torch.randint(0, form.entries, (rows, form.stages, width // form.dim), generator=random),
        "codebook": normal(form.stages, form.entries, form.dim),
        "scales": None if form.group is None else normal(rows, form.groups(width)).half(),
    }
    named = {"gain": normal(width), "offset": normal(width), "kept": normal(len(kept), width)}
    parts |= {key: value for key, value in named.items() if key in optional}
    return parts | ({"kept_ids": kept} if "kept" in optional else {})


def by_the_formula(parts: dict[str, Any], row: int, column: int, form: CodebookFormat, width: int) -> np.float32:
    """One weight in numpy's scalars, each step rounded to float32."""
    ids = parts.get("kept_ids", torch.empty(0)).tolist()
    if row in ids:
        return np.float32(parts["kept"][ids.index(row), column])
    place, inside = divmod(column, form.dim)
    entry = lambda stage: parts["codebook"][stage, parts["codes"][row, stage, place], inside].numpy()
    value = np.float32(entry(0)) if form.stages == 1 else np.float32(entry(0) + entry(1))
    if form.group is not None:
        group = column // (form.group or width)
        value = np.float32(value * np.float32(parts["scales"][row, group].numpy()))
    if "gain" in parts:
        value = np.float32(value * parts["gain"][column].numpy())
    if "offset" in parts:
        value = np.float32(value + parts["offset"][column].numpy())
    return value


@pytest.mark.parametrize("form", FORMATS, ids=name)
@pytest.mark.parametrize("width", [8, 24, 40, 56])
def test_codes_come_back(form: CodebookFormat, width: int) -> None:
    parts = random_parts(form, 7, width)
    tensor = CodebookTensor.from_codes(**parts, form=form, width=width)
    assert torch.equal(tensor.unpacked(), parts["codes"].to(torch.uint8))
    assert tensor.codes.shape == (7, -(-form.stages * (width // form.dim) * form.bits // 8))


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=40))
def test_codes_lie_one_behind_the_other_lowest_bits_first(bits: int, values: list[int]) -> None:
    values = [value & ((1 << bits) - 1) for value in values]
    packed = pack_codes(torch.tensor([values], dtype=torch.int64), bits)
    stream = sum(value << (i * bits) for i, value in enumerate(values))
    assert bytes(packed[0].tolist()) == stream.to_bytes(-(-len(values) * bits // 8), "little")
    assert unpack_codes(packed, bits, len(values))[0].tolist() == values


@pytest.mark.parametrize("group", [None, 0, 8, 40])
@pytest.mark.parametrize("optional", [(), ("gain",), ("offset",), ("kept",), OPTIONAL], ids="+".join)
@pytest.mark.parametrize(("bits", "dim", "stages"), [(3, 2, 1), (8, 4, 2)])
def test_every_weight_is_the_formula_in_steps(
    bits: int, dim: int, stages: int, optional: tuple[str, ...], group: int | None
) -> None:
    form = CodebookFormat(bits, dim, stages, group)
    parts = random_parts(form, 5, 40, optional)
    table = CodebookTensor.from_codes(**parts, form=form, width=40).decode()
    wanted = [[by_the_formula(parts, row, column, form, 40) for column in range(40)] for row in range(5)]
    assert table.dtype == torch.float32 and table.numpy().tobytes() == np.array(wanted, np.float32).tobytes()


@pytest.mark.parametrize("shape", [(0,), (), (1, 1), (3, 5), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_rows_are_those_of_the_whole_table(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    form = CodebookFormat(5, 2, 2, 8)
    tensor = CodebookTensor.from_codes(**random_parts(form, 11, 24), form=form, width=24)
    ids = torch.randint(0, 11, shape, dtype=dtype)
    assert torch.equal(tensor.rows(ids), tensor.decode()[ids.long()]) and tensor.rows(ids).shape == (*shape, 24)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    form = CodebookFormat(6, 4, 1, 0)
    tensor = CodebookTensor.from_codes(**random_parts(form, 13, 40), form=form, width=40)
    whole = tensor.decode()
    monkeypatch.setattr(blockwise, "CHUNK_ELEMENTS", 41)
    assert torch.equal(tensor.decode(), whole)


def test_a_table_without_rows_is_a_table() -> None:
    form = CodebookFormat(3, 2, 2, None)
    tensor = CodebookTensor.from_codes(**random_parts(form, 0, 8, ()), form=form, width=8)
    assert tensor.decode().shape == (0, 8) and tensor.bits_per_weight == float("inf")


@pytest.mark.parametrize("row", [-1, 5])
def test_an_id_that_is_no_rows_is_an_error(row: int) -> None:
    tensor = CodebookTensor.from_codes(**random_parts(CodebookFormat(), 5, 8), form=CodebookFormat(), width=8)
    with pytest.raises(IndexError):
        tensor.rows(torch.tensor([0, row]))


def test_sizes_count_everything() -> None:
    form = CodebookFormat(8, 2, 1, 0)
    tensor = CodebookTensor.from_codes(**random_parts(form, 9, 40), form=form, width=40)
    parts = {"codes": 9 * 20, "codebook": 256 * 2 * 4, "scales": 9 * 2, "gain": 160, "offset": 160, "slots": 18}
    assert {key: tensor.tensors[key].nbytes for key in parts} == parts
    assert tensor.nbytes == sum(parts.values()) + 3 * 40 * 4 and form.code_bits == 4.0
    assert tensor.bits_per_weight == 8 * tensor.nbytes / 360
    assert CodebookFormat(3, 4, 2).code_bits == 1.5 and CodebookFormat(3, 4, 2).entries == 8


def test_kept_rows_stay_in_their_type_and_no_rows_are_none() -> None:
    form = CodebookFormat()
    parts = random_parts(form, 9, 8)
    half = CodebookTensor.from_codes(**parts | {"kept": parts["kept"].half()}, form=form, width=8)
    assert half.kept is not None and half.kept.dtype == torch.float16
    assert torch.equal(half.decode()[parts["kept_ids"]], parts["kept"].half().float())
    double = CodebookTensor.from_codes(**parts | {"kept": parts["kept"].double()}, form=form, width=8)
    assert double.kept is not None and double.kept.dtype == torch.float32
    empty = {"kept_ids": torch.empty(0, dtype=torch.int64), "kept": torch.empty(0, 8)}
    none = CodebookTensor.from_codes(**parts | empty, form=form, width=8)
    assert none.slots is None and none.kept is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits must be 1, 2, 3, 4, 5, 6, 7 or 8, got 0"),
        ({"bits": 9}, "bits must be"),
        ({"bits": True}, "bits must be"),
        ({"bits": 4.0}, "bits must be"),
        ({"dim": 3}, "dim must be 1, 2, 4 or 8, got 3"),
        ({"stages": 3}, "stages must be 1 or 2, got 3"),
        ({"group": -1}, "group must be a multiple of dim, which is 2, got -1"),
        ({"group": 33}, "group must be a multiple of dim"),
        ({"group": False}, "group must be a multiple of dim"),
    ],
)
def test_formats_outside_of_their_ranges_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CodebookFormat(**arguments)


@pytest.mark.parametrize(
    ("form", "width"), [(CodebookFormat(dim=4), 10), (CodebookFormat(group=16), 24), (CodebookFormat(), 0)]
)
def test_widths_that_do_not_divide_are_refused(form: CodebookFormat, width: int) -> None:
    with pytest.raises(UsageError, match=f"rows of {width} weights are not a multiple"):
        form.check(width)


def test_rows_longer_than_any_backend_takes_are_refused() -> None:
    CodebookFormat().check(MOST_CHANNELS)
    with pytest.raises(UsageError, match="rows of 1048578 weights are too long, the most are 1048576"):
        CodebookFormat().check(MOST_CHANNELS + 2)


@pytest.mark.parametrize("group", [None, 0, 8])
def test_what_an_operator_is_given_comes_back(group: int | None) -> None:
    form = CodebookFormat(4, 2, 2, group)
    tensor = CodebookTensor.from_codes(**random_parts(form, 6, 16), form=form, width=16)
    names = ("codes", "codebook", "scales", "gain", "offset", "slots", "kept")
    back = CodebookTensor.stored(*map(tensor.tensors.get, names), 16, 4, form.group_argument)
    assert (back.format, back.shape, back.tensors) == (form, tensor.shape, tensor.tensors)
    assert form.group_argument == (-1 if group is None else group)


def replaced(**changes: Any) -> dict[str, Any]:
    return random_parts(CodebookFormat(4, 2, 1, 0), 6, 8) | changes


def _with(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


FULL = replaced()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (replaced(codes=FULL["codes"][:, :, :3]), r"codes must be \(6, 1, 4\), got \(6, 1, 3\)"),
        (replaced(codes=FULL["codes"].float()), "codes must be integers, got torch.float32"),
        (replaced(codes=_with(FULL["codes"], 16)), "codes must be 0 to 15, got . to 16"),
        (replaced(codes=_with(FULL["codes"], -1)), "codes must be 0 to 15, got -1 to"),
        (replaced(codebook=FULL["codebook"][:, :15]), r"codebook must be \(1, 16, 2\)"),
        (replaced(codebook=_with(FULL["codebook"], float("nan"))), "1 of 32 numbers of codebook are NaN or infinite"),
        (replaced(codebook=FULL["codebook"].int()), "codebook must be floating-point numbers"),
        (replaced(scales=None), "needs scales"),
        (replaced(scales=FULL["scales"][:, 0]), r"scales must be \(6, 1\), got \(6,\)"),
        (replaced(scales=_with(FULL["scales"].float(), 7e4)), "1 of 6 numbers of scales are NaN or infinite as torch"),
        (replaced(gain=FULL["gain"][:7]), r"gain must be \(8,\)"),
        (replaced(offset=_with(FULL["offset"], float("inf"))), "numbers of offset are NaN or infinite"),
        (replaced(kept_ids=None), "there must be one id for every kept row"),
        (replaced(kept_ids=torch.tensor([1, 2, 3])), "there must be one id for every kept row"),
        (replaced(kept_ids=torch.tensor([1, 1])), "must not be repeated"),
        (replaced(kept_ids=torch.tensor([1, 6])), "ids of kept rows must be 0 to 5"),
        (replaced(kept_ids=torch.tensor([[1], [2]])), r"must be \(n,\) with n at most 32767"),
        (replaced(kept=FULL["kept"][:, :7]), r"kept must be \(2, 8\), got \(2, 7\)"),
        (replaced(kept=_with(FULL["kept"], float("nan"))), "numbers of kept are NaN or infinite"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CodebookTensor.from_codes(**parts, form=CodebookFormat(4, 2, 1, 0), width=8)


def test_tensors_that_do_not_fit_are_refused() -> None:
    form = CodebookFormat(4, 2, 1, None)
    good = CodebookTensor.from_codes(**random_parts(form, 6, 8, ()), form=form, width=8)
    with pytest.raises(UsageError, match="has no scales"):
        CodebookTensor(form, good.shape, good.codes, good.codebook, scales=torch.empty(6, 0))
    with pytest.raises(UsageError, match="slots and kept rows go together"):
        CodebookTensor(form, good.shape, good.codes, good.codebook, slots=torch.zeros(6, dtype=torch.int16))
    with pytest.raises(UsageError, match=r"packed in uint8, got torch\.int32"):
        CodebookTensor(form, good.shape, good.codes.int(), good.codebook)
    slots, kept = torch.full((6,), -1, dtype=torch.int16), torch.zeros(1, 8)
    with pytest.raises(UsageError, match="kept must have 1 to 32767 rows, got 0"):
        CodebookTensor(form, good.shape, good.codes, good.codebook, slots=slots, kept=kept[:0])
    with pytest.raises(UsageError, match="kept must have 1 to 32767 rows, got 32768"):
        CodebookTensor(form, good.shape, good.codes, good.codebook, slots=slots, kept=kept.expand(32768, 8))
    with pytest.raises(UsageError, match=r"kept must be \(1, 8\), got \(\)"):
        CodebookTensor(form, good.shape, good.codes, good.codebook, slots=slots, kept=torch.tensor(1.0))
    with pytest.raises(UsageError, match=r"slots must be int16, got torch\.float32"):
        CodebookTensor(form, good.shape, good.codes, good.codebook, slots=slots.float(), kept=kept)
