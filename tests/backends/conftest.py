"""Small modules that call the dialect directly, as Programs: what the passes would have made of a decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from ryzen_compile import ops
from ryzen_compile.backends.onnxruntime import native
from ryzen_compile.numerics.rows import RowFormat
from ryzen_compile.program import Program
from ryzen_compile.runtime.layout import row_layout
from ryzen_compile.spec import CacheSlot, ModelSpec

VOCAB = 61


@dataclass(frozen=True)
class Heads:
    """One attention: ``rotated`` is R, the table's columns (0: no rotation); rows are stored as ``form``, and a
    ``rolling`` one keeps little more than its window."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    rotated: int = 8
    interleaved: bool = False
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    packed: bool = True
    form: str = "fp32"
    rolling: bool = False

    def slot(self, layer: int) -> CacheSlot:
        window = self.window if self.rolling else 0
        return CacheSlot(layer, self.kv_heads, self.head_dim, self.value_dim, self.form, self.form, window)


class Attention(nn.Module):
    """Projections and one ``cached_attention``, without an output projection."""

    def __init__(self, width: int, spec: Heads, positions: int = 64) -> None:
        super().__init__()
        self.spec = spec
        rows = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.value_dim)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(n, width) / math.sqrt(width)) for n in rows)
        self.sinks = nn.Parameter(torch.randn(spec.heads)) if spec.sinks else None
        angle = torch.arange(positions)[:, None] / 100 ** (torch.arange(spec.rotated) / max(spec.rotated, 1))
        self.register_buffer("cos", angle.cos() if spec.rotated else None)
        self.register_buffer("sin", angle.sin() if spec.rotated else None)
        self.register_buffer("k_scale", _scale(spec, spec.head_dim))
        self.register_buffer("v_scale", _scale(spec, spec.value_dim))

    def forward(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = self.spec
        if s.packed:
            q, k, v = functional.linear(x, torch.cat((self.q, self.k, self.v))), None, None
        else:
            q, k, v = (functional.linear(x, w) for w in (self.q, self.k, self.v))
        tables = (self.cos, self.sin, self.sinks)
        rest = (s.heads, 1 / math.sqrt(s.head_dim), s.window, s.softcap, s.interleaved)
        stored = (self.k_scale, self.v_scale, s.form, s.form, False, s.rolling)
        return ops.cached_attention(q, k, v, k_cache, v_cache, lengths, *tables, *rest, *stored)


def _scale(spec: Heads, dim: int) -> Tensor | None:
    """Fixed scales (1, K, 1, dim), of a size that clamps some codes."""
    if spec.form == "fp32":
        return None
    return 2.0 / RowFormat.parse(spec.form).limit * (0.5 + torch.rand(1, spec.kv_heads, 1, dim))


class Layer(nn.Module):
    """A Llama layer after all fusions."""

    def __init__(self, width: int, inner: int, spec: Heads) -> None:
        super().__init__()
        self.attention = Attention(width, spec)
        self.norm_1, self.norm_2 = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        self.o = nn.Parameter(torch.randn(width, spec.heads * spec.value_dim) / math.sqrt(width))
        self.gate, self.up = (nn.Parameter(torch.randn(inner, width) / math.sqrt(width)) for _ in range(2))
        self.down = nn.Parameter(torch.randn(width, inner) / math.sqrt(inner))

    def forward(self, h: Tensor, residual: Tensor | None, *cache: Tensor) -> tuple[Tensor, ...]:
        if residual is None:
            y, residual = ops.rms_norm(h, self.norm_1, 1e-5, False), h
        else:
            y, residual = ops.add_rms_norm(h, residual, self.norm_1, 1e-5, False)
        out, k_cache, v_cache = self.attention(y, *cache)
        y, residual = ops.add_rms_norm(functional.linear(out, self.o), residual, self.norm_2, 1e-5, False)
        inner = ops.gated_linear(y, torch.cat((self.gate, self.up)), "silu")
        return functional.linear(inner, self.down), residual, k_cache, v_cache


class Decoder(nn.Module):
    """Layers between a table and a head, which are one tensor when ``tied``."""

    def __init__(self, specs: Sequence[Heads], *, width: int = 32, tied: bool = True, last_only: bool = False) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCAB, width))
        self.head = self.table if tied else nn.Parameter(torch.randn(VOCAB, width))
        self.layers = nn.ModuleList(Layer(width, 3 * width, spec) for spec in specs)
        self.norm = nn.Parameter(torch.rand(width))
        self.last_only = last_only

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past_key_values: dict) -> tuple[Tensor, ...]:
        h, residual, present = functional.embedding(input_ids, self.table), None, []
        lengths = attention_mask.sum(1)
        for layer, cache in zip(self.layers, past_key_values.values(), strict=True):
            h, residual, *new = layer(h, residual, cache["key"], cache["value"], lengths)
            present += new
        y, _ = ops.add_rms_norm(h, residual, self.norm, 1e-5, False)
        if self.last_only:
            y = y[:, -1:]
        return functional.linear(y, self.head), *present


class Attentions(nn.Module):
    """Many attentions side by side over one embedding; their outputs, concatenated, stand for logits."""

    def __init__(self, specs: Sequence[Heads], *, width: int = 24) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCAB, width))
        self.layers = nn.ModuleList(Attention(width, spec) for spec in specs)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, past_key_values: dict
    ) -> tuple[Tensor, ...]:
        x = functional.embedding(input_ids, self.table) + 0.01 * position_ids[:, :, None]
        lengths, outs, present = attention_mask.sum(1), [], []
        for layer, cache in zip(self.layers, past_key_values.values(), strict=True):
            out, *new = layer(x, cache["key"], cache["value"], lengths)
            outs.append(out)
            present += new
        return torch.cat(outs, -1), *present


def as_program(module: nn.Module, specs: Sequence[Heads], *, vocab: int = VOCAB) -> Program:
    """A decoder-like module with a cache, exported with every size dynamic."""
    batch, tokens, total = Dim("batch"), Dim("tokens"), Dim("total")
    ids = torch.zeros(2, 3, dtype=torch.long)
    slots = tuple(spec.slot(i) for i, spec in enumerate(specs))
    # Layers that keep the same window share a size; all others share the capacity.
    capacities = {slot.window: Dim(f"capacity_{slot.window}" if slot.window else "capacity") for slot in slots}
    past = {str(slot.layer): dict(zip(("key", "value"), _empty(slot), strict=True)) for slot in slots}
    arguments = {"input_ids": ids, "attention_mask": torch.ones(2, 7, dtype=torch.long), "past_key_values": past}
    shapes = {
        "input_ids": {0: batch, 1: tokens},
        "attention_mask": {0: batch, 1: total},
        "past_key_values": {
            str(slot.layer): {half: {0: batch, 2: capacities[slot.window]} for half in ("key", "value")}
            for slot in slots
        },
    }
    if isinstance(module, Attentions):
        arguments["position_ids"], shapes["position_ids"] = ids.clone(), shapes["input_ids"]  # one tensor: one input
    exported = torch.export.export(module.eval(), (), arguments, dynamic_shapes=shapes, strict=False)
    first = specs[0]
    spec = ModelSpec(
        len(specs), first.heads, first.kv_heads, first.head_dim, module.table.shape[1], vocab, 64, True, 0, "toy"
    )
    return Program(keep_linear(exported), spec, slots)


def _empty(slot: CacheSlot) -> tuple[Tensor, Tensor]:
    """Keys and values to trace with: two rows and a capacity that no other size equals."""
    (keys, width), (values, value_width) = row_layout(slot)
    shape = (2, slot.kv_heads, 9 + slot.window)
    return (
        torch.from_numpy(np.zeros((*shape, width), keys.dtype)),
        torch.from_numpy(np.zeros((*shape, value_width), values.dtype)),
    )


def keep_linear(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Core ATen as capture leaves it: linear layers whole."""
    table = torch.export.default_decompositions()
    table.pop(torch.ops.aten.linear.default, None)
    return exported.run_decompositions(table)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def library() -> Path:
    """The library of native operators; tests that need it are skipped where it was not built."""
    found = native.library()
    if found is None:
        pytest.skip(native.missing()[0])
    return found


@pytest.fixture(scope="session")
def heads() -> type[Heads]:
    return Heads


@pytest.fixture(scope="session")
def decoder_program() -> Callable[..., Program]:
    """``decoder_program(*specs, tied=True, last_only=False)``."""

    def build(*specs: Heads, **options: bool) -> Program:
        torch.manual_seed(0)
        chosen = specs or (Heads(), Heads())
        return as_program(Decoder(chosen, **options), chosen)

    return build


@pytest.fixture(scope="session")
def attentions_program() -> Callable[..., Program]:
    """``attentions_program(*specs)``: logits are the attentions' outputs side by side."""

    def build(*specs: Heads) -> Program:
        torch.manual_seed(0)
        return as_program(Attentions(specs), specs, vocab=sum(s.heads * s.value_dim for s in specs))

    return build


@pytest.fixture(scope="session")
def plain_program() -> Callable[..., Program]:
    """``plain_program(module, *inputs)``: any module over fixed shapes, without a cache."""

    def build(module: nn.Module, *inputs: Tensor) -> Program:
        exported = keep_linear(torch.export.export(module.eval(), inputs, strict=False))
        return Program(exported, ModelSpec(0, 0, 0, 0, 0, 0, 0, False, 0, "toy"))

    return build


@pytest.fixture(scope="session")
def decoder(decoder_program: Callable[..., Program]) -> Program:
    """Two Llama layers, tied; shared by tests that only look at it."""
    return decoder_program()
