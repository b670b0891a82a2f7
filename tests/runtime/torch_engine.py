"""A real tiny Llama behind the Engine protocol, recomputed in full at every step: the slow, obviously right engine.

The cache holds nothing but the token ids, in the key buffer of its only slot, so whatever the loop does to the cache
(chunks, row views, growth, forks) shows in the tokens. The protocol's conditions are asserted at every step.
"""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.storage import HOST
from ryzen_compile.spec import CacheSlot, ModelSpec

VOCAB, CONTEXT, PAD, BOS, EOS = 97, 64, 0, 1, 2
SLOT = CacheSlot(layer=0, kv_heads=1, head_dim=1, value_dim=1)


def spec(vocab: int = VOCAB, context: int = CONTEXT) -> ModelSpec:
    return ModelSpec(2, 4, 2, 8, 32, vocab, context, False, 0, "llama")


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Random, fp32, sharpened so that the best token is never a near-tie."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 97 tokens without merges: letters, pairs of letters, and the three bytes of a euro sign."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    euro = ["â", "Ĥ", "¬"]
    pairs = [first + second for first in "abcdefgh" for second in "stuvwxyz"]
    pieces = ["<pad>", "<s>", "</s>", *letters, *euro, "Ġ", *pairs][:VOCAB]
    backend = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


class TorchEngine:
    """``all_logits`` as asked; the output array is reused, as a backend with bound outputs would."""

    name = "torch"
    slots = (SLOT,)
    prompt_from = 1
    storage = HOST

    def __init__(self, model: LlamaForCausalLM, *, all_logits: bool = True) -> None:
        self.model, self.all_logits, self.spec = model, all_logits, spec()
        self.verifies = True
        self.steps: list[tuple[int, int]] = []
        self.closed = 0
        self._output: dict[tuple[int, int], np.ndarray] = {}

    def step(self, tokens: np.ndarray, cache: KVCache, last: int = 1) -> np.ndarray:
        batch, count = tokens.shape
        assert 1 <= last <= count
        assert tokens.dtype == np.int64 and tokens.flags.c_contiguous
        assert cache.batch == batch and cache.lengths.max() + count <= cache.capacity
        assert batch == 1 or count == 1 or not cache.lengths.any()
        self.steps.append((batch, count))
        result = self._output.setdefault((batch, count), np.empty((batch, count, VOCAB), np.float32))
        for row, length in enumerate(cache.lengths):
            history = cache.keys[0][row, 0, :, 0]
            history[length : length + count] = tokens[row]
            ids = torch.from_numpy(history[: length + count].astype(np.int64))[None]
            with torch.no_grad():
                result[row] = self.model(ids).logits[0, -count:].numpy()
        return result if self.all_logits else result[:, -last:]

    def close(self) -> None:
        self.closed += 1


class TableEngine:
    """Logits read off a table: row ``table[last token]``. For exact distributions and for faults."""

    name = "table"
    slots = (SLOT,)
    prompt_from = 1
    storage = HOST
    all_logits = False
    verifies = True

    def __init__(self, table: np.ndarray, context: int = CONTEXT) -> None:
        self.table = table.astype(np.float32)
        self.spec = spec(vocab=table.shape[1], context=context)

    def step(self, tokens: np.ndarray, cache: KVCache, last: int = 1) -> np.ndarray:
        return self.table[tokens[:, -last:]]

    def close(self) -> None:
        pass
