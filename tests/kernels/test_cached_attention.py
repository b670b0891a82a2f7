"""Attention over a cache by the Triton kernels against the reference in float64 over the very rows that they stored.

How rows are stored is the subject of ``test_cache_rows``. In Triton's interpreter where there is no GPU.
"""

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
from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.numerics.rows import RowFormat, decode, encode, hadamard
from tests.kernels.oracle import DEVICE, DTYPES, LIMITS, assert_close, guarded, nmse

pytestmark = pytest.mark.usefixtures("untuned")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    from ryzen_compile.kernels import cached_attention

    return cached_attention


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for each: new rows of all heads are stored by one, as where tokens are many."""
    pytest.importorskip("triton")
    from ryzen_compile.kernels import cache_rows

    monkeypatch.setattr(cache_rows, "MANY_TOKENS", 1)


@dataclass(frozen=True)
class Step:
    """One call, whose numbers follow from its seed; the caches are full of garbage behind their lengths."""

    key: str = "fp32"
    value: str = "fp32"
    lengths: tuple[int, ...] = (40, 3)
    tokens: int = 1
    capacity: int = 41
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    value_dim: int = 16
    rotated: int = 3
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    turned: bool = False
    centred: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def normal(self, salt: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(100 * self.seed + salt))

    def scale(self, name: str, dim: int) -> Tensor | None:
        form = RowFormat.parse(name)
        if form.floats or form.group:
            return None
        return (self.normal(5, 1, self.kv_heads, 1, dim).abs() + 0.5) * 2 / form.limit

    def cache(self, name: str, dim: int, salt: int) -> Tensor:
        """Rows that were stored before, and behind them whatever harms most."""
        form, scale = RowFormat.parse(name), self.scale(name, dim)
        rows = self.normal(salt, len(self.lengths), self.kv_heads, self.capacity, dim)
        stored = torch.from_numpy(encode(rows.numpy(), form, None if scale is None else scale.numpy()))
        stored = stored.to(self.dtype) if name == "fp32" else stored
        for b, length in enumerate(self.lengths):
            stored[b, :, max(length, 0) :] = float("nan") if form.floats else 127 if scale is not None else 255
        return stored.to(DEVICE)

    @property
    def caches(self) -> tuple[Tensor, Tensor]:
        return self.cache(self.key, self.dim, 3), self.cache(self.value, self.value_dim, 4)

    @property
    def packed(self) -> Tensor:
        width = self.heads * self.dim + self.kv_heads * (self.dim + self.value_dim)
        return self.normal(1, len(self.lengths), self.tokens, width).to(self.dtype).to(DEVICE)

    @property
    def sink(self) -> Tensor | None:
        return self.normal(8, self.heads).to(DEVICE) if self.sinks else None

    @property
    def tables(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        angles = (self.normal(6, self.capacity, self.rotated) * 3).to(DEVICE)
        return (angles.cos(), angles.sin()) if self.rotated else (None, None)

    def arguments(self, caches: tuple[Tensor, Tensor], **changes: Any) -> dict[str, Any]:
        scales = (self.scale(self.key, self.dim), self.scale(self.value, self.value_dim))
        k_scale, v_scale = (None if scale is None else scale.to(DEVICE) for scale in scales)
        mean = self.normal(7, 1, self.kv_heads, 1, self.dim).to(DEVICE) if self.centred else None
        own = {"q": self.packed, "k": None, "v": None, "k_cache": caches[0], "v_cache": caches[1]}
        own |= dict(zip(("cos", "sin"), self.tables, strict=True)) | {"sinks": self.sink, "heads": self.heads}
        own |= {
            "lengths": torch.tensor(self.lengths, dtype=torch.int64, device=DEVICE),
            "scale": 0.3,
            "window": self.window,
        }
        own |= {"softcap": self.softcap, "interleaved": False, "k_scale": k_scale, "v_scale": v_scale}
        own |= {"k_format": self.key, "v_format": self.value, "turned": self.turned, "k_mean": mean}
        return own | changes

    def read(self, cache: Tensor, name: str, dim: int) -> Tensor:
        """float64 rows, zeros behind the lengths."""
        scale = self.scale(name, dim)
        rows = decode(cache.cpu().numpy(), RowFormat.parse(name), dim, None if scale is None else scale.numpy())
        there = torch.arange(self.capacity) < torch.tensor(self.lengths)[:, None]
        return torch.where(there[:, None, :, None], torch.from_numpy(np.asarray(rows, np.float64)), 0.0)

    def wanted(self, caches: tuple[Tensor, Tensor]) -> Tensor:
        """What the reference computes in float64 over stored rows: the new ones are given to it as they were stored."""
        keys = self.read(caches[0].float() if caches[0].is_floating_point() else caches[0], self.key, self.dim)
        values = self.read(
            caches[1].float() if caches[1].is_floating_point() else caches[1], self.value, self.value_dim
        )
        batch = len(self.lengths)
        lengths = torch.tensor(self.lengths)
        at = lengths[:, None] - self.tokens + torch.arange(self.tokens)
        queries = self.packed.cpu().double()[..., : self.heads * self.dim]
        queries = queries.view(batch, self.tokens, self.heads, self.dim).transpose(1, 2)
        cos, sin = self.tables
        if cos is not None and sin is not None:
            queries = ops.rotary(queries, at, cos.cpu().double(), sin.cpu().double(), False)
        if self.turned:
            queries = queries @ torch.from_numpy(hadamard(self.dim))
        new = (rows[torch.arange(batch)[:, None], :, at].flatten(2) for rows in (keys, values))
        out, _, _ = ops.cached_attention(
            queries.transpose(1, 2).flatten(2), *new, keys, values, lengths, None, None,
            None if self.sink is None else self.sink.cpu().double(), self.heads, 0.3, self.window, self.softcap, False,
        )  # fmt: skip
        return out


def attend(kernels: ModuleType, step: Step, **changes: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The output, and the caches with the new rows."""
    caches = step.caches
    out = kernels.cached_attention_inplace(**step.arguments(caches, **changes))
    assert out.dtype == step.dtype and out.shape == (*step.packed.shape[:2], step.heads * step.value_dim)
    return out, caches


def assert_attends(kernels: ModuleType, step: Step) -> None:
    out, caches = attend(kernels, step)
    assert_close(out, step.wanted(caches))


def share(monkeypatch: pytest.MonkeyPatch, kernels: ModuleType, programs: int, block: int = 16) -> None:
    """So many programs for the rows of a tile, a block at a time."""
    monkeypatch.setattr(kernels, "_splits", lambda tiles, blocks, slots: programs)
    for name in ("DECODING", "DECODING_FLOAT32", "READING", "READING_FLOAT32"):
        monkeypatch.setattr(kernels, name, ((32, block, 4, 2, 2),))


FORMATS = {
    "floats of odd sizes": Step(dim=7, value_dim=5),
    "floats of other odd sizes": Step(dim=17, value_dim=1, rotated=8, heads=3, kv_heads=1),
    "half-precision rows": Step("fp16", "fp16", dim=31),
    "8 bits": Step("int8", "int8", dim=34, value_dim=6),
    "8 and 4 bits": Step("int8", "int4", value_dim=68),
    "4 bits and floats": Step("int4", "fp32", dim=12, value_dim=7),
    "groups of 8 and 4 bits": Step("int8-g8", "int4-g8", dim=24),
    "groups of 4 and 8 bits": Step("int4-g24", "int8-g6", dim=48, value_dim=12),
    "turned and centred": Step("int4-g8", "int4-g4", turned=True, centred=True),
}


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(kernels, monkeypatch, name, programs):
    share(monkeypatch, kernels, programs)
    assert_attends(kernels, replace(FORMATS[name], tokens=1 if programs == 1 else 2))


@pytest.mark.parametrize("programs", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 17, "sinks": True},
        {"window": 100, "softcap": 1.5},
        {"sinks": True, "softcap": 0.5},
    ],
    ids=str,
)
def test_what_scores_become(kernels, monkeypatch, options, programs):
    share(monkeypatch, kernels, programs)
    assert_attends(kernels, Step(tokens=3, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["fp32", "fp16", "int8", "int4-g8"])
def test_every_type(kernels, monkeypatch, form, dtype):
    share(monkeypatch, kernels, 2)
    assert_attends(kernels, Step(form, form, dtype=dtype, sinks=True))


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), [(1, 1, 40), (3, 1, 31), (4, 4, 3)])
def test_more_queries_than_a_tile(kernels, monkeypatch, heads, kv_heads, tokens, window):
    share(monkeypatch, kernels, 1)
    assert_attends(kernels, Step(lengths=(tokens,), tokens=tokens, heads=heads, kv_heads=kv_heads, window=window))


@pytest.mark.parametrize("programs", [1, 2, 5])
def test_lengths_of_every_kind(kernels, monkeypatch, programs):
    """The first token, a block, one more, one less, a full cache; more programs than there are blocks."""
    share(monkeypatch, kernels, programs)
    assert_attends(kernels, Step(lengths=(1, 16, 17, 15, 41), kv_heads=1, heads=2))


def test_the_kernel_merges_only_what_was_split(kernels, monkeypatch):
    for programs, scratch in ((1, 0), (2, 2)):
        share(monkeypatch, kernels, programs)
        with guarded(monkeypatch) as made:
            out, caches = attend(kernels, Step(dim=7, value_dim=5))
        assert_close(out, Step(dim=7, value_dim=5).wanted(caches))
        assert len(made) == 2 + scratch  # the output, the queries


def test_a_copy_of_the_caches_or_the_caches_themselves(kernels):
    step = Step("int8", "int4-g8")
    given, ours = step.caches, step.caches
    out, keys, values = kernels.cached_attention(**step.arguments(given))
    again = kernels.cached_attention_inplace(**step.arguments(ours))
    assert torch.equal(out, again)
    for one, other, before, fresh in zip((keys, values), ours, given, step.caches, strict=True):
        assert one.is_contiguous()
        assert torch.equal(one, other) and torch.equal(before, fresh) and not torch.equal(one, fresh)


@pytest.mark.parametrize("form", ["fp32", "int8", "int8-g8"])
def test_caches_with_gaps(kernels, form):
    """Tokens before heads, within a larger buffer."""
    step = Step(form, form)
    caches = []
    for cache in step.caches:
        whole = torch.zeros((2, step.capacity + 1, step.kv_heads, cache.shape[3] + 2), dtype=cache.dtype, device=DEVICE)
        whole[:, :-1, :, :-2] = cache.transpose(1, 2)
        caches.append(whole[:, :-1, :, :-2].transpose(1, 2))
    got = kernels.cached_attention_inplace(**step.arguments(tuple(caches)))
    assert_close(got, step.wanted((caches[0].contiguous(), caches[1].contiguous())))


def test_what_is_not_a_number_stays_in_its_sequence(kernels):
    step = Step(lengths=(40, 3, 7))
    packed = step.packed
    packed[1] = float("nan")
    out, _ = attend(kernels, step, q=packed)
    assert out.isnan().all(2).flatten().tolist() == [False, True, False]
    assert torch.equal(out[[0, 2]], attend(kernels, step)[0][[0, 2]])


def test_a_sequence_without_tokens_is_left_alone(kernels, monkeypatch):
    step = Step(lengths=(40, 0, -3))
    for programs in (1, 2):
        share(monkeypatch, kernels, programs)
        out, caches = attend(kernels, step)
        assert out.isnan().all(2).flatten().tolist() == [False, True, True]
        for cache, before in zip(caches, step.caches, strict=True):
            assert torch.equal(cache[1:].isnan(), before[1:].isnan())


def test_every_way_to_compute_it_may_be_measured(kernels, monkeypatch):
    """Measuring runs all candidates on full caches; what is returned is computed after that."""
    tried = []

    def tuned(kernel: str, key: tuple, candidates: list, run: Any, device: torch.device) -> Any:
        assert " " not in "".join(map(str, key))
        for config in candidates[:: len(candidates) - 1]:
            run(config)
            tried.append(config.kwargs["BLOCK"])
        return candidates[-1]

    monkeypatch.setattr(kernels.launch, "tuned", tuned)
    for tokens in (1, 40):
        step = Step("int8", "fp32", lengths=(40,), tokens=tokens, heads=1, kv_heads=1, dtype=torch.float16)
        caches = step.cache(step.key, step.dim, 3), torch.zeros(1, 1, 41, 16, dtype=torch.float16, device=DEVICE)
        out = kernels.cached_attention_inplace(**step.arguments(caches))
        assert_close(out, step.wanted(caches))
    assert len(tried) == 4


@pytest.mark.parametrize(
    ("programs", "blocks", "slots", "wanted"),
    [
        (64, 128, 264, 4),
        (8, 128, 264, 32),
        (264, 128, 264, 1),
        (1000, 128, 264, 1),
        (1, 3, 264, 1),
        (1, 9, 264, 9),
        (5, 1, 264, 1),
    ],
)
def test_how_many_programs_share_rows(kernels, programs, blocks, slots, wanted):
    assert kernels._splits(programs, blocks, slots) == wanted


@pytest.mark.parametrize("programs", [1, 65, 96, 140, 300])
def test_sharing_comes_near_the_best(kernels, programs):
    def time(splits: int) -> int:
        return -(-programs * splits // 264) * -(-128 // splits)

    assert time(kernels._splits(programs, 128, 264)) <= 1.1 * min(map(time, range(1, 129))) + kernels.MERGING


def test_the_comparison_sees_a_wrong_attention(kernels):
    step = Step("int8", "int4")
    out, caches = attend(kernels, step)
    want = step.wanted(caches)

    def wrong(caches: tuple[Tensor, Tensor] = caches, **changes: Any) -> bool:
        return nmse(out, replace(step, **changes).wanted(caches)) > 10 * LIMITS[torch.float32]

    assert nmse(out, want) < LIMITS[torch.float32]
    last = caches[0].clone()
    last[0, :, 39] = 0
    assert wrong((last, caches[1]))
    swapped = caches[1].clone()
    swapped[0, 1, 7, 3] = (swapped[0, 1, 7, 3] >> 4) | (swapped[0, 1, 7, 3] << 4)
    assert wrong((caches[0], swapped))
    assert wrong(lengths=(39, 2)) and wrong(window=39) and wrong(softcap=5.0) and wrong(sinks=True)
    assert wrong((caches[0].flip(1), caches[1])) and wrong(rotated=2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rolling": True}, UnsupportedError, "keep every row.*keep the layer's window in a cache of the whole"),
        ({"sinks": torch.zeros(3)}, UsageError, r"sinks must be \(4,\), got \(3,\)"),
        ({"sinks": torch.zeros(4, dtype=torch.float64)}, UnsupportedError, "sinks must be float32, float16 or"),
        ({"heads": 5}, UsageError, "heads must be a multiple of the 2 kv heads"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(kernels, change, error, message):
    with pytest.raises(error, match=message):
        attend(kernels, Step(), **{n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in change.items()})


@pytest.mark.parametrize(
    ("form", "dim", "message"),
    [
        ("int8", 7, "rows of 7 channels do not lie in pairs"),
        ("int4", 6, "6 channels"),
        ("int4-g6", 24, "multiple of 4"),
    ],
)
def test_rows_that_are_not_pairs_of_bytes_are_left_to_the_reference(kernels, form, dim, message):
    step = Step(form, "fp32", dim=dim)
    caches = step.caches
    with pytest.raises(UnsupportedError, match=message):
        kernels.cached_attention_inplace(**step.arguments(caches))
    for cache, before in zip(caches, step.caches, strict=True):  # nothing was stored
        assert torch.equal(cache.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("change", [{"lengths": ()}, {"tokens": 0}])
def test_nothing_to_do(kernels, change):
    step = replace(Step(), **change)
    caches = tuple(torch.zeros(len(step.lengths), 2, 41, 16, device=DEVICE) for _ in range(2))
    out = kernels.cached_attention_inplace(**step.arguments(caches))
    assert out.shape == (len(step.lengths), step.tokens, 64)


COMPILE = """
import re

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ryzen_compile.kernels import cache_walk
from ryzen_compile.kernels.cache_operands import StoredRows
from ryzen_compile.kernels.cache_step import Side
from ryzen_compile.numerics.rows import RowFormat


NAMES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int16: "*i16"}


def compiled(kernel, types, constants, **options):
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def walk(key, value, model, rows, **options):
    sides = []
    for name in (key, value):
        form = RowFormat.parse(name)
        dtype = model if name == "fp32" else getattr(torch, str(form.dtype))
        sides.append(StoredRows(Side(torch.empty((2, 4, 64, form.width(128)), dtype=dtype), form, 128, None)))
    k, v = sides
    constants = {"K": tuple(k.layout), "V": tuple(v.layout), "SHARING": 4, "WINDOWED": False, "CAPPED": False}
    constants |= {"K_TYPE": k.operand(model), "V_TYPE": v.operand(model), "ROWS": rows, "BLOCK": 64}
    types = {"queries": NAMES[model], "k_cache": NAMES[k.cache.dtype], "v_cache": NAMES[v.cache.dtype]}
    types |= {"lengths": "*i64", "k_scale": "*fp32", "v_scale": "*fp32", "out": "*fp32", "sizes": "*fp32"}
    types |= {"factor": "fp32", "cap": "fp32"}
    return compiled(cache_walk.walk_kernel, types, constants | {"sinks": None}, **options)


def copied(code):  # asynchronously, so many bytes at a time
    return sorted(set(re.findall(r"cp\\.async\\.c[ag]\\.shared\\.global.*?, (0x[0-9a-f]+|\\d+), ", code)))


print(copied(walk("fp32", "fp32", torch.bfloat16, 16, num_stages=3)))
eight = walk("int8", "int4", torch.bfloat16, 16, num_stages=3)
print(copied(eight), "prmt.b32" in eight, "lop3.b32" in eight, "cvt.rn.f16.s" in eight, "ld.shared.b8" in eight)
print("cp.async" in walk("int8-g32", "int4-g32", torch.bfloat16, 16, num_stages=3))
print("wgmma" in walk("fp32", "fp32", torch.bfloat16, 64, num_stages=2))
types = {"parts": "*fp32", "sizes": "*fp32", "sinks": "*fp32", "out": "*bf16"}
print(len(compiled(cache_walk.merge_kernel, types, {"DV": 128, "CHANNELS": 128, "SPLITS": 64, "BLOCK": 16})) > 0)
"""


def test_the_kernels_compile_for_a_gpu_as_they_are_meant_to(tmp_path):
    """16 bytes at a time straight into shared memory, codes by a few instructions for several, tensor cores."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    child = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert child.stdout.splitlines() == [
        "['0x10']",
        "['0x10'] True True False False",
        "True",
        "True",
        "True",
    ], child.stderr


@pytest.mark.gpu
def test_a_captured_graph_serves_every_length(kernels):
    step = Step("int8", "fp32", lengths=(5, 9))
    caches = step.caches
    given = step.arguments(caches)
    kernels.cached_attention_inplace(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.cached_attention_inplace(**given)
    for lengths in ((5, 9), (6, 10), (40, 11)):
        now = replace(step, lengths=lengths)
        for cache, fresh in zip(caches, now.caches, strict=True):
            cache.copy_(fresh)
        given["lengths"].copy_(torch.tensor(lengths))
        graph.replay()
        assert_close(out, now.wanted(caches))
