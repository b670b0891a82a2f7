"""Validation of an artifact against the model that it was made from: every check, and what reports show beside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ryzen_compile.api import load, read_source
from ryzen_compile.errors import ConfigError, ResourceError, RyzenCompileError, UnsupportedError, UsageError
from ryzen_compile.manifest import read_manifest
from ryzen_compile.text import BUILTIN
from ryzen_compile.validate.footprint import Footprint
from ryzen_compile.validate.inference import InferenceReport
from ryzen_compile.validate.machine import read_machine
from ryzen_compile.validate.optimization.checks import broken, skipped
from ryzen_compile.validate.optimization.measurements import Measurements, Subject
from ryzen_compile.validate.optimization.settings import ValidationSettings
from ryzen_compile.validate.optimization.validator import OptimizationValidator
from ryzen_compile.validate.outcome import Component, Outcome
from ryzen_compile.workflow.artifact_recipe import recipe_of
from ryzen_compile.workflow.blame import blame
from ryzen_compile.workflow.metadata import metadata, summary
from ryzen_compile.workflow.report_schema import EndToEnd, Point, Text, ValidationReport


@dataclass(frozen=True)
class Baseline:
    """The model that an artifact was made from: a ``directory``, or a ``model`` in memory with ``random`` weights.

    ``name`` is what its user calls it.
    """

    name: str
    directory: Path | None = None
    model: Any = None
    random: bool = False

    def opened(self) -> Any:
        """The transformers model, float32, in eval mode. Raises what reading a model raises."""
        if self.model is None and self.directory is None:
            raise UsageError("a baseline is a directory or a model, got neither")
        model = self.model if self.directory is None else read_source(self.directory).model
        if not hasattr(model, "get_input_embeddings"):
            raise UnsupportedError(
                f"{self.name} is no transformers model, and the baseline runs in Hugging Face's eager mode"
            )
        return model.float().eval()


def validate_artifact(
    artifact: Path,
    baseline: Baseline,
    settings: ValidationSettings,
    *,
    command: str,
    calibration: str = BUILTIN,
    scratch: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> ValidationReport:
    """Everything that ``settings`` ask for, measured now; see ``ValidationReport``. Recipes to compare with are
    calibrated on ``calibration``, as the artifact was; what is exported for that goes below ``scratch`` for the while
    (None: the system's place for temporary files).

    Raises what opening the artifact and its baseline raises: an artifact that cannot be opened has nothing to check.
    What fails while something is measured is an outcome.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        say("opening the artifact and its baseline")
        threads = read_machine().usable_cores  # of both sides, and of all that is measured beside them
        model = stack.enter_context(load(artifact, task="generate", threads=threads))
        draft = None if settings.draft is None else stack.enter_context(load(Path(settings.draft), task="generate"))
        subject = Subject(
            artifact,
            model,
            baseline.opened(),
            settings,
            path=None if baseline.directory is None else str(baseline.directory),
            random=baseline.random,
            draft=draft,
            arguments=command,
        )
        validator = OptimizationValidator(subject, blame=blame, progress=say)
        outcomes = list(validator.validate())
        found = validator.measurements
        whole, problems = _parts(found, scratch, say)
        points, more = _points(found, baseline, calibration, scratch, say)
        outcomes += [*problems, *more]
        return ValidationReport(
            metadata=metadata(model=baseline.name, artifact=artifact.name, command=command, threads=threads),
            summary=summary(outcomes, time.perf_counter() - started),
            outcomes=tuple(outcomes),
            inference=_inference(found),
            text=_or_none(lambda: _text(found)),
            pareto=points,
            step_cost=_step_cost(artifact),
            acceptance=_or_none(lambda: dict(found.continued[1].stats.lengths)) or {},
            end_to_end=whole,
        )


def _parts(
    found: Measurements, scratch: Path | None, say: Callable[[str], None]
) -> tuple[EndToEnd | None, list[Outcome]]:
    """The whole and its parts; an outcome says where they could not be had."""
    from ryzen_compile.workflow.parts import measure_parts

    subject = found.subject
    if not subject.settings.parts:
        return None, []
    try:
        return (
            measure_parts(
                found.inference,
                subject.baseline,
                recipe_of(subject.artifact),
                found.prompts,
                new_tokens=subject.settings.new_tokens,
                threads=found.threads,
                scratch=scratch,
                say=say,
            ),
            [],
        )
    except RyzenCompileError as error:
        return None, [_missing("end_to_end", "parts", error)]


def _points(
    found: Measurements, baseline: Baseline, calibration: str, scratch: Path | None, say: Callable[[str], None]
) -> tuple[tuple[Point, ...], Sequence[Outcome]]:
    from ryzen_compile.workflow.pareto import measure_recipes

    subject = found.subject
    if not subject.settings.compare:
        return (), ()
    try:
        points = measure_recipes(
            subject.settings.compare,
            baseline.directory or baseline.model,
            subject.baseline,
            recipe_of(subject.artifact),
            subject.artifact,
            found.text.windows,
            threads=found.threads,
            calibration=calibration,
            scratch=scratch,
            say=say,
        )
    except RyzenCompileError as error:
        return (), [_missing("passes", "recipes", error)]
    return points, ()


def _missing(component: Component, name: str, error: RyzenCompileError) -> Outcome:
    """As for a check: what cannot be had here is left out, what went wrong has failed."""
    if isinstance(error, UnsupportedError | ResourceError | ConfigError):
        return skipped(component, name, str(error))
    return broken(component, name, error)


def _step_cost(artifact: Path) -> dict[int, dict[int, float]]:
    """What ``tune`` measured on this machine, in milliseconds; nothing where it was not asked."""
    from ryzen_compile.backends.onnxruntime.tune import read_tuning
    from ryzen_compile.validate.machine import cpu_key

    manifest = read_manifest(artifact)
    tuning = read_tuning(manifest, cpu_key(read_machine())) if "tuned" in manifest else None
    if tuning is None:
        return {}
    return {
        context: {tokens: 1e3 * seconds for tokens, seconds in curve.items()}
        for context, curve in tuning.curves.items()
    }


def _inference(found: Measurements) -> InferenceReport | None:
    """With what each engine took in a process of its own, where that was measured."""
    report: InferenceReport | None = _or_none(lambda: found.inference)
    memory: tuple[Footprint, Footprint] | None = _or_none(lambda: found.footprints)
    return report if report is None or memory is None else report.with_memory(*memory)


def _text(found: Measurements) -> Text:
    text = found.text
    return Text(name=text.name, sha256=text.sha256, tokens=text.windows.size - len(text.windows))


def _or_none(read: Callable[[], Any]) -> Any:
    """What was measured, None where that failed: its outcome says so."""
    try:
        return read()
    except RyzenCompileError:
        return None
