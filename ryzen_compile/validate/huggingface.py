"""Hugging Face's own eager forward behind the engine's interface: the baseline that every speed-up is a ratio to.

It is called as its ``generate`` calls it (a ``DynamicCache``, logits of the last positions only), with the model as the
caller prepared it: dtype, attention implementation and threads are the caller's. Only for measuring and comparing.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from ryzen_compile.errors import PromptError, UnsupportedError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import check_last
from ryzen_compile.runtime.storage import HOST
from ryzen_compile.spec import CacheSlot, ModelSpec


class HuggingFaceEager:
    """A transformers causal LM as an ``Engine`` of batch 1.

    Keys and values live in transformers' cache; the ``KVCache`` handed to ``step`` has no slots and only says how many
    tokens are held. A model whose forward takes no ``logits_to_keep`` returns the logits of every position.
    """

    name = "huggingface"
    storage = HOST
    prompt_from = 1

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.spec = read_spec(model)
        self.slots: tuple[CacheSlot, ...] = ()
        self.all_logits = "logits_to_keep" not in inspect.signature(model.forward).parameters
        self.verifies = True
        self._past = self._empty()
        self._ids = np.empty((1, 0), np.int64)  # what the cache holds, to rebuild it when it cannot be cut back

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that transformers' cache holds now."""
        held = [tensor for layer in self._past.layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.nbytes for tensor in held)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the model's parameters; one that is tied counts once."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    @torch.inference_mode()
    def step(self, tokens: np.ndarray, cache: KVCache, last: int = 1) -> np.ndarray:
        """Float32 logits ``(1, last, V)``, or ``(1, T, V)`` with ``all_logits``, after ``tokens`` ``(1, T)`` int64."""
        check_last(last, tokens, self.verifies)
        if tokens.shape[0] != 1:
            raise UnsupportedError(f"the Hugging Face baseline runs batch 1, got {tokens.shape[0]} rows")
        held = int(cache.lengths[0])
        if held != self._ids.shape[1]:
            self._go_back(held)
        logits = self._forward(tokens, last)
        self._ids = np.concatenate([self._ids, tokens], axis=1)
        return logits.float().cpu().numpy()

    def close(self) -> None:
        """Drop the cache; the model is the caller's."""
        self._past, self._ids = self._empty(), np.empty((1, 0), np.int64)

    def _forward(self, tokens: np.ndarray, last: int = 1) -> torch.Tensor:
        keep: dict[str, Any] = {} if self.all_logits else {"logits_to_keep": last}
        ids = torch.from_numpy(tokens).to(self.model.device)
        out = self.model(ids, past_key_values=self._past, use_cache=True, **keep)
        logits: torch.Tensor = out.logits
        return logits

    def _empty(self) -> DynamicCache:
        # With the config the layers get their windows, as in generate.
        return DynamicCache(config=self.model.config)

    def _go_back(self, held: int) -> None:
        had = self._ids.shape[1]
        if held > had:
            raise PromptError(f"the cache says {held} tokens are held, the Hugging Face baseline was given {had}")
        self._ids = self._ids[:, :held]
        if held:
            try:
                self._past.crop(held - had)  # negative: how many to drop
                return
            except (RuntimeError, ValueError):
                pass  # a window that has slid has lost its past: run the tokens again
        self._past = self._empty()
        if held:
            self._forward(self._ids)


def read_spec(model: PreTrainedModel) -> ModelSpec:
    """The numbers that the config gives under transformers' common names; a missing context counts as unlimited."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return ModelSpec(
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        context=getattr(config, "max_position_embeddings", None) or sys.maxsize,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        architecture=type(model).__name__,
    )
