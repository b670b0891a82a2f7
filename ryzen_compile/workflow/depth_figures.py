"""What is left of a run's model when its vectors are cut: as it came, along its principal axes, and trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ryzen_compile.train.config import TrainConfig

if TYPE_CHECKING:
    from ryzen_compile.train.component import Component
    from ryzen_compile.train.metrics import MetricsCollector
    from ryzen_compile.train.objective import Objective
    from ryzen_compile.train.plan import Rows
    from ryzen_compile.train.retention import Figures, Retention

EVENT = "untrained_depths"
UNTRAINED, TURNED, TRAINED = "untrained", "untrained_principal_axes", "trained"


def open_retention(
    config: TrainConfig, objective: Objective, components: Sequence[Component], rows: Rows
) -> Retention | None:
    """At the depths that are trained, or, of an encoder without any, of whole vectors; on the rows that every
    validation reads. None for a language model without depths."""
    from ryzen_compile.train.matryoshka import MatryoshkaComponent
    from ryzen_compile.train.retention import make_retention

    depths = [component.depths.dims for component in components if isinstance(component, MatryoshkaComponent)]
    if not depths and config.contrastive is None:
        return None
    dims = depths[0] if depths else (objective.channels,)
    limit = config.data.validation_tokens
    validation = rows.validation if limit is None else rows.validation[: max(1, limit // rows.length)]
    return make_retention(objective, dims, rows.train, validation, config.optimization.batch)


def record_untrained(retention: Retention | None, collector: MetricsCollector | None) -> None:
    """Before the first step, as an event: a run that is resumed finds it there."""
    if retention is not None and collector is not None:
        found = {UNTRAINED: retention.figures(), TURNED: retention.figures(retention.axes())}
        collector.event(0, EVENT, **found)


def depth_figures(retention: Retention | None, directory: Path) -> Mapping[str, Figures]:
    """Of the model as it is now, and what was recorded of it before its first step."""
    from ryzen_compile.train.metrics_report import records
    from ryzen_compile.train.metrics_schema import RECORDS_NAME, EventRecord

    if retention is None:
        return {}
    found: dict[str, Figures] = {}
    for _, record in records(directory / RECORDS_NAME):
        if isinstance(record, EventRecord) and record.event == EVENT:
            for name in (UNTRAINED, TURNED):
                figures: dict[str, dict[str, float]] = record.facts[name]  # type: ignore[assignment]
                found[name] = {int(dim): values for dim, values in figures.items()}
            break
    return found | {TRAINED: retention.figures()}
