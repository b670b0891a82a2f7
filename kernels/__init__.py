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

# File -> the operators whose launchers it holds, each under the operator's name.
LAUNCHERS = {
    "activation": ("activation", "gated_activation", "activation_backward", "gated_activation_backward"),
    "attention": ("attention",),
    "attention_backward": ("attention_backward",),
    "cached_attention": ("cached_attention", "cached_attention_inplace"),
    "embedding": ("codebook_embedding", "embedding_nbits"),
    "linear": ("linear_act", "gated_linear", "linear_nbits"),
    "linear_ternary": ("linear_ternary",),
    "loss": ("linear_cross_entropy", "linear_cross_entropy_grads", "linear_cross_entropy_backward"),
    "norm": ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"),
    "norm_backward": ("rms_norm_backward", "layer_norm_backward"),
    "rotary": ("rotary",),
}


def supported_ops() -> frozenset[str]:
    """The operators that have a kernel, as ``ryzen::rms_norm``."""
    return frozenset(f"ryzen::{name}" for names in LAUNCHERS.values() for name in names)


def probe(device: str = "cuda") -> tuple[str, str]:
    """What the Triton kernels lack on this machine, and what to do about it; two empty strings when they can run.

    ``device`` "cpu" asks for Triton's interpreter. Raises ``UsageError`` for one that is neither.
    """
    if device not in DEVICES:
        raise UsageError(f"device must be {' or '.join(DEVICES)}, got {device!r}")
    if sys.platform != "linux":
        return f"Triton is for Linux, this is {platform.system()}", ""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}", "pip install 'ryzen-compile[triton]'"
    return _lack_of_gpu() if device == "cuda" else _lack_of_interpreter()


def attach(device: str = "cuda") -> None:
    """Registers the Triton kernels with their operators of ``ryzen_compile.ops``, for tensors on ``device``.

    From then on, for the rest of the process, an operator called on such tensors runs its kernel. ``device`` is "cuda",
    or "cpu" for Triton's interpreter, which ``TRITON_INTERPRET=1`` in the environment of the process turns on. Raises
    ``UsageError`` for any other device, ``UnsupportedError`` where the kernels cannot run on it; the operators are left
    as they were.
    """
    lack, remedy = probe(device)
    if lack:
        raise UnsupportedError(f"Triton kernels cannot run on {device} here: {lack}", hint=remedy)
    import torch

    importlib.import_module("ryzen_compile.ops")  # defines the operators
    for file, names in LAUNCHERS.items():
        launchers = importlib.import_module(f"ryzen_compile.kernels.{file}")
        for name in names:
            torch.library.register_kernel(f"ryzen::{name}", device, getattr(launchers, name))


def _lack_of_gpu() -> tuple[str, str]:
    import torch

    if torch.cuda.is_available():
        return "", ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build for CPUs", "install a build of torch for the machine's GPU"
    return "torch finds no GPU", "see whether nvidia-smi lists one, and whether its driver is new enough for torch"


def _lack_of_interpreter() -> tuple[str, str]:
    from ryzen_compile.kernels import launch

    if launch.interpreted():
        return "", ""
    return "Triton's interpreter is off", "set TRITON_INTERPRET=1 in the environment of the process"
