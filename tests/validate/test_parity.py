"""The gate tells rewrites from rounding: what is exact passes, what is wrong by a little does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from ryzen_compile.capture import capture
from ryzen_compile.config import KVCacheConfig, Recipe
from ryzen_compile.edit import Edit
from ryzen_compile.errors import CaptureError
from ryzen_compile.interpret import cached_feeds, first_tokens, interpret
from ryzen_compile.numerics import ternary
from ryzen_compile.numerics.divergence import mean_divergence
from ryzen_compile.passes.quantize_kv_cache import QuantizeKVCache
from ryzen_compile.pipeline import default_passes
from ryzen_compile.program import Program, is_call
from ryzen_compile.ternary_linear import TernaryLinear
from ryzen_compile.validate.parity import CHUNKS, TOKENS, ParityGate, check_capture, full_logits, logits_of
from tests.model_directory import case_named
from tests.zoo import CONTEXT, NanoDecoder, build, randomize

aten = torch.ops.aten


@pytest.fixture(scope="module")
def model() -> NanoDecoder:
    torch.manual_seed(0)
    decoder = NanoDecoder(width=32, heads=2).eval()
    randomize(decoder)
    return decoder


@pytest.fixture(scope="module")
def plain(model: NanoDecoder) -> Program:
    return capture(model)


@pytest.fixture(scope="module")
def gate(plain: Program) -> ParityGate:
    return ParityGate(plain)


@pytest.fixture(scope="module")
def cached(plain: Program) -> dict[str, Program]:
    """The Program after the whole order, with logits of every token and of the last."""
    done = {}
    for logits in ("all", "last"):
        program = plain
        for step in default_passes(Recipe(logits=logits)):
            program = step.run(program).program
        done[logits] = program
    return done


def linears(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if is_call(n, aten.linear)]


def changed(program: Program, node: Callable[[Program], fx.Node], make: Callable[[Edit, fx.Node], fx.Node]) -> Program:
    """``program`` with every reader of ``node`` reading what ``make`` makes of it."""
    edit = Edit(program, "test")
    old = node(edit.program)
    readers = list(old.users)
    new = make(edit, old)
    for reader in readers:
        edit.swap_argument(reader, old, new)
    return edit.finish()


def after(node: fx.Node) -> fx.Node:
    return node.next


def scaled(factor: float) -> Callable[[Edit, fx.Node], fx.Node]:
    return lambda edit, n: edit.call(aten.mul.Tensor, n, factor, before=after(n), like=n)


def test_the_captured_program_is_within(plain: Program, gate: ParityGate) -> None:
    rmse, largest, within = gate.measure(plain)
    assert within and largest == 0.0
    assert rmse == gate.reference_rmse > 0
    assert ParityGate(plain).reference_rmse == gate.reference_rmse  # the probes are seeded
    assert ParityGate(plain, seed=1).reference_rmse != gate.reference_rmse


def test_double_is_the_model_in_double(model: NanoDecoder, plain: Program) -> None:
    ids = torch.randint(99, (2, 7))
    want = model.double()(ids).detach()
    model.float()
    torch.testing.assert_close(full_logits(plain, ids, double=True), want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(full_logits(plain, ids), model(ids).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("logits", ["all", "last"])
def test_the_finished_program_is_within_through_its_cache(
    cached: dict[str, Program], plain: Program, gate: ParityGate, logits: str
) -> None:
    program = cached[logits]
    rmse, largest, within = gate.measure(program)
    assert within and 0 < largest < 1e-3 and rmse < 1e-4
    ids = torch.randint(99, (2, TOKENS))
    got, rows = logits_of(program, ids)
    ends = [*(sum(CHUNKS[: i + 1]) - 1 for i in range(len(CHUNKS))), TOKENS - 1]
    assert rows == (list(range(TOKENS)) if logits == "all" else ends)
    torch.testing.assert_close(got, full_logits(plain, ids)[:, rows], rtol=1e-3, atol=1e-3)


def test_the_chunks_are_a_prompt_a_longer_chunk_and_single_tokens() -> None:
    assert sum(CHUNKS) < TOKENS and CHUNKS[-2:] == (1, 1) and max(CHUNKS) > CHUNKS[0] > 1


def test_an_exact_rewrite_is_within(plain: Program, gate: ParityGate) -> None:
    twice = changed(changed(plain, lambda p: linears(p)[3], scaled(2.0)), lambda p: mul(p, 2.0), scaled(0.5))
    assert gate.measure(twice) == gate.measure(plain)
    other = changed(changed(plain, lambda p: linears(p)[3], scaled(3.0)), lambda p: mul(p, 3.0), scaled(1 / 3))
    rmse, _, within = gate.measure(other)
    assert within and rmse != gate.reference_rmse  # another rounding, no more


def mul(program: Program, factor: float) -> fx.Node:
    return next(n for n in program.graph.nodes if is_call(n, aten.mul) and n.args[1] == factor)


@pytest.mark.parametrize("factor", [1.01, 1 - 1e-3, 1 + 1e-4, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 3, 8])
def test_a_scale_that_is_off_is_out(plain: Program, gate: ParityGate, factor: float, at: int) -> None:
    rmse, largest, within = gate.measure(changed(plain, lambda p: linears(p)[at], scaled(factor)))
    assert not within
    assert not (largest < 1e-5 or rmse < 1e-5)


def test_rounding_to_less_is_out(plain: Program, gate: ParityGate) -> None:
    coarse = changed(plain, lambda p: linears(p)[2], scaled(1000.0))
    coarse = changed(
        coarse, lambda p: mul(p, 1000.0), lambda edit, n: edit.call(aten.round.default, n, before=after(n))
    )
    rounded = lambda p: next(n for n in p.graph.nodes if is_call(n, aten.round))
    assert not gate.measure(changed(coarse, rounded, scaled(0.001)))[2]


WRONG_CACHES: dict[str, tuple[object, Callable[[Edit, fx.Node], fx.Node]]] = {
    "lengths one more": (aten.sum, lambda edit, n: edit.call(aten.add.Tensor, n, 1, before=after(n))),
    "last rows first": (aten.embedding, lambda edit, n: edit.call(aten.roll.default, n, [1], [1], before=after(n))),
}


@pytest.mark.parametrize("name", WRONG_CACHES)
@pytest.mark.parametrize("logits", ["all", "last"])
def test_a_wrong_cache_is_out(cached: dict[str, Program], gate: ParityGate, name: str, logits: str) -> None:
    op, make = WRONG_CACHES[name]
    program = changed(cached[logits], lambda p: next(n for n in p.graph.nodes if is_call(n, op)), make)
    assert not gate.measure(program)[2]


@pytest.mark.parametrize(("position", "value"), [(11, 16), (12, 1e-3), (10, 1.01)])  # window, soft cap, scale
def test_a_wrong_option_of_a_cached_attention_is_out(
    cached: dict[str, Program], gate: ParityGate, position: int, value: float
) -> None:
    edit = Edit(cached["last"], "test")
    node = next(n for n in edit.graph.nodes if is_call(n, torch.ops.ryzen.cached_attention))
    args = list(node.args)
    args[position] = value if position != 10 else args[position] * value
    node.args = tuple(args)
    assert not gate.measure(edit.finish())[2]


def test_the_first_module_that_moved_is_named(plain: Program, gate: ParityGate) -> None:
    for at, where in ((2, "blocks.0 ("), (3, "blocks.0 ("), (6, "blocks.1 ("), (7, "blocks.1 (")):
        moved = gate.moved(plain, changed(plain, lambda p, at=at: linears(p)[at], scaled(1.01)))
        assert moved.startswith((where, where.replace(" (", "."))), (at, moved)
    assert gate.moved(plain, changed(plain, lambda p: linears(p)[8], scaled(1.01))) == "the output"
    assert gate.moved(plain, plain.copy()) == "the output"


def test_behind_a_cache_the_place_is_not_known(plain: Program, cached: dict[str, Program], gate: ParityGate) -> None:
    assert gate.moved(plain, cached["all"]) == "the cache or a later layer"


def test_a_short_context_shortens_the_probe(model: NanoDecoder) -> None:
    program = capture(model, context=9)
    gate = ParityGate(program)
    assert gate.measure(program)[2]
    for step in default_passes(Recipe()):
        program = step.run(program).program
    assert gate.measure(program)[2]
    got, rows = logits_of(program, torch.zeros((1, 9), dtype=torch.long))
    assert rows == [4, 8] and isinstance(got, Tensor) and got.shape == (1, 2, 99)


def test_the_captured_graph_is_held_to_the_model(model: NanoDecoder, plain: Program) -> None:
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    check_capture(model, plain)
    wrong = changed(plain, lambda p: linears(p)[3], scaled(1.1))
    with pytest.raises(CaptureError, match=r"^the captured graph is not the model NanoDecoder: their logits are "):
        check_capture(model, wrong)
    assert [module.training for module in model.modules()] == modes
    model.eval()


# --- losses -----------------------------------------------------------------------------------------------------------
def rescaled(factor: float) -> Callable[[Program], Program]:
    return lambda program: changed(program, lambda p: linears(p)[6], scaled(factor))


def test_a_loss_is_a_divergence_on_the_text(plain: Program) -> None:
    text = torch.randint(99, (5, 23), generator=torch.Generator().manual_seed(9))
    gate = ParityGate(plain, text=text)
    assert gate.measure_loss(plain) == (0.0, 0.0, 1.0)
    programs = [rescaled(factor)(plain) for factor in (1.001, 1.05, -1.0)]
    found = [gate.measure_loss(program) for program in programs]
    for (kl, late, top1), program in zip(found, programs, strict=True):
        p, q = (torch.softmax(full_logits(each, text).double(), -1) for each in (plain, program))
        apart = (p * (p / q).log()).sum(-1)
        assert kl == pytest.approx(float(apart.mean()), rel=1e-6, abs=1e-12)
        assert late == pytest.approx(float(apart[:, 18:].mean()), rel=1e-6, abs=1e-12)  # the last 5 of 23
        assert top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert 0 < found[0][0] < found[1][0] < found[2][0] and found[0][2] >= found[1][2] > found[2][2]


def test_without_text_the_probe_is_read(plain: Program, gate: ParityGate) -> None:
    kl, late, top1 = gate.measure_loss(rescaled(1.05)(plain))
    assert kl > 0 and late > 0 and 0 < top1 <= 1


def test_nan_is_no_loss_but_out_of_any_budget(plain: Program, gate: ParityGate) -> None:
    kl, late, _ = gate.measure_loss(rescaled(float("nan"))(plain))
    assert kl != kl and late != late and not (kl <= 1e9)


@pytest.mark.parametrize(
    ("shape", "read"), [((64, 256), (2, 256)), ((3, 17), (3, 17)), ((1, 2000), (1, 512)), ((2, 700), (1, 512))]
)
def test_a_long_text_is_read_in_part(shape: tuple[int, int], read: tuple[int, int]) -> None:
    assert tuple(first_tokens(torch.zeros(shape), 512).shape) == read


def test_after_a_loss_the_gate_measures_against_what_was_accepted(plain: Program) -> None:
    gate, lossy = ParityGate(plain), rescaled(1.05)(plain)
    assert not gate.measure(lossy)[2]
    assert gate.measure_loss(lossy)[0] > 0
    gate.rebase(lossy)
    rmse, largest, within = gate.measure(lossy)
    assert within and largest == 0.0 and rmse == gate.reference_rmse
    assert not gate.measure(plain)[2]  # to undo the loss is no exact rewrite either
    assert not gate.measure(changed(lossy, lambda p: linears(p)[3], scaled(1.001)))[2]
    assert gate.measure_loss(lossy) == (0.0, 0.0, 1.0)  # each lossy pass answers for what it loses itself
    assert gate.measure_loss(rescaled(1.05)(lossy))[0] > 0


# --- losses of the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "length"), [((3, 41), 123), ((4, 70), CONTEXT)])
def test_a_cache_is_measured_on_one_sequence_as_long_as_the_context(
    plain: Program, cached: dict[str, Program], shape: tuple[int, int], length: int
) -> None:
    text = torch.randint(99, shape, generator=torch.Generator().manual_seed(9))
    gate = ParityGate(plain, text=text)
    exact = gate.measure_loss(cached["all"])
    assert exact[0] < 1e-9 and exact[1] < 1e-9 and exact[2] == 1.0
    program = QuantizeKVCache(KVCacheConfig(dtype="int4"), calibration=text).run(cached["all"]).program
    one = text.flatten()[None, :length]
    want = full_logits(plain, one)
    got = interpret(program, cached_feeds(program, one), [program.outputs[0]])[0]
    last = slice(length - length // 4, None)
    assert gate.measure_loss(program)[:2] == pytest.approx(
        (mean_divergence(want, got)[0], mean_divergence(want[:, last], got[:, last])[0]), rel=1e-6
    )


def test_drift_is_seen_at_the_end_of_a_sequence(plain: Program, cached: dict[str, Program]) -> None:
    """Positions that only its last quarter has are off: four times the loss there."""
    text = torch.randint(99, (1, CONTEXT), generator=torch.Generator().manual_seed(9))
    gate = ParityGate(plain, text=text)
    program = cached["all"]
    name = next(name for name, value in program.exported.state_dict.items() if value.shape == (CONTEXT, 32))
    table = program.exported.state_dict[name].clone()
    table[-CONTEXT // 4 :] *= 0.7
    late = program.with_graph(program.graph, program.exported.state_dict | {name: table}, program.exported.constants)
    kl, last, _ = gate.measure_loss(late)
    assert kl > 1e-4 and last == pytest.approx(4 * kl, rel=1e-3)


def test_after_a_loss_in_the_cache_the_gate_measures_against_it(plain: Program, cached: dict[str, Program]) -> None:
    gate = ParityGate(plain)
    lossy = QuantizeKVCache(KVCacheConfig(dtype="int8")).run(cached["all"]).program
    assert not gate.measure(lossy)[2]
    gate.rebase(lossy)
    rmse, largest, within = gate.measure(lossy)
    assert within and largest == 0.0 and rmse == gate.reference_rmse
    wrong = changed(
        lossy, lambda p: next(n for n in p.graph.nodes if is_call(n, aten.sum)), WRONG_CACHES["lengths one more"][1]
    )
    assert not gate.measure(wrong)[2]


def test_a_window_is_left_and_its_cache_drops_rows_while_it_is_measured() -> None:
    program = capture(build(case_named("gemma2")))
    gate = ParityGate(program)
    for step in default_passes(Recipe(logits="all")):
        program = step.run(program).program
    slot = program.slots[0]
    assert slot.window and slot.resident(gate._ids.shape[1]) < gate._ids.shape[1] - slot.window
    assert gate.measure(program)[2]
    for at, value in ((11, slot.window - 1), (11, slot.window + 1)):
        edit = Edit(program, "test")
        node = next(n for n in edit.graph.nodes if is_call(n, torch.ops.ryzen.cached_attention))
        node.args = (*node.args[:at], value, *node.args[at + 1 :])
        assert not gate.measure(edit.finish())[2]


class BetweenCodes(nn.Module):
    """A ternary linear over a table whose rows are integers and a half, less a float32's last place, up to 127."""

    def __init__(self) -> None:
        super().__init__()
        self.block_size = 32
        codes = torch.randint(-100, 100, (99, 31)) + 0.5
        self.wte = nn.Embedding(99, 32)
        self.wte.weight.data = torch.cat((torch.full((99, 1), 127.0), codes - 2.0**-17), 1)
        self.inner = TernaryLinear(ternary.pack(torch.randint(-1, 2, (16, 32))), torch.tensor(0.1), None, None)
        self.head = nn.Linear(16, 99)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.wte(ids)))


def test_a_graph_that_rounds_is_held_to_float64_where_float32_jumps() -> None:
    """A number added and taken away again is nothing to float64; in float32 it moves activations to other codes."""
    torch.manual_seed(0)
    plain = capture(BetweenCodes().eval())
    gate = ParityGate(plain)

    def there_and_back(rest: float) -> Program:
        def make(edit: Edit, n: fx.Node) -> fx.Node:
            there = edit.call(aten.add.Tensor, n, 1024.3, before=after(n), like=n)
            return edit.call(aten.sub.Tensor, there, 1024.3 + rest, before=after(there), like=n)

        return changed(plain, lambda p: next(n for n in p.graph.nodes if is_call(n, aten.embedding)), make)

    single, _ = logits_of(there_and_back(0.0), gate._ids)
    assert float((single - gate._single).abs().max()) > 0.01
    rmse, largest, within = gate.measure(there_and_back(0.0))
    assert within and rmse < 1e-9 and largest < 1e-9
    assert not gate.measure(there_and_back(0.6))[2]
