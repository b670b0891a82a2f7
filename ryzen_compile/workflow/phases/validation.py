"""Validate: the artifact against the model that it was made from, check by check."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ryzen_compile.workflow.digests import digest_path
from ryzen_compile.workflow.journal import make_directory, write_file
from ryzen_compile.workflow.phase import Place
from ryzen_compile.workflow.phases.optimize import source
from ryzen_compile.workflow.phases.setup import (
    library_facts,
    machine_facts,
    model_digest,
    model_directory,
    random_seed,
    text_digest,
)
from ryzen_compile.workflow.report_schema import VALIDATION_NAME
from ryzen_compile.workflow.validation import Baseline, validate_artifact

SCRATCH_NAME = ".scratch"  # hidden, so that it is no part of what a workflow leaves


def inputs(place: Place) -> Mapping[str, Any]:
    """The artifact, its baseline, what is measured, on what and where."""
    settings = place.config.validation
    return {
        "artifact": digest_path(place.artifact),
        "model": model_digest(place),
        "shape": place.config.shape,
        "seed": random_seed(place),
        "settings": settings.model_dump(mode="json"),
        "text": text_digest(settings.text),
        "calibration": text_digest(place.config.optimize.calibration) if settings.compare else None,
        "draft": None if settings.draft is None else digest_path(Path(settings.draft)),
        "libraries": library_facts(),
        "machine": machine_facts(),
    }


def work(place: Place) -> tuple[str, ...]:
    """A missed threshold is a result, not an error."""
    directory = model_directory(place)
    baseline = Baseline(
        place.name,
        directory,
        None if directory is not None else source(place),
        random=place.config.shape is not None,
    )
    with _scratch(place.directory / SCRATCH_NAME) as scratch:
        report = validate_artifact(
            place.artifact,
            baseline,
            place.config.validation,
            command=f"{place.command} --from validate",
            calibration=place.config.optimize.calibration,
            scratch=scratch,
            say=place.say,
        )
    write_file(place.directory / VALIDATION_NAME, report.model_dump_json(indent=1) + "\n")
    return (VALIDATION_NAME,)


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    """An empty ``directory`` for the time of the block, also where a run that was killed left one with files."""
    shutil.rmtree(directory, ignore_errors=True)
    make_directory(directory)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
