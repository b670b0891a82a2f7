"""Hugging Face transformers: its forward with its cache, greedy, eager or under ``torch.compile``.

Options: ``dtype`` (float32, bfloat16) and ``compile``. The loop is bare (forward and argmax, last logits only), which
is kinder to it than its ``generate``. Compiled, the cache is transformers' static one with room for just these tokens,
and there is one graph for the prompt and one for a token; both exist before anything is timed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from peer_engines.child import Engine, Request, serve
from peer_engines.weights import read_parameters

ITEMSIZE = {"float32": 4, "bfloat16": 2}


def prepare(request: Request) -> dict[str, Any]:
    parameters = read_parameters(Path(request.model))
    dtype = request.options["dtype"]
    return {"bytes_per_token": parameters.per_token * ITEMSIZE[dtype], "format": dtype}


class HuggingFace:
    def __init__(self, request: Request) -> None:
        # Before torch is imported: a later round finds the kernels of the first.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(request.path) / "inductor"))
        import torch
        import transformers
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(request.threads)
        dtype = getattr(torch, request.options["dtype"])
        self.model = AutoModelForCausalLM.from_pretrained(request.model, dtype=dtype).eval()
        self.compiled = bool(request.options.get("compile"))
        self.forward = torch.compile(self.model, dynamic=False) if self.compiled else self.model
        self.room = len(request.prompt) + request.new
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self.note = "static cache, bare loop" if self.compiled else "sdpa, dynamic cache, bare loop"
        self.static = None

    def run(self, prompt: list[int], new: int) -> tuple[float, float]:
        import torch

        with torch.inference_mode():
            cache = self._cache()
            ids = torch.tensor([prompt])
            started = time.perf_counter()
            token = self._step(ids, cache, 0)
            prefilled = time.perf_counter()
            for step in range(new):
                token = self._step(token, cache, len(prompt) + step)
            return prefilled - started, time.perf_counter() - prefilled

    def _cache(self) -> Any:
        from transformers import DynamicCache, StaticCache

        if not self.compiled:
            return DynamicCache(config=self.model.config)
        if self.static is None:
            config = self.model.config
            self.static = StaticCache(config=config, max_cache_len=self.room)
            # Allocated now: the graph of a prompt that allocates is not the graph of the prompts after it.
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            self.static.early_initialization(1, config.num_key_value_heads, size, self.model.dtype, self.model.device)
        self.static.reset()
        return self.static

    def _step(self, ids: Any, cache: Any, held: int) -> Any:
        import torch

        positions = torch.arange(held, held + ids.shape[1])[None]
        out = self.forward(ids, past_key_values=cache, position_ids=positions, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1)


def open_engine(request: Request) -> Engine:
    return HuggingFace(request)


if __name__ == "__main__":
    serve(prepare, open_engine)
