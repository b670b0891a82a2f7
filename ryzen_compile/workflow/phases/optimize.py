"""Optimize: the model becomes an artifact, each pass's change to the graph is kept, and this machine is measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ryzen_compile.workflow.journal import write_file
from ryzen_compile.workflow.phase import ARTIFACT_NAME, CHANGES_NAME, Place
from ryzen_compile.workflow.phases.setup import (
    library_facts,
    machine_facts,
    model_digest,
    model_directory,
    random_seed,
    text_digest,
)

if TYPE_CHECKING:
    from ryzen_compile.config import Recipe
    from ryzen_compile.report import PassRecord


def inputs(place: Place) -> Mapping[str, Any]:
    """The model's files, and how they are exported; the machine counts where it is measured."""
    settings = place.config.optimize
    return {
        "model": model_digest(place),
        "shape": place.config.shape,
        "seed": random_seed(place),
        "settings": settings.model_dump(mode="json"),
        "calibration": text_digest(settings.calibration),
        "libraries": library_facts(),
        "machine": machine_facts() if settings.tune_seconds else None,
    }


def work(place: Place) -> tuple[str, ...]:
    """Raises what ``export`` and ``tune`` raise."""
    from ryzen_compile.api import export
    from ryzen_compile.graphs.change import ChangeRecorder

    settings = place.config.optimize
    recorder = ChangeRecorder()
    place.say("exporting")
    began = None if place.timeline is None else place.timeline.now()
    report = export(
        source(place),
        place.artifact,
        recipe(place),
        calibration=settings.calibration,
        verify=settings.verify if settings.verify is not None else place.config.shape is None,
        force=True,
        progress=_teller(place),
        observe=recorder,
    )
    if place.timeline is not None:
        spans = ((one.name, one.seconds, {"status": one.status, "places": len(one.hits)}) for one in report.records)
        place.timeline.in_turn(spans, track="passes, end to end without what was between them", start=began)
    changes = [change.model_dump(mode="json") for change in recorder.changes]
    write_file(place.directory / CHANGES_NAME, json.dumps(changes) + "\n")
    if settings.tune_seconds:
        _tune(place, settings.tune_seconds)
    return (ARTIFACT_NAME, CHANGES_NAME)


def source(place: Place) -> Any:
    """What is exported: a directory, or the random model of a shape."""
    if place.config.shape is not None:
        from ryzen_compile.shapes import random_model

        return random_model(place.config.shape, seed=place.config.seed)
    return model_directory(place)


def recipe(place: Place) -> Recipe:
    """What the settings say, over what the model or the default says."""
    from ryzen_compile.api import recipe_for
    from ryzen_compile.config import DEFAULT_RECIPE, find_recipe

    settings = place.config.optimize
    directory = model_directory(place)
    base: str | Recipe = settings.recipe or (DEFAULT_RECIPE if directory is None else recipe_for(directory))
    found = settings.over(base)
    # Random weights gain nothing from a search, and their format is what decides the speed.
    return find_recipe(found, method="rtn") if place.config.shape is not None and found.weights else found


def _tune(place: Place, seconds: float) -> None:
    from ryzen_compile.backends.onnxruntime.tune import tune
    from ryzen_compile.manifest import update_tuning

    place.say("measuring threads and steps")
    tuning = tune(place.artifact, budget_seconds=seconds, digests=False)
    update_tuning(place.artifact, tuning.key, tuning.to_json())


def _teller(place: Place) -> Any:
    def tell(event: str | PassRecord) -> None:
        place.say(event if isinstance(event, str) else f"pass {event.name}: {event.status}, {len(event.hits)} places")

    return tell
