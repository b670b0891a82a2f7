"""Setup: is this machine able, and is the model there? Nothing that takes minutes begins before both are known."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ryzen_compile.encoder_source import task_of_directory
from ryzen_compile.errors import ConfigError, ResourceError, UnsupportedError
from ryzen_compile.manifest import read_manifest
from ryzen_compile.text import BUILTIN, read_text
from ryzen_compile.validate.checks import check_isa, check_memory, check_onnxruntime, check_versions
from ryzen_compile.validate.machine import cpu_key, read_machine, read_versions
from ryzen_compile.validate.probe import probe
from ryzen_compile.workflow.digests import digest_path
from ryzen_compile.workflow.journal import write_file
from ryzen_compile.workflow.phase import SETUP_NAME, Place

SOME_CHARACTERS = 1 << 16  # of a text, to see that it is one


def inputs(place: Place) -> Mapping[str, Any]:
    """The machine with what runs on it, and the names of what the settings refer to."""
    return {
        "machine": machine_facts(),
        "libraries": library_facts(),
        "model": place.config.model,
        "shape": place.config.shape,
        "texts": _texts(place),
        "draft": place.config.validation.draft,
    }


def library_facts() -> dict[str, str | None]:
    """Versions of what an artifact is made with, and the language's, whose documentation is the built-in text."""
    return {**read_versions(), "python": platform.python_version()}


def machine_facts() -> dict[str, str | None]:
    """What speed follows from beside an artifact: the machine, and our own operators for it."""
    from ryzen_compile.backends.onnxruntime.native import library

    operators = library()
    return {
        "machine": cpu_key(read_machine()),
        "operators": None if operators is None else digest_path(operators),
    }


def work(place: Place) -> tuple[str, ...]:
    """Writes down machine and checks. Raises ``ResourceError`` for a machine that cannot, and what looking up a model,
    texts and a draft model raises."""
    place.say("machine and libraries")
    machine = read_machine()
    checks = (check_isa(machine), check_memory(machine), check_versions(), check_onnxruntime(probe("onnxruntime")))
    if failing := [check for check in checks if check.status == "fail"]:
        raise ResourceError(f"{failing[0].name}: {failing[0].detail}", hint=failing[0].fix)
    _require_libraries(place)
    facts = {
        "machine": asdict(machine),
        "key": cpu_key(machine),
        "checks": [asdict(check) for check in checks],
        "model": _model(place),
    }
    for text in _texts(place):
        read_text(text, characters=SOME_CHARACTERS)
    if place.config.validation.draft is not None:
        read_manifest(Path(place.config.validation.draft))
    write_file(place.directory / SETUP_NAME, json.dumps(facts, indent=1) + "\n")
    return (SETUP_NAME,)


def _require_libraries(place: Place) -> None:
    """What a later phase needs is missed now, not after hours. Raises ``UnsupportedError``."""
    needed = {"jinja2": "report", "matplotlib": "report"}
    needed |= {"accelerate": "train"} if place.config.train is not None else {}
    needed |= {"pytest": "test"} if place.config.tests is not None else {}
    for library, extra in needed.items():
        if find_spec(library) is None:
            raise UnsupportedError(
                f"this workflow needs the library {library}", hint=f"pip install 'ryzen-compile[{extra}]'"
            )


def model_directory(place: Place) -> Path | None:
    """Where the model's files are: what was trained, what setup found, or None for a bare shape."""
    if place.trained is not None:
        return place.trained
    if place.config.model is None:
        return None
    from ryzen_compile.source import resolve

    return resolve(place.config.model)


def model_digest(place: Place) -> str | None:
    """Of the model's files."""
    directory = model_directory(place)
    return None if directory is None else digest_path(directory)


def text_digest(text: str) -> str | None:
    """Of a text by its path; the built-in one is the language's."""
    return None if text == BUILTIN else digest_path(Path(text))


def random_seed(place: Place) -> int | None:
    """Of a bare shape's weights; nothing else is drawn."""
    return None if place.config.shape is None else place.config.seed


def _texts(place: Place) -> list[str]:
    return sorted({place.config.optimize.calibration, place.config.validation.text})


def _model(place: Place) -> str | None:
    """The model's own directory is not written down: what matters of it is that it is there."""
    if place.config.shape is not None:
        from ryzen_compile.shapes import SHAPES

        if place.config.shape not in SHAPES:
            raise ConfigError(f"there is no shape {place.config.shape!r}", hint=f"shapes are {', '.join(SHAPES)}")
        return None
    if place.config.model is not None:
        place.say(f"model {place.config.model}")
        directory = model_directory(place)
        if directory is not None and task_of_directory(directory) == "embed":
            raise UnsupportedError(
                f"{place.config.model} is an encoder, and a workflow measures models that generate",
                hint="ryzen-compile export and bench are for encoders, too",
            )
    return place.config.model
