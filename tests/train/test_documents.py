"""Documents: the same ones in the same order everywhere, none held out in training, and bad text named to the line."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ryzen_compile.errors import ConfigError
from ryzen_compile.train import documents as module
from ryzen_compile.train.config import DataSettings, NewTokenizer, parse_config
from ryzen_compile.train.documents import Corpus, Document, read_corpus
from ryzen_compile.train.packing import pack
from ryzen_compile.train.tokenizer import load_tokenizer, train_tokenizer

# What the shipped model was trained on: sorted paths, UTF-8 only, 64 to 400,000 characters.
SCRIPT = {
    "include": ("*.py",),
    "exclude": ("site-packages", "__pycache__", "lib2to3", "bad_coding", "encodings"),
    "min_characters": 64,
    "max_characters": 400_000,
}


def read(path: Path | str, *, data: dict[str, Any] | None = None, **source: Any) -> Corpus:
    """Half of the documents validate unless ``data`` says otherwise."""
    return read_corpus(
        DataSettings(**{"train": {"path": str(path), **source}, "validation_share": 0.5, **(data or {})})
    )


def names(corpus: Corpus) -> list[str]:
    return sorted(document.name for document in (*corpus.train, *corpus.validation))


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def script_documents(root: Path) -> list[tuple[str, str]]:
    """What the shipped model was trained on, written the short way."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if set(SCRIPT["exclude"]).intersection(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if 64 <= len(text) <= 400_000:
            found.append((relative.as_posix(), text))
    return found


# --- order and choice -------------------------------------------------------------------------------------------------
def test_the_standard_library_is_read_as_the_example_was() -> None:
    expected = script_documents(Path(sysconfig.get_paths()["stdlib"]))
    held_out = ("argparse.py", "json/decoder.py", "xml/dom/minidom.py")
    corpus = read("python-stdlib", data={"hold_out": held_out}, **SCRIPT)
    assert len(expected) > 500
    assert [(d.name, d.text) for d in corpus.train] == [pair for pair in expected if pair[0] not in held_out]
    assert [d.name for d in corpus.validation] == list(held_out)
    assert corpus.digest == hashlib.sha256("".join(text for _, text in expected).encode()).hexdigest()


EXAMPLE = Path(__file__).resolve().parents[2] / "examples"


CARD = (EXAMPLE / "tiny-python-lm/README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(
    f"Python {platform.python_version()} standard library" not in CARD,
    reason="the example was trained on another version's library",
)
@pytest.mark.slow
def test_the_configuration_gives_what_the_shipped_model_was_trained_on() -> None:
    """Files, digest, tokenizer and numbers of tokens as its card states them."""
    tree = yaml.safe_load((EXAMPLE / "configs/tiny-python-lm.yaml").read_text())
    data, new = DataSettings(**tree["data"]), NewTokenizer(**tree["model"]["tokenizer"])
    corpus = read_corpus(data)
    assert f"in {len(corpus.train):,} documents" in CARD and corpus.digest in CARD
    texts = [document.text for document in corpus.train]
    tokenizer = train_tokenizer(texts, new)
    stored = load_tokenizer(EXAMPLE / "tiny-python-lm")
    merges = [json.loads(each.backend_tokenizer.to_str())["model"] for each in (tokenizer, stored)]
    assert merges[0] == merges[1]
    assert f"passes over {len(pack(texts, tokenizer, data.length)) * data.length:,} tokens" in CARD
    held_out = pack([document.text for document in corpus.validation], tokenizer, data.length)
    assert f"over {len(held_out) * data.length:,} tokens in {len(corpus.validation)} documents" in CARD


def test_awkward_names_and_texts_as_the_example_reads_them(tmp_path: Path) -> None:
    """A folder before the file whose name goes on with a dot, line ends of three kinds, lengths at both bounds."""
    body = "é" * 63
    root = write(
        tmp_path,
        {
            "a.py": body + "1",
            "a/z.py": body + "2",
            "a-b.py": body + "3",
            "B.py": body + "4",
            "short.py": body,
            "long.py": "x" * 400_001,
            "longest.py": "x" * 400_000,
            "ends.py": "a\r\nb\rc\n" * 20,
            "latin.py": b"# \xe9" * 40,
            "a/encodings/x.py": body + "5",
            "other.txt": body + "6",
        },
    )
    corpus = read(root, data={"hold_out": ("B.py",)}, **SCRIPT)
    expected = script_documents(root)
    assert [(d.name, d.text) for d in corpus.train] == expected[1:]
    assert [d.name for d in corpus.train] == ["a/z.py", "a-b.py", "a.py", "ends.py", "longest.py"]
    assert corpus.skipped == ("latin.py",)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.lists(st.text("ab \n", min_size=1, max_size=3), min_size=2, max_size=60), share=st.floats(0.01, 0.5))
def test_every_document_is_in_exactly_one_part(tmp_path: Path, texts: list[str], share: float) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "x" + text}) for text in texts))
    corpus = read(tmp_path / "a.jsonl", data={"validation_share": share})
    train, validation = {d.name for d in corpus.train}, {d.name for d in corpus.validation}
    assert train and validation and not train & validation
    assert train | validation == {f"a.jsonl:{number}" for number in range(1, len(texts) + 1)}
    assert len(corpus.validation) == max(1, len(texts) // round(1 / share))
    assert corpus == read(tmp_path / "a.jsonl", data={"validation_share": share})


def test_the_digest_knows_texts_and_order_but_not_the_split(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.txt": "one", "b.txt": "two", "c.txt": "three"})
    digest = hashlib.sha256(b"onetwothree").hexdigest()
    assert read(root).digest == read(root, data={"hold_out": ("a.txt",)}).digest == digest
    write(root, {"b.txt": "tvo"})
    assert read(root).digest != digest


def test_held_out_patterns_are_for_whole_names(tmp_path: Path) -> None:
    root = write(
        tmp_path, {"a.txt": "1", "x/a.txt": "2", "x/y/b.txt": "3", "c.jsonl": '{"text": "4"}\n\n{"text": "5"}'}
    )
    corpus = read(root, data={"hold_out": ("a.txt", "x/y/*", "*:3")})
    assert [d.name for d in corpus.validation] == ["a.txt", "c.jsonl:3", "x/y/b.txt"]
    assert [d.name for d in corpus.train] == ["c.jsonl:1", "x/a.txt"]


def test_a_source_of_its_own_to_validate_on(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "one", "b/c.txt": "two"})
    corpus = read(tmp_path / "a.txt", data={"validation": {"path": str(tmp_path / "b")}})
    assert corpus == Corpus(
        (Document("a.txt", "one"),), (Document("c.txt", "two"),), hashlib.sha256(b"onetwo").hexdigest()
    )


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ((), (), []),
        (("*.txt",), (), ["a.txt", "d/b.txt", "d/e/c.txt"]),
        (("d/*",), (), ["d/b.txt", "d/e/c.txt", "d/f.md"]),
        (("*",), ("d",), ["a.txt"]),
        (("*",), ("e", "f.md"), ["a.txt", "d/b.txt"]),
        (("*",), ("d/e",), ["a.txt", "d/b.txt", "d/f.md"]),
        (("*",), ("a",), ["a.txt", "d/b.txt", "d/e/c.txt", "d/f.md"]),
        (("*.TXT",), (), []),
    ],
)
def test_patterns(tmp_path: Path, include: tuple[str, ...], exclude: tuple[str, ...], expected: list[str]) -> None:
    root = write(
        tmp_path, {"a.txt": "1", "d/b.txt": "2", "d/e/c.txt": "3", "d/f.md": "4", ".h/x.txt": "5", ".y.txt": "6"}
    )
    own = {"path": str(write(tmp_path / ".own", {"v.txt": "v"}))}
    if not expected:
        with pytest.raises(ConfigError, match="no document"):
            read(root, data={"validation": own}, include=include, exclude=exclude)
        return
    corpus = read(root, data={"validation": own}, include=include, exclude=exclude)
    assert [d.name for d in corpus.train] == expected


def test_white_space_and_a_byte_order_mark_are_no_text(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.txt": " \n\t", "b.txt": "", "c.txt": b"\xef\xbb\xbfone", "d.txt": "two"})
    corpus = read(root)
    assert [d.text for d in (*corpus.train, *corpus.validation)] == ["one", "two"]


# --- what is no text --------------------------------------------------------------------------------------------------
def test_links_out_of_the_directory_and_special_files_are_skipped(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", {"secret.txt": "secret", "deep/more.txt": "secret"})
    root = write(tmp_path / "root", {"a.txt": "one", "b.txt": "two"})
    (root / "in.txt").symlink_to(root / "a.txt")
    (root / "out.txt").symlink_to(outside / "secret.txt")
    (root / "folder").symlink_to(outside)
    (root / "nowhere.txt").symlink_to(root / "gone.txt")
    (root / "loop.txt").symlink_to(root / "loop.txt")
    os.mkfifo(root / "fifo.txt")
    corpus = read(root)
    assert names(corpus) == ["a.txt", "b.txt", "in.txt"]
    assert corpus.skipped == ("fifo.txt", "loop.txt", "nowhere.txt", "out.txt")


def test_a_fifo_or_device_named_by_itself_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.txt")
    for path in (tmp_path / "fifo.txt", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="neither a plain file nor a directory"):
            read(path)


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path may have about 100 characters
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s.txt")
        with pytest.raises(ConfigError, match="neither a plain file nor a directory"):
            read("s.txt")


@pytest.mark.parametrize("path", ["", "a\0b", "missing", "a.txt/x", "~nobody-of-this-name/x"])
def test_paths_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(write(tmp_path, {"a.txt": "x"}))
    with pytest.raises(ConfigError, match=r"data\.train: .*(is not a path|there is no text at)"):
        read(path)


def test_a_file_that_is_not_utf8_is_refused_by_its_byte(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"good \xff"})
    with pytest.raises(ConfigError, match=r"a\.txt' is not UTF-8: invalid start byte at byte 5"):
        read(tmp_path / "a.txt")


def test_a_file_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 8)
    root = write(tmp_path, {"a.txt": "x" * 8, "b.txt": "y" * 8})
    assert names(read(root)) == ["a.txt", "b.txt"]
    write(root, {"b.txt": "y" * 9})
    with pytest.raises(ConfigError, match=r"b\.txt' is larger than 8 bytes"):
        read(root)


# --- records ----------------------------------------------------------------------------------------------------------
def test_json_lines_and_their_column(tmp_path: Path) -> None:
    lines = '\ufeff{"body": "a\\n", "n": 1}\n\n{"body": "\\u00e9"}\r\n{"body": "", "n": 2}\n{"body": "last"}'
    corpus = read(write(tmp_path, {"a.jsonl": lines}) / "a.jsonl", column="body")
    assert [(d.name, d.text) for d in corpus.train] == [("a.jsonl:1", "a\n"), ("a.jsonl:5", "last")]
    assert [(d.name, d.text) for d in corpus.validation] == [("a.jsonl:3", "é")]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b'{"text": "x"', "is not JSON"),
        (b'{"text": "\xff"}', "is not JSON in UTF-8"),
        (b'"just text"', "expected an object with a string 'text', got str"),
        (b'{"txt": "x"}', "has no 'text', only 'txt'; set column"),
        (b"{}", "has no 'text', only none"),
        (b'{"text": null}', "'text' is NoneType, expected a string"),
        (b'{"text": ["x"]}', "'text' is list, expected a string"),
        (b'{"text": "\\ud800"}', "is not valid Unicode at character 0"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"text": "' + b"x" * 200_000 + b'"}', "is longer than 150000 bytes"),
    ],
    ids=["cut", "latin", "string", "other key", "no key", "null", "list", "surrogate", "deep", "long"],
)
def test_a_bad_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, match: str) -> None:
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 150_000)
    root = write(tmp_path, {"a.jsonl": b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n'})
    for path in (root, root / "a.jsonl"):
        with pytest.raises(ConfigError, match=r"a\.jsonl', line 3.* " + match):
            read(path)


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three string types, more records than a batch, and a column that must not be read."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(module, "BATCH", 3)
    texts = [f"text {number} é" for number in range(8)]
    for kind in (arrow.string(), arrow.large_string(), arrow.dictionary(arrow.int32(), arrow.string())):
        table = arrow.table({"n": list(range(8)), "body": arrow.array(texts).cast(kind)})
        parquet.write_table(table, tmp_path / "a.parquet")
        corpus = read(tmp_path / "a.parquet", column="body")
        assert [(d.name, d.text) for d in corpus.train] == [(f"a.parquet:{n + 1}", texts[n]) for n in (0, 2, 4, 6)]
        assert [d.text for d in corpus.validation] == texts[1::2]


def test_bad_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"n": [1], "list": [["x"]], "text": ["x" * 5000]}), path, compression="none")
    with pytest.raises(ConfigError, match="has no column 'nn', only 'n', 'list', 'text'"):
        read(path, column="nn")
    with pytest.raises(ConfigError, match="column 'n' holds int64, expected string"):
        read(path, column="n")
    with pytest.raises(ConfigError, match=r"column 'list' holds list<.*>, expected string"):
        read(path, column="list")
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"PAR1",
        whole[:-20],
        whole[:-9] + b"\xff\xff\xff\x7f\x00PAR1",
        whole.replace(b"xxxx", b"\xff" * 4),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"a\.parquet' is no intact Parquet file"):
            read(path)
    parquet.write_table(arrow.table({"text": ["x", None]}), path)
    with pytest.raises(ConfigError, match=r"a\.parquet', record 2: 'text' is NoneType"):
        read(path)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"\.parquet files need the library pyarrow.*pip install pyarrow"):
        read(write(tmp_path, {"a.parquet": b"PAR1"}))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"named datasets need the library datasets.*pip install datasets"):
        read_corpus(DataSettings(train={"dataset": "Salesforce/wikitext"}))


def test_a_named_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of tables is a name to the library as well, one that needs no network."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    library.disable_progress_bars()
    name = str(
        write(tmp_path, {"set/train.jsonl": '{"t": "a", "n": 1}\n{"t": " ", "n": 2}\n{"t": "b", "n": 3}\n'}) / "set"
    )

    def train(**source: Any) -> Corpus:
        return read_corpus(DataSettings(train={"dataset": name, "column": "t", **source}))

    corpus = train()
    assert corpus.train == (Document(f"{name}:1", "a"),) and corpus.validation == (Document(f"{name}:3", "b"),)
    for change, match in (
        ({"column": "n"}, "column 'n' holds int64"),
        ({"column": "q"}, "has no column 'q', only 't', 'n'"),
        ({"split": "nope"}, "cannot be loaded: Unknown split"),
        ({"subset": "nope"}, "cannot be loaded: BuilderConfig"),
        ({"dataset": name + "x"}, "cannot be loaded"),
        ({"dataset": ""}, "is not a name"),
    ):
        with pytest.raises(ConfigError, match=match):
            train(**change)
    monkeypatch.setattr(library, "__version__", "3.6.0")
    with pytest.raises(ConfigError, match="may run code that comes with a dataset"):
        train()


# --- nothing left -----------------------------------------------------------------------------------------------------
def test_a_pattern_without_a_document_is_named(tmp_path: Path) -> None:
    root = write(tmp_path, {"d/a.txt": "1", "d/b.txt": "2"})
    with pytest.raises(ConfigError, match=r"data\.hold_out: 'a\.txt' matches none of 2 documents; .*'d/a\.txt'"):
        read(root, data={"hold_out": ("d/b.txt", "a.txt")})


def test_nothing_left_to_train_or_validate_on(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.txt": "1", "b.txt": "22"})
    with pytest.raises(ConfigError, match="none is left to train on"):
        read(root, data={"hold_out": ("*",)})
    with pytest.raises(ConfigError, match="a single document cannot be split"):
        read(root, min_characters=2)
    with pytest.raises(ConfigError, match=r"data\.train: .* gives no document to use: 2 are too short"):
        read(root, min_characters=3)
    with pytest.raises(ConfigError, match=r"data\.validation: .* gives no document to use: 1 are too short"):
        read(
            root,
            data={"validation": {"path": str(root), "min_characters": 2, "max_characters": 2, "exclude": ["b.txt"]}},
        )
    (root / "empty").mkdir()
    with pytest.raises(ConfigError, match="gives no document"):
        read(root / "empty")


def test_two_answers_to_what_is_validated_on_are_refused() -> None:
    with pytest.raises(ConfigError, match="data: validation and hold_out both say"):
        parse_config(
            {
                "output": "x",
                "model": {"path": "m"},
                "data": {"train": {"path": "a"}, "validation": {"path": "b"}, "hold_out": ["c"]},
                "optimization": {"steps": 1},
            }
        )
