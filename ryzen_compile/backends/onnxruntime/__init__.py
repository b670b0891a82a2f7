"""The ONNX Runtime backend: a Program becomes ``model.onnx`` plus ``model.onnx.data``, and a session that runs them."""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ryzen_compile.backends.base import Capability
from ryzen_compile.errors import UsageError

if TYPE_CHECKING:  # a Program needs torch, and a session ONNX Runtime: each is imported by the method that uses it
    from ryzen_compile.backends.onnxruntime.emit import LoweringOptions
    from ryzen_compile.backends.onnxruntime.encoder_session import OrtEncoder
    from ryzen_compile.backends.onnxruntime.session import OrtEngine, SessionOptions
    from ryzen_compile.program import Program

MODEL_NAME = "model.onnx"
PREFILL_NAME = "prefill.onnx"
NATIVE_NAME = "model.native.onnx"  # over our own operators, for other runtimes; never read here
LIBRARY_NAME = "libryzen_cpu.so"  # these operators
REQUIRED = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
# Written out, so that asking for it imports nothing; a test compares it with the rules.
SUPPORTED = frozenset(
    f"ryzen::{name}"
    for name in (
        "activation",
        "add_layer_norm",
        "add_rms_norm",
        "attention",
        "cached_attention",
        "codebook_embedding",
        "embedding_nbits",
        "gated_activation",
        "gated_linear",
        "layer_norm",
        "linear_act",
        "linear_nbits",
        "linear_ternary",
        "rms_norm",
        "rotary",
        "sparsify",
        "sparsify_topk",
    )
)


class OnnxRuntimeBackend:
    """Runs on any CPU that ONNX Runtime supports."""

    name = "onnxruntime"
    supported_ops = SUPPORTED
    cache_formats = frozenset({"fp32", "int8", "int4", "auto"})
    evicts = True

    def probe(self) -> Capability:
        versions = []
        for name in REQUIRED:
            try:
                versions.append(f"{name} {importlib.import_module(name).__version__}")
            except ImportError as error:
                return Capability(False, f"{name} cannot be imported: {error}", f"pip install {name.replace('_', '-')}")
        return Capability(True, ", ".join(versions))

    def compile(
        self,
        program: Program,
        *,
        directory: Path | None = None,
        options: SessionOptions | None = None,
        lowering: LoweringOptions | None = None,
    ) -> OrtEngine | OrtEncoder:
        """Writes the model into ``directory`` and opens it there.

        Without a directory the files live in a temporary one for as long as the engine does. Raises as ``write`` does.
        """
        if directory is not None:
            self.write(program, directory, lowering)
            return self.open(directory, program, options)
        temporary = tempfile.TemporaryDirectory(prefix="ryzen_compile-")
        try:
            self.write(program, Path(temporary.name), lowering)
            engine = self.open(Path(temporary.name), program, options)
        except BaseException:
            temporary.cleanup()
            raise
        engine.keep(temporary)
        return engine

    def open(self, directory: Path, program: Program, options: SessionOptions | None = None) -> OrtEngine | OrtEncoder:
        """The engine over what ``write`` left in ``directory``."""
        from ryzen_compile.backends.onnxruntime import encoder_session, lowering, session

        prefill = directory / PREFILL_NAME
        if program.spec.pooling is not None:
            return encoder_session.OrtEncoder(
                directory / MODEL_NAME,
                program.spec,
                options or session.SessionOptions(),
                prefill if prefill.exists() else None,
            )
        return session.OrtEngine(
            directory / MODEL_NAME,
            program.spec,
            lowering.cache_slots(program.slots),
            options or session.SessionOptions(),
            prefill if prefill.exists() else None,
        )

    def write(self, program: Program, directory: Path, options: LoweringOptions | None = None) -> Path:
        """Writes ``model.onnx`` and its data into the existing ``directory``; returns the model's path.

        With ``options.wide_prompts``, and for an encoder with integer weights, also ``prefill.onnx``, the form for many
        rows; what both read is stored once. Raises ``UsageError`` for a decoder without a cache and
        ``UnsupportedError``, by node and module path, for what cannot be lowered.
        """
        from ryzen_compile.backends.onnxruntime import lowering
        from ryzen_compile.backends.onnxruntime.emit import LoweringOptions
        from ryzen_compile.backends.onnxruntime.weights_file import WeightsFiles

        encodes = program.spec.pooling is not None
        if not program.slots and not encodes:
            raise UsageError("the Program has no key/value cache", hint="run insert_kv_cache first")
        options = options or LoweringOptions()
        files = WeightsFiles(directory)
        path = files.write(lowering.lower(program, replace(options, wide_prompts=False)), MODEL_NAME)
        if options.wide_prompts or (encodes and "ryzen.linear_nbits" in program.ops()):
            files.write(lowering.lower(program, replace(options, wide_prompts=True)), PREFILL_NAME)
        return path
