"""The operators under AddressSanitizer and UndefinedBehaviorSanitizer, in a program that plays ONNX Runtime.

What the program checks stands in kernels/cpu/driver; here it is built and run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ryzen_compile.kernels import cpu

FLAGS = (
    *("-std=c++17", "-ffp-contract=off", "-O1", "-g1", "-Wall", "-Wextra", "-pthread"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    # A null pointer or an object too small is AddressSanitizer's to find as well; checks for them in front of every
    # vector load double the time to compile.
    "-fno-sanitize=null,object-size,alignment",
)
AT_ONCE = 2  # compilers: each of them takes up to half a gigabyte
OPERATORS = (
    "SkipRMSNorm",
    "SkipLayerNorm",
    "CodebookEmbedding",
    "GroupQueryAttention",
    "MatMulNBits",
    "MatMulTernary",
)


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A C++ compiler that has both sanitizers."""
    if not cpu.supported():
        pytest.skip("the native operators are for x86-64 Linux")
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("g++")
    if found is None:
        pytest.skip("there is no C++ compiler")
    directory = tmp_path_factory.mktemp("compiler")
    (directory / "probe.cpp").write_text("int main() { return 0; }\n")
    probe = subprocess.run(
        [found, *FLAGS, "probe.cpp", "-o", "probe"], cwd=directory, capture_output=True, text=True, check=False
    )
    if probe.returncode != 0 or subprocess.run([directory / "probe"], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{found} does not make programs with sanitizers that run: {probe.stderr.strip()[-200:]}")
    return found


@pytest.fixture(scope="session")
def driver(compiler: str, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built program."""
    sources = repository / "kernels" / "cpu"
    directory = tmp_path_factory.mktemp("driver")

    def compiled(source: Path) -> Path:
        made = directory / f"{source.parent.name}_{source.stem}.o"
        command = [compiler, *FLAGS, "-c", str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{source.name} does not compile:\n{done.stderr[-4000:]}"
        return made

    # Large files first, so that none is left for the end.
    files = sorted((*sources.glob("*.cpp"), *sources.glob("driver/*.cpp")), key=lambda file: -file.stat().st_size)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        objects = list(pool.map(compiled, files))
    program = directory / "driver"
    linked = subprocess.run(
        [compiler, *FLAGS, *map(str, objects), "-o", str(program)], capture_output=True, text=True, check=False
    )
    assert linked.returncode == 0, linked.stderr[-4000:]
    return program


def test_nothing_is_found(driver: Path) -> None:
    done = subprocess.run([driver], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    for name in OPERATORS:
        assert any(name in line and "runs" in line for line in done.stdout.splitlines()), f"{name} was not run"
