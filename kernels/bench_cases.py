"""What ``bench`` measures: problems of the sizes that decoders have, and everything that solves them.

Bytes count every input read once and every output written once; operations are those of the formula, half of them where
it is causal. An implementation is a function without arguments that returns its result. ``Sizes`` of a few elements
run everything that the real ones run, to see that it works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ryzen_compile.numerics import ternary
from ryzen_compile.numerics.blockwise import BlockTensor
from ryzen_compile.numerics.rows import RowFormat

OURS = "ours"
BF16 = torch.bfloat16
BLOCK = 128  # weights that share a scale
Run = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """``elements`` of an elementwise problem, far beyond the caches; ``widths`` of rows, ``narrow`` ones of backward
    passes; ``ffn`` widths; ``heads`` as (H, K, D) and ``tokens`` of whole sequences, ``batch_tokens`` of a batch; rows
    ``held`` by caches of ``batches``; ``products`` as (N, C), and ``rows`` of a prompt; ``losses`` as (C, V)."""

    elements: int = 1 << 26
    widths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    narrow: tuple[int, ...] = (1024, 2048, 4096)
    ffn: tuple[int, ...] = (5632, 14336)
    heads: tuple[tuple[int, int, int], ...] = ((32, 32, 64), (32, 8, 128))
    tokens: tuple[int, ...] = (2048, 4096, 8192)
    batch_tokens: int = 8192
    held: int = 8192
    batches: tuple[int, ...] = (1, 8)
    products: tuple[tuple[int, int], ...] = ((2560, 2048), (2048, 5632), (4096, 4096), (28672, 4096), (4096, 14336))
    rows: int = 4096
    losses: tuple[tuple[int, int], ...] = ((2048, 32000), (4096, 128256))


SMALL = Sizes(
    elements=1 << 12, widths=(64,), narrow=(32,), ffn=(48,), heads=((4, 2, 16),), tokens=(32,), batch_tokens=32,
    held=32, batches=(1, 2), products=((32, 128),), rows=64, losses=((32, 97),),
)  # fmt: skip


@dataclass
class Case:
    """``runs`` by name, ours first; ``flops`` 0 for what is bound by its ``bytes``. ``want`` computes in float64 what
    ``pick`` takes of a result."""

    op: str
    shape: str
    bytes: float
    runs: dict[str, Run]
    want: Callable[[], Tensor]
    flops: float = 0
    pick: Callable[[Any], Tensor] = lambda result: result
    dtype: str = "bf16"
    _wanted: Tensor | None = field(default=None, init=False)

    def error(self, run: Run) -> float:
        """Squared error over squares."""
        if self._wanted is None:
            self._wanted = self.want().double()
        got = self.pick(run()).double()
        return float((got - self._wanted).square().sum() / self._wanted.square().sum())


def beside(ours: Run, torchs: Callable[..., Any], *inputs: Any) -> dict[str, Run]:
    """Ours, ``torchs`` of the inputs, and the same compiled."""
    fast = compiled(torchs)
    return {OURS: ours, "torch": lambda: torchs(*inputs), "compile": lambda: fast(*inputs)}


def gradients(ours: Run, torchs: Callable[..., Any], g: Tensor, *inputs: Tensor) -> dict[str, Run]:
    """As ``beside``, of the backward pass alone."""
    return {
        OURS: ours,
        "torch": backward(torchs, g, *inputs),
        "compile": backward(compiled(torchs), g, *inputs),
    }


def backward(forward: Callable[..., Tensor], g: Tensor, *inputs: Tensor) -> Run:
    """The gradients of ``forward`` at ``inputs``; it is called once, when they are first asked for."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    made: list[Tensor] = []

    def run() -> Sequence[Tensor]:
        if not made:
            made.append(forward(*leaves))
        return torch.autograd.grad(made[0], leaves, g.to(made[0].dtype), retain_graph=True)

    return run


def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(run, dynamic=False, fullgraph=True)


def rms(x: Tensor, w: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), w, 1e-5)


def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.layer_norm(x, (x.shape[-1],), w, b, 1e-5)


def add_rms(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return rms(x + r, w), x + r


def swiglu(x: Tensor) -> Tensor:
    gate, other = x.chunk(2, -1)
    return functional.silu(gate) * other


def norms(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    from ryzen_compile.kernels import norm, norm_backward

    part = slice(0, 256)
    for width in sizes.widths:
        rows = max(sizes.elements // width, 1)
        x, r = _normal(device, rows, width), _normal(device, rows, width)
        w, b = _normal(device, width), _normal(device, width)
        shape, size = f"{rows} x {width}", 2.0 * x.numel()
        yield Case("rms_norm", shape, 2 * size, beside(lambda: norm.rms_norm(x, w, 1e-5, False), rms, x, w),
                   lambda: rms(x[part].double(), w.double()), pick=lambda y: y[part])  # fmt: skip
        yield Case("layer_norm", shape, 2 * size, beside(lambda: norm.layer_norm(x, w, b, 1e-5), layer, x, w, b),
                   lambda: layer(x[part].double(), w.double(), b.double()), pick=lambda y: y[part])  # fmt: skip
        yield Case("add_rms_norm", shape, 4 * size,
                   beside(lambda: norm.add_rms_norm(x, r, w, 1e-5, False), add_rms, x, r, w),
                   lambda: rms((x + r)[part].double(), w.double()), pick=lambda y: y[0][part])  # fmt: skip
    for width in sizes.narrow:
        rows = max(sizes.elements // 4 // width, 1)
        x, g = _normal(device, rows, width), _normal(device, rows, width)
        w, b = _normal(device, width), _normal(device, width)
        shape, size = f"{rows} x {width}", 3 * 2.0 * x.numel()
        yield Case("rms_norm_backward", shape, size,
                   gradients(lambda: norm_backward.rms_norm_backward(g, x, w, None, 1e-5, False), rms, g, x, w),
                   lambda: backward(rms, g, x.double(), w.double())()[0], pick=lambda y: y[0])  # fmt: skip
        yield Case("layer_norm_backward", shape, size,
                   gradients(lambda: norm_backward.layer_norm_backward(g, x, w, True, None, 1e-5), layer, g, x, w, b),
                   lambda: backward(layer, g, x.double(), w.double(), b.double())()[0],
                   pick=lambda y: y[0])  # fmt: skip


def activations(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    from ryzen_compile.kernels import activation

    part = slice(0, 256)
    for width in sizes.ffn:
        rows = max(sizes.elements // width // 2, 1)
        x, g = _normal(device, rows, 2 * width), _normal(device, rows, width)
        shape, size = f"{rows} x {width} silu", 2.0 * g.numel()
        yield Case("gated_activation", shape, 3 * size,
                   beside(lambda: activation.gated_activation(x, "silu"), swiglu, x),
                   lambda: swiglu(x[part].double()), pick=lambda y: y[part])  # fmt: skip
        ours = lambda: [activation.gated_activation_backward(g, x, "silu")]
        yield Case("gated_activation_backward", shape, 5 * size, gradients(ours, swiglu, g, x),
                   lambda: backward(swiglu, g[part], x[part].double())()[0], pick=lambda y: y[0][part])  # fmt: skip


def attentions(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    from ryzen_compile.kernels import attention, attention_backward

    for heads, kv_heads, dim in sizes.heads:
        scale = dim**-0.5

        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            return out.transpose(1, 2)

        for tokens in sizes.tokens:
            batch = max(1, sizes.batch_tokens // tokens)
            q, k, v = (_normal(device, batch, tokens, h, dim).transpose(1, 2) for h in (heads, kv_heads, kv_heads))
            flops = 2.0 * batch * heads * tokens**2 * dim  # two products, half of each
            shape = f"B {batch}, T {tokens}, H {heads}/{kv_heads}, D {dim}, causal"
            runs: dict[str, Run] = {
                OURS: lambda: attention.attention(q, k, v, None, scale, 0, 0.0, True), "sdpa": lambda: sdpa(q, k, v),
            }  # fmt: skip
            yield Case("attention", shape, 0, runs, lambda: sdpa(*(x[:1, :1].double() for x in (q, k, v))),
                       flops=flops, pick=lambda y: y[:1, :, :1])  # fmt: skip
            g, out = _normal(device, batch, tokens, heads, dim), sdpa(q, k, v).contiguous()
            runs = {
                OURS: lambda: attention_backward.attention_backward(g, q, k, v, out, None, scale, 0, 0.0, True),
                "sdpa": backward(sdpa, g, q, k, v),
            }  # fmt: skip
            one = slice(0, 1)
            yield Case("attention_backward", shape, 0, runs,
                       lambda: backward(sdpa, g[one, :, one], *(x[one, one].double() for x in (q, k, v)))()[0],
                       flops=2.5 * flops, pick=lambda y: y[0][one, one])  # fmt: skip


def cached_attentions(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """Decoding behind full caches. ``fp32`` is the name of rows in the model's own precision, here bf16."""
    from ryzen_compile.kernels import cached_attention

    heads, kv_heads, dim = sizes.heads[-1]
    for batch in sizes.batches:
        q, k, v = (_normal(device, batch, 1, h * dim) for h in (heads, kv_heads, kv_heads))
        lengths = torch.full((batch,), sizes.held, device=device)
        for name in ("fp32", "fp16", "int8", "int4", "int8-g16"):
            form = RowFormat.parse(name)
            caches = [_rows(device, form, (batch, kv_heads, sizes.held), dim) for _ in range(2)]
            fixed = torch.full((1, kv_heads, 1, dim), 0.01, device=device)
            scales = (fixed, fixed) if form.bits < 16 and not form.group else (None, None)
            given = (lengths, None, None, None, heads, dim**-0.5, 0, 0.0, False, *scales, name, name)
            runs: dict[str, Run] = {OURS: lambda: cached_attention.cached_attention_inplace(q, k, v, *caches, *given)}
            if name == "fp32":
                queries = q.view(batch, 1, heads, dim).transpose(1, 2)
                runs["sdpa"] = lambda: functional.scaled_dot_product_attention(
                    queries, caches[0], caches[1], enable_gqa=True
                ).transpose(1, 2).reshape(batch, 1, -1)  # fmt: skip
            label = "bf16" if name == "fp32" else name
            shape = f"B {batch}, {sizes.held} held, H {heads}/{kv_heads}, D {dim}, {label}"
            want = lambda: _reference(form, (q, k, v), caches, given).to(device)
            used = sum(cache.numel() * cache.element_size() for cache in caches)
            yield Case("cached_attention", shape, used, runs, want)


def linears(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    from ryzen_compile.kernels import linear, linear_ternary

    for rows, width in sizes.products:
        dense = _normal(device, rows, width) / width**0.5
        for bits, count in ((2, 1), (4, 1), (4, 8), (8, 1)):
            x, (packed, scales, stored) = _normal(device, count, width), _integers(device, rows, width, bits)
            runs: dict[str, Run] = {
                OURS: lambda: linear.linear_nbits(x, packed, scales, None, None, bits, BLOCK),
                "torch bf16": lambda: functional.linear(x, dense),
            }
            yield Case("linear_nbits", f"{count} x {width} -> {rows}, {bits} bits g{BLOCK}",
                       packed.numel() + 4 * scales.numel(), runs,
                       lambda: functional.linear(x.double(), stored.dequantize().double()))  # fmt: skip
        codes = torch.randint(-1, 2, (rows, width), dtype=torch.int8)
        x, packed, scale = _normal(device, 1, width), ternary.pack(codes).to(device), torch.tensor(0.01, device=device)
        runs = {
            OURS: lambda: linear_ternary.linear_ternary(x, packed, scale),
            "torch bf16": lambda: functional.linear(x, dense),
        }
        yield Case("linear_ternary", f"1 x {width} -> {rows}", packed.numel(), runs,
                   lambda: torch.ops.ryzen.linear_ternary(*(t.cpu() for t in (x.float(), packed, scale))).to(device),
                   )  # fmt: skip
    rows, width = sizes.products[-1]
    packed, scales, stored = _integers(device, rows, width, 4)
    dense, many = stored.dequantize().to(BF16), _normal(device, sizes.rows, width)
    runs = {
        OURS: lambda: linear.linear_nbits(many, packed, scales, None, None, 4, BLOCK),
        "torch bf16": lambda: functional.linear(many, dense),
    }
    yield Case("linear_nbits", f"{sizes.rows} x {width} -> {rows}, 4 bits g{BLOCK}", 0, runs,
               lambda: functional.linear(many[:64].double(), dense.double()), flops=2.0 * sizes.rows * rows * width,
               pick=lambda y: y[:64])  # fmt: skip


def embeddings(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    from ryzen_compile.kernels import embedding

    width, rows = sizes.products[0][1], sizes.losses[0][1]
    packed, scales, stored = _integers(device, rows, width, 4)
    ids = torch.randint(rows, (sizes.batch_tokens,), device=device)
    table = stored.dequantize()
    runs: dict[str, Run] = {
        OURS: lambda: embedding.embedding_nbits(ids, packed, scales, None, width, 4, BLOCK),
        "torch fp32": lambda: functional.embedding(ids, table),
    }
    yield Case("embedding_nbits", f"{len(ids)} of {rows} x {width}, 4 bits g{BLOCK}",
               len(ids) * width * (4 + 0.5 + 4 / BLOCK), runs, table[ids].double, dtype="fp32")  # fmt: skip


def rotations(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    from ryzen_compile.kernels import rotary

    heads, _, dim = sizes.heads[-1]
    tokens = sizes.tokens[-1]
    x = _normal(device, 1, tokens, heads, dim).transpose(1, 2)
    positions = torch.arange(tokens, device=device)[None]
    angles = torch.outer(torch.arange(tokens, device=device), 1e4 ** (-2 * torch.arange(dim // 2, device=device) / dim))
    cos, sin = angles.cos(), angles.sin()

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        c, s = cos[positions].unsqueeze(1).to(x.dtype), sin[positions].unsqueeze(1).to(x.dtype)
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    yield Case("rotary", f"B 1, H {heads}, T {tokens}, D {dim}", 2 * 2.0 * x.numel(),
               beside(lambda: rotary.rotary(x, positions, cos, sin, False), turned, x),
               lambda: turned(x[:, :1].double()), pick=lambda y: y[:, :1])  # fmt: skip


def losses(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    from ryzen_compile.kernels import loss

    def whole(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(functional.linear(h, w).float(), labels)

    for width, vocab in sizes.losses:
        rows = sizes.batch_tokens
        h, w = _normal(device, rows, width), _normal(device, vocab, width) / width**0.5
        labels = torch.randint(vocab, (rows,), device=device)

        def torchs(forward: Callable[..., Tensor]) -> Run:
            def run() -> Any:
                leaves = [h.detach().requires_grad_(), w.detach().requires_grad_()]
                value = forward(*leaves, labels)
                return value.detach(), *torch.autograd.grad(value, leaves)

            return run

        runs: dict[str, Run] = {
            OURS: lambda: loss.linear_cross_entropy_grads(h, w, labels, -100, 0.0),
            "torch": torchs(whole),
            "compile": torchs(compiled(whole)),
        }
        # In float32: in float64 all logits of the larger problem would take 8 GiB.
        yield Case("linear_cross_entropy_grads", f"N {rows}, C {width}, V {vocab}", 0, runs,
                   lambda: whole(h.float(), w.float(), labels), flops=6.0 * rows * width * vocab,
                   pick=lambda y: y[0])  # fmt: skip


SUBJECTS: dict[str, Callable[[torch.device, Sizes], Iterator[Case]]] = {
    "norm": norms,
    "activation": activations,
    "attention": attentions,
    "cached_attention": cached_attentions,
    "linear": linears,
    "embedding": embeddings,
    "rotary": rotations,
    "loss": losses,
}


def _reference(form: RowFormat, new: Sequence[Tensor], caches: Sequence[Tensor], given: Sequence[object]) -> Tensor:
    """What the operator's reference gives on the CPU, in float64 over the same stored rows."""
    held = [cache.cpu().double() if form.bits == 32 else cache.cpu() for cache in caches]
    rest = [value.cpu() if isinstance(value, Tensor) else value for value in given]
    out: Tensor = torch.ops.ryzen.cached_attention(*(x.cpu().double() for x in new), *held, *rest)[0]
    return out


def _normal(device: torch.device, *size: int) -> Tensor:
    return torch.randn(size, device=device, dtype=torch.float32).to(BF16)


def _integers(device: torch.device, rows: int, width: int, bits: int) -> tuple[Tensor, Tensor, BlockTensor]:
    """Random codes and scales of a matrix, and both as one."""
    blocks = -(-width // BLOCK)
    packed = torch.randint(0, 256, (rows, blocks, BLOCK * bits // 8), device=device, dtype=torch.uint8)
    scales = torch.rand(rows, blocks, device=device) * 0.01
    return packed, scales, BlockTensor.stored(packed, scales, None, bits, BLOCK, width)


def _rows(device: torch.device, form: RowFormat, shape: tuple[int, ...], dim: int) -> Tensor:
    """A full cache: normal floats, or any codes."""
    size = (*shape, form.width(dim))
    if form.bits == 32:
        return _normal(device, *size)
    if form.bits == 16:
        return _normal(device, *size).half()
    codes = torch.randint(0, 256, size, device=device).to(torch.uint8)
    if form.group:
        codes[..., dim * form.bits // 8 :].view(torch.float16).fill_(0.01)
    return codes.view(torch.int8) if str(form.dtype) == "int8" else codes
