"""Tiny random decoders of many architectures, and what is expected to be found in each.

Weights are drawn wide enough that attention, rotation and windows decide the tokens: a model whose logits hardly move
would agree with a broken rewrite.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

LAYERS, VOCAB, CONTEXT, WINDOW = 2, 99, 160, 8
MIXED = ["sliding_attention", "full_attention"]
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Case:
    """``hits`` are the expected numbers of rewritten places; a fusion that stops matching fails a test."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    hits: dict[str, int] = field(default_factory=dict)
    kv_heads: int = 2
    head_dim: int = 16


def _hits(rotary: int, norm: int, add: int, merge: int, linear: int) -> dict[str, int]:
    return {
        "fuse_rotary": rotary,
        "fuse_norm": norm,
        "fuse_add_norm": add,
        "merge_linear": merge,
        "fuse_linear": linear,
        "insert_kv_cache": LAYERS,
        "prune_logits": 1,
    }


CASES = (
    Case("llama", hits=_hits(4, 5, 4, 4, 2)),
    Case("mixtral", hits=_hits(4, 5, 4, 2, 0)),
    Case("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
                     "layer_types": MIXED}, _hits(4, 5, 4, 2, 0)),
    Case("falcon", {"ffn_hidden_size": 96}, _hits(4, 3, 2, 0, 2) | {"fuse_attention": LAYERS}, kv_heads=1),
    Case("gptj", {"n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT, "rotary_dim": 8},
         _hits(4, 3, 2, 2, 2) | {"fuse_attention": LAYERS}, kv_heads=4),
    Case("mistral", {"sliding_window": WINDOW}, _hits(4, 5, 4, 4, 2)),
    Case("qwen2", hits=_hits(4, 5, 4, 4, 2)),
    Case("qwen3", {"head_dim": 16}, _hits(4, 9, 4, 4, 2)),
    Case("gemma", {"head_dim": 16}, _hits(4, 5, 4, 4, 2)),
    Case("gemma2", {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}, _hits(4, 9, 4, 4, 2)),
    Case("gemma3_text", {"head_dim": 16, "sliding_window": WINDOW, "layer_types": MIXED},
         _hits(4, 13, 4, 4, 2)),
    Case("phi", {"partial_rotary_factor": 0.5}, _hits(4, 3, 2, 2, 2)),
    Case("phi3", {"sliding_window": WINDOW}, _hits(4, 5, 4, 0, 2)),
    Case("gpt2", {"n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT, "n_inner": 96},
         _hits(0, 5, 5, 0, 2), kv_heads=4),
    Case("gpt_neox", {"rotary_pct": 0.25}, _hits(4, 5, 2, 0, 2), kv_heads=4),
    Case("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}, _hits(0, 5, 1, 2, 2), kv_heads=4),
    Case("granite", {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 4.0,
                     "embedding_multiplier": 3.0}, _hits(4, 5, 4, 4, 2)),
    Case("olmo2", hits=_hits(4, 9, 1, 4, 2)),
    Case("smollm3", {"no_rope_layers": [1, 0]}, _hits(2, 5, 4, 4, 2)),
    Case("stablelm", {"partial_rotary_factor": 0.25}, _hits(4, 5, 4, 4, 2)),
    Case("starcoder2", {"sliding_window": WINDOW}, _hits(4, 5, 4, 2, 2)),
    Case("cohere2", {"head_dim": 16, "sliding_window": WINDOW, "layer_types": MIXED},
         _hits(2, 3, 2, 4, 2)),
    Case("glm4", {"head_dim": 16, "partial_rotary_factor": 0.5}, _hits(4, 9, 4, 2, 2)),
    Case("exaone4", {"head_dim": 16, "sliding_window": WINDOW, "sliding_window_pattern": 2,
                     "layer_types": MIXED}, _hits(2, 9, 1, 4, 2)),
)  # fmt: skip


def build(case: Case, *, seed: int = 0) -> nn.Module:
    """The model of ``case`` with wide random weights, in float32, generating without an end token."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(case.name, **{**BASE, **case.settings})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    randomize(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Matrices wide, vectors around what they were: norms stay near one, biases leave zero."""
    seen = set()
    for parameter in model.parameters():
        if parameter.data_ptr() in seen:
            continue
        seen.add(parameter.data_ptr())
        if parameter.ndim >= 2:
            parameter.normal_(std=2.0 / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))


class NanoDecoder(nn.Module):
    """A decoder as people write it: learned positions counted from zero, one fused projection, SDPA, tied head."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = LAYERS, spelled_out: bool = False) -> None:
        super().__init__()
        self.block_size = CONTEXT
        self.wte = nn.Embedding(VOCAB, width)
        self.wpe = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(NanoBlock(width, heads, spelled_out) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int, spelled_out: bool) -> None:
        super().__init__()
        self.heads, self.spelled_out = heads, spelled_out
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("mask", torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).split(width, dim=2)
        )
        if self.spelled_out:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / (width // self.heads) ** 0.5)
            scores = scores.masked_fill(self.mask[:, :, :tokens, :tokens] == 0, float("-inf"))
            y = torch.softmax(scores, dim=-1) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(batch, tokens, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm_2(x))))
