"""What compressing a table asks of the model before the pass can run: how much each row matters, and training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor, nn

from ryzen_compile.calibration import Calibration
from ryzen_compile.config import EmbeddingCompression
from ryzen_compile.errors import ConfigError
from ryzen_compile.numerics.codebook import CodebookTensor
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.compress_embedding import EmbeddingCompressor, find_lookups
from ryzen_compile.program import Program
from ryzen_compile.train.dkm_finetune import FinetuneResult, FinetuneSettings, dkm_finetune
from ryzen_compile.train.lookup import find_table
from ryzen_compile.train.row_fisher import row_fisher

FISHER_WINDOWS = 64
Say = Callable[[str], None]


def prepare_compressor(
    model: nn.Module,
    program: Program,
    settings: EmbeddingCompression,
    calibration: Calibration | None,
    progress: Say | None = None,
    *,
    trained: Mapping[str, CodebookTensor] = MappingProxyType({}),
) -> EmbeddingCompressor:
    """The pass for ``program``, as captured from ``model``, with tables that were trained already where that is asked.

    ``trained`` are tables, by parameter, that came with the model: they are taken as they are, whatever the settings
    would have made of the weights behind them. The model is left as it was. Raises ``ConfigError`` for a method that
    reads text where there is none.
    """
    text = None if calibration is None or calibration.long is None else calibration.long[:, : program.spec.context]
    if text is None and settings.reads_text:
        raise ConfigError(
            f"method {settings.method!r} with weighting {settings.weighting!r} of the embedding reads text, got none",
            hint="read_calibration with this recipe gives it",
        )
    say = progress or _silent
    if trained:
        return EmbeddingCompressor(settings, given=trained, notes=dict.fromkeys(trained, "as it was trained"))
    special = () if calibration is None else calibration.special
    if text is None or not settings.reads_text:
        hear = _by_tenths(say, "compressing the table")
        return EmbeddingCompressor(settings, text=text, special=special, progress=hear)
    # Some models reshape their ids first: canonicalize removes that.
    names = [lookup.name for lookup in find_lookups(Canonicalize().run(program).program)[0]]
    weights: dict[str, Tensor] = {}
    if settings.weighting == "fisher":
        say("weighing the table's rows")
        weights = {name: row_fisher(model, name, text[:FISHER_WINDOWS]) for name in names}
    given: dict[str, CodebookTensor] = {}
    notes: dict[str, str] = {}
    if settings.method == "dkm":
        for name in names:
            compressor = EmbeddingCompressor(
                settings, text=text, special=special, progress=_by_tenths(say, f"compressing {name}")
            )
            start = compressor.compress(find_table(model, name).detach(), weights.get(name))
            wanted = FinetuneSettings(settings.steps)
            result = dkm_finetune(model, name, start, text, wanted, _by_tenths(say, f"training {name}"))
            given[name], notes[name] = result.table, _outcome(result, settings.steps)
    return EmbeddingCompressor(settings, text=text, special=special, row_weights=weights, given=given, notes=notes)


def _outcome(result: FinetuneResult, steps: int) -> str:
    """What training brought, for the record."""
    moved = f"mean KL {result.kl_before:.3g} -> {result.kl_after:.3g} nats per token on text not trained on"
    if result.kl_after < result.kl_before:
        return f"trained for {steps} steps, {moved}"
    return f"trained for {steps} steps, which did not help ({moved}): as k-means left it"


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
