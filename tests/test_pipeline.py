"""The loop: passes run in order, under the law and the gate; each way in which one can fail is told apart and named."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from torch import fx, nn

from ryzen_compile.capture import capture
from ryzen_compile.config import Recipe, SparseActivations, find_recipe
from ryzen_compile.edit import Edit
from ryzen_compile.errors import ParityError, PassError, UnsupportedError
from ryzen_compile.passes.base import NoMatch, Pass, PassResult, RewritePass, Site
from ryzen_compile.passes.bind_positions import BindPositions
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.eliminate_dead import EliminateDead
from ryzen_compile.passes.fuse_add_norm import FuseAddNorm
from ryzen_compile.passes.fuse_norm import FuseNorm
from ryzen_compile.passes.insert_kv_cache import InsertKVCache
from ryzen_compile.pipeline import Observer, default_passes, run_passes
from ryzen_compile.program import Program, is_call, module_path
from ryzen_compile.report import Loss, PassRecord
from ryzen_compile.validate.parity import LATE_ALLOWANCE, ParityGate, divergence_loss, full_logits
from ryzen_compile.verify import verify
from tests.passes.graphs import Graph
from tests.zoo import NanoDecoder, randomize

aten = torch.ops.aten
IDS = torch.randint(99, (2, 11), generator=torch.Generator().manual_seed(5))
ALL = frozenset({"ryzen::layer_norm", "ryzen::rms_norm", "ryzen::add_layer_norm", "ryzen::add_rms_norm"})


@pytest.fixture(scope="module")
def nano() -> Program:
    torch.manual_seed(0)
    model = NanoDecoder(width=32, heads=2).eval()
    randomize(model)
    return capture(model)


@pytest.fixture(scope="module")
def gate(nano: Program) -> ParityGate:
    return ParityGate(nano)


class Rewrite(RewritePass[fx.Node]):
    """What a test does to the product of ``blocks.1.down``."""

    name = "rewrite"
    anchors = (aten.linear,)

    def match(self, node: fx.Node, program: Program) -> fx.Node | NoMatch | None:
        if module_path(node) != "blocks.1.down":
            return None
        done = any(reader.meta.get("rewritten_by") == self.name for reader in node.users)
        return NoMatch("already rewritten", node) if done else node

    def rewrite(self, edit: Edit, m: fx.Node) -> None:
        readers = list(m.users)
        new = self.instead(edit, m, readers[0])
        for reader in readers:
            edit.swap_argument(reader, m, new)

    def instead(self, edit: Edit, m: fx.Node, before: fx.Node) -> fx.Node:
        return edit.call(aten.mul.Tensor, m, self.factor, before=before, like=m)

    factor = 1.0


class Harmless(Rewrite):
    name = "harmless"


class Wrong(Rewrite):
    name, factor = "wrong", 1.01


class Required(Wrong):
    name, required = "must", True


class Infinite(Rewrite):
    name, factor = "infinite", float("inf")


class Late(Pass):
    """Reads the table of positions one place on."""

    name = "late"

    def run(self, program: Program) -> PassResult:
        edit = Edit(program, self.name)
        positions = edit.program.input("position_ids")
        rows = next(n for n in positions.users if is_call(n, aten.embedding))
        later = edit.call(aten.add.Tensor, positions, 1, before=rows)
        edit.swap_argument(rows, positions, later)
        return PassResult(edit.finish(), (Site(rows.name, "wpe"),))


class Failing(Pass):
    name = "failing"

    def run(self, program: Program) -> PassResult:
        raise KeyError("a_missing_thing")


class Lawless(Rewrite):
    name = "lawless"

    def run(self, program: Program) -> PassResult:
        result = super().run(program)
        del next(n for n in result.program.graph.nodes if is_call(n, aten.mul) and n.args[1] == 1.0).meta["val"]
        return result


class Stuck(Rewrite):
    """Metadata that agree, in a graph that cannot run."""

    name = "stuck"

    def instead(self, edit: Edit, m: fx.Node, before: fx.Node) -> fx.Node:
        new = edit.call(aten.reshape.default, m, [3, -1], before=before)
        new.meta["val"] = m.meta["val"]
        return new


class Fancy(Wrong):
    name, produces = "fancy", frozenset({"ryzen::fancy"})


def statuses(records: tuple[PassRecord, ...]) -> dict[str, str]:
    return {record.name: record.status for record in records}


def test_a_wrong_pass_is_rolled_back_and_the_layer_named(nano: Program, gate: ParityGate) -> None:
    seen: list[PassRecord] = []
    program, report = run_passes(
        nano, (Canonicalize(), Wrong(), Harmless(), FuseNorm()), gate=gate, strict=True, progress=seen.append
    )
    assert statuses(report.records) == {
        "canonicalize": "applied",
        "wrong": "rolled back",
        "harmless": "applied",  # a failure does not end the run
        "fuse_norm": "applied",
    }
    assert tuple(seen) == report.records
    record = report.records[1]
    assert re.fullmatch(
        r"logits moved by \d\.\d+e[+-]\d+ \(rmse .*, reference .*\), first in blocks\.1 \(add\w*\)", record.detail
    )
    assert record.hits == () and record.nodes_before == record.nodes_after
    assert record.rmse > 2 * gate.reference_rmse and record.max_error > 1e-3
    assert not [n for n in program.graph.nodes if n.meta.get("rewritten_by") == "wrong"]
    verify(program)
    torch.testing.assert_close(full_logits(program, IDS), full_logits(nano, IDS), rtol=1e-4, atol=1e-4)


def test_without_the_wrong_pass_the_logits_are_the_captured_ones(nano: Program, gate: ParityGate) -> None:
    program, report = run_passes(nano, (Wrong(), Infinite()), gate=gate, strict=True)
    assert set(statuses(report.records).values()) == {"rolled back"}
    assert program is nano
    torch.testing.assert_close(full_logits(program, IDS), full_logits(nano, IDS), rtol=0, atol=0)
    unguarded, report = run_passes(nano, (Wrong(),))
    assert report.records[0].status == "applied" and report.reference_rmse is None
    assert report.records[0].rmse is None and report.records[0].max_error is None
    assert float((full_logits(unguarded, IDS) - full_logits(nano, IDS)).abs().max()) > 1e-3


def test_shifted_positions_are_rolled_back(nano: Program, gate: ParityGate) -> None:
    program, report = run_passes(nano, (Canonicalize(), BindPositions(), Late()), gate=gate)
    assert statuses(report.records)["bind_positions"] == "applied"
    assert statuses(report.records)["late"] == "rolled back"
    assert re.search(r"first in (wpe|the model) \(\w+\)$", report.records[2].detail), report.records[2].detail
    assert "late" not in {n.meta.get("rewritten_by") for n in program.graph.nodes}


def test_exact_passes_pass_the_gate(nano: Program, gate: ParityGate) -> None:
    recipe = Recipe()
    program, report = run_passes(nano, default_passes(recipe), gate=gate, strict=True)
    assert not {"rolled back", "unsupported"} & set(statuses(report.records).values())
    assert all(r.rmse <= 2 * gate.reference_rmse + 1e-4 for r in report.records if r.rmse is not None)
    assert report.hits()["insert_kv_cache"] == 2 and len(program.slots) == 2
    assert report.captured_ops["aten.linear"] == 9 and report.reference_rmse == gate.reference_rmse
    assert report.records[-1].ops["ryzen.cached_attention"] == 2
    assert report.spec is program.spec and dict(report.provenance) == dict(nano.provenance)
    assert (program.spec.layers, program.spec.heads, program.spec.head_dim) == (2, 2, 16)
    for earlier, later in zip(report.records, report.records[1:], strict=False):
        assert later.nodes_before == earlier.nodes_after


def test_the_order_of_a_recipe() -> None:
    last = [p.name for p in default_passes(Recipe(logits="last"))]
    every = [p.name for p in default_passes(Recipe(logits="all"))]
    assert last[0] == "canonicalize" and last[-3:] == ["insert_kv_cache", "prune_logits", "eliminate_dead"]
    assert every == [name for name in last if name != "prune_logits"]
    assert len(set(last)) == len(last)


def test_a_required_pass_that_is_wrong_ends_the_run(nano: Program, gate: ParityGate) -> None:
    with pytest.raises(ParityError, match=r"^pass must: logits moved by .*, first in blocks\.1 \(add\w*\)") as caught:
        run_passes(nano, (Canonicalize(), Required(), FuseNorm()), gate=gate)
    assert caught.value.hint and caught.value.exit_code == 7


class WrongCache(InsertKVCache):
    """Rows of the cache read one place off."""

    def run(self, program: Program) -> PassResult:
        result = super().run(program)
        edit = Edit(result.program, self.name)
        lengths = next(n for n in edit.graph.nodes if is_call(n, aten.sum) and n.args[0].name == "attention_mask")
        readers = list(lengths.users)
        off = edit.call(aten.add.Tensor, lengths, 1, before=readers[0])
        for reader in readers:
            edit.swap_argument(reader, lengths, off)
        return PassResult(edit.finish(), result.hits)


def test_a_cache_that_is_off_by_one_is_seen(nano: Program, gate: ParityGate) -> None:
    passes = [WrongCache() if p.name == "insert_kv_cache" else p for p in default_passes(Recipe())]
    with pytest.raises(ParityError, match=r"^pass insert_kv_cache: .*first in the cache or a later layer"):
        run_passes(nano, passes, gate=gate)


def test_a_pass_that_raises_is_named_with_those_before_it(nano: Program) -> None:
    with pytest.raises(
        PassError, match=r"^pass failing failed after canonicalize, harmless: KeyError: 'a_missing_thing'$"
    ) as caught:
        run_passes(nano, (Canonicalize(), Harmless(), Failing()))
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(PassError, match=r"^pass failing failed after nothing: "):
        run_passes(nano, (Failing(),))


def test_strict_checks_the_law_after_every_pass(nano: Program) -> None:
    with pytest.raises(PassError, match=r"^pass lawless failed after canonicalize: .*mul\w* has no meta\['val'\]"):
        run_passes(nano, (Canonicalize(), Lawless(), EliminateDead()), strict=True)
    with pytest.raises(PassError, match=r"^the graph breaks the IR's law: .*mul\w* has no meta\['val'\]"):
        run_passes(nano, (Canonicalize(), Lawless()))  # the law holds at both ends in any case


def test_the_law_holds_at_the_start(nano: Program) -> None:
    program = nano.copy()
    del next(n for n in program.graph.nodes if is_call(n, aten.linear)).meta["val"]
    with pytest.raises(PassError, match="linear has no meta"):
        run_passes(program, ())


def test_a_graph_that_cannot_run_is_the_pass_s_fault(nano: Program, gate: ParityGate) -> None:
    with pytest.raises(PassError, match=r"^pass stuck failed after nothing: RuntimeError: "):
        run_passes(nano, (Stuck(),), gate=gate, strict=True)


def test_a_pass_that_the_backend_cannot_carry_is_not_run(nano: Program, gate: ParityGate) -> None:
    program, report = run_passes(nano, (Fancy(), FuseNorm(), FuseAddNorm()), supported_ops=ALL, gate=gate)
    assert statuses(report.records) == {"fancy": "unsupported", "fuse_norm": "applied", "fuse_add_norm": "applied"}
    assert report.records[0].hits == () and report.records[0].seconds == 0.0
    assert not [n for n in program.graph.nodes if n.meta.get("rewritten_by") == "fancy"]
    some = ALL - {"ryzen::add_layer_norm"}
    _, report = run_passes(nano, (FuseNorm(), FuseAddNorm()), supported_ops=some)
    assert statuses(report.records) == {"fuse_norm": "applied", "fuse_add_norm": "unsupported"}


Seen = list[tuple[str, str, Program, Program]]


def observer(seen: Seen) -> Observer:
    return lambda record, before, after: seen.append((record.name, record.status, before, after))


def test_an_observer_sees_each_pass_with_the_program_before_and_after(nano: Program, gate: ParityGate) -> None:
    seen: Seen = []
    passes = (Fancy(), Canonicalize(), Wrong(), Harmless(), Harmless(), FuseNorm())
    program, report = run_passes(nano, passes, supported_ops=ALL, gate=gate, observe=observer(seen))
    assert [(name, status) for name, status, _, _ in seen] == [(r.name, r.status) for r in report.records]
    assert [status for _, status, _, _ in seen] == [
        "unsupported", "applied", "rolled back", "applied", "unchanged", "applied",
    ]  # fmt: skip
    assert seen[0][2] is nano and seen[-1][3] is program
    for (_, _, _, after), (_, _, before, _) in pairwise(seen):
        assert before is after
    for _, status, before, after in seen:
        assert (before is after) is (status != "applied")
    assert run_passes(nano, passes, supported_ops=ALL, gate=gate)[0].ops() == program.ops()


def test_a_lossy_pass_is_observed_like_others(nano: Program) -> None:
    seen: Seen = []
    run_passes(nano, (Rounding(), TooCoarse()), gate=own_gate(nano), observe=observer(seen))
    assert [(status, before is after) for _, status, before, after in seen] == [
        ("applied", False), ("rolled back", True),
    ]  # fmt: skip


def test_an_observer_that_raises_is_not_the_pass_s_fault(nano: Program) -> None:
    def broken(record: PassRecord, before: Program, after: Program) -> None:
        raise KeyError("of the observer")

    with pytest.raises(KeyError, match="of the observer") as caught:
        run_passes(nano, (Canonicalize(), Harmless()), observe=broken)
    assert not isinstance(caught.value, PassError) and caught.value.__cause__ is None


def test_a_pass_that_fails_is_not_observed(nano: Program) -> None:
    seen: Seen = []
    with pytest.raises(PassError, match="pass failing failed after canonicalize"):
        run_passes(nano, (Canonicalize(), Failing(), Harmless()), observe=observer(seen))
    assert [name for name, *_ in seen] == ["canonicalize"]


class Scan(nn.Module):
    """A decoder that could have a cache, but for a scan."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = NanoDecoder(width=32, heads=2, layers=1)
        self.block_size = self.inner.block_size

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids).cumsum(1)


class Biased(nn.Module):
    def __init__(self, attends: bool = True) -> None:
        super().__init__()
        self.block_size, self.attends = 31, attends
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)[:, None]
        if self.attends:
            at = torch.arange(x.shape[2])
            bias = -(at[:, None] - at).abs().float()
            x = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=bias)
        return self.head(x[:, 0])


def test_a_required_pass_with_misses_names_node_and_module() -> None:
    with pytest.raises(
        UnsupportedError,
        match=r"^insert_kv_cache cannot rewrite node cumsum in the model: mixes tokens outside an attention",
    ) as caught:
        run_passes(capture(Scan()), default_passes(Recipe()))
    assert caught.value.hint == "1 such place(s), and insert_kv_cache needs every one"


def test_a_required_pass_with_nothing_to_do_names_what_it_builds_on() -> None:
    with pytest.raises(UnsupportedError, match=r"^fuse_attention cannot rewrite node neg in the model: the mask adds"):
        run_passes(capture(Biased()), default_passes(Recipe()))
    with pytest.raises(UnsupportedError, match=r"^insert_kv_cache found nothing to rewrite: the graph holds no atten"):
        run_passes(capture(Biased(attends=False)), default_passes(Recipe()))


def test_nothing_to_do_is_unchanged(nano: Program, gate: ParityGate) -> None:
    program, report = run_passes(nano, (), gate=gate)
    assert program is nano and report.records == ()
    once, _ = run_passes(nano, (Canonicalize(), Harmless()))
    again, report = run_passes(once, (Harmless(),), gate=gate)
    assert again is once and statuses(report.records) == {"harmless": "unchanged"}
    assert report.records[0].misses[0].note == "already rewritten" and report.records[0].rmse is None
    assert torch.equal(Graph(again)(IDS, torch.arange(11).repeat(2, 1)), full_logits(once, IDS))


# --- lossy passes -----------------------------------------------------------------------------------------------------
class Rounding(Rewrite):
    """A pass that says it loses something: the product times ``factor``."""

    name, promise, max_kl, factor = "rounding", "lossy", 0.05, 1.01


class TooCoarse(Rounding):
    name, factor = "too_coarse", -3.0


class RequiredCoarse(TooCoarse):
    name, required = "must_round", True


class Ruinous(Rounding):
    name, factor = "ruinous", float("nan")


def own_gate(program: Program) -> ParityGate:
    """A gate that a lossy pass may move."""
    return ParityGate(program, text=IDS)


def test_a_lossy_pass_within_its_budget_is_applied(nano: Program) -> None:
    program, report = run_passes(nano, (Canonicalize(), Rounding(), FuseNorm()), gate=own_gate(nano), strict=True)
    assert statuses(report.records) == {"canonicalize": "applied", "rounding": "applied", "fuse_norm": "applied"}
    record = report.records[1]
    assert record.kl is not None and 0 < record.kl <= Rounding.max_kl and 0.5 < record.top1 <= 1
    assert record.rmse is None and record.max_error is None and record.moved.startswith("KL ")
    reference, logits = (torch.log_softmax(full_logits(p, IDS).double(), -1) for p in (nano, program))
    kl = float((reference.exp() * (reference - logits)).sum(-1).mean())
    assert record.kl == pytest.approx(kl, rel=1e-3)
    assert report.records[0].kl is None and report.records[2].rmse is not None


@pytest.mark.parametrize("wrong", [TooCoarse, Ruinous])
def test_a_lossy_pass_over_its_budget_is_rolled_back(nano: Program, wrong: type[Rounding]) -> None:
    program, report = run_passes(nano, (wrong(), Harmless()), gate=own_gate(nano), strict=True)
    assert statuses(report.records) == {wrong.name: "rolled back", "harmless": "applied"}
    record = report.records[0]
    assert record.hits == () and not (record.kl <= wrong.max_kl)
    assert re.fullmatch(
        r"mean KL divergence (\S+) nats per token, (\S+) in the last quarter of a sequence, 0\.05 is allowed; "
        r"top-1 agreement [\d.]+%",
        record.detail,
    )
    assert (record.kl, record.late_kl, record.top1) == pytest.approx(
        own_gate(nano).measure_loss(wrong().run(nano).program), nan_ok=True
    )
    assert not [n for n in program.graph.nodes if n.meta.get("rewritten_by") == wrong.name]
    torch.testing.assert_close(full_logits(program, IDS), full_logits(nano, IDS), rtol=0, atol=0)


def test_a_required_lossy_pass_over_its_budget_ends_the_run(nano: Program) -> None:
    with pytest.raises(ParityError, match=r"^pass must_round: mean KL divergence .* sequence, 0\.05 is") as caught:
        run_passes(nano, (Canonicalize(), RequiredCoarse()), gate=own_gate(nano))
    assert "more bits" in caught.value.hint and caught.value.exit_code == 7


def test_exact_passes_after_a_lossy_one_are_still_held_to_rounding(nano: Program) -> None:
    """Both ways: what the lossy pass lost is not blamed on those after it, and does not cover for them."""
    passes = (Rounding(), Wrong(), FuseNorm())
    program, report = run_passes(nano, passes, gate=own_gate(nano), strict=True)
    assert statuses(report.records) == {"rounding": "applied", "wrong": "rolled back", "fuse_norm": "applied"}
    assert [n.args[1] for n in program.graph.nodes if n.meta.get("rewritten_by") == "rounding"] == [1.01]
    unfair = ParityGate(nano)
    assert not unfair.measure(program)[2]  # against the captured model it would have been blamed


def test_quantization_is_followed_by_exact_passes_that_are_checked(nano: Program) -> None:
    recipe = find_recipe("int4")
    program, report = run_passes(nano, default_passes(recipe, calibration=IDS), gate=own_gate(nano), strict=True)
    found = {r.name: r for r in report.records}
    assert found["quantize_weights"].status == "applied" and 0 < found["quantize_weights"].kl < recipe.weights.max_kl
    assert not {"rolled back", "unsupported"} & set(statuses(report.records).values())
    assert found["insert_kv_cache"].rmse <= 1e-4 and found["insert_kv_cache"].kl is None
    assert "ryzen.linear_nbits" in program.ops() and "aten.linear" not in program.ops()
    wrong = [WrongCache() if p.name == "insert_kv_cache" else p for p in default_passes(recipe)]
    with pytest.raises(ParityError, match=r"^pass insert_kv_cache: .*first in the cache or a later layer"):
        run_passes(nano, wrong, gate=own_gate(nano))


def test_a_budget_that_quantization_cannot_meet_is_an_error(nano: Program) -> None:
    recipe = find_recipe("int4", bits=2, max_kl=1e-6)
    with pytest.raises(ParityError, match=r"^pass quantize_weights: .* 1e-06 is allowed; top-1 .*; more bits, smaller"):
        run_passes(nano, default_passes(recipe), gate=own_gate(nano))


class Bigram(nn.Module):
    """A table that gives the logits of the next token, read in another way as well: no target."""

    def __init__(self) -> None:
        super().__init__()
        self.block_size, self.table = 31, nn.Embedding(11, 11)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids) + self.table.weight.sum()


def test_a_model_without_a_weight_to_quantize_says_why() -> None:
    with pytest.raises(UnsupportedError, match=r"^quantize_weights cannot rewrite node sum_1 .* is also read by sum_1"):
        run_passes(capture(Bigram()), default_passes(find_recipe("int4")))


def test_where_quantization_stands() -> None:
    names = [p.name for p in default_passes(find_recipe("int4"))]
    at = names.index("quantize_weights")
    assert names[at - 1 : at + 2] == ["fuse_linear", "quantize_weights", "insert_kv_cache"]
    assert [name for name in names if name != "quantize_weights"] == [p.name for p in default_passes(Recipe())]


# --- the cache --------------------------------------------------------------------------------------------------------


def names_of(**changes: object) -> list[str]:
    return [p.name for p in default_passes(find_recipe("fp32", **changes))]


def test_where_the_quantization_of_the_cache_stands() -> None:
    names = names_of(kv="int8")
    at = names.index("quantize_kv_cache")
    assert names[at - 1 : at + 2] == ["insert_kv_cache", "quantize_kv_cache", "prune_logits"]
    assert [name for name in names if name != "quantize_kv_cache"] == names_of() == names_of(kv="fp32")


@pytest.mark.parametrize(
    ("kv", "bounded"), [({}, True), ({"bounded": False}, False), ({"window": 32}, False), ({"dtype": "int8"}, True)]
)
def test_a_stream_drops_rows_of_all_layers_alike(kv: dict[str, object], bounded: bool) -> None:
    (insert,) = (p for p in default_passes(find_recipe("fp32", kv=kv)) if isinstance(p, InsertKVCache))
    assert insert._bounded is bounded


@pytest.mark.parametrize("kv", ["int8", "int8-g16", "k8v4"])
def test_a_quantized_cache_is_followed_by_exact_passes_that_are_checked(nano: Program, kv: str) -> None:
    recipe = find_recipe("fp32", kv=kv)
    program, report = run_passes(nano, default_passes(recipe, calibration=IDS), gate=own_gate(nano), strict=True)
    found = {r.name: r for r in report.records}
    record = found["quantize_kv_cache"]
    assert record.status == "applied" and record.promise == "lossy" and record.rmse is None
    assert 0 < record.kl < recipe.kv.budget and 0 < record.late_kl < LATE_ALLOWANCE * recipe.kv.budget
    assert found["insert_kv_cache"].kl is None and found["insert_kv_cache"].rmse < 1e-4  # exact before rounding
    assert found["prune_logits"].status == "applied" and found["prune_logits"].rmse is not None
    assert [slot.key_format for slot in program.slots] == [kv.replace("k8v4", "int8")] * 2
    gate = own_gate(nano)
    whole, _ = run_passes(nano, default_passes(recipe, calibration=IDS)[:-2], gate=gate)
    _, report = run_passes(whole, (WrongHead(),), gate=gate)
    assert statuses(report.records) == {"wrong_head": "rolled back"}


class WrongHead(Rewrite):
    """The output a thousandth too large, behind a quantized cache."""

    name = "wrong_head"

    def run(self, program: Program) -> PassResult:
        edit = Edit(program, self.name)
        logits = edit.program.outputs[0]
        edit.set_output(0, edit.call(aten.mul.Tensor, logits, 1.001, before=edit.graph.output_node()))
        return PassResult(edit.finish(), (Site(logits.name, "head"),))


def test_a_cache_that_cannot_meet_its_budget_is_an_error(nano: Program) -> None:
    recipe = find_recipe("fp32", kv={"dtype": "int4", "max_kl": 1e-9})
    with pytest.raises(ParityError, match=r"^pass quantize_kv_cache: .* last quarter of a sequence, 1e-09 is allowed"):
        run_passes(nano, default_passes(recipe), gate=own_gate(nano))


class Measured:
    """A gate that finds what it is told, and remembers what became the reference."""

    reference_rmse = 1e-7

    def __init__(self, kl: float, late: float) -> None:
        self.found, self.references = (kl, late, 0.9), 0

    def measure(self, program: Program) -> tuple[float, float, bool]:
        return 0.0, 0.0, True

    def judge(self, program: Program, pass_: Pass) -> Loss:
        return divergence_loss(*self.found, pass_.max_kl)

    def rebase(self, program: Program) -> None:
        self.references += 1

    def moved(self, before: Program, after: Program) -> str:
        return "nowhere"


NAN, BUDGET = float("nan"), Rounding.max_kl


@pytest.mark.parametrize(
    ("kl", "late", "accepted"),
    [
        (BUDGET, LATE_ALLOWANCE * BUDGET, True),
        (0.0, 0.0, True),
        (BUDGET * 1.001, BUDGET, False),
        (BUDGET, LATE_ALLOWANCE * BUDGET * 1.001, False),  # drift
        (BUDGET / 2, 3 * BUDGET, False),
        (NAN, 0.0, False),
        (0.0, NAN, False),
        (0.0, float("inf"), False),
    ],
)
def test_a_loss_may_not_grow_with_the_sequence(nano: Program, kl: float, late: float, accepted: bool) -> None:
    gate = Measured(kl, late)
    program, report = run_passes(nano, (Rounding(),), gate=gate)
    (record,) = report.records
    assert record.status == ("applied" if accepted else "rolled back") and gate.references == accepted
    assert (program is nano) is not accepted
    assert (record.kl, record.late_kl, record.top1) == pytest.approx((kl, late, 0.9), nan_ok=True)
    if not accepted:
        assert f"{late:.3g} in the last quarter of a sequence, 0.05 is allowed" in record.detail
        with pytest.raises(ParityError, match="in the last quarter of a sequence"):
            run_passes(nano, (RequiredCoarse(),), gate=gate)


def test_nothing_is_dropped_at_a_share_of_0_unless_a_layer_is_named() -> None:
    names = {share: [p.name for p in default_passes(find_recipe("int4", sparsity=share))] for share in (0, 0.1)}
    assert "sparsify_activations" in names[0.1] and "sparsify_activations" not in names[0]
    assert SparseActivations(target=0, overrides={"mlp": 0.2}).drops and not SparseActivations(target=0).drops
