"""Kernels, installed as ``ryzen_compile.kernels``: Triton's for GPUs, and in ``cpu`` the native ones for ONNX Runtime.

The directory stands at the top of the repository, where people look for kernels. The import name ``kernels`` however
belongs to another package: nothing imports it so, and no installed distribution of this project provides it.

Triton kernels are one file per noun, as in ``ryzen_compile.ops``, and attach to the operators from outside. Importing
this package imports neither Triton nor torch.
"""

from __future__ import annotations

import importlib
import platform
import sys

from ryzen_compile.errors import UnsupportedError, UsageError

DEVICES = ("cuda", "cpu")


def probe() -> tuple[str, str]:
    """What the Triton kernels lack on this machine, and what to do about it; two empty strings when they can run."""
    if sys.platform != "linux":
        return f"Triton is for Linux, this is {platform.system()}", ""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}", "pip install 'ryzen-compile[triton]'"
    import torch

    if torch.cuda.is_available():
        return "", ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build for CPUs", "install a build of torch for the machine's GPU"
    return "torch finds no GPU", "see whether nvidia-smi lists one, and whether its driver is new enough for torch"


def attach(device: str = "cuda") -> None:
    """Registers the Triton kernels with their operators of ``ryzen_compile.ops``, for tensors on ``device``.

    From then on, for the rest of the process, an operator called on such tensors runs its kernel. ``device`` is "cuda",
    or "cpu" for Triton's interpreter, which ``TRITON_INTERPRET=1`` in the environment of the process turns on. Raises
    ``UsageError`` for any other device, ``UnsupportedError`` where the kernels cannot run on it; the operators are left
    as they were.
    """
    if device not in DEVICES:
        raise UsageError(f"device must be {' or '.join(DEVICES)}, got {device!r}")
    lack, remedy = probe() if device == "cuda" else _probe_interpreter()
    if lack:
        raise UnsupportedError(f"Triton kernels cannot run on {device} here: {lack}", hint=remedy)
    from ryzen_compile import ops
    from ryzen_compile.kernels import embedding

    ops.codebook_embedding.register_kernel(device, embedding.codebook_embedding)


def _probe_interpreter() -> tuple[str, str]:
    """As ``probe``, for Triton's interpreter."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}", "pip install 'ryzen-compile[triton]'"
    from ryzen_compile.kernels import embedding

    if embedding.interpreted():
        return "", ""
    return "Triton's interpreter is off", "set TRITON_INTERPRET=1 in the environment of the process"
