"""Imports point down: cli, workflow, api, then what api joins, then passes, then what they are made of."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ryzen_compile"

# From the top. A module may import from its own group and from those below. __init__ is the package's front door.
LAYERS = (
    ("cli", "__main__"),
    ("workflow",),
    ("__init__",),
    ("api", "compile_encoder"),
    ("capture", "capture_encoder", "pipeline", "backends", "runtime", "validate", "train"),
    ("report", "graphs"),
    ("passes",),
    ("encoder_source", "sentence_layout", "source", "calibration"),
    ("quantized_checkpoint", "bitnet_checkpoint", "ternary_linear", "safetensors_header"),
    ("edit", "verify", "probe", "interpret", "ops", "kernels", "program", "mask_spec", "row_shifts", "pooling"),
    ("numerics", "text", "timeline", "publish", "manifest", "spec", "shapes", "config", "settings", "recipe_file"),
    ("fields", "errors"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Narrower than the layers, each with its reason.
FORBIDDEN = {
    ("runtime", "backends"): "generation receives an engine, so that one loop serves every backend",
    ("runtime", "capture"): "generating needs no graph",
    ("runtime", "pipeline"): "generating needs no passes",
    ("runtime", "validate"): "measuring looks at generating, not the other way round",
}
LAZY = ("triton", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "transformers")


def sources() -> dict[str, Path]:
    """Module name to file, kernels/ under the name that it is installed as."""
    found = {}
    for directory, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / "kernels", f"{PACKAGE}.kernels")):
        for path in sorted(directory.rglob("*.py")):
            parts = path.relative_to(directory).with_suffix("").parts
            found[".".join((prefix, *(part for part in parts if part != "__init__")))] = path
    return found


SOURCES = sources()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imported(node: ast.AST, *, typing_only: bool = False) -> Iterator[tuple[str, bool]]:
    """(module, under TYPE_CHECKING) of every import below ``node``, those inside functions included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, typing_only) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import at line {child.lineno}"
            for alias in child.names:
                # "from package import x" means the module package.x where there is one.
                submodule = f"{child.module}.{alias.name}"
                yield (submodule if submodule in SOURCES else str(child.module)), typing_only
        else:
            yield from imported(child, typing_only=typing_only or is_type_checking(child))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def edges(*, typing: bool) -> dict[str, set[str]]:
    """Module to the modules of this package that it imports; ``typing`` counts those for annotations only as well."""
    return {
        module: {
            target for target, annotation in imported(tree(path)) if target in SOURCES and (typing or not annotation)
        }
        for module, path in SOURCES.items()
    }


def room(module: str) -> str:
    """The layer table's word for a module: its first name below the package."""
    return module.split(".")[1] if "." in module else "__init__"


def rank(module: str) -> int:
    """Distance from the top; a module without a layer, which has a test of its own, counts as lowest."""
    return RANK.get(room(module), RANK["errors"])


def python_files() -> list[Path]:
    directories = [ROOT / name for name in (PACKAGE, "kernels", "tests", "examples", "benchmarks")]
    return [path for directory in directories for path in sorted(directory.rglob("*.py"))]


def run(code: str) -> str:
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


def test_every_module_has_its_layer():
    homeless = sorted({room(module) for module in SOURCES} - RANK.keys())
    assert not homeless, f"put these into LAYERS, where they belong: {homeless}"


def test_imports_point_down():
    upward = [
        f"{module} imports {target}"
        for module, targets in edges(typing=True).items()
        for target in sorted(targets)
        if rank(target) < rank(module)
    ]
    assert not upward, "\n".join(upward)


def test_forbidden_neighbours():
    broken = [
        f"{module} imports {target}: {FORBIDDEN[room(module), room(target)]}"
        for module, targets in edges(typing=True).items()
        for target in sorted(targets)
        if (room(module), room(target)) in FORBIDDEN
    ]
    assert not broken, "\n".join(broken)


def test_a_backend_alone_knows_its_kernels():
    homes = {
        f"{PACKAGE}.kernels.cpu": f"{PACKAGE}.backends.onnxruntime",
        f"{PACKAGE}.kernels": f"{PACKAGE}.backends.triton",
    }
    outside = [
        f"{module} imports {target}"
        for module, targets in edges(typing=True).items()
        for target in targets
        if room(target) == "kernels"
        and room(module) != "kernels"
        and not module.startswith(next(home for kernels, home in homes.items() if target.startswith(kernels)))
    ]
    assert not outside


def test_no_import_cycles():
    graph = edges(typing=False)
    # A package that lists its parts is imported by Python before them; only imports written out count.
    try:
        TopologicalSorter({module: targets - {module} for module, targets in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(reversed(error.args[1])))


def test_no_assert_in_the_package():
    # python -O removes them, and what they checked with them.
    found = [
        f"{module}:{node.lineno}"
        for module, path in SOURCES.items()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Assert)
    ]
    assert not found


def test_nothing_imports_the_top_level_name_kernels():
    found = [
        str(path.relative_to(ROOT))
        for path in python_files()
        if any(target.split(".")[0] == "kernels" for target, _ in imported(tree(path)))
    ]
    assert not found


def test_asking_for_the_native_library_is_light():
    code = """
import sys, importlib.util
if importlib.util.find_spec("ryzen_compile.kernels"):
    import ryzen_compile.kernels.cpu
print(sorted({"numpy", "onnx", "onnxruntime", "torch"} & set(sys.modules)))
"""
    assert run(code) == "[]"


def test_package_import_is_light():
    loaded = run(f"import ryzen_compile, sys; print([name for name in {LAZY!r} if name in sys.modules])")
    assert loaded == "[]"


def test_help_does_not_import_torch():
    code = """
import sys
from ryzen_compile.cli import main
status = main(["--help"])
print(status, "torch" in sys.modules, "numpy" in sys.modules)
"""
    assert run(code).splitlines()[-1] == "0 False False"
