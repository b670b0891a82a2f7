from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ryzen_compile import text
from ryzen_compile.errors import ResourceError, UsageError
from ryzen_compile.text import BUILTIN_CHARACTERS, digest, read_text, token_windows
from ryzen_compile.train.config import read_config


def words(content: str) -> list[int]:
    """A tokenizer: the length of every word."""
    return [len(word) for word in content.split()]


# --- builtin ----------------------------------------------------------------------------------------------------------
def test_builtin_is_prose_and_code_from_the_start():
    content = read_text("builtin")
    assert len(content) == BUILTIN_CHARACTERS
    for start in range(0, BUILTIN_CHARACTERS, 100_000):
        part = content[start : start + 100_000]
        code = len(re.findall(r"^ *def \w+\(", part, re.MULTILINE))
        assert code > 20, f"code at {start}"
        assert part.count('"') > 100 and len(re.findall(r"\b(the|of|statement|object)\b", part)) > 500, start


def test_builtin_is_the_same_in_another_process(repository):
    code = "from ryzen_compile.text import digest, read_text; print(digest(read_text('builtin')))"
    for seed in ("0", "7"):
        child = subprocess.run(
            [sys.executable, "-c", code], cwd=repository, env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert child.stdout.strip() == digest(read_text("builtin"))


def test_builtin_is_bounded():
    whole = read_text("builtin")
    assert read_text("builtin", characters=12_345) == whole[:12_345]
    assert read_text("builtin", characters=10**9) == whole


def test_builtin_holds_no_module_that_the_example_holds_out(repository):
    held_out = read_config(repository / "examples" / "configs" / "tiny-python-lm.yaml").data.hold_out
    assert len(held_out) == 15 and not set(held_out) & set(text._BUILTIN_MODULES)


def test_a_python_without_sources_is_refused(monkeypatch):
    monkeypatch.setattr(text, "_BUILTIN_MODULES", ("functools.py", "not/here.py"))
    with pytest.raises(UsageError, match=rf"give \d+ characters of built-in text, expected {BUILTIN_CHARACTERS}"):
        read_text("builtin")


def test_a_file_may_be_called_builtin(tmp_path, monkeypatch):
    (tmp_path / "builtin").write_text("own words")
    monkeypatch.chdir(tmp_path)
    assert read_text("./builtin") == read_text(Path("builtin")) == "own words"
    assert len(read_text("builtin")) == BUILTIN_CHARACTERS


# --- files ------------------------------------------------------------------------------------------------------------
def test_a_text_file_is_read_as_it_is(tmp_path):
    content = "first\r\n\tsecond größer 模型 \U0001f600\n\n"
    (tmp_path / "wiki.test.raw").write_bytes(content.encode())
    assert read_text(tmp_path / "wiki.test.raw") == content
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfmarked")
    assert read_text(str(tmp_path / "marked.txt")) == "marked"


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_characters_that_span_two_reads(tmp_path, monkeypatch, chunk):
    content = "aß模\U0001f600" * 5
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    monkeypatch.setattr(text, "_CHUNK", chunk)
    for characters in (None, 1, 3, 19, 20, 21):
        assert read_text(tmp_path / "a.txt", characters=characters) == content[:characters]


def test_no_more_of_a_huge_file_is_read_than_asked_for(tmp_path):
    path = tmp_path / "huge.txt"
    with path.open("wb") as stream:
        stream.write("größer".encode() * 500_000)
        stream.truncate(1 << 40)  # sparse: a terabyte of zeros behind the text
    assert read_text(path, characters=1000) == ("größer" * 200)[:1000]


def test_a_file_beyond_the_limit_is_refused_unless_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MAX_CHARACTERS", 10)
    (tmp_path / "a.txt").write_text("0123456789")
    assert read_text(tmp_path / "a.txt") == "0123456789"
    (tmp_path / "a.txt").write_text("0123456789a")
    with pytest.raises(UsageError, match="holds more than 10 characters; read a part"):
        read_text(tmp_path / "a.txt")
    assert read_text(tmp_path / "a.txt", characters=11) == "0123456789a"


def test_json_lines(tmp_path):
    lines = [
        '{"text": "one", "id": 1}',
        "",
        '  "two\\nlines"  ',
        '{"id": 2, "text": "größer \\ud83d\\ude00"}',
        '{"text": ""}',
    ]
    (tmp_path / "a.JSONL").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    assert read_text(tmp_path / "a.JSONL") == "one\n\ntwo\nlines\n\ngrößer \U0001f600"
    assert read_text(tmp_path / "a.JSONL", characters=7) == "one\n\ntw"


def test_lines_after_the_bound_are_not_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('"first"\n"second"\nbroken\n')
    assert read_text(tmp_path / "a.jsonl", characters=5) == "first"
    assert read_text(tmp_path / "a.jsonl", characters=13) == "first\n\nsecond"
    with pytest.raises(UsageError, match="line 3"):
        read_text(tmp_path / "a.jsonl", characters=14)


def test_a_directory_is_read_in_the_order_of_its_paths(tmp_path):
    for name in ("b.txt", "a/z.md", "a/y.py", "a.txt", "c.jsonl", "skipped.bin", ".hidden.txt", ".git/x.txt", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('"json"' if name.endswith("jsonl") else f"<{name}>")
    (tmp_path / "d.txt").write_text(" \n")
    (tmp_path / "f.txt").symlink_to(tmp_path / "b.txt")
    assert read_text(tmp_path) == "<a.txt>\n\n<a/y.py>\n\n<a/z.md>\n\n<b.txt>\n\njson\n\n<e.txt>\n\n<b.txt>"
    assert read_text(tmp_path, characters=10) == "<a.txt>\n\n<"


def test_files_after_the_bound_are_not_opened(tmp_path):
    (tmp_path / "a.txt").write_text("plenty")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    assert read_text(tmp_path, characters=6) == "plenty"
    with pytest.raises(UsageError, match=r"b\.txt.* is not UTF-8"):
        read_text(tmp_path, characters=7)


# --- bad files --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'\n""\n{"text": "  "}\n', "holds no text"),
        ("a.txt", b"good\xffbad", "is not UTF-8: invalid start byte at byte 4"),
        ("a.txt", "größer".encode()[:3], "is not UTF-8: unexpected end of data at byte 2"),
        ("a.txt", "utf-16".encode("utf-16"), "is not UTF-8: invalid start byte at byte 0"),
        ("a.txt", b"PK\x03\x04\x00", "is binary: character 4 is NUL"),
        ("a.jsonl", b'"fine"\n\n{"text": \n', r"a\.jsonl', line 3 is not JSON in UTF-8"),
        ("a.jsonl", b'"fine"\n"\xff"', "line 2 is not JSON in UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON in UTF-8"),
        ("a.jsonl", b"9" * 5000, "line 1 is not JSON in UTF-8"),
        ("a.jsonl", b'{"txt": "x"}', 'line 1: expected a string, or an object .* got an object without it'),
        ("a.jsonl", b'{"text": 5}', "got int"),
        ("a.jsonl", b'{"text": null}', "got NoneType"),
        ("a.jsonl", b'["text"]', "got list"),
        ("a.jsonl", b'"x\\ud83d"', "line 1 is not valid Unicode at character 1"),
    ],
    ids=range(17),
)  # fmt: skip
def test_what_is_no_text_is_named_with_its_place(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        read_text(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_the_byte_is_the_files_in_whatever_portions_it_is_read(tmp_path, monkeypatch, chunk):
    (tmp_path / "a.txt").write_bytes("ß模".encode() + b"\xe6\xa8x")
    monkeypatch.setattr(text, "_CHUNK", chunk)
    with pytest.raises(UsageError, match="invalid continuation byte at byte 5"):
        read_text(tmp_path / "a.txt")


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MAX_LINE_BYTES", 8)
    (tmp_path / "a.jsonl").write_text('"123456"\n"1234567"\n')
    with pytest.raises(UsageError, match="line 1 is longer than 8 bytes"):  # its end counts
        read_text(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('"12345"\n"1234567"')
    with pytest.raises(UsageError, match="line 2 is longer than 8 bytes"):
        read_text(tmp_path / "a.jsonl")


def test_what_is_not_there(tmp_path):
    (tmp_path / "file.txt").write_text("x")
    for path in (tmp_path / "absent.txt", tmp_path / "file.txt" / "below", "", "no\nwhere"):
        with pytest.raises(UsageError):
            read_text(path)
    with pytest.raises(UsageError, match=r"there is no text at .*absent\.txt'; give a file, a directory or the word"):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="is not a path"):
        read_text("a\0b")


def test_a_directory_without_text(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(UsageError, match=r"holds no file that ends in \.txt, \.md, \.py, \.jsonl"):
        read_text(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no FIFOs")
def test_a_fifo_or_device_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    for path in (tmp_path / "a.txt", tmp_path, Path("/dev/null"), Path("/dev/zero")):
        with pytest.raises(UsageError, match="is neither a plain file nor a directory"):
            read_text(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(ResourceError, match="Permission denied"):
        read_text(tmp_path / "a.txt")


def test_a_name_too_long_is_a_resource_error(tmp_path):
    with pytest.raises(ResourceError, match=r"cannot read .*too long"):
        read_text(tmp_path / ("x" * 300))


@pytest.mark.parametrize("characters", [0, -1])
def test_a_bound_below_one(characters):
    with pytest.raises(UsageError, match=f"characters must be at least 1, got {characters}"):
        read_text("builtin", characters=characters)


# --- digest and windows -----------------------------------------------------------------------------------------------
def test_the_digest_is_of_the_utf8():
    assert digest("größer 模型") == hashlib.sha256("größer 模型".encode()).hexdigest()


def test_windows_follow_each_other():
    content = " ".join("x" * n for n in range(1, 14))
    windows = token_windows(content, words, 4, 9)
    assert windows.dtype == np.int64
    np.testing.assert_array_equal(windows, np.arange(1, 13).reshape(3, 4))
    np.testing.assert_array_equal(token_windows(content, words, 13, 13), np.arange(1, 14)[None])
    np.testing.assert_array_equal(token_windows(content, words, 1, 2), [[1], [2]])
    np.testing.assert_array_equal(token_windows(content, words, 5, 1), [[1, 2, 3, 4, 5]])


def test_a_text_too_short_says_how_much_there_is():
    with pytest.raises(UsageError, match=r"the text has 11 tokens, 12 are needed for the 9 asked for \(3 x 4\)"):
        token_windows("word " * 11, words, 4, 9)
    assert token_windows("word " * 12, words, 4, 9).shape == (3, 4)
    with pytest.raises(UsageError, match="the text has 0 tokens"):
        token_windows("", words, 1, 1)


@pytest.mark.parametrize(("length", "tokens"), [(0, 5), (5, 0), (-1, 5)])
def test_windows_of_nothing(length, tokens):
    with pytest.raises(UsageError, match=f"at least 1, got {length} and {tokens}"):
        token_windows("some words", words, length, tokens)


@pytest.mark.parametrize("width", [1, 3, 40, 400])
def test_only_the_beginning_is_tokenized_and_the_cut_does_not_show(width):
    # Words of `width` letters; a cut one would be a shorter token.
    content = ("x" * width + " ") * 20_000
    asked: list[int] = []

    def encode(part: str) -> list[int]:
        asked.append(len(part))
        return words(part)

    windows = token_windows(content, encode, 8, 100)
    assert (windows == width).all() and windows.shape == (13, 8)
    assert max(asked) <= max(8 * 104, 8 * 4 * (104 + text.CUT_MARGIN) * (width + 1)) < len(content) * (1 + (width == 1))
    assert asked == sorted(asked)


def test_a_word_cut_in_two_is_not_used():
    # The first 8 characters per token end inside the last word that is needed.
    content = "x" * 7 + " " + ("x" * 40 + " ") * 20
    np.testing.assert_array_equal(token_windows(content, words, 2, 2), [[7, 40]])


def test_a_real_tokenizer_gives_the_same_as_the_whole_text(tiny_python_lm):
    from ryzen_compile.runtime.tokenizer import Tokenizer

    tokenizer, content = Tokenizer.from_directory(tiny_python_lm), read_text("builtin", characters=60_000)
    whole = tokenizer.encode(content)
    windows = token_windows(content, tokenizer.encode, 37, 1000)
    assert windows.ravel().tolist() == whole[: windows.size] and windows.shape == (28, 37)
    assert json.dumps(windows.tolist())  # plain ids, not numpy's own integers, once listed
