"""Tests: the integration suite, run here and now; its results are those that were seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ryzen_compile.workflow.digests import digest_path
from ryzen_compile.workflow.journal import write_file
from ryzen_compile.workflow.phase import Place
from ryzen_compile.workflow.phases.setup import library_facts, machine_facts
from ryzen_compile.workflow.report_schema import TESTS_NAME
from ryzen_compile.workflow.suite import run_suite


def idle(place: Place) -> str:
    return "" if place.config.tests is not None else "the workflow has no tests"


def inputs(place: Place) -> Mapping[str, Any]:
    """The tests themselves, and where they run."""
    settings = place.config.tests
    if settings is None:
        return {}
    return {
        "settings": settings.model_dump(mode="json"),
        "files": {path: digest_path(Path(path)) for path in (*settings.paths, *settings.inputs)},
        "libraries": library_facts(),
        "machine": machine_facts(),
    }


def work(place: Place) -> tuple[str, ...]:
    """A suite that fails is a result, not an error."""
    settings = place.config.tests
    if settings is None:
        return ()

    def tell(name: str, status: str) -> None:
        place.say(f"{status:<8}{name}")

    report = run_suite(
        [Path(path) for path in settings.paths],
        arguments=settings.arguments,
        timeout=settings.timeout,
        progress=tell,
    )
    write_file(place.directory / TESTS_NAME, report.model_dump_json(indent=1) + "\n")
    return (TESTS_NAME,)
