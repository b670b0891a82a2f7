"""The distribution provides ryzen_compile and nothing else, kernels/ inside it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

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
        directory = ROOT / mapping.get(package, package.replace(".", "/"))
        assert (directory / "__init__.py").is_file(), f"{package} has no __init__.py"


def test_kernels_are_installed_inside_the_package(project):
    setuptools = project["tool"]["setuptools"]
    assert setuptools["package-dir"] == {"ryzen_compile.kernels": "kernels"}
    assert {package.split(".")[0] for package in setuptools["packages"]} == {"ryzen_compile"}


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


@pytest.mark.slow
def test_wheel_content(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"ryzen_compile", "ryzen_compile-0.1.0.dist-info"}
    assert {"ryzen_compile/kernels/__init__.py", "ryzen_compile/py.typed"} <= set(names)
