"""The cache in integers: what is stored in which form, from which text its scales come, and when it is refused."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from ryzen_compile.capture import capture
from ryzen_compile.config import KVCacheConfig, find_recipe, parse_kv
from ryzen_compile.errors import ConfigError, UnsupportedError
from ryzen_compile.interpret import cached_feeds, interpret, text_feeds
from ryzen_compile.numerics.divergence import mean_divergence
from ryzen_compile.numerics.kv_scales import channel_scales
from ryzen_compile.numerics.rows import RowFormat
from ryzen_compile.passes import quantize_kv_cache
from ryzen_compile.passes.base import PassResult
from ryzen_compile.passes.quantize_kv_cache import QuantizeKVCache
from ryzen_compile.pipeline import default_passes
from ryzen_compile.program import Program, is_call, shape
from ryzen_compile.validate.parity import ParityGate, full_logits, logits_of
from ryzen_compile.verify import verify
from tests.model_directory import case_named
from tests.passes.test_insert_kv_cache import Form, inserted
from tests.zoo import CONTEXT, VOCAB, build

cached = torch.ops.ryzen.cached_attention
TEXT = torch.randint(VOCAB, (5, 67), generator=torch.Generator().manual_seed(4))


@cache
def programs(name: str) -> tuple[Program, Program, Program]:
    """The tiny model ``name``: captured, fused right before it gets a cache, and with the cache."""
    model = build(case_named(name))
    if name == "llama":  # what the first layer's attention finds counts for little
        model.model.layers[0].self_attn.o_proj.weight.data.mul_(0.001)
    captured = program = capture(model)
    for step in default_passes(find_recipe("fp32")):
        before, program = program, step.run(program).program
        if step.name == "insert_kv_cache":
            return captured, before, program
    raise LookupError("the recipe inserts no cache")


def quantized(kv: str, name: str = "llama", calibration: Tensor | None = TEXT, **settings: Any) -> PassResult:
    result = QuantizeKVCache(KVCacheConfig(**parse_kv(kv), **settings), calibration=calibration).run(programs(name)[2])
    verify(result.program)
    return result


def attentions(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if is_call(n, cached)]


def logits(program: Program) -> Tensor:
    feeds = cached_feeds(program, TEXT[:, :40])
    return interpret(program, feeds, [program.outputs[0]])[0]


def rows_of(text: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys, rotated, and values (B, K, T, D) over ``text``, from the graph that has no cache."""
    program = programs("llama")[1]
    found: list[tuple[Tensor, Tensor]] = []

    def intercept(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if is_call(node, torch.ops.ryzen.attention):
            found.append(args[1:3])
        return args

    interpret(program, text_feeds(program, text), [program.outputs[0]], intercept=intercept)
    return found


FORMS = {  # keys, values, bytes of a key's row of 16 channels and of a value's, and how far it may be off
    "int8": ("int8", "int8", torch.int8, 16, torch.int8, 16, 1e-3),
    "int4": ("int4", "int4", torch.uint8, 8, torch.uint8, 8, 0.3),
    "k8v4": ("int8", "int4", torch.int8, 16, torch.uint8, 8, 0.2),
    "int8-g16": ("int8-g16", "int8-g16", torch.uint8, 18, torch.uint8, 18, 1e-3),
    "int4-g16": ("int4-g16", "int4-g16", torch.uint8, 10, torch.uint8, 10, 0.3),
    "k8v4-g16": ("int8-g16", "int4-g16", torch.uint8, 18, torch.uint8, 10, 0.2),
}


@pytest.mark.parametrize("kv", FORMS)
def test_every_layer_is_stored_so(kv: str) -> None:
    key, value, key_type, key_width, value_type, value_width, most = FORMS[kv]
    result = quantized(kv)
    program, before = result.program, programs("llama")[2]
    assert [(s.key_format, s.value_format) for s in program.slots] == [(key, value)] * 2
    assert [(s.kv_heads, s.head_dim, s.value_dim, s.window) for s in program.slots] == [(2, 16, 16, 0)] * 2
    assert [n.name for n in program.inputs] == [n.name for n in before.inputs]
    nodes = attentions(program)
    assert len(nodes) == len(result.hits) == 2 and not result.misses
    for i, node in enumerate(nodes):
        given = (program.input(f"past_key_values_{i}_{kind}") for kind in ("key", "value"))
        results = program.outputs[1 + 2 * i : 3 + 2 * i]
        for x, y, dtype, width in zip(given, results, (key_type, value_type), (key_width, value_width), strict=True):
            assert x.meta["val"].dtype == y.meta["val"].dtype == dtype
            assert shape(x)[3] == shape(y)[3] == width and shape(x) == shape(y)
        grouped = "-g" in kv
        assert [node.args[at] is None for at in (14, 15)] == [grouped, grouped]
        assert node.args[16:18] == (key, value) and node.args[19] is False
        assert (node.args[18], node.args[20] is not None) == (kv == "int4-g16",) * 2  # turned, centred
    assert quantized(kv).hits == result.hits  # the same again: nothing is left to chance
    assert [slot.key_format for slot in before.slots] == ["fp32"] * 2  # and what it was given stays
    kl, _ = mean_divergence(logits(before), logits(program))
    assert 1e-9 < kl < most


@pytest.mark.parametrize("kv", ["int8", "int4", "k8v4"])
def test_scales_are_those_of_the_text(kv: str) -> None:
    program = quantized(kv).program
    windows = TEXT.flatten()[: 2 * CONTEXT].reshape(2, CONTEXT)  # whole windows of the context; the rest is left
    bits = [RowFormat.parse(name).bits for name in FORMS[kv][:2]]
    for node, rows in zip(attentions(program), rows_of(windows), strict=True):
        for scale, x, width in zip(node.args[14:16], rows, bits, strict=True):
            got = program.weights[scale.name]
            assert got.shape == (1, 2, 1, 16) and got.dtype == torch.float32
            torch.testing.assert_close(got, channel_scales(x, width), rtol=1e-4, atol=0)
            other = channel_scales(x[:, :, : CONTEXT // 2], width)
            assert not torch.allclose(got, other, rtol=1e-3)


def test_a_text_shorter_than_the_context_is_one_window() -> None:
    program = quantized("int8", calibration=TEXT[:1, :23]).program
    for node, (keys, _) in zip(attentions(program), rows_of(TEXT[:1, :23]), strict=True):
        got = program.weights[node.args[14].name]
        torch.testing.assert_close(got, channel_scales(keys, 8), rtol=1e-4, atol=0)


def test_without_text_random_tokens_are_read() -> None:
    found = [quantized("int8", calibration=calibration) for calibration in (None, None, TEXT)]
    scales = [r.program.weights[attentions(r.program)[0].args[14].name] for r in found]
    assert torch.equal(scales[0], scales[1]) and not torch.equal(scales[0], scales[2])
    notes = [[site.note for site in r.hits] for r in found]
    assert notes[0] == ["keys int8, values int8, calibrated on random tokens"] * 2
    assert notes[2] == ["keys int8, values int8, calibrated on text"] * 2
    assert [site.module for site in found[0].hits] == [f"model.layers.{i}.self_attn" for i in range(2)]


@pytest.mark.parametrize("kv", ["int8-g16", "k8v4-g16"])
def test_rows_that_carry_their_scales_need_no_run(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(quantize_kv_cache, "interpret", refuse)
    result = quantized(kv, calibration=None)
    assert [site.note for site in result.hits] == [f"keys {FORMS[kv][0]}, values {FORMS[kv][1]}"] * 2
    assert set(result.program.weights) == set(programs("llama")[2].weights)
    with pytest.raises(AssertionError, match="the model was run"):
        quantized("int8")


def test_four_bit_keys_with_groups_lose_the_mean_of_the_text_and_are_turned() -> None:
    result = quantized("int4-g16")
    windows = TEXT.flatten()[: 2 * CONTEXT].reshape(2, CONTEXT)
    for node, (keys, _) in zip(attentions(result.program), rows_of(windows), strict=True):
        mean = result.program.weights[node.args[20].name]
        torch.testing.assert_close(mean, keys.mean((0, 2), keepdim=True), rtol=1e-4, atol=1e-5)
    assert {site.note for site in result.hits} == {
        "keys int4-g16, values int4-g16, keys centred, keys turned, calibrated on text"
    }


def test_where_a_constant_would_be_noticed_keys_keep_their_mean() -> None:
    """Gemma 2 has soft caps; the sliding layer's cache stays a rolling one."""
    result = quantized("int4-g16", "gemma2")
    nodes = attentions(result.program)
    assert all(node.args[12] > 0 and node.args[18] is True and node.args[20] is None for node in nodes)
    assert [(slot.window, slot.key_format) for slot in result.program.slots] == [(8, "int4-g16"), (0, "int4-g16")]
    assert [node.args[19] for node in nodes] == [True, False]
    assert {site.note for site in result.hits} == {"keys int4-g16, values int4-g16, keys turned"}


def test_a_rolling_cache_is_measured_over_all_of_the_text_and_reads_the_same() -> None:
    result = quantized("int8", "gemma2")
    program = result.program
    got, rows = logits_of(program, TEXT[:2, :60])  # in chunks, past what the sliding layer holds
    assert rows == list(range(60)) and program.slots[0].rows == 24
    want = interpret(program, cached_feeds(program, TEXT[:2, :60]), [program.outputs[0]])[0]  # at once, nothing dropped
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert mean_divergence(full_logits(programs("gemma2")[0], TEXT[:2, :60]), got)[0] < 2e-3


# --- auto -------------------------------------------------------------------------------------------------------------


def formats(program: Program) -> list[str]:
    return [f"{slot.key_format} {slot.value_format}" for slot in program.slots]


def cost(kept: Sequence[bool]) -> float:
    """Divergence when the layers in ``kept`` stay floats and the others have 4 bits, on what ``auto`` tries."""
    before = programs("llama")[2]
    plan = quantize_kv_cache._measured(
        before, attentions(before), TEXT.flatten()[: 2 * CONTEXT].reshape(2, CONTEXT), RowFormat(4), RowFormat(4)
    )
    narrow = quantize_kv_cache.store_as(before, {i: plan[i] for i, stays in enumerate(kept) if not stays})
    text = TEXT.flatten()[None, :CONTEXT]
    one, other = (interpret(p, cached_feeds(p, text), [p.outputs[0]])[0] for p in (before, narrow))
    return mean_divergence(one, other)[0]


def test_auto_gives_few_bits_where_that_costs_little() -> None:
    cheap, costly = cost([False, True]), cost([True, False])
    assert 20 * cheap < costly
    found = {}
    for budget, expected in (
        (1.9 * cheap, ["int8 int8", "int8 int8"]),  # half of the budget is for single layers
        (2.1 * cheap, ["int4 int4", "int8 int8"]),
        (1.99 * (cheap + costly), ["int4 int4", "int8 int8"]),  # together they cost too much
        (2.01 * (cheap + costly), ["int4 int4", "int4 int4"]),
    ):
        found[budget] = quantized("auto", max_kl=budget)
        assert formats(found[budget].program) == expected, budget
    mixed = found[2.1 * cheap]
    assert mixed.hits[0].note == "keys int4, values int4, calibrated on text"
    for i, (node, kv) in enumerate(zip(attentions(mixed.program), ("int4", "int8"), strict=True)):
        alone = quantized(kv).program  # the scales of a mixture are those of either
        for at in (14, 15):
            same = alone.weights[attentions(alone)[i].args[at].name]
            assert torch.equal(mixed.program.weights[node.args[at].name], same)
    assert cost([True, True]) == 0.0 < cost([False, True])


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv", "form", "said"),
    [
        ("int8-g16", Form(), "cache format int8-g16 does not divide a head of 4 channels"),
        ("int4", Form(value_dim=3), "cache format int4 does not divide a head of 3 channels"),
        ("k8v4", Form(value_dim=3), "cache format int4 does not divide a head of 3 channels"),
        ("auto", Form(value_dim=3), "cache format int4 does not divide a head of 3 channels"),
    ],
)
def test_heads_that_do_not_divide_are_refused(kv: str, form: Form, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_kv_cache, "interpret", lambda *_, **__: pytest.fail("work was done before"))
    program = inserted(Form(), form)[1].program
    with pytest.raises(ConfigError, match=said):
        QuantizeKVCache(KVCacheConfig(**parse_kv(kv)), calibration=TEXT).run(program)


@pytest.mark.parametrize("kv", ["int8", "int8-g16", "auto"])
def test_a_second_run_is_refused(kv: str) -> None:
    program = quantized("int8").program
    with pytest.raises(UnsupportedError, match=r"^the cache is quantized already"):
        QuantizeKVCache(KVCacheConfig(**parse_kv(kv))).run(program)


def test_without_a_cache_there_is_nothing_to_quantize() -> None:
    for kv in ("int8", "auto"):
        assert not QuantizeKVCache(KVCacheConfig(dtype=kv), calibration=TEXT).run(programs("llama")[0]).changed
    assert QuantizeKVCache.required and QuantizeKVCache.builds_on == "insert_kv_cache"


def test_its_loss_is_the_gate_s_to_judge() -> None:
    done = QuantizeKVCache(KVCacheConfig(dtype="int4"))
    assert (done.promise, done.max_kl) == ("lossy", 0.2)
    assert QuantizeKVCache(KVCacheConfig(dtype="int4", max_kl=0.03)).max_kl == 0.03
    gate = ParityGate(programs("llama")[0], text=TEXT)
    kl, late, top1 = gate.measure_loss(quantized("int8").program)
    more, _, less = gate.measure_loss(quantized("int4").program)
    assert 0 < kl < 0.02 < more and late < 0.04 and top1 > less
