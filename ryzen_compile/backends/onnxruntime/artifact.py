"""The artifact: a directory that this package, onnxruntime-genai and any plain ONNX Runtime can run.

``write`` fills a staging directory and publishes it whole, manifest last; ``read`` checks everything before a session
sees a byte of it. The layout is in ``ARCHITECTURE.md``.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from ryzen_compile.backends.onnxruntime import LIBRARY_NAME, MODEL_NAME, NATIVE_NAME, PREFILL_NAME
from ryzen_compile.backends.onnxruntime.artifact_check import check_encoder, check_model
from ryzen_compile.backends.onnxruntime.cache_file import CACHE_NAME, read_shifts, write_shifts
from ryzen_compile.backends.onnxruntime.encoding_files import Encoding, read_encoding, write_encoding
from ryzen_compile.backends.onnxruntime.genai import GENAI_CONFIG_NAME, genai_config, known_tokenizer_class
from ryzen_compile.backends.onnxruntime.native import write_native
from ryzen_compile.errors import ArtifactError, UsageError
from ryzen_compile.manifest import (
    MANIFEST_NAME,
    listed_files,
    read_manifest,
    shown,
    shown_path,
    verify_files,
    write_manifest,
)
from ryzen_compile.numerics.row_shift import RowShift
from ryzen_compile.numerics.rows import RowFormat
from ryzen_compile.publish import Staging
from ryzen_compile.spec import POOLING_MODES, CacheSlot, ModelSpec, Pooling, Task

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
REPORT_NAME = "report.json"
ELEMENTS = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
}
UNKNOWN_MOTION = "the artifact does not say how its keys are moved"
_PAST_KEY = re.compile(r"past_key_values\.(\d{1,6})\.key")


@dataclass(frozen=True)
class Companions:
    """What belongs to the model beside its graph. ``save_tokenizer`` writes the tokenizer's files into a directory."""

    config: Mapping[str, Any] | None = None
    generation_config: Mapping[str, Any] | None = None
    save_tokenizer: Callable[[Path], object] | None = None


@dataclass(frozen=True)
class Artifact:
    """A directory that has passed every check."""

    directory: Path
    spec: ModelSpec
    slots: tuple[CacheSlot, ...]
    manifest: Mapping[str, Any]
    motion: tuple[RowShift, ...] | str = UNKNOWN_MOTION
    config: Mapping[str, Any] | None = None
    generation_config: Mapping[str, Any] | None = None
    report: Mapping[str, Any] | None = field(default=None, repr=False)
    encoding: Encoding | None = None

    @property
    def stream(self) -> tuple[int, int] | None:
        """Window and sinks of an artifact that was made for endless sequences."""
        recipe = self.manifest.get("recipe")
        settings = recipe.get("kv") if isinstance(recipe, Mapping) else None
        if not isinstance(settings, Mapping) or settings.get("window") is None:
            return None
        window, sinks = settings["window"], settings.get("sinks")
        if type(window) is not int or type(sinks) is not int:
            raise ArtifactError(f"{self.directory.name}: the manifest's window is {window!r} and {sinks!r} sinks")
        return window, sinks

    @property
    def identity(self) -> str:
        """A digest of the model's files and its weights: what cached rows belong to."""
        files = {
            name: facts for name, facts in self.manifest["files"].items() if ".onnx" in name and name != NATIVE_NAME
        }
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

    @property
    def model(self) -> Path:
        return self.directory / MODEL_NAME

    @property
    def prefill(self) -> Path | None:
        """The model's second form, for prompts, when the artifact was made with one."""
        return self.directory / PREFILL_NAME if PREFILL_NAME in self.manifest["files"] else None


def write(
    out: Path,
    write_model: Callable[[Path], object],
    *,
    spec: ModelSpec,
    slots: tuple[CacheSlot, ...],
    motion: tuple[RowShift, ...] | str = UNKNOWN_MOTION,
    encoding: Encoding | None = None,
    facts: Mapping[str, Any],
    report: Any = None,
    companions: Companions | None = None,
    native: bool = False,
    force: bool = False,
) -> Path:
    """Publishes an artifact at ``out``; ``write_model(directory)`` writes ``model.onnx``, its data, and a second form.

    ``motion`` says how cached keys are moved, or why they cannot be. ``native`` adds the model over our own operators,
    which reads the same data, and their library; onnxruntime-genai then runs these. An encoder has an ``encoding`` in
    the place of caches and of what onnxruntime-genai reads.

    Raises ``UsageError``, ``ArtifactError``, ``BusyError`` or ``ResourceError`` as ``Staging`` does; whatever was at
    ``out`` before is then untouched.
    """
    companions = companions or Companions()
    with Staging(out, force=force) as stage:
        write_model(stage.path)
        if not isinstance(motion, str):
            write_shifts(stage.path, motion, slots)
        model = check_model(stage.path, MODEL_NAME)
        if native:
            write_native(model, stage.path / NATIVE_NAME, stage.path / LIBRARY_NAME)
        if encoding is None:
            _write_genai(stage.path, model, spec, slots, companions, native)
        else:
            write_encoding(stage.path, encoding, hidden=spec.hidden)
        if companions.config is not None:
            _dump(stage.path / CONFIG_NAME, companions.config)
        if companions.generation_config is not None:
            _dump(stage.path / GENERATION_CONFIG_NAME, companions.generation_config)
        if companions.save_tokenizer is not None:
            companions.save_tokenizer(stage.path)
            if encoding is None:
                _generalize_tokenizer(stage.path)
        if report is not None:
            _dump(stage.path / REPORT_NAME, report.to_json())
            (stage.path / "report.md").write_text(report.to_markdown(), encoding="utf-8")
            (stage.path / "report.html").write_text(report.to_html(), encoding="utf-8")
        content = {
            **facts,
            "spec": asdict(spec),
            "slots": [asdict(slot) for slot in slots],
        } | ({"motion": motion} if isinstance(motion, str) and encoding is None else {})
        return stage.commit(lambda directory: write_manifest(directory, content))


def copy(found: Artifact, out: Path, force: bool) -> None:
    """Publishes the files of an artifact that was read at ``out``; raises as ``write`` does."""
    with Staging(out, force=force) as stage:
        for name in (*found.manifest["files"], MANIFEST_NAME):
            target = stage.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.directory / name, target)
        stage.commit()


def read(directory: Path, *, digests: bool = True, task: Task | None = None) -> Artifact:
    """Checks the artifact at ``directory`` and returns what it says of itself.

    ``digests=False`` skips the SHA-256 of every file (sizes and structure are still checked). Raises ``ArtifactError``,
    ``TamperedError`` or ``UnsafeError``, and ``UsageError`` for an artifact that is not made for ``task``.
    """
    manifest = read_manifest(directory)
    spec = _spec_of(manifest, directory.name)
    made_to: Task = "generate" if spec.pooling is None else "embed"
    if task not in (None, made_to):
        raise UsageError(f"the artifact {shown_path(directory)} is made to {made_to}, not to {task}")
    verify_files(directory, manifest, digests=digests)
    listed = listed_files(manifest)
    models = [
        check_model(directory, name, listed=listed)
        for name in (MODEL_NAME, PREFILL_NAME)
        if name in listed or name == MODEL_NAME
    ]
    slots = slots_of(manifest)
    encoding = None
    if spec.pooling is not None:
        if slots:
            raise ArtifactError(f"{directory.name}: the manifest describes an encoder with a cache")
        for model in models:
            check_encoder(model.graph, spec.hidden)
        encoding = read_encoding(directory, spec, listed)
    else:
        for model in models:
            _check_described(model.graph, spec, slots)
    unknown = manifest.get("motion", UNKNOWN_MOTION)
    return Artifact(
        directory,
        spec,
        slots,
        manifest,
        read_shifts(directory, slots) if CACHE_NAME in listed else str(unknown),
        _load(directory / CONFIG_NAME),
        _load(directory / GENERATION_CONFIG_NAME),
        _load(directory / REPORT_NAME),
        encoding,
    )


def _spec_of(manifest: Mapping[str, Any], name: str) -> ModelSpec:
    """The model in numbers; raises ``ArtifactError``, which calls the artifact by its ``name``."""
    try:
        facts = dict(manifest["spec"])
        pooling = facts.pop("pooling", None)
        spec = ModelSpec(**facts, pooling=None if pooling is None else Pooling(**pooling))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{name}: the manifest does not describe the model: {error}") from error
    if spec.pooling is not None:
        known = spec.pooling.mode in POOLING_MODES and type(spec.pooling.normalize) is bool
        if not known or any(type(value) is not int or value < 1 for value in (spec.hidden, spec.vocab, spec.context)):
            raise ArtifactError(f"{name}: the manifest does not describe an encoder, but {shown(manifest['spec'])}")
    return spec


def slots_of(manifest: Mapping[str, Any]) -> tuple[CacheSlot, ...]:
    """The layout of an artifact's cache; raises ``ArtifactError``."""
    try:
        return tuple(_slot(facts) for facts in manifest["slots"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the manifest does not describe the model: {error}") from error


def _slot(facts: Mapping[str, Any]) -> CacheSlot:
    """Buffers are made from it: raises ``TypeError`` or ``ValueError`` for what is no slot."""
    slot = CacheSlot(**facts)
    for name, value in asdict(slot).items():
        if type(value) is not (str if name.endswith("_format") else int) or (isinstance(value, int) and value < 0):
            raise ValueError(f"a slot's {name} is {shown(value)}")
    for name, dim in ((slot.key_format, slot.head_dim), (slot.value_format, slot.value_dim)):
        form = RowFormat.parse(name)
        form.width(dim)
        if form.dtype not in ELEMENTS:
            raise ValueError(f"{name!r} is no cache format of an artifact")
    return slot


def _check_described(graph: GraphProto, spec: ModelSpec, slots: tuple[CacheSlot, ...]) -> None:
    """Buffers are made from the manifest and bound to the graph by address, so the two have to agree."""
    found = {
        value.name: (value.type.tensor_type.elem_type, [dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in (*graph.input, *graph.output)
        if value.name == "logits" or value.name.startswith("past_key_values.")
    }
    wanted: dict[str, tuple[int, dict[int, object]]] = {"logits": (TensorProto.FLOAT, {2: spec.vocab})}
    for index, slot in enumerate(slots):
        sides = (("key", slot.key_format, slot.head_dim), ("value", slot.value_format, slot.value_dim))
        for half, name, dim in sides:
            form = RowFormat.parse(name)
            sizes: dict[int, object] = {1: slot.kv_heads, 3: form.width(dim)}
            wanted[f"past_key_values.{index}.{half}"] = (ELEMENTS[form.dtype], sizes)
    for name in sorted({*found, *wanted}):
        if name not in wanted:
            raise ArtifactError(f"{name} is not in the manifest, the graph has {found[name]}", hint="export it again")
        kind, sizes = wanted[name]
        has, shape = found.get(name, (0, []))
        if has != kind or any(i >= len(shape) or shape[i] != size for i, size in sizes.items()):
            raise ArtifactError(
                f"{name} should have {list(sizes.values())} of type {kind} by the manifest, the graph has "
                f"{shape or 'none'} of type {has}",
                hint="export it again",
            )
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            _check_window(node, slots)


def _check_window(node: NodeProto, slots: tuple[CacheSlot, ...]) -> None:
    """An attention drops old rows by itself if and only if its buffers are made for that."""
    past = _PAST_KEY.fullmatch(node.input[3]) if len(node.input) > 3 else None
    if past is None or int(past[1]) >= len(slots):
        raise ArtifactError(f"attention {shown(node.name)} reads no cache of the manifest", hint="export it again")
    facts = {attribute.name: attribute.i for attribute in node.attribute}
    window = facts.get("local_window_size", -1) if facts.get("sliding_window_cache", 0) else 0
    slot = slots[int(past[1])]
    if window != slot.window:
        raise ArtifactError(
            f"layer {slot.layer} keeps a window of {window} tokens in the graph, of {slot.window} by the manifest",
            hint="export it again",
        )


def _write_genai(
    directory: Path,
    model: ModelProto,
    spec: ModelSpec,
    slots: Sequence[CacheSlot],
    companions: Companions,
    native: bool,
) -> None:
    """What onnxruntime-genai reads."""
    inputs = [value.name for value in model.graph.input]
    generation = dict(companions.generation_config or {})
    special = {
        k: _first_known(k, generation, companions.config) for k in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    window = max((slot.window for slot in slots), default=0)
    described = genai_config(
        spec,
        inputs=inputs,
        generation=generation,
        window=window,
        filename=NATIVE_NAME if native else MODEL_NAME,
        operators=LIBRARY_NAME if native else None,
        **special,
    )
    _dump(directory / GENAI_CONFIG_NAME, described)


def _generalize_tokenizer(directory: Path) -> None:
    """Names a class that genai knows in ``tokenizer_config.json``, where ``tokenizer.json`` holds the tokenizer."""
    path = directory / "tokenizer_config.json"
    settings = _load(path)
    if settings is None or not (directory / "tokenizer.json").exists():
        return
    name = known_tokenizer_class(settings.get("tokenizer_class"))
    if settings.get("tokenizer_class") != name:
        _dump(path, {**settings, "tokenizer_class": name})


def _first_known(name: str, *sources: Mapping[str, Any] | None) -> Any:
    return next((s[name] for s in sources if s and s.get(name) is not None), None)


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")


def _load(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path.name} holds a {type(value).__name__}, expected an object")
    return value
