"""Training: a run of its own configuration, which goes on where it was interrupted."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ryzen_compile.train.config import TrainConfig, read_config
from ryzen_compile.workflow.digests import digest_path
from ryzen_compile.workflow.phase import TRAINING_NAME, Place
from ryzen_compile.workflow.phases.setup import library_facts


def idle(place: Place) -> str:
    return "" if place.config.train is not None else "the workflow has no training"


def inputs(place: Place) -> Mapping[str, Any]:
    """All of the run's settings, and the files that they name."""
    if place.config.train is None:
        return {}
    config = _config(place)
    texts = [text.path for text in (config.data.train, config.data.validation) if text is not None]
    tokenizer = config.model.tokenizer if isinstance(config.model.tokenizer, str) else None
    teacher = None if config.passes.distill is None else config.passes.distill.teacher
    named = [config.model.path, tokenizer, teacher, *texts]
    digests = {str(name): digest_path(Path(name)) for name in named if name is not None}
    settings = config.model_dump(mode="json", exclude={"output"})  # where it goes is no part of what it is
    mode = place.config.train.mode
    return {"settings": settings, "mode": mode, "files": digests, "libraries": library_facts()}


def clear(place: Place) -> None:
    """A finished run is started anew; one that was interrupted, or has other settings, is never thrown away."""
    if place.config.train is not None:
        shutil.rmtree(place.directory / TRAINING_NAME / place.config.train.mode, ignore_errors=True)


def work(place: Place) -> tuple[str, ...]:
    """Raises what training raises."""
    from ryzen_compile.train.metrics_schema import REPORT_NAME
    from ryzen_compile.workflow.training import train

    settings = place.config.train
    if settings is None:
        return ()
    started = (place.directory / TRAINING_NAME / settings.mode).is_dir()
    place.say("training" + (", where it was interrupted" if started else ""))
    finished = train(_config(place), settings.mode, resume=started, watcher=place.watcher)
    place.say(f"trained {finished.result.steps} steps, validation loss {finished.result.validation.loss:.4f}")
    run = f"{TRAINING_NAME}/{settings.mode}"
    return (f"{run}/model", f"{run}/{REPORT_NAME}")


def _config(place: Place) -> TrainConfig:
    """The run's settings, with its output below the workflow's."""
    settings = place.config.train
    changes = () if settings is None else settings.changes
    path = "" if settings is None else settings.config
    config = read_config(path, changes)
    return config.model_copy(update={"output": str(place.directory / TRAINING_NAME)})
