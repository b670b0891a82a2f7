"""Attention against loops over rows in float64; attention over a cache against attention over the whole sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.testing import assert_close

from ryzen_compile import ops
from ryzen_compile.errors import ConfigError
from ryzen_compile.numerics.rows import RowFormat, decode, encode, hadamard
from ryzen_compile.ops.attention import cached_attention_inplace
from ryzen_compile.spec import resident_rows

TOKENS, CAPACITY, GARBAGE = 9, 13, 1e4


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True)
class Options:
    scale: float = 0.37
    window: int = 0
    softcap: float = 0.0
    causal: bool = True
    sinks: bool = False
    shift: int = 0  # of the mask and
    late: int = 0  # of the queries' positions: for controls


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, o: Options) -> Tensor:
    """(B, H, T, D) -> (B, T, H, D'), one query of one head after another."""
    batch, heads, tokens, _ = q.shape
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(batch, tokens, heads, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // k.shape[1])
            products = torch.einsum("td,sd->ts", q[b, h], k[b, kv]).tolist()
            sink = math.exp(float(sinks[h])) if sinks is not None else 0.0
            for t in range(tokens):
                behind = t + o.shift if o.causal else t + o.shift + o.window - 1 if o.window else tokens
                last = min(behind, tokens - 1)
                first = max(t + o.shift - o.window + 1, 0) if o.window else 0
                scores = [o.scale * s for s in products[t][first : last + 1]]
                weights = [math.exp(o.softcap * math.tanh(s / o.softcap) if o.softcap else s) for s in scores]
                shares = torch.tensor(weights, dtype=torch.float64) / (sum(weights) + sink)
                out[b, t, h] = shares @ v[b, kv, first : last + 1]
    return out


def qkv(heads: int = 4, kv_heads: int = 2, tokens: int = 7, dim: int = 6, value_dim: int = 6) -> tuple[Tensor, ...]:
    return (
        torch.randn(2, heads, tokens, dim),
        torch.randn(2, kv_heads, tokens, dim),
        torch.randn(2, kv_heads, tokens, value_dim),
    )


def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, o: Options) -> Tensor:
    return ops.attention(q, k, v, sinks, o.scale, o.window, o.softcap, o.causal)


def close(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got.double(), want, rtol=1e-4, atol=1e-5)


FORMS = {
    "plain": Options(),
    "window 1": Options(window=1),
    "window 3": Options(window=3),
    "window longer than the tokens": Options(window=31),
    "softcap": Options(softcap=0.8),
    "sinks": Options(sinks=True),
    "all keys": Options(causal=False),
    "window to both sides": Options(window=3, causal=False),
    "all at once": Options(window=3, softcap=0.8, sinks=True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("heads", "kv_heads", "tokens", "dim", "value_dim"), [(4, 2, 7, 6, 6), (3, 1, 5, 7, 3)])
def test_attention_is_its_formula(form: str, heads: int, kv_heads: int, tokens: int, dim: int, value_dim: int) -> None:
    q, k, v = qkv(heads, kv_heads, tokens, dim, value_dim)
    o = FORMS[form]
    sinks = torch.randn(heads) if o.sinks else None
    got = run(q, k, v, sinks, o)
    assert got.shape == (2, tokens, heads, value_dim)
    assert_close(got.double(), attend(q, k, v, sinks, o), rtol=1e-4, atol=1e-5)


def test_one_token_sees_itself() -> None:
    q, k, v = (torch.randn(1, 1, 1, 1) for _ in range(3))
    assert_close(run(q, k, v, None, Options()), v, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize(
    "form", [Options(causal=False), Options(causal=False, sinks=True), FORMS["window to both sides"]]
)
def test_padding_is_as_if_it_were_not_there(form: Options, dtype: torch.dtype) -> None:
    """Padding behind: every token's row is that of the tokens alone, whatever stands in the padding."""
    q, k, v = qkv(tokens=11)
    o, sinks = form, torch.randn(4) if form.sinks else None
    mask = torch.ones(2, 11, dtype=dtype)
    mask[1, 5:] = 0
    rest = sinks, o.scale, o.window, o.softcap, o.causal
    got = ops.attention(q, k, v, *rest, mask)
    assert_close(got[0], run(q, k, v, sinks, o)[0], rtol=1e-6, atol=1e-6)
    alone = run(*(x[1:, :, :5] for x in (q, k, v)), sinks, o)
    assert_close(got[1:, :5], alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got[1:, :5], run(q, k, v, sinks, o)[1:, :5], atol=1e-2)
    k[1, :, 5:], v[1, :, 5:] = 1e4, 1e4
    assert torch.equal(ops.attention(q, k, v, *rest, mask)[:, :5], got[:, :5])
    assert got.isfinite().all() and (o.window == 0 or not got[1, 7:].any())  # a query that sees nothing gets zeros


CONTROLS = {
    "mask one too far": replace(FORMS["plain"], shift=1),
    "window one too long": Options(window=4),
    "no window": Options(),
    "scale off by 1 %": Options(scale=0.37 * 1.01, window=3),
    "soft cap": Options(window=3, softcap=5.0),
    "sinks": Options(window=3, sinks=True),
    "all keys": Options(causal=False, window=3),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_the_comparison_sees_a_wrong_attention(control: str) -> None:
    q, k, v = qkv()
    sinks = torch.randn(4)
    got = run(q, k, v, None, Options(window=3))
    assert close(got, attend(q, k, v, None, Options(window=3)))
    wrong = CONTROLS[control]
    assert not close(got, attend(q, k, v, sinks if wrong.sinks else None, wrong))


def test_the_comparison_sees_wrong_groups() -> None:
    q, k, v = qkv()
    want = attend(q, k, v, None, Options())
    assert not close(run(q, k.flip(1), v.flip(1), None, Options()), want)
    interleaved = q[:, [0, 2, 1, 3]]  # groups that alternate instead of following each other
    assert not close(run(interleaved, k, v, None, Options())[:, :, [0, 2, 1, 3]], want)


# --- over a cache -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Storage:
    """How rows are kept; fixed scales differ from head to head and from channel to channel."""

    key: str = "fp32"
    value: str = "fp32"
    turned: bool = False
    rolling: bool = False
    centred: bool = False

    def mean(self, layer: Layer) -> Tensor | None:
        size = (1, layer.kv_heads, 1, layer.dim)
        return 2 * torch.randn(size, generator=torch.Generator().manual_seed(2)) if self.centred else None

    def scales(self, layer: Layer) -> tuple[Tensor | None, Tensor | None]:
        generator = torch.Generator().manual_seed(1)
        return tuple(
            (0.5 + torch.rand(1, layer.kv_heads, 1, dim, generator=generator)) * 3 / form.limit
            if not form.floats and not form.group
            else None
            for form, dim in self.forms(layer)
        )

    def forms(self, layer: Layer) -> tuple[tuple[RowFormat, int], tuple[RowFormat, int]]:
        return (RowFormat.parse(self.key), layer.dim), (RowFormat.parse(self.value), layer.value_dim)

    def rows(self, layer: Layer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, T, D) as it lies in the cache."""
        if self.centred:
            keys = keys - self.mean(layer)
        if self.turned:
            keys = keys.double() @ torch.from_numpy(hadamard(layer.dim))
        return tuple(
            torch.from_numpy(encode(x.float().numpy(), form, None if scale is None else scale.numpy()))
            for x, (form, _), scale in zip((keys, values), self.forms(layer), self.scales(layer), strict=True)
        )

    def read(self, layer: Layer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of ``rows``, in float64, but for a mean: what it adds to all scores of a query is nothing."""
        keys, values = (
            torch.from_numpy(decode(x.numpy(), form, dim, None if scale is None else scale.numpy())).double()
            for x, (form, dim), scale in zip((keys, values), self.forms(layer), self.scales(layer), strict=True)
        )
        return (keys @ torch.from_numpy(hadamard(layer.dim)) if self.turned else keys), values


@dataclass(frozen=True)
class Layer:
    """One attention with its inputs for a whole sequence, as the projections leave them."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 6
    value_dim: int = 6
    rotated: int = 2  # 0: none
    interleaved: bool = False
    options: Options = Options()
    storage: Storage = Storage()

    def inputs(self, batch: int = 1, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.randn(batch, tokens, self.heads * self.dim),
            torch.randn(batch, tokens, self.kv_heads * self.dim),
            torch.randn(batch, tokens, self.kv_heads * self.value_dim),
        )

    def angles(self, positions: int = CAPACITY) -> Tensor | None:
        """Without a rule, so that a shift of all positions is no rotation of its own."""
        return torch.rand(positions, self.rotated) * 6 if self.rotated else None

    def caches(self, batch: int = 1, capacity: int = CAPACITY) -> tuple[Tensor, Tensor]:
        """Full of values that must not matter."""
        size = (batch, self.kv_heads, capacity)
        keys, values = torch.full((*size, self.dim), GARBAGE), torch.full((*size, self.value_dim), -GARBAGE)
        return self.storage.rows(self, keys, values)

    def step(
        self,
        inputs: tuple[Tensor, ...],
        caches: tuple[Tensor, Tensor],
        lengths: list[int],
        angles: Tensor | None,
        sinks: Tensor | None,
        packed: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (torch.cat(inputs, dim=-1), None, None) if packed else inputs
        tables = (None, None) if angles is None else (angles.cos(), angles.sin())
        o, s = self.options, self.storage
        rest = (self.heads, o.scale, o.window, o.softcap, self.interleaved)
        kept = () if s == Storage() else (*s.scales(self), s.key, s.value, s.turned, s.rolling, s.mean(self))
        return ops.cached_attention(q, k, v, *caches, torch.tensor(lengths), *tables, sinks, *rest, *kept)

    def in_chunks(
        self,
        inputs: tuple[Tensor, ...],
        chunks: tuple[int, ...],
        capacity: int,
        angles: Tensor | None,
        sinks: Tensor | None = None,
        packed: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The output of the whole sequence, and the caches it leaves."""
        caches, outs, done = self.caches(inputs[0].shape[0], capacity), [], 0
        for new in chunks:
            piece = tuple(x[:, done : done + new] for x in inputs)
            done += new
            out, *caches = self.step(piece, caches, [done] * inputs[0].shape[0], angles, sinks, packed)
            outs.append(out)
        return torch.cat(outs, dim=1), tuple(caches)

    def whole(self, inputs: tuple[Tensor, ...], angles: Tensor | None, sinks: Tensor | None) -> Tensor:
        """By hand over the whole sequence: (B, T, H D')."""
        rows = self.storage.read(self, *self.rows(inputs, angles))
        return attend(self.apart(inputs, angles)[0], *rows, sinks, self.options).flatten(2)

    def rows(self, inputs: tuple[Tensor, ...], angles: Tensor | None) -> tuple[Tensor, Tensor]:
        """All of the sequence's rows as they are stored."""
        _, keys, values = self.apart(inputs, angles)
        if angles is not None and self.storage.key != "fp32":  # codes follow from how float32 rounds
            keys = self.apart(inputs, None)[1].float()
            at = torch.arange(keys.shape[2]).expand(len(keys), -1)
            keys = ops.rotary(keys, at, angles.cos(), angles.sin(), self.interleaved)
        return self.storage.rows(self, keys, values)

    def apart(self, inputs: tuple[Tensor, ...], angles: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, D) in float64, rotated."""
        batch, tokens = inputs[0].shape[:2]
        q, k, v = (
            x.view(batch, tokens, n, -1).transpose(1, 2).double()
            for x, n in zip(inputs, (self.heads, self.kv_heads, self.kv_heads), strict=True)
        )
        if angles is not None:
            q, k = (self.turned(x, angles, late) for x, late in ((q, self.options.late), (k, 0)))
        return q, k, v

    def turned(self, x: Tensor, angles: Tensor, late: int) -> Tensor:
        x, r = x.clone(), self.rotated
        a = [2 * i if self.interleaved else i for i in range(r)]
        b = [2 * i + 1 if self.interleaved else i + r for i in range(r)]
        for t in range(x.shape[2]):
            turn = torch.polar(torch.ones(r).double(), angles[t + late].double())
            both = torch.complex(x[:, :, t, a], x[:, :, t, b]) * turn
            x[:, :, t, a], x[:, :, t, b] = both.real, both.imag
        return x


LAYERS = {
    "plain": Layer(),
    "not rotated": Layer(rotated=0),
    "interleaved": Layer(interleaved=True, rotated=3),
    "window 1": Layer(options=Options(window=1)),
    "window 3, soft cap, sinks": Layer(options=Options(window=3, softcap=0.8, sinks=True)),
    "one kv head": Layer(heads=3, kv_heads=1, dim=7),
    "every head its own": Layer(kv_heads=4),
    "narrow values": Layer(value_dim=3),
}
CHUNKS = [(TOKENS,), (1,) * TOKENS, (4, 1, 3, 1)]


@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("name", LAYERS)
def test_chunk_by_chunk_equals_the_whole_sequence(name: str, packed: bool) -> None:
    layer = LAYERS[name]
    inputs, angles = layer.inputs(), layer.angles()
    sinks = torch.randn(layer.heads) if layer.options.sinks else None
    want = layer.whole(inputs, angles, sinks)
    for chunks in CHUNKS:
        got, _ = layer.in_chunks(inputs, chunks, CAPACITY, angles, sinks, packed)
        assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
def test_rows_of_unequal_length_decode_each_at_its_own_place(packed: bool) -> None:
    layer = LAYERS["window 3, soft cap, sinks"]
    inputs, angles, sinks = layer.inputs(batch=3), layer.angles(), torch.randn(layer.heads)
    lengths = [1, 4, 9]  # including the token that is computed together
    keys, values = layer.caches(batch=3)
    for row, length in enumerate(lengths):
        if length > 1:
            before = tuple(x[row : row + 1, : length - 1] for x in inputs)
            alone = layer.step(before, layer.caches(), [length - 1], angles, sinks, packed)
            keys[row], values[row] = alone[1][0], alone[2][0]
    last = tuple(torch.stack([x[row, n - 1 : n] for row, n in enumerate(lengths)]) for x in inputs)
    together, _, _ = layer.step(last, (keys, values), lengths, angles, sinks, packed)
    for row, length in enumerate(lengths):
        want = layer.whole(tuple(x[row : row + 1, :length] for x in inputs), angles, sinks)[:, -1]
        assert_close(together[row].double(), want, rtol=1e-4, atol=1e-5)


def test_the_caches_hold_the_new_rows_and_the_given_ones_are_left_alone() -> None:
    layer = LAYERS["plain"]
    inputs, angles, given = layer.inputs(), layer.angles(), layer.caches()
    _, keys, values = layer.step(tuple(x[:, :3] for x in inputs), given, [5], angles, None)
    for cache, fresh, filler in ((keys, given[0], GARBAGE), (values, given[1], -GARBAGE)):
        assert torch.equal(fresh, torch.full_like(fresh, filler))
        untouched = torch.cat((cache[:, :, :2], cache[:, :, 5:]), dim=2)
        assert torch.equal(untouched, torch.full_like(untouched, filler))
    assert torch.equal(values[:, :, 2:5].transpose(1, 2).flatten(2), inputs[2][:, :3])
    at = torch.tensor([[2, 3, 4]])
    rows = inputs[1][:, :3].view(1, 3, 2, 6).transpose(1, 2)
    assert_close(keys[:, :, 2:5], ops.rotary(rows, at, angles.cos(), angles.sin(), False), rtol=0, atol=0)


CACHE_CONTROLS = {
    "queries one position late": Options(late=1),
    "mask one too far": Options(shift=1),
    "a window": Options(window=8),
    "scale off by 1 %": Options(scale=0.37 * 1.01),
}


@pytest.mark.parametrize("control", CACHE_CONTROLS)
def test_the_comparison_sees_a_wrong_cache(control: str) -> None:
    layer = LAYERS["plain"]
    inputs, angles = layer.inputs(), layer.angles()
    got = layer.step(inputs, layer.caches(), [TOKENS], angles, None)[0]
    assert close(got, layer.whole(inputs, angles, None))
    assert not close(got, replace(layer, options=CACHE_CONTROLS[control]).whole(inputs, angles, None))


def test_the_comparison_sees_rows_written_one_place_off() -> None:
    layer = LAYERS["plain"]
    inputs, angles = layer.inputs(), layer.angles()
    first, second = (tuple(x[:, part] for x in inputs) for part in (slice(0, 5), slice(5, None)))
    want = layer.whole(inputs, angles, None)[:, 5:]
    _, *caches = layer.step(first, layer.caches(), [5], angles, None)
    assert close(layer.step(second, caches, [TOKENS], angles, None)[0], want)
    for lengths in ([TOKENS + 1], [TOKENS - 1]):
        assert not close(layer.step(second, caches, lengths, angles, None)[0], want)


# --- over a cache of integers -----------------------------------------------------------------------------------------

WIDE = Layer(dim=16, value_dim=32, rotated=5, options=Options(window=5, softcap=3.0, sinks=True))
STORED = {
    "int8": Storage("int8", "int8"),
    "int4": Storage("int4", "int4"),
    "int8-g16": Storage("int8-g16", "int8-g16"),
    "int4-g16": Storage("int4-g16", "int4-g16"),
    "int4-g8, turned": Storage("int4-g8", "int4-g8", turned=True),
    "fixed keys, float values": Storage("int8", "fp32"),
    "halves": Storage("fp16", "fp16"),
    "halves and groups, centred": Storage("fp16", "int8-g16", centred=True),
    "float keys, values with scales": Storage("fp32", "int4-g32"),
    "8 and 4 bits": Storage("int8", "int4"),
    "grouped and fixed, turned": Storage("int4-g16", "int8", turned=True),
    "turned floats": Storage(turned=True),
    "int4-g16, centred and turned": Storage("int4-g16", "int4-g16", turned=True, centred=True),
    "turned and centred": Storage("int4", "int4-g8", turned=True, centred=True),
    "centred floats": Storage(centred=True),
}


def stored(name: str, **changes: object) -> Layer:
    return replace(WIDE, storage=STORED[name], **changes)


@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("name", STORED)
def test_what_is_attended_to_is_what_is_stored(name: str, packed: bool) -> None:
    layer = stored(name)
    inputs, angles, sinks = layer.inputs(batch=2), layer.angles(), torch.randn(layer.heads)
    got, caches = layer.in_chunks(inputs, (TOKENS,), CAPACITY, angles, sinks, packed)
    held = tuple(cache[:, :, :TOKENS] for cache in caches)
    want = attend(layer.apart(inputs, angles)[0], *layer.storage.read(layer, *held), sinks, layer.options)
    assert_close(got.double(), want.flatten(2), rtol=1e-4, atol=1e-4)
    for cache, fresh, row in zip(caches, layer.caches(batch=2), layer.rows(inputs, angles), strict=True):
        assert cache.dtype == fresh.dtype and cache.shape == fresh.shape and cache.is_contiguous()
        assert torch.equal(cache[:, :, TOKENS:], fresh[:, :, TOKENS:])
        assert_rows(cache[:, :, :TOKENS], row, layer.storage.turned)


def assert_rows(rows: Tensor, want: Tensor, turned: bool) -> None:
    """Integers exactly; a product may sum in another order, which can turn the last bit of a few scales and codes."""
    if rows.is_floating_point():
        assert_close(rows, want, rtol=1e-4 if rows.dtype == torch.float32 else 2e-3, atol=1e-5)
    elif turned:
        assert float((rows == want).float().mean()) > 0.98
    else:
        assert torch.equal(rows, want)


@pytest.mark.parametrize("name", STORED)
def test_stored_rows_do_not_depend_on_how_tokens_were_split(name: str) -> None:
    layer = stored(name)
    inputs, angles, sinks = layer.inputs(), layer.angles(), torch.randn(layer.heads)
    out, caches = layer.in_chunks(inputs, CHUNKS[0], CAPACITY, angles, sinks)
    turned = layer.storage.turned
    for chunks in CHUNKS[1:]:
        again, others = layer.in_chunks(inputs, chunks, CAPACITY, angles, sinks)
        assert_close(again, out, rtol=1e-4, atol=1e-2 if turned else 1e-5)
        for one, other in zip(caches, others, strict=True):
            assert_rows(one, other, turned)


@pytest.mark.parametrize("name", ["int8", "int4", "int4-g16", "turned and centred"])
def test_rows_of_unequal_length_are_stored_each_at_its_own_place(name: str) -> None:
    layer = stored(name)
    inputs, angles, sinks = layer.inputs(batch=3), layer.angles(), torch.randn(layer.heads)
    assert_ragged(layer, inputs, [2, 5, 9], 2, CAPACITY, angles, sinks)


def assert_ragged(
    layer: Layer,
    inputs: tuple[Tensor, ...],
    lengths: list[int],
    new: int,
    capacity: int,
    angles: Tensor | None,
    sinks: Tensor | None,
) -> None:
    """``new`` tokens of all rows in one step, on caches of ``lengths`` less: each row as if it were alone."""
    caches = layer.caches(len(lengths), capacity)
    for row, length in enumerate(lengths):
        if length > new:
            before = tuple(x[row : row + 1, : length - new] for x in inputs)
            alone = layer.step(before, layer.caches(1, capacity), [length - new], angles, sinks)[1:]
            for cache, one in zip(caches, alone, strict=True):
                cache[row] = one[0]
    last = tuple(torch.stack([x[row, n - new : n] for row, n in enumerate(lengths)]) for x in inputs)
    together, *caches = layer.step(last, caches, lengths, angles, sinks)
    for row, length in enumerate(lengths):
        whole = tuple(x[row : row + 1, :length] for x in inputs)
        assert_close(together[row].double(), layer.whole(whole, angles, sinks)[0, -new:], rtol=1e-4, atol=1e-4)
        held = resident_rows(length, capacity, layer.options.window) if layer.storage.rolling else length
        rows = layer.rows(whole, angles)
        for cache, want in zip(caches, rows, strict=True):
            assert_close(cache[row : row + 1, :, :held], want[:, :, length - held :], rtol=1e-4, atol=1e-5)


STORED_CONTROLS: dict[str, Storage] = {
    "floats": Storage(),
    "keys of other bits": Storage("int8", "int4"),
    "values of other bits": Storage("int4", "int8"),
    "scales for every group": Storage("int4-g16", "int4-g16"),
    "turned": Storage("int4", "int4", turned=True),
    "centred": Storage("int4", "int4", centred=True),
}


@pytest.mark.parametrize("control", STORED_CONTROLS)
def test_the_comparison_sees_another_storage(control: str) -> None:
    layer = stored("int4")
    inputs, angles, sinks = layer.inputs(), layer.angles(), torch.randn(layer.heads)
    got, _ = layer.in_chunks(inputs, (TOKENS,), CAPACITY, angles, sinks)
    assert close(got, layer.whole(inputs, angles, sinks))
    assert not close(got, replace(layer, storage=STORED_CONTROLS[control]).whole(inputs, angles, sinks))


def test_the_comparison_sees_scales_of_another_head() -> None:
    layer = stored("int8", options=Options())
    inputs, angles = layer.inputs(), layer.angles()
    tables = (angles.cos(), angles.sin())
    rest = (None, layer.heads, layer.options.scale, 0, 0.0, False)
    key, value = layer.storage.scales(layer)
    for scales, right in (((key, value), True), ((key.flip(1), value), False), ((key, value.flip(3)), False)):
        out = ops.cached_attention(
            *inputs, *layer.caches(), torch.tensor([TOKENS]), *tables, *rest, *scales, "int8", "int8", False, False
        )[0]
        assert close(out, layer.whole(inputs, angles, None)) is right


@pytest.mark.parametrize("turned", [False, True])
def test_softmax_does_not_see_that_keys_lost_their_mean(turned: bool) -> None:
    """And sinks and soft caps do, which is why there they must not."""
    inputs, angles, sinks = WIDE.inputs(), WIDE.angles(), torch.randn(WIDE.heads)
    centred = Storage(turned=turned, centred=True)
    for options, same in (
        (Options(window=3), True),
        (Options(window=3, softcap=3.0), False),
        (Options(window=3, sinks=True), False),
    ):
        layer = replace(WIDE, options=options)
        given = sinks if options.sinks else None
        got, _ = replace(layer, storage=centred).in_chunks(inputs, (4, 5), CAPACITY, angles, given)
        want = layer.whole(inputs, angles, given)
        assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-4) is same


@pytest.mark.parametrize(("form", "said"), [("int3", "'int3' is no cache format"), ("int8", "needs scales")])
def test_formats_that_cannot_be_stored(form: str, said: str) -> None:
    layer = stored("int8")
    rest = (layer.heads, 1.0, 0, 0.0, False, None, None, form, form)
    with pytest.raises(ConfigError, match=said):
        ops.cached_attention(*layer.inputs(), *layer.caches(), torch.tensor([TOKENS]), None, None, None, *rest)


# --- over a cache that drops what is older than its window ------------------------------------------------------------

LONG = 29
ROLLED = {
    "window 1": (1, Storage(rolling=True)),
    "window 3": (3, Storage(rolling=True)),
    "window 7, int8": (7, Storage("int8", "int8", rolling=True)),
    "window 7, int4 and groups, turned": (7, Storage("int4", "int4-g16", turned=True, rolling=True, centred=True)),
}
SLACKS = (0, 1, 2, 16)  # rows beyond the window
SPLITS = [(LONG,), (1,) * LONG, (4, 1, 13, 1, 9, 1)]


def rolled(name: str) -> Layer:
    window, storage = ROLLED[name]
    return replace(WIDE, storage=storage, options=Options(window=window, softcap=3.0, sinks=True))


def rows_held(tokens: int, capacity: int, window: int) -> int:
    """One token after another: where there is no room, all but the newest ``window - 1`` rows go."""
    held = 0
    for _ in range(tokens):
        held = (window - 1 if held == capacity else held) + 1
    return held


@pytest.mark.parametrize("slack", SLACKS)
@pytest.mark.parametrize("name", ROLLED)
def test_a_rolling_cache_is_a_window_over_the_whole_sequence(name: str, slack: int) -> None:
    layer = rolled(name)
    window = layer.options.window
    capacity = window + slack
    inputs, angles, sinks = layer.inputs(tokens=LONG), layer.angles(LONG), torch.randn(layer.heads)
    want = layer.whole(inputs, angles, sinks)
    rows = layer.rows(inputs, angles)
    for chunks in SPLITS:
        caches, done = layer.caches(1, capacity), 0
        for new in chunks:
            piece = tuple(x[:, done : done + new] for x in inputs)
            done += new
            out, *caches = layer.step(piece, caches, [done], angles, sinks)
            assert_close(out.double(), want[:, done - new : done], rtol=1e-4, atol=1e-4)
            held = rows_held(done, capacity, window)
            assert held == resident_rows(done, capacity, window) >= min(done, window)
            for cache, row in zip(caches, rows, strict=True):
                assert cache.shape[2] == capacity
                assert_close(cache[:, :, :held], row[:, :, done - held : done], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slack", [0, 2])
@pytest.mark.parametrize("name", ["window 3", "window 7, int4 and groups, turned"])
@pytest.mark.parametrize("new", [1, 9])
def test_rows_of_unequal_length_roll_each_by_itself(name: str, slack: int, new: int) -> None:
    layer = rolled(name)
    lengths = [new, new + 2, 24, LONG]
    inputs, angles, sinks = layer.inputs(4, LONG), layer.angles(LONG), torch.randn(layer.heads)
    assert_ragged(layer, inputs, lengths, new, layer.options.window + slack, angles, sinks)


def without(row: int) -> Callable[[Tensor], Tensor]:
    return lambda cache: torch.cat((cache[:, :, :row], torch.zeros_like(cache[:, :, :1]), cache[:, :, row + 1 :]), 2)


ROLL_CONTROLS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "one row on": (lambda cache: cache.roll(1, dims=2), False),
    "one row back": (lambda cache: cache.roll(-1, dims=2), False),
    "the oldest row of the window lost": (without(1), False),
    "the newest row lost": (without(4), False),
    "the row that has just left the window lost": (without(0), True),
    "a row that is not in use lost": (without(5), True),
}


@pytest.mark.parametrize("control", ROLL_CONTROLS)
def test_the_comparison_sees_a_wrong_rolling_cache(control: str) -> None:
    window, capacity = 5, 9
    layer = Layer(options=Options(window=window), storage=Storage(rolling=True))
    inputs, angles = layer.inputs(tokens=LONG), layer.angles(LONG)
    done = next(n for n in range(15, LONG) if resident_rows(n, capacity, window) == window)  # rows were just dropped
    before, last = (tuple(x[:, part] for x in inputs) for part in (slice(0, done), slice(done, done + 1)))
    want = layer.whole(inputs, angles, None)[:, done : done + 1]
    _, *caches = layer.step(before, layer.caches(1, capacity), [done], angles, None)
    assert close(layer.step(last, caches, [done + 1], angles, None)[0], want)
    change, harmless = ROLL_CONTROLS[control]
    for changed in ((change(caches[0]), caches[1]), (caches[0], change(caches[1]))):
        assert close(layer.step(last, changed, [done + 1], angles, None)[0], want) is harmless
    for length in (done, done + 2):
        assert not close(layer.step(last, caches, [length], angles, None)[0], want)


# --- as custom operators ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 4, 5, 6),
        torch.randn(2, 5, 4, 6).transpose(1, 2),
        torch.randn(2, 5, 6, 4).permute(0, 3, 1, 2),
        torch.randn(2, 1, 5, 6).expand(2, 4, 5, 6),
    ],
    ids=["contiguous", "heads last", "channels outside", "expanded"],
)
def test_opcheck_attention(x: Tensor) -> None:
    opcheck(ops.attention, (x, x[:, :2], x[:, 2:], None, 0.5, 3, 2.0, True))
    opcheck(ops.attention, (x, x[:, :1], x[:, :1, :, :5], torch.randn(4), 0.5, 0, 0.0, False))
    opcheck(ops.attention, (x, x[:, :2], x[:, 2:], None, 0.5, 2, 0.0, False, torch.tensor([[0, 1, 1, 0, 0], [1] * 5])))


@pytest.mark.parametrize(
    "cache",
    [
        torch.zeros(2, 2, 9, 4),
        torch.zeros(2, 9, 2, 4).transpose(1, 2),
        torch.zeros(2, 9, 4, 2).permute(0, 3, 1, 2),
        torch.zeros(2, 2, 12, 4)[:, :, :9],
    ],
    ids=["contiguous", "tokens first", "channels outside", "part of a larger one"],
)
def test_opcheck_cached_attention(cache: Tensor) -> None:
    lengths, angles = torch.tensor([3, 5]), torch.rand(9, 2)
    q, k, v = torch.randn(2, 3, 16), torch.randn(2, 16, 3).transpose(1, 2)[..., ::2], torch.randn(2, 3, 8)
    turned = (angles.cos(), angles.sin(), torch.randn(4))
    opcheck(ops.cached_attention, (q, k, v, cache, cache.clone(), lengths, None, None, None, 4, 0.5, 0, 0.0, False))
    packed = torch.randn(2, 3, 32)
    opcheck(ops.cached_attention, (packed, None, None, cache, cache.clone(), lengths, *turned, 4, 0.5, 2, 3.0, True))


@pytest.mark.parametrize("name", [*STORED, *ROLLED])
def test_opcheck_stored_and_rolling(name: str) -> None:
    layer = stored(name) if name in STORED else rolled(name)
    s, o = layer.storage, layer.options
    angles, sinks, inputs = layer.angles(), torch.randn(layer.heads), layer.inputs(2, 3)
    rest = (sinks, layer.heads, o.scale, o.window, o.softcap, False, *s.scales(layer), s.key, s.value, s.turned)
    last = (s.rolling, s.mean(layer))
    tables = (torch.tensor([3, 9]), angles.cos(), angles.sin())
    caches = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in layer.caches(2))
    opcheck(ops.cached_attention, (torch.cat(inputs, dim=-1), None, None, *caches, *tables, *rest, *last))


HALVES = {
    "floats": ("fp32", False),
    "stored halves": ("fp16", False),
    "codes": ("int8-g8", False),
    "turned codes": ("int8-g8", True),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", HALVES)
def test_a_model_in_half_precision_rounds_its_keys_once(name: str, dtype: torch.dtype) -> None:
    """They are rotated and centred in float32, by tables in float32, and stored as float32 ones would be."""
    form, turned = HALVES[name]
    layer = Layer(dim=8, value_dim=8, storage=Storage(form, form, turned=turned, centred=True))
    inputs = tuple(x.to(dtype) for x in layer.inputs(tokens=4))
    angles, caches = layer.angles(), layer.caches()
    given = tuple(c.to(dtype) if form == "fp32" else c for c in caches)
    out, *stored = layer.step(inputs, given, [4], angles, None)
    exact, *wanted = layer.step(tuple(x.float() for x in inputs), caches, [4], angles, None)
    assert out.dtype == dtype
    assert_close(out.float(), exact, rtol=0, atol=0.05)
    for one, other in zip(stored, wanted, strict=True):
        assert_rows(one[:, :, :4], other[:, :, :4].to(one.dtype), turned)
        assert torch.equal(one, other.to(one.dtype)) or turned


IN_PLACE = ["int8", "int4-g16, centred and turned", "halves", "floats"]


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_only_the_caches_change_hands(name: str) -> None:
    layer = WIDE if name == "floats" else stored(name)
    s, o = layer.storage, layer.options
    inputs, angles, sinks = layer.inputs(batch=2, tokens=3), layer.angles(), torch.randn(layer.heads)
    caches, apart = layer.caches(2), layer.step(inputs, layer.caches(2), [4, 9], angles, sinks)
    tables, rest = (angles.cos(), angles.sin(), sinks), (layer.heads, o.scale, o.window, o.softcap, False)
    kept = (*s.scales(layer), s.key, s.value, s.turned, s.rolling, s.mean(layer))
    out = cached_attention_inplace(*inputs, *caches, torch.tensor([4, 9]), *tables, *rest, *kept)
    assert torch.equal(out, apart[0])
    for ours, other, before in zip(caches, apart[1:], layer.caches(2), strict=True):
        assert torch.equal(ours, other) and not torch.equal(ours, before)


@pytest.mark.parametrize("name", IN_PLACE)
def test_opcheck_in_place(name: str) -> None:
    layer = WIDE if name == "floats" else stored(name)
    s, o = layer.storage, layer.options
    angles, inputs = layer.angles(), layer.inputs(2, 3)
    tables = (torch.tensor([3, 9]), angles.cos(), angles.sin(), torch.randn(layer.heads))
    rest = (layer.heads, o.scale, o.window, o.softcap, False, *s.scales(layer), s.key, s.value, s.turned, False)
    caches = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in layer.caches(2))
    packed = (torch.cat(inputs, dim=-1), None, None)
    opcheck(cached_attention_inplace, (*packed, *caches, *tables, *rest, s.mean(layer)))
    opcheck(cached_attention_inplace, (*inputs, *layer.caches(2), *tables, *rest, s.mean(layer)))
