"""optimize() and load(): the only file that knows every layer."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.backends import get_backend
from ryzen_compile.config import DEFAULT_RECIPE, Recipe, find_recipe
from ryzen_compile.errors import ArtifactError, UnsupportedError, UsageError
from ryzen_compile.manifest import MANIFEST_NAME
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.runtime.engine import Engine

if TYPE_CHECKING:
    from torch import nn

    from ryzen_compile.backends.onnxruntime.artifact import Artifact, Companions
    from ryzen_compile.passes.base import Pass
    from ryzen_compile.program import Program
    from ryzen_compile.report import PassRecord, Report

Progress = Callable[["str | PassRecord"], None]


@dataclass(frozen=True)
class Source:
    """A model and what came with it. ``name`` is what the user called it."""

    model: nn.Module
    name: str
    tokenizer: Any = None
    generation_config: Any = None


def optimize(
    model: nn.Module | str | os.PathLike[str],
    recipe: str | Recipe = DEFAULT_RECIPE,
    *,
    backend: str = "onnxruntime",
    context: int | None = None,
    logits: str | None = None,
    passes: Sequence[Pass] | None = None,
    tokenizer: Any = None,
    verify: bool = True,
    threads: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> CompiledModel:
    """Captures ``model``, rewrites it pass by pass, and returns it compiled for ``backend``.

    ``model`` is a transformers causal LM, a plain decoder ``forward(input_ids (B, T)) -> logits (B, T, V)``, or the
    path or hub id of one. ``recipe`` is a name or a :class:`Recipe`; ``context`` and ``logits`` ("last" or "all")
    override its settings. ``passes`` replaces the recipe's own. ``verify`` runs the parity gate after every pass: one
    that moves the logits beyond rounding is rolled back and named in the report. ``progress`` hears of every step.

    The model is left as it was. Raises an error of :mod:`ryzen_compile.errors`.
    """
    chosen = find_recipe(recipe, context=context, logits=logits)
    get_backend(backend)  # what is asked for is refused before the model is read
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    source = read_source(model, tokenizer=tokenizer, trust_remote_code=trust_remote_code, progress=progress)
    program, report = rewrite(source.model, chosen, backend=backend, passes=passes, verify=verify, progress=progress)
    saver: Callable[[Path, bool], None] | None = None
    engine: Engine
    if backend == "onnxruntime":
        from ryzen_compile.backends.onnxruntime import OnnxRuntimeBackend
        from ryzen_compile.backends.onnxruntime.session import SessionOptions

        _say(progress, "compile")
        engine = OnnxRuntimeBackend().compile(program, options=SessionOptions(threads=threads))

        def saver(directory: Path, force: bool) -> None:
            _write_artifact(directory, program, report, chosen, source, force)
    else:
        engine = get_backend(backend).compile(program)
    return CompiledModel(
        engine,
        report=report,
        config=_config_dict(source.model),
        generation_config=source.generation_config,
        tokenizer=source.tokenizer,
        saver=saver,
    )


def export(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: str | Recipe = DEFAULT_RECIPE,
    *,
    context: int | None = None,
    logits: str | None = None,
    force: bool = False,
    verify: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
    local_files_only: bool | None = None,
    progress: Progress | None = None,
) -> Report:
    """Writes the artifact of ``model`` to ``out`` without loading it: one pass over the weights. See ``optimize``."""
    target = Path(out)
    _refuse_target(target, model, force)
    chosen = find_recipe(recipe, context=context, logits=logits)
    source = read_source(
        model,
        trust_remote_code=trust_remote_code,
        revision=revision,
        local_files_only=local_files_only,
        progress=progress,
    )
    program, report = rewrite(source.model, chosen, verify=verify, progress=progress)
    _say(progress, "write")
    _write_artifact(target, program, report, chosen, source, force)
    return report


def load(path: str | os.PathLike[str], *, threads: int | None = None, digests: bool = True) -> CompiledModel:
    """The artifact at ``path``, checked file by file and opened in ONNX Runtime; torch is not imported.

    ``digests=False`` skips hashing the weights. Raises ``ArtifactError``, ``TamperedError`` or ``UnsafeError``.
    """
    from ryzen_compile.backends.onnxruntime import artifact
    from ryzen_compile.backends.onnxruntime.session import OrtEngine, SessionOptions

    directory = Path(path)
    found = artifact.read(directory, digests=digests)
    engine = OrtEngine(found.model, found.spec, found.slots, SessionOptions(threads=threads))

    def saver(target: Path, force: bool) -> None:
        _copy_artifact(found, target, force)

    return CompiledModel(
        engine,
        report=found.report,
        config=dict(found.config or {}),
        generation_config=found.generation_config,
        tokenizer=_tokenizer_of(directory),
        saver=saver,
    )


def rewrite(
    model: nn.Module,
    recipe: Recipe,
    *,
    backend: str = "onnxruntime",
    passes: Sequence[Pass] | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> tuple[Program, Report]:
    """Captures ``model`` and runs the passes for ``backend``; the Program is not compiled yet."""
    from ryzen_compile.capture import capture
    from ryzen_compile.pipeline import default_passes, run_passes
    from ryzen_compile.validate.parity import ParityGate, check_capture

    target = get_backend(backend)
    able = target.probe()
    if not able.available:
        raise UnsupportedError(f"backend {backend!r} is not available here: {able.reason}", hint=able.hint)
    _say(progress, "capture")
    started = time.perf_counter()
    program = capture(model, context=recipe.context)
    seconds = time.perf_counter() - started
    gate = None
    if verify:
        _say(progress, "reference")
        check_capture(model, program)
        gate = ParityGate(program)
    chosen = default_passes(recipe) if passes is None else tuple(passes)
    program, report = run_passes(
        program, chosen, supported_ops=target.supported_ops, gate=gate, strict=verify, progress=progress
    )
    return program, replace(report, capture_seconds=seconds, facts={"recipe": recipe.name, "backend": backend})


def read_source(
    model: nn.Module | str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    local_files_only: bool | None = None,
    progress: Progress | None = None,
) -> Source:
    """A model from memory, a directory or the hub. One in memory is checked for NaN, one on disk for everything."""
    if not isinstance(model, (str, os.PathLike)):
        from ryzen_compile.source import check_finite

        check_finite(model)
        return Source(model, type(model).__name__, tokenizer, getattr(model, "generation_config", None))
    from ryzen_compile.source import load_model, resolve

    _say(progress, "load")
    directory = resolve(
        os.fspath(model), revision=revision, local_files_only=local_files_only, trust_remote_code=trust_remote_code
    )
    loaded, own_tokenizer, generation_config = load_model(directory, trust_remote_code=trust_remote_code)
    return Source(loaded, os.fspath(model), tokenizer or own_tokenizer, generation_config)


def _write_artifact(out: Path, program: Program, report: Report, recipe: Recipe, source: Source, force: bool) -> None:
    from ryzen_compile.backends.onnxruntime import OnnxRuntimeBackend, artifact
    from ryzen_compile.backends.onnxruntime.lowering import cache_slots
    from ryzen_compile.validate.machine import read_versions

    backend = OnnxRuntimeBackend()
    facts = {
        "source": {"name": Path(source.name).name, **program.provenance},
        "recipe": recipe.model_dump(),
        "passes": report.hits(),
        "versions": read_versions(),
    }
    artifact.write(
        out,
        lambda directory: backend.write(program, directory),
        spec=program.spec,
        slots=cache_slots(program.slots),
        facts=facts,
        report=report,
        companions=_companions(source),
        force=force,
    )


def _companions(source: Source) -> Companions:
    from ryzen_compile.backends.onnxruntime.artifact import Companions

    generation = source.generation_config
    return Companions(
        config=_config_dict(source.model),
        generation_config=generation.to_dict() if hasattr(generation, "to_dict") else generation,
        save_tokenizer=None if source.tokenizer is None else source.tokenizer.save_pretrained,
    )


def _config_dict(model: nn.Module) -> dict[str, Any]:
    """The configuration, without the place on this machine that the model was read from."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return {name: value for name, value in settings.items() if name != "_name_or_path"}


def _copy_artifact(found: Artifact, out: Path, force: bool) -> None:
    from ryzen_compile.publish import Staging

    with Staging(out, force=force) as stage:
        for name in (*found.manifest["files"], MANIFEST_NAME):
            target = stage.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.directory / name, target)
        stage.commit()


def _tokenizer_of(directory: Path) -> Any:
    if not (directory / "tokenizer.json").exists():
        return None
    from ryzen_compile.runtime.tokenizer import Tokenizer

    return Tokenizer.from_directory(directory)


def _refuse_target(out: Path, model: object, force: bool) -> None:
    """Before a minute of work: an output that would be refused, or would overwrite the model it is made from."""
    from ryzen_compile.publish import require_free

    if isinstance(model, (str, os.PathLike)) and Path(model).is_dir():
        source, target = Path(model).resolve(), out.resolve()
        if target == source or source in target.parents:
            raise UsageError(f"output {out} is inside the model directory {model}", hint="write it somewhere else")
    if out.is_file():
        raise UsageError(f"output {out} is a file", hint="name a directory that does not exist yet")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the directory {out.absolute().parent} does not exist", hint="create it first")
    if out.is_dir() and any(out.iterdir()) and not (force and (out / MANIFEST_NAME).exists()):
        raise ArtifactError(
            f"output directory {out} is not empty", hint="--force replaces it if it holds an artifact of ours"
        )
    require_free(out)


def _say(progress: Progress | None, step: str) -> None:
    if progress is not None:
        progress(step)
