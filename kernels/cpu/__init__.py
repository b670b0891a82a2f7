"""The native operators for ONNX Runtime on x86-64: where the built library is, or why there is none.

The library is C++ (its sources stand beside this file) and is loaded by ONNX Runtime, never imported. Installing the
package builds it where there is a compiler.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import sysconfig
from pathlib import Path

from ryzen_compile.errors import UnsupportedError

NAME = "_ryzen_cpu"
REMEDY = "install g++ 11 or newer and install ryzen-compile again"


def library() -> Path | None:
    """The library that was built for this interpreter, or None; ``reason`` then says why."""
    built = Path(__file__).with_name(NAME + str(sysconfig.get_config_var("EXT_SUFFIX")))
    return built if supported() and built.is_file() else None


def supported() -> bool:
    """Whether the library can be built for this system at all."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def reason() -> str:
    """Why there is no library, in words; empty when there is one."""
    if library() is not None:
        return ""
    if not supported():
        return f"they are for x86-64 Linux, this is {platform.system()} on {platform.machine()}"
    return "they were not built: there was no C++ compiler when ryzen-compile was installed, or it failed"


def isa() -> str:
    """The best instruction set for them on this processor: avx512_vnni, avx2_vnni, avx2 or scalar.

    Raises ``UnsupportedError`` when there is no library, or when it cannot be loaded.
    """
    found = library()
    if found is None:
        raise UnsupportedError(f"there are no native operators: {reason()}", hint=REMEDY if supported() else "")
    try:
        ask = ctypes.CDLL(str(found)).RyzenBestIsa
    except (OSError, AttributeError) as error:
        raise UnsupportedError(f"{found} cannot be used: {error}", hint="install ryzen-compile again") from error
    ask.restype = ctypes.c_char_p
    return str(ask().decode())
