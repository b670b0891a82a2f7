"""optimize() and load(): the only file that knows every layer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from ryzen_compile.backends import get_backend
from ryzen_compile.calibration import Calibration, read_calibration
from ryzen_compile.compile_encoder import (
    compiled_encoder,
    loaded_encoder,
    measured_ranges,
    used_settings,
    used_tokenizer,
)
from ryzen_compile.config import (
    DEFAULT_RECIPE,
    ENCODER_RECIPE,
    EmbeddingCompression,
    KVCacheConfig,
    Recipe,
    SparseActivations,
    find_recipe,
    refuse_decoding,
)
from ryzen_compile.encoder_source import LoadedEncoder, read_encoder, task_of_directory, task_of_model
from ryzen_compile.errors import ArtifactError, ModelError, RyzenCompileError, UnsupportedError, UsageError
from ryzen_compile.manifest import MANIFEST_NAME
from ryzen_compile.recipe_file import CODES_NAME, read_recipe
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.runtime.encoder import CompiledEncoder
from ryzen_compile.runtime.engine import Engine
from ryzen_compile.spec import POOLING_MODES, TASKS, Pooling, PoolingMode, Task
from ryzen_compile.text import BUILTIN

if TYPE_CHECKING:
    from torch import nn

    from ryzen_compile.backends.onnxruntime.artifact import Companions
    from ryzen_compile.backends.onnxruntime.emit import LoweringOptions
    from ryzen_compile.backends.onnxruntime.session import SessionOptions
    from ryzen_compile.numerics.blockwise import BlockTensor
    from ryzen_compile.numerics.codebook import CodebookTensor
    from ryzen_compile.numerics.embedding_codes import Int8Range
    from ryzen_compile.numerics.row_shift import RowShift
    from ryzen_compile.passes.base import Pass
    from ryzen_compile.pipeline import Observer
    from ryzen_compile.program import Program
    from ryzen_compile.report import PassRecord, Report
    from ryzen_compile.runtime.tokenizer import Tokenizer
    from ryzen_compile.spec import CacheSlot

Progress = Callable[["str | PassRecord"], None]
Native = Literal["auto"] | bool


@dataclass(frozen=True)
class Source:
    """A model and what came with it. ``name`` is what the user called it, ``quantized`` the weights that came so,
    ``tables`` those of tokens that came as codes. A decoder is no ``encoder``."""

    model: nn.Module
    name: str
    tokenizer: Any = None
    generation_config: Any = None
    quantized: Mapping[str, BlockTensor] = field(default_factory=dict)
    tables: Mapping[str, CodebookTensor] = field(default_factory=dict)
    encoder: LoadedEncoder | None = None

    @property
    def pooling(self) -> Pooling | None:
        """Of an encoder."""
        return None if self.encoder is None else self.encoder.settings.pooling


def optimize(
    model: nn.Module | str | os.PathLike[str],
    recipe: str | Recipe | None = None,
    *,
    task: Task | None = None,
    backend: str = "onnxruntime",
    context: int | None = None,
    pooling: Pooling | PoolingMode | None = None,
    logits: str | None = None,
    prefill: str | None = None,
    kv: str | Mapping[str, Any] | KVCacheConfig | None = None,
    window: int | None = None,
    sinks: int | None = None,
    target_bits: float | None = None,
    overrides: Mapping[str, Any] | None = None,
    embedding: Mapping[str, Any] | EmbeddingCompression | None = None,
    sparsity: float | Mapping[str, Any] | SparseActivations | None = None,
    calibration: str | os.PathLike[str] = BUILTIN,
    passes: Sequence[Pass] | None = None,
    tokenizer: Any = None,
    verify: bool = True,
    threads: int | None = None,
    native: Native = "auto",
    precision: str | None = None,
    cache_budget_bytes: int | None = None,
    prefix_bytes: int = 0,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Any:  # a CompiledModel or a CompiledEncoder, by what the model is for: types cannot tell
    """Captures ``model``, rewrites it pass by pass, and returns it compiled for ``backend``.

    ``model`` is a transformers causal LM, a plain decoder ``forward(input_ids (B, T)) -> logits (B, T, V)``, or the
    path or hub id of one; or an encoder, which gives a :class:`CompiledEncoder`: a directory of sentence-transformers,
    a transformers model without a head to generate with, or a ``SentenceTransformer``. ``task`` ("embed" or "generate")
    settles which it is, where that is not plain. An encoder pools as its directory says, or by ``pooling`` (a
    :class:`Pooling`, or its mode alone), else the mean of its tokens scaled to length 1; what is about logits and
    caches is refused for it.

    ``recipe`` is a name or a :class:`Recipe`, by default the one that a model directory of a training run holds, else
    "int4", for an encoder "fp32"; ``context``, ``logits`` ("last" or "all"),
    ``prefill`` ("shared" or "int8"), ``kv`` (how keys and values are cached: "int8", "int4", "auto", or a
    :class:`KVCacheConfig`), ``window`` and ``sinks`` (endless streams in a cache of constant size), ``target_bits``
    (mixed precision: stored bits per weight) and ``overrides`` (regular expression over weight names -> ``{"bits": 8}``
    and such, or ``{"float": True}``) override its settings; ``embedding``, an :class:`EmbeddingCompression` or its
    fields, stores the table of tokens as codes into a codebook; ``sparsity``, a share or a :class:`SparseActivations`,
    drops so many channels of what linear layers read. ``calibration`` is text for the methods that look at activations,
    and for the ranges of an encoder's int8 codes: a ``.txt`` or ``.jsonl`` file, a directory of such, or "builtin"; a
    model without a tokenizer is quantized without. ``passes`` replaces the recipe's own. ``verify`` runs the parity
    gate after every pass: one that moves the logits beyond rounding is rolled back and named in the report, a lossy one
    is held to the recipe's budget.
    ``progress`` hears of every step. ``native``, ``cache_budget_bytes`` and ``prefix_bytes`` are as in :func:`load`.
    ``backend`` is "onnxruntime", "triton" (a GPU; ``precision`` "bf16", "fp16" or "fp32" is what it computes and caches
    in, bf16 unless said) or "eager" (the references).

    The model is left as it was. Raises an error of :mod:`ryzen_compile.errors`.
    """
    task = task_of(model, task, trust_remote_code=trust_remote_code)
    chosen = find_recipe(
        recipe_for(model, task=task, trust_remote_code=trust_remote_code) if recipe is None else recipe,
        context=context,
        logits=logits,
        prefill=prefill,
        kv=kv,
        window=window,
        sinks=sinks,
        target_bits=target_bits,
        overrides=overrides,
        embedding=embedding,
        sparsity=sparsity,
    )
    if passes is not None and chosen.embedding is not None:
        raise UsageError("passes replace the recipe's own, which embedding is for: give one or the other")
    _refuse_cache(backend, chosen)  # what is asked for is refused before the model is read
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    _refuse_native(backend, native)
    _refuse_precision(backend, precision, chosen)
    _refuse_task(task, chosen, pooling, cache_budget_bytes, prefix_bytes)
    if task == "embed" and backend == "triton":
        raise UnsupportedError("backend 'triton' runs no encoders yet", hint="use onnxruntime or eager")
    source = read_source(
        model,
        task=task,
        pooling=pooling,
        context=chosen.context,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    program, report = rewrite(
        source.model,
        chosen,
        pooling=source.pooling,
        backend=backend,
        calibration=read_calibration(source.tokenizer, chosen, calibration, progress),
        given=source.quantized,
        tables=source.tables,
        passes=passes,
        verify=verify,
        progress=progress,
    )
    _refuse_stream(program, chosen)
    saver: Callable[[Path, bool], None] | None = None
    engine: Any  # an Engine, or an encoder's
    if backend == "onnxruntime":
        from ryzen_compile.backends.onnxruntime import OnnxRuntimeBackend
        from ryzen_compile.backends.onnxruntime.session import SessionOptions

        _say(progress, "compile")
        options = _session_options(SessionOptions(threads=threads), native)
        engine = OnnxRuntimeBackend().compile(program, options=options, lowering=_lowering_options(chosen))

        def saver(directory: Path, force: bool) -> None:
            _write_artifact(directory, program, report, chosen, source, force)
    elif backend == "triton":
        from ryzen_compile.backends.triton import DEFAULT_PRECISION, TritonBackend

        _say(progress, "compile")
        engine = TritonBackend().compile(program, precision or DEFAULT_PRECISION)
    else:
        engine = get_backend(backend).compile(program)
    if source.encoder is not None:

        def write_encoder(directory: Path, force: bool, int8: Int8Range | None) -> None:
            _write_artifact(directory, program, report, chosen, source, force, int8=int8)

        return compiled_encoder(
            engine,
            source.encoder,
            report=report,
            config=_config_dict(source.model),
            text=calibration,
            write=write_encoder if backend == "onnxruntime" else None,
            progress=progress,
        )
    return _compiled(
        engine,
        motion=_motion(program, engine.slots),
        stream=_stream(chosen),
        cache_budget_bytes=cache_budget_bytes,
        prefix_bytes=prefix_bytes,
        report=report,
        config=_config_dict(source.model),
        generation_config=source.generation_config,
        tokenizer=source.tokenizer,
        saver=saver,
    )


def export(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: str | Recipe | None = None,
    *,
    task: Task | None = None,
    context: int | None = None,
    pooling: Pooling | PoolingMode | None = None,
    logits: str | None = None,
    prefill: str | None = None,
    kv: str | Mapping[str, Any] | KVCacheConfig | None = None,
    window: int | None = None,
    sinks: int | None = None,
    target_bits: float | None = None,
    overrides: Mapping[str, Any] | None = None,
    embedding: Mapping[str, Any] | EmbeddingCompression | None = None,
    sparsity: float | Mapping[str, Any] | SparseActivations | None = None,
    calibration: str | os.PathLike[str] = BUILTIN,
    native: bool = False,
    force: bool = False,
    verify: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
    local_files_only: bool | None = None,
    progress: Progress | None = None,
    observe: Observer | None = None,
) -> Report:
    """Writes the artifact of ``model`` to ``out`` without loading it: one pass over the weights. See ``optimize``.

    ``native`` adds the model over our own operators and their library, and makes onnxruntime-genai run these; that
    needs the library here, and x86-64 Linux there. ``load`` needs neither: it claims the operators by itself.
    ``observe`` is called with each pass's record and the Program before and after it.
    """
    target = Path(out)
    _refuse_target(target, model, force)
    where: Any = {
        "revision": revision,
        "local_files_only": local_files_only,
        "trust_remote_code": trust_remote_code,
    }
    task = task_of(model, task, **where)
    chosen = find_recipe(
        recipe_for(model, task=task, **where) if recipe is None else recipe,
        context=context,
        logits=logits,
        prefill=prefill,
        kv=kv,
        window=window,
        sinks=sinks,
        target_bits=target_bits,
        overrides=overrides,
        embedding=embedding,
        sparsity=sparsity,
    )
    _refuse_cache("onnxruntime", chosen)
    _refuse_task(task, chosen, pooling)
    if native and task == "embed":
        raise UsageError("native=True is for onnxruntime-genai, which runs no encoders", hint="load() needs none")
    if native:
        _refuse_native("onnxruntime", native)
    source = read_source(model, task=task, pooling=pooling, context=chosen.context, progress=progress, **where)
    program, report = rewrite(
        source.model,
        chosen,
        pooling=source.pooling,
        calibration=read_calibration(source.tokenizer, chosen, calibration, progress),
        given=source.quantized,
        tables=source.tables,
        verify=verify,
        progress=progress,
        observe=observe,
    )
    _refuse_stream(program, chosen)
    int8 = None
    if source.encoder is not None:
        int8 = measured_ranges(program, source.encoder, _lowering_options(chosen), text=calibration, progress=progress)
    _say(progress, "write")
    _write_artifact(target, program, report, chosen, source, force, native, int8)
    return report


@overload
def load(
    path: str | os.PathLike[str],
    *,
    task: Literal["embed"],
    threads: int | None = ...,
    native: Native = ...,
    digests: bool = ...,
    cache_budget_bytes: int | None = ...,
    prefix_bytes: int = ...,
) -> CompiledEncoder: ...
@overload
def load(
    path: str | os.PathLike[str],
    *,
    task: Literal["generate"],
    threads: int | None = ...,
    native: Native = ...,
    digests: bool = ...,
    cache_budget_bytes: int | None = ...,
    prefix_bytes: int = ...,
) -> CompiledModel: ...
@overload
def load(
    path: str | os.PathLike[str],
    *,
    task: None = ...,
    threads: int | None = ...,
    native: Native = ...,
    digests: bool = ...,
    cache_budget_bytes: int | None = ...,
    prefix_bytes: int = ...,
) -> Any: ...


def load(
    path: str | os.PathLike[str],
    *,
    task: Task | None = None,
    threads: int | None = None,
    native: Native = "auto",
    digests: bool = True,
    cache_budget_bytes: int | None = None,
    prefix_bytes: int = 0,
) -> CompiledModel | CompiledEncoder:
    """The artifact at ``path``, checked file by file and opened in ONNX Runtime; torch is not imported.

    That of an encoder gives a :class:`CompiledEncoder`; who expects the one or the other says so by ``task``, and an
    artifact that is not for it is refused with ``UsageError``.

    ``cache_budget_bytes`` bounds what all caches of keys and values take together (default: the machine's memory). With
    ``prefix_bytes`` of it, prompts that begin like one read before skip what they share. Without ``threads`` it runs as
    ``ryzen-compile tune`` found best on this kind of machine, if that was measured. ``native`` says whether our own
    operators take over nodes of the graph: "auto" where their library is there (and as ``tune`` found best), ``True``
    insists and raises ``UnsupportedError`` without it, ``False`` keeps to ONNX Runtime's. ``digests=False`` skips
    hashing the weights. Raises ``ArtifactError``, ``TamperedError`` or ``UnsafeError``.
    """
    from ryzen_compile.backends.onnxruntime import artifact
    from ryzen_compile.backends.onnxruntime.session import OrtEngine, SessionOptions

    directory = Path(path)
    _refuse_native("onnxruntime", native)
    found = artifact.read(directory, digests=digests, task=task)
    if found.encoding is not None:
        _refuse_caches(cache_budget_bytes, prefix_bytes)
        return loaded_encoder(
            found, _session_options(SessionOptions(threads=threads), native), tokenizer=_tokenizer_of(directory)
        )
    options, tuning, measured = SessionOptions(threads=threads), None, None
    if "tuned" in found.manifest:
        from ryzen_compile.backends.onnxruntime.tune import read_tuning, tuned_options
        from ryzen_compile.validate.machine import cpu_key, read_machine

        tuning = read_tuning(found.manifest, cpu_key(read_machine()))
    if tuning is not None:
        tuned = tuned_options(tuning)
        measured = _session_options(tuned, "auto")
        options = tuned if threads is None else replace(options, native=tuned.native)
    options = _session_options(options, native)
    if tuning is not None and options != measured:
        tuning = None  # its seconds are those of other sessions
    engine = OrtEngine(found.model, found.spec, found.slots, options, found.prefill)

    def saver(target: Path, force: bool) -> None:
        artifact.copy(found, target, force)

    return _compiled(
        engine,
        motion=found.motion,
        stream=found.stream,
        identity=found.identity,
        curves=None if tuning is None else tuning.curves,
        exit_layers=tuning.exit.layers if tuning is not None and tuning.exit is not None and tuning.exit.pays else None,
        cache_budget_bytes=cache_budget_bytes,
        prefix_bytes=prefix_bytes,
        report=found.report,
        config=dict(found.config or {}),
        generation_config=found.generation_config,
        tokenizer=_tokenizer_of(directory),
        saver=saver,
    )


def task_of(
    model: nn.Module | str | os.PathLike[str],
    task: Task | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool | None = None,
    trust_remote_code: bool = False,
) -> Task:
    """``task`` where it is given, else what ``model`` is for, by ``encoder_source``'s facts.

    A model of the hub is fetched for it; of one that is not there it says "generate", and whoever reads it says more.
    """
    if task is not None:
        if task not in TASKS:
            raise UsageError(f"there is no task {task!r}", hint=f"use {' or '.join(TASKS)}")
        return task
    if not isinstance(model, (str, os.PathLike)):
        return task_of_model(model)
    directory = _directory(model, revision, local_files_only, trust_remote_code)
    return "generate" if directory is None else task_of_directory(directory, trust_remote_code=trust_remote_code)


def recipe_for(
    model: nn.Module | str | os.PathLike[str],
    *,
    task: Task | None = None,
    revision: str | None = None,
    local_files_only: bool | None = None,
    trust_remote_code: bool = False,
) -> str | Recipe:
    """What is used where nobody names a recipe: the one that the model's directory holds, else the default's name.

    A model of the hub is fetched for it; one that is not there has none, and whoever reads it will say so. Raises
    ``ConfigError`` for a recipe that is none, ``ResourceError`` when it cannot be read.
    """
    where: Any = {
        "revision": revision,
        "local_files_only": local_files_only,
        "trust_remote_code": trust_remote_code,
    }
    held = None
    if isinstance(model, (str, os.PathLike)):
        directory = _directory(model, **where)
        held = None if directory is None else read_recipe(directory)
    return held or (ENCODER_RECIPE if task_of(model, task, **where) == "embed" else DEFAULT_RECIPE)


def _directory(
    model: str | os.PathLike[str], revision: str | None, local_files_only: bool | None, trust_remote_code: bool
) -> Path | None:
    """Where the model is, fetched if need be; None where there is none."""
    from ryzen_compile.source import resolve

    try:
        return resolve(
            os.fspath(model), revision=revision, local_files_only=local_files_only, trust_remote_code=trust_remote_code
        )
    except ModelError:
        return None


def rewrite(
    model: nn.Module,
    recipe: Recipe,
    *,
    pooling: Pooling | None = None,
    backend: str = "onnxruntime",
    calibration: Calibration | None = None,
    given: Mapping[str, BlockTensor] | None = None,
    tables: Mapping[str, CodebookTensor] | None = None,
    passes: Sequence[Pass] | None = None,
    verify: bool = True,
    progress: Progress | None = None,
    observe: Observer | None = None,
) -> tuple[Program, Report]:
    """Captures ``model`` and runs the passes for ``backend``; the Program is not compiled yet. An encoder has a
    ``pooling``.

    ``given`` are weights that are quantized already, by parameter name: a recipe with integer weights stores them as
    they are, one without widens them. ``tables`` are such that were trained as codes: a recipe that compresses the
    embedding stores them, one that does not reads the weights behind them. ``observe`` is called with each pass's
    record and the Program before and after it.
    """
    from ryzen_compile.capture import capture
    from ryzen_compile.capture_encoder import capture_encoder
    from ryzen_compile.pipeline import default_passes, encoder_passes, run_passes
    from ryzen_compile.validate.parity import check_capture, gate_for

    target = get_backend(backend)
    able = target.probe()
    if not able.available:
        raise UnsupportedError(f"backend {backend!r} is not available here: {able.reason}", hint=able.hint)
    if not target.evicts:
        recipe = recipe.model_copy(update={"kv": recipe.kv.model_copy(update={"bounded": False})})
    _say(progress, "capture")
    started = time.perf_counter()
    if pooling is None:
        program = capture(model, context=recipe.context)
    else:
        program = capture_encoder(model, pooling, context=recipe.context)
    seconds = time.perf_counter() - started
    gate = None
    text = None if calibration is None else calibration.windows[:, : program.spec.context]
    unseen = None if calibration is None else calibration.held_back[:, : program.spec.context]
    if verify:
        _say(progress, "reference")
        check_capture(model, program)
        gate = gate_for(program, text=unseen)
    if passes is None and pooling is not None:
        passes = encoder_passes(recipe, calibration=text, given=given)
    elif passes is None:
        compressor = None
        if recipe.embedding is not None:
            from ryzen_compile.train.embedding import prepare_compressor

            compressor = prepare_compressor(
                model, program, recipe.embedding, calibration, progress, trained=tables or {}
            )
        passes = default_passes(recipe, calibration=text, given=given, compressor=compressor)
    program, report = run_passes(
        program,
        passes,
        supported_ops=target.supported_ops,
        gate=gate,
        strict=verify,
        progress=progress,
        observe=observe,
    )
    facts: dict[str, object] = {"recipe": recipe.name, "backend": backend}
    if calibration is not None and text is not None:
        facts["calibration"] = {"text": calibration.name, "sha256": calibration.digest, "tokens": text.numel()}
        if calibration.long is not None:
            facts["table_tokens"] = calibration.long.numel()
    return program, replace(report, capture_seconds=seconds, facts=facts)


def read_source(
    model: nn.Module | str | os.PathLike[str],
    *,
    task: Task | None = None,
    pooling: Pooling | PoolingMode | None = None,
    context: int | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    local_files_only: bool | None = None,
    progress: Progress | None = None,
) -> Source:
    """A model from memory, a directory or the hub. One in memory is checked for NaN, one on disk for everything.

    ``pooling`` and ``context`` are in the place of an encoder's own.
    """
    where: Any = {
        "revision": revision,
        "local_files_only": local_files_only,
        "trust_remote_code": trust_remote_code,
    }
    if task_of(model, task, **where) == "embed":
        if isinstance(model, (str, os.PathLike)):
            from ryzen_compile.source import resolve

            _say(progress, "load")
            given: nn.Module | Path = resolve(os.fspath(model), **where)
        else:
            given = model
        pooling = Pooling(pooling) if isinstance(pooling, str) else pooling
        encoder = read_encoder(
            given, pooling=pooling, context=context, tokenizer=tokenizer, trust_remote_code=trust_remote_code
        )
        name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else type(model).__name__
        return Source(encoder.model, name, encoder.tokenizer, encoder=encoder)
    if not isinstance(model, (str, os.PathLike)):
        from ryzen_compile.source import check_finite

        check_finite(model)
        return Source(model, type(model).__name__, tokenizer, getattr(model, "generation_config", None))
    from ryzen_compile.source import load_checkpoint, resolve

    _say(progress, "load")
    directory = resolve(os.fspath(model), **where)
    found = load_checkpoint(directory, trust_remote_code=trust_remote_code)
    tables: Mapping[str, CodebookTensor] = {}
    if (directory / CODES_NAME).exists():
        from ryzen_compile.train.table_file import given_tables

        tables = given_tables(found.model, directory / CODES_NAME)
    return Source(
        found.model,
        os.fspath(model),
        tokenizer or found.tokenizer,
        found.generation_config,
        found.blocks,
        tables,
    )


def _lowering_options(recipe: Recipe) -> LoweringOptions:
    from ryzen_compile.backends.onnxruntime.emit import LoweringOptions

    level = LoweringOptions().accuracy_level if recipe.weights is None else recipe.weights.accuracy_level
    return LoweringOptions(level, recipe.prefill == "int8")


def _session_options(options: SessionOptions, native: Native) -> SessionOptions:
    """``options`` with what the caller says of native operators."""
    from ryzen_compile.backends.onnxruntime.claim_report import KINDS

    if native == "auto":
        return options
    return replace(options, native=KINDS if native else frozenset(), require_native=native)


def _write_artifact(
    out: Path,
    program: Program,
    report: Report,
    recipe: Recipe,
    source: Source,
    force: bool,
    native: bool = False,
    int8: Int8Range | None = None,
) -> None:
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
    slots = cache_slots(program.slots)
    encoding = None
    if source.encoder is not None:
        from ryzen_compile.backends.onnxruntime.encoding_files import Encoding

        encoding = Encoding(used_settings(source.encoder, program.spec.context), int8)
    artifact.write(
        out,
        lambda directory: backend.write(program, directory, _lowering_options(recipe)),
        spec=program.spec,
        slots=slots,
        motion=artifact.UNKNOWN_MOTION if encoding is not None else _motion(program, slots),
        encoding=encoding,
        facts=facts,
        report=report,
        companions=_companions(source, program.spec.context),
        native=native,
        force=force,
    )


def _motion(program: Program, slots: Sequence[CacheSlot]) -> tuple[RowShift, ...] | str:
    """How cached keys are moved to other positions, in heads and rows as ``slots`` has them, or why they cannot be."""
    from ryzen_compile.numerics.row_shift import widened
    from ryzen_compile.numerics.rows import RowFormat
    from ryzen_compile.row_shifts import row_shifts

    try:
        pairs = zip(row_shifts(program), slots, strict=True)
        return tuple(
            replace(widened(shift, slot.head_dim), form=RowFormat.parse(slot.key_format)) for shift, slot in pairs
        )
    except UnsupportedError as error:
        return error.message


def _compiled(engine: Engine, **settings: Any) -> CompiledModel:
    """The engine as a model; closed again if it cannot be one."""
    try:
        return CompiledModel(engine, **settings)
    except RyzenCompileError:
        engine.close()
        raise


def _refuse_task(
    task: Task, recipe: Recipe, pooling: object, cache_budget_bytes: int | None = None, prefix_bytes: int = 0
) -> None:
    """Before the model is read: what is asked of one kind of model and is the other's."""
    if task == "generate":
        if pooling is not None:
            raise UsageError(f"pooling {pooling!r} is for encoders, this model generates", hint="or give task='embed'")
        return
    refuse_decoding(recipe)
    _refuse_caches(cache_budget_bytes, prefix_bytes)
    if isinstance(pooling, str) and pooling not in POOLING_MODES:
        raise UsageError(f"there is no pooling {pooling!r}", hint=f"use one of {', '.join(POOLING_MODES)}")


def _refuse_caches(cache_budget_bytes: int | None, prefix_bytes: int) -> None:
    for name, value in (("cache_budget_bytes", cache_budget_bytes), ("prefix_bytes", prefix_bytes or None)):
        if value is not None:
            raise UsageError(f"{name} is for models that generate: an encoder keeps no cache")


def _refuse_stream(program: Program, recipe: Recipe) -> None:
    """Before anything is compiled or written: a window that the model cannot be streamed with."""
    if recipe.kv.window is None:
        return
    from ryzen_compile.runtime.stream import Stream

    motion = _motion(program, program.slots)
    if isinstance(motion, str):
        raise UnsupportedError(f"this model cannot generate with a window: {motion}", hint="export it without")
    Stream(recipe.kv.window, recipe.kv.sinks, motion).check(program.slots, program.spec.context)


def _stream(recipe: Recipe) -> tuple[int, int] | None:
    return None if recipe.kv.window is None else (recipe.kv.window, recipe.kv.sinks)


def _companions(source: Source, context: int) -> Companions:
    from ryzen_compile.backends.onnxruntime.artifact import Companions

    generation = source.generation_config
    return Companions(
        config=_config_dict(source.model),
        generation_config=generation.to_dict() if hasattr(generation, "to_dict") else generation,
        save_tokenizer=None if source.tokenizer is None else partial(_save_tokenizer, source, context),
    )


def _save_tokenizer(source: Source, context: int, directory: Path) -> None:
    source.tokenizer.save_pretrained(directory)
    own = None if source.encoder is None else used_tokenizer(source.encoder)
    if source.encoder is not None and own is not None:  # with limit and lower case, for whoever reads the file
        own.save(directory, used_settings(source.encoder, context).context or context)


def _config_dict(model: nn.Module) -> dict[str, Any]:
    """The configuration, without the place on this machine that the model was read from."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return {name: value for name, value in settings.items() if name != "_name_or_path"}


def _tokenizer_of(directory: Path) -> Tokenizer | None:
    if not (directory / "tokenizer.json").exists():
        return None
    from ryzen_compile.runtime.tokenizer import Tokenizer

    return Tokenizer.from_directory(directory)


def _refuse_cache(backend: str, recipe: Recipe) -> None:
    able = get_backend(backend).cache_formats
    if able is not None and str(recipe.kv) not in able:
        raise UnsupportedError(
            f"backend {backend!r} cannot keep a cache of {recipe.kv}", hint=f"it keeps {', '.join(sorted(able))}"
        )


def _refuse_native(backend: str, native: object) -> None:
    """Before the model is read: native operators that were asked for and are not there."""
    if not (isinstance(native, bool) or native == "auto"):
        raise UsageError(f"native must be 'auto', True or False, got {native!r}")
    if native is not True:
        return
    if backend != "onnxruntime":
        raise UsageError(f"native operators run in ONNX Runtime, not on backend {backend!r}")
    from ryzen_compile.backends.onnxruntime.native import required

    required()


def _refuse_precision(backend: str, precision: str | None, recipe: Recipe) -> None:
    """Before the model is read: what this backend does not compute in."""
    if backend == "triton":
        from ryzen_compile.backends.triton import expect_precision

        if precision is not None:
            expect_precision(precision)
    elif precision not in (None, "fp32"):
        raise UsageError(
            f"backend {backend!r} computes in fp32, not {precision!r}", hint="precision is for backend 'triton'"
        )
    if backend != "onnxruntime" and recipe.prefill != "shared":
        raise UsageError(f"prefill {recipe.prefill!r} is for backend 'onnxruntime', not {backend!r}")


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
