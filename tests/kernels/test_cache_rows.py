"""Rows as the Triton kernel stores them against ``numerics.rows``, to the bit; interpreted where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ryzen_compile import ops
from ryzen_compile.errors import ConfigError, UnsupportedError, UsageError
from ryzen_compile.numerics.rows import RowFormat, encode
from tests.kernels.oracle import DEVICE, DTYPES, assert_close, guarded
from tests.numerics.test_rows import BORDERS, on_the_border

pytestmark = pytest.mark.usefixtures("untuned")

B, T, H, K, S = 2, 3, 4, 2, 9
UNTOUCHED = 77


@pytest.fixture(scope="module")
def cache_rows() -> ModuleType:
    pytest.importorskip("triton")
    from ryzen_compile.kernels import cache_rows

    return cache_rows


@dataclass(frozen=True)
class Case:
    """Formats and sizes; every number follows from them."""

    key: str
    value: str
    dim: int = 8
    value_dim: int = 8
    rotated: int = 3
    interleaved: bool = False
    centred: bool = False
    turned: bool = False
    apart: bool = False
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = (T, S)

    def normal(self, seed: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        sizes = (H * self.dim, K * self.dim, K * self.value_dim)
        q, k, v = (self.normal(i, B, T, n).to(self.dtype) for i, n in enumerate(sizes))
        return q, k, v

    def cache(self, name: str, dim: int) -> Tensor:
        form = RowFormat.parse(name)
        dtype = self.dtype if name == "fp32" else torch.from_numpy(np.zeros(1, form.dtype)).dtype
        return torch.full((B, K, S, form.width(dim)), UNTOUCHED, dtype=dtype, device=DEVICE)

    def scale(self, name: str, dim: int) -> Tensor | None:
        form = RowFormat.parse(name)
        if form.floats or form.group:
            return None
        return self.normal(5, 1, K, 1, dim).abs().add(0.5) * 2 / form.limit  # some values are clamped

    @property
    def tables(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        angles = self.normal(6, S, self.rotated) * 3
        return (angles.cos(), angles.sin()) if self.rotated else (None, None)

    @property
    def mean(self) -> Tensor | None:
        return self.normal(7, 1, K, 1, self.dim) if self.centred else None

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """Of ``CacheStep.of``."""
        q, k, v = self.inputs if self.apart else (torch.cat(self.inputs, dim=-1), None, None)
        cos, sin = self.tables
        own = {"op": "step", "q": q, "k": k, "v": v, "lengths": torch.tensor(self.lengths, device=DEVICE)}
        own |= {"cos": cos, "sin": sin, "heads": H, "interleaved": self.interleaved, "turned": self.turned}
        own |= {"k_cache": self.cache(self.key, self.dim), "v_cache": self.cache(self.value, self.value_dim)}
        own |= {"k_scale": self.scale(self.key, self.dim), "v_scale": self.scale(self.value, self.value_dim)}
        return own | {"k_format": self.key, "v_format": self.value, "k_mean": self.mean} | changes

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D) and both caches, by the reference's own steps."""
        q, k, v = (x.float().view(B, T, n, -1).transpose(1, 2) for x, n in zip(self.inputs, (H, K, K), strict=True))
        positions = torch.tensor(self.lengths, device=DEVICE)[:, None] - T + torch.arange(T, device=DEVICE)
        cos, sin = self.tables
        if cos is not None:
            q, k = (ops.rotary(x, positions, cos, sin, self.interleaved) for x in (q, k))
        if self.mean is not None:
            k = k - self.mean
        caches = []
        for x, name in ((k, self.key), (v, self.value)):
            cache, scale = self.cache(name, x.shape[3]), self.scale(name, x.shape[3])
            stored = encode(x.cpu().numpy(), RowFormat.parse(name), None if scale is None else scale.cpu().numpy())
            for b, at in enumerate(positions.tolist()):
                cache[b, :, at] = torch.from_numpy(stored[b]).to(cache)
            caches.append(cache)
        return q.transpose(1, 2).to(self.dtype), *caches


def stored(kernels: ModuleType, case: Case, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ryzen_compile.kernels.cache_step import CacheStep

    given = case.arguments(**changes)
    return kernels.store(CacheStep.of(**given)), given["k_cache"], given["v_cache"]


def assert_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


CASES = {
    "floats of odd sizes": Case("fp32", "fp32", 7, 5),
    "floats in half precision": Case("fp16", "fp16", 7, 17, interleaved=True),
    "nothing turns": Case("fp32", "int8", rotated=0),
    "one channel": Case("fp32", "int8", 1, 1, rotated=0),
    "8 and 4 bits": Case("int8", "int4", 10, 6, centred=True),
    "4 and 8 bits": Case("int4", "int8", 6, 7, interleaved=True, centred=True, apart=True),
    "groups of 8 and 4 bits": Case("int8-g6", "int4-g4", 12, 8, rotated=6, centred=True),
    "groups of 4 and 8 bits": Case("int4-g16", "int8-g2", 48, 10, rotated=11, interleaved=True),
    "one group, at an odd address": Case("int4-g6", "int4-g10", 6, 10),
}


@pytest.mark.parametrize("name", CASES)
def test_stored_bytes_are_those_of_the_format(cache_rows, monkeypatch, name):
    case = CASES[name]
    with guarded(monkeypatch):
        got = stored(cache_rows, case)
    assert_equal(got, case.expected())


@pytest.mark.parametrize("name", ["8 and 4 bits", "groups of 8 and 4 bits"])
def test_several_heads_of_many_tokens_share_a_program(cache_rows, monkeypatch, name):
    monkeypatch.setattr(cache_rows, "MANY_TOKENS", 1)
    assert_equal(stored(cache_rows, CASES[name]), CASES[name].expected())


@pytest.mark.parametrize("name", ["floats of odd sizes", "groups of 4 and 8 bits"])
def test_caches_with_gaps(cache_rows, name):
    """Tokens before heads, in a part of a larger buffer: what lies beside it stays."""
    case = CASES[name]
    want = case.expected()
    caches = []
    for cache in (case.cache(case.key, case.dim), case.cache(case.value, case.value_dim)):
        whole = torch.full((B + 1, S + 2, K, cache.shape[3]), UNTOUCHED, dtype=cache.dtype, device=DEVICE)
        caches.append(whole[1:, 1:-1].transpose(1, 2))
    assert not caches[0].is_contiguous()
    assert_equal(stored(cache_rows, case, k_cache=caches[0], v_cache=caches[1]), want)
    for cache in caches:
        whole = cache._base
        assert whole is not None
        assert bool((whole[0] == UNTOUCHED).all() and (whole[:, [0, -1]] == UNTOUCHED).all())


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("form", ["fp32", "int8", "int4-g4"])
def test_half_precision_is_rounded_once(cache_rows, dtype, form):
    case = Case(form, form, dtype=dtype, centred=True)
    queries, keys, values = stored(cache_rows, case)
    want = case.expected()
    assert queries.dtype == dtype
    assert_close(queries, want[0].double())  # the interpreter cuts bfloat16 off where a GPU rounds
    assert_close(keys, want[1].double(), None if form == "fp32" else 0.0)
    assert torch.equal(values, want[2])


@pytest.mark.parametrize("form", ["int8-g4", "int4-g4"])
def test_unusual_numbers(cache_rows, form):
    """Zeros of both signs, numbers beyond float16 and below its smallest, and what is not a number."""
    case = Case(form, form, rotated=0, apart=True)
    q, k, _ = case.inputs
    values = torch.zeros(B, T, K, 2, 4, device=DEVICE)
    values[0, 0, 0, 0, 1] = -0.0
    values[0, 0, 0, 1] = -0.0
    values[0, 0, 1, 0] = torch.tensor([1e-9, -3e38, 5.0, 0.0])
    values[0, 1, 0, 0] = torch.tensor([-1.0, 1.0, 1.0, -1.0])  # as far on either side
    values[0, 1, 0, 1] = torch.tensor([-1e-9, 1e-12, 0.0, 0.0])
    values[0, 2, 0, 0] = torch.tensor([0.5, 1.5, 2.5, -7.0])  # halves
    values[0, 2, 1, 1] = float("nan")
    _, _, cache = stored(cache_rows, case, q=q, k=k, v=values.flatten(2))
    rows = np.ascontiguousarray(cache.cpu().numpy()[0, :, :T])
    plain = values[0].nan_to_num().transpose(0, 1).flatten(2).cpu().numpy()
    want = encode(plain, RowFormat.parse(form))
    bad = rows[1, 2, -2:].copy().view(np.float16)
    assert np.isnan(bad).all()
    rows[1, 2], want[1, 2] = 0, 0
    np.testing.assert_array_equal(rows, want)


def test_groups_that_two_scales_fit_almost_equally(cache_rows):
    """Whose errors a sum in float32 would order by how it happens to be rounded."""
    form = RowFormat(4, 32)
    case = Case(str(form), str(form), 32, 32, rotated=0, apart=True)
    groups = np.stack([on_the_border(form, seed) for seed in BORDERS]).reshape(B, T, K, 32)
    q, k, _ = case.inputs
    _, _, cache = stored(cache_rows, case, q=q, k=k, v=torch.from_numpy(groups).flatten(2).to(DEVICE))
    want = encode(groups.transpose(0, 2, 1, 3), form)
    for b, length in enumerate(case.lengths):
        np.testing.assert_array_equal(cache[b, :, length - T : length].cpu().numpy(), want[b])


def test_beyond_float16_is_clamped_and_infinity_stays_where_floats_are_as_computed(cache_rows):
    case = Case("fp16", "fp32", rotated=0, apart=True, dtype=torch.float16)
    q, k, v = (x.fill_(float("inf")) for x in case.inputs)
    k[..., 0] = float("nan")
    _, keys, values = stored(cache_rows, case, q=q, k=k.float(), v=v)
    assert bool((keys[0, 0, :T, 1:] == 65504).all() and keys[0, 0, :T, 0].isnan().all())
    assert bool(values[0, :, :T].isposinf().all())


def test_turned_rows(cache_rows):
    """Products sum in another order: the last bit of a few scales and codes may differ, floats by rounding."""
    case = Case("fp32", "int4-g4", 16, centred=True, turned=True)
    queries, keys, values = stored(cache_rows, case)
    plain = replace(case, turned=False).expected()
    spread = torch.from_numpy(cache_rows.rows.hadamard(16)).to(DEVICE)
    assert_close(queries, plain[0].double() @ spread)
    new = torch.arange(S - T, S)
    assert_close(keys[1][:, new], plain[1].double()[1][:, new] @ spread)
    assert bool((keys[0, :, T:] == UNTOUCHED).all())
    assert torch.equal(values, plain[2])
    coded = stored(cache_rows, replace(case, key="int4-g8"))[1]
    want = encode((plain[1].double()[1][:, new] @ spread).float().cpu().numpy(), RowFormat(4, 8))
    assert (coded[1][:, new].cpu().numpy() == want).mean() > 0.98


@pytest.mark.parametrize(("lengths", "rows"), [((1, S), [0]), ((S + 2, S), [S - 1]), ((0, S), []), ((-5, S), [])])
def test_positions_outside_of_the_cache_are_not_written(cache_rows, lengths, rows):
    case = Case("fp32", "int8", lengths=lengths)
    queries, keys, values = stored(cache_rows, case)
    for cache in (keys, values):
        written = (cache[0] != UNTOUCHED).any(2).any(0)
        assert written.nonzero().flatten().tolist() == rows
        assert (cache[1] != UNTOUCHED).any(2).all(0).nonzero().flatten().tolist() == [6, 7, 8]
    assert not bool(queries[1].isnan().any())


def test_the_comparison_sees_wrong_rows(cache_rows):
    case = CASES["4 and 8 bits"]
    want = case.expected()
    late = replace(case, lengths=(T + 1, S)).expected()
    assert not torch.equal(late[1], want[1]) and not torch.equal(late[2], want[2])
    elsewhere = [cache.roll(1, 2) for cache in late[1:]]  # the rows of other positions, at the same places
    got = stored(cache_rows, case)
    assert not torch.equal(got[1][0], elsewhere[0][0])
    swapped = (got[1] >> 4) | (got[1] << 4)
    assert torch.equal(got[1], want[1]) and not torch.equal(swapped, want[1])
    assert not torch.equal(got[1], replace(case, interleaved=False).expected()[1])
    assert not torch.equal(got[1], replace(case, centred=False).expected()[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k_cache": torch.zeros(2, 2, 9)}, UsageError, r"caches must be \(B, K, S, W\)"),
        ({"v_cache": torch.zeros(2, 2, 8, 8)}, UsageError, "of one B, K and S"),
        ({"heads": 3}, UsageError, "heads must be a multiple of the 2 kv heads, got 3"),
        ({"q": torch.zeros(2, 3, 63)}, UsageError, r"q must be \(B, T, 64\) with B 2 .*got \(2, 3, 63\)"),
        ({"k": torch.zeros(2, 3, 16)}, UsageError, "k and v go together"),
        ({"sin": None}, UsageError, "cos and sin go together"),
        ({"cos": torch.zeros(9, 5)}, UsageError, r"cos and sin must be \(N, R\)"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, UsageError, r"lengths must be integers \(2,\), got .*\(3,\)"),
        ({"k_format": "int3"}, ConfigError, "'int3' is no cache format"),
        ({"k_format": "int8"}, UsageError, "k_cache must be torch.int8 for int8, got torch.float32"),
        ({"v_format": "int8", "v_cache": torch.zeros(2, 2, 9, 8, dtype=torch.int8)}, UsageError, "needs v_scale"),
        ({"k_mean": torch.zeros(1, 2, 1, 7)}, UsageError, r"k_mean must be \(1, 2, 1, 8\), got \(1, 2, 1, 7\)"),
        ({"v_format": "int8-g4", "v_cache": torch.zeros(2, 2, 9, 7, dtype=torch.uint8)}, UsageError, "rows of 7, .* 6"),
        ({"k_cache": torch.zeros(2, 2, 8, 9).transpose(2, 3)}, UsageError, "must lie next to each other"),
        ({"q": torch.zeros(2, 3, 64, dtype=torch.float64)}, UnsupportedError, "q must be float32, float16 or"),
        ({"lengths": torch.zeros(2, dtype=torch.int64, device="meta")}, UsageError, "on one device"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(cache_rows, change, error, message):
    moved = {
        name: value.to(DEVICE) if isinstance(value, Tensor) and not value.is_meta else value
        for name, value in change.items()
    }
    with pytest.raises(error, match=message):
        stored(cache_rows, Case("fp32", "fp32"), **moved)


def test_heads_that_are_too_wide_are_left_to_the_reference(cache_rows):
    with pytest.raises(UnsupportedError, match="heads of 1 to 256 channels, got 257"):
        stored(cache_rows, Case("fp32", "fp32", 257))


COMPILE = """
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ryzen_compile.kernels import cache_rows


KERNEL = cache_rows._cache_rows_kernel
TENSORS = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "queries": "*bf16", "lengths": "*i64", "cos": "*fp32",
           "sin": "*fp32", "k_mean": "*fp32", "k_scale": "*fp32", "v_scale": "*fp32"}


def joined(k_cache, v_cache, absent=(), **known):
    constants = {"D": 128, "DV": 128, "R": 64, "INTERLEAVED": False, "PLACED": True, "HEADS": 1} | known
    constants |= dict.fromkeys(absent)
    types = TENSORS | {"k_cache": k_cache, "v_cache": v_cache}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in KERNEL.arg_names}
    source = ASTSource(fn=KERNEL, signature=signature, constexprs=constants)
    options = {"enable_fp_fusion": False, "num_warps": 1}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return len(re.findall(r"\\bfma\\.", code)), code.count(".ftz")


print(joined("*bf16", "*fp16", ("k_mean", "k_scale", "v_scale"), K_BITS=32, K_GROUP=0, V_BITS=16, V_GROUP=0))
print(joined("*i8", "*u8", K_BITS=8, K_GROUP=0, V_BITS=4, V_GROUP=0))
print(joined("*u8", "*u8", ("k_scale", "v_scale"), K_BITS=4, K_GROUP=32, V_BITS=8, V_GROUP=32, HEADS=8))
"""


def test_the_kernel_compiles_for_a_gpu_and_rounds_every_step(tmp_path):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    child = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert child.stdout.splitlines() == ["(0, 0)"] * 3, child.stderr
