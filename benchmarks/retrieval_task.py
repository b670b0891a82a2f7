"""Code search over the standard library of the Python that runs this: sentences of docstrings find their functions.

The corpus is every function and method as source text, all docstrings in it removed. A query is the first sentence of
a docstring, and what is relevant to it is the one function that it was taken from: where two functions share a
sentence it asks for neither, and of functions with the same text one is kept. Top-level modules are either trained on
or tested on, packages as a whole.

``train/pairs.py`` cuts such pairs, too, to train on: of any documents, leaving out functions that have no sentence or
whose docstring shares a line with code. Here every function is to be found.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
QUERY_WORDS = 4  # that a sentence has at least
TEST_SHARE = 3  # one in so many top-level modules is tested on
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Function:
    """``name`` is module and line; ``query`` is empty where there is no sentence that asks for this one alone."""

    name: str
    text: str
    query: str
    is_test: bool


def read_functions(modules: Sequence[str] = ()) -> list[Function]:
    """The whole library in the order of its files, or the modules that are named."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Function] = {}
    for path in [root / module for module in modules] or sorted(root.rglob("*.py")):
        module = path.relative_to(root)
        if not LEFT_OUT & set(module.parts):
            for function in _functions(path.read_text(encoding="utf-8", errors="replace"), module):
                found.setdefault(function.text, function)
    counts = Counter(function.query for function in found.values())
    return [
        function if counts[function.query] == 1 else Function(function.name, function.text, "", function.is_test)
        for function in found.values()
    ]


def is_tested(module: Path) -> bool:
    """Whether ``module``, relative to the library, is kept from training: by the digest of its top-level name."""
    return hashlib.sha256(module.parts[0].removesuffix(".py").encode()).digest()[0] % TEST_SHARE == 0


def _functions(source: str, module: Path) -> Iterator[Function]:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # files that show how a compiler fails
        return
    lines = source.encode().splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            query = first_sentence(ast.get_docstring(node) or "")
            yield Function(
                f"{module.as_posix()}:{node.lineno}", _without_docstrings(lines, node), query, is_tested(module)
            )


def first_sentence(docstring: str) -> str:
    """In one line; empty when it has fewer than ``QUERY_WORDS`` words."""
    sentence = " ".join(re.split(r"(?<=[.!?])\s|\n\s*\n", docstring.strip())[0].split())
    return sentence if len(sentence.split()) >= QUERY_WORDS else ""


def _without_docstrings(lines: list[bytes], function: ast.AST) -> str:
    """The function's source, less the docstrings of it and of what is defined in it."""
    kept = {number: lines[number - 1] for number in range(function.lineno, function.end_lineno + 1)}
    for node in ast.walk(function):
        if isinstance(node, DEFINITIONS) and ast.get_docstring(node, clean=False) is not None:
            string = node.body[0]
            before, after = kept[string.lineno][: string.col_offset], kept[string.end_lineno][string.end_col_offset :]
            for number in range(string.lineno, string.end_lineno + 1):
                kept[number] = b""
            kept[string.lineno] = before.rstrip() + after if before.strip() else after.lstrip()
    return textwrap.dedent(b"".join(kept.values()).decode(errors="replace")).strip()
