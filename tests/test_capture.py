"""Capture: the Program computes what the model does, the model is handed back as it was, and errors name a cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ryzen_compile.capture import capture
from ryzen_compile.errors import CaptureError, ConfigError, UnsupportedError
from ryzen_compile.program import Program, is_call
from ryzen_compile.verify import verify
from tests.passes.graphs import Graph
from tests.zoo import BASE, CONTEXT, NanoDecoder, randomize

ONE = BASE | {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}


def tiny(family: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(ONE | changes))
    name = "Llama4ForCausalLM" if family == "Llama4Text" else f"{family}ForCausalLM"
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager").float().eval()
    randomize(model)
    return model


def state(model: nn.Module) -> dict[str, Any]:
    """All that a capture might leave behind."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "configs": [{**vars(c)} for c in configs.values()],
        "stores": {name: t.data_ptr() for name, t in model.state_dict().items()},
        "sums": {name: float(t.double().sum()) for name, t in model.state_dict().items()},
        "grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "forward": {name: "forward" in vars(module) for name, module in model.named_modules()},
        "registered": (sorted(AttentionInterface._global_mapping), sorted(AttentionMaskInterface._global_mapping)),
    }


def same_logits(model: nn.Module, program: Program, batch: int, tokens: int) -> None:
    ids = torch.randint(3, 99, (batch, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(ids)
    want = getattr(out, "logits", out)
    got = Graph(program)(ids, torch.arange(tokens).repeat(batch, 1))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    other = Graph(program)(ids.roll(1, dims=1), torch.arange(tokens).repeat(batch, 1))
    assert tokens == 1 or float((other - want).abs().max()) > 0.1  # these logits do say something


@pytest.fixture(scope="module")
def mixtral() -> tuple[nn.Module, Program, dict[str, Any]]:
    """In training but for one module: the hardest state to hand back. With it, what its state was before."""
    model = tiny("Mixtral", **EXPERTS)
    model.train()
    model.model.layers[0].mlp.eval()
    before = state(model)
    return model, capture(model), before


def test_a_mixture_of_experts_is_captured(mixtral: tuple[nn.Module, Program, dict[str, Any]]) -> None:
    model, program, _ = mixtral
    verify(program)
    assert program.ops().count("ryzen.attention") == program.spec.layers == 1
    assert program.provenance["attention"] == "interface"
    training = {module: module.training for module in model.modules()}
    model.eval()
    for batch, tokens in ((3, 5), (1, 1), (2, 31)):
        same_logits(model, program, batch, tokens)
    for module, flag in training.items():
        module.training = flag


def test_the_model_is_handed_back_as_it_was(mixtral: tuple[nn.Module, Program, dict[str, Any]]) -> None:
    model, _, before = mixtral
    after = state(model)
    assert {key for key in before if before[key] != after[key]} == set()
    assert model.config._attn_implementation == "eager"
    assert model.training and not model.model.layers[0].mlp.training


def test_no_weight_is_copied(mixtral: tuple[nn.Module, Program, dict[str, Any]]) -> None:
    model, program, _ = mixtral
    own = {p.data_ptr() for p in model.parameters()}
    assert own <= {t.data_ptr() for t in program.weights.values()}
    foreign = [t for t in program.weights.values() if t.data_ptr() not in own]
    assert sum(t.numel() for t in foreign) < 256  # rotary frequencies and numbers
    assert program.spec.parameters == sum(p.numel() for p in model.parameters())


class Choosy(transformers.LlamaForCausalLM):
    """Honours the interface, and cannot be traced."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> Any:
        out = super().forward(input_ids, position_ids=position_ids, use_cache=use_cache)
        if out.logits.sum() > 0:
            return out
        return out.logits * 2


class Broken(transformers.LlamaForCausalLM):
    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> Any:
        raise ValueError("the first line\n   and the second")


@pytest.mark.parametrize(
    ("kind", "reason"), [(Choosy, "data-dependent"), (Broken, "Broken: the first line and the second")]
)
def test_a_failed_capture_hands_the_model_back_too(kind: type[nn.Module], reason: str) -> None:
    model = kind._from_config(transformers.LlamaConfig(**ONE), attn_implementation="sdpa").train()
    model.model.norm.eval()
    before = state(model)
    with pytest.raises(CaptureError, match=f"^torch.export could not trace {kind.__name__}: ") as caught:
        capture(model)
    assert "\n" not in str(caught.value) and len(caught.value.message) < 400
    assert reason in caught.value.message
    assert caught.value.__cause__ is not None and "data-dependent control flow" in caught.value.hint
    assert state(model) == before


def test_a_chunked_mask_is_refused() -> None:
    model = tiny("Llama4Text", attention_chunk_size=8, head_dim=8, layer_types=["chunked_attention"],
                 num_experts_per_tok=1, num_local_experts=2, intermediate_size_mlp=48)  # fmt: skip
    before = state(model)
    with pytest.raises(UnsupportedError, match="the attention mask is neither causal, windowed nor full"):
        capture(model)
    assert state(model) == before


# --- modules of one's own ---------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """``function(rows)`` of an embedding (B, T, 8)."""

    def __init__(self, function: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.table, self.function = nn.Embedding(11, 8), function

    def forward(self, input_ids: Tensor) -> Any:
        return self.function(self.table(input_ids))


@pytest.fixture(scope="module")
def nano() -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    model = NanoDecoder(width=32, heads=2, layers=1).eval()
    randomize(model)
    return model, capture(model)


def test_a_plain_module_without_a_config(nano: tuple[nn.Module, Program]) -> None:
    model, program = nano
    verify(program)
    assert program.spec.context == CONTEXT  # its block_size
    assert [n.name for n in program.inputs] == ["input_ids", "position_ids"]
    assert is_call(program.outputs[0], torch.ops.aten.linear)
    same_logits(model, program, 3, 7)
    same_logits(model, program, 1, 1)


def test_a_plain_module_with_a_config() -> None:
    model = Plain()
    model.config = transformers.LlamaConfig(**ONE)
    program = capture(model)
    assert (program.spec.context, program.spec.architecture) == (CONTEXT, "llama")
    assert model.config._attn_implementation is None
    assert capture(model, context=31).spec.context == 31


def test_results_of_other_shapes_are_read() -> None:
    program = capture(Plain(lambda x: (x, x.sum())), context=31)
    assert len(program.outputs) == 1 and program.spec.vocab == 8


@pytest.mark.parametrize("size", [None, 0, -3, 7.5, "128"])
def test_an_unknown_context_is_asked_for(size: object) -> None:
    model = Plain()
    model.block_size = size
    with pytest.raises(ConfigError, match="Plain does not say how many positions it has") as caught:
        capture(model)
    assert "context=N" in caught.value.hint


def test_a_context_longer_than_the_model_is_refused() -> None:
    model = Plain()
    model.block_size = 31
    with pytest.raises(ConfigError, match=r"context 32 exceeds the 31 positions of Plain \(block_size\)"):
        capture(model, context=32)


def test_half_precision_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"parameter table\.weight is torch\.bfloat16, expected torch\.float32"):
        capture(Plain().bfloat16(), context=31)


def test_what_cannot_be_traced_says_so_in_one_line() -> None:
    model = Plain(lambda x: x if x.sum() > 0 else -x).train()
    with pytest.raises(CaptureError, match=r"^torch\.export could not trace Plain: \S.*") as caught:
        capture(model, context=31)
    assert "\n" not in caught.value.message
    assert model.training


class NoTable(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids[:, :, None].float() * torch.ones(5)


NOT_DECODERS = {
    "no embedding": (NoTable, r"got an output of shape \(\w+, \w+, 5\) and no embedding"),
    "no logits": (lambda: Plain(lambda x: x.sum(-1)), r"got an output of shape \(\w+, \w+\)$"),
}


@pytest.mark.parametrize("case", NOT_DECODERS)
def test_what_is_no_decoder_is_refused(case: str) -> None:
    build, reason = NOT_DECODERS[case]
    with pytest.raises(CaptureError, match="does not look like a decoder: expected a token embedding and .*" + reason):
        capture(build(), context=31)


def test_a_private_operator_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"calls testing_capture\.twice\.default, expected ATen"):
        capture(Plain(twice), context=31)


@torch.library.custom_op("testing_capture::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)
