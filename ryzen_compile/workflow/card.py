"""The model card of a training run: what was trained, on what, how, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ryzen_compile.manifest import shown

if TYPE_CHECKING:
    from ryzen_compile.train.config import Mode, TextSource, TrainConfig
    from ryzen_compile.train.documents import Corpus
    from ryzen_compile.train.loop import TrainingResult
    from ryzen_compile.train.plan import Rows
    from ryzen_compile.train.retention import Figures


def model_card(
    config: TrainConfig,
    mode: Mode,
    result: TrainingResult,
    model: Any,
    corpus: Corpus,
    rows: Rows,
    depths: Mapping[str, Figures],
) -> str:
    """Markdown with Hugging Face's metadata in front. Every number is the run's own."""
    tokens = len(rows.train) * rows.length
    one, many = ("token", "tokens") if config.contrastive is None else ("pair", "pairs")
    facts = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "architecture": model.config.model_type,
        "trained on": f"{result.tokens:,} {many}, {result.tokens / tokens:.2f} passes over {tokens:,} {many} in "
        f"{len(corpus.train):,} documents of {_source(config.data.train)}",
        "context while training": f"{config.data.length} tokens",
        "held-out loss": f"**{result.validation.loss:.4f} nats per {one}** over "
        f"{len(rows.validation) * rows.length:,} {many} in {len(corpus.validation)} documents, float32; accuracy "
        f"{result.validation.accuracy:.1%}",
        "held-out documents": ", ".join(f"`{name}`" for name in _names(corpus)),
        "loss of the last step": f"{result.train_loss:.4f} nats per {one}",
        "mode": f"{mode}, {result.tokens_per_second:,.0f} {many} per second (median of a step), "
        f"{result.seconds / 60:.0f} minutes",
        "corpus SHA-256": f"`{corpus.digest}`",
    }
    if config.passes.distill is not None:
        facts["agreement with its teacher"] = (
            f"{result.validation.agreement:.1%} of held-out tokens have the same first guess as "
            f"`{Path(config.passes.distill.teacher).name}`'s"
        )
    settings = _portable(config.model_dump(mode="json", exclude_unset=True))
    lines = [
        "---",
        f"library_name: {'transformers' if config.contrastive is None else 'sentence-transformers'}",
        f"tags: [{model.config.model_type}, ryzen_compile]",
        "---",
        f"# {Path(config.output).name}",
        "",
        "Trained by `ryzen-compile train` with the settings below.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
        *_depths(depths),
        "```yaml",
        yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _depths(depths: Mapping[str, Figures]) -> list[str]:
    """A table of what is left of vectors cut to their first channels."""
    lines: list[str] = []
    for name, figures in depths.items():
        names = list(next(iter(figures.values())))
        if not lines:
            lines = [f"| first channels, held out | | {' | '.join(names)} |", f"|{'---|' * (len(names) + 2)}"]
        lines += [
            f"| {dim} | {name.replace('_', ' ')} | {' | '.join(f'{values[n]:.4f}' for n in names)} |"
            for dim, values in figures.items()
        ]
    return [*lines, ""] if lines else []


def _portable(settings: Any) -> Any:
    """Without the places of this machine: of absolute paths their last part."""
    if isinstance(settings, dict):
        return {name: _portable(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [_portable(value) for value in settings]
    absolute = isinstance(settings, str) and (Path(settings).is_absolute() or settings.startswith("~"))
    return Path(settings).name if absolute else settings


def _source(source: TextSource) -> str:
    if source.dataset is not None:
        return f"the dataset {shown(source.dataset)}" + (f" ({source.subset})" if source.subset else "")
    return shown(Path(str(source.path)).name)


def _names(corpus: Corpus) -> list[str]:
    names = [document.name for document in corpus.validation]
    return names if len(names) <= 20 else [*names[:20], f"and {len(names) - 20} more"]
