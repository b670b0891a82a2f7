"""What is read off a cached graph: rotations of real models, to the precision of their tables, and what has none."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ryzen_compile import ops
from ryzen_compile.capture import capture
from ryzen_compile.config import KVCacheConfig, find_recipe, parse_kv
from ryzen_compile.errors import UnsupportedError
from ryzen_compile.interpret import cached_feeds, interpret
from ryzen_compile.numerics.row_shift import RowShift
from ryzen_compile.numerics.rows import decode, hadamard
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.insert_kv_cache import InsertKVCache
from ryzen_compile.passes.quantize_kv_cache import QuantizeKVCache
from ryzen_compile.pipeline import default_passes
from ryzen_compile.program import Program
from ryzen_compile.row_shifts import row_shifts
from tests.model_directory import case_named
from tests.passes.graphs import program_of
from tests.zoo import VOCAB, build

HEADS, KV, DIM = 4, 2, 128
LONG = 131072
SCALED: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
}


class Turned(nn.Module):
    """One attention whose keys, and queries unless it is ``apart``, are turned by tables."""

    def __init__(self, interleaved: bool, apart: bool) -> None:
        super().__init__()
        self.interleaved, self.apart = interleaved, apart
        self.q, self.k, self.v = (nn.Linear(8, n * DIM) for n in (HEADS, KV, KV))
        self.register_buffer("cos", torch.ones(64, 3))
        self.register_buffer("sin", torch.zeros(64, 3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        at = torch.arange(x.shape[1])[None].expand(x.shape[0], -1)
        k = ops.rotary(k, at, self.cos, self.sin, self.interleaved)
        if not self.apart:
            q = ops.rotary(q, at, self.cos, self.sin, self.interleaved)
        return ops.attention(q, k, v, None, 0.4, 0, 0.0, True).flatten(2)


@cache
def exported(interleaved: bool, apart: bool) -> Program:
    program = program_of(Turned(interleaved, apart), torch.randn(2, 5, 8))
    for step in (Canonicalize(), InsertKVCache()):
        program = step.run(program).program
    return program


def shifts_of(cos: Tensor, sin: Tensor, interleaved: bool = False, apart: bool = False) -> tuple[RowShift, ...]:
    """Of a cached graph with these tables in place of its own."""
    program = exported(interleaved, apart)
    state = program.exported.state_dict | {"cos": cos, "sin": sin}
    return row_shifts(program.with_graph(program.graph, state, program.exported.constants))


@cache
def table(kind: str, positions: int) -> tuple[Tensor, Tensor, np.ndarray, float]:
    """cos and sin (N, R) of a real model, its frequencies, and what it scales its tables by."""
    config = LlamaConfig(
        hidden_size=DIM * HEADS,
        num_attention_heads=HEADS,
        max_position_embeddings=LONG,
        rope_parameters={"rope_theta": 500000.0, **SCALED[kind]},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(positions)[None])
    half = DIM // 2
    frequencies = rotary.inv_freq.double().numpy()
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous(), frequencies, rotary.attention_scaling


@pytest.mark.parametrize(("positions", "precision"), [(160, 6e-8), (4099, 1.5e-8), (LONG, 1.5e-8)])
@pytest.mark.parametrize("kind", SCALED)
def test_frequencies_of_real_tables(kind: str, positions: int, precision: float) -> None:
    """Relative to the model's own, which multiplies them in float32: every row of its table is off by 6e-8."""
    cos, sin, frequencies, scaling = table(kind, positions)
    assert (scaling != 1.0) is (kind == "yarn")
    (shift,) = shifts_of(cos, sin)
    assert (str(shift.form), shift.dim, shift.interleaved, shift.turned) == ("fp32", DIM, False, False)
    assert shift.scale is None and shift.mean is None and shift.frequencies.dtype == np.float64
    np.testing.assert_allclose(shift.frequencies, frequencies, rtol=precision, atol=0)
    others = table("llama3" if kind != "llama3" else "yarn", positions)[2]
    assert not np.allclose(shift.frequencies, others, rtol=1e-3, atol=0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [1, 5, 24])
def test_partial_rotations_of_either_kind_and_direction(pairs: int, interleaved: bool) -> None:
    """Negative frequencies turn the other way, 3 and more almost half around."""
    frequencies = np.resize([3.1, -0.7, 0.02, -1e-5, 2.0], pairs)
    angles = torch.from_numpy(np.arange(2500)[:, None] * frequencies)
    (shift,) = shifts_of(angles.cos().float(), angles.sin().float(), interleaved=interleaved)
    assert (shift.dim, shift.interleaved) == (DIM, interleaved)
    np.testing.assert_allclose(shift.frequencies, frequencies, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("positions", [2, 3, 17])
def test_a_short_table(positions: int) -> None:
    angles = torch.arange(positions)[:, None].double() * torch.tensor([1.0, 0.01], dtype=torch.float64)
    (shift,) = shifts_of(angles.cos().float(), angles.sin().float())
    np.testing.assert_allclose(shift.frequencies, [1.0, 0.01], rtol=2e-7)


def test_one_position_has_no_step() -> None:
    with pytest.raises(UnsupportedError, match="has one position only: no step to read"):
        shifts_of(torch.ones(1, 2), torch.zeros(1, 2))


def uneven(name: str, positions: int) -> tuple[Tensor, Tensor]:
    at, speeds = torch.arange(positions).double()[:, None], torch.tensor([1.0, 0.3, 0.001], dtype=torch.float64)
    angles = at * speeds
    size = torch.ones_like(angles)
    match name:
        case "slower from the middle on":
            angles = torch.where(at > positions // 2, (positions // 2 + (at - positions // 2) * 0.99) * speeds, angles)
        case "one channel a hundredth of a turn off behind":
            angles[positions * 3 // 4 :, 1] += 0.06
        case "from 1 on":
            angles = (at + 1) * speeds
        case "longer with the position":
            size = 1 + at / positions / 20
        case "not a number":
            angles[positions // 3 * 2 :, 2] = float("nan")
        case "no angles at all":
            angles = torch.rand(positions, 3, generator=torch.Generator().manual_seed(0)).double() * 6
    return (size * angles.cos()).float(), (size * angles.sin()).float()


UNEVEN = (
    "slower from the middle on",
    "one channel a hundredth of a turn off behind",
    "from 1 on",
    "longer with the position",
    "not a number",
    "no angles at all",
)


@pytest.mark.parametrize("positions", [64, 2048, 32768])
@pytest.mark.parametrize("name", UNEVEN)
def test_a_table_that_does_not_turn_evenly_is_refused(name: str, positions: int) -> None:
    assert len(shifts_of(*uneven("even", positions))) == 1
    with pytest.raises(UnsupportedError, match=r"the rotation of .* does not turn evenly with the position \(off by "):
        shifts_of(*uneven(name, positions))


def test_a_rotation_of_keys_alone_is_refused() -> None:
    """It stays outside of the attention and reaches the cache done; tokens count their positions by themselves here."""
    cos, sin = uneven("even", 64)
    with pytest.raises(UnsupportedError, match="are rotated before they reach the cache"):
        shifts_of(cos, sin, apart=True)


# --- whole models -----------------------------------------------------------------------------------------------------


@cache
def cached(name: str) -> tuple[nn.Module, Program]:
    model = build(case_named(name))
    program = capture(model)
    for step in default_passes(find_recipe("fp32")):
        program = step.run(program).program
    return model, program


def test_a_model_that_adds_positions_to_its_embeddings_is_refused() -> None:
    said = r"^positions enter outside of the attention, in .*wpe: its keys cannot be moved"
    with pytest.raises(UnsupportedError, match=said):
        row_shifts(cached("gpt2")[1])


def test_layers_without_positions_move_freely() -> None:
    model, program = cached("smollm3")
    first, second = row_shifts(program)
    np.testing.assert_allclose(first.frequencies, model.model.rotary_emb.inv_freq.numpy(), rtol=3e-8)
    assert second.frequencies.shape == (0,)
    rows = np.ones((1, 2, 3, 16), np.float32)
    assert second.shift(rows, -5) is rows and first.shift(rows, -5) is not rows


def test_layers_that_turn_at_their_own_speed() -> None:
    model, program = cached("gemma3_text")
    rotary = model.model.rotary_emb
    wanted = [getattr(rotary, f"{kind}_inv_freq").numpy() for kind in model.config.layer_types]
    assert not np.allclose(wanted[0][1:], wanted[1][1:], rtol=0.1)
    for shift, frequencies in zip(row_shifts(program), wanted, strict=True):
        np.testing.assert_allclose(shift.frequencies, frequencies, rtol=3e-8)


@pytest.mark.parametrize(("kv", "step"), [("fp32", 1e-4), ("int8", 0.05), ("int8-g16", 0.05), ("int4-g16", 0.7)])
def test_moved_keys_are_those_of_text_further_on(kv: str, step: float) -> None:
    """The same tokens behind others: the first layer's keys know nothing but the token and its position."""
    _, program = cached("smollm3")
    if kv != "fp32":
        program = QuantizeKVCache(KVCacheConfig(**parse_kv(kv))).run(program).program
    ids = torch.randint(VOCAB, (1, 29), generator=torch.Generator().manual_seed(1))
    keys, others = (interpret(program, cached_feeds(program, x), [program.outputs[1]])[0] for x in (ids, ids[:, 12:]))
    shift = row_shifts(program)[0]
    assert str(shift.form) == kv and shift.turned is (kv == "int4-g16")

    def floats(rows: np.ndarray) -> np.ndarray:
        found = decode(rows, shift.form, shift.dim, shift.scale)
        found = found @ hadamard(shift.dim) if shift.turned else found
        return found if shift.mean is None else found + shift.mean

    want, size = floats(others.numpy()), float(np.square(floats(others.numpy())).mean() ** 0.5)
    for by, near in ((-12, True), (-11, False), (12, False)):
        moved = floats(shift.shift(keys[:, :, 12:].numpy(), by))
        assert (float(np.square(moved - want).mean() ** 0.5) < step * min(size, 1.0)) is near
