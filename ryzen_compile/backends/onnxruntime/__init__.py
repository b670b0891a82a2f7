"""The ONNX Runtime backend: a Program becomes ``model.onnx`` plus ``model.onnx.data``, and a session that runs them."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ryzen_compile.backends.base import Capability
from ryzen_compile.errors import UsageError

if TYPE_CHECKING:  # a Program needs torch, and a session ONNX Runtime: each is imported by the method that uses it
    from ryzen_compile.backends.onnxruntime.session import OrtEngine, SessionOptions
    from ryzen_compile.program import Program

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
        "gated_linear",
        "layer_norm",
        "linear_act",
        "rms_norm",
        "rotary",
    )
)


class OnnxRuntimeBackend:
    """Runs on any CPU that ONNX Runtime supports."""

    name = "onnxruntime"
    supported_ops = SUPPORTED

    def probe(self) -> Capability:
        versions = []
        for name in REQUIRED:
            try:
                versions.append(f"{name} {importlib.import_module(name).__version__}")
            except ImportError as error:
                return Capability(False, f"{name} cannot be imported: {error}", f"pip install {name.replace('_', '-')}")
        return Capability(True, ", ".join(versions))

    def compile(
        self, program: Program, *, directory: Path | None = None, options: SessionOptions | None = None
    ) -> OrtEngine:
        """Writes the model into ``directory`` and opens it there.

        Without a directory the files live in a temporary one for as long as the engine does. Raises as ``write`` does.
        """
        from ryzen_compile.backends.onnxruntime import lowering, session

        options = options or session.SessionOptions()
        slots = lowering.cache_slots(program.slots)
        if directory is not None:
            return session.OrtEngine(self.write(program, directory), program.spec, slots, options)
        temporary = tempfile.TemporaryDirectory(prefix="ryzen_compile-")
        try:
            engine = session.OrtEngine(self.write(program, Path(temporary.name)), program.spec, slots, options)
        except BaseException:
            temporary.cleanup()
            raise
        engine.keep(temporary)
        return engine

    def write(self, program: Program, directory: Path) -> Path:
        """Writes ``model.onnx`` and ``model.onnx.data`` into the existing ``directory``; returns the model's path.

        Raises ``UsageError`` for a Program without a cache and ``UnsupportedError``, by node and module path, for what
        cannot be lowered.
        """
        from ryzen_compile.backends.onnxruntime import fold, lowering

        if not program.slots:
            raise UsageError("the Program has no key/value cache", hint="run insert_kv_cache first")
        fold.write(lowering.lower(program), directory)
        return directory / "model.onnx"
