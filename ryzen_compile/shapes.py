"""Bare shapes: well-known models with random weights, for measuring without a download."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from ryzen_compile.errors import UsageError

SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def random_model(shape: str, *, seed: int = 0) -> Any:
    """A float32 transformers model of the shape called ``shape``; raises ``UsageError`` that names the nearest."""
    if shape not in SHAPES:
        near = get_close_matches(shape, SHAPES, n=1)
        raise UsageError(
            f"there is no shape {shape!r}",
            hint=f"did you mean {near[0]!r}?" if near else f"shapes are {', '.join(SHAPES)}",
        )
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(SHAPES[shape])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
