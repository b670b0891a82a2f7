"""Every attention becomes one ``ryzen::attention``, whichever way it was written.

After fuse_rotary, before merge_linear and insert_kv_cache. Three forms come in: the node that capture put there, SDPA,
and ``softmax(f(Q Kᵀ)) V`` spelled out. The last two carry their mask and scaling as graph: a probe evaluates it, so

    f(s) = scale s                         or   softcap tanh(scale s / softcap)      where visible
    f(s) = a very negative number                                                    where hidden

is read off numerically, however it was built, and the hidden entries are read as a :class:`MaskSpec`; where padding
hides keys besides, it becomes the mask of the node. Keys and values that merely repeat each kv head for its
query heads are taken before the repetition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ryzen_compile import ops
from ryzen_compile.edit import Edit
from ryzen_compile.errors import UnsupportedError
from ryzen_compile.mask_spec import MaskSpec, read_mask
from ryzen_compile.passes.base import NoMatch, RewritePass
from ryzen_compile.probe import Probe
from ryzen_compile.program import Program, is_call, shape

aten = torch.ops.aten
captured = torch.ops.ryzen.attention.default
MASK_ROWS = 2048  # a mask built in the graph is read at this many tokens (or the context, if shorter)
HIDDEN = -1e4  # a score this low has no weight in float32, nor in float16
LAYOUT = (aten.reshape, aten.view, aten.expand, aten.unsqueeze, aten.clone)
REPEATS = frozenset((*LAYOUT, aten.repeat, aten.index, aten.index_select, aten.repeat_interleave))
ARITHMETIC = (aten.mul, aten.div, aten.add, aten.sub, aten.neg, aten.tanh, aten._to_copy, aten.expand)
SCORES = frozenset((*ARITHMETIC, aten.where, aten.masked_fill, aten.maximum, aten.minimum, aten.clamp))


@dataclass(frozen=True)
class Match:
    """``heads_first`` tells whether the replaced value is (B, H, T, D) or (B, T, H, D); ``k_order`` is the permutation
    that makes ``k`` (B, K, T, D)."""

    out: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    sinks: fx.Node | None
    scale: float
    softcap: float
    mask: MaskSpec
    heads_first: bool
    k_order: tuple[int, ...] = (0, 1, 2, 3)
    padding: fx.Node | None = None


class FuseAttention(RewritePass[Match]):
    """``softmax(mask(scale Q Kᵀ)) V``  ->  ``attention(q, k, v, scale, window, softcap, causal, padding)``."""

    name: ClassVar[str] = "fuse_attention"
    produces: ClassVar[frozenset[str]] = frozenset({"ryzen::attention"})
    anchors = (captured, aten.scaled_dot_product_attention, aten.softmax, aten._softmax)

    def match(self, node: fx.Node, program: Program) -> Match | NoMatch | None:
        probe = Probe(program)
        try:
            if node.target is captured:
                return _match_captured(node, probe)
            if is_call(node, aten.scaled_dot_product_attention):
                return _match_sdpa(node, probe, program.spec.context)
            return _match_softmax(node, probe, program.spec.context)
        except UnsupportedError as error:  # a mask that MaskSpec cannot say
            return NoMatch(error.message, node)

    def rewrite(self, edit: Edit, m: Match) -> None:
        k = m.k
        if m.k_order != (0, 1, 2, 3):
            k = edit.call(aten.permute.default, k, list(m.k_order), before=m.out)
        padding = () if m.padding is None else (m.padding,)
        form = m.scale, m.mask.window, m.softcap, m.mask.causal, *padding
        out = edit.call(ops.attention, m.q, k, m.v, m.sinks, *form, before=m.out)
        if m.heads_first:
            for reader in list(m.out.users):
                if is_call(reader, aten.permute) and list(reader.args[1]) == [0, 2, 1, 3]:
                    edit.replace(reader, out)  # it put the heads back where the new operator leaves them
            out = edit.call(aten.permute.default, out, [0, 2, 1, 3], before=m.out)
        edit.replace(m.out, out)


def _match_captured(node: fx.Node, probe: Probe) -> Match | NoMatch:
    q, k, v, sinks, scale, window, softcap, causal, *padding = node.args
    plain_k, plain_v = _unrepeated(k, probe), _unrepeated(v, probe)
    if plain_k is k or plain_v is v:
        return NoMatch("already one node, keys and values are not repeated", node)
    spec, mask = MaskSpec(causal, window), padding[0] if padding else None
    return Match(node, q, plain_k, plain_v, sinks, scale, softcap, spec, heads_first=False, padding=mask)


def _match_sdpa(node: fx.Node, probe: Probe, context: int) -> Match | NoMatch:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    q, k, v, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    if given.get("dropout_p", 0.0):
        return NoMatch("drops out weights", node)
    if len(shape(q)) != 4:
        return NoMatch(f"queries are {shape(q)}, expected (B, H, T, D)", q)
    spec, padding = MaskSpec(causal=bool(given.get("is_causal", False))), None
    if isinstance(mask, fx.Node):
        if mask not in probe.of_positions | probe.of_padding:
            return NoMatch("the mask depends on the tokens", mask)
        n = min(MASK_ROWS, context)
        value = probe.evaluate(mask, {}, n)
        visible = value if value.dtype == torch.bool else value > HIDDEN
        if value.dtype != torch.bool and value[visible].any():
            return NoMatch("the mask adds a bias to visible scores", mask)
        spec = _read_rows(visible, n)
        if probe.padding is not None and mask in probe.of_padding:
            padded = probe.evaluate(mask, {probe.padding: _some_padding(n)}, n)
            hides = _hides_padding(visible, padded if padded.dtype == torch.bool else padded > HIDDEN)
            if hides is None:
                return NoMatch("padding changes the mask in another way than by hiding keys", mask)
            padding = probe.padding if hides else None
    scale = given.get("scale")
    scale = 1.0 / math.sqrt(int(shape(q)[3])) if scale is None else float(scale)
    k, v = _both_unrepeated(k, v, probe)
    return Match(node, q, k, v, None, scale, 0.0, spec, heads_first=True, padding=padding)


def _match_softmax(node: fx.Node, probe: Probe, context: int) -> Match | NoMatch | None:
    scores, dim = node.args[0], node.args[1]
    if len(shape(node)) != 4 or dim not in (-1, 3):
        return None  # a router's, or a head's: not of scores
    readers = list(node.users)
    while len(readers) == 1 and is_call(readers[0], aten._to_copy, aten.expand):
        readers = list(readers[0].users)
    if len(readers) != 1 or not is_call(readers[0], aten.matmul) or readers[0].args[0] is readers[0].args[1]:
        return NoMatch("the weights are not only multiplied with values", node)
    out = readers[0]
    product = scores
    if not is_call(scores, aten.matmul):
        found = probe.common_source(scores, SCORES, until=lambda n: is_call(n, aten.matmul))
        if found is None:
            return NoMatch("the scores do not come from one matrix product", scores)
        product = found[0]
    q, turned = product.args
    if not is_call(turned, aten.permute) or len(shape(q)) != 4:
        return NoMatch(f"the keys of a {shape(q)} query are not transposed by a permute", product)
    read = _read_scores(scores, product, probe, min(MASK_ROWS, context))
    if isinstance(read, NoMatch):
        return read
    scale, softcap, spec, padding = read
    (k, order), v = turned.args, out.args[1]
    straight = tuple(order[d] for d in (0, 1, 3, 2))
    if straight == (0, 1, 2, 3):
        k, v = _both_unrepeated(k, v, probe)
    return Match(out, q, k, v, None, scale, softcap, spec, True, straight, padding)


def _read_scores(
    scores: fx.Node, product: fx.Node, probe: Probe, n: int
) -> tuple[float, float, MaskSpec, fx.Node | None] | NoMatch:
    """Feeds constant products to the piece of graph between ``Q Kᵀ`` and the softmax; returns what it does to a score,
    what it hides, and the padding if that hides keys, too."""
    heads = int(shape(product)[1])

    def response(value: float, more: Mapping[fx.Node, Tensor] | None = None) -> Tensor:
        fed = torch.full((1, heads, n, n), value)
        return fed if scores is product else probe.evaluate(scores, {product: fed, **(more or {})}, n)

    at_zero = response(0.0)
    visible = (at_zero > HIDDEN).expand(1, heads, n, n)
    if at_zero.expand_as(visible)[visible].any():
        return NoMatch("something is added to visible scores (a bias, or ALiBi)", scores)
    spec, padding = _read_rows(visible, n), None
    if probe.padding is not None:
        hides = _hides_padding(visible, (response(0.0, {probe.padding: _some_padding(n)}) > HIDDEN).expand_as(visible))
        if hides is None:
            return NoMatch("padding changes the scores in another way than by hiding keys", scores)
        padding = probe.padding if hides else None

    def at(value: float) -> float:
        seen = response(value).expand_as(visible)[visible]
        return float(seen[0]) if bool((seen == seen[0]).all()) else math.nan

    scale, far = at(2.0**-10) * 2.0**10, at(2.0**20)
    softcap = 0.0 if math.isclose(far, scale * 2.0**20, rel_tol=1e-5) else far
    for value in (-40.0, -1.0, 0.5, 8.0, 300.0):
        expected = softcap * math.tanh(scale * value / softcap) if softcap else scale * value
        if not math.isclose(at(value), expected, rel_tol=1e-4, abs_tol=1e-5):
            return NoMatch(f"a score of {value} becomes {at(value):.6g}: neither scaled nor soft-capped", scores)
    return scale, softcap, spec, padding


def _some_padding(n: int) -> Tensor:
    """(1, n) with tokens at both ends and among the padding between."""
    mask = torch.ones((1, n), dtype=torch.long)
    mask[:, n // 3 : n // 2] = 0
    mask[:, n - n // 4 : n - 1] = 0
    return mask


def _hides_padding(visible: Tensor, padded: Tensor) -> bool | None:
    """Whether ``padded``, the ``visible`` entries under ``_some_padding``, lacks the padded keys; None if it is neither
    that nor the same. What padding itself sees is nobody's concern."""
    n = visible.shape[-1]
    mask = _some_padding(n).bool()
    ours, theirs = (x.expand(*x.shape[:-2], n, n)[..., mask[0], :] for x in (visible, padded))
    if torch.equal(ours & mask, theirs):
        return True
    return False if torch.equal(ours, theirs) else None


def _read_rows(visible: Tensor, n: int) -> MaskSpec:
    """``visible`` broadcasts to (1, H, n, n); raises ``UnsupportedError`` when it is no MaskSpec."""
    square = visible.expand(1, visible.shape[-3] if visible.ndim > 2 else 1, n, n)
    if not torch.equal(square, square[:, :1].expand_as(square)):
        raise UnsupportedError("heads have different masks")
    rows = square[0, 0]
    return read_mask(lambda _batch, _head, q, k: rows[q, k], length=n)


def _both_unrepeated(k: fx.Node, v: fx.Node, probe: Probe) -> tuple[fx.Node, fx.Node]:
    """Keys and values before their repetition; as they are when that would leave them with different heads."""
    narrow = _unrepeated(k, probe), _unrepeated(v, probe)
    return narrow if shape(narrow[0])[1] == shape(narrow[1])[1] else (k, v)


def _unrepeated(node: fx.Node, probe: Probe) -> fx.Node:
    """The (B, K, T, D) tensor that ``node`` (B, H, T, D) repeats for its groups, or ``node`` itself."""
    wide = shape(node)

    def narrower(source: fx.Node) -> bool:
        dims = shape(source)
        return len(dims) == 4 and isinstance(dims[1], int) and dims[1] < wide[1] and wide[1] % dims[1] == 0

    if len(wide) != 4 or not isinstance(wide[1], int):
        return node
    found = probe.common_source(node, REPEATS, until=narrower)
    if found is None:
        return node
    source = found[0]
    dims = shape(source)
    kv_heads, groups = dims[1], wide[1] // dims[1]
    n, d = 3, int(dims[3])
    names = torch.arange(kv_heads * n * d, dtype=torch.float32).view(1, kv_heads, n, d)
    got = probe.evaluate(node, {source: names}, n)
    return source if torch.equal(got, names.repeat_interleave(groups, dim=1)) else node
