"""``workflow.json``: which phases were finished, of which inputs, and what they left behind.

A phase is written down when everything that it wrote is on the disk, in one step: whatever interrupts a workflow, the
journal tells of whole phases only.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from ryzen_compile.errors import ArtifactError, ResourceError
from ryzen_compile.fields import Fields
from ryzen_compile.manifest import shown_path
from ryzen_compile.workflow.digests import digest_path
from ryzen_compile.workflow.report_schema import Phase

JOURNAL_NAME = "workflow.json"
MAX_BYTES = 1 << 20


class Entry(Fields):
    """A finished phase. ``outputs`` are the digests of files and directories below the workflow's output."""

    inputs: str
    outputs: dict[str, str]
    seconds: float = Field(ge=0)
    skipped: str = Field(default="", description="why there was nothing to do")


class Content(Fields):
    """What the file holds."""

    schema_version: Literal[1]
    phases: dict[Phase, Entry]


class Journal:
    """Of the workflow in ``directory``. Raises ``ArtifactError`` for a file that is damaged or of another schema."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / JOURNAL_NAME
        self._phases = dict(self._read().phases)

    def begin(self) -> None:
        """Marks the directory as a workflow's, before anything else is written there."""
        if not self._path.exists():
            self._write()

    def finished(self, phase: Phase, inputs: str | None = None) -> Entry | None:
        """The phase's entry if it was finished of ``inputs`` (None: of any) and what it left is there, unchanged."""
        entry = self._phases.get(phase)
        if entry is None or inputs not in (None, entry.inputs):
            return None
        intact = all(digest_path(self.directory / name) == digest for name, digest in entry.outputs.items())
        return entry if intact else None

    def forget(self, phase: Phase) -> None:
        """It is about to run again."""
        if self._phases.pop(phase, None) is not None:
            self._write()

    def finish(self, phase: Phase, inputs: str, outputs: tuple[str, ...], seconds: float, skipped: str = "") -> Entry:
        """Writes down that the phase is done. Raises ``ResourceError`` when that cannot be written."""
        digests = {}
        for name in outputs:
            digest = digest_path(self.directory / name)
            if digest is None:
                raise ResourceError(f"{shown_path(self.directory / name)} is gone", hint=f"run {phase} again")
            digests[name] = digest
        entry = Entry(inputs=inputs, outputs=digests, seconds=seconds, skipped=skipped)
        self._phases[phase] = entry
        self._write()
        return entry

    def _read(self) -> Content:
        try:
            with self._path.open("rb") as stream:
                text = stream.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return Content(schema_version=1, phases={})
        except OSError as error:
            raise ResourceError(f"{shown_path(self._path)} cannot be read: {error.strerror}") from error
        if len(text) > MAX_BYTES:
            raise self._foreign(f"it is larger than {MAX_BYTES} bytes")
        try:
            return Content.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise self._foreign(f"{where + ': ' if where else ''}{first['msg']}") from error

    def _foreign(self, why: str) -> ArtifactError:
        return ArtifactError(
            f"{shown_path(self._path)} is no journal of a workflow: {why}",
            hint="choose another output, or remove it to run everything anew",
        )

    def _write(self) -> None:
        content = Content(schema_version=1, phases=self._phases)
        write_file(self._path, content.model_dump_json(indent=1) + "\n")


def write_file(path: Path, text: str) -> None:
    """``text`` in place of what ``path`` held, whole or not at all, and on the disk when this returns.

    Raises ``ResourceError`` when it cannot be written.
    """
    beside = path.parent / f".{path.name}.new"
    try:
        with beside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
        _make_durable(path.parent)
    except OSError as error:
        hint = "free some space, then run it again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise ResourceError(f"{shown_path(path)} cannot be written: {error.strerror}", hint=hint) from error
    finally:
        with suppress(OSError):  # it is there only if something went wrong, and that is what is told
            beside.unlink(missing_ok=True)


def make_directory(path: Path) -> None:
    """``path`` and what it lies in, where they are missing. Raises ``ResourceError``."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"directory {shown_path(path)} cannot be made: {error.strerror}") from error


def _make_durable(directory: Path) -> None:
    """The names in it, behind a rename."""
    if os.name != "posix":  # elsewhere a directory cannot be opened
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
