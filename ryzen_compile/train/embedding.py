"""What compressing a table asks of the model before the pass can run: how much each row matters, and training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ryzen_compile.calibration import Calibration
from ryzen_compile.config import EmbeddingCompression
from ryzen_compile.errors import ConfigError
from ryzen_compile.numerics.codebook import CodebookTensor
from ryzen_compile.passes.compress_embedding import EmbeddingCompressor, Lookup, find_lookups
from ryzen_compile.program import Program
from ryzen_compile.train.dkm_finetune import FinetuneSettings, dkm_finetune
from ryzen_compile.train.row_fisher import row_fisher

FISHER_WINDOWS = 64
Say = Callable[[str], None]


def prepare_compressor(
    model: nn.Module,
    program: Program,
    settings: EmbeddingCompression,
    calibration: Calibration | None,
    progress: Say | None = None,
) -> EmbeddingCompressor:
    """The pass for ``program``, as captured from ``model``, with tables that were trained already where that is asked.

    The model is left as it was. Raises ``ConfigError`` for a method that reads text where there is none.
    """
    text = None if calibration is None or calibration.long is None else calibration.long[:, : program.spec.context]
    if text is None and (settings.method == "dkm" or settings.weighting == "fisher"):
        asked = "method 'dkm'" if settings.method == "dkm" else "weighting 'fisher'"
        raise ConfigError(
            f"embedding {asked} reads text, and the model came without a tokenizer", hint="use method 'kmeans'"
        )
    lookups, _ = find_lookups(program)
    say = progress or _silent
    weights = None
    if text is not None and settings.weighting == "fisher" and lookups:
        say("weighing the table's rows")
        weights = row_fisher(model, lookups[0].name, text[:FISHER_WINDOWS])
    special = () if calibration is None else calibration.special
    compressor = EmbeddingCompressor(
        settings, text=text, row_weights=weights, special=special, progress=_by_tenths(say, "compressing the table")
    )
    if text is None or settings.method == "kmeans":
        return compressor
    given = {lookup.name: _trained(model, lookup, compressor, settings, text, say) for lookup in lookups}
    return EmbeddingCompressor(settings, text=text, row_weights=weights, given=given)


def _trained(
    model: nn.Module,
    lookup: Lookup,
    compressor: EmbeddingCompressor,
    settings: EmbeddingCompression,
    text: Tensor,
    say: Say,
) -> CodebookTensor:
    with torch.no_grad():
        start = compressor.compress(dict(model.named_parameters(remove_duplicate=False))[lookup.name].detach())
    result = dkm_finetune(
        model, lookup.name, start, text, FinetuneSettings(settings.steps), _by_tenths(say, "training the table")
    )
    say(f"trained the table: mean KL {result.kl_before:.3g} -> {result.kl_after:.3g} nats per token on other text")
    return result.table


def _silent(step: str) -> None:
    """Nobody listens."""


def _by_tenths(say: Say, what: str) -> Callable[[float], None]:
    """A listener for shares done that says ``what`` when another tenth is."""
    told = -1

    def hear(share: float) -> None:
        nonlocal told
        if int(10 * share) > told:
            told = int(10 * share)
            say(f"{what}: {10 * told} %")

    return hear
