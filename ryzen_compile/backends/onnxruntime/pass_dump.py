"""The graph after each pass, as files to look at.

``PassDumper`` is an observer for ``run_passes``. The files are drawings, see ``drawing``: they open in Netron and hold
no weights, and no runtime can run them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ryzen_compile.backends.onnxruntime.drawing import drawing
from ryzen_compile.errors import ResourceError, UsageError
from ryzen_compile.manifest import shown_path

if TYPE_CHECKING:
    from ryzen_compile.graphs.view import GraphView
    from ryzen_compile.program import Program
    from ryzen_compile.report import PassRecord


class PassDumper:
    """Writes ``00_captured.onnx``, then a file for each pass, ``01_canonicalize.onnx``, also where it changed nothing.

    ``directory`` is made when the first file is written. Raises ``UsageError`` at once when it is a file, holds
    anything, or has no parent; ``ResourceError`` when a file cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._written = 0
        self._refuse()

    def __call__(self, record: PassRecord, before: Program, after: Program) -> None:
        from ryzen_compile.graphs.program_view import view_program

        if not self._written:
            self._refuse()  # it may have been filled since
            self._make()
            self._write("captured", view_program(before))
        self._write(record.name, view_program(after))

    def _refuse(self) -> None:
        where, hint = shown_path(self._directory), "name a directory that does not exist yet, or is empty"
        if self._directory.is_symlink() or (self._directory.exists() and not self._directory.is_dir()):
            raise UsageError(f"the graphs cannot be written to {where}: it is no directory", hint=hint)
        if self._directory.is_dir() and any(self._directory.iterdir()):
            raise UsageError(f"the directory for graphs {where} is not empty", hint=hint)
        if not self._directory.absolute().parent.is_dir():
            raise UsageError(f"the directory for graphs {where} has no parent directory", hint="create that first")

    def _make(self) -> None:
        try:
            self._directory.mkdir(exist_ok=True)
        except OSError as error:
            raise ResourceError(f"cannot create {shown_path(self._directory)}: {error.strerror}") from error

    def _write(self, name: str, view: GraphView) -> None:
        """A file appears whole or not at all."""
        stem = f"{self._written:02d}_{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:100]}"
        path = self._directory / f"{stem}.onnx"
        half = self._directory / f".{stem}.{os.getpid()}.tmp"
        try:
            half.write_bytes(drawing(view, stem).SerializeToString(deterministic=True))
            half.replace(path)
        except OSError as error:
            half.unlink(missing_ok=True)
            raise ResourceError(f"cannot write {shown_path(path)}: {error.strerror}") from error
        self._written += 1
