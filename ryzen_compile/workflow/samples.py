"""What a model in training writes: greedy continuations of a few prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ryzen_compile.train.metrics import MetricsCollector


class Samples:
    """``samples(step)`` records ``tokens`` new tokens for each of ``prompts``. Nothing is drawn, and the model is left
    in the mode that it was in. No more than ``context`` tokens are read and written together."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        collector: MetricsCollector,
        prompts: Sequence[str],
        tokens: int,
        context: int,
    ) -> None:
        self._model, self._tokenizer, self._collector = model, tokenizer, collector
        self._prompts, self._tokens, self._context = tuple(prompts), tokens, context

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        training = self._model.training
        self._model.eval()
        try:
            for prompt in self._prompts:
                self._collector.sample(step, prompt, self._continued(prompt))
        finally:
            self._model.train(training)

    def _continued(self, prompt: str) -> str:
        found = self._tokenizer(prompt)["input_ids"] or [self._tokenizer.eos_token_id]
        tokens = min(self._tokens, self._context - 1)
        ids = torch.tensor([found[-(self._context - tokens) :]], device=self._model.device)
        found = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=self._tokenizer.eos_token_id,
        )
        return str(self._tokenizer.decode(found[0, ids.shape[1] :]))
