"""What a view says of a graph: its text is printable and on one line, and different texts stay different."""

from __future__ import annotations

import dataclasses

import pytest

from ryzen_compile.graphs.view import UNKNOWN, NodeView, ValueType, plain


def test_types_as_they_are_written() -> None:
    assert str(ValueType("f32", ("B", "T", "64"))) == "f32[B,T,64]"
    assert str(ValueType("i64", ())) == "i64[]"  # a scalar is a tensor
    assert str(ValueType("int")) == "int" and str(UNKNOWN) == "?"
    node = NodeView("split", "aten.split", (), ("split.0", "split.1"), (), (ValueType("f32", ("3",)), UNKNOWN), "")
    assert node.shape == "f32[3], ?"
    with pytest.raises(dataclasses.FrozenInstanceError):
        node.op = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0", "model.layers.0"),
        ("größe <b>&amp;</b> 层", "größe <b>&amp;</b> 层"),  # markup is the business of whoever writes HTML
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("x\u2028y\u202ez", "x\\u2028y\\u202ez"),
        ("half \ud800", "half \\ud800"),
        ("", ""),
    ],
)
def test_text_stands_on_one_line(text: str, shown: str) -> None:
    assert plain(text) == shown
    assert len(plain(text).splitlines()) <= 1 and plain(text).isprintable()
    plain(text).encode("utf-8")


def test_different_texts_stay_different() -> None:
    assert plain("a\\nb") != plain("a\nb")
