"""ryzen_compile: a transformer in, a checked chain of graph passes, a faster model out.

    import ryzen_compile

    model = ryzen_compile.optimize("path/to/model")  # or a transformers model, or a plain decoder
    model.generate(ids, max_new_tokens=64)
    model.save_pretrained("artifact")                # runs in any ONNX Runtime; load() brings it back

The names below are loaded when they are first used: importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ryzen_compile import errors
    from ryzen_compile.api import load, optimize
    from ryzen_compile.capture import capture
    from ryzen_compile.config import RECIPES, Recipe
    from ryzen_compile.passes.base import NoMatch, Pass, PassResult, RewritePass
    from ryzen_compile.pipeline import default_passes
    from ryzen_compile.runtime.compiled import CompiledModel

_HOMES = {
    "CompiledModel": "runtime.compiled",
    "NoMatch": "passes.base",
    "Pass": "passes.base",
    "PassResult": "passes.base",
    "RECIPES": "config",
    "Recipe": "config",
    "RewritePass": "passes.base",
    "capture": "capture",
    "default_passes": "pipeline",
    "errors": "",
    "load": "api",
    "optimize": "api",
}

__all__ = [
    "RECIPES",
    "CompiledModel",
    "NoMatch",
    "Pass",
    "PassResult",
    "Recipe",
    "RewritePass",
    "capture",
    "default_passes",
    "errors",
    "load",
    "optimize",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'ryzen_compile' has no attribute {name!r}")
    home = _HOMES[name]
    value = import_module(f"ryzen_compile.{home or name}")
    if home:
        value = getattr(value, name)
    globals()[name] = value  # also over a submodule of the same name
    return value


def __dir__() -> list[str]:
    return __all__
