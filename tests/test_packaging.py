"""The distribution provides ryzen_compile and nothing else, kernels/ inside it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from ryzen_compile.kernels import cpu

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_listed(project):
    directories = {path.parent for path in (ROOT / "ryzen_compile").rglob("*.py")}
    found = {".".join(directory.relative_to(ROOT).parts) for directory in directories} | {"ryzen_compile.kernels"}
    found |= {
        ".".join(("ryzen_compile", *path.parent.relative_to(ROOT).parts)) for path in (ROOT / "kernels").rglob("*.py")
    }
    assert sorted(found) == project["tool"]["setuptools"]["packages"]


def test_every_package_directory_is_a_regular_package(project):
    mapping = project["tool"]["setuptools"]["package-dir"]
    for package in project["tool"]["setuptools"]["packages"]:
        name = next((package.replace(prefix, place) for prefix, place in mapping.items() if prefix in package), package)
        directory = ROOT / name.replace(".", "/")
        assert (directory / "__init__.py").is_file(), f"{package} has no __init__.py"


def test_kernels_are_installed_inside_the_package(project):
    setuptools = project["tool"]["setuptools"]
    assert setuptools["package-dir"] == {"ryzen_compile.kernels": "kernels"}
    assert {package.split(".")[0] for package in setuptools["packages"]} == {"ryzen_compile"}


def test_every_source_of_the_native_operators_is_listed(project):
    """Sources are built and, with what they include, go into a source distribution; the driver is a test's own."""
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    directory = ROOT / "kernels" / "cpu"

    def found(*patterns: str) -> list[str]:
        paths = {path for pattern in patterns for path in directory.glob(pattern) if not path.name.startswith("driver")}
        return sorted(path.relative_to(ROOT).as_posix() for path in paths)

    assert extension["sources"] == found("*.cpp")
    assert extension["depends"] == found("*.h", "*.inl")
    assert extension["name"] == "ryzen_compile.kernels.cpu._ryzen_cpu" and extension["optional"] is True


def test_an_install_is_repeated_when_a_source_of_the_native_operators_changes():
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    rule = next(line for line in lines if line.startswith("$(VENV)/.installed-%:"))
    assert "$(wildcard kernels/cpu/*.cpp kernels/cpu/*.h kernels/cpu/*.inl)" in rule


def test_typed_marker_ships(project):
    assert project["tool"]["setuptools"]["package-data"]["ryzen_compile"] == ["py.typed"]
    assert (ROOT / "ryzen_compile" / "py.typed").is_file()


def test_script_points_at_the_command_line(project):
    assert project["project"]["scripts"] == {"ryzen-compile": "ryzen_compile.cli:main"}


def test_constraints_pin_every_direct_dependency(project):
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(line.split("==")[0]): line for line in lines if line and not line.startswith("#")}
    assert all("==" in line for line in pins.values())
    tested = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["test"]
    for requirement in map(Requirement, tested):
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin.split("==")[1]), f"{pin} is outside {requirement}"


def test_an_installed_distribution_does_not_provide_kernels():
    try:
        distribution = importlib.metadata.distribution("ryzen-compile")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ryzen-compile is not installed here; make test installs it")
    top_level = (distribution.read_text("top_level.txt") or "").split()
    assert top_level == ["ryzen_compile"]
    # From elsewhere, so that the checkout's own directory is not what is found.
    code = "import importlib.util, ryzen_compile.kernels; print(importlib.util.find_spec('kernels') is None)"
    child = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=ROOT.anchor, capture_output=True, text=True, timeout=60, check=False
    )
    assert child.stdout.strip() == "True", child.stderr


def copied(target: Path) -> Path:
    """The project as an install sees it, and nothing that an earlier one left."""
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in ("ryzen_compile", "kernels"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return target


def wheel_names(project: Path, out: Path, **variables: str) -> list[str]:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(out), str(project)]
    built = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, **variables}
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


@pytest.mark.slow
def test_wheel_content(tmp_path):
    names = wheel_names(copied(tmp_path / "project"), tmp_path / "out")
    assert {name.split("/")[0] for name in names} == {"ryzen_compile", "ryzen_compile-0.1.0.dist-info"}
    assert {"ryzen_compile/kernels/__init__.py", "ryzen_compile/py.typed"} <= set(names)
    library = f"ryzen_compile/kernels/cpu/_ryzen_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert (library in names) == (shutil.which("g++") is not None and cpu.supported())
    assert not [name for name in names if name.endswith((".cpp", ".h", ".inl"))]


@pytest.mark.slow
def test_an_install_without_a_compiler_succeeds_without_native_operators(tmp_path):
    names = wheel_names(copied(tmp_path / "project"), tmp_path / "out", CC="/absent/cc", CXX="/absent/c++")
    assert "ryzen_compile/kernels/cpu/__init__.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_a_source_distribution_holds_the_sources_of_the_native_operators(project, tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = copied(tmp_path / "project")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    built = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    assert {*extension["sources"], *extension["depends"], "kernels/cpu/__init__.py"} <= names
