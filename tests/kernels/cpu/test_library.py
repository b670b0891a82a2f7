"""Where the library has to be: every other test of it is skipped without one, so one has to fail."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from ryzen_compile.kernels import cpu

OLDEST = 11  # of g++


def test_an_install_with_a_compiler_built_the_library() -> None:
    compiler = shutil.which("g++")
    if not cpu.supported() or compiler is None:
        pytest.skip("nothing to build it for, or with")
    told = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=True).stdout
    if int(told.split(".")[0]) < OLDEST:
        pytest.skip(f"g++ {told.strip()} is too old")
    assert cpu.library() is not None, f"{cpu.reason()}; pip install -v -e . shows why"
    assert cpu.isa() in ("scalar", "avx2", "avx2_vnni", "avx512_vnni")
