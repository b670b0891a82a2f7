"""Asks an installed engine what it can do, in a process of its own: a broken native library takes down only the child.

Run as a script by :func:`probe`, it prints one JSON object. It imports nothing of this package, so that what it reports
is about the engine alone.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

Subject = Literal["onnxruntime", "gpu", "native"]


def probe(subject: Subject, *arguments: str, timeout: float = 60.0) -> dict[str, Any]:
    """What the child found, or ``{"error": why}`` when it could not be asked; never raises for the engine's sake."""
    # -P: the script's own directory stays off the path, or its neighbours would hide libraries of the same name.
    command = [sys.executable, "-P", "-W", "ignore", __file__, subject, *arguments]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout:.0f} s"}
    except OSError as error:
        return {"error": str(error)}
    if child.returncode < 0:
        return {"error": f"importing it ended in {signal.Signals(-child.returncode).name}"}
    if child.returncode or not child.stdout.strip():
        return {"error": (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
    return found


def _onnxruntime() -> dict[str, Any]:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    kernels = {(kernel.provider, kernel.domain, kernel.op_name) for kernel in native.get_all_opkernel_def()}
    return {
        "version": onnxruntime.__version__,
        "providers": onnxruntime.get_available_providers(),
        "group_query_attention": ("CPUExecutionProvider", "com.microsoft", "GroupQueryAttention") in kernels,
    }


def _native(library: str) -> dict[str, Any]:
    """Whether ONNX Runtime takes the operators in ``library``, and the instruction set that they would run on."""
    import ctypes

    import onnxruntime

    onnxruntime.SessionOptions().register_custom_ops_library(library)
    ask = ctypes.CDLL(library).RyzenBestIsa
    ask.restype = ctypes.c_char_p
    return {"version": onnxruntime.__version__, "isa": ask().decode()}


def _gpu() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"device": None, "triton": None}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found["device"] = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    try:
        import triton
    except ImportError:
        return found
    found["triton"] = triton.__version__
    return found


if __name__ == "__main__":
    questions: dict[str, Callable[..., dict[str, Any]]] = {
        "onnxruntime": _onnxruntime,
        "gpu": _gpu,
        "native": _native,
    }
    asked = questions[sys.argv[1]]
    sys.stdout.write(json.dumps(asked(*sys.argv[2:])) + "\n")
