"""Pairs to train an encoder on: a text to look for, and the text that it should find.

They come out of the documents that a configuration names, so what is held out is whole documents. A Python file gives a
pair for each function with a docstring, as in CodeSearchNet (Husain et al., 2019): its first sentence, and the function
without it. A record gives its two columns. ``benchmarks/retrieval_task.py`` cuts what it measures by itself: functions
without a sentence are there to be found as well, and a sentence of two functions asks for neither.
"""

from __future__ import annotations

import ast
import hashlib
import json
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ryzen_compile.errors import ConfigError
from ryzen_compile.manifest import shown
from ryzen_compile.train.config import ContrastiveSettings, DataSettings
from ryzen_compile.train.contrastive import PAD
from ryzen_compile.train.documents import Corpus, Document, read_corpus, read_source
from ryzen_compile.train.plan import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_WORDS = 4  # of a sentence that says what a function is for


@dataclass(frozen=True)
class Pair:
    """``query`` should find ``positive``."""

    query: str
    positive: str


@dataclass(frozen=True)
class Pairs:
    """Those to train on and those to validate on, and the documents that they are from. Of ``incomplete`` records one
    text was used and the other left out, for its length or as blank; they give no pair."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    corpus: Corpus
    incomplete: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 of all of them in their order, hexadecimal."""
        texts = [[pair.query, pair.positive] for pair in (*self.train, *self.validation)]
        return hashlib.sha256(json.dumps([len(self.train), texts]).encode()).hexdigest()


@dataclass(frozen=True)
class PairRows(Rows):
    """Pairs as rows of tokens (``contrastive`` has the layout), queries in the first ``columns`` of them."""

    columns: int = 0

    @property
    def length(self) -> int:
        """A pair is what is counted."""
        return 1


def read_pairs(data: DataSettings, settings: ContrastiveSettings) -> Pairs:
    """All pairs of the documents of ``data``. Raises what ``read_corpus`` raises, and ``ConfigError`` where documents
    give no pairs."""
    query, positive = settings.columns
    corpus = read_corpus(_column(data, query))
    answers: list[dict[str, str]] = [{}, {}]
    incomplete = 0
    if not all(map(_is_python, (*corpus.train, *corpus.validation))):
        answers = _answers(_column(data, positive))
        incomplete = _incomplete(corpus, answers)
    train, validation = map(_pairs, (corpus.train, corpus.validation), answers)
    for name, found in (("train", train), ("validate", validation)):
        if not found:
            raise ConfigError(
                f"data: there are no pairs to {name} on in {len(corpus.train) + len(corpus.validation)} documents",
                hint=f"expected records with {shown(query)} and {shown(positive)}, or Python files with docstrings",
            )
    return Pairs(tuple(train), tuple(validation), corpus, incomplete)


def function_pairs(source: str) -> Iterator[Pair]:
    """Of every function and method of a Python file whose docstring has a sentence and that does something, in their
    order: without its docstring, nor those of what is defined in it. A file that is no Python gives none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that a later Python will refuse
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = source.split("\n")  # as the parser counts them
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in sorted(functions, key=lambda node: node.lineno):
        sentence = first_sentence(ast.get_docstring(node) or "")
        if len(sentence.split()) >= MIN_WORDS and (inside := _docstring_lines(node)):
            gone = set(inside).union(*map(_docstring_lines, ast.walk(node)))
            kept = [lines[n - 1] for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n not in gone]
            yield Pair(sentence, textwrap.dedent("\n".join(kept)).strip())


def _docstring_lines(node: ast.AST) -> range:
    """Those of a definition's docstring; none if it shares one with code, or is all there is."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return range(0)
    if ast.get_docstring(node) is None or len(node.body) < 2:
        return range(0)
    string, after = node.body[:2]
    end = string.end_lineno or string.lineno
    alone = string.lineno > node.lineno and after.lineno > end
    return range(string.lineno, end + 1) if alone else range(0)


def first_sentence(docstring: str) -> str:
    """Up to the first full stop before white space, or the end of the first paragraph, on one line."""
    words = docstring.strip().partition("\n\n")[0].split()
    for number, word in enumerate(words, 1):
        if word.endswith(".") and word.lower() not in ("e.g.", "i.e.", "cf.", "etc.", "vs."):
            return " ".join(words[:number])
    return " ".join(words)


def tokenize_pairs(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, query_length: int, positive_length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of queries and of positives, special ones included, cut at those lengths."""
    sides = (([p.query for p in pairs], query_length), ([p.positive for p in pairs], positive_length))
    queries, positives = (
        tokenizer(texts, truncation=True, max_length=length, padding=False, verbose=False)["input_ids"]
        for texts, length in sides
    )
    return queries, positives


def make_rows(
    pairs: Pairs,
    tokenizer: PreTrainedTokenizerBase,
    query_length: int,
    positive_length: int,
    *,
    most: tuple[int | None, int | None] = (None, None),
) -> PairRows:
    """``pairs`` as rows, no wider than the longest; ``most`` of them to train and to validate on."""
    sides = [
        tokenize_pairs(part[:limit], tokenizer, query_length, positive_length)
        for part, limit in zip((pairs.train, pairs.validation), most, strict=True)
    ]
    columns, rest = (max(len(ids) for part in sides for ids in part[side]) for side in (0, 1))
    train, validation = (
        torch.cat([_filled(queries, columns), _filled(positives, rest)], dim=1) for queries, positives in sides
    )
    vocabulary = sorted(tokenizer.get_vocab().items())
    return PairRows(train, validation, hashlib.sha256(f"{pairs.digest} {vocabulary}".encode()).hexdigest(), columns)


def _filled(tokens: Sequence[Sequence[int]], width: int) -> Tensor:
    """(n, width) int32 with ``PAD`` behind each."""
    found = np.full((len(tokens), width), PAD, dtype=np.int32)
    for row, ids in zip(found, tokens, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(found)


def _answers(data: DataSettings) -> list[dict[str, str]]:
    """Texts by the names of their documents, for what is trained and what is validated on: the same object twice where
    both are of one source. Documents of two sources may have one name."""
    sources = {"data.train": data.train, "data.validation": data.validation}
    found = [
        {document.name: document.text for document in read_source(source, setting, [])}
        for setting, source in sources.items()
        if source is not None
    ]
    return [found[0], found[-1]]


def _incomplete(corpus: Corpus, answers: Sequence[Mapping[str, str]]) -> int:
    queries = [{document.name for document in part} for part in (corpus.train, corpus.validation)]
    if answers[0] is answers[1]:
        return len(queries[0].union(queries[1]) ^ answers[0].keys())
    return sum(len(names ^ found.keys()) for names, found in zip(queries, answers, strict=True))


def _pairs(documents: Sequence[Document], answers: Mapping[str, str]) -> list[Pair]:
    found: list[Pair] = []
    for document in documents:
        if _is_python(document):
            found += function_pairs(document.text)
        elif document.name in answers:
            found.append(Pair(document.text, answers[document.name]))
    return found


def _is_python(document: Document) -> bool:
    return document.name.endswith(".py")


def _column(data: DataSettings, column: str) -> DataSettings:
    """Reads ``column`` of records, whichever its sources name."""
    sources = {"train": data.train, "validation": data.validation}
    return data.model_copy(
        update={name: source and source.model_copy(update={"column": column}) for name, source in sources.items()}
    )
