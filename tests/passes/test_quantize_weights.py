"""Every linear and the table in integer blocks: the Program computes what the model with decoded weights computes."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ryzen_compile.capture import capture
from ryzen_compile.config import WeightQuantization, find_recipe
from ryzen_compile.errors import UnsupportedError
from ryzen_compile.interpret import interpret, text_feeds
from ryzen_compile.numerics import search
from ryzen_compile.numerics.blockwise import BlockFormat, BlockTensor, absmax_grid, quantize
from ryzen_compile.passes import quantize_weights
from ryzen_compile.passes.base import PassResult
from ryzen_compile.passes.quantize_weights import QuantizeWeights
from ryzen_compile.passes.weight_targets import find_targets
from ryzen_compile.pipeline import default_passes
from ryzen_compile.program import Program, is_call
from ryzen_compile.validate.parity import full_logits
from ryzen_compile.verify import verify
from tests.model_directory import case_named
from tests.zoo import VOCAB, NanoDecoder, build, randomize

ryzen = torch.ops.ryzen
IDS = torch.randint(VOCAB, (2, 13), generator=torch.Generator().manual_seed(3))
TEXT = torch.randint(VOCAB, (6, 32), generator=torch.Generator().manual_seed(4))


@cache
def model(name: str) -> nn.Module:
    if name == "nano":
        torch.manual_seed(0)
        decoder = NanoDecoder(width=48).eval()
        randomize(decoder)
        return decoder
    return build(case_named("llama", tie_word_embeddings=name == "tied llama"))


@cache
def fused(name: str) -> Program:
    """What the pass is given."""
    program = capture(model(name))
    for step in default_passes(find_recipe("int4")):
        if step.name == "quantize_weights":
            return program
        program = step.run(program).program
    raise LookupError("the recipe does not quantize")


def quantized(
    name: str, *, calibration: Tensor | None = None, given: dict[str, BlockTensor] | None = None, **settings: Any
) -> PassResult:
    done = QuantizeWeights(WeightQuantization(**settings), calibration=calibration, given=given)
    result = done.run(fused(name))
    verify(result.program)
    return result


def products(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if is_call(n, ryzen.linear_nbits)]


def tensor_of(node: fx.Node, program: Program, rows: int, width: int) -> BlockTensor:
    """The blocks that a product reads."""
    packed, scales, zeros = (None if a is None else program.weights[a.name] for a in node.args[1:4])
    found = BlockTensor.stored(packed, scales, zeros, *node.args[5:7], width)
    assert found.shape == (rows, width)
    return found


def decoded_model(name: str, program: Program) -> nn.Module:
    """The model with every weight replaced by what the products of ``program`` decode."""
    twin = copy.deepcopy(model(name))
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    targets, _ = find_targets(fused(name))
    order = {node: i for i, node in enumerate(fused(name).graph.nodes)}
    before = sorted(((node, t) for t in targets for node in t.linears), key=lambda pair: order[pair[0]])
    after = products(program)
    assert len(before) == len(after)
    with torch.no_grad():
        for (_, target), node in zip(before, after, strict=True):
            table = tensor_of(node, program, target.rows, target.width).dequantize()
            sizes = [parameters[n].shape[0] for n in target.names]
            for weight, rows in zip(target.names, table.split(sizes), strict=True):
                parameters[weight].copy_(rows)
        for target in targets:
            if target.linears:
                continue
            lookup = next(n for n in program.graph.nodes if is_call(n, ryzen.embedding_nbits))
            ids = torch.arange(target.rows)[None]
            row = interpret(program, {program.inputs[0]: ids}, [lookup])[0][0]
            parameters[target.names[0]].copy_(row)
    return twin


FORMATS: dict[str, dict[str, Any]] = {
    "4 bits": {"method": "rtn"},
    "8 bits, zero points": {"bits": 8, "symmetric": False, "block": 16, "method": "mse"},
    "3 bits": {"bits": 3, "block": 32, "method": "mse", "symmetric": False},
    "2 bits, calibrated, 8-bit head": {"bits": 2, "symmetric": False, "block": 32, "head_bits": 8},
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["nano", "tied llama", "llama"])
def test_the_program_computes_what_the_decoded_weights_compute(name: str, form: str) -> None:
    """In float64 on both sides: nothing but the weights has changed."""
    program = quantized(name, calibration=TEXT, **FORMATS[form]).program
    twin = decoded_model(name, program).double()
    with torch.no_grad():
        out = twin(IDS)
    want = getattr(out, "logits", out)
    torch.testing.assert_close(full_logits(program, IDS, double=True), want, rtol=0, atol=1e-5)
    moved = (full_logits(fused(name), IDS, double=True) - want).abs().max()
    assert moved > 1e-3  # rounding did do something


@pytest.mark.parametrize(
    ("name", "linears", "lookups", "activations"),
    [
        ("nano", 2 * 4 + 1, 1, {"ryzen.activation": 2}),
        ("tied llama", 2 * 4 + 1, 1, {"ryzen.gated_activation": 2}),
        ("llama", 2 * 4 + 1, 1, {"ryzen.gated_activation": 2}),
    ],
)
def test_every_linear_and_the_table_are_rewritten(
    name: str, linears: int, lookups: int, activations: dict[str, int]
) -> None:
    result = quantized(name, method="rtn")
    counts = Counter(result.program.ops())
    assert counts["ryzen.linear_nbits"] == linears and counts["ryzen.embedding_nbits"] == lookups
    assert not {"aten.linear", "ryzen.linear_act", "ryzen.gated_linear"} & set(counts)
    assert {op: n for op, n in counts.items() if "activation" in op} == activations
    assert counts["aten.embedding"] == (1 if name == "nano" else 0)  # its table of positions
    assert len(result.hits) == linears + (name == "llama")  # a tied table and head are one hit
    assert len(result.misses) == (1 if name == "nano" else 0)
    again = QuantizeWeights(WeightQuantization(method="rtn")).run(result.program)
    assert not again.hits and again.program is result.program


def test_biases_are_kept() -> None:
    before, after = fused("nano"), quantized("nano", method="rtn").program
    names = []
    for program, at in ((before, 2), (after, 4)):
        found = [
            n for n in program.graph.nodes if is_call(n, torch.ops.aten.linear, ryzen.linear_act, ryzen.linear_nbits)
        ]
        names.append([program.weight_names[n.args[at].name] for n in found if len(n.args) > at and n.args[at]])
    assert names[0] == names[1] and len(names[0]) == 2 * 4
    assert names[0][0] == "blocks.0.qkv.bias"


@pytest.mark.parametrize("name", ["nano", "tied llama"])
def test_a_tied_table_is_stored_once(name: str) -> None:
    program = quantized(name, calibration=TEXT, symmetric=False).program
    lookup = next(n for n in program.graph.nodes if is_call(n, ryzen.embedding_nbits))
    head = products(program)[-1]
    assert lookup.args[1:4] == head.args[1:4]
    packed = program.weights[head.args[1].name]
    assert sum(tensor is packed for tensor in program.weights.values()) == 1
    table = tensor_of(head, program, VOCAB, lookup.args[4]).dequantize()
    rows = interpret(program, {program.inputs[0]: torch.arange(VOCAB)[None]}, [lookup])[0][0]
    assert torch.equal(rows, table)


# --- weights that come quantized --------------------------------------------------------------------------------------
def stored(rows: int, width: int, form: BlockFormat) -> BlockTensor:
    w = torch.randn((rows, width), generator=torch.Generator().manual_seed(rows)) / width**0.5
    return quantize(w, form, *absmax_grid(w, form))


def test_given_weights_are_stored_as_they_came() -> None:
    wide, narrow = BlockFormat(8, 16), BlockFormat(2, 32, False)
    attention, feed = "model.layers.0.self_attn.", "model.layers.1.mlp."
    given = {f"{attention}{n}_proj.weight": stored(rows, 64, wide) for n, rows in (("q", 64), ("k", 32), ("v", 32))}
    given[f"{feed}down_proj.weight"] = stored(64, 96, narrow)
    result = quantized("llama", calibration=TEXT, given=given, bits=4, block=64)
    notes = {site.module: site.note for site in result.hits}
    came = [note for note in notes.values() if note.endswith("as it came")]
    assert came == [
        f"{attention}q_proj+k_proj+v_proj: 8 bits, blocks of 16, as it came",
        f"{feed}down_proj: 2 bits, blocks of 32 with zero points, as it came",
    ]
    nodes = products(result.program)
    merged, down = tensor_of(nodes[0], result.program, 128, 64), tensor_of(nodes[7], result.program, 64, 96)
    parts = BlockTensor.concat(list(given.values())[:3])
    assert torch.equal(merged.packed, parts.packed) and torch.equal(merged.scales, parts.scales)
    last = given[f"{feed}down_proj.weight"]
    assert all(torch.equal(a, b) for a, b in ((down.packed, last.packed), (down.scales, last.scales)))
    assert down.zeros is not None and last.zeros is not None and torch.equal(down.zeros, last.zeros)
    assert {n.args[5] for n in nodes} == {2, 4, 8}


def test_given_weights_that_would_be_rounded_again_are_refused() -> None:
    given = {"model.layers.0.self_attn.q_proj.weight": stored(64, 64, BlockFormat(8, 16))}
    with pytest.raises(UnsupportedError, match=r"1 weight\(s\) came quantized .* model\.layers\.0\.self_attn\.q_proj"):
        quantized("llama", given=given)


# --- calibration ------------------------------------------------------------------------------------------------------
def test_without_text_the_fallback_is_used_and_said() -> None:
    calm = quantized("llama", method="gptq", fallback={"method": "rtn"})
    assert {site.note.rsplit(", ", 1)[1] for site in calm.hits} == {"rtn"}
    text = quantized("llama", method="gptq", fallback={"method": "rtn"}, calibration=TEXT)
    methods = Counter(site.note.rsplit(", ", 1)[1] for site in text.hits)
    assert methods == {"gptq": 9, "rtn": 1}  # a table that is only looked up has no inputs to count
    want = quantized("llama", method="rtn").program
    for got, expected in zip(products(calm.program), products(want), strict=True):
        assert torch.equal(calm.program.weights[got.args[1].name], want.weights[expected.args[1].name])


def inputs_of_products(program: Program, text: Tensor) -> list[Tensor]:
    """Mean of x xᵀ over the tokens of ``text`` for the input x of each product, in graph order."""
    found: list[Tensor] = []

    def watch(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if is_call(node, torch.ops.aten.linear, ryzen.linear_act, ryzen.gated_linear, ryzen.linear_nbits):
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            found.append(x.T @ x / x.shape[0])
        return args

    interpret(program, text_feeds(program, text), [program.outputs[0]], intercept=watch)
    return found


def test_calibration_sees_what_the_quantized_layers_before_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQ's own statistics, recorded on their way: those of the finished Program, not of the captured one."""
    recorded: list[Tensor] = []
    real = search.METHODS["gptq"]

    def recording(w: Tensor, form: BlockFormat, statistics: Any) -> BlockTensor:
        recorded.append(statistics.hessian.double().clone())
        assert statistics.count == TEXT.numel()
        return real.function(w, form, statistics)

    monkeypatch.setitem(search.METHODS, "gptq", dataclasses.replace(real, function=recording))
    program = quantized("llama", bits=2, block=32, calibration=TEXT).program
    after, before = inputs_of_products(program, TEXT), inputs_of_products(fused("llama"), TEXT)
    assert len(recorded) == len(after) == 9
    for i, (seen, final, captured) in enumerate(zip(recorded, after, before, strict=True)):
        assert (seen - final).norm() <= 1e-5 * final.norm(), i
        assert (seen - captured).norm() >= 1e-2 * captured.norm(), i


def test_the_text_is_not_read_to_logits_that_nobody_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """(B, T, V) over all of the text would be the largest value by far."""
    sizes: list[int] = []

    def watched(program: Program, feeds: Any, goals: list[fx.Node], **options: Any) -> list[Any]:
        sizes.extend(goal.meta["val"].shape[-1] for goal in goals if feeds)
        return interpret(program, feeds, goals, **options)

    monkeypatch.setattr(quantize_weights, "interpret", watched)
    for overrides in ({}, {"lm_head": {"float": True}}):
        quantized("llama", calibration=TEXT, overrides=overrides)
    assert sizes == [64, 64]


@pytest.mark.parametrize("calibration", [TEXT, None], ids=["text", "no text"])
def test_the_size_asked_for_is_kept_whatever_falls_back(calibration: Tensor | None) -> None:
    """A fallback with smaller blocks takes more bits for scales; they count."""
    small = {"method": "mse", "block": 16}
    program = quantized("llama", calibration=calibration, bits=2, block=32, fallback=small, target_bits=4.5).program
    stored = {a.name: program.weights[a.name] for n in products(program) for a in n.args[1:4] if a is not None}
    lookup = next(n for n in program.graph.nodes if is_call(n, ryzen.embedding_nbits))
    stored |= {a.name: program.weights[a.name] for a in lookup.args[1:4] if a is not None}
    assert {n.args[5] for n in products(program)} == {2, 4}
    weights = sum(t.rows * t.width for t in find_targets(fused("llama"))[0])
    assert 4.0 < 8 * sum(t.nbytes for t in stored.values()) / weights <= 4.5
