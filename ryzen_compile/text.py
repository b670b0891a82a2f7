"""Text to calibrate on and to measure with: from a file, from a directory, or from the Python that runs this.

Every reading is bounded, deterministic and says where it stopped being text. It knows no tokenizer, only a function
from text to ids.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ryzen_compile.errors import ResourceError, UsageError
from ryzen_compile.manifest import shown_path

BUILTIN = "builtin"
BUILTIN_CHARACTERS = 800_000
SUFFIXES = (".txt", ".md", ".py", ".jsonl")  # what is read in a directory; a file named by itself may have any
SEPARATOR = "\n\n"  # between the documents of a .jsonl file or a directory
MAX_CHARACTERS = 1 << 28  # without a bound of the caller's
MAX_LINE_BYTES = 1 << 26  # of a .jsonl file
CUT_MARGIN = 64  # tokens before a cut that may differ from those of the uncut text

# About 500,000 characters that have been in every Python since 3.11 and are not what examples/ holds out from training.
_BUILTIN_MODULES = (
    "functools.py", "collections/__init__.py", "random.py", "shutil.py", "tempfile.py", "threading.py",
    "urllib/parse.py", "dataclasses.py", "socket.py", "http/client.py", "configparser.py", "logging/__init__.py",
)  # fmt: skip
_SOURCES = f"give a file, a directory or the word {BUILTIN!r}"
_PIECE = 4000  # characters of prose, then as many of code
_CHUNK = 1 << 20
# O_NONBLOCK: a FIFO that takes a file's place between the question and the opening would wait for a writer for ever.
_READ_FLAGS = os.O_RDONLY
for _flag in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY"):
    _READ_FLAGS |= getattr(os, _flag, 0)


def read_text(source: str | os.PathLike[str], *, characters: int | None = None) -> str:
    """The text of ``source``, or its first ``characters`` characters; of a larger file no more than those are read.

    ``source`` is a UTF-8 text file; a ``.jsonl`` file with one string or one object with a "text" string per line; a
    directory, of which every file with one of ``SUFFIXES`` is read, hidden ones excepted, in the order of their paths;
    or the word "builtin" (``./builtin`` is a file of that name). Documents are joined by an empty line.

    Raises ``UsageError`` for what is missing, is no plain file, no text or empty, naming file, line or byte, and
    ``ResourceError`` for what cannot be read.
    """
    if characters is not None and characters < 1:
        raise UsageError(f"characters must be at least 1, got {characters}")
    if source == BUILTIN:
        return _builtin_text()[:characters]
    if not os.fspath(source) or "\0" in os.fspath(source):
        raise UsageError(f"{shown_path(os.fspath(source))} is not a path", hint=_SOURCES)
    path = Path(source)
    limit = MAX_CHARACTERS + 1 if characters is None else characters
    text = _joined((document for file in _files(path) for document in _documents(file, limit)), limit)
    if characters is None and len(text) > MAX_CHARACTERS:
        raise UsageError(f"{shown_path(path)} holds more than {MAX_CHARACTERS} characters", hint="read a part of it")
    if not text.strip():
        raise UsageError(f"{shown_path(path)} holds no text", hint="give a file with something to read")
    return text


def read_texts(source: str | os.PathLike[str]) -> list[str]:
    """The texts of a file, one a line: of a ``.jsonl`` file as ``read_text`` takes them, of any other the lines as they
    are, an empty line being an empty text. Raises as ``read_text`` does."""
    path = Path(source)
    with open_plain(path) as stream:
        try:
            if path.suffix.lower() == ".jsonl":
                return list(_lines(stream, path))
            text = _plain(stream, path, MAX_CHARACTERS + 1)
        except OSError as error:
            raise ResourceError(f"cannot read {shown_path(path)}: {error.strerror}") from error
    if len(text) > MAX_CHARACTERS:
        raise UsageError(f"{shown_path(path)} holds more than {MAX_CHARACTERS} characters", hint="embed it in parts")
    return split_lines(text)


def split_lines(text: str) -> list[str]:
    """Its lines without their ends, which are line feeds with or without a carriage return."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def digest(text: str) -> str:
    """SHA-256 of the text's UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def token_windows(
    text: str,
    tokenizer_encode: Callable[[str], list[int]],
    length: int,
    tokens: int,
    *,
    fewest: int | None = None,
) -> np.ndarray:
    """The text's first tokens as ``(n, length)`` int64, n being the fewest windows that hold ``tokens`` tokens.

    The windows follow each other without overlap. With ``fewest``, a text that does not fill them all gives as many as
    it fills, if these hold so many tokens. Raises ``UsageError`` for a text that is too short.
    """
    if length < 1 or tokens < 1:
        raise UsageError(f"windows need a length and a number of tokens of at least 1, got {length} and {tokens}")
    windows = -(-tokens // length)
    needed = windows * length
    ids = _first_ids(text, tokenizer_encode, needed)
    if fewest is not None and fewest <= len(ids) // length * length < needed:
        return np.array(ids[: len(ids) // length * length], dtype=np.int64).reshape(-1, length)
    if len(ids) < needed:
        raise UsageError(
            f"the text has {len(ids)} tokens, {needed} are needed for the {tokens} asked for ({windows} x {length})",
            hint="give a longer text or ask for fewer tokens",
        )
    return np.array(ids, dtype=np.int64).reshape(windows, length)


def _first_ids(text: str, encode: Callable[[str], list[int]], needed: int) -> list[int]:
    """At most ``needed`` ids. A long text is not tokenized to its end for a few windows at its beginning."""
    taken = 8 * needed
    while True:
        ids = encode(text[:taken])
        if taken >= len(text) or len(ids) >= needed + CUT_MARGIN:
            return ids[:needed]
        taken *= 4


# --- builtin ----------------------------------------------------------------------------------------------------------
def _builtin_text() -> str:
    """Documentation topics and library sources in turns: prose and code, the same for one version of Python."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_paths()["stdlib"])
    sources = (library / name for name in _BUILTIN_MODULES)
    prose = SEPARATOR.join(topics[name] for name in sorted(topics))
    code = SEPARATOR.join(path.read_text(encoding="utf-8") for path in sources if path.is_file())
    turns = zip(_pieces(prose), _pieces(code), strict=False)  # the rest of the longer one is left
    text = SEPARATOR.join(piece for turn in turns for piece in turn)
    if len(text) < BUILTIN_CHARACTERS:
        raise UsageError(
            f"this Python's documentation and sources give {len(text)} characters of built-in text, "
            f"expected {BUILTIN_CHARACTERS}",
            hint="it was installed without its sources; give a text file instead",
        )
    return text[:BUILTIN_CHARACTERS]


def _pieces(text: str) -> Iterator[str]:
    """Cuts at the first line end after ``_PIECE`` characters."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE) + 1 or len(text)
        yield text[start:end].strip("\n")
        start = end


# --- files ------------------------------------------------------------------------------------------------------------
def _files(path: Path) -> Iterable[Path]:
    """``path`` itself, or what a directory holds, in the order of the names below it on every system."""
    if not stat.S_ISDIR(_mode(path)):
        return (path,)
    found = sorted(_walk(path), key=lambda file: file.relative_to(path).as_posix())
    if not found:
        raise UsageError(f"{shown_path(path)} holds no file that ends in {', '.join(SUFFIXES)}")
    return found


def _walk(directory: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise ResourceError(f"cannot read {shown_path(error.filename)}: {error.strerror}") from error

    for folder, subfolders, names in os.walk(directory, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield Path(folder, name)


def _joined(documents: Iterable[str], limit: int) -> str:
    """At most ``limit`` characters; documents after them are not even opened."""
    parts: list[str] = []
    held = -len(SEPARATOR)
    for document in documents:
        if not document.strip():
            continue
        parts.append(document)
        held += len(SEPARATOR) + len(document)
        if held >= limit:
            break
    return SEPARATOR.join(parts)[:limit]


def _documents(path: Path, limit: int) -> Iterator[str]:
    """The documents of one file, each with at least its first ``limit`` characters."""
    with open_plain(path) as stream:
        try:
            if path.suffix.lower() == ".jsonl":
                yield from _lines(stream, path)
            else:
                yield _plain(stream, path, limit)
        except OSError as error:
            raise ResourceError(f"cannot read {shown_path(path)}: {error.strerror}") from error


def _plain(stream: BinaryIO, path: Path, limit: int) -> str:
    decoder = codecs.getincrementaldecoder("utf-8")()
    parts: list[str] = []
    held = read = 0
    more = True
    while more and held < limit:
        chunk = stream.read(_CHUNK)
        more = bool(chunk)
        pending = len(decoder.getstate()[0])  # bytes of a character that the chunk before began
        try:
            parts.append(decoder.decode(chunk, final=not more))
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{shown_path(path)} is not UTF-8: {error.reason} at byte {read - pending + error.start}",
                hint="give plain text, saved as UTF-8",
            ) from error
        read += len(chunk)
        held += len(parts[-1])
    text = "".join(parts)[:limit].removeprefix("\ufeff")
    if (at := text.find("\0")) >= 0:
        raise UsageError(f"{shown_path(path)} is binary: character {at} is NUL", hint="give plain text, saved as UTF-8")
    return text


def _lines(stream: BinaryIO, path: Path) -> Iterator[str]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if line.strip():
            yield _line_text(line, f"{shown_path(path)}, line {number}")


def _line_text(line: bytes, place: str) -> str:
    """The text of one line of JSON Lines."""
    if len(line) > MAX_LINE_BYTES:
        raise UsageError(f"{place} is longer than {MAX_LINE_BYTES} bytes")
    try:
        value = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place} is not JSON in UTF-8: {error}") from error
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        got = "an object without it" if isinstance(value, dict) and "text" not in value else type(text).__name__
        raise UsageError(f'{place}: expected a string, or an object with a string "text", got {got}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no character
        raise UsageError(f"{place} is not valid Unicode at character {error.start}: {error.reason}") from error
    return text


def open_plain(path: Path) -> BinaryIO:
    """Opens a plain file without ever blocking; links are followed, for the text is the user's own.

    Raises ``UsageError`` for a path where there is none, ``ResourceError`` for one that cannot be read.
    """
    _refuse_unless_plain(path, _mode(path))
    try:
        descriptor = os.open(path, _READ_FLAGS)
    except OSError as error:
        raise ResourceError(f"cannot read {shown_path(path)}: {error.strerror}") from error
    stream = os.fdopen(descriptor, "rb")
    try:
        _refuse_unless_plain(path, os.fstat(descriptor).st_mode)  # it may have been swapped since it was asked for
    except UsageError:
        stream.close()
        raise
    return stream


def _mode(path: Path) -> int:
    """What kind of file is there, links followed."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"there is no text at {shown_path(path)}", hint=_SOURCES) from error
    except OSError as error:
        raise ResourceError(f"cannot read {shown_path(path)}: {error.strerror}") from error


def _refuse_unless_plain(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise UsageError(f"{shown_path(path)} is neither a plain file nor a directory", hint="give a text file")
