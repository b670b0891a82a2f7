"""Test support: small modules and tiny captured models, before and after a pass.

``rewrite`` exports a module with dynamic batch and tokens, runs one pass, and checks what must hold for every pass: the
law of the IR on both sides, and that a second run finds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from torch.export import Dim

from ryzen_compile.capture import _decompositions, _without_assertions, capture
from ryzen_compile.passes.base import Pass, PassResult, Site
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.fuse_add_norm import FuseAddNorm
from ryzen_compile.passes.fuse_linear import FuseLinear
from ryzen_compile.passes.fuse_norm import FuseNorm
from ryzen_compile.passes.merge_linear import MergeLinear
from ryzen_compile.passes.recognize_activation import RecognizeActivation
from ryzen_compile.program import Program
from ryzen_compile.spec import ModelSpec
from ryzen_compile.verify import verify

SPEC = ModelSpec(0, 0, 0, 0, 8, 0, 64, False, 0, "module")
ORDER = (Canonicalize(), RecognizeActivation(), FuseNorm(), FuseAddNorm(), MergeLinear(), FuseLinear())
SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "cohere2": ("Cohere2", {"sliding_window": 8}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 8}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("GPTNeoX", {}),
    "llama": ("Llama", {}),
    "olmo2": ("Olmo2", {}),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


# One of each kind of block in every run; capturing all of them takes half a minute.
QUICK = {"cohere2", "gemma2", "gpt2", "llama", "phi"}


def models(names: Iterable[str]) -> list[Any]:
    """``names`` as test parameters, those outside the quick set marked slow."""
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in sorted(names)]


@dataclass(frozen=True)
class Graph:
    """A Program that can be called, with what the pass that made it reported."""

    program: Program
    hits: tuple[Site, ...] = ()
    misses: tuple[Site, ...] = ()

    @property
    def ops(self) -> list[str]:
        return self.program.ops()

    @property
    def reasons(self) -> str:
        return "\n".join(site.note for site in self.misses)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The first result, computed node by node with the operators' references."""
        given = dict(zip([n.name for n in self.program.inputs], inputs, strict=True)) | self.program.weights
        values = [given[n.name] for n in self.program.graph.nodes if n.op == "placeholder"]
        with torch.no_grad():
            return fx.Interpreter(fx.GraphModule(nn.Module(), self.program.graph)).run(*values)[0]


def program_of(module: nn.Module, *inputs: Tensor) -> Program:
    """Exports ``module``; the first two dims of inputs of rank three or more are dynamic unless they are 1."""
    names = (Dim("batch", min=2), Dim("tokens", min=3))
    shapes = tuple({i: names[i] for i in (0, 1) if x.ndim > 2 and x.shape[i] > 1} or None for x in inputs)
    with torch.no_grad():
        exported = torch.export.export(module.eval(), inputs, dynamic_shapes=shapes)
        return Program(_without_assertions(exported.run_decompositions(_decompositions())), SPEC)


def rewrite(rewriter: Pass, module: nn.Module, *inputs: Tensor, after: Sequence[Pass] = ()) -> tuple[Graph, Graph]:
    """The graph before and after ``rewriter``, which runs behind the passes in ``after``."""
    program = program_of(module, *inputs)
    for earlier in after:
        program = earlier.run(program).program
    verify(program)
    before = Graph(program)
    ops = before.ops
    result = rewriter.run(program)
    verify(result.program)
    assert before.ops == ops, "the pass changed the Program it was given"
    assert not rewriter.run(result.program).hits, "a second run found more"
    return before, Graph(result.program, result.hits, result.misses)


@cache
def captured(name: str) -> Program:
    """The tiny model ``name`` with seeded random weights."""
    family, extra = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**(SIZES | extra))
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    return capture(getattr(transformers, f"{family}{head}")(config).eval())


@cache
def passed(name: str) -> dict[str, PassResult]:
    """What each pass of the order did to the tiny model, each on the result of the one before; all verified."""
    program, results = captured(name), {}
    for step in ORDER:
        results[step.name] = step.run(program)
        program = results[step.name].program
        verify(program)
        assert not step.run(program).hits, f"a second run of {step.name} found more"
    return results


def logits_moved(name: str, last: str) -> float:
    """The largest difference in the logits of the tiny model that the passes up to ``last`` make."""
    ids = torch.randint(3, 99, (3, 11), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(11).repeat(3, 1)
    before, after = Graph(captured(name)), Graph(passed(name)[last].program)
    return float((after(ids, positions) - before(ids, positions)).abs().max())
