"""The documents that a model is trained and validated on: read once, in an order that is the same on every system.

Files are the user's own, yet each reading is bounded, never waits (a FIFO is refused) and names what it could not use,
down to the line. It knows no tokenizer. Named datasets are the only ones that may come from the network, through the
library datasets.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from ryzen_compile.errors import ConfigError, ResourceError, UsageError
from ryzen_compile.manifest import shown, shown_path
from ryzen_compile.text import open_plain
from ryzen_compile.train.config import DataSettings, TextSource

STDLIB = "python-stdlib"
MAX_FILE_BYTES = 1 << 30  # of a file that is one document
MAX_LINE_BYTES = 1 << 26  # of a .jsonl file
BATCH = 1024  # records of a table held at a time
FIRST_DATASETS = 4  # the first major version of the library that runs no code of a dataset's own


@dataclass(frozen=True)
class Document:
    """A text and where it comes from: a file's path below its directory, with "/", and ":3" for its third record (of
    a .jsonl file: its third line)."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in the order of their reading; none is in both parts.

    ``digest`` is the SHA-256 of all texts' UTF-8 in that order, whichever part they went to, in hexadecimal.
    ``skipped`` are the files of directories that are not UTF-8, no plain files, or links that lead out.
    """

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    digest: str
    skipped: tuple[str, ...] = ()


def read_corpus(settings: DataSettings) -> Corpus:
    """Everything that ``settings`` name, split into what is trained and what is validated on.

    Raises ``ConfigError`` for what is missing, empty, damaged or of another kind, for a library that is not installed,
    for a ``hold_out`` pattern that matches nothing and when a part would be empty; ``ResourceError`` for what cannot be
    read or fetched.
    """
    skipped: list[str] = []
    documents = read_source(settings.train, "data.train", skipped)
    if settings.validation is not None:
        train, validation = documents, read_source(settings.validation, "data.validation", skipped)
        documents = [*train, *validation]
    elif settings.hold_out:
        train, validation = _held_out(documents, settings.hold_out)
    elif settings.hold_out_groups is not None:
        train, validation = _groups(documents, settings.hold_out_groups)
    else:
        train, validation = _every(documents, settings.validation_share)
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.text.encode("utf-8"))
    return Corpus(tuple(train), tuple(validation), digest.hexdigest(), tuple(skipped))


# --- the two parts ----------------------------------------------------------------------------------------------------
def _held_out(documents: Sequence[Document], patterns: Sequence[str]) -> tuple[list[Document], list[Document]]:
    for pattern in patterns:
        if not any(fnmatchcase(document.name, pattern) for document in documents):
            raise ConfigError(
                f"data.hold_out: {shown(pattern)} matches none of {len(documents)} documents",
                hint=f"names are like {shown(documents[0].name)}",
            )
    train: list[Document] = []
    held: list[Document] = []
    for document in documents:
        matches = any(fnmatchcase(document.name, pattern) for pattern in patterns)
        (held if matches else train).append(document)
    if not train:
        raise ConfigError(f"data.hold_out: the patterns match all {len(documents)} documents, none is left to train on")
    return train, held


def group_is_held_out(name: str, groups: int) -> bool:
    """Whether documents called as ``name`` is ("json/decoder.py") are among the one group in ``groups`` that is held
    out: by the first byte of the SHA-256 of the first part of the name without its suffix."""
    group = name.partition("/")[0].partition(".")[0]
    return hashlib.sha256(group.encode("utf-8")).digest()[0] % groups == 0


def _groups(documents: Sequence[Document], groups: int) -> tuple[list[Document], list[Document]]:
    train = [document for document in documents if not group_is_held_out(document.name, groups)]
    held = [document for document in documents if group_is_held_out(document.name, groups)]
    if not train or not held:
        raise ConfigError(
            f"data.hold_out_groups: of {len(documents)} documents {len(train)} are left to train on and {len(held)} "
            "are held out, expected some of both",
            hint="documents of one directory or file are one group; name those to hold out in hold_out",
        )
    return train, held


def _every(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Each k-th document is validated on, k being ``1 / share`` rounded, or the last one of fewer than k."""
    if len(documents) < 2:
        raise ConfigError(
            "data.train: a single document cannot be split into one to train and one to validate on",
            hint="name a text of its own in data.validation, or cut the document into several files",
        )
    every = min(round(1 / share), len(documents))
    train = [document for number, document in enumerate(documents, 1) if number % every]
    return train, list(documents[every - 1 :: every])


# --- sources ----------------------------------------------------------------------------------------------------------
def read_source(source: TextSource, setting: str, skipped: list[str]) -> list[Document]:
    """The source's documents of an allowed length, no two of one name; files that are no text are added to ``skipped``.

    ``setting`` is the source's name for messages. Raises as ``read_corpus`` does.
    """
    most = float("inf") if source.max_characters is None else source.max_characters
    left_out = 0
    kept: list[Document] = []
    for document in _documents(source, setting, skipped):
        if source.min_characters <= len(document.text) <= most and not document.text.isspace():
            kept.append(document)
        else:
            left_out += 1
    if not kept:
        where = shown_path(source.path) if source.path is not None else shown(source.dataset)
        raise ConfigError(
            f"{setting}: {where} gives no document to use: {left_out} are too short, too long or empty, "
            f"{len(skipped)} files are no text",
            hint="see include, exclude, min_characters and max_characters",
        )
    return kept


def _documents(source: TextSource, setting: str, skipped: list[str]) -> Iterator[Document]:
    if source.path is None:
        return _named_dataset(source, setting)
    if not source.path or "\0" in source.path:
        raise ConfigError(f"{setting}: {shown(source.path)} is not a path")
    path = Path(sysconfig.get_paths()["stdlib"] if source.path == STDLIB else source.path)
    try:
        path = path.expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, RuntimeError) as error:  # the last: a home that nobody has
        raise ConfigError(
            f"{setting}: there is no text at {shown_path(path)}",
            hint=f"give a file, a directory or the word {STDLIB!r}",
        ) from error
    except OSError as error:
        raise ResourceError(f"cannot read {shown_path(path)}: {error.strerror}") from error
    return _directory(path, source, skipped) if stat.S_ISDIR(mode) else _file(path, path.name, source.column)


def _directory(root: Path, source: TextSource, skipped: list[str]) -> Iterator[Document]:
    home = root.resolve()
    for name in sorted(_walk(root, source), key=lambda name: name.split("/")):
        path = root / name
        if not path.is_file() or not path.resolve().is_relative_to(home):
            skipped.append(name)
            continue
        try:
            yield from _file(path, name, source.column)
        except _EncodingError:
            skipped.append(name)


def _walk(root: Path, source: TextSource) -> Iterator[str]:
    """Names below ``root`` of the files to read. Hidden ones and links to directories are left out."""

    def refuse(error: OSError) -> None:
        raise ResourceError(f"cannot read {shown_path(error.filename)}: {error.strerror}") from error

    for folder, subfolders, files in os.walk(root, onerror=refuse):
        above = Path(folder).relative_to(root)

        def wanted(name: str, above: Path = above) -> bool:
            return not name.startswith(".") and not _matches((above / name).as_posix(), source.exclude)

        subfolders[:] = filter(wanted, subfolders)
        for name in filter(wanted, files):
            if _matches(relative := (above / name).as_posix(), source.include):
                yield relative


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern is for the whole relative name or for its last part; ``*`` matches "/" as well."""
    last = name.rpartition("/")[2]
    return any(fnmatchcase(name, pattern) or fnmatchcase(last, pattern) for pattern in patterns)


# --- files ------------------------------------------------------------------------------------------------------------
class _EncodingError(ConfigError):
    """A document that is no UTF-8: an error for a file named by itself, left out in a directory."""


def _file(path: Path, name: str, column: str) -> Iterator[Document]:
    """The documents of one file."""
    with _open(path) as stream:
        try:
            match path.suffix.lower():
                case ".jsonl":
                    yield from _lines(stream, path, name, column)
                case ".parquet":
                    yield from _parquet(stream, path, name, column)
                case _:
                    yield Document(name, _plain(stream, path))
        except OSError as error:
            if isinstance(error, ResourceError):
                raise
            raise ResourceError(f"cannot read {shown_path(path)}: {error.strerror or error}") from error


def _plain(stream: BinaryIO, path: Path) -> str:
    """A text with line ends as Python reads them: one line feed each."""
    data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{shown_path(path)} is larger than {MAX_FILE_BYTES} bytes", hint="cut it into documents")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _EncodingError(
            f"{shown_path(path)} is not UTF-8: {error.reason} at byte {error.start}",
            hint="give plain text, saved as UTF-8",
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _lines(stream: BinaryIO, path: Path, name: str, column: str) -> Iterator[Document]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if line.strip():
            yield Document(f"{name}:{number}", _line_text(line, column, f"{shown_path(path)}, line {number}"))


def _line_text(line: bytes, column: str, place: str) -> str:
    """The text of one line of JSON Lines."""
    if len(line) > MAX_LINE_BYTES:
        raise ConfigError(f"{place} is longer than {MAX_LINE_BYTES} bytes")
    try:
        value = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: expected an object with a string {shown(column)}, got {type(value).__name__}")
    if column not in value:
        raise ConfigError(f"{place} has no {shown(column)}, only {_names(value)}", hint="set column")
    return _checked(value[column], f"{place}: {shown(column)}")


def _parquet(stream: BinaryIO, path: Path, name: str, column: str) -> Iterator[Document]:
    arrow = _library("pyarrow", ".parquet files")
    parquet = import_module("pyarrow.parquet")
    try:
        table = parquet.ParquetFile(stream)
        _check_column(arrow, table.schema_arrow, column, shown_path(path))
        number = 0
        for batch in table.iter_batches(batch_size=BATCH, columns=[column]):
            for value in batch.column(0).to_pylist():
                number += 1
                place = f"{shown_path(path)}, record {number}: {shown(column)}"
                yield Document(f"{name}:{number}", _checked(value, place))
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's; what is wrong with the content has no number
            raise
        raise ConfigError(f"{shown_path(path)} is no intact Parquet file: {_first_line(error)}") from error


def _check_column(arrow: Any, schema: Any, column: str, place: str) -> None:
    at = schema.get_field_index(column)
    if at < 0:
        raise ConfigError(f"{place} has no column {shown(column)}, only {_names(schema.names)}", hint="set column")
    kind = schema.field(at).type
    if arrow.types.is_dictionary(kind):
        kind = kind.value_type
    if str(kind) not in ("string", "large_string", "string_view"):
        raise ConfigError(f"{place}: column {shown(column)} holds {kind}, expected string")


def _named_dataset(source: TextSource, setting: str) -> Iterator[Document]:
    """A split of a dataset that the library knows by name, downloaded unless it is in its cache."""
    library = _library("datasets", "named datasets")
    if int(library.__version__.partition(".")[0]) < FIRST_DATASETS:
        raise ConfigError(
            f"{setting}: the library datasets {library.__version__} may run code that comes with a dataset",
            hint=f"pip install 'datasets>={FIRST_DATASETS}'",
        )
    what = f"{setting}: dataset {shown(source.dataset)}"
    if not source.dataset:
        raise ConfigError(f"{what} is not a name", hint="for example Salesforce/wikitext")
    try:
        table = library.load_dataset(source.dataset, source.subset, split=source.split)
    except ConnectionError as error:
        raise ResourceError(f"{what} cannot be fetched: {_first_line(error)}") from error
    except (ValueError, OSError, library.exceptions.DatasetsError) as error:  # no such name or split, damaged files
        raise ConfigError(f"{what} cannot be loaded: {_first_line(error)}") from error
    arrow = _library("pyarrow", "named datasets")
    _check_column(arrow, table.features.arrow_schema, source.column, what)
    number = 0
    for batch in table.select_columns([source.column]).iter(batch_size=BATCH):
        for value in batch[source.column]:
            number += 1
            place = f"{what}, record {number}: {shown(source.column)}"
            yield Document(f"{source.dataset}:{number}", _checked(value, place))


# --- small parts ------------------------------------------------------------------------------------------------------
def _open(path: Path) -> BinaryIO:
    try:
        return open_plain(path)
    except UsageError as error:  # here it is the configuration that named it
        raise ConfigError(error.message, hint=error.hint) from error


def _checked(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{place} is {type(value).__name__}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no character
        raise ConfigError(f"{place} is not valid Unicode at character {error.start}: {error.reason}") from error
    return value


def _library(name: str, what: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(f"{what} need the library {name}: {error}", hint=f"pip install {name}") from error


def _names(names: Iterable[object]) -> str:
    return ", ".join(shown(name) for name in list(names)[:10]) or "none"


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0][:300]
