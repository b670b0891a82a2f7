"""What runs a Program: each backend states the operators it supports, whether it is available here, and compiles.

A backend's libraries are imported when the backend is asked for, so importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module

from ryzen_compile.backends.base import Backend, Capability
from ryzen_compile.errors import UsageError

# name -> module and class; written out, so that an unknown name can be answered with the known ones
CANDIDATES = {
    "eager": ("ryzen_compile.backends.eager", "EagerBackend"),
    "onnxruntime": ("ryzen_compile.backends.onnxruntime", "OnnxRuntimeBackend"),
    "triton": ("ryzen_compile.backends.triton", "TritonBackend"),
}


def get_backend(name: str) -> Backend:
    """The backend called ``name``, not probed yet; raises ``UsageError`` that lists the names on a miss."""
    if name not in CANDIDATES:
        raise UsageError(f"there is no backend {name!r}", hint=f"use one of {', '.join(CANDIDATES)}")
    module, attribute = CANDIDATES[name]
    backend: Backend = getattr(import_module(module), attribute)()
    return backend


__all__ = ["CANDIDATES", "Backend", "Capability", "get_backend"]
