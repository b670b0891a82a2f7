"""Pairs: what a Python file and records give, how they become rows, and which modules are held out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from textwrap import dedent

import pytest

from ryzen_compile.errors import ConfigError
from ryzen_compile.train.config import ContrastiveSettings, DataSettings, TextSource
from ryzen_compile.train.contrastive import PAD
from ryzen_compile.train.documents import group_is_held_out
from ryzen_compile.train.pairs import Pair, first_sentence, function_pairs, make_rows, read_pairs
from ryzen_compile.train.tokenizer import load_tokenizer
from tests.train.tiny_pairs import write_encoder

SOURCE = '''
def plain(a):
    """Says what it does here.  And more.

    Not this.
    """
    return a


class Thing:
    """Nobody asks for a class here."""

    @decorator
    async def method(self, word="é"):
        \'\'\'Waits for all the others
        to be there\'\'\'

        def inner():
            """An inner one of its own."""
            return 1
        await inner()


def nothing_but_its_docstring():
    """There is nothing to be found here."""

def too_short():
    """Three words only."""
    return 1

def one_line(): "Everything is on one line."; return 1

def shares_a_line():
    """The docstring shares its line."""; return 1

def silent():
    return 2
'''


def test_functions_with_a_sentence_and_something_to_find() -> None:
    found = list(function_pairs(SOURCE))
    assert found == [
        Pair("Says what it does here.", "def plain(a):\n    return a"),
        Pair(
            "Waits for all the others to be there",
            dedent("""
                async def method(self, word="é"):

                    def inner():
                        return 1
                    await inner()
            """).strip(),
        ),
        Pair("An inner one of its own.", "def inner():\n    return 1"),
    ]


@pytest.mark.parametrize("source", ["", "def broken(:\n  pass", "x = 1\0", "print 'old'", '"\\N"'])
def test_what_is_no_python_gives_nothing(source: str) -> None:
    assert list(function_pairs(source)) == []


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("", ""),
        ("One sentence.", "One sentence."),
        ("Reads a.b and c.d of it. More.", "Reads a.b and c.d of it."),
        ("Some, e.g. two of\n   them. Rest.", "Some, e.g. two of them."),
        ("No full stop\n\nNext.", "No full stop"),
    ],
)
def test_first_sentences(docstring: str, sentence: str) -> None:
    assert first_sentence(docstring) == sentence


def data(path: Path, **changes: object) -> DataSettings:
    return DataSettings(train=TextSource(path=str(path)), **changes)


def test_records_are_joined_by_their_place(tmp_path: Path) -> None:
    """One column of them may be too short for the source's limits: then there is no such pair."""
    records = [{"question": f"what is {i}", "answer": "" if i == 3 else f"{i} it is"} for i in range(10)]
    path = tmp_path / "faq.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    columns = ContrastiveSettings(columns=("question", "answer"))
    found = read_pairs(data(path, validation_share=0.2), columns)
    numbers = [int(pair.query.rpartition(" ")[2]) for pair in (*found.train, *found.validation)]
    assert numbers == [0, 1, 2, 5, 6, 7, 8, 4, 9] and found.incomplete == 1
    assert all(pair.positive == f"{number} it is" for number, pair in zip(numbers, (*found.train, *found.validation), strict=True))  # fmt: skip  # noqa: E501
    again = read_pairs(data(path, validation_share=0.2), columns)
    assert found.digest == again.digest != read_pairs(data(path, validation_share=0.5), columns).digest


def test_two_sources_may_call_their_records_alike(tmp_path: Path) -> None:
    """Each part has its own positives, though both files are pairs.jsonl; incomplete records of both are counted."""
    for part, count in (("train", 5), ("validation", 3)):
        (tmp_path / part).mkdir()
        records = [{"query": f"{part} {i}", "positive": f"of {part} {i}"} for i in range(count)]
        records += [{"query": "alone in " + part, "positive": " "}, {"query": "", "positive": "nobody asks for it"}]
        path = tmp_path / part / "pairs.jsonl"
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    validation = TextSource(path=str(tmp_path / "validation" / "pairs.jsonl"))
    found = read_pairs(data(tmp_path / "train" / "pairs.jsonl", validation=validation), ContrastiveSettings())
    assert found.train == tuple(Pair(f"train {i}", f"of train {i}") for i in range(5))
    assert found.validation == tuple(Pair(f"validation {i}", f"of validation {i}") for i in range(3))
    assert found.incomplete == 4


def test_a_held_out_record_may_be_incomplete(tmp_path: Path) -> None:
    """A pattern is for names of queries: that it matches no positive is no error."""
    path = tmp_path / "pairs.jsonl"
    records = [{"query": f"ask {i}", "positive": "" if i == 2 else f"is {i}"} for i in range(6)]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    found = read_pairs(data(path, hold_out=("*:3", "*:5")), ContrastiveSettings())
    assert [pair.query for pair in found.validation] == ["ask 4"] and found.incomplete == 1
    assert [pair.query for pair in found.train] == ["ask 0", "ask 1", "ask 3", "ask 5"]


def test_whole_modules_are_held_out(tmp_path: Path) -> None:
    """By the first byte of the digest of their first name; each keeps its own functions."""
    names = ["one", "two", "three", "four", "five", "six", "seven"]
    held = [name for name in names if hashlib.sha256(name.encode()).digest()[0] % 3 == 0]
    assert 0 < len(held) < len(names)
    for name in names:
        (tmp_path / name).mkdir()
        for part in ("__init__", "inner.deep"):
            text = f'def f(x):\n    """Computes something of {name} {part}."""\n    return x\n'
            (tmp_path / name / f"{part}.py").write_text(text, encoding="utf-8")
    found = read_pairs(data(tmp_path, hold_out_groups=3), ContrastiveSettings())
    assert sorted({pair.query.split()[3] for pair in found.validation}) == sorted(held)
    assert sorted({pair.query.split()[3] for pair in found.train}) == sorted(set(names) - set(held))
    assert group_is_held_out("one.py", 3) == group_is_held_out("one/x/y.py", 3) == ("one" in held)


def test_one_group_cannot_be_split(tmp_path: Path) -> None:
    path = tmp_path / "only.jsonl"
    path.write_text('{"query": "a", "positive": "b"}\n' * 5, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"hold_out_groups: of 5 documents (5 .* and 0|0 .* and 5) are held out"):
        read_pairs(data(path, hold_out_groups=2), ContrastiveSettings())


def test_documents_without_pairs(tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no pairs to train on in 2 documents"):
        read_pairs(data(tmp_path), ContrastiveSettings())


def test_rows(tmp_path: Path) -> None:
    """Cut, filled up, no wider than the longest; the digest follows the tokenizer as well as the texts."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "\n".join(json.dumps({"query": "ask1 " * n, "positive": "is2 " * (9 - n)}) for n in range(1, 8)),
        encoding="utf-8",
    )
    pairs = read_pairs(data(path, validation_share=0.3), ContrastiveSettings())
    tokenizer = load_tokenizer(write_encoder(tmp_path / "encoder"))
    rows = make_rows(pairs, tokenizer, 5, 12)
    assert rows.columns == 5 and rows.train.shape == (5, 5 + 9) and rows.length == 1
    ask, answer = tokenizer.convert_tokens_to_ids(["ask1", "is2"])
    assert rows.train[0].tolist() == [2, ask, PAD, PAD, PAD, 2, *[answer] * 8]
    assert rows.validation[-1].tolist() == [2, *[ask] * 4, 2, *[answer] * 3, *[PAD] * 5]
    few = make_rows(pairs, tokenizer, 5, 12, most=(2, 1))
    assert (len(few.train), len(few.validation)) == (2, 1) and few.columns == 4
    assert few.digest == rows.digest
    tokenizer.add_tokens(["more"])
    assert make_rows(pairs, tokenizer, 5, 12).digest != rows.digest
