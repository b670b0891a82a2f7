"""What can be stored in integer blocks and in which: merged and tied weights once, everything else with its reason."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ryzen_compile import ops
from ryzen_compile.capture import capture
from ryzen_compile.config import WeightQuantization
from ryzen_compile.errors import ConfigError
from ryzen_compile.numerics.blockwise import BlockFormat, BlockTensor, absmax_grid, quantize
from ryzen_compile.passes.weight_targets import Choice, assemble, choose_formats, find_targets, fitting_block
from ryzen_compile.program import Program, is_call
from tests.passes.graphs import passed, program_of
from tests.zoo import NanoDecoder

X = torch.randn(2, 7, 8)
LLAMA_LAYER = ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def llama() -> Program:
    return passed("llama")["fuse_linear"].program


@pytest.fixture(scope="module")
def nano() -> Program:
    torch.manual_seed(0)
    return capture(NanoDecoder(width=32, heads=2).eval())


# --- targets ----------------------------------------------------------------------------------------------------------
def test_merged_projections_are_one_target_with_their_names(llama: Program) -> None:
    targets, misses = find_targets(llama)
    layers = [f"model.layers.{i}.{part}" for i in (0, 1) for part in LLAMA_LAYER]
    assert [t.label for t in targets] == ["model.embed_tokens", *layers, "lm_head"]
    assert misses == []
    merged = targets[1]
    assert merged.names == tuple(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
    assert (merged.rows, merged.width) == (64 + 32 + 32, 64) and is_call(merged.weight, torch.ops.aten.cat)
    assert [t.label for t in targets if t.is_head] == ["lm_head"]
    assert [t.label for t in targets if t.lookups] == ["model.embed_tokens"]


def test_a_tied_head_and_its_table_are_one_target(nano: Program) -> None:
    targets, misses = find_targets(nano)
    tied = [t for t in targets if t.is_head or t.lookups]
    assert len(tied) == 1 and tied[0].is_head
    assert (len(tied[0].linears), len(tied[0].lookups)) == (1, 1)
    assert tied[0].names == ("head.weight",)  # of the two names, the one that export keeps
    assert tied[0].site is tied[0].linears[0]
    assert len(targets) == 1 + 2 * 4
    (miss,) = misses  # the table of positions
    assert miss.reason.endswith("_wpe_weight is looked up by something else than input_ids")
    assert is_call(miss.node, torch.ops.aten.embedding)


class Weights(nn.Module):
    """``function(module, x)`` with a matrix (11, 8), a vector and a table."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(11, 8)), nn.Parameter(torch.randn(8))
        self.codes = nn.Parameter(torch.ones(11, 8, dtype=torch.int64), requires_grad=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


REASONS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "computed": (lambda m, x: functional.linear(x, x[0] * 2), r"mul\w* is computed from the input, not from weights"),
    "partly computed": (
        lambda m, x: functional.linear(x, m.w * x.mean()),
        r"mul\w* is computed from the input, not from weights",
    ),
    "a vector": (lambda m, x: functional.linear(x, m.v), "p_v is no matrix of floating-point numbers"),
    "read elsewhere": (lambda m, x: functional.linear(x, m.w) + m.w.sum(), "p_w is also read by sum_1"),
    "a table of other ids": (
        lambda m, x: functional.embedding(x[..., 0].to(torch.int64) * 0, m.w),
        "p_w is looked up by something else than input_ids",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_no_target_says_why(name: str) -> None:
    function, reason = REASONS[name]
    targets, misses = find_targets(program_of(Weights(function), X))
    assert targets == []
    (miss,) = misses
    assert re.fullmatch(reason, miss.reason), miss.reason


def test_a_product_that_nobody_reads_is_neither(llama: Program) -> None:
    program = program_of(Weights(lambda m, x: functional.linear(x, m.w) * 0 + functional.linear(x, m.w).abs()), X)
    (target,), misses = find_targets(program)
    assert len(target.linears) == 2 and misses == []  # one weight, two products
    assert not target.is_head


@pytest.mark.parametrize("act", ["silu", "none"])
def test_activated_and_gated_products_count(act: str) -> None:
    def both(m: nn.Module, x: Tensor) -> Tensor:
        return ops.linear_act(x, m.w, None, act) + ops.gated_linear(x, torch.cat((m.w * 2, m.w)), "silu")

    targets, _ = find_targets(program_of(Weights(both), X))
    assert [(t.rows, len(t.linears), t.names) for t in targets] == [(22, 1, ("w",))]


# --- formats ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("width", "block", "fitting"),
    [
        (64, 128, 64), (128, 128, 128), (256, 128, 128), (256, 256, 256), (192, 128, 64), (160, 128, 32),
        (896, 256, 128), (896, 128, 128), (896, 32, 32), (200, 128, 16), (200, 16, 16), (248, 256, 256),
        (33, 128, 16), (1, 256, 16), (16, 16, 16), (31, 128, 32), (4096, 256, 256), (240, 256, 16),
    ],
)  # fmt: skip
def test_fitting_block(width: int, block: int, fitting: int) -> None:
    """A sixteenth of padding is given for a larger block, no more."""
    assert fitting_block(width, block) == fitting


@pytest.mark.parametrize("width", range(64, 257))
def test_a_fitting_block_wastes_little_or_least(width: int) -> None:
    found = fitting_block(width, 256)
    waste = {b: -width % b for b in (16, 32, 64, 128, 256)}
    assert waste[found] * 16 <= width or waste[found] == min(waste.values())
    assert all(waste[larger] * 16 > width for larger in waste if larger > found)


def choices(program: Program, **settings: object) -> dict[str, Choice]:
    targets, _ = find_targets(program)
    return {t.label: c for t, c in choose_formats(targets, WeightQuantization(**settings)).items()}


def test_formats_follow_the_settings(llama: Program) -> None:
    found = choices(llama, bits=4, block=128, symmetric=False, method="rtn", head_bits=8)
    assert {c.method for c in found.values()} == {"rtn"}
    assert found["lm_head"].format == BlockFormat(8, 64, False)
    assert found["model.embed_tokens"].format == BlockFormat(4, 64, False)
    assert found["model.layers.1.mlp.down_proj"].format == BlockFormat(4, 32, False)  # 96 inputs: blocks of 32


def test_the_last_override_that_matches_wins(llama: Program) -> None:
    found = choices(
        llama,
        overrides={
            r"mlp": {"bits": 8},
            r"layers\.1\.mlp\.down": {"bits": 2, "symmetric": False, "block": 16, "method": "rtn"},
            r"embed|o_proj": {"float": True},
            r"layers\.1\..*o_proj": {"bits": 8},
        },
    )
    bits = {label: c.format.bits for label, c in found.items()}
    assert bits["model.layers.0.mlp.down_proj"] == bits["model.layers.1.mlp.gate_proj+up_proj"] == 8
    assert found["model.layers.1.mlp.down_proj"] == Choice(BlockFormat(2, 16, False), "rtn", fixed=True)
    assert "model.embed_tokens" not in found and "model.layers.0.self_attn.o_proj" not in found
    assert bits["model.layers.1.self_attn.o_proj"] == 8 and bits["lm_head"] == 4


def test_overrides_beat_the_heads_bits(llama: Program) -> None:
    assert choices(llama, head_bits=8, overrides={"^lm_head": {"bits": 2}})["lm_head"].format.bits == 2
    assert choices(llama, head_bits=8, overrides={"^lm_head": {"block": 16}})["lm_head"].format == BlockFormat(8, 16)


def test_an_override_that_matches_nothing_names_the_nearest(llama: Program) -> None:
    with pytest.raises(ConfigError) as caught:
        choices(llama, overrides={"mlp": {"bits": 8}, "model.layers.0.mlp.dwn_proj.weight": {"bits": 8}})
    assert str(caught.value) == (
        "override 'model.layers.0.mlp.dwn_proj.weight' matches no weight; "
        "the nearest is 'model.layers.0.mlp.down_proj.weight'"
    )
    with pytest.raises(ConfigError, match=r"override '#' matches no weight; 16 weights are to be quantized$"):
        choices(llama, overrides={"#": {"bits": 8}})


def test_an_override_cannot_split_merged_weights(llama: Program) -> None:
    with pytest.raises(
        ConfigError,
        match=r"different formats of model\.layers\.0\.self_attn\.q_proj\.weight and model\.layers\.0\.self_attn\.k_pr"
        r"oj\.weight, which are merged into one weight; write an expression that matches both",
    ):
        choices(llama, overrides={"q_proj": {"bits": 8}})
    assert choices(llama, overrides={"[qkv]_proj": {"bits": 8}})["model.layers.0.self_attn.q_proj+k_proj+v_proj"]


# --- weights that come quantized --------------------------------------------------------------------------------------
def stored(rows: int, width: int, form: BlockFormat = BlockFormat(4, 16)) -> BlockTensor:  # noqa: B008 - frozen
    w = torch.randn((rows, width), generator=torch.Generator().manual_seed(rows))
    return quantize(w, form, *absmax_grid(w, form))


class Assembled(nn.Module):
    """One product with ``make(module)``, an expression over three matrices of 24 inputs."""

    def __init__(self, make: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(10, 24)), nn.Parameter(torch.randn(6, 24))
        self.square, self.make = nn.Parameter(torch.randn(24, 24)), make

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.make(self))


KNOWN = {"a": stored(10, 24), "b": stored(6, 24), "square": stored(24, 24)}
FORMULAS: dict[str, tuple[Callable[[nn.Module], Tensor], Callable[[dict[str, Tensor]], Tensor]]] = {
    "alone": (lambda m: m.a, lambda t: t["a"]),
    "cat": (lambda m: torch.cat((m.b, m.a)), lambda t: torch.cat((t["b"], t["a"]))),
    "slice": (lambda m: m.a[3:7], lambda t: t["a"][3:7]),
    "slice to the end": (lambda m: m.a[3:], lambda t: t["a"][3:]),
    "slices of a cat, cat again": (
        lambda m: torch.cat((torch.cat((m.a, m.b))[8:12], m.b[-2:])),
        lambda t: torch.cat((t["a"][8:], t["b"][:2], t["b"][4:])),
    ),
}


def assembled(make: Callable[[nn.Module], Tensor], known: dict[str, BlockTensor]) -> BlockTensor | None:
    program = program_of(Assembled(make), torch.randn(2, 5, 24))
    (target,), _ = find_targets(program)
    return assemble(target.weight, program, known)


@pytest.mark.parametrize("name", FORMULAS)
def test_rows_are_moved_exactly(name: str) -> None:
    make, formula = FORMULAS[name]
    found = assembled(make, KNOWN)
    want = formula({name: tensor.dequantize() for name, tensor in KNOWN.items()})
    assert found is not None and found.shape == tuple(want.shape)
    assert torch.equal(found.dequantize(), want)


@pytest.mark.parametrize(
    ("make", "known"),
    [
        (lambda m: torch.cat((m.a, m.b)), {**KNOWN, "b": stored(6, 24, BlockFormat(8, 16))}),
        (lambda m: torch.cat((m.a, m.b)), {**KNOWN, "b": stored(6, 24, BlockFormat(4, 16, False))}),
        (lambda m: torch.cat((m.a, m.b)), {"a": KNOWN["a"]}),
        (lambda m: torch.cat((m.a[:, :8], m.a[:, 8:]), 1), KNOWN),
        (lambda m: m.square.t(), KNOWN),
        (lambda m: m.a * 2, KNOWN),
        (lambda m: m.a[::2], KNOWN),
        (lambda m: m.a, {}),
    ],
    ids=["bits", "zero points", "half known", "columns", "transposed", "scaled", "every other row", "unknown"],
)
def test_what_would_be_rounded_is_not_assembled(
    make: Callable[[nn.Module], Tensor], known: dict[str, BlockTensor]
) -> None:
    assert assembled(make, known) is None
