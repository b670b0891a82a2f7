"""Attention against loops over rows in float64; attention over a cache against attention over the whole sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.testing import assert_close

from ryzen_compile import ops

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
                last = min(t + o.shift, tokens - 1) if o.causal else tokens - 1
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
class Layer:
    """One attention with its inputs for a whole sequence, as the projections leave them."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 6
    value_dim: int = 6
    rotated: int = 2  # 0: none
    interleaved: bool = False
    options: Options = Options()

    def inputs(self, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.randn(batch, TOKENS, self.heads * self.dim),
            torch.randn(batch, TOKENS, self.kv_heads * self.dim),
            torch.randn(batch, TOKENS, self.kv_heads * self.value_dim),
        )

    def angles(self) -> Tensor | None:
        """Without a rule, so that a shift of all positions is no rotation of its own."""
        return torch.rand(CAPACITY, self.rotated) * 6 if self.rotated else None

    def caches(self, batch: int = 1) -> tuple[Tensor, Tensor]:
        """Full of values that must not matter."""
        return (
            torch.full((batch, self.kv_heads, CAPACITY, self.dim), GARBAGE),
            torch.full((batch, self.kv_heads, CAPACITY, self.value_dim), -GARBAGE),
        )

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
        o = self.options
        rest = (self.heads, o.scale, o.window, o.softcap, self.interleaved)
        return ops.cached_attention(q, k, v, *caches, torch.tensor(lengths), *tables, sinks, *rest)

    def whole(self, inputs: tuple[Tensor, ...], angles: Tensor | None, sinks: Tensor | None) -> Tensor:
        """By hand over the whole sequence: (B, T, H D')."""
        batch, tokens = inputs[0].shape[:2]
        q, k, v = (
            x.view(batch, tokens, n, -1).transpose(1, 2).double()
            for x, n in zip(inputs, (self.heads, self.kv_heads, self.kv_heads), strict=True)
        )
        if angles is not None:
            q, k = (self.turned(x, angles, late) for x, late in ((q, self.options.late), (k, 0)))
        return attend(q, k, v, sinks, self.options).flatten(2)

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
        caches, outs, done = layer.caches(), [], 0
        for new in chunks:
            piece = tuple(x[:, done : done + new] for x in inputs)
            done += new
            out, *caches = layer.step(piece, caches, [done], angles, sinks, packed)
            outs.append(out)
        assert_close(torch.cat(outs, dim=1).double(), want, rtol=1e-4, atol=1e-5)


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
