"""``ryzen_compile.json``: what an artifact directory holds, and the check that it still does.

The manifest lists size and SHA-256 of every file beside it, so damage and mix-ups are found before anything is loaded.
It does not authenticate: whoever can rewrite a file can rewrite the manifest. Names and file kinds are therefore
checked on their own, whether or not the digests agree.

It knows nothing of models, only of files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ryzen_compile.errors import (
    ArtifactError,
    BusyError,
    ResourceError,
    TamperedError,
    UnsafeError,
    UnsupportedError,
    UsageError,
)

SCHEMA_VERSION = 2
MANIFEST_NAME = "ryzen_compile.json"
MAX_MANIFEST_BYTES = 64 << 20
MAX_FILES = 100_000
MAX_TUNED = 100  # machines that one artifact keeps figures for
LOCK_SECONDS = 10.0
_CHUNK = 1 << 20
# O_NONBLOCK: opening a FIFO without it would wait for a writer for ever. Systems that lack a flag lack the danger.
_READ_FLAGS = os.O_RDONLY
for _flag in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
    _READ_FLAGS |= getattr(os, _flag, 0)
_OWN_KEYS = ("schema_version", "made_by", "files")
_TEMPORARY = re.compile(re.escape(f".{MANIFEST_NAME}.") + r"[0-9a-f]{16}")
_KINDS = (
    (stat.S_ISLNK, "symbolic link"),
    (stat.S_ISDIR, "directory"),
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "character device"),
    (stat.S_ISBLK, "block device"),
)


def shown(name: object, limit: int = 100) -> str:
    """``name`` (usually from an untrusted file) as a message may show it: quoted, escaped, at most ``limit`` long."""
    text = name if isinstance(name, str) else repr(name)
    quoted = ascii(text[: limit + 1])  # cut before escaping, so that a huge name costs nothing
    return quoted if len(quoted) <= limit and len(text) <= limit else quoted[: limit - 4] + "...'"


def shown_path(path: str | Path) -> str:
    """A path the user gave, escaped for a message but, being theirs, not cut to a name's length."""
    return shown(str(path), 1000)


def name_fault(name: object, *, nested: bool = True) -> str | None:
    """Why ``name`` may not be joined to a directory, or None when it may.

    ``nested`` allows ``folder/file``; without it only a plain file name passes.
    """
    if not isinstance(name, str) or not name:
        return "is not a file name"
    if "\0" in name:
        return "contains a NUL byte"
    if "\\" in name:
        return "contains a backslash"
    if name.startswith("/"):
        return "is an absolute path"
    if re.match(r"[A-Za-z]:", name):
        return "starts with a drive letter"
    if name.startswith("~"):
        return "starts with '~'"
    parts = name.split("/")
    if ".." in parts:
        return "contains '..'"
    if len(parts) > 1 and not nested:
        return "points into another directory"
    if "" in parts or "." in parts:
        return "is not a normalised path"
    if max(map(len, parts)) > 255 or len(name) > 4096:
        return "is too long"
    return None


def open_plain(directory: Path, name: str) -> BinaryIO:
    """Opens ``directory/name`` for reading if it is a plain file with a single link, without ever blocking.

    Raises UnsafeError for links (in any component below ``directory``), FIFOs, sockets and devices, TamperedError when
    the file is missing, ResourceError on I/O errors.
    """
    if fault := name_fault(name):
        raise UnsafeError(f"file name {shown(name)} {fault}")
    path = directory
    try:
        for part in name.split("/")[:-1]:
            path = path / part
            if not stat.S_ISDIR(mode := os.lstat(path).st_mode):
                raise UnsafeError(f"{shown_path(path)} is a {_kind(mode)}, expected a plain directory")
        path = directory / name
        # Asked before opening only for the better message; the open below is what decides, so a swap gains nothing.
        _refuse_unless_plain(path, os.lstat(path))
        descriptor = os.open(path, _READ_FLAGS)
    except FileNotFoundError as error:
        raise TamperedError(f"{shown(name)} is missing from {shown_path(directory)}", hint="export it again") from error
    except OSError as error:
        if isinstance(error, UnsafeError):
            raise
        raise ResourceError(f"cannot read {shown_path(path)}: {error.strerror}") from error
    stream = os.fdopen(descriptor, "rb")
    try:
        _refuse_unless_plain(path, os.fstat(descriptor))
    except UnsafeError:
        stream.close()
        raise
    return stream


def write_manifest(directory: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Writes ``ryzen_compile.json`` over every other regular file of ``directory`` and returns what it wrote.

    ``facts`` become top-level keys beside ``schema_version``, ``made_by`` and ``files``; the same directory and facts
    give the same bytes. Raises UsageError for facts that are not JSON or take one of those names, UnsafeError for
    anything in the directory that is not a plain file.
    """
    if taken := sorted(set(facts) & set(_OWN_KEYS)):
        raise UsageError(f"manifest facts may not set {', '.join(taken)}")
    files: dict[str, dict[str, Any]] = {}
    for name in sorted(_walk(directory)):
        with open_plain(directory, name) as stream:
            size, digest = _digest(stream)
        files[name] = {"size": size, "sha256": digest}
    manifest = {**facts, "schema_version": SCHEMA_VERSION, "made_by": _made_by(), "files": files}
    text = _as_text(manifest)
    try:
        (directory / MANIFEST_NAME).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"cannot write {MANIFEST_NAME}: {error.strerror}") from error
    return manifest


def tuned(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The figures measured for this artifact, by machine; empty where there are none. What they say is not checked."""
    table = manifest.get("tuned", {})
    if not isinstance(table, dict) or len(table) > MAX_TUNED:
        what = f"{len(table)} entries, the limit is {MAX_TUNED}" if isinstance(table, dict) else type(table).__name__
        raise ArtifactError(f"{MANIFEST_NAME}: 'tuned' is not a table of machines: {what}", hint="export it again")
    return table


def update_tuning(directory: Path, key: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Puts ``facts`` under ``tuned[key]`` of the manifest in ``directory`` and returns the new manifest.

    Everything else keeps its meaning. A reader sees the old manifest or the new one, also after a power cut; writers
    wait for each other, up to ``LOCK_SECONDS``. An export that replaces the directory meanwhile wins: the figures are
    refused, not put beside another model. Raises UsageError for a key or facts that are not JSON, BusyError when the
    lock cannot be had or the directory was replaced, ResourceError when it cannot be written, and what
    ``read_manifest`` raises.
    """
    if not key or not key.isprintable() or len(key) > 100:
        raise UsageError(f"the key of tuned figures must be 1 to 100 printable characters, got {shown(key)}")
    with _locked(directory) as folder:
        manifest = read_manifest(directory)
        manifest["tuned"] = {**tuned(manifest), key: dict(facts)}
        tuned(manifest)
        text = _as_text(manifest)
        # Names below are looked up in the folder that is locked, wherever it has been moved to since.
        try:
            same = os.path.samestat(directory.stat(), os.fstat(folder))
            if same:
                _replace_manifest(folder, text)
        except OSError as error:
            raise ResourceError(f"cannot write {MANIFEST_NAME}: {error.strerror}") from error
    if not same:
        raise BusyError(f"{shown_path(directory)} was replaced meanwhile", hint="tune it again")
    return manifest


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an artifact directory, its schema and its file table checked (the files themselves are not).

    Raises ArtifactError when it is absent, not JSON or of another schema, UnsafeError when it is a link or lists names
    that leave the directory.
    """
    if not (directory / MANIFEST_NAME).exists() and not (directory / MANIFEST_NAME).is_symlink():
        raise ArtifactError(
            f"{shown_path(directory)} holds no {MANIFEST_NAME}",
            hint="expected a directory made by ryzen-compile export",
        )
    with open_plain(directory, MANIFEST_NAME) as stream:
        data = stream.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{MANIFEST_NAME} is over the limit of {MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except ArtifactError:  # a ValueError too, already worded
        raise
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{MANIFEST_NAME} is not JSON: {error}", hint="export it again") from error
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{MANIFEST_NAME} holds a {type(manifest).__name__}, expected an object")
    _check_schema(manifest)
    listed_files(manifest)
    return manifest


def listed_files(manifest: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """``{name: (size, sha256)}`` of a manifest; refuses names that leave the directory and malformed entries."""
    table = manifest.get("files")
    if not isinstance(table, dict):
        raise ArtifactError(f"{MANIFEST_NAME} has no table 'files'", hint="export it again")
    if len(table) > MAX_FILES:
        raise ArtifactError(f"{MANIFEST_NAME} lists {len(table)} files, the limit is {MAX_FILES}")
    files: dict[str, tuple[int, str]] = {}
    for name, entry in table.items():
        if fault := name_fault(name):
            raise UnsafeError(f"{MANIFEST_NAME} lists a file whose name {fault}: {shown(name)}")
        size = entry.get("size") if isinstance(entry, dict) else None
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ArtifactError(f"{MANIFEST_NAME}: size of {shown(name)} is not a whole number")
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ArtifactError(f"{MANIFEST_NAME}: sha256 of {shown(name)} is not 64 hexadecimal digits")
        files[name] = (size, digest)
    return files


def verify_files(directory: Path, manifest: Mapping[str, Any], *, digests: bool = True) -> tuple[str, ...]:
    """Checks every listed file's kind, size and, with ``digests``, SHA-256; returns the names of unlisted files.

    Raises UnsafeError for links and special files, TamperedError for a missing file, another size or another digest.
    Unlisted files are warned about; nothing loads them.
    """
    files = listed_files(manifest)
    for name, (size, digest) in files.items():
        with open_plain(directory, name) as stream:
            found = os.fstat(stream.fileno()).st_size
            if found != size:
                raise TamperedError(f"{shown(name)}: expected {size} bytes, got {found}", hint="export it again")
            if digests:
                _, got = _digest(stream)
                if got != digest:
                    raise TamperedError(
                        f"{shown(name)}: expected SHA-256 {digest}, got {got}",
                        hint="the file was altered; export it again",
                    )
    extra = tuple(sorted(set(_walk(directory)) - set(files)))
    if extra:
        names = ", ".join(shown(name) for name in extra[:10]) + (" ..." if len(extra) > 10 else "")
        warnings.warn(f"{shown_path(directory)} holds {len(extra)} unlisted file(s), not loaded: {names}", stacklevel=2)
    return extra


def require_writable(directory: Path) -> None:
    """Asked before minutes of measuring: raises what ``update_tuning`` would for a directory that cannot be written, is
    locked, or has a manifest that cannot be read."""
    with _locked(directory) as folder:
        tuned(read_manifest(directory))
        if not os.access(".", os.W_OK, dir_fd=folder):
            raise ResourceError(f"{shown_path(directory)} cannot be written to")


@contextmanager
def _locked(directory: Path) -> Iterator[int]:
    """A descriptor of ``directory`` that holds its exclusive lock, which the kernel frees when its holder dies."""
    try:
        import fcntl  # POSIX only, and the rest of the package runs without
    except ImportError as error:
        raise UnsupportedError("changing a manifest needs POSIX file locks, which this system lacks") from error
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ArtifactError(f"cannot open {shown_path(directory)}: {error.strerror}") from error
    try:
        until = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise BusyError(f"another process is changing {shown_path(directory)}", hint="wait") from error
                time.sleep(0.02)
        yield folder
    finally:
        os.close(folder)


def _replace_manifest(folder: int, text: str) -> None:
    """Writes the manifest of the directory ``folder``: a new file beside it, made durable, takes its name."""
    for name in os.listdir(folder):
        if _TEMPORARY.fullmatch(name):  # of a writer that died: nobody else holds the lock
            os.unlink(name, dir_fd=folder)
    temporary = f".{MANIFEST_NAME}.{secrets.token_hex(8)}"
    mode = stat.S_IMODE(os.stat(MANIFEST_NAME, dir_fd=folder, follow_symlinks=False).st_mode)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(temporary, flags, 0o600, dir_fd=folder), "w", encoding="utf-8") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, MANIFEST_NAME, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        raise
    os.fsync(folder)


def _as_text(manifest: Mapping[str, Any]) -> str:
    try:
        return json.dumps(manifest, sort_keys=True, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UsageError(f"manifest facts are not JSON: {error}") from error


def _check_schema(manifest: Mapping[str, Any]) -> None:
    schema = manifest.get("schema_version")
    if isinstance(schema, bool) or not isinstance(schema, int):
        raise ArtifactError(f"{MANIFEST_NAME} states no schema_version", hint="export it again")
    if schema != SCHEMA_VERSION:
        age = "newer" if schema > SCHEMA_VERSION else "older"
        raise ArtifactError(
            f"{MANIFEST_NAME} has the {age} schema {schema}: made by {shown(manifest.get('made_by', 'unknown'))}, "
            f"this is {_made_by()} with schema {SCHEMA_VERSION}",
            hint="re-export the model" + (" or upgrade ryzen_compile" if age == "newer" else ""),
        )


def _made_by() -> str:
    try:
        return f"ryzen_compile {metadata.version('ryzen_compile')}"
    except metadata.PackageNotFoundError:
        return "ryzen_compile (not installed)"


def _walk(directory: Path) -> Iterator[str]:
    """Names, ``/``-separated, of everything below ``directory`` that is not a directory, the manifest and what may
    become it excepted."""
    for folder, subfolders, names in os.walk(directory):
        below = Path(folder).relative_to(directory)
        links = [name for name in subfolders if Path(folder, name).is_symlink()]
        for name in [*names, *links]:
            relative = (below / name).as_posix()
            if relative != MANIFEST_NAME and not _TEMPORARY.fullmatch(relative):
                yield relative


def _digest(stream: BinaryIO) -> tuple[int, str]:
    """Bytes read and their SHA-256."""
    sha, size = hashlib.sha256(), 0
    try:
        while chunk := stream.read(_CHUNK):
            sha.update(chunk)
            size += len(chunk)
    except OSError as error:
        raise ResourceError(f"cannot read {shown_path(stream.name)}: {error.strerror}") from error
    return size, sha.hexdigest()


def _refuse_unless_plain(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeError(f"{shown_path(path)} is a {_kind(status.st_mode)}, expected a plain file")
    if status.st_nlink > 1:
        raise UnsafeError(
            f"{shown_path(path)} is a hard link ({status.st_nlink} names), expected a plain file",
            hint="copy the directory instead of linking it",
        )


def _kind(mode: int) -> str:
    return next((name for test, name in _KINDS if test(mode)), "special file")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in result if keys.count(key) > 1)
        raise ArtifactError(f"{MANIFEST_NAME} has the key {shown(twice)} twice")
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
