"""Our own operators: whether they can be had here, how a session of a claimed model is made, and what others need."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx import ModelProto

from ryzen_compile.backends.onnxruntime.artifact_check import check_model
from ryzen_compile.backends.onnxruntime.claim import claim
from ryzen_compile.backends.onnxruntime.claim_report import ClaimReport
from ryzen_compile.backends.onnxruntime.resident import release
from ryzen_compile.errors import UnsupportedError

if TYPE_CHECKING:
    import onnxruntime

SLOWEST = "scalar"  # the instruction set of the references, which no session is to run on unasked
INITIALIZERS = "session.model_external_initializers_file_folder_path"


def library() -> Path | None:
    """The operator library that ONNX Runtime is to load; None where there is none."""
    try:
        from ryzen_compile.kernels import cpu
    except ImportError:  # a checkout that is not installed keeps the package's kernels elsewhere
        return None
    return cpu.library()


def best_isa() -> str:
    """The best instruction set that the library has for this processor; empty without a library."""
    from ryzen_compile.kernels import cpu

    return cpu.isa() if library() is not None else ""


def missing() -> tuple[str, str]:
    """Why there is no library and what to do about it, both empty when there is one."""
    try:
        from ryzen_compile.kernels import cpu
    except ImportError:
        return "ryzen-compile runs from a checkout that is not installed", "pip install -e ."
    return cpu.reason(), cpu.REMEDY if cpu.library() is None and cpu.supported() else ""


def unusable(isa: str = "auto") -> str:
    """Why sessions run on ONNX Runtime's operators alone when nobody asks for others; empty when they need not.

    Warns of a library that is there and broken: unlike a missing one, that is nobody's choice.
    """
    if library() is None:
        return missing()[0]
    try:
        best = best_isa()
    except UnsupportedError as error:
        warnings.warn(f"stock operators are used instead of native ones: {error.message}", stacklevel=2)
        return error.message
    if isa == "auto" and best == SLOWEST:
        return "this processor has none of the instruction sets that they are written for (AVX2 at least)"
    return ""


def required() -> Path:
    """The library; raises ``UnsupportedError`` that says why there is none and what to do."""
    built = library()
    if built is None:
        why, hint = missing()
        raise UnsupportedError(f"there are no native operators: {why}", hint=hint)
    return built


def open_claimed(
    path: Path,
    options: onnxruntime.SessionOptions,
    kinds: frozenset[str],
    isa: str,
    model: ModelProto | None = None,
) -> tuple[Any, ClaimReport]:
    """A session of the model at ``path`` in which our operators of the ``kinds`` given do what they can.

    ``model`` is what became of the checked file in memory. Without it the file is checked once more: what is rewritten
    has to be what was checked. Raises what ``check_model`` and ONNX Runtime raise, and ``UnsupportedError`` without a
    library.
    """
    built = required()
    model, report = claim(model or check_model(path.parent, path.name), kinds=kinds, isa=isa)
    options.register_custom_ops_library(str(built))
    session = open_model(model, path.parent, options)
    # Products have packed what they need of these; what others read comes back from the page cache.
    release(
        {
            path.parent / entry.value
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
    )
    return session, report


def open_model(model: ModelProto, directory: Path, options: onnxruntime.SessionOptions) -> Any:
    """A session of a checked model in memory whose external data lie in ``directory``. Raises what ONNX Runtime
    raises."""
    import onnxruntime

    options.add_session_config_entry(INITIALIZERS, str(directory.resolve()))
    # Without enable_fallback=0 a failure is printed and tried once more, on the same provider.
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
    )


def claimed(path: Path) -> ClaimReport:
    """What would run on our operators if the model at ``path`` were loaded here."""
    why = unusable()
    return ClaimReport(reason=why) if why else claim(check_model(path.parent, path.name))[1]


def write_native(model: ModelProto, path: Path, operators: Path) -> ClaimReport:
    """Writes the checked ``model`` over our operators to ``path``, their library to ``operators``: for other runtimes.

    It reads the same external data, beside it. The library chooses the instruction set where it runs.
    """
    built = required()
    rewritten, report = claim(model)
    path.write_bytes(rewritten.SerializeToString(deterministic=True))
    shutil.copyfile(built, operators)
    return report
