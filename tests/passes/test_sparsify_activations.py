"""Small channels dropped from what linears read: where, at which thresholds, and what that does to the Program."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, fx

from ryzen_compile.capture import capture
from ryzen_compile.config import SparseActivations, WeightQuantization, find_recipe
from ryzen_compile.errors import ConfigError, ParityError, UnsupportedError
from ryzen_compile.interpret import interpret, text_feeds
from ryzen_compile.passes.base import PassResult
from ryzen_compile.passes.prune_logits import head_chain
from ryzen_compile.passes.quantize_weights import QuantizeWeights
from ryzen_compile.passes.sparsify_activations import (
    LEVELS,
    Read,
    SparsifyActivations,
    allocate,
    dropped_shares,
    find_reads,
    quantile,
)
from ryzen_compile.pipeline import default_passes, run_passes
from ryzen_compile.program import Program, is_call, shape
from ryzen_compile.validate.parity import ParityGate
from ryzen_compile.verify import verify
from tests.model_directory import case_named
from tests.zoo import LAYERS, VOCAB, build

ryzen = torch.ops.ryzen
TEXT = torch.randint(VOCAB, (8, 64), generator=torch.Generator().manual_seed(4))
READS = 4 * LAYERS  # QKV, o, gate and up, down


@cache
def fused(name: str = "llama", integers: bool = False) -> Program:
    """What the pass is given."""
    program = capture(build(case_named(name)))
    for step in default_passes(find_recipe("fp32")):
        if step.name == "insert_kv_cache":
            break
        program = step.run(program).program
    if integers:
        program = QuantizeWeights(WeightQuantization(method="rtn", block=32)).run(program).program
    return program


def thinned(program: Program, calibration: Tensor | None = TEXT, **settings: object) -> PassResult:
    result = SparsifyActivations(SparseActivations(**settings), calibration=calibration).run(program)
    verify(result.program)
    return result


def drops(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if is_call(n, ryzen.sparsify, ryzen.sparsify_topk)]


def logits(program: Program, text: Tensor = TEXT) -> Tensor:
    return interpret(program, text_feeds(program, text), [program.outputs[0]])[0]


@pytest.mark.parametrize("integers", [False, True])
def test_every_linear_but_the_head_reads_what_is_left(integers: bool) -> None:
    before = fused(integers=integers)
    result = thinned(before, allocation="uniform")
    assert len(result.hits) == len(drops(result.program)) == READS
    assert [site.note for site in result.misses] == ["the head's input stays whole"]
    head, _ = head_chain(result.program.outputs[0])
    linears = [n for n in result.program.graph.nodes if is_call(n, torch.ops.aten.linear, ryzen.linear_act,
                                                                ryzen.gated_linear, ryzen.linear_nbits)]  # fmt: skip
    assert len(linears) == READS + 1
    assert all(is_call(n.args[0], ryzen.sparsify) for n in linears if n is not head)
    assert not is_call(head.args[0], ryzen.sparsify)
    assert not find_reads(result.program)[0]  # a second run finds nothing


def test_thresholds_are_those_of_what_the_thinned_graph_computes() -> None:
    """On the text that they were chosen on, every input loses the share that was asked for, up to ties: the first
    layer reads a token alike wherever it stands."""
    program = thinned(fused(), target=0.4, allocation="uniform").program
    seen = TEXT[:6]  # the last quarter is held back
    ties = int(seen.flatten().bincount().max())
    for node, share in zip(drops(program), dropped_shares(program, seen).values(), strict=True):
        assert abs(share - 0.4) <= (ties + 1) / (seen.numel() * shape(node)[-1])


def test_the_report_says_what_is_aimed_at_and_what_is_reached() -> None:
    result = thinned(fused(), target=0.3, allocation="uniform")
    reached = dropped_shares(result.program, TEXT[6:])
    for site, node in zip(result.hits, drops(result.program), strict=True):
        wanted = f"what reaches {node.args[1]:.4g}; 30.0% to be dropped, {reached[node.name]:.1%} of held-out text is"
        assert wanted in site.note
        assert abs(reached[node.name] - 0.3) < 0.1  # random text is like itself
    assert "mlp.down_proj" in result.hits[3].note


def test_the_largest_channels_of_each_token() -> None:
    result = thinned(fused(), target=0.75, method="topk", allocation="uniform")
    assert [node.args[1] for node in drops(result.program)] == [16, 16, 16, 24] * LAYERS
    assert all(0.74 <= share <= 0.76 for share in dropped_shares(result.program, TEXT).values())
    assert "the largest 24 channels" in result.hits[3].note


def test_the_more_is_dropped_the_further_it_is_from_the_model() -> None:
    reference = logits(fused())
    results = [thinned(fused(), target=target, allocation="uniform") for target in (0.1, 0.4, 0.8)]
    errors = [float((logits(result.program) - reference).square().mean()) for result in results]
    assert 0 < errors[0] < errors[1] < errors[2]
    assert torch.equal(logits(thinned(fused(), target=0.0).program), reference)


def test_overrides_name_modules_and_the_last_one_wins() -> None:
    result = thinned(fused(), target=0.5, allocation="uniform", overrides={"mlp": 0.25, r"layers\.1\.mlp\.down": 0.0})
    assert len(result.hits) == READS - 1
    assert "a target of 0" in [site.note for site in result.misses]
    aimed = [site.note.split("; ")[1].split("%")[0] for site in result.hits]
    assert aimed == ["50.0", "50.0", "25.0", "25.0", "50.0", "50.0", "25.0"]
    with pytest.raises(ConfigError, match=r"'mlp.upp' matches no module") as error:
        thinned(fused(), overrides={"mlp.upp": 0.1})
    assert "model.layers.0.self_attn.q_proj to model.layers.1.mlp.down_proj" in (error.value.hint or "")


def test_greedy_gives_more_to_what_suffers_less() -> None:
    """Errors of p^2 and 4 p^2 per weight: the least sum has marginal costs alike, shares of 4 to 1 up to a level."""
    x = fx.Graph().placeholder("x")
    small, large = Read(x, (), 100), Read(x, (x,), 300)
    errors = {small: [100 * p * p for p in LEVELS], large: [4 * 300 * p * p for p in LEVELS]}
    shares = allocate([small, large], errors, 0.35)
    mean = (100 * shares[small] + 300 * shares[large]) / 400
    assert 0.35 <= mean < 0.35 + 0.05
    assert abs(shares[small] - 4 * shares[large]) <= 4 * 0.05 or shares[small] == LEVELS[-1]
    assert allocate([small, large], errors, 0.95) == {small: 0.95, large: 0.95}


def test_greedy_reaches_its_target_over_the_weights_and_costs_less() -> None:
    program = fused(integers=True)
    reference = logits(program)
    costs = {}
    for allocation in ("greedy", "uniform"):
        result = thinned(program, target=0.5, allocation=allocation)
        costs[allocation] = float((logits(result.program) - reference).square().mean())
        reads, _ = find_reads(program)
        reached = dropped_shares(result.program, TEXT[:6]).values()
        mean = sum(r.weights * share for r, share in zip(reads, reached, strict=True)) / sum(r.weights for r in reads)
        assert 0.49 <= mean <= 0.55  # to a level of one input
    assert costs["greedy"] < costs["uniform"]


def test_a_quantile_is_one_of_the_magnitudes() -> None:
    x = torch.tensor([[3.0, -1.0], [0.5, -2.0]])
    assert [quantile(x, share) for share in (0.0, 0.25, 0.5, 0.74, 0.75, 0.95)] == [0.5, 1.0, 2.0, 2.0, 3.0, 3.0]
    relu = torch.cat((torch.zeros(6), torch.ones(4)))
    assert quantile(relu, 0.5) == 0.0  # what is 0 already needs no threshold


def test_without_text_random_tokens_are_told() -> None:
    result = thinned(fused(), calibration=None, allocation="uniform")
    assert all("of random tokens is" in site.note for site in result.hits)


def test_readers_of_one_value_share_what_is_left() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(VOCAB, 32)
            self.first, self.second, self.head = (torch.nn.Linear(32, 32) for _ in range(3))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            return self.head(torch.tanh(self.first(x)) * self.second(x))

    step = SparsifyActivations(SparseActivations(target=0.5, allocation="uniform"), calibration=TEXT[:, :8])
    program = capture(Twice().eval(), context=64)
    result = step.run(program)
    verify(result.program)
    assert len(result.hits) == 1
    assert "first+second" in result.hits[0].note
    assert len(drops(result.program)[0].users) == 2


def test_the_gate_refuses_what_costs_too_much() -> None:
    program = fused()
    gate = ParityGate(program, text=TEXT)
    step = SparsifyActivations(SparseActivations(target=0.9, max_kl=1e-3), calibration=TEXT)
    with pytest.raises(ParityError, match="sparsify_activations") as error:
        run_passes(program, [step], gate=gate)
    assert "smaller share" in (error.value.hint or "")
    mild = SparsifyActivations(SparseActivations(target=0.1, max_kl=5), calibration=TEXT)
    _, report = run_passes(program, [mild], gate=gate)
    assert report.records[0].status == "applied"
    assert 0 < report.records[0].kl <= 5


def test_a_graph_of_a_head_alone_is_refused() -> None:
    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = torch.nn.Embedding(VOCAB, 16), torch.nn.Linear(16, VOCAB)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    with pytest.raises(UnsupportedError, match="head's input stays whole"):
        run_passes(capture(Head().eval(), context=64), [SparsifyActivations(SparseActivations())])


def test_it_stands_between_the_weights_and_the_cache() -> None:
    names = [step.name for step in default_passes(find_recipe("int4", sparsity=0.5))]
    at = names.index("sparsify_activations")
    assert names[at - 1 : at + 2] == ["quantize_weights", "sparsify_activations", "insert_kv_cache"]
    assert "sparsify_activations" not in [step.name for step in default_passes(find_recipe("int4"))]
