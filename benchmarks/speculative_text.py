"""Prompts for the benchmark of speculative decoding, and the corpus that drafts may come from.

Prompts are made of the standard-library modules held out from the training of ``examples/tiny-python-lm``, the corpus
of those it was trained on, both of the Python that runs this. What is held out, the training script says.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ryzen_compile.train.config import read_config
from ryzen_compile.train.documents import read_corpus

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-python-lm"
TRAINING = ROOT / "examples" / "configs" / "tiny-python-lm.yaml"
BEGINNING, MOST = 256, 400  # tokens of a file's beginning, and of any other prompt
WINDOW, FOLLOWING, MATCH = 256, 128, 4  # tokens of a window and behind it, and of what repeats in them
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Prompt:
    kind: str
    name: str
    ids: list[int]


@cache
def sources() -> tuple[dict[str, str], dict[str, str]]:
    """The held-out modules and those of the training, text by path, chosen as in training."""
    corpus = read_corpus(read_config(TRAINING).data)
    held, trained = ({document.name: document.text for document in part} for part in (corpus.validation, corpus.train))
    return held, trained


def corpus_documents(encode: Encode, tokens: int, seed: int = 0) -> list[list[int]]:
    """Files of the training, whole, in random order until there are ``tokens`` tokens of them."""
    texts = list(sources()[1].values())
    random.Random(seed).shuffle(texts)
    documents: list[list[int]] = []
    left = tokens
    for text in texts:
        if left <= 0:
            break
        documents.append(encode(text))
        left -= len(documents[-1])
    return documents


def pieces(encode: Encode, count: int, shortest: int, longest: int, seed: int = 0) -> list[list[int]]:
    """``count`` pieces of the held-out modules, of ``shortest`` to ``longest`` tokens, all lengths alike."""
    choose = random.Random(seed)
    files = [encode(text) for text in sources()[0].values()]
    found = []
    for number in range(count):
        length = shortest + number * (longest - shortest) // max(count - 1, 1)
        ids = choose.choice([file for file in files if len(file) > length])
        start = choose.randrange(len(ids) - length)
        found.append(ids[start : start + length])
    return found


def prompts(encode: Encode, count: int) -> list[Prompt]:
    """``count`` of each kind."""
    held = sources()[0]
    return [*completions(held, encode, count), *edits(held, encode, count), *repetitions(held, encode, count)]


def completions(held: dict[str, str], encode: Encode, count: int) -> list[Prompt]:
    """Beginnings: of the modules, and, as there are few of those, of their classes and longer functions."""
    found = [Prompt("completion", name, encode(text)[:BEGINNING]) for name, text in held.items()]
    for name, text in held.items():
        lines = text.splitlines(keepends=True)
        starts = [n.lineno for n in ast.parse(text).body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
        parts = ((start, encode("".join(lines[start - 1 :]))[:BEGINNING]) for start in starts)
        found += [Prompt("completion", f"{name}:{start}", ids) for start, ids in parts if len(ids) == BEGINNING]
    modules = len(held)
    return found[: min(modules, count)] + _spread(found[modules:], count - modules)


def edits(held: dict[str, str], encode: Encode, count: int) -> list[Prompt]:
    """A function, what is to change in it, and the first line of the changed one, which is then to be written."""
    found: list[Prompt] = []
    for name, node, source in _functions(held):
        own = [a.arg for a in node.args.args if a.arg not in ("self", "cls") and len(a.arg) > 2]
        old = own[0] if own else node.name
        copied = source.replace(f"def {node.name}", f"def copy_{node.name}")
        task, written = [
            (f"# The same function with {old} renamed to new_{old}.", re.sub(rf"\b{old}\b", f"new_{old}", source)),
            ("# The same function again, with a comment.", source),
            (f"# A copy of {node.name} for another class.", copied),
        ][len(found) % 3]
        begun = "".join(written.splitlines(keepends=True)[:2])
        ids = encode(f"{source}\n\n{task}\n{begun}")
        if 80 <= len(ids) <= MOST:
            found.append(Prompt("editing", f"{name}:{node.name}", ids))
    return _spread(found, count)


def repetitions(held: dict[str, str], encode: Encode, count: int) -> list[Prompt]:
    """Blocks that follow a pattern: half are made of the modules' names, half are what repeats itself most in them."""
    made = [
        Prompt("repetitive", f"{name}:{kind}", encode(text)) for name, kind, text in _patterns(held) if len(text) > 200
    ]
    made = [prompt for prompt in made if len(prompt.ids) <= MOST]
    windows = []
    for name, text in held.items():
        ids = encode(text)
        for start in range(0, len(ids) - WINDOW - FOLLOWING, WINDOW + FOLLOWING):
            part = ids[start : start + WINDOW + FOLLOWING]
            prompt = Prompt("repetitive", f"{name}@{start}", part[:WINDOW])
            windows.append((_repeated(part), prompt))
    windows.sort(key=lambda scored: -scored[0])
    return _spread(made, count - count // 2) + [prompt for _, prompt in windows[: count // 2]]


def _repeated(part: list[int]) -> float:
    """The share of the last ``FOLLOWING`` tokens that end a run of ``MATCH`` which stands before them."""
    seen: set[tuple[int, ...]] = set()
    hits = 0
    for end in range(MATCH, len(part) + 1):
        run = tuple(part[end - MATCH : end])
        hits += end > WINDOW and run in seen
        seen.add(run)
    return hits / FOLLOWING


def _patterns(held: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Fields, tests and tables over the names of each module; the last block is only begun."""
    blocks = {
        "fields": "        self.{0} = {0}\n",
        "properties": "    @property\n    def {0}(self):\n        return self._{0}\n\n",
        "tests": "    def test_{0}(self):\n        self.assertEqual(self.module.{0}.__name__, '{0}')\n\n",
        "table": "    ('{0}', 'the {0} of the module', None),\n",
    }
    heads = {"table": "NAMES = [\n", "fields": "class Module:\n    def __init__(self):\n"}
    for name, text in held.items():
        functions = (node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
        names = sorted({function for function in functions if function[0] != "_"})
        for kind, block in blocks.items():
            body = "".join(block.format(one) for one in names[:8])
            yield name, kind, heads.get(kind, "class Module:\n") + body + block[: block.index("{")]


def _functions(held: dict[str, str]) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Functions and methods, each with its source flush to the left."""
    for name, text in held.items():
        lines = text.splitlines(keepends=True)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and 5 <= (node.end_lineno or 0) - node.lineno <= 30:
                own = lines[node.lineno - 1 : node.end_lineno]
                yield name, node, "".join(line[node.col_offset :] if line.strip() else line for line in own)


def _spread(found: list[Prompt], count: int) -> list[Prompt]:
    """``count`` of them, evenly."""
    wanted = max(min(count, len(found)), 0)
    return [found[index * len(found) // wanted] for index in range(wanted)]
