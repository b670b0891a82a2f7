"""OrtEncoder: an ONNX Runtime session that turns a batch of texts into vectors.

An artifact with integer weights holds its model twice: over blocks, which native operators multiply by many rows as
fast as by one, and with a scale per output channel, which is the fastest that ONNX Runtime's own operators have for
many rows. One of the two is opened.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ryzen_compile.backends.onnxruntime.session import SessionOptions, open_session, sums_bytes_exactly
from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.spec import ModelSpec

INPUTS = ("input_ids", "attention_mask")
VECTORS = "sentence_embedding"
DEFAULTS = SessionOptions()


class OrtEncoder:
    """An ``EncoderEngine`` over the model at ``path``; ``claims`` says what runs on native operators.

    ``stock`` is its second form, for a session whose products are not all native. Raises ``ArtifactError`` when a file
    cannot be loaded and ``UnsupportedError`` when it is no encoder, or when native operators are required and cannot be
    had.
    """

    name = "onnxruntime"

    def __init__(
        self, path: Path, spec: ModelSpec, options: SessionOptions = DEFAULTS, stock: Path | None = None
    ) -> None:
        self.spec = spec
        self._path = path
        self._directory: tempfile.TemporaryDirectory | None = None
        self._session: Any
        self._session, self.claims, _ = open_session(path, options)
        if stock is not None and "matmul" not in self.claims.whole and sums_bytes_exactly():
            self._session, self.claims, _ = open_session(stock, options)
        known = {value.name for value in (*self._session.get_inputs(), *self._session.get_outputs())}
        if missing := {*INPUTS, VECTORS} - known:
            raise UnsupportedError(f"{path} has no {', '.join(sorted(missing))}", hint="is it an encoder?")

    def keep(self, directory: tempfile.TemporaryDirectory) -> None:
        """Ties a temporary directory that holds the model to this engine's life."""
        self._directory = directory

    def embed(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """See ``EncoderEngine.embed``. Raises ``UsageError`` for rows longer than the model's context."""
        if tokens.shape != mask.shape or tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.spec.context:
            raise UsageError(
                f"expected tokens and a mask (B, T) with T from 1 to {self.spec.context}, got {tokens.shape} and "
                f"{mask.shape}"
            )
        feeds = {name: np.ascontiguousarray(x, np.int64) for name, x in zip(INPUTS, (tokens, mask), strict=True)}
        vectors: np.ndarray = self._session.run([VECTORS], feeds)[0]
        return vectors

    @property
    def weights_bytes(self) -> int:
        """Of the files beside the model that hold its weights, as stored; a second form included."""
        return sum(path.stat().st_size for path in self._path.parent.glob("*.onnx.data"))

    def close(self) -> None:
        self._session = None
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None
