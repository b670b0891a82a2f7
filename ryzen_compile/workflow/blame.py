"""Who lost the accuracy that is missing: the work is done once more, step by step, until something is out of bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ryzen_compile.api import load, read_source, rewrite
from ryzen_compile.calibration import read_calibration
from ryzen_compile.config import Recipe
from ryzen_compile.errors import ArtifactError, ParityError, PassError, UnsupportedError
from ryzen_compile.validate.optimization.measurements import Measurements
from ryzen_compile.validate.quality import EngineScorer, score
from ryzen_compile.workflow.artifact_recipe import recipe_of

if TYPE_CHECKING:
    from ryzen_compile.report import Report

WINDOWS = 2  # of the text, on which operators are compared
APART = 1e-2  # mean KL between native and stock operators that rounding does not explain, nats per token


def blame(found: Measurements) -> str:
    """The first suspect, in words: a pass by its name with what it did, native operators, or the files.

    First the passes of the artifact's recipe run once more on the model under the parity gate; then native operators
    are held to stock ones on the same files; what is left is the artifact itself, or a recipe that keeps too little.
    """
    try:
        recipe = recipe_of(found.subject.artifact)
    except ArtifactError as error:
        return f"unknown: {error.message}"
    suspect, lossy = _pass(found, recipe)
    if suspect:
        return suspect
    apart = _operators(found)
    if apart > APART:
        return f"native operators: their predictions are {apart:.3g} nats per token from those of stock ones"
    if lossy:
        return f"{lossy}, within its budget: the recipe keeps too little of this model"
    return "the artifact's files or their lowering: every pass holds on this model, and operators agree"


def _pass(found: Measurements, recipe: Recipe) -> tuple[str, str]:
    """The pass that leaves its bounds, and the lossy one that lost the most; empty where there is none.

    One that the artifact's own export rolled back has left nothing in it, and is not suspected.
    """
    source = read_source(found.subject.path or found.subject.baseline)
    calibration = read_calibration(source.tokenizer, recipe)
    try:
        _, report = rewrite(source.model, recipe, calibration=calibration, given=source.quantized, tables=source.tables)
    except (ParityError, PassError, UnsupportedError) as error:  # of a pass without which nothing runs: it is named
        return error.message, ""
    return _rolled_back(report, _applied(found)), _loses_most(report)


def _applied(found: Measurements) -> set[str]:
    """The passes that the artifact's own report says were applied."""
    report = found.subject.model.report
    records = report.get("records", ()) if isinstance(report, Mapping) else ()
    return {record["name"] for record in records if record["status"] == "applied"}


def _rolled_back(report: Report, applied: set[str]) -> str:
    lost = [record for record in report.records if record.status == "rolled back" and record.name in applied]
    return f"pass {lost[0].name}: {lost[0].detail}" if lost else ""


def _loses_most(report: Report) -> str:
    lossy = [record for record in report.records if record.kl is not None]
    if not lossy:
        return ""
    most = max(lossy, key=lambda record: record.kl or 0.0)
    return f"pass {most.name}: mean KL {most.kl:.3g} nats per token"


def _operators(found: Measurements) -> float:
    """Mean KL between native operators and stock ones on the same files."""
    windows = np.ascontiguousarray(found.text.windows[:WINDOWS])
    with load(found.subject.artifact, task="generate", native=False, digests=False) as stock:
        return score(EngineScorer(found.subject.model.engine), EngineScorer(stock.engine), windows).kl.value
